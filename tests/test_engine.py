"""The loop: what runs, when, how often, and that watching it changes nothing."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refused
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from camshaft.callbacks import (
    BestCheckpoint,
    EarlyStopping,
    Metrics,
    Placement,
    ProgressBar,
    Report,
    RunDirectory,
    TensorBoard,
)
from camshaft.engine import (
    BatchReady,
    Callback,
    ConfigurationError,
    Engine,
    EngineStateError,
    EpochEnd,
    EpochStart,
    Event,
    FitEnd,
    FitStart,
    GradientsReady,
    Logged,
    LossReady,
    RunFailed,
    Settled,
    StepEnd,
    Trainer,
    UpdateEnd,
    ValidationEnd,
    ValidationStart,
    ValidationStepEnd,
    every,
    repeat,
)

ALL_EVENTS: list[type[Event]] = [
    FitStart, EpochStart, BatchReady, LossReady, GradientsReady, UpdateEnd, StepEnd, Logged, ValidationStart,
    ValidationStepEnd, ValidationEnd, EpochEnd, Settled, RunFailed, FitEnd,
]  # fmt: skip


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def loader(shuffle: bool = True) -> DataLoader[tuple[Tensor, ...]]:
    """50 samples in batches of 16: the last one has 2."""
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(50, 6, generator=generator)
    target = torch.randint(0, 3, (50,), generator=generator)
    return DataLoader(TensorDataset(inputs, target), batch_size=16, shuffle=shuffle)


def by_hand(epochs: int) -> list[Tensor]:
    """The loop that everyone writes."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss_fn = nn.CrossEntropyLoss()
    data = loader()
    torch.manual_seed(2)
    model.train()
    for _ in range(epochs):
        for inputs, target in data:
            optimizer.zero_grad()
            loss_fn(model(inputs), target).backward()
            optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def trainer(callbacks: list[Callback] | None = None, **settings: Any) -> Engine:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks or [], **settings)


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float().mean()


def assert_identical(model: nn.Module, weights: list[Tensor]) -> None:
    for ours, theirs in zip(model.parameters(), weights, strict=True):
        assert torch.equal(ours, theirs)


def record_events(engine: Engine) -> list[str]:
    """Let every event write its name into a list."""
    seen: list[str] = []
    for event in ALL_EVENTS:
        engine.subscribe(event, lambda event: seen.append(type(event).__name__))
    return seen


def test_a_plain_fit_equals_the_hand_written_loop_bit_for_bit() -> None:
    plain = trainer()
    data = loader()
    torch.manual_seed(2)
    plain.fit(data, epochs=3)
    assert_identical(plain.parts["model"], by_hand(3))


def stock_observers(directory: Path) -> list[Callback]:
    return [
        RunDirectory(directory, terminal=False),
        Placement("cpu"),
        Metrics({"acc": accuracy}),
        ProgressBar(),
        EarlyStopping("train_loss", patience=50),
        BestCheckpoint("train_loss", top_k=2),
        TensorBoard(),
        Report(),
    ]


class Nosy(Callback):
    """Draws random numbers wherever an observer might."""

    def on_validation_end(self, event: ValidationEnd) -> None:
        torch.rand(1), random.random(), np.random.rand()

    def on_epoch_end(self, event: EpochEnd) -> None:
        torch.rand(1), random.random(), np.random.rand()


@pytest.mark.parametrize("validate_every", ["1 epochs", "2 epochs", "3 steps", "1 step"])
def test_watching_changes_nothing(tmp_path: Path, validate_every: str) -> None:
    """Every stock observer, and validation as often as one likes, leave the weights as they would be."""
    watched = trainer([*stock_observers(tmp_path), Nosy()])
    data, val = loader(), loader()
    torch.manual_seed(2)
    watched.fit(data, val, epochs=3, validate_every=validate_every)
    assert_identical(watched.parts["model"], by_hand(3))


def test_a_validation_leaves_the_generator_of_its_loader_as_it_was() -> None:
    """So each one reads in the same order, also that of a run that is resumed; training may share the generator."""
    generator = torch.Generator().manual_seed(5)
    before, orders = generator.get_state(), []
    val = DataLoader(TensorDataset(torch.arange(9)), batch_size=3, shuffle=True, generator=generator)
    engine = Engine(lambda engine, batch: None if engine.training else orders.append(batch[0].tolist()))
    engine.fit([1, 2], val, epochs=2)
    engine.evaluate(val)
    assert orders[:3] == orders[3:6] == orders[6:]
    assert torch.equal(generator.get_state(), before)


def test_the_three_styles_give_the_same_weights_and_history() -> None:
    """Script, function and class style are one loop."""

    def step(engine: Engine, batch: Any) -> Tensor:
        inputs, target = batch
        loss: Tensor = nn.functional.cross_entropy(engine.parts["model"](inputs), target)
        if engine.training:
            engine.update(loss)
        return loss

    def function_style(engine: Engine, train: Any, val: Any) -> None:
        engine.fit(train, val, epochs=2)

    def script_style(engine: Engine, train: Any, val: Any) -> None:
        model, optimizer = engine.parts["model"], engine.parts["optimizer"]
        for _ in engine.epochs(2):
            for inputs, target in engine.train(train):
                loss = nn.functional.cross_entropy(model(inputs), target)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                engine.record(loss=loss, weight=len(inputs))
            for inputs, target in engine.validate(val):
                engine.record(loss=nn.functional.cross_entropy(model(inputs), target), weight=len(inputs))

    classy = trainer()
    styles: list[tuple[Engine, Callable[[Engine, Any, Any], None]]] = [
        (classy, function_style), (Engine(step, **_parts()), function_style), (Engine(**_parts()), script_style)
    ]  # fmt: skip
    for engine, run in styles:
        data = loader()
        torch.manual_seed(2)
        run(engine, data, loader(shuffle=False))
        assert_identical(engine.parts["model"], [p.detach() for p in classy.parts["model"].parameters()])
        assert dict(engine.history) == dict(classy.history)
    assert list(classy.history) == ["epoch", "step", "train_loss", "val_loss"]


def _parts() -> dict[str, Any]:
    model = network()
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}


def test_events_fire_in_the_order_of_the_timeline() -> None:
    engine = trainer()
    seen = record_events(engine)
    batches = list(loader())[:2]
    engine.fit(batches, batches[:1], epochs=1)
    step = ["BatchReady", "LossReady", "GradientsReady", "UpdateEnd", "StepEnd", "Settled"]
    validation = ["ValidationStart", "BatchReady", "ValidationStepEnd", "ValidationEnd"]
    assert seen == ["FitStart", "EpochStart", *step, *step, *validation, "EpochEnd", "Settled", "FitEnd"]


def test_a_validation_in_mid_epoch_stands_between_step_end_and_settled() -> None:
    engine = trainer()
    seen = record_events(engine)
    engine.fit(list(loader())[:2], list(loader())[:1], epochs=1, validate_every="1 step")
    middle = seen[seen.index("StepEnd") : seen.index("Settled") + 1]
    assert middle == ["StepEnd", "ValidationStart", "BatchReady", "ValidationStepEnd", "ValidationEnd", "Settled"]


def test_the_timeline_in_the_events_file_is_the_order_in_which_they_are_defined() -> None:
    from camshaft.engine import events

    lines = [line.split() for line in (events.__doc__ or "").splitlines() if "for this step" not in line]
    told = [words[0] for words in lines if words and words[0] in dir(events)]
    assert list(dict.fromkeys(told)) == [event.__name__ for event in ALL_EVENTS]
    assert [event for event in events.known_events().values() if event in ALL_EVENTS] == ALL_EVENTS


def test_epoch_values_are_sample_weighted_with_an_uneven_last_batch() -> None:
    """The last batch has 2 samples of 50; a mean of batch means would be off in the second digit."""
    engine = trainer(metrics={"acc": accuracy})
    engine.parts["optimizer"].param_groups[0]["lr"] = 0.0
    engine.parts["model"].eval()
    expected_loss, expected_acc = 0.0, 0.0
    for inputs, target in loader():
        output = engine.parts["model"](inputs).detach().double()
        expected_loss += nn.functional.cross_entropy(output, target, reduction="sum").item()
        expected_acc += (output.argmax(1) == target).double().sum().item()
    history = engine.fit(loader(), loader(), epochs=1)
    assert history["val_loss"][0] == pytest.approx(expected_loss / 50, abs=1e-6)
    assert history["val_acc"][0] == pytest.approx(expected_acc / 50, abs=1e-9)
    assert engine.evaluate(loader())["loss"] == pytest.approx(expected_loss / 50, abs=1e-6)


def test_a_stop_takes_effect_after_the_step_and_gives_its_reason() -> None:
    engine = trainer()
    engine.subscribe(StepEnd, lambda event: event.engine.stop("enough") if event.engine.step == 6 else None)
    history = engine.fit(loader(), epochs=10)
    assert (engine.step, engine.epoch, history.reason) == (6, 2, "enough")
    assert history["epoch"] == [1, 2]


def test_a_stop_before_min_epochs_does_not_count() -> None:
    engine = trainer()
    engine.subscribe(EpochEnd, lambda event: event.engine.stop("early"))
    assert engine.fit(loader(), epochs=10, min_epochs=3)["epoch"] == [1, 2, 3]


def test_max_steps_ends_in_mid_epoch_and_still_validates() -> None:
    engine = trainer()
    history = engine.fit(loader(), loader(), max_steps=6)
    assert (engine.step, history["step"], history.reason) == (6, [4, 6], "max_steps=6 reached")
    assert len(history["val_loss"]) == 2


def test_a_run_by_steps_validates_every_so_many_steps_on_an_endless_stream() -> None:
    def stream() -> Iterator[Any]:
        while True:
            yield from loader()

    engine = trainer()
    history = engine.fit(stream, loader(), max_steps=10, validate_every=4)
    assert [row["step"] for row in history.validations] == [4, 8]
    assert (engine.step, engine.epoch) == (10, 1)


def test_an_epoch_of_set_length_goes_on_in_the_data_where_the_last_one_stopped() -> None:
    seen: list[int] = []
    engine = Engine(lambda engine, batch: seen.append(batch))
    engine.fit(repeat([1, 2, 3, 4, 5]), epochs=3, epoch_length=2)
    assert seen == [1, 2, 3, 4, 5, 1]


def test_zero_epochs_fire_start_and_end_only() -> None:
    engine = trainer()
    seen = record_events(engine)
    engine.fit(loader(), epochs=0)
    assert seen == ["FitStart", "FitEnd"]


def test_a_second_fit_goes_on_with_the_counters() -> None:
    engine = trainer()
    engine.fit(loader(), epochs=2)
    history = engine.fit(loader(), epochs=1)
    assert history["epoch"] == [1, 2, 3]
    assert engine.step == 12


def test_two_fits_equal_one_bit_for_bit() -> None:
    engine, data = trainer(), loader()
    torch.manual_seed(2)
    engine.fit(data, epochs=1)
    engine.fit(data, epochs=2)
    assert_identical(engine.parts["model"], by_hand(3))


def test_the_model_is_set_to_train_and_put_back() -> None:
    engine = trainer()
    engine.parts["model"].eval()
    modes: list[bool] = []
    engine.subscribe(StepEnd, lambda event: modes.append(event.engine.parts["model"].training))
    engine.fit(loader(), loader(), epochs=2)
    assert all(modes)
    assert not engine.parts["model"].training


def test_a_layer_kept_in_eval_mode_stays_so_through_validations() -> None:
    engine = trainer()
    engine.parts["model"][2].eval()
    engine.fit(loader(), loader(), epochs=2)
    assert [layer.training for layer in engine.parts["model"]] == [True, True, False, True]


def test_validation_runs_without_gradients_and_in_eval_mode() -> None:
    seen: list[tuple[bool, bool]] = []
    engine = trainer()
    engine.subscribe(ValidationStepEnd, lambda e: seen.append((torch.is_grad_enabled(), e.engine.training)))
    engine.fit(loader(), loader(), epochs=1)
    assert set(seen) == {(False, False)}
    assert torch.is_grad_enabled()


def test_every_n_fires_on_the_absolute_step_across_epochs_and_fits() -> None:
    fired: list[int] = []
    engine = trainer()
    engine.subscribe(StepEnd, lambda event: fired.append(event.engine.step), when=every(3))
    engine.fit(loader(), epochs=1)
    engine.fit(loader(), epochs=2)
    assert fired == [3, 6, 9, 12]


def test_every_n_of_a_validation_step_counts_within_each_validation() -> None:
    fired: list[int] = []
    engine = trainer()
    engine.subscribe(ValidationStepEnd, lambda event: fired.append(event.engine.validation_step), when=every(3))
    engine.fit(loader(), loader(), epochs=2)
    assert fired == [3, 3]


def test_a_handler_may_replace_the_batch_and_the_loss() -> None:
    engine = trainer()
    engine.subscribe(BatchReady, lambda event: (event.batch[0] * 0, event.batch[1]))
    engine.subscribe(LossReady, lambda event: event.loss * 0)
    before = [parameter.clone() for parameter in engine.parts["model"].parameters()]
    engine.fit(loader(), epochs=1)
    assert_identical(engine.parts["model"], before)


@pytest.mark.parametrize("moment", [FitStart, EpochStart, BatchReady, StepEnd, ValidationEnd, EpochEnd, Settled])
def test_a_failing_handler_ends_the_run_with_its_own_error_and_one_fit_end(moment: type[Event]) -> None:
    def fail(event: Event) -> None:
        raise KeyError("mine")

    engine = trainer()
    ends = record_events(engine)
    engine.subscribe(moment, fail)
    with pytest.raises(KeyError, match="mine") as caught:
        engine.fit(loader(), loader(), epochs=2)
    assert ends.count("RunFailed") == ends.count("FitEnd") == 1
    assert ends[-2:] == ["RunFailed", "FitEnd"]
    notes = "\n".join(caught.value.__notes__)
    assert "fail, a handler of" in notes
    assert moment.__name__ in notes
    assert "At step" in notes


def test_a_failing_step_ends_the_run_with_its_own_error_and_place() -> None:
    def step(engine: Engine, batch: int) -> None:
        if engine.step == 5:
            raise ZeroDivisionError

    engine = Engine(step)
    seen = record_events(engine)
    with pytest.raises(ZeroDivisionError) as caught:
        engine.fit([1, 2, 3], epochs=5)
    assert caught.value.__notes__ == ["At step 5, batch 2 of epoch 2."]
    assert seen[-2:] == ["RunFailed", "FitEnd"]
    assert engine.fit([1], epochs=1).reason == "1 epoch done"


def test_every_handler_hears_the_end_even_if_one_fails_there() -> None:
    heard: list[str] = []

    def fail(event: FitEnd) -> None:
        raise OSError("disk")

    engine = trainer()
    engine.subscribe(FitEnd, fail)
    engine.subscribe(FitEnd, lambda event: heard.append(event.reason))
    with pytest.raises(OSError, match="disk"):
        engine.fit(loader(), epochs=1)
    assert heard == ["1 epoch done"]


def test_a_failure_at_the_end_does_not_hide_the_failure_before() -> None:
    def fail(event: FitEnd) -> None:
        raise OSError("disk")

    def step(engine: Engine, batch: int) -> None:
        raise ZeroDivisionError

    engine = Engine(step)
    engine.subscribe(FitEnd, fail)
    with pytest.raises(ZeroDivisionError) as caught:
        engine.fit([1], epochs=1)
    assert any("disk" in note for note in caught.value.__notes__)


def test_leaving_your_own_loop_early_ends_the_run_once() -> None:
    engine = Engine()
    seen = record_events(engine)
    for epoch in engine.epochs(5):
        for batch in engine.train([1, 2, 3]):
            engine.record(value=float(batch), weight=1)
            if batch == 2:
                break
        if epoch == 2:
            break
    assert seen.count("FitEnd") == 1
    assert "RunFailed" not in seen
    assert engine.history["train_value"] == [1.5]
    assert engine.history.reason == "the loop was left in epoch 2"


def test_a_data_error_says_which_batch_was_being_read() -> None:
    def batches() -> Iterator[int]:
        yield from (1, 2)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone") as caught:
        Engine(lambda engine, batch: None).fit(batches(), epochs=1)
    assert caught.value.__notes__[0] == "While reading batch 3 of the train data in epoch 1."


def test_the_step_is_not_called_outside_a_run() -> None:
    with pytest.raises(EngineStateError, match="outside a run"):
        next(iter(Engine().train([1])))
    with pytest.raises(EngineStateError, match="outside a stage"):
        Engine().record(loss=1.0, weight=1)
    with pytest.raises(ConfigurationError, match="no step"):
        Engine().fit([1], epochs=1)


def test_the_seed_makes_two_runs_alike() -> None:
    runs = []
    for _ in range(2):
        engine = trainer(seed=5)
        engine.fit(loader(), epochs=1)
        runs.append([parameter.detach() for parameter in engine.parts["model"].parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_scope_is_entered_in_order_and_left_in_reverse_also_on_failure() -> None:
    from contextlib import contextmanager

    trace: list[str] = []

    def manager(name: str) -> Callable[[], Any]:
        @contextmanager
        def around() -> Iterator[None]:
            trace.append(f"in {name}")
            try:
                yield
            finally:
                trace.append(f"out {name}")

        return around

    def step(engine: Engine, batch: int) -> None:
        raise ValueError

    engine = Engine(step)
    engine.listeners.around("fit", manager("a"))
    engine.listeners.around("fit", manager("b"))
    with pytest.raises(ValueError):  # noqa: PT011 - the trace is the point
        engine.fit([1], epochs=1)
    assert trace == ["in a", "in b", "out b", "out a"]


def test_a_scope_that_cannot_be_entered_leaves_the_engine_ready_for_another_run() -> None:
    engine = trainer([TensorBoard()])
    with pytest.raises(ConfigurationError, match="nowhere to write"):
        engine.fit(loader(), epochs=1)
    with pytest.raises(EngineStateError, match=r"engine.run.plan was asked for outside a run"):
        engine.run.plan  # noqa: B018 - asking is what is refused


def test_nothing_is_written_without_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    engine = trainer([ProgressBar(), EarlyStopping("val_loss"), BestCheckpoint("val_loss", restore=True)])
    engine.fit(loader(), loader(), epochs=1)
    assert list(tmp_path.iterdir()) == []


def test_workers_are_gone_when_the_run_is_over() -> None:
    import multiprocessing

    data: DataLoader[Any] = DataLoader(TensorDataset(torch.zeros(8, 6), torch.zeros(8).long()), 2, num_workers=2)
    engine = trainer()
    engine.fit(data, data, epochs=1)
    assert multiprocessing.active_children() == []


def test_the_loop_fits_a_screen() -> None:
    source = inspect.getsource(Engine.fit).split('"""')[2]
    assert len(source.strip().splitlines()) <= 25


def test_a_step_function_can_be_evaluated_too() -> None:
    engine = Engine(lambda engine, batch: {"value": batch, "training": float(engine.training)})
    assert engine.evaluate([torch.tensor([1.0]), torch.tensor([3.0])]) == {"value": 2.0, "training": 0.0}
    assert engine.history.validations == []


def test_handlers_see_what_a_step_gives_to_its_metrics_and_else_what_it_returns() -> None:
    seen: list[object] = []

    def step(engine: Engine, batch: Tensor) -> dict[str, Tensor]:
        if engine.step < 3:
            engine.measure(batch * 2, batch)
        return {"loss": batch.sum()}

    engine = Engine(step)
    engine.subscribe(StepEnd, lambda event: seen.append(event.output))
    engine.subscribe(ValidationStepEnd, lambda event: seen.append(event.output))
    engine.fit([torch.ones(2)] * 3, [torch.ones(1)], epochs=1, max_steps=2)
    assert [output.tolist() for output in seen if isinstance(output, Tensor)] == [[2, 2], [2, 2], [2]]
    seen.clear()
    engine.fit([torch.ones(2)], epochs=1)
    assert seen == [{"loss": torch.tensor(2.0)}]


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"step": "train"}, "step is 'train', not a function"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_where_it_is_written(settings: dict[str, Any], phrase: str) -> None:
    with refused(ConfigurationError, phrase):
        Engine(**settings)


def test_the_batches_of_an_epoch_end_with_it() -> None:
    """An iterator that was kept gives no batch in the next epoch, started or not, and moves no counter."""
    engine = Engine()
    kept: list[Iterator[Any]] = []
    for epoch in engine.epochs(2):
        assert [list(loop) for loop in kept] == [[]] * len(kept)
        kept = [engine.train([1, 2, 3]), engine.train([1, 2, 3])]
        assert next(kept[0]) == 1
        assert engine.step == epoch
    assert [list(loop) for loop in kept] == [[], []]
    assert (engine.step, engine.current.name) == (2, "")


@pytest.mark.parametrize("step", [1, 2])
def test_the_batches_of_a_run_end_with_it_however_it_ends(step: int) -> None:
    engine = Engine()
    kept: list[Iterator[Any]] = []

    def fail() -> None:
        for _ in engine.epochs(1):
            kept.append(engine.train([1, 2, 3]))
            for _ in range(step):
                next(kept[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(kept[0]) == []
    for _ in engine.epochs(1):
        assert list(kept[0]) == []
        assert list(engine.train([1, 2, 3])) == [1, 2, 3]
    assert engine.step == step + 3


def test_training_batches_are_refused_outside_a_run_when_they_are_asked_for() -> None:
    """Not when the first one is read, which may be within a run, of which they would be only one epoch."""
    with refused(EngineStateError, "engine.train was called outside a run"):
        Engine().train([1, 2])
