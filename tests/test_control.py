"""What a run is told while it goes on, or beforehand: leave a batch out, end the epoch, read only a little."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Batch, class_batches, make_trainer, refused
from ranks import on_ranks
from test_ranks import assert_alike, outcome
from test_ranks import data as rank_data
from test_ranks import model as rank_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from camshaft.callbacks import Accumulate, Distributed, ProgressBar, RunCheckpoint, Schedule, warmup_cosine
from camshaft.engine import (
    BatchReady,
    Callback,
    ConfigurationError,
    Engine,
    EngineStateError,
    EpochEnd,
    Settled,
    StepEnd,
    Trainer,
    ValidationEnd,
    at,
    repeat,
)

TRAIN, VAL = class_batches(8, 8, 8, 8, 8), class_batches(8, 8, 4, seed=1)


def weights(engine: Engine) -> list[Tensor]:
    return [value.clone() for value in engine.parts["model"].state_dict().values()]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


# A batch that is left out -----------------------------------------------------------------------------------


class LeaveOut(Callback):
    """Leaves out the batches of some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_batch_ready(self, event: BatchReady) -> None:
        if event.engine.training and event.engine.step in self.steps:
            event.engine.run.skip_batch()


@pytest.mark.parametrize("steps", [(1,), (3,), (5,), (2, 3), (1, 5)])
def test_without_a_batch_the_weights_are_those_of_data_that_never_had_it(steps: tuple[int, ...]) -> None:
    skipped, plain = make_trainer(LeaveOut(*steps)), make_trainer()
    history = skipped.fit(TRAIN, VAL, epochs=1)
    rest = [batch for step, batch in enumerate(TRAIN, start=1) if step not in steps]
    expected = plain.fit(rest, VAL, epochs=1)
    assert equal(weights(skipped), weights(plain))
    assert history["train_loss"] == expected["train_loss"]
    assert history["val_loss"] == expected["val_loss"]


@pytest.mark.parametrize("style", ["script", "function", "class"])
def test_a_batch_that_is_left_out_is_a_step_in_which_nothing_is_done(style: str) -> None:
    model = nn.Linear(4, 3)
    parts: dict[str, Any] = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}

    def step(engine: Engine, batch: Batch) -> None:
        done.append(engine.step)
        if engine.training:
            engine.update(nn.functional.cross_entropy(model(batch[0]), batch[1]))

    done: list[int] = []
    ended: list[int] = []
    settled: list[int] = []
    callbacks = [LeaveOut(2, 4)]
    if style == "class":
        engine = make_trainer(*callbacks)
    else:
        engine = Engine(step if style == "function" else None, callbacks=callbacks, **parts)
    engine.subscribe(StepEnd, lambda event: ended.append(engine.step))
    engine.subscribe(Settled, lambda event: settled.append(engine.step))
    numbers: list[int] = []
    engine.subscribe(EpochEnd, lambda event: numbers.append(engine.run.num_skipped_batches))
    if style == "script":
        for _ in engine.epochs(1):
            for batch in engine.train(TRAIN):
                step(engine, batch)
    else:
        engine.fit(TRAIN, epochs=1)
    assert ended == [1, 3, 5]
    assert settled == [1, 2, 3, 4, 5, 5]  # and once for the epoch
    if style != "class":
        assert done == [1, 3, 5]
    assert (engine.step, engine.num_updates, numbers) == (5, 3, [2])


@pytest.mark.parametrize("cut_at", [1, 2, 3, 4, 6])
def test_left_out_batches_are_counted_and_saved(cut_at: int, tmp_path: Path) -> None:
    def run(*callbacks: Callback, cut: int | None = None) -> Engine:
        engine = make_trainer(LeaveOut(2, 3, 6), Accumulate(2), *callbacks)
        if cut is not None:
            engine.subscribe(Settled, lambda event: engine.run.interrupt(signal.SIGTERM), when=at(cut))
        engine.subscribe(EpochEnd, lambda event: numbers.append(engine.run.num_skipped_batches))
        engine.fit(TRAIN, epochs=2, resume="auto" if callbacks else None)
        return engine

    numbers: list[int] = []
    whole = run()
    run(RunCheckpoint(tmp_path), cut=cut_at)
    resumed = run(RunCheckpoint(tmp_path))
    assert equal(weights(resumed), weights(whole))
    assert numbers[:2] == [2, 3]
    assert numbers[-1] == 3
    assert resumed.history.rows == whole.history.rows


@pytest.mark.parametrize("event", [StepEnd, EpochEnd, ValidationEnd])
def test_a_batch_is_left_out_only_when_it_was_just_read(event: Any) -> None:
    engine = make_trainer()
    engine.subscribe(event, lambda event: engine.run.skip_batch())
    with refused(EngineStateError, "skip_batch was called when no training batch had just been read.", "Ask for it"):
        engine.fit(TRAIN, VAL, epochs=1)


def test_a_validation_batch_is_not_left_out() -> None:
    engine = make_trainer()
    engine.subscribe(BatchReady, lambda event: None if engine.training else engine.run.skip_batch())
    with pytest.raises(EngineStateError, match=r"if event\.engine\.training"):
        engine.fit(TRAIN, VAL, epochs=1)


# An epoch that ends early -----------------------------------------------------------------------------------


class EndAt(Callback):
    """Ends the epoch after some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_step_end(self, event: StepEnd) -> None:
        if event.engine.step in self.steps:
            event.engine.run.end_epoch()


def test_an_epoch_that_ends_early_is_validated_and_the_next_one_begins_anew() -> None:
    engine, plain = make_trainer(EndAt(3)), make_trainer()
    history = engine.fit(TRAIN, VAL, epochs=2)
    first = plain.fit(TRAIN[:3], VAL, epochs=1)
    losses = list(first["train_loss"]), list(first["val_loss"])
    plain.fit(TRAIN, VAL, epochs=1)
    assert equal(weights(engine), weights(plain))
    assert history["step"] == [3, 8]
    assert ([history["train_loss"][0]], [history["val_loss"][0]]) == losses


def test_the_window_that_is_open_when_an_epoch_ends_early_is_updated() -> None:
    engine, plain = make_trainer(EndAt(3), Accumulate(2)), make_trainer(Accumulate(2))
    engine.fit(TRAIN, epochs=1)
    plain.fit(TRAIN[:3], epochs=1)
    assert equal(weights(engine), weights(plain))
    assert engine.num_updates == 2


def test_with_epochs_of_a_set_length_the_next_one_goes_on_in_the_data() -> None:
    engine, plain = make_trainer(EndAt(2)), make_trainer()
    engine.fit(repeat(TRAIN), epochs=2, epoch_length=4)
    plain.fit([*TRAIN[:2]], epochs=1)
    plain.fit([*TRAIN[2:], TRAIN[0]], epochs=1)
    assert equal(weights(engine), weights(plain))


@pytest.mark.parametrize("moment", [BatchReady, StepEnd, ValidationEnd, EpochEnd, Settled])
def test_an_epoch_can_be_ended_at_any_moment_and_where_it_is_over_nothing_happens(moment: Any) -> None:
    engine = make_trainer()
    engine.subscribe(moment, lambda event: engine.run.end_epoch())
    history = engine.fit(TRAIN, VAL, epochs=2)
    ends_early = moment in (BatchReady, StepEnd, Settled)
    assert history["step"] == ([1, 2] if ends_early else [5, 10])


@pytest.mark.parametrize("every_steps", [1, 3])
@pytest.mark.parametrize("cut_at", [2, 3, 4])
def test_a_run_that_is_saved_where_an_epoch_was_ended_is_resumed_behind_it(
    cut_at: int, every_steps: int, tmp_path: Path
) -> None:
    whole = make_trainer(EndAt(3))
    whole.fit(TRAIN, VAL, epochs=2)
    cut = make_trainer(EndAt(3), RunCheckpoint(tmp_path, every_steps=every_steps))
    cut.subscribe(StepEnd, lambda event: cut.run.interrupt(signal.SIGTERM), when=at(cut_at))
    cut.fit(TRAIN, VAL, epochs=2)
    resumed = make_trainer(RunCheckpoint(tmp_path)) if cut_at >= 3 else make_trainer(EndAt(3), RunCheckpoint(tmp_path))
    resumed.fit(TRAIN, VAL, epochs=2, resume="auto")
    assert equal(weights(resumed), weights(whole))
    assert resumed.history.rows == whole.history.rows


# A little of the data ---------------------------------------------------------------------------------------


def loader(batch_size: int = 8, num: int = 40, **options: Any) -> DataLoader[Any]:
    x, y = (torch.cat(one) for one in zip(*class_batches(*[8] * (num // 8)), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size, **options)


def test_a_limit_reads_the_first_batches_of_each_epoch_and_validation() -> None:
    limited, plain = make_trainer(), make_trainer()
    history = limited.fit(TRAIN, VAL, epochs=3, limit=2)
    expected = plain.fit(TRAIN[:2], VAL[:2], epochs=3)
    assert equal(weights(limited), weights(plain))
    assert history.rows == expected.rows


def test_a_limit_beyond_the_data_changes_nothing() -> None:
    limited, plain = make_trainer(), make_trainer()
    assert limited.fit(TRAIN, VAL, epochs=2, limit=99).rows == plain.fit(TRAIN, VAL, epochs=2).rows


def test_a_limit_holds_for_each_of_several_validation_sets_and_for_streams() -> None:
    def stream() -> Iterator[Batch]:
        while True:
            yield from TRAIN

    limited, plain = make_trainer(), make_trainer()
    history = limited.fit(stream, {"a": VAL, "b": stream}, epochs=2, limit=2)
    expected = plain.fit(TRAIN[:2], {"a": VAL[:2], "b": TRAIN[:2]}, epochs=2)
    assert history.rows == expected.rows


def test_schedules_and_bars_know_the_length_of_a_limited_run() -> None:
    engine = make_trainer(Schedule(warmup_cosine, per="update"), ProgressBar())
    lengths: set[int | None] = set()
    engine.subscribe(StepEnd, lambda event: lengths.add(engine.run.epoch_length))
    engine.fit(TRAIN, VAL, epochs=2, limit=2)
    assert lengths == {2}
    assert engine.parts["optimizer"].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("cut_at", [1, 2, 3])
def test_a_limited_run_is_resumed_to_the_bit(cut_at: int, seed: int | None, tmp_path: Path) -> None:
    def trainer(*callbacks: Callback) -> Engine:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks, seed=seed)

    whole = trainer()
    whole.fit(loader(shuffle=True), VAL, epochs=2, limit=2)
    cut = trainer(RunCheckpoint(tmp_path))
    cut.subscribe(StepEnd, lambda event: cut.run.interrupt(signal.SIGTERM), when=at(cut_at))
    cut.fit(loader(shuffle=True), VAL, epochs=2, limit=2)
    resumed = trainer(RunCheckpoint(tmp_path))
    resumed.fit(loader(shuffle=True), VAL, epochs=2, limit=2, resume="auto")
    assert equal(weights(resumed), weights(whole))
    assert resumed.history.rows == whole.history.rows


def test_limits_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="limit"):
        make_trainer().fit(TRAIN, epochs=1, limit=0)
    with refused(ConfigurationError, "limit=2 and epoch_length=3 both say how long an epoch is.", "Pass one of them."):
        make_trainer().fit(TRAIN, epochs=1, limit=2, epoch_length=3)


# Noise in validations ---------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Adds noise of all three generators, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(len(x), 4) + random.random() + float(np.random.rand())
        out: Tensor = self.layer(x + noise)
        return out


def noisy(**settings: Any) -> Engine:
    torch.manual_seed(0)
    model = Noisy()
    return Trainer(model, torch.optim.SGD(model.parameters(), 0.0), nn.CrossEntropyLoss(), **settings)


def test_with_fixed_noise_validations_of_equal_weights_are_equal() -> None:
    """The learning rate is 0, so only the noise could differ; it is that of `evaluate`, too."""
    engine, plain = noisy(fixed_validation_noise=True), noisy()
    losses = engine.fit(TRAIN, VAL, epochs=3)["val_loss"]
    assert len(set(losses)) == 1
    assert engine.evaluate(VAL)["loss"] == losses[0]
    assert len(set(plain.fit(TRAIN, VAL, epochs=3)["val_loss"])) == 3


def test_fixed_noise_does_not_change_the_training() -> None:
    fixed, plain = noisy(fixed_validation_noise=True, seed=5), noisy(seed=5)
    losses = fixed.fit(TRAIN, VAL, epochs=2, validate_every="2 steps")["train_loss"]
    assert losses == plain.fit(TRAIN, epochs=2)["train_loss"]


def test_fixed_noise_follows_the_seed() -> None:
    one, same, other = (noisy(fixed_validation_noise=True, seed=seed) for seed in (1, 1, 2))
    first, second, third = (engine.evaluate(VAL)["loss"] for engine in (one, same, other))
    assert first == second != third


def test_a_misspelt_setting_of_the_noise_is_refused() -> None:
    with refused(ConfigurationError, 'Did you mean "fixed_validation_noise"?'):
        noisy(fixed_validation_noize=True)


# Several ranks ----------------------------------------------------------------------------------------------


def on_one_or_two(kind: str) -> dict[str, Any]:
    net = rank_model()
    callbacks: dict[str, list[Callback]] = {"skip": [LeaveOut(2, 5)], "end": [EndAt(3)], "limit": []}
    optimizer = torch.optim.SGD(net.parameters(), 0.3)
    engine = Trainer(net, optimizer, nn.CrossEntropyLoss(), callbacks=[Distributed(), *callbacks[kind]], seed=7)
    limit = 3 if kind == "limit" else None
    engine.fit(rank_data(), rank_data(37, shuffle=False, seed=1), epochs=2, limit=limit)
    return outcome(engine, net)


@pytest.mark.parametrize("kind", ["skip", "end", "limit"])
def test_on_two_ranks_it_is_as_in_one_process(kind: str) -> None:
    alone = on_one_or_two(kind)
    first, second = on_ranks(2, on_one_or_two, kind)
    assert torch.equal(first["weights"], second["weights"])
    assert_alike(first, alone)
