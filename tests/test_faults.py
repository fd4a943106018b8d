"""Disks that fail at any call, and files in which any value is another: nothing is lost or half loaded."""

from __future__ import annotations

import atexit
import builtins
import errno
import math
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Failing, class_batches, make_trainer, refused
from torch import Tensor, nn
from torchmetrics.classification import Accuracy

from camshaft.callbacks import (
    Accumulate,
    BestCheckpoint,
    EarlyStopping,
    FreezeUntil,
    MicroBatch,
    Report,
    RunCheckpoint,
    RunDirectory,
    Schedule,
    StopOnNonFinite,
    TensorBoard,
    WeightAverage,
)
from camshaft.engine import (
    Callback,
    CheckpointDirectory,
    CheckpointError,
    ConfigurationError,
    Engine,
    EpochEnd,
    FitStart,
    StepEnd,
    Trainer,
)
from camshaft.engine import at as at_step
from camshaft.engine.rng import rng_state, seed_everything

# Forged files -----------------------------------------------------------------------------------------------

Place = tuple[Any, ...]
GONE, HUGE = object(), 10**30
DATA = class_batches(4, 4, 4, 2)


def full_trainer(directory: Path) -> Engine:
    """A run with a state of each kind: an open window, an average, a schedule, metrics and every handler with one."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    callbacks: list[Callback] = [
        RunCheckpoint(directory / "checkpoints"),
        BestCheckpoint("train_loss", "min", directory / "best", top_k=2),
        EarlyStopping("train_loss", "min", patience=9),
        Accumulate(batches=2),
        MicroBatch(),
        WeightAverage(decay=0.9),
        FreezeUntil(2, ["1.*"]),
        StopOnNonFinite("stop", every_steps=5),
        Schedule(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9), per="update"),
    ]
    metrics = {"acc": Accuracy(task="multiclass", num_classes=3)}
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics=metrics, callbacks=callbacks)


def fit(trainer: Engine, **settings: Any) -> Engine:
    seed_everything(0)
    trainer.fit(DATA, DATA[:1], epochs=3, **settings)
    return trainer


def mutations(value: Any) -> dict[str, Any]:
    """What may stand in the place of a value, by what is wrong with it."""
    found: dict[str, Any] = {"none": None, "text": "x", "number": -3, "huge": HUGE, "nan": math.nan, "list": [value]}
    if isinstance(value, Tensor):
        wider = torch.zeros(*value.shape, 2, dtype=value.dtype)
        found |= {
            "shape": wider,
            "flat": torch.zeros(value.numel() + 1, dtype=value.dtype),
            "negative": -1 - value.int(),
        }
        if value.is_floating_point():
            found["nan"] = torch.full_like(value, math.nan)
    elif isinstance(value, dict):
        found |= {"additional": {**value, "step": 1}, "numbered": {**value, 99: 1}, "empty": {}}
    elif isinstance(value, list | tuple):
        found |= {"shorter": value[:-1], "longer": (*value, 1), "empty": []}
    return found


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """The place of each value of a state, those that hold others included; of a long row only its first and last."""
    yield place
    if isinstance(value, dict):
        inner: list[Any] = list(value)
    elif isinstance(value, list | tuple):
        inner = list(range(len(value))) if len(value) < 9 else [0, len(value) - 1]
    else:
        return
    for key in inner:
        yield from places(value[key], (*place, key))


def replaced(state: Any, place: Place, value: Any) -> Any:
    """A copy of a state that has another value in one place, or no such place."""
    if not place:
        return value
    key, *rest = place
    if isinstance(state, dict) and key not in state:
        return state | {key: value}
    if isinstance(state, list | tuple):
        items = [replaced(item, tuple(rest), value) if n == key else item for n, item in enumerate(state)]
        return type(state)(items if rest or value is not GONE else [*items[:key], *items[key + 1 :]])
    if not rest and value is GONE:
        return type(state)({name: item for name, item in state.items() if name != key})
    return type(state)({name: replaced(item, tuple(rest), value) if name == key else item
                        for name, item in state.items()})  # fmt: skip


def forgeries(state: dict[str, Any]) -> list[tuple[str, Place, Any]]:
    """Each place of a state with each value that may stand there."""
    found = []
    for place in places(state):
        value = at(state, place)
        name = ".".join(map(str, place))
        found += [(f"{name}:{what}", place, other) for what, other in mutations(value).items()]
        if place:
            found.append((f"{name}:gone", place, GONE))
    return found


def at(state: Any, place: Place) -> Any:
    for key in place:
        state = state[key]
    return state


def frozen(value: Any) -> Any:
    """Something that is equal where every bit of a value is."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.tolist() if value.numel() < 2 else value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [frozen(item) for item in value]
    return repr(value)


def everything(trainer: Engine) -> Any:
    """What a refused resume must leave as it is."""
    counters = [trainer.epoch, trainer.step, trainer.num_updates, trainer.num_skipped_updates, trainer.num_validations]
    parts = {name: trainer.parts[name].state_dict() for name in ("model", "optimizer", "scheduler")}
    grads = [parameter.grad for parameter in trainer.parts["model"].parameters()]
    states = [callback.state_dict() for callback in trainer.listeners.callbacks]
    return frozen([counters, parts, grads, states, trainer.history.rows, trainer.history.validations, rng_state()])


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class TooLongError(Exception):
    """A run that goes on after the last step that it should make."""


@cache
def cut_run() -> tuple[Path, dict[str, Any]]:
    """The directory of a run that was interrupted in the middle of a window, and its state."""
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory)
    trainer = full_trainer(directory)
    trainer.subscribe(StepEnd, lambda event: trainer.run.interrupt(signal.SIGTERM), when=at_step(7))
    fit(trainer)
    found = CheckpointDirectory(directory / "checkpoints").load_newest()
    assert found is not None
    return directory, found[0]


def copied(directory: Path, state: dict[str, Any]) -> Path:
    """A copy of that run's directory in which the checkpoint is another, signed."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(cut_run()[0], directory)
    checkpoints = CheckpointDirectory(directory / "checkpoints")
    checkpoints.files()[0].path.unlink()
    checkpoints.save(state, 7)
    return directory


def untouched(directory: Path) -> Any:
    """Everything in a run that fails just before it would be resumed."""
    trainer = full_trainer(copied(directory, cut_run()[1]))
    trainer.subscribe(FitStart, lambda event: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(trainer, resume="auto")
    return everything(trainer)


def refuses(directory: Path, state: dict[str, Any], before: Any) -> bool:
    """Resume from a state, and return whether it was refused; if so, find that nothing was loaded or touched."""
    trainer, files = full_trainer(copied(directory, state)), files_in(directory)
    steps: list[int] = []

    def count(event: StepEnd) -> None:
        steps.append(event.engine.step)
        if len(steps) > 30:
            raise TooLongError

    trainer.subscribe(StepEnd, count)
    try:
        fit(trainer, resume="auto")
    except (CheckpointError, ConfigurationError):
        assert everything(trainer) == before
        assert files_in(directory) == files
        return True
    return False


def check_forgeries(directory: Path, cases: list[tuple[str, Place, Any]]) -> int:
    """Return how many of them are refused; a failure names the first that is neither refused nor resumed."""
    before, num_refused = untouched(directory), 0
    for name, place, value in cases:
        try:
            num_refused += refuses(directory, replaced(cut_run()[1], place, value), before)
        except Exception as error:
            error.add_note(f"With this forgery: {name}")
            raise
    return num_refused


def test_the_state_that_is_forged_is_resumed_as_it_is(tmp_path: Path) -> None:
    assert not refuses(tmp_path / "run", cut_run()[1], untouched(tmp_path / "run"))


def test_a_forged_value_is_refused_with_nothing_loaded_or_the_run_works(tmp_path: Path) -> None:
    """A sample; no other kind of error, no run without an end, and no half of a state."""
    cases = forgeries(cut_run()[1])[::17]
    assert len(cases) > 80
    assert 0.5 < check_forgeries(tmp_path / "run", cases) / len(cases) < 0.95


@pytest.mark.slow
def test_every_forged_value_is_refused_with_nothing_loaded_or_the_run_works(tmp_path: Path) -> None:
    cases = forgeries(cut_run()[1])
    assert len(cases) > 1500
    assert 0.7 < check_forgeries(tmp_path / "run", cases) / len(cases) < 0.9


class Odd(Callback):
    """Takes back its state, and then raises."""

    def __init__(self, error: Exception) -> None:
        self.error, self.taken = error, 0

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]
        if self.taken:
            raise self.error


@pytest.mark.parametrize("error", [StopIteration(), ZeroDivisionError(), AssertionError()], ids=repr)
def test_whatever_a_handler_raises_at_its_state_all_that_was_loaded_is_put_back(
    error: Exception, tmp_path: Path
) -> None:
    before = untouched(tmp_path / "run")
    trainer = full_trainer(copied(tmp_path / "run", replaced(cut_run()[1], ("callbacks", "Odd"), {"taken": 1})))
    trainer.attach(odd := Odd(error))
    with refused(CheckpointError, "does not hold what a checkpoint holds", repr(error), "nothing was loaded"):
        fit(trainer, resume="auto")
    assert odd.taken == 0
    trainer.listeners.callbacks.remove(odd)
    assert everything(trainer) == before


def test_a_lack_of_memory_while_a_state_is_loaded_is_raised_as_it_is_and_the_next_try_works(tmp_path: Path) -> None:
    before = untouched(tmp_path / "run")
    trainer = full_trainer(copied(tmp_path / "run", replaced(cut_run()[1], ("callbacks", "Odd"), {"taken": 1})))
    trainer.attach(odd := Odd(MemoryError()))
    with pytest.raises(MemoryError):
        fit(trainer, resume="auto")
    trainer.listeners.callbacks.remove(odd)
    assert everything(trainer) == before
    fit(trainer, resume="auto")
    assert trainer.epoch == 3


@pytest.mark.parametrize("garbage", [None, "x", 3, []])
def test_the_state_of_a_handler_is_a_dict_before_any_handler_looks_into_it(garbage: Any, tmp_path: Path) -> None:
    """As `RunDirectory` does, before the run begins, to return to its directory."""
    state = replaced(cut_run()[1], ("callbacks", "RunDirectory"), garbage)
    trainer = full_trainer(copied(tmp_path / "run", state))
    trainer.attach(RunDirectory(tmp_path / "runs", terminal=False))
    files = files_in(tmp_path)
    with refused(CheckpointError, f"state['callbacks']['RunDirectory'] is {garbage!r}", "nothing was loaded"):
        fit(trainer, resume="auto")
    assert files_in(tmp_path) == files


# Disks that fail ---------------------------------------------------------------------------------------------

ERRORS = [errno.EIO, errno.ENOSPC, errno.ENOMEM, errno.ESTALE]
CALLS = ("open", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "listdir", "scandir")


class Disk:
    """Counts the calls that touch a directory, and lets the one of a number fail; 0 lets none fail."""

    def __init__(self, directory: Path, failing: int = 0, code: int = errno.EIO) -> None:
        self.directory, self.failing, self.code = str(directory), failing, code
        self.calls: list[str] = []
        self._lock = threading.Lock()
        self._descriptors: set[int] = set()

    def touch(self, name: str, target: object) -> None:
        with self._lock:
            self.calls.append(f"{name} {Path(str(target)).name}")
            fails = len(self.calls) == self.failing
        if fails:
            raise OSError(self.code, os.strerror(self.code))

    def owns(self, target: object) -> bool:
        return target in self._descriptors if isinstance(target, int) else str(target).startswith(self.directory)

    def before(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any = ".", *arguments: Any, **settings: Any) -> Any:
            if not self.owns(target):
                return function(target, *arguments, **settings)
            self.touch(name, target)
            result = function(target, *arguments, **settings)
            if name != "open":
                return result
            self._descriptors.add(result if isinstance(result, int) else result.fileno())
            return result if isinstance(result, int) else Failing(result, lambda name: self.touch(name, target))

        return call

    @contextmanager
    def working(self) -> Iterator[Disk]:
        patch = pytest.MonkeyPatch()
        patch.setattr(builtins, "open", self.before("open", builtins.open))
        for name in CALLS:
            patch.setattr(os, name, self.before(name, getattr(os, name)))
        try:
            yield self
        finally:
            patch.undo()


def writing_trainer(directory: Path, *, background: bool, draws: bool) -> Engine:
    """A run with every handler that writes files; drawing takes its time."""
    callbacks: list[Callback] = [
        RunDirectory(directory / "runs", terminal=False),
        BestCheckpoint("val_loss", "min", top_k=2),
        TensorBoard(),
        RunCheckpoint(directory / "checkpoints", every_steps=2, background=background),
    ]
    return make_trainer(*callbacks, *([Report()] if draws else []))


def first_and_last(calls: list[str]) -> list[int]:
    """The numbers of the first and the last call of each kind for each file, whatever is random in its name."""
    kinds: dict[str, list[int]] = {}
    for number, call in enumerate(calls, start=1):
        kinds.setdefault(re.sub(r"[0-9a-f]{8,}|\d+", "", call), []).append(number)
    return sorted({number for numbers in kinds.values() for number in (numbers[0], numbers[-1])})


def check_faults(directory: Path, *, background: bool, draws: bool, every: int, logged: Callable[[], str]) -> int:
    """Let calls fail in turn, and look at what is left; return how many."""
    through = writing_trainer(directory / "0", background=background, draws=draws)
    with Disk(directory / "0").working() as disk:
        through.fit(DATA, DATA[:1], epochs=2)
    numbers = first_and_last(disk.calls)[::every]
    for number in numbers:
        where = directory / str(number)
        trainer = writing_trainer(where, background=background, draws=draws)
        disk, raised = Disk(where, number, ERRORS[number % len(ERRORS)]), None
        logged()
        try:
            with disk.working():
                trainer.fit(DATA, DATA[:1], epochs=2)
        except (OSError, ConfigurationError) as error:
            raised = error
        failed = disk.calls[number - 1]
        is_closing = failed == "flush log.log" and failed not in disk.calls[number:]  # its records were flushed before
        is_harmless = (
            is_closing or failed == "unlink .lock" or failed.startswith("mkdir ")
        )  # of a directory that is there
        assert raised is not None or "could not" in logged() or is_harmless, failed
        assert trainer.step == 8 or (trainer.step == 0 and raised is not None), failed
        if trainer.step:
            assert frozen(trainer.parts["model"].state_dict()) == frozen(through.parts["model"].state_dict()), failed
            assert CheckpointDirectory(where / "checkpoints").load_newest() is not None, failed
        trainer.fit(DATA, DATA[:1], epochs=1)
        found = CheckpointDirectory(where / "checkpoints").load_newest()
        assert found is not None, failed
        assert found[0]["counters"]["step"] == trainer.step, failed
    return len(numbers)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Returns what was logged, or printed instead, since the last call."""

    def read() -> str:
        text = caplog.text + capsys.readouterr().err
        caplog.clear()
        return re.sub("TensorBoard stops writing|cannot be locked", "could not", text)

    return read


@pytest.mark.parametrize("background", [False, True])
def test_whichever_call_fails_training_ends_as_without_it_and_the_next_save_succeeds(
    tmp_path: Path, background: bool, logged: Callable[[], str]
) -> None:
    """A sample; only a failure before the first step ends a run, and every failure is told."""
    assert check_faults(tmp_path, background=background, draws=False, every=9, logged=logged) > 6


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_of_each_call_and_file_the_first_or_the_last_may_fail(
    tmp_path: Path, background: bool, logged: Callable[[], str]
) -> None:
    assert check_faults(tmp_path, background=background, draws=True, every=1, logged=logged) > 60


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_a_resume_during_which_any_call_fails_loses_nothing_and_the_next_try_works(code: int, tmp_path: Path) -> None:
    """It is refused before the first step with every file as it was, or it works."""
    where = copied(tmp_path / "run", cut_run()[1])
    trainer = full_trainer(where)
    trainer.subscribe(EpochEnd, lambda event: trainer.run.interrupt(signal.SIGTERM))
    with Disk(where / "checkpoints").working() as disk:
        fit(trainer, resume="auto")
    num_refused = 0
    for number in range(1, disk.calls.index(next(call for call in disk.calls if call.startswith("write"))) + 1):
        trainer, before = full_trainer(copied(where, cut_run()[1])), files_in(where)
        raised = None
        try:
            with Disk(where / "checkpoints", number, code).working():
                fit(trainer, resume="auto")
        except (CheckpointError, ConfigurationError) as error:
            raised = error
        assert (raised is not None) == (trainer.step == 0), disk.calls[number - 1]
        if raised is not None:
            num_refused += 1
            assert files_in(where).items() >= before.items()
        fit(trainer, resume="auto")
        assert trainer.epoch == 3
    assert num_refused >= 3
