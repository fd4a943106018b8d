"""What every handler should do, whatever else it does: one named check for each promise."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import random
import re
import signal
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor, nn

from camshaft.callbacks import RunCheckpoint
from camshaft.engine import (
    BatchReady,
    Callback,
    ConfigurationError,
    Engine,
    FitEnd,
    FitStart,
    Settled,
    StepEnd,
    at,
)

from .host_reads import count_host_reads
from .toy import toy_data, toy_engine, toy_run

Make = Callable[[Path], Callback | Sequence[Callback]]

STEPS, EPOCH = 10, 5  # of a toy run, and of its epochs


class CheckFailedError(AssertionError):
    """A handler does not pass a check; the message begins with the check's name, and ends with what to do."""


@dataclass(slots=True)
class Subject:
    """The handler that is checked.

    Args:
        make: makes a new one, given a directory to write in; with others that it needs, it is the first of a list.
        directory: an empty one.
        changes_training: whether it is there to change what is trained, or how.
        varies: the entries of its state that differ from run to run: times, names of directories.
    """

    make: Make
    directory: Path
    changes_training: bool = False
    varies: frozenset[str] = frozenset()
    handler_name: str = "the handler"

    def made(self, directory: Path | None = None) -> tuple[Callback, list[Callback]]:
        """Return a new handler, and it together with what it needs."""
        made = self.make(directory or self.directory)
        every = [made] if isinstance(made, Callback) else list(made)
        self.handler_name = type(every[0]).__name__
        return every[0], every

    def state(self, handler: Callback) -> dict[str, Any]:
        """Return the handler's state, without what varies."""
        return {name: value for name, value in handler.state_dict().items() if name not in self.varies}


Check = Callable[[Subject], None]
CHECKS: dict[str, Check] = {}


def _check(check: Check) -> Check:
    CHECKS[check.__name__] = check
    return check


def check_callback(
    make: Make,
    *,
    changes_training: bool = False,
    varies: Sequence[str] = (),
    only: Sequence[str] = (),
) -> None:
    """Check a handler in small runs; about two seconds.

    Args:
        make: a function that gets an empty directory and returns a new handler; or a list of it and of others that it
            needs: ``lambda directory: [MyHandler(), Log()]``.
        changes_training: the handler is there to change what is trained, or how: whether it leaves weights, random
            numbers and the model alone is not checked.
        varies: the entries of its state that differ from run to run, such as times.
        only: names of `CHECKS`; all of them by default.

    Raises:
        CheckFailedError: naming the first check that fails. An error that the handler itself raises stays as it is.

    >>> from camshaft.callbacks import EarlyStopping
    >>> check_callback(lambda directory: EarlyStopping("val_loss", patience=5))
    """
    for name in only or CHECKS:
        with tempfile.TemporaryDirectory() as directory:
            run_check(name, Subject(make, Path(directory), changes_training, frozenset(varies)))


def run_check(name: str, subject: Subject) -> None:
    """Run one check, in a directory of its own and with random numbers that are put back.

    Raises:
        ConfigurationError: if there is no such check.
        CheckFailedError: if it fails.
    """
    if name not in CHECKS:
        raise ConfigurationError(f'There is no check "{name}". Write one of: {", ".join(CHECKS)}.')
    if subject.changes_training and name in _ONLY_OF_THOSE_THAT_WATCH:
        return
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        CHECKS[name](subject)
    except CheckFailedError as error:
        raise CheckFailedError(f"{name}: {subject.handler_name}: {error}") from None
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def parametrize_checks(
    make: Make, *, changes_training: bool = False, varies: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator for a test of pytest that runs once for each check, each with its name.

    Its arguments are those of `check_callback`.

    ::

        @parametrize_checks(lambda directory: MyHandler())
        def test_my_handler(check, tmp_path):
            check(tmp_path)
    """
    import pytest

    def run(name: str, directory: Path) -> None:
        run_check(name, Subject(make, directory, changes_training, frozenset(varies)))

    mark: Callable[[Callable[..., None]], Callable[..., None]] = pytest.mark.parametrize(
        "check", [partial(run, name) for name in CHECKS], ids=list(CHECKS)
    )
    return mark


# The training it leaves as it is ----------------------------------------------------------------------


@_check
def leaves_weights_alone(subject: Subject) -> None:
    """The weights, the optimizer's state and the history are those of a run without it, to the bit."""
    _, every = subject.made()
    ours, theirs = toy_run(*every), toy_run()
    for part in ("model", "optimizer"):
        if not equal(ours.parts[part].state_dict(), theirs.parts[part].state_dict()):
            _fail(f"the {part} is another than without the handler",
                  "Write changes_training=True if it is there for that; or keep to watching.")  # fmt: skip
    if ours.history["train_loss"] != theirs.history["train_loss"]:
        _fail("the losses are others than without the handler", "Look at what it does to batches and modes.")


@_check
def draws_no_random_numbers(subject: Subject) -> None:
    """The random numbers of torch, Python and NumPy are where they are without it."""

    def states(*callbacks: Callback) -> tuple[Any, Any, Any]:
        random.seed(0)
        np.random.seed(0)
        toy_run(*callbacks)
        return torch.get_rng_state(), random.getstate(), cast("tuple[Any, ...]", np.random.get_state())[1:3]

    _, every = subject.made()
    for name, ours, theirs in zip(("torch", "Python", "NumPy"), states(*every), states(), strict=True):
        if not equal(ours, theirs):
            _fail(f"it has drawn random numbers of {name}, which the training needs",
                  "Draw from a generator of its own: torch.Generator().manual_seed(0).")  # fmt: skip


@_check
def plants_nothing(subject: Subject) -> None:
    """No attribute and no hook is left in the model or in the engine."""

    def planted(engine: Engine) -> set[str]:
        found = {f"engine.{name}" for name in vars(engine)}
        for path, module in engine.parts.module("model", "a check").named_modules():
            found |= {f"model.{path}.{name}" for name in vars(module)}
            hooks = (getattr(module, name) for name in vars(module) if name.endswith("_hooks"))
            found |= {f"a hook in model.{path}" for some in hooks if some}
        return found

    _, every = subject.made()
    if left := sorted(planted(toy_run(*every)) - planted(toy_run())):
        _fail(f"it has left {', '.join(left)}", "Keep what it needs in itself, and remove its hooks.")


@_check
def ignores_evaluation(subject: Subject) -> None:
    """After ``evaluate`` and ``predict`` before, between and after runs, the training is the same."""
    _, every = subject.made()
    engine, (train, val) = toy_engine(*every), toy_data()

    def look() -> None:
        with torch.random.fork_rng():
            engine.evaluate(val)
            engine.predict(val)

    look()
    engine.fit(train, val, epochs=2)
    look()
    _, others = subject.made(_other(subject.directory))
    if not equal(_trained(engine), _trained(toy_run(*others))):
        _fail("an evaluation outside of the run has changed the training",
              "Look at engine.training, or hear events of the training only.")  # fmt: skip


_ONLY_OF_THOSE_THAT_WATCH = {"leaves_weights_alone", "draws_no_random_numbers", "plants_nothing"}


# What it costs ----------------------------------------------------------------------------------------


@_check
def reads_nothing_on_the_host(subject: Subject) -> None:
    """In a training step in mid-epoch, no value of a tensor is read, for which an accelerator would have to finish."""
    _, every = subject.made()
    engine, stack = toy_engine(*every), contextlib.ExitStack()
    reads: list[Any] = []
    engine.subscribe(Settled, lambda event: reads.append(stack.enter_context(count_host_reads())), when=at(7))
    engine.subscribe(Settled, lambda event: stack.close(), when=at(9))
    with stack:
        engine.fit(*toy_data(), epochs=2)
    if reads[0].count:
        _fail(f"a step reads {reads[0].count // 2 or 1} values on the host ({reads[0].names[0]})",
              "Keep tensors, and read them when an epoch ends; or take what engine.current.peek() has.")  # fmt: skip


@_check
def keeps_no_outputs(subject: Subject) -> None:
    """Outputs of the model are freed: no more than the newest two are held after a run."""
    _, every = subject.made()
    engine, outputs = toy_engine(*every), list[weakref.ref[Tensor]]()

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        outputs.append(weakref.ref(output))

    hook = engine.parts.module("model", "a check").register_forward_hook(note)
    engine.fit(*toy_data(), epochs=2)
    hook.remove()
    gc.collect()
    alive = sum(output() is not None for output in outputs)
    if alive > 2:
        _fail(f"{alive} outputs of {len(outputs)} steps are still in memory, each with its graph",
              "Keep output.detach(), and no more of them than needed.")  # fmt: skip


# Its state --------------------------------------------------------------------------------------------


@_check
def keeps_safely_loadable_state(subject: Subject) -> None:
    """Its state comes out of a file as it went in, with nothing but tensors and plain values."""
    _states_of_a_run(subject)


@_check
def takes_its_state_back(subject: Subject) -> None:
    """A new handler that loads its state returns the same state."""
    for state in _states_of_a_run(subject):
        other, others = subject.made()  # in the same directory: the state may name files
        engine, taken = toy_engine(*others), list[dict[str, Any]]()

        def load(event: FitStart, other: Callback = other, state: Any = state, taken: list[Any] = taken) -> None:
            other.load_state_dict(state)
            taken.append(subject.state(other))

        engine.subscribe(FitStart, load)
        other.before_resume(state)
        _fit(engine)
        wanted = {name: value for name, value in state.items() if name not in subject.varies}
        if not equal(taken[0], wanted):
            names = [name for name in wanted if not equal(taken[0].get(name), wanted[name])]
            _fail(f"after load_state_dict, state_dict has another value of: {', '.join(names)}",
                  "Take back in load_state_dict whatever state_dict returns.")  # fmt: skip


@_check
def resumes_after_every_step(subject: Subject) -> None:
    """A run that is cut after any step and resumed ends as one that was left alone: weights, history, state."""

    def run(directory: Path, *, cut: int = 0, resume: bool = False) -> dict[str, Any]:
        handler, every = subject.made(directory)
        checkpoint = [] if any(one.checkpoints for one in every) else [RunCheckpoint(directory / "run checkpoint")]
        engine = toy_engine(*every, *checkpoint, seed=int(resume))
        if cut:
            engine.subscribe(StepEnd, lambda event: event.engine.run.interrupt(signal.SIGTERM), when=at(cut))
        engine.fit(*toy_data(), epochs=2, resume="auto" if resume else None)
        return {**_trained(engine), "rows": engine.history.rows, "its state": subject.state(handler)}

    whole = run(_other(subject.directory))
    for step in range(1, STEPS + 1):
        directory = _other(subject.directory, step)
        run(directory, cut=step)
        resumed = run(directory, resume=True)
        if wrong := [name for name in whole if not equal(resumed[name], whole[name])]:
            _fail(f"a run that is cut after step {step} and resumed ends with another value of: "
                  f"{', '.join(wrong)}", "Keep what it counts or collects in state_dict, and count nothing when a run "
                  "begins that a resumed run counts again.")  # fmt: skip


# Its life ---------------------------------------------------------------------------------------------


@_check
def fits_twice(subject: Subject) -> None:
    """An engine with it can fit again, and goes on counting."""
    _, every = subject.made()
    engine = toy_run(*every)
    engine.fit(*toy_data(), epochs=2)
    if [row["epoch"] for row in engine.history.rows] != [1, 2, 3, 4]:
        _fail("a second fit of the engine does not go on after the first",
              "Begin anew in on_fit_start what belongs to one run.")  # fmt: skip


@_check
def belongs_to_one_engine(subject: Subject) -> None:
    """A second engine refuses it."""
    handler, every = subject.made()
    toy_run(*every)
    try:
        toy_engine().attach(handler)
    except ConfigurationError:
        return
    _fail("a second engine takes it, though it belongs to one", "Let attach call super().attach(engine).")


@_check
def lets_errors_through(subject: Subject) -> None:
    """An error in a step reaches the caller as it is, and the engine can fit again."""
    _, every = subject.made()
    engine, error, ends = toy_engine(*every), _StepError("it broke"), list[str]()
    engine.subscribe(FitEnd, lambda event: ends.append(event.reason))

    def break_down(event: BatchReady) -> None:
        if not ends:
            raise error

    engine.subscribe(BatchReady, break_down, when=at(3))
    caught: BaseException | None = None
    try:
        engine.fit(*toy_data(), epochs=2)
    except Exception as raised:
        caught = raised
    if caught is not error:
        what = "nothing" if caught is None else repr(caught)
        _fail(f"an error in a step does not reach the caller, which gets {what}",
              "Catch only the errors that it expects, around the lines that raise them.")  # fmt: skip
    engine.fit(*toy_data(), epochs=1)
    if ends != ["failed with _StepError: it broke", "1 epoch done"]:
        _fail(f"after an error, the next run ends with {ends[-1]!r}",
              "Begin anew in on_fit_start what belongs to one run.")  # fmt: skip


class _StepError(Exception):
    """What goes wrong in a step."""


@_check
def lets_signals_through(subject: Subject) -> None:
    """A real SIGTERM during a step ends the run, which says so."""
    _, every = subject.made()
    engine = toy_engine(*every)
    engine.subscribe(BatchReady, lambda event: signal.raise_signal(signal.SIGTERM), when=at(3))
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # if the handler lets it through to nobody
    try:
        history = engine.fit(*toy_data(), epochs=2)
    finally:
        signal.signal(signal.SIGTERM, before)
    if history.interrupted != signal.SIGTERM:
        _fail(f"SIGTERM does not interrupt the run, which ends with {history.reason!r}",
              "Leave signals to the engine; engine.run.interrupt is how a handler ends a run.")  # fmt: skip


@_check
def leaves_nothing_behind(subject: Subject) -> None:
    """After a run there are no more threads, open files, log handlers and signal handlers, and no other settings."""

    def things() -> dict[str, Any]:
        root = logging.getLogger()
        return {
            "a thread": {one.name for one in threading.enumerate()},
            "an open file": len(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else 0,
            "a handler of the root logger, or its level": (list(root.handlers), root.level),
            "a signal handler": [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)],
            "torch's default dtype": torch.get_default_dtype(),
            "whether gradients are on": torch.is_grad_enabled(),
            "whether algorithms are deterministic": torch.are_deterministic_algorithms_enabled(),
        }

    toy_run()
    _, every = subject.made()
    engine = toy_engine(*every)
    gc.collect()
    before = things()
    engine.fit(*toy_data(), epochs=2)
    gc.collect()
    after = things()
    for name, value in before.items():
        added = after[name] - value if isinstance(value, set) else after[name] > value if name == "an open file" else (
            after[name] != value
        )  # fmt: skip
        if added:
            _fail(
                f"after the run there is another state of: {name}",
                'Put it back: what is given to engine.listeners.around("fit", ...) ends however the run ends.',
            )


@_check
def writes_only_where_told(subject: Subject) -> None:
    """It writes no file into the working directory."""
    elsewhere = _other(subject.directory)
    with _in_directory(elsewhere):
        _, every = subject.made()
        toy_run(*every)
    if left := sorted(path.name for path in elsewhere.iterdir()):
        _fail(f"it has written {', '.join(left)} into the working directory",
              "Take a directory as an argument; directory_for(...) finds that of the run.")  # fmt: skip


# How it shows itself ----------------------------------------------------------------------------------


@_check
def prints_well(subject: Subject) -> None:
    """Its repr is one line, begins with its class and has no address."""
    handler, every = subject.made()
    texts = [repr(handler)]
    toy_run(*every)
    texts.append(repr(handler))
    for text in texts:
        if not re.match(rf"{type(handler).__name__}\(.*\)$", text) or " at 0x" in text:
            _fail(f"its repr is {text!r}", f'Return f"{type(handler).__name__}(...)" with its settings.')


@_check
def is_made_alike(subject: Subject) -> None:
    """Two that are made alike print alike, before a run and after it: a checkpoint tells them by that."""
    texts = []
    for number in range(2):
        directory = _other(subject.directory, number)
        handler, every = subject.made(directory)
        before = repr(handler)
        toy_run(*every)
        texts.append([re.sub(re.escape(str(directory)) + r"[^'\")]*", "", text) for text in (before, repr(handler))])
    if texts[0] != texts[1]:
        _fail(f"two that are made alike print as {texts[0]} and {texts[1]}", "Show its settings only.")


# ------------------------------------------------------------------------------------------------------


def equal(ours: Any, theirs: Any) -> bool:
    """Return whether two nests of plain values and tensors are the same, to the bit; NaN equals NaN."""
    if isinstance(ours, Tensor | np.ndarray):
        one, other = torch.as_tensor(ours), torch.as_tensor(theirs) if type(theirs) is type(ours) else None
        return other is not None and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(ours, dict):
        return isinstance(theirs, dict) and ours.keys() == theirs.keys() and all(
            equal(ours[key], theirs[key]) for key in ours
        )  # fmt: skip
    if isinstance(ours, list | tuple):
        return isinstance(theirs, list | tuple) and len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return type(ours) is type(theirs) and bool(ours == theirs or (ours != ours and theirs != theirs))


def _trained(engine: Engine) -> dict[str, Any]:
    return {name: engine.parts[name].state_dict() for name in ("model", "optimizer")}


def _fit(engine: Engine) -> None:
    """Fit where an earlier run may have written; one that keeps checkpoints has to be resumed there."""
    keeps = any(handler.checkpoints for handler in engine.listeners.callbacks)
    engine.fit(*toy_data(), epochs=2, resume="auto" if keeps else None)


def _states_of_a_run(subject: Subject) -> list[dict[str, Any]]:
    """Return the handler's states in mid-epoch, where there is most to keep, and after a run, out of files."""
    handler, every = subject.made()
    engine, states = toy_engine(*every), list[dict[str, Any]]()
    engine.subscribe(Settled, lambda event: states.append(_through_a_file(handler)), when=at(3))
    engine.fit(*toy_data(), epochs=2)
    return [*states, _through_a_file(handler)]


def _through_a_file(handler: Callback) -> dict[str, Any]:
    """Return the handler's state as it comes out of a file.

    Raises:
        CheckFailedError: if that is not what it was, or cannot be loaded safely.
    """
    advice = "Keep tensors, numbers, strings, and lists and dicts of them."
    state, file = handler.state_dict(), io.BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        loaded: dict[str, Any] = torch.load(file, weights_only=True)
    except Exception as error:
        first = str(error).partition("\n")[0]
        _fail(f"its state cannot be saved and loaded safely ({type(error).__name__}: {first})", advice)
    if not equal(loaded, state):
        _fail("its state comes out of a file as another", advice)
    return loaded


def _other(directory: Path, number: int = 0) -> Path:
    """Return another empty directory."""
    path = directory / f"other {number}"
    path.mkdir()
    return path


@contextmanager
def _in_directory(directory: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def _fail(fact: str, advice: str) -> NoReturn:
    raise CheckFailedError(f"{fact}. {advice}")
