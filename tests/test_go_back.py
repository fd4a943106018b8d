"""A handler can let a run go on from an earlier state of it; and ask for a validation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import class_batches, make_trainer, refused
from test_rollback import engine_of, run
from torch.utils.data import DataLoader, TensorDataset

from camshaft.callbacks import RunCheckpoint
from camshaft.engine import (
    Callback,
    Engine,
    EngineStateError,
    FitEnd,
    FitStart,
    Settled,
    StepEnd,
    ValidationEnd,
    ValidationStart,
    at,
    run_state,
)

VAL = class_batches(4, 4, seed=1)


class Back(Callback):
    """Keeps the state of one moment, and goes back to it once, from another."""

    def __init__(self, kept: int, left: int, event: type[Any] = Settled) -> None:
        self.kept, self.left, self.event = kept, left, event
        self.states: list[dict[str, Any]] = []
        self.reasons: list[str] = []
        self.resuming: list[bool] = []

    def attach(self, engine: Engine) -> None:
        super().attach(engine)
        engine.subscribe(Settled, self._keep)
        engine.subscribe(self.event, self._leave)

    def _keep(self, event: Settled) -> None:
        if event.engine.step == self.kept and not self.states:
            self.states.append(copy.deepcopy(run_state(event.engine)))

    def _leave(self, event: Any) -> None:
        engine = event.engine
        if engine.step == self.left and self.states and len(self.reasons) == 0 and engine.run.goes_back_to is None:
            engine.run.go_back(self.states[0], Path("memory"))

    def on_fit_start(self, event: FitStart) -> None:
        self.resuming.append(event.engine.run.is_resuming)

    def on_fit_end(self, event: FitEnd) -> None:
        self.reasons.append(event.reason)


def data() -> DataLoader[Any]:
    torch.manual_seed(3)
    return DataLoader(TensorDataset(torch.randn(20, 4), torch.randint(3, (20,))), batch_size=4, shuffle=True)


MOMENTS = [
    (3, 5, StepEnd),
    (3, 4, Settled),
    (5, 7, Settled),
    (5, 10, Settled),
    (7, 15, Settled),
    (7, 10, ValidationStart),
]


@pytest.mark.parametrize("style", ["trainer", "step", "script"])
@pytest.mark.parametrize(("kept", "left", "event"), MOMENTS)
def test_a_run_that_goes_back_ends_as_one_that_did_not(
    style: str, kept: int, left: int, event: type[Any], tmp_path: Path
) -> None:
    """With all weights, the optimizer, the random numbers, the history, and a checkpoint at each step."""
    plain, back = engine_of(style), Back(kept, left, event)
    run(plain, data(), style=style, epochs=3)
    rng = torch.get_rng_state()
    engine = engine_of(style, back, RunCheckpoint(tmp_path, every_steps=1))
    run(engine, data(), style=style, epochs=3)
    assert torch.equal(torch.get_rng_state(), rng)
    assert back.reasons == [f"goes back to step {kept}", "3 epochs done"]
    assert back.resuming == [False, True]
    for one, other in zip(engine.parts["model"].parameters(), plain.parts["model"].parameters(), strict=True):
        assert torch.equal(one, other)
    assert engine.history.rows == plain.history.rows
    assert engine.history.validations == plain.history.validations
    assert (engine.step, engine.epoch, engine.num_updates) == (15, 3, 15)


def test_no_checkpoint_is_written_of_what_is_gone_back_from(tmp_path: Path) -> None:
    back = Back(3, 4, StepEnd)
    checkpoint = RunCheckpoint(tmp_path, every_steps=1, keep=99)
    run(engine_of("trainer", back, checkpoint), data(), epochs=3)
    steps = [file.step for file in reversed(checkpoint.checkpoints.files())]
    assert steps == [*range(1, 16), 15]  # each step, and the end of the run, once


def ask(engine: Engine, *steps: int) -> None:
    for step in steps:
        engine.subscribe(Settled, lambda event: event.engine.run.validate(), when=at(step))


def validated(engine: Engine, call: Callable[[], object]) -> list[int]:
    steps: list[int] = []
    subscription = engine.subscribe(ValidationEnd, lambda event: steps.append(event.engine.step))
    call()
    subscription.cancel()
    return steps


def test_a_validation_that_was_asked_for_is_made_after_the_next_step() -> None:
    trainer, batches = make_trainer(), class_batches(4, 4, 4, 4)
    ask(trainer, 2)
    assert validated(trainer, lambda: trainer.fit(batches, VAL, epochs=2)) == [3, 4, 8]


def test_one_that_is_made_anyway_is_the_one_that_was_asked_for() -> None:
    trainer, batches = make_trainer(), class_batches(4, 4, 4, 4)
    ask(trainer, 3)
    assert validated(trainer, lambda: trainer.fit(batches, VAL, epochs=2)) == [4, 8]


def test_asking_changes_nothing_in_the_others() -> None:
    trainer, batches = make_trainer(), class_batches(4, 4, 4, 4)
    ask(trainer, 1)
    assert validated(trainer, lambda: trainer.fit(batches, VAL, epochs=2, validate_every="3 steps")) == [2, 3, 6]


def test_a_resumed_run_makes_the_validation_that_was_asked_for(tmp_path: Path) -> None:
    batches = class_batches(4, 4, 4, 4)
    first, checkpoint = make_trainer(), RunCheckpoint(tmp_path, every_steps=1, keep=99)
    ask(first, 2)
    first.attach(checkpoint)
    first.fit(batches, VAL, epochs=1)
    state = next(file.path for file in checkpoint.checkpoints.files() if file.step == 2)
    second = make_trainer()
    assert validated(second, lambda: second.fit(batches, VAL, epochs=1, resume=state)) == [3, 4]


def test_a_run_without_validation_data_cannot_be_asked_for_one() -> None:
    trainer = make_trainer()
    ask(trainer, 1)
    with refused(EngineStateError, "without validation data", "Pass them"):
        trainer.fit(class_batches(4, 4), epochs=1)
