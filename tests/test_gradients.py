"""Accumulation and clipping: their arithmetic, against the loop by hand and against one big batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Batch, class_batches, linear, make_trainer, refused, total_norm
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from camshaft.callbacks import Accumulate, ClipGradients, MixedPrecision
from camshaft.engine import (
    BatchReady,
    Callback,
    CamshaftError,
    ConfigurationError,
    Engine,
    EpochStart,
    GradientsReady,
    StepEnd,
    Trainer,
    UpdateEnd,
)


def joined(batches: list[Batch]) -> Batch:
    """One batch with all the samples of these."""
    return torch.cat([inputs for inputs, _ in batches]), torch.cat([target for _, target in batches])


def gradients(trainer: Engine) -> list[list[Tensor]]:
    """A list that will hold every update's gradients, as the optimizer gets them."""
    seen: list[list[Tensor]] = []

    @trainer.on(GradientsReady)
    def keep(event: GradientsReady) -> None:
        parameters = [parameter for _, parameter in trainer.parts.named_parameters()]
        seen.append([parameter.grad.clone() for parameter in parameters if parameter.grad is not None])

    return seen


def assert_near(mine: Any, other: Any, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def weights(trainer: Engine) -> list[Tensor]:
    return [parameter.detach() for parameter in trainer.parts["model"].parameters()]


def by_hand(groups: list[list[Batch]], *, norm: float | None = None, value: float | None = None) -> list[Tensor]:
    """The loop that everyone writes, with one big batch for each group of small ones."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for group in groups:
        inputs, target = joined(group)
        nn.functional.cross_entropy(model(inputs), target).backward()
        if norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), norm)
        if value is not None:
            nn.utils.clip_grad_value_(model.parameters(), value)
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


WINDOWS: list[tuple[list[int], list[int]]] = [
    ([8] * 8, [4, 4]),  # K micro-batches of B: one batch of K * B
    ([8, 8, 8, 3], [4]),  # a ragged last batch
    ([8] * 4 + [8, 8], [4, 2]),  # a short last window
    ([8] * 4 + [8, 8, 5], [4, 3]),  # a short last window with a ragged last batch
    ([8] * 4 + [3], [4, 1]),  # a last window of one ragged batch
    ([2, 9, 1, 7, 30, 1], [4, 2]),  # every batch of another size
]


@pytest.mark.parametrize("clip", [None, {"norm": 0.05}, {"value": 0.02}])
@pytest.mark.parametrize(("sizes", "windows"), WINDOWS)
def test_a_window_gives_the_weights_of_one_batch_with_all_its_samples(
    sizes: list[int], windows: list[int], clip: dict[str, Any] | None
) -> None:
    """Each sample counts once, in full, partial and ragged windows, over three epochs and with clipping on."""
    data = class_batches(*sizes)
    ends = [sum(windows[: position + 1]) for position in range(len(windows))]
    groups = [data[end - length : end] for end, length in zip(ends, windows, strict=True)]
    callbacks: list[Callback] = [Accumulate(4), *([ClipGradients(**clip)] if clip else [])]
    trainer = make_trainer(*callbacks)
    trainer.fit(data, epochs=3)
    assert_near(weights(trainer), by_hand(groups * 3, **clip or {}))


def test_the_gradients_themselves_are_those_of_the_big_batch() -> None:
    """GradientsReady carries the true gradients of the whole window, not its last batch's or their mean of means."""
    data = class_batches(8, 8, 8, 3)
    trainer = make_trainer(Accumulate(4), lr=0.0)
    seen = gradients(trainer)
    trainer.fit(data, epochs=1)
    model = linear()
    inputs, target = joined(data)
    nn.functional.cross_entropy(model(inputs), target).backward()
    assert_near(seen, [[parameter.grad for parameter in model.parameters()]])


def test_15_batches_with_a_window_of_4_are_4_updates_and_none_is_lost() -> None:
    """The last window of three is updated with the epoch's end: every batch is in exactly one update."""
    trainer = make_trainer(Accumulate(batches=4))
    steps: list[int] = []
    trainer.subscribe(UpdateEnd, lambda event: steps.append(event.engine.step))
    trainer.fit(class_batches(*[8] * 15), epochs=2)
    assert steps == [4, 8, 12, 15, 19, 23, 27, 30]
    assert trainer.num_updates == 8


def test_no_window_reaches_over_the_end_of_an_epoch() -> None:
    """When an epoch starts, nothing of the last one waits in the gradients."""
    trainer = make_trainer(Accumulate(4))
    left_over: list[Tensor] = []
    trainer.subscribe(
        EpochStart,
        lambda event: left_over.extend(p.grad for p in trainer.parts["model"].parameters() if p.grad is not None),
    )
    trainer.fit(class_batches(8, 8, 8, 8, 8, 2), epochs=3)
    assert sum(gradient.abs().sum() for gradient in left_over) == 0


@pytest.mark.parametrize("limit", [{"max_steps": 6}, {"epochs": 1, "epoch_length": 6}])
def test_a_run_that_ends_within_a_window_still_makes_its_update(limit: dict[str, int]) -> None:
    """Step 6 of 8 ends the run: its window holds two batches, and both count."""
    data = class_batches(*[8] * 8)
    trainer = make_trainer(Accumulate(4))
    trainer.fit(data, **limit)  # type: ignore[arg-type]  # mypy takes every keyword for each of the values
    assert trainer.num_updates == 2
    assert_near(weights(trainer), by_hand([data[:4], data[4:6]]))


def test_a_stop_within_a_window_still_makes_its_update() -> None:
    """A handler that stops the run at step 6 loses no batch either."""
    data = class_batches(*[8] * 8)
    trainer = make_trainer(Accumulate(4))
    trainer.subscribe(StepEnd, lambda event: event.engine.stop("enough"), when=lambda step: step == 6)
    trainer.fit(data, epochs=3)
    assert_near(weights(trainer), by_hand([data[:4], data[4:6]]))


def test_a_window_of_samples_closes_with_the_batch_that_reaches_them() -> None:
    """Accumulate(samples=16) over 8, 5, 3, 20, 4, 4 and 2 samples: windows of 16, 20 and 10 samples."""
    data = class_batches(8, 5, 3, 20, 4, 4, 2)
    trainer = make_trainer(Accumulate(samples=16))
    steps: list[int] = []
    trainer.subscribe(UpdateEnd, lambda event: steps.append(event.engine.step))
    trainer.fit(data, epochs=1)
    assert steps == [3, 4, 7]
    assert_near(weights(trainer), by_hand([data[:3], data[3:4], data[4:]]))


def test_a_window_of_one_batch_changes_nothing_to_the_bit() -> None:
    """Accumulate(1) is the run without it."""
    data = class_batches(8, 8, 3)
    with_window, plain = make_trainer(Accumulate(1)), make_trainer()
    for trainer in (with_window, plain):
        trainer.fit(data, epochs=2)
    assert all(torch.equal(mine, other) for mine, other in zip(weights(with_window), weights(plain), strict=True))


def test_validation_within_a_window_changes_nothing_to_the_bit() -> None:
    """Validating after each step leaves the half-gathered gradients alone."""
    data = class_batches(*[8] * 6)
    watched, plain = make_trainer(Accumulate(4)), make_trainer(Accumulate(4))
    watched.fit(data, class_batches(8, 8), epochs=2, validate_every="1 steps")
    plain.fit(data, epochs=2)
    assert all(torch.equal(mine, other) for mine, other in zip(weights(watched), weights(plain), strict=True))


def test_the_recorded_loss_is_the_batches_own_and_not_its_share() -> None:
    """Accumulation scales what is differentiated; the history shows the mean loss over the samples."""
    data = class_batches(8, 8, 8, 8, 3)
    history = make_trainer(Accumulate(4), lr=0.0).fit(data, epochs=1)
    inputs, target = joined(data)
    expected = nn.functional.cross_entropy(linear()(inputs), target).item()
    assert history["train_loss"] == [pytest.approx(expected, rel=1e-6)]


def test_a_step_of_ones_own_accumulates_through_engine_update() -> None:
    """engine.update(loss) in a step function takes part in the window; the samples are read off the batch."""

    def step(engine: Engine, batch: Batch) -> None:
        engine.update(nn.functional.cross_entropy(model(batch[0]), batch[1]))

    data, model = class_batches(8, 8, 3), linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    Engine(step, model=model, optimizer=optimizer, callbacks=[Accumulate(2)]).fit(data, epochs=2)
    assert_near([p.detach() for p in model.parameters()], by_hand([data[:2], data[2:]] * 2))


def test_a_real_loader_with_a_ragged_end_accumulates_like_one_with_big_batches() -> None:
    """50 samples in batches of 8 with a window of 3 train like batches of 24: 24, 24, 2."""
    inputs, target = joined(class_batches(50))
    small = DataLoader(TensorDataset(inputs, target), batch_size=8)
    big = DataLoader(TensorDataset(inputs, target), batch_size=24)
    accumulating, plain = make_trainer(Accumulate(3)), make_trainer()
    accumulating.fit(small, epochs=3)
    plain.fit(big, epochs=3)
    assert accumulating.num_updates == plain.num_updates == 9
    assert_near(weights(accumulating), weights(plain))


def test_a_batch_that_a_handler_cut_down_counts_by_what_is_left() -> None:
    """A BatchReady handler that drops samples changes the weight of the batch, too."""
    data = class_batches(8, 8)
    trainer = make_trainer(Accumulate(2))
    trainer.subscribe(BatchReady, lambda event: tuple(part[:3] for part in event.batch), when=lambda step: step == 2)
    trainer.fit(data, epochs=1)
    assert_near(weights(trainer), by_hand([[data[0], (data[1][0][:3], data[1][1][:3])]]))


def test_clipping_leaves_a_norm_of_at_most_the_limit() -> None:
    """Over all parameters together; gradients below the limit stay as they are, to the bit."""
    tight, loose = make_trainer(ClipGradients(norm=0.01), lr=0.0), make_trainer(ClipGradients(norm=1e6), lr=0.0)
    plain = make_trainer(lr=0.0)
    tight_seen, loose_seen, plain_seen = gradients(tight), gradients(loose), gradients(plain)
    for trainer in (tight, loose, plain):
        trainer.fit(class_batches(8), epochs=1)
    norm = torch.cat([gradient.flatten() for gradient in tight_seen[0]]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(loose_seen[0], plain_seen[0], strict=True))


def test_clipping_by_value_limits_each_element() -> None:
    """No element exceeds the limit, and those below it stay as they are."""
    clipped, plain = make_trainer(ClipGradients(value=0.03), lr=0.0), make_trainer(lr=0.0)
    clipped_seen, plain_seen = gradients(clipped), gradients(plain)
    for trainer in (clipped, plain):
        trainer.fit(class_batches(8), epochs=1)
    assert_near(clipped_seen[0], [gradient.clamp(-0.03, 0.03) for gradient in plain_seen[0]], tolerance=0)
    assert max(gradient.abs().max().item() for gradient in plain_seen[0]) > 0.03


def test_clipping_happens_once_per_update_on_unscaled_gradients() -> None:
    """With a loss scaler and a window, clipping sees the gradients of the whole window without the scale."""
    data = class_batches(8, 8, 8, 8, 8, 3)
    trainer = make_trainer(Accumulate(4), ClipGradients(norm=0.05))
    trainer.update.use_scaler(torch.amp.GradScaler("cpu", init_scale=2.0**12))
    trainer.fit(data, epochs=2)
    assert trainer.num_updates == 4
    assert_near(weights(trainer), by_hand([data[:4], data[4:]] * 2, norm=0.05))


def test_clipping_takes_the_optimizers_parameters_and_no_others() -> None:
    """A frozen part's stale gradients have no say in the norm."""
    model = nn.Sequential(linear(), nn.Linear(3, 3))
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.0)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[ClipGradients(norm=0.01)])
    for parameter in model[1].parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    trainer.subscribe(GradientsReady, lambda event: norms.append(total_norm(grads()).item()))
    norms: list[float] = []

    def grads() -> list[Tensor]:
        return [parameter.grad for parameter in model[0].parameters() if parameter.grad is not None]

    trainer.fit(class_batches(8), epochs=1)
    assert norms == [pytest.approx(0.01, rel=1e-4)]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"batches": 2, "samples": 8}, {"batches": 0}, {"batches": 2.0}, {"batches": True}, {"samples": -1},
     {"samples": "8"}],
)  # fmt: skip
def test_accumulate_wants_one_whole_number(arguments: dict[str, Any]) -> None:
    """Batches or samples, at least 1: anything else is refused at construction."""
    with pytest.raises(ConfigurationError, match="Accumulate"):
        Accumulate(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"norm": 1.0, "value": 1.0}, {"norm": 0.0}, {"norm": -1.0}, {"value": float("nan")},
     {"value": float("inf")}, {"norm": "1"}, {"norm": True}],
)  # fmt: skip
def test_clip_gradients_wants_one_limit_above_zero(arguments: dict[str, Any]) -> None:
    """A norm or a value, finite and positive: anything else is refused at construction."""
    with pytest.raises(ConfigurationError, match="ClipGradients"):
        ClipGradients(**arguments)


def test_two_windows_are_refused() -> None:
    """A second Accumulate would quietly replace the first."""
    with pytest.raises(ConfigurationError, match="Accumulate"):
        make_trainer(Accumulate(2), Accumulate(4))


@pytest.mark.parametrize("callback", [ClipGradients(norm=1.0), Accumulate(4)])
def test_a_step_that_updates_by_itself_is_told_that_the_handler_has_no_effect(callback: Callback) -> None:
    """Clipping and windows live in engine.update: a step that calls optimizer.step() goes past them, which is said."""

    def step(engine: Engine, batch: Batch) -> None:
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()

    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(step, model=model, optimizer=optimizer, callbacks=[callback])
    with pytest.raises(CamshaftError, match=r"engine\.update"):
        engine.fit(class_batches(8, 8), epochs=2)
    assert engine.epoch <= 1


def test_a_window_in_bf16_gives_the_gradients_of_the_big_batch_to_its_tolerance() -> None:
    """Ragged batches and clipping included; bfloat16 keeps eight bits, so a part in a hundred."""
    found: list[list[Tensor]] = []
    for window, sizes in (([Accumulate(4)], [8, 8, 8, 3]), ([], [27])):
        trainer = make_trainer(*window, MixedPrecision("bf16"), ClipGradients(norm=0.1))
        seen = gradients(trainer)
        inputs, target = class_batches(27)[0]
        trainer.fit(list(zip(inputs.split(sizes), target.split(sizes), strict=True)), epochs=1)
        found.append(seen[0])
    small, big = found
    torch.testing.assert_close(small, big, rtol=1e-2, atol=1e-3)
    assert max(grad.norm() for grad in big) > 0.01


@pytest.mark.parametrize(
    ("make", "settings", "phrase"),
    [
        (Accumulate, {}, "batches=None and samples=None"),
        (Accumulate, {"batches": 4, "samples": 32}, "batches=4 and samples=32"),
        (Accumulate, {"batches": 0}, "batches is 0"),
        (Accumulate, {"batches": 2.5}, "batches is 2.5"),
        (Accumulate, {"samples": -8}, "samples is -8"),
        (ClipGradients, {}, "norm=None and value=None"),
        (ClipGradients, {"norm": 1.0, "value": 1.0}, "norm=1.0 and value=1.0"),
        (ClipGradients, {"norm": -1.0}, "limit of -1.0"),
        (ClipGradients, {"norm": 0.0}, "limit of 0.0"),
        (ClipGradients, {"norm": math.nan}, "limit of nan"),
        (ClipGradients, {"norm": math.inf}, "limit of inf"),
        (ClipGradients, {"value": "1"}, "limit of '1'"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_where_it_is_written(
    make: Callable[..., object], settings: dict[str, Any], phrase: str
) -> None:
    with refused(ConfigurationError, phrase):
        make(**settings)
