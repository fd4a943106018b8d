"""What every handler must do, whatever else it does: each one that `camshaft.callbacks` exports joins these tests.

``MAKE`` makes one of each, with settings that have an effect in this small run. A new handler fails the first test
until it is there. Only subclasses of `Callback` are handlers: `LearningRateFinder` runs trainings of its own, and
`warmup_cosine` makes a scheduler.
"""

from __future__ import annotations

import io
import re
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import optuna
import pytest
from ignite.metrics import Accuracy
from torch import Tensor

import camshaft.callbacks
from camshaft.callbacks import (
    Accumulate,
    BestCheckpoint,
    ClipGradients,
    Compile,
    Deterministic,
    Distributed,
    EarlyStopping,
    Export,
    Fingerprint,
    FreezeUntil,
    Ignite,
    Images,
    JsonLines,
    LiveCurves,
    Log,
    Metrics,
    MicroBatch,
    MixedPrecision,
    Penalty,
    Placement,
    Profile,
    ProgressBar,
    Prune,
    Ramp,
    Recompute,
    Report,
    Rollback,
    RunCheckpoint,
    RunDirectory,
    Schedule,
    Steering,
    StopAfter,
    StopOnNonFinite,
    Summary,
    TensorBoard,
    Tracker,
    WeightAverage,
    warmup_cosine,
)
from camshaft.engine import (
    Callback,
    ConfigurationError,
    Engine,
    Logged,
    StepEnd,
    at,
)
from camshaft.testing import CHECKS, toy_data, toy_engine
from camshaft.testing.checks import Subject, equal, run_check

# The handlers -----------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A file on which a progress bar is drawn."""

    def isatty(self) -> bool:
        return True


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(dim=1) == target).float().mean()


def make_ignite(directory: Path) -> Ignite:
    """A bridge with a metric at work on both of its sides."""
    bridge = Ignite()
    Accuracy().attach(bridge.train, "acc")
    Accuracy().attach(bridge.val, "acc")
    return bridge


def make_images(directory: Path) -> Images:
    """One with a TensorBoard: it is refused where there is none."""
    images = Images(lambda batch, output: batch[0][:, :1].reshape(-1, 1, 1, 1))
    attach = images.attach

    def attach_with_a_board(engine: Engine) -> None:
        attach(engine)
        if not any(isinstance(one, TensorBoard) for one in engine.listeners.callbacks):
            engine.attach(TensorBoard(directory / "images"))

    images.attach = attach_with_a_board  # type: ignore[method-assign]
    return images


def make_log(directory: Path) -> Log:
    """A log that somebody hears: it is refused where nobody does."""
    log = Log(2, gradients=True)
    attach = log.attach

    def attach_with_a_listener(engine: Engine) -> None:
        attach(engine)
        engine.subscribe(Logged, lambda event: None)

    log.attach = attach_with_a_listener  # type: ignore[method-assign]
    return log


def make_steering(directory: Path) -> Steering:
    """One with a run directory: it is refused where there is none."""
    steering = Steering()
    attach = steering.attach

    def attach_with_a_directory(engine: Engine) -> None:
        attach(engine)
        if not any(isinstance(one, RunDirectory) for one in engine.listeners.callbacks):
            engine.attach(RunDirectory(directory / "runs", terminal=False))

    steering.attach = attach_with_a_directory  # type: ignore[method-assign]
    return steering


MAKE: dict[str, Callable[[Path], Callback]] = {
    "Distributed": lambda directory: Distributed(),
    "Placement": lambda directory: Placement("cpu"),
    "MixedPrecision": lambda directory: MixedPrecision("bf16"),
    "Compile": lambda directory: Compile("model", backend="eager"),
    "Recompute": lambda directory: Recompute(["0"]),
    "Deterministic": lambda directory: Deterministic(),
    "Metrics": lambda directory: Metrics({"acc": accuracy}),
    "ProgressBar": lambda directory: ProgressBar(repaint_seconds=1e-9, file=Terminal()),
    "LiveCurves": lambda directory: LiveCurves(),
    "EarlyStopping": lambda directory: EarlyStopping("val_loss", mode="min", patience=50),
    "BestCheckpoint": lambda directory: BestCheckpoint("val_loss", "min", directory / "best", top_k=2),
    "RunCheckpoint": lambda directory: RunCheckpoint(directory / "run"),
    "Accumulate": lambda directory: Accumulate(batches=2),
    "ClipGradients": lambda directory: ClipGradients(norm=0.1),
    "MicroBatch": lambda directory: MicroBatch(2),
    "StopAfter": lambda directory: StopAfter(hours=1),
    "Steering": make_steering,
    "Prune": lambda directory: Prune(optuna.create_study().ask(), "val_loss"),
    "Schedule": lambda directory: Schedule(warmup_cosine, per="update"),
    "Ramp": lambda directory: Ramp("optimizer.weight_decay", lambda done, total: 0.1 * done / total),
    "WeightAverage": lambda directory: WeightAverage(decay=0.5),
    "Penalty": lambda directory: Penalty(l1=0.01, l2=0.1),
    "FreezeUntil": lambda directory: FreezeUntil(2, ["0.*"]),
    "StopOnNonFinite": lambda directory: StopOnNonFinite("raise"),
    "Rollback": lambda directory: Rollback(every=3),
    "Summary": lambda directory: Summary(),
    "Log": make_log,
    "TensorBoard": lambda directory: TensorBoard(directory / "tensorboard"),
    "Images": make_images,
    "Tracker": lambda directory: Tracker(JsonLines(directory / "values.jsonl")),
    "Ignite": make_ignite,
    "RunDirectory": lambda directory: RunDirectory(directory / "runs"),
    "Export": lambda directory: Export(directory / "export" / "model.safetensors"),
    "Report": lambda directory: Report(directory / "report"),
    "Fingerprint": lambda directory: Fingerprint(2, directory / "fingerprint"),
    "Profile": lambda directory: Profile(directory / "profile"),
}

# A handler is one of these: it leaves the weights that training gives as they are ...
ONLY_WATCHES = {
    "Metrics", "ProgressBar", "LiveCurves", "EarlyStopping", "BestCheckpoint", "RunCheckpoint", "StopOnNonFinite",
    "TensorBoard", "Log", "Images", "Tracker", "Summary", "Prune", "Export", "Ignite", "RunDirectory", "Report",
    "Profile", "StopAfter", "Fingerprint", "Rollback", "Steering",
    "WeightAverage",  # evaluates with other weights, and trains with the same
}  # fmt: skip
# ... or it is there to change how they are trained, ...
CHANGES_TRAINING = {
    "MixedPrecision", "Accumulate", "ClipGradients", "MicroBatch", "Schedule", "Ramp", "Penalty", "FreezeUntil",
}  # fmt: skip
# ... though of these nothing shows here: on the CPU, in one process, with a compiler that does nothing.
CHANGES_NOTHING_HERE = {"Distributed", "Placement", "Compile", "Recompute", "Deterministic"}

every_handler = pytest.mark.parametrize("name", MAKE)


def exported() -> set[str]:
    """Return the names of the handlers that are exported."""
    values = {name: getattr(camshaft.callbacks, name) for name in camshaft.callbacks.__all__}
    return {name for name, value in values.items() if isinstance(value, type) and issubclass(value, Callback)}


def test_every_exported_handler_takes_part(tmp_path: Path) -> None:
    assert MAKE.keys() == exported()
    assert {name: type(make(tmp_path)).__name__ for name, make in MAKE.items()} == {name: name for name in MAKE}


def test_every_handler_only_watches_or_changes_training() -> None:
    listed = [*ONLY_WATCHES, *CHANGES_TRAINING, *CHANGES_NOTHING_HERE]
    assert sorted(listed) == sorted(exported())


# What is trained --------------------------------------------------------------------------------------------

TRAIN, VAL = toy_data()
EPOCHS = 2
STEPS = EPOCHS * len(TRAIN)


def fit(engine: Engine, **settings: Any) -> None:
    engine.fit(TRAIN, VAL, epochs=EPOCHS, **settings)


# The checks that anybody's handler can be put to ---------------------------------------------------------------

# What they must do to the model, or to its numbers; that the weights stay as they are is tested below.
CHANGES_THE_MODEL = {"Compile", "Recompute"}
VARIES = ("spent", "name")  # seconds; the time at which a run directory was made


@every_handler
@pytest.mark.parametrize("check", CHECKS)
def test_it_passes_every_check_of_the_testing_kit(name: str, check: str, tmp_path: Path) -> None:
    changes = name in CHANGES_TRAINING | CHANGES_THE_MODEL
    run_check(check, Subject(MAKE[name], tmp_path, changes, frozenset(VARIES)))


# Its life ---------------------------------------------------------------------------------------------------


@every_handler
def test_a_second_engine_is_refused(name: str, tmp_path: Path) -> None:
    handler = MAKE[name](tmp_path)
    fit(toy_engine(handler))
    second = toy_engine()
    before = second.explain()
    check_refused(second, handler)
    assert second.listeners.callbacks == []
    assert second.explain() == before


@every_handler
def test_the_same_engine_takes_a_handler_once(name: str, tmp_path: Path) -> None:
    handler = MAKE[name](tmp_path)
    engine = toy_engine(handler)
    before, callbacks = engine.explain(), list(engine.listeners.callbacks)
    check_refused(engine, handler)
    assert engine.listeners.callbacks == callbacks
    assert engine.explain() == before


def check_refused(engine: Engine, handler: Callback) -> None:
    """Fail unless the engine refuses the handler by its name, in a sentence of fact and one of what to do."""
    with pytest.raises(ConfigurationError) as refusal:
        engine.attach(handler)
    sentences = re.split(r"(?<=[.?!]) +(?=[A-Z])", str(refusal.value))
    assert len(sentences) == 2
    assert type(handler).__name__ in sentences[0]
    assert sentences[1].endswith(".")


# A run that is cut ------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_handler
def test_a_run_with_validations_in_mid_epoch_that_is_cut_and_resumed_ends_as_the_run_left_alone(
    name: str, tmp_path: Path
) -> None:
    """Without them, this is a check of the testing kit."""
    validate_every = "2 steps"
    left_alone = run(name, tmp_path / "alone", validate_every=validate_every)
    assert left_alone["step"] == STEPS
    different = {}
    for step in range(1, STEPS + 1):
        directory = tmp_path / str(step)
        cut = run(name, directory, cut_at=step, validate_every=validate_every)
        assert (cut["step"], cut["reason"]) == (step, "interrupted by SIGTERM")
        resumed = run(name, directory, resume="auto", seed=1, validate_every=validate_every)
        if wrong := [key for key in left_alone if not equal(resumed[key], left_alone[key])]:
            different[step] = wrong
    assert different == {}


def test_a_run_cut_after_the_last_step_of_an_epoch_can_be_resumed_with_a_metric_on_the_bridge(tmp_path: Path) -> None:
    """Of the epoch only the end is left, where ignite's metric computes a value, and it has seen nothing."""
    for resume in (None, "auto"):
        bridge = Ignite()
        Accuracy().attach(bridge.train, "acc")
        engine = toy_engine(bridge, RunCheckpoint(tmp_path))
        if resume is None:
            engine.subscribe(StepEnd, lambda event: event.engine.run.interrupt(signal.SIGTERM), when=at(len(TRAIN)))
        fit(engine, resume=resume)
    assert engine.step == STEPS


def run(name: str, directory: Path, *, cut_at: int = 0, seed: int = 0, **settings: Any) -> dict[str, Any]:
    """Run a training as a new process would, and return what it came to."""
    handler = MAKE[name](directory)
    engine = toy_engine(handler, seed=seed)
    if not isinstance(handler, RunCheckpoint):
        engine.attach(RunCheckpoint(directory / "run"))
    if cut_at:
        engine.subscribe(StepEnd, lambda event: event.engine.run.interrupt(signal.SIGTERM), when=at(cut_at))
    fit(engine, **settings)
    return outcome(engine, handler)


def outcome(engine: Engine, handler: Callback) -> dict[str, Any]:
    """Return all that a resumed run must have in common with one that was left alone."""
    counters = ("epoch", "step", "num_updates", "num_validations")
    stateful = {name: part for name, part in engine.parts.items() if hasattr(part, "state_dict")}
    state = handler.state_dict()
    state.pop("spent", None)  # seconds
    state.pop("name", None)  # of a run directory: the time at which the run began
    return {
        **{name: part.state_dict() for name, part in stateful.items()},
        **{name: getattr(engine, name) for name in counters},
        "rows": engine.history.rows,
        "validations": engine.history.validations,
        "reason": engine.history.reason,
        "handler": state,
    }


# What it does to the training -------------------------------------------------------------------------------


@cache
def without_handler() -> dict[str, Any]:
    """What the run comes to without any handler."""
    engine = toy_engine()
    fit(engine)
    return trained(engine)


def trained(engine: Engine) -> dict[str, Any]:
    """Return the weights, the momentum and the training losses."""
    states = {name: engine.parts[name].state_dict() for name in ("model", "optimizer")}
    return {**states, "losses": engine.history["train_loss"]}


@pytest.mark.parametrize("name", sorted(ONLY_WATCHES | CHANGES_NOTHING_HERE))
def test_a_handler_that_only_watches_leaves_every_bit_of_the_training_as_it_is(name: str, tmp_path: Path) -> None:
    engine = toy_engine(MAKE[name](tmp_path))
    fit(engine)
    assert equal(trained(engine), without_handler())


@pytest.mark.parametrize("name", sorted(CHANGES_TRAINING))
def test_a_handler_that_changes_training_does_so_in_this_run(name: str, tmp_path: Path) -> None:
    """Or the other tests would say little of it."""
    engine = toy_engine(MAKE[name](tmp_path))
    fit(engine)
    assert not equal(trained(engine)["model"], without_handler()["model"])
