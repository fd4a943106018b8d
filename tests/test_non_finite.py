"""Losses that are NaN or infinite: raised, stopped at or left out; and the device read no more often than said."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Batch, class_batches, linear, make_trainer, refused
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from camshaft.callbacks import Accumulate, ClipGradients, Penalty, RunCheckpoint, StopOnNonFinite
from camshaft.callbacks.non_finite import find_non_finite
from camshaft.engine import (
    ConfigurationError,
    DataError,
    Engine,
    GradientsReady,
    LossReady,
    StepEnd,
    Trainer,
    UpdateEnd,
    at,
)


def spoilt(step: int, num_steps: int) -> list[Batch]:
    """Batches of which the one at ``step`` has a loss of NaN."""
    data = class_batches(*[8] * num_steps)
    data[step - 1] = (torch.full((8, 4), math.nan), data[step - 1][1])
    return data


def flat(engine: Engine) -> Tensor:
    return nn.utils.parameters_to_vector(engine.parts["model"].parameters()).detach().clone()


@pytest.mark.parametrize(("every_steps", "place"), [(1, "7 and 7"), (3, "7 and 9"), (5, "6 and 10"), (50, "1 and 12")])
def test_raise_names_the_steps_between_which_it_happened(every_steps: int, place: str) -> None:
    """Step 7 of 12: found at the next reading, or at the end of the epoch."""
    trainer = make_trainer(StopOnNonFinite("raise", every_steps=every_steps))
    with pytest.raises(DataError, match=rf"^The loss was NaN or infinite between steps {place}, first at step 7; "):
        trainer.fit(spoilt(7, 12), epochs=1)
    assert trainer.step == int(place.split()[-1])


def test_the_place_is_told_in_the_second_epoch_and_the_second_fit_too() -> None:
    """Steps count on, and what was read at the end of an epoch is not suspected again."""
    good = class_batches(8, 8)
    trainer = make_trainer(StopOnNonFinite(every_steps=50))
    trainer.fit(good, epochs=2)
    with pytest.raises(DataError, match="between steps 5 and 6"):
        trainer.fit(spoilt(2, 2), epochs=1)


def test_raise_is_the_default() -> None:
    with pytest.raises(DataError, match="NaN or infinite"):
        make_trainer(StopOnNonFinite()).fit(spoilt(2, 2), epochs=1)


def test_stop_ends_the_run_with_a_reason_that_names_the_place() -> None:
    trainer = make_trainer(StopOnNonFinite("stop", every_steps=3))
    history = trainer.fit(spoilt(4, 12), epochs=5)
    said = "StopOnNonFinite: the loss was NaN or infinite between steps 4 and 6, first at step 4; not finite are the"
    assert history.reason.startswith(said)
    assert trainer.step == 6


@pytest.mark.parametrize("policy", ["raise", "stop", "skip"])
def test_finite_losses_pass_and_the_weights_are_the_same_to_the_bit(policy: Any) -> None:
    """Looking changes nothing."""
    watched, plain = make_trainer(StopOnNonFinite(policy, every_steps=2)), make_trainer()
    for trainer in (watched, plain):
        trainer.fit(class_batches(8, 8, 3), epochs=3)
    assert torch.equal(flat(watched), flat(plain))
    assert watched.history.reason == "3 epochs done"


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_skip_gives_the_weights_of_a_run_without_that_batch(optimizer: Any) -> None:
    """To the bit, the optimizer's momentum included."""
    trainers = []
    data = spoilt(3, 6)
    for batches, callbacks in ((data, [StopOnNonFinite("skip")]), (data[:2] + data[3:], [])):
        model = linear()
        settings = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
        trainers.append(
            Trainer(
                model, optimizer(model.parameters(), lr=0.1, **settings), nn.CrossEntropyLoss(), callbacks=callbacks
            )
        )
        trainers[-1].fit(batches, epochs=2)
    with_skip, without = trainers
    assert torch.equal(flat(with_skip), flat(without))
    assert flat(with_skip).isfinite().all()
    assert (with_skip.num_updates, with_skip.num_skipped_updates) == (10, 2)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_an_infinite_loss_is_found_like_one_that_is_nan(value: float) -> None:
    """Here a handler before it makes it so, and the gradients stay finite: only the loss can tell."""
    data = class_batches(8, 8, 8)
    skipping, without = make_trainer(), make_trainer()
    skipping.subscribe(LossReady, lambda event: event.loss + value, when=at(2))
    skipping.attach(StopOnNonFinite("skip"))
    skipping.fit(data, epochs=1)
    without.fit([data[0], data[2]], epochs=1)
    assert torch.equal(flat(skipping), flat(without))
    assert skipping.num_skipped_updates == 1


def test_skip_leaves_out_the_whole_window_that_holds_the_batch_and_no_other() -> None:
    """Batch 3 of 6 in windows of two: the update of steps 3 and 4 is left out."""
    data = spoilt(3, 6)
    skipping, without = make_trainer(Accumulate(2), StopOnNonFinite("skip")), make_trainer(Accumulate(2))
    steps: list[int] = []
    skipping.subscribe(UpdateEnd, lambda event: steps.append(event.engine.step))
    skipping.fit(data, epochs=1)
    without.fit(data[:2] + data[4:], epochs=1)
    assert steps == [2, 6]
    assert torch.equal(flat(skipping), flat(without))


def test_skip_works_with_a_loss_scaler() -> None:
    """A NaN is left out, and the scaler continues as after any overflow."""
    data = spoilt(2, 4)
    skipping, without = make_trainer(StopOnNonFinite("skip")), make_trainer()
    skipping.update.use_scaler(torch.amp.GradScaler("cpu", init_scale=2.0**10))
    skipping.fit(data, epochs=1)
    without.fit(data[:1] + data[2:], epochs=1)
    assert torch.equal(flat(skipping), flat(without))
    assert (skipping.num_updates, skipping.num_skipped_updates) == (3, 1)


def test_the_history_shows_the_loss_that_was_not_finite() -> None:
    """Skipping an update does not prettify the record."""
    history = make_trainer(StopOnNonFinite("skip")).fit(spoilt(2, 4), epochs=1)
    assert math.isnan(history["train_loss"][0])


class HostReads(TorchDispatchMode):
    """Counts how often a tensor's value is fetched as a Python number: ``.item()``, ``bool(t)``, ``float(t)``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads_after_each_step(*callbacks: Any, num_steps: int) -> list[int]:
    """How many values had come to the host when each step was over."""
    trainer, counts = make_trainer(*callbacks), list[int]()
    with HostReads() as reads:
        trainer.subscribe(StepEnd, lambda event: counts.append(reads.count))
        trainer.fit(class_batches(*[8] * num_steps), epochs=1)
    return counts


@pytest.mark.parametrize("policy", ["raise", "stop"])
def test_the_flag_is_read_every_so_many_steps_and_not_between(policy: Any) -> None:
    """One value at steps 4 and 8 of ten; with clipping, a penalty and a window beside it none more."""
    others = [Penalty(l1=0.1, l2=0.1), ClipGradients(norm=1.0), Accumulate(2)]
    counts = reads_after_each_step(*others, StopOnNonFinite(policy, every_steps=4), num_steps=10)
    assert counts == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]


def test_skip_reads_once_per_update() -> None:
    """It has to know before the optimizer steps: here every second of six batches."""
    assert reads_after_each_step(StopOnNonFinite("skip"), Accumulate(2), num_steps=6) == [0, 1, 1, 2, 2, 3]


def test_the_count_of_host_reads_sees_what_it_should() -> None:
    """A handler that does read the loss is counted, or the tests above would prove nothing."""
    trainer, data = make_trainer(), class_batches(8, 8)
    trainer.subscribe(StepEnd, lambda event: losses.append(event.output.sum().item()))
    losses: list[float] = []
    with HostReads() as reads:
        trainer.fit(data, epochs=1)
    assert (len(losses), reads.count) == (2, 2)


def test_a_loop_of_ones_own_is_watched_through_engine_update() -> None:
    """In script style; the skipped batch leaves the weights alone."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(model=model, optimizer=optimizer, callbacks=[StopOnNonFinite("skip")])
    for _ in engine.epochs(1):
        for inputs, target in engine.train(spoilt(2, 3)):
            engine.update(nn.functional.cross_entropy(model(inputs), target))
    assert flat(engine).isfinite().all()
    assert (engine.num_updates, engine.num_skipped_updates) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "ignore"}, r"^StopOnNonFinite does not know 'ignore'\. Write \"raise\", \"stop\" or \"skip\"\.$"),
        ({"policy": 10}, r"does not know 10\. Write"),
        ({"every_steps": 0}, r"^StopOnNonFinite's every_steps is 0, which is not a count\. Pass a whole number"),
        ({"every_steps": 2.5}, r"every_steps is 2\.5, which is not a count\. Pass a whole number"),
        ({"every_steps": True}, r"every_steps is True, which is not a count\. Pass a whole number"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_when_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        StopOnNonFinite(**arguments)


def test_the_class_instead_of_an_instance_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"the class StopOnNonFinite, not an instance\. Did you forget \(\)\?"
    ):
        make_trainer(StopOnNonFinite)  # type: ignore[arg-type]  # the mistake


def test_a_bad_batch_of_an_open_window_is_remembered_on_resume(tmp_path: Path) -> None:
    """Batch 1 of a window of three is NaN; the run is cut after batch 2, and the update is left out all the same."""
    data = class_batches(8, 8, 8, 8, 8, 8)
    data[0] = (data[0][0] * math.nan, data[0][1])

    def run(stop: int | None, resume: str | None) -> Engine:
        trainer = make_trainer(StopOnNonFinite("skip"), Accumulate(3), RunCheckpoint(tmp_path))
        trainer.subscribe(
            StepEnd, lambda event: trainer.run.interrupt(signal.SIGTERM) if trainer.step == stop else None
        )
        trainer.fit(data, epochs=1, resume=resume)
        return trainer

    run(2, None)
    resumed = run(None, "auto")
    assert (resumed.num_updates, resumed.num_skipped_updates) == (1, 1)
    assert all(parameter.isfinite().all() for parameter in resumed.parts["model"].parameters())


def test_a_run_that_was_cut_leaves_no_flag_to_the_next() -> None:
    data = class_batches(8, 8, 8)
    trainer = make_trainer(StopOnNonFinite("skip"), Accumulate(3))
    trainer.subscribe(StepEnd, lambda event: trainer.run.interrupt(signal.SIGTERM) if trainer.step == 1 else None)
    trainer.fit([(inputs * math.nan, target) for inputs, target in data], epochs=1)
    trainer.fit(data, epochs=1)
    assert (trainer.num_updates, trainer.num_skipped_updates) == (1, 0)


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"policy": "warn"}, "does not know 'warn'"),
        ({"every_steps": 0}, "every_steps is 0"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_where_it_is_written(settings: dict[str, Any], phrase: str) -> None:
    with refused(ConfigurationError, phrase):
        StopOnNonFinite(**settings)


# What is not finite -----------------------------------------------------------------------------------------


class Logarithm(nn.Module):
    """Gives NaN for what is negative."""

    def forward(self, x: Tensor) -> Tensor:
        return x.log()


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.BatchNorm1d(6), Logarithm()), nn.Linear(6, 3))


def test_the_first_module_with_such_an_output_is_named() -> None:
    trainer = make_trainer(StopOnNonFinite(every_steps=1), model=layers())
    trainer.subscribe(GradientsReady, lambda event: trainer.run.skip_update())  # or all parameters would be NaN
    with refused(DataError, 'the first module to return such values is "1.1" (Logarithm)', "Lower the learning rate"):
        trainer.fit(class_batches(8, 8), epochs=1)


def test_parameters_and_inputs_that_are_not_finite_are_named() -> None:
    trainer = make_trainer(StopOnNonFinite(every_steps=1))
    with pytest.raises(DataError) as info:
        trainer.fit(spoilt(2, 3), epochs=1)
    assert "not finite are the parameters weight, bias" in str(info.value)
    assert "the inputs of the present batch are not finite" in str(info.value)


def test_a_loss_that_alone_is_not_finite_is_told_so() -> None:
    model = linear()
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), 0.0), lambda output, target: output.sum() / 0.0,
        callbacks=[ClipGradients(value=1.0), StopOnNonFinite("stop", every_steps=1)],
    )  # fmt: skip
    trainer.subscribe(LossReady, lambda event: event.loss.detach() * 0 + model(class_batches(8)[0][0]).sum() * 0)
    history = trainer.fit(class_batches(8), epochs=1)
    assert "the parameters, and the outputs for the present batch, are finite" in history.reason


def test_looking_changes_nothing() -> None:
    """Neither statistics of batch normalisation nor random numbers nor hooks."""
    trainer = make_trainer(model=layers())
    trainer.subscribe(GradientsReady, lambda event: trainer.run.skip_update())
    trainer.fit(class_batches(8), epochs=1)
    state = {name: value.clone() for name, value in trainer.parts["model"].state_dict().items()}
    seen: list[str] = []

    def look(event: StepEnd) -> None:
        before = torch.get_rng_state()
        seen.append(find_non_finite(trainer))
        assert torch.equal(torch.get_rng_state(), before)

    trainer.subscribe(StepEnd, look)
    trainer.fit(class_batches(8), epochs=1)
    assert '"1.1" (Logarithm)' in seen[0]
    again = make_trainer(model=layers())
    again.subscribe(GradientsReady, lambda event: again.run.skip_update())
    again.fit(class_batches(8), epochs=2)
    now, expected = trainer.parts["model"].state_dict(), again.parts["model"].state_dict()
    assert all(torch.equal(now[name], expected[name]) for name in state)
    assert not any(module._forward_hooks for module in trainer.parts["model"].modules())


def test_many_losses_between_two_looks_take_bounded_memory_and_the_first_step_is_known() -> None:
    handler = StopOnNonFinite("stop", every_steps=10**6)
    most: list[int] = []

    def step(engine: Engine, batch: float) -> None:
        loss = engine.parts["model"](torch.ones(1, 1)).mean() * batch
        engine.update(loss)
        most.append(sum(len(tensor) for tensor in handler._losses.values()))

    model = nn.Linear(1, 1)
    engine = Engine(step, model=model, optimizer=torch.optim.SGD(model.parameters(), 0.0), callbacks=[handler])
    engine.fit([1.0] * 1499 + [math.nan] + [1.0] * 700, epochs=1)
    assert "first at step 1500" in engine.history.reason
    assert max(most) <= 1000
