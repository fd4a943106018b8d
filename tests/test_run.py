"""One run: what handlers decide for it, when that takes effect, and where it is at each moment."""

from __future__ import annotations

import copy
import logging
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import class_batches, documented_events, make_trainer, pairs, refused, regression
from torch import Tensor

import camshaft.engine
from camshaft.callbacks import Accumulate, RunCheckpoint
from camshaft.engine import (
    BatchReady,
    Engine,
    EngineStateError,
    EpochEnd,
    EpochStart,
    Event,
    FitEnd,
    FitStart,
    GradientsReady,
    Phase,
    Settled,
    StepEnd,
    UpdateEnd,
    ValidationEnd,
    ValidationStepEnd,
    at,
    every,
    repeat,
)


def idle(engine: Engine, batch: Any) -> None:
    """Do nothing with a batch."""


BUILT_IN: list[type[Event]] = [getattr(camshaft.engine, name) for name in documented_events()]
Decision = Callable[[Engine], object]


def run_with(decision: Decision, event: type[Event], count: int, **settings: Any) -> Engine:
    """Run 3 epochs of 4 steps, each with a validation, and decide when the event's counter stands at ``count``."""
    engine = Engine(idle, **settings)
    engine.subscribe(event, lambda event: decision(engine), when=at(count))
    engine.fit(range(4), range(2), epochs=3)
    return engine


# Where it is ----------------------------------------------------------------------------------------------


def phases(engine: Engine, *fit: Any, **settings: Any) -> list[str]:
    """Each event of a run with the phase in which it came, in order and without repetitions."""
    seen: dict[str, None] = {}

    def look(event: Event) -> None:
        seen[f"{type(event).__name__} {engine.run.phase.name}"] = None

    for event in BUILT_IN:
        engine.subscribe(event, look)
    engine.fit(*fit, **settings)
    return list(seen)


def test_an_epoch_goes_through_its_phases_in_order() -> None:
    """A window of two batches stays open after the third, and is updated once the data are exhausted."""
    engine = make_trainer(Accumulate(batches=2))
    assert phases(engine, class_batches(4, 4, 4), class_batches(4), epochs=1) == [
        "FitStart BETWEEN",
        "EpochStart READING",
        "BatchReady READING",
        "LossReady READING",
        "StepEnd READING",
        "Settled READING",
        "GradientsReady READING",
        "UpdateEnd READING",
        "GradientsReady FLUSHING",
        "UpdateEnd FLUSHING",
        "ValidationStart VALIDATING",
        "BatchReady VALIDATING",
        "ValidationStepEnd VALIDATING",
        "ValidationEnd ENDING",
        "EpochEnd ENDING",
        "Settled BETWEEN",
        "FitEnd BETWEEN",
    ]


def test_a_validation_in_mid_epoch_is_part_of_the_reading() -> None:
    assert phases(Engine(idle), range(2), range(1), epochs=1, validate_every="1 steps") == [
        "FitStart BETWEEN",
        "EpochStart READING",
        "BatchReady READING",
        "StepEnd READING",
        "ValidationStart READING",
        "ValidationStepEnd READING",
        "ValidationEnd READING",
        "Settled READING",
        "EpochEnd ENDING",
        "Settled BETWEEN",
        "FitEnd BETWEEN",
    ]


def test_the_data_are_exhausted_in_every_phase_but_reading() -> None:
    seen: dict[Phase, set[bool]] = {}
    engine = Engine(idle)
    for event in BUILT_IN:
        engine.subscribe(event, lambda event: seen.setdefault(engine.run.phase, set()).add(engine.run.data_exhausted))
    engine.fit(range(2), range(1), epochs=2)
    assert seen.pop(Phase.READING) == {False}
    assert list(seen.values()) == [{True}] * 3


def test_a_run_knows_where_it_began_and_where_it_will_end() -> None:
    """The second run counts from where the first one ended."""
    seen: list[tuple[float, ...]] = []
    engine = Engine(idle)

    def look(event: FitStart) -> None:
        run = engine.run
        seen.append((run.first_epoch, run.first_step, run.last_epoch, run.last_step))

    engine.subscribe(FitStart, look)
    engine.fit(range(4), epochs=2)
    engine.fit(range(4), max_steps=6)
    assert seen == [(0, 0, 2, float("inf")), (2, 8, float("inf"), 14)]


@pytest.mark.parametrize(
    ("data", "settings", "steps", "epochs"),
    [
        (range(4), {"epochs": 3}, 12, 3),
        (range(4), {"max_steps": 10}, 10, 3),
        (range(4), {"epochs": 3, "max_steps": 6}, 6, 2),
        (lambda: iter(range(4)), {"epochs": 3}, None, 3),
        (lambda: iter(range(4)), {"max_steps": 6}, 6, None),
        (repeat(range(4)), {"epochs": 3, "epoch_length": 2}, 6, 3),
    ],
)
def test_the_number_of_steps_and_epochs_is_known_at_the_start_if_it_can_be(
    data: Any, settings: dict[str, Any], steps: int | None, epochs: int | None
) -> None:
    seen: list[tuple[int | None, int | None]] = []
    engine = Engine(idle)
    engine.subscribe(
        FitStart, lambda event: seen.append((engine.run.num_planned("step"), engine.run.num_planned("epoch")))
    )
    engine.fit(data, **settings)
    assert seen == [(steps, epochs)]


def test_the_values_of_the_newest_validation_are_those_of_the_present_epoch() -> None:
    seen: list[dict[str, Any]] = []
    engine = Engine(lambda engine, batch: {"score": engine.epoch} if not engine.training else None)
    for event in (EpochStart, EpochEnd):
        engine.subscribe(event, lambda event: seen.append(dict(engine.run.last_validation)))
    engine.fit(range(2), [torch.zeros(1)], epochs=2)
    assert seen == [{}, {"val_score": 1.0}, {}, {"val_score": 2.0}]


# A stop ---------------------------------------------------------------------------------------------------

# Where it is asked, and the step after which the run then ends: the present one, or the one that is yet to be made.
STOPS: list[tuple[type[Event], int, int]] = [
    (FitStart, 1, 0),
    (EpochStart, 1, 1),
    (EpochStart, 2, 5),
    (BatchReady, 6, 6),
    (StepEnd, 6, 6),
    (Settled, 6, 6),
    (ValidationEnd, 1, 4),
    (EpochEnd, 1, 4),
]


@pytest.mark.parametrize(("event", "count", "last"), STOPS)
def test_a_stop_ends_the_run_after_the_present_step(event: type[Event], count: int, last: int) -> None:
    engine = run_with(lambda engine: engine.stop("enough"), event, count)
    assert (engine.step, engine.history.reason) == (last, "enough")


def test_a_stop_at_the_last_settling_of_an_epoch_begins_no_other() -> None:
    engine = Engine(idle)

    def decide(event: Settled) -> None:
        if engine.run.phase is Phase.BETWEEN:
            engine.stop("enough")

    engine.subscribe(Settled, decide)
    engine.fit(range(4), epochs=3)
    assert (engine.epoch, engine.step, engine.history.reason) == (1, 4, "enough")


def test_the_epoch_in_which_a_run_is_stopped_is_validated_and_ended() -> None:
    engine = run_with(lambda engine: engine.stop("enough"), StepEnd, 2)
    assert (engine.num_validations, engine.history["step"]) == (1, [2])


def test_the_other_handlers_of_the_event_still_hear_it_and_the_first_reason_stays() -> None:
    engine, heard = Engine(idle), []
    for name in ("first", "second"):
        engine.subscribe(StepEnd, lambda event, name=name: heard.append((name, engine.stop(name))))  # type: ignore[misc]
    engine.fit(range(4), epochs=3)
    assert heard == [("first", True), ("second", True)]
    assert engine.history.reason == "first"


@pytest.mark.parametrize(
    ("event", "epoch", "step"), [(EpochStart, 3, 9), (StepEnd, 3, 9), (ValidationEnd, 2, 8), (EpochEnd, 2, 8)]
)
def test_before_min_epochs_a_stop_does_not_count(event: type[Event], epoch: int, step: int) -> None:
    engine = Engine(idle)
    counted: list[bool] = []
    engine.subscribe(event, lambda event: counted.append(engine.stop("enough")))
    engine.fit(range(4), range(1), epochs=4, min_epochs=2)
    assert (engine.epoch, engine.step) == (epoch, step)
    assert counted == [False] * (len(counted) - 1) + [True]


def test_min_epochs_are_those_of_this_run() -> None:
    engine = Engine(idle)
    engine.fit(range(4), epochs=3)
    engine.subscribe(EpochEnd, lambda event: engine.stop("enough"))
    engine.fit(range(4), epochs=3, min_epochs=2)
    assert engine.epoch == 5


# An interruption ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("event", "count"), [(BatchReady, 6), (StepEnd, 6), (Settled, 6)])
def test_an_interruption_ends_the_run_after_the_present_step_and_leaves_the_epoch_open(
    event: type[Event], count: int
) -> None:
    engine = run_with(lambda engine: engine.run.interrupt(signal.SIGTERM), event, count)
    assert (engine.epoch, engine.step, engine.history["epoch"]) == (2, 6, [1.0])
    assert (engine.history.reason, engine.history.exit_code) == ("interrupted by SIGTERM", 143)


def test_an_interruption_at_the_end_of_an_epoch_completes_it() -> None:
    engine = run_with(lambda engine: engine.run.interrupt(signal.SIGTERM), EpochEnd, 1)
    assert (engine.epoch, engine.step, engine.history["epoch"]) == (1, 4, [1.0])


def test_an_interruption_counts_before_min_epochs_too() -> None:
    engine = Engine(idle)
    engine.subscribe(StepEnd, lambda event: engine.run.interrupt(signal.SIGINT), when=at(2))
    engine.fit(range(4), epochs=3, min_epochs=3)
    assert (engine.step, engine.history.reason) == (2, "interrupted by SIGINT")


def test_an_interruption_is_the_reason_also_of_a_run_that_was_asked_to_stop() -> None:
    def decide(engine: Engine) -> None:
        engine.stop("enough")
        engine.run.interrupt(signal.SIGTERM)

    assert run_with(decide, StepEnd, 2).history.reason == "interrupted by SIGTERM"


# A checkpoint ---------------------------------------------------------------------------------------------

# Where it is asked, and the step with which it is saved: the next time that a step or an epoch settles.
SAVES: list[tuple[type[Event], int, int]] = [
    (FitStart, 1, 1),
    (EpochStart, 1, 1),
    (EpochStart, 2, 5),
    (BatchReady, 6, 6),
    (StepEnd, 6, 6),
    (Settled, 6, 7),
    (ValidationEnd, 1, 4),
    (EpochEnd, 1, 4),
]


@pytest.mark.parametrize(("event", "count", "step"), SAVES)
def test_a_checkpoint_that_is_asked_for_is_saved_as_soon_as_a_step_has_settled(
    event: type[Event], count: int, step: int, tmp_path: Path
) -> None:
    """Once, and beside the one at the end of the run."""
    checkpoint = RunCheckpoint(tmp_path, every_epochs=99, keep=99)
    run_with(lambda engine: engine.run.save(), event, count, callbacks=[checkpoint])
    assert [file.step for file in checkpoint.checkpoints.files()] == [12, step]


def test_a_checkpoint_asked_for_after_the_last_step_of_an_epoch_is_saved_with_its_end(tmp_path: Path) -> None:
    """Two things settle after that step: the step itself, and then the epoch."""
    checkpoint = RunCheckpoint(tmp_path, every_epochs=99, keep=99)
    engine = Engine(idle, callbacks=[checkpoint])

    def decide(event: Settled) -> None:
        if engine.run.phase is Phase.READING and engine.epoch == 1:
            engine.run.save()

    engine.subscribe(Settled, decide, when=at(4))
    engine.fit(range(4), epochs=3)
    assert [file.step for file in checkpoint.checkpoints.files()] == [12, 4]


def test_a_checkpoint_asked_for_when_an_epoch_has_settled_is_not_forgotten(tmp_path: Path) -> None:
    checkpoint = RunCheckpoint(tmp_path, every_epochs=99, keep=99)
    engine = Engine(idle, callbacks=[checkpoint])

    def decide(event: Settled) -> None:
        if engine.run.phase is Phase.BETWEEN and engine.epoch == 1:
            engine.run.save()

    engine.subscribe(Settled, decide)
    engine.fit(range(4), epochs=3)
    assert [file.step for file in checkpoint.checkpoints.files()] == [12, 5]


def test_a_checkpoint_is_due_at_one_settling_only() -> None:
    due: list[int] = []
    engine = Engine(idle)
    engine.subscribe(StepEnd, lambda event: engine.run.save(), when=every(3))
    engine.subscribe(Settled, lambda event: due.append(engine.step) if engine.run.save_is_due else None)
    engine.fit(range(8), epochs=1)
    assert due == [3, 6]


# An update ------------------------------------------------------------------------------------------------


def test_an_update_that_is_skipped_leaves_the_weights_alone_and_the_next_is_made() -> None:
    weights: list[Tensor] = []
    updated: list[int] = []
    trainer = make_trainer()
    trainer.subscribe(StepEnd, lambda event: weights.append(trainer.parts["model"].weight.detach().clone()))
    trainer.subscribe(UpdateEnd, lambda event: updated.append(trainer.step))

    def decide(event: GradientsReady) -> None:
        if trainer.step == 2:
            trainer.run.skip_update()

    trainer.subscribe(GradientsReady, decide)
    trainer.fit(class_batches(4, 4, 4), epochs=1)
    assert updated == [1, 3]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert (trainer.num_updates, trainer.num_skipped_updates) == (2, 1)


# Outside a run --------------------------------------------------------------------------------------------


def failing(engine: Engine, batch: Any) -> None:
    raise ArithmeticError


def after_nothing() -> Engine:
    return Engine(idle)


def after_a_run() -> Engine:
    engine = Engine(idle)
    engine.fit(range(2), epochs=1)
    return engine


def after_a_failure() -> Engine:
    engine = Engine(failing)
    with pytest.raises(ArithmeticError):
        engine.fit(range(2), epochs=1)
    return engine


def after_a_loop_that_was_left() -> Engine:
    engine = Engine()
    loop = engine.epochs(2)
    next(loop)
    loop.close()  # type: ignore[attr-defined]  # it is a generator, which its type leaves open
    return engine


BETWEEN = [after_nothing, after_a_run, after_a_failure, after_a_loop_that_was_left]


@pytest.mark.parametrize("make", BETWEEN)
@pytest.mark.parametrize("name", ["phase", "stop_reason", "save", "zebra"])
def test_whatever_is_asked_of_a_run_outside_of_one_is_refused_by_its_name(
    make: Callable[[], Engine], name: str
) -> None:
    with refused(EngineStateError, f"engine.run.{name} was asked for outside a run.", "engine.epochs(n)"):
        getattr(make().run, name)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_engine_is_neither_copied_nor_pickled(make: Callable[[Engine], object]) -> None:
    """The handlers of the copy would still act on the original."""
    with refused(EngineStateError, "An engine cannot be copied or pickled", "RunCheckpoint"):
        make(after_a_run())


def test_skip_update_is_refused_when_no_update_is_about_to_be_made() -> None:
    """It would otherwise leave out a later update, or none."""
    engine = Engine(idle)
    engine.subscribe(StepEnd, lambda event: engine.run.skip_update())
    with pytest.raises(EngineStateError, match="when no update was about to be made"):
        engine.fit(range(2), epochs=1)


def test_two_loops_over_training_data_make_one_epoch_and_are_resumed_in_either(tmp_path: Path) -> None:
    """A signal in the first loop, between the two, in the second or after it: each batch is read once."""

    def script(engine: Engine, read: list[int], cut: int, resume: str | None = None) -> None:
        engine.subscribe(StepEnd, lambda event: engine.run.interrupt(signal.SIGTERM) if engine.step == cut else None)
        for _ in engine.epochs(2, resume=resume):
            for data in (first, second):
                for batch in engine.train(data):
                    read.append(batch)  # noqa: PERF402 - a loop of one's own

    first, second = range(3), range(10, 12)
    for cut in range(1, 10):
        read: list[int] = []
        script(Engine(callbacks=[RunCheckpoint(tmp_path / str(cut))]), read, cut)
        assert len(read) == cut
        script(Engine(callbacks=[RunCheckpoint(tmp_path / str(cut))]), read, 0, resume="auto")
        assert read == [*first, *second] * 2


def test_a_stop_asked_at_the_start_of_a_resumed_run_counts(tmp_path: Path) -> None:
    def make() -> Engine:
        return Engine(idle, callbacks=[RunCheckpoint(tmp_path, every_steps=1)])

    cut, resumed = make(), make()
    cut.subscribe(StepEnd, lambda event: cut.run.interrupt(signal.SIGTERM), when=at(2))
    cut.fit(range(4), epochs=3)
    resumed.subscribe(FitStart, lambda event: event.engine.stop("enough"))
    assert resumed.fit(range(4), epochs=3, resume="auto").reason == "enough"


def test_the_end_of_a_step_whose_loop_was_left_is_still_training() -> None:
    """So that a handler of StepEnd can record."""
    seen: list[tuple[str, object]] = []
    engine = Engine()
    engine.subscribe(StepEnd, lambda event: seen.append((engine.current.name, engine.batch)))
    engine.subscribe(StepEnd, lambda event: engine.record(value=1.0, weight=1))
    for _ in engine.epochs(1):
        for _ in engine.train(range(5)):
            break
    assert seen == [("train", 0)]
    assert engine.history["train_value"] == [1.0]


def test_an_evaluation_within_a_validation_leaves_its_count_alone() -> None:
    seen: list[int] = []
    engine = Engine(idle)
    engine.subscribe(ValidationStepEnd, lambda event: engine.evaluate(range(4)) and None)
    engine.subscribe(ValidationStepEnd, lambda event: seen.append(engine.validation_step))
    engine.fit(range(2), range(3), epochs=1)
    assert seen == [1, 2, 3]


def test_the_error_of_a_handler_of_the_end_is_logged_if_the_loop_was_left(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine()
    engine.subscribe(FitEnd, lambda event: 1 / 0)
    for _ in engine.epochs(2):
        break
    assert "A handler failed while the run was ending." in caplog.text
    assert "division by zero" in caplog.text


def test_a_run_has_no_reason_and_no_exit_code_of_the_one_before() -> None:
    engine = Engine(idle)
    engine.subscribe(StepEnd, lambda event: engine.run.interrupt(signal.SIGTERM), when=at(1))
    assert engine.fit(range(2), epochs=1).exit_code == 143
    seen: list[tuple[str, int]] = []
    engine.subscribe(FitStart, lambda event: seen.append((engine.history.reason, engine.history.exit_code)))
    engine.fit(range(2), epochs=1)
    assert seen == [("", 0)]


def test_each_fit_has_a_run_of_its_own() -> None:
    runs: list[object] = []
    engine = Engine(idle)
    engine.subscribe(FitStart, lambda event: runs.append(engine.run))
    engine.subscribe(StepEnd, lambda event: engine.stop("enough"), when=at(1))
    engine.fit(range(4), epochs=1)
    engine.fit(range(4), epochs=1)
    assert runs[0] is not runs[1]
    assert (engine.step, engine.history.reason) == (5, "1 epoch done")


@pytest.mark.parametrize(
    ("decide", "settings", "reason"),
    [
        (lambda engine: None, {"epochs": 1}, "1 epoch done"),
        (lambda engine: None, {"epochs": 2}, "2 epochs done"),
        (lambda engine: None, {"max_steps": 3}, "max_steps=3 reached"),
        (lambda engine: None, {"epochs": 3, "max_steps": 3}, "max_steps=3 reached"),
        (lambda engine: engine.stop("enough"), {"epochs": 2}, "enough"),
    ],
)
def test_a_run_ends_for_one_reason_in_words(decide: Decision, settings: dict[str, Any], reason: str) -> None:
    engine, heard = Engine(idle), []
    engine.subscribe(StepEnd, lambda event: decide(engine))
    engine.subscribe(FitEnd, lambda event: heard.append(event.reason))
    engine.fit(range(2), **settings)
    assert heard == [reason] == [engine.history.reason]


def test_a_failure_is_the_reason_with_its_kind() -> None:
    assert after_a_failure().history.reason == "failed with ArithmeticError: "


def test_a_loop_that_was_left_is_the_reason_with_its_epoch() -> None:
    assert after_a_loop_that_was_left().history.reason == "the loop was left in epoch 1"


def test_a_second_fit_goes_on_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "camshaft")
    trainer = regression()
    trainer.fit(pairs(), epochs=2)
    assert "Going on" not in caplog.text
    trainer.fit(pairs(), epochs=2)
    assert "Continuing from epoch 2, step 6." in caplog.text
    assert trainer.history["epoch"] == [1, 2, 3, 4]
    assert trainer.history["step"] == [3, 6, 9, 12]


def test_a_run_within_a_run_is_refused_and_leaves_the_engine_usable() -> None:
    trainer = regression()
    nested = trainer.subscribe(EpochEnd, lambda event: trainer.fit(pairs(), epochs=1))
    with refused(EngineStateError, "already running"):
        trainer.fit(pairs(), epochs=2)
    nested.cancel()
    trainer.fit(pairs(), epochs=2)
    assert trainer.history.reason == "2 epochs done"


def test_a_loop_within_a_loop_is_refused() -> None:
    engine = Engine()
    for _ in engine.epochs(1):
        with refused(EngineStateError, "already running"):
            next(iter(engine.epochs(1)))
        assert len(list(engine.train([1, 2]))) == 2


OUTSIDE: list[tuple[Callable[[Engine], object], str]] = [
    (lambda engine: engine.stop("enough"), "engine.stop was called outside a run"),
    (lambda engine: next(iter(engine.train([1]))), "engine.train was called outside a run"),
    (lambda engine: next(iter(engine.validate([1]))), "engine.validate was called outside a run"),
    (lambda engine: engine.record(loss=0.5, weight=1), "recorded outside a stage"),
    (lambda engine: engine.measure(torch.ones(1), torch.ones(1), weight=1), "recorded outside a stage"),
]


@pytest.mark.parametrize(("call", "phrase"), OUTSIDE)
def test_a_call_that_needs_a_run_says_so_outside_of_one(call: Callable[[Engine], object], phrase: str) -> None:
    with refused(EngineStateError, phrase):
        call(Engine())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"epochs": 2, "max_steps": 3}, "max_steps=3 reached"),
        ({"epochs": 2, "max_steps": 4}, "2 epochs done"),
        ({"epochs": 2, "max_steps": 9}, "2 epochs done"),
        ({"max_steps": 4}, "max_steps=4 reached"),
        ({"epochs": 0}, "0 epochs done"),
    ],
)
def test_the_reason_is_the_limit_that_ended_the_run(settings: dict[str, int], reason: str) -> None:
    """An epoch that ``max_steps`` cuts short is not done."""
    assert Engine(lambda engine, batch: None).fit(range(2), **settings).reason == reason  # type: ignore[arg-type]  # dicts of ints
