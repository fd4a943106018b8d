"""A run that is interrupted and resumed, in a fresh process where that can be, compared with one that goes on."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from .checkpoint import CheckpointDirectory
from .errors import EngineStateError
from .events import FitStart, Settled, StepEnd
from .rehearsed import Rehearsal
from .route import NUM_STEPS
from .state import run_state
from .trial import VARIABLE, Trial, lead_files, script_command

if TYPE_CHECKING:
    from .engine import Engine

KIND = "rehearsal"  # of a trial
ENOUGH = signal.SIGABRT  # interrupts a run of a rehearsal: a signal by which nobody else asks a run to end
_CUT_AT, _UNTIL = 3, 5  # the steps at which a run is interrupted, and up to which it is then resumed
_INTERRUPTED = "a run that is interrupted"
_BEGAN = time.monotonic()  # about when the script began

Life = Callable[..., AbstractContextManager[Path]]
Digests = dict[str, str]


def cut_and_resumed(engine: Engine, fit: Callable[..., object], life: Life, rehearsal: Rehearsal, number: int) -> None:
    """Compare a run that is interrupted and resumed with one that goes on.

    Args:
        engine: whose run.
        fit: makes it.
        life: puts everything back after a run.
        rehearsal: what is added to.
        number: which call of `rehearse` this is; a fresh process has to find the same.
    """
    with life("a run that goes on"):
        went_on = _Watch(engine)
        fit()
    with life(_INTERRUPTED) as files:
        cut, own = _Watch(engine, is_cut=True), CheckpointDirectory(files / "state")
        own.path.mkdir()
        engine.subscribe(Settled, lambda event: _save(event.engine, own))
        fit()
        kept = [one.checkpoints for one in engine.listeners.callbacks if one.checkpoints is not None]
        checkpoint = next(file.path for directory in (*kept, own) for file in directory.files())
    trial = Trial(KIND, files, {"number": number, "checkpoint": str(checkpoint)})
    resumed, where = _resumed(engine, fit, life, trial)
    if resumed is None or went_on.at_end is None:
        rehearsal.tried["resumed"] = f"{where}; the run is too short to be compared"
        return
    varies = {name for name, digest in cut.at_cut.items() if went_on.at_cut.get(name) != digest}
    differs = {name for name, digest in went_on.at_end.items() if resumed.get(name) != digest} - varies
    own_varies = sorted(name for name in varies if not name.startswith("handler "))
    if own_varies:
        differs -= set(went_on.at_end)
        rehearsal.warnings.append(
            f"Two runs from the same state differ in: {', '.join(own_varies)}. So it cannot be seen whether a resumed "
            "run would be exact. Look at Deterministic(), and at what draws random numbers."
        )
    if differs:
        rehearsal.warnings.append(
            f"A run that is resumed differs from one that goes on, in: {', '.join(sorted(differs))}."
        )
    exact = "not comparable" if own_varies else "with differences" if differs else "bit for bit the same as without"
    rehearsal.tried["resumed"] = f"{where}, {exact}"


def resume_here(engine: Engine, fit: Callable[..., object], trial: Trial) -> NoReturn:
    """In a fresh process: resume the run, write down what it comes to, and leave.

    Raises:
        SystemExit: always.
    """
    lead_files(engine.listeners.callbacks, trial.directory)
    engine.subscribe(FitStart, lambda event: event.engine.run.limit_validation(NUM_STEPS))
    watch = _Watch(engine)
    fit(resume=trial.settings["checkpoint"])
    answer = {"pid": os.getpid(), "digests": watch.at_end}
    (trial.directory / "answer.json").write_text(json.dumps(answer))
    raise SystemExit(0)


class _Watch:
    """Looks at a run after its first few steps, and then ends it.

    Args:
        engine: whose run; a few steps of each epoch are made.
        is_cut: end it earlier, within an epoch.

    Attributes:
        at_cut: digests of the pieces of its state at the step at which it may be cut.
        at_end: those at the last step; None if it did not get there.
    """

    def __init__(self, engine: Engine, *, is_cut: bool = False) -> None:
        self._engine, self._is_cut = engine, is_cut
        self.at_cut: Digests = {}
        self.at_end: Digests | None = None
        engine.subscribe(StepEnd, self._leave)
        engine.subscribe(FitStart, lambda event: engine.subscribe(Settled, self._look))

    def _steps(self) -> tuple[int, int, int]:
        """Return how many steps are done, and after how many the run is cut and ends; an unknown number is enough."""
        planned = self._engine.run.num_planned("step") or _UNTIL
        return self._engine.step - self._engine.run.first_step, max(1, min(_CUT_AT, planned - 1)), min(_UNTIL, planned)

    def _leave(self, event: StepEnd) -> None:
        engine, (done, cut, until) = self._engine, self._steps()
        if engine.epoch_step >= NUM_STEPS and engine.epoch < engine.run.last_epoch:
            engine.run.end_epoch()
        if done == (cut if self._is_cut else until):
            engine.run.interrupt(ENOUGH)

    def _look(self, event: Settled) -> None:
        done, cut, until = self._steps()
        if done == cut and not self.at_cut:
            self.at_cut = digests(self._engine)
        if done == until and self.at_end is None:
            self.at_end = digests(self._engine)


def _save(engine: Engine, directory: CheckpointDirectory) -> None:
    """Save the state of a run that is over, for one without a handler that does."""
    if engine.run.is_over:
        directory.save(run_state(engine), engine.step)


def _resumed(engine: Engine, fit: Callable[..., object], life: Life, trial: Trial) -> tuple[Digests | None, str]:
    """Resume a run; return what it comes to, and in words, where that was."""
    command = script_command()
    why = command if isinstance(command, str) else _in_fresh_process(command, trial)
    answer = trial.directory / "answer.json"
    if answer.exists():
        found = json.loads(answer.read_text())
        return found["digests"], f"in a fresh process ({found['pid']})"
    with life("a run that is resumed", within=_INTERRUPTED):
        watch = _Watch(engine)
        fit(resume=trial.settings["checkpoint"])
    return watch.at_end, f"in this process, not in a fresh one: {why}"


def _in_fresh_process(command: list[str], trial: Trial) -> str:
    """Run the script again, which resumes there and leaves an answer; return why it did not, if so.

    Raises:
        EngineStateError: if it fails, with the end of what it has printed.
    """
    print("Rehearsal: a run that is resumed in a fresh process ...", flush=True)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # both processes are on the same device
    limit = 60 + 3 * (time.monotonic() - _BEGAN)
    environment = {**os.environ, VARIABLE: trial.as_variable()}
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", timeout=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"the script did not get to engine.rehearse within {limit:.0f} s"
    if done.returncode:
        tail = "\n".join(done.stdout.strip().splitlines()[-15:])
        raise EngineStateError(
            f"The run could not be resumed in a fresh process, which ended with code {done.returncode}:\n{tail}\n"
            "Look at what the script needs when it is started again."
        )
    return "the script, started again, did not get to this engine.rehearse"


def digests(engine: Engine) -> Digests:
    """Return a digest of each piece of the engine's state, by what it is."""
    state = run_state(engine)
    pieces = {"counters": "counters", "run": "position", "update": "updates", "ranks": "what each rank has"}
    named = {text: state[name] for name, text in (*pieces.items(), ("history", "history"))}
    named |= {f"part {name}": part for name, part in state["parts"].items()}
    named |= {f"handler {name}": own for name, own in state["callbacks"].items()}
    return {name: _digest(value) for name, value in named.items()}


def _digest(value: Any) -> str:
    hashing = hashlib.sha256()

    def take(one: Any) -> None:
        if isinstance(one, Tensor):
            whole = one.detach().to_dense() if one.layout is not torch.strided else one.detach()
            hashing.update(f"{one.dtype} {list(one.shape)}".encode())
            hashing.update(whole.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(one, dict):
            for key, item in one.items():
                take(key)
                take(item)
        elif isinstance(one, list | tuple):
            hashing.update(f"{len(one)} items".encode())
            for item in one:
                take(item)
        else:
            hashing.update(repr(one).encode())

    take(value)
    return hashing.hexdigest()
