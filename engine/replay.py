"""One step of an earlier run, made again and looked at.

The command ``camshaft replay`` runs the user's script once more, with the environment variable of `trial.py`. The
first run to which a checkpoint of the earlier one belongs goes on from there, whatever the script says, up to the step
that is asked for. That step is made under observation, and the process ends. What was seen goes into a file for the
command, which compares digests and prints.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import checkpoint_files, load_verified
from .debugging import Debugger, watch_errors
from .dispatch import Subscription
from .errors import CheckpointError, ConfigurationError, can_take
from .events import BatchReady, FitEnd, LossReady, RunFailed, Settled
from .observation import Observation
from .state import Found, fitting_state
from .trial import Trial, asked_trial, lead_files
from .when import at

if TYPE_CHECKING:
    from .engine import Engine

logger = logging.getLogger("camshaft")


def begin_replay(engine: Engine) -> Found | None:
    """Let the run that begins be the one that is made again up to a step, if this process is there for that.

    Return the state to go on from; None if the run begins as its script says.

    Raises:
        ConfigurationError: if the user's function cannot be found.
    """
    trial = asked_trial()
    if trial is None or trial.kind != "replay":
        return None
    lead_files(engine.listeners.callbacks, Path(tempfile.mkdtemp(dir=trial.directory)))
    return _Replay(engine, trial).begin()


class _AnotherRunError(Exception):
    """A run is not the one that is made again."""


class _Replay:
    """A run that is to make one step again.

    Args:
        engine: the engine; its run has not begun.
        trial: what was asked for.
    """

    def __init__(self, engine: Engine, trial: Trial) -> None:
        self._engine = engine
        self._wanted = trial.settings
        self._step: int = trial.settings["step"]
        self._report = trial.directory / "replay.json"
        self._hook = None if trial.settings["hook"] is None else _load_hook(trial.settings["hook"])
        self._debugger: Debugger | None = None
        self._error: BaseException | None = None
        self._has_begun = self._is_whole = self._is_done = False
        self._observation = Observation(engine, anomaly=trial.settings["anomaly"])

    def begin(self) -> Found | None:
        """Find the checkpoint to go on from, and listen for the step."""
        engine = self._engine
        try:
            found = self._find()
        except _AnotherRunError as error:
            self._tell(reason=str(error))
            return None
        if found is None:
            logger.info("The run is made again from its beginning.")
        self._tell(began_at=None if found is None else found[0]["counters"]["step"])
        subscriptions: list[Subscription[Any]] = [
            engine.subscribe(BatchReady, self._begin_step, when=at(self._step)),
            engine.subscribe(LossReady, self._observation.keep_loss, when=at(self._step)),
            engine.subscribe(Settled, self._end_step, when=at(self._step)),
            engine.subscribe(RunFailed, self._keep_error),
        ]

        def end(event: FitEnd) -> None:
            if event.engine.run.goes_back_to is not None:  # the same run, from an earlier state of it
                return
            for subscription in subscriptions:
                subscription.cancel()
            ended.cancel()
            self._end_run(event, goes_on=found is None)

        ended = engine.subscribe(FitEnd, end)
        return found

    # Where it begins -----------------------------------------------------------------------------------

    def _find(self) -> Found | None:
        """Return the newest checkpoint before the step; None if there is none.

        Raises:
            _AnotherRunError: if it is of another run than this one: of other parts, or with another beginning.
        """
        engine = self._engine
        try:
            found = fitting_state(engine, self._newest)
        except CheckpointError as error:
            raise _AnotherRunError(str(error)) from error
        if found is not None and (began := found[0]["run"]["first_step"]) != engine.step:
            raise _AnotherRunError(f"{found[1]} is of one that began after step {began}, not {engine.step}.")
        return found

    def _newest(self) -> Found | None:
        """Return the newest good checkpoint before the step; the others are left as they are."""
        paths = [path for directory in self._wanted["checkpoints"] for path in Path(directory).glob("run-*.pt")]
        for file in checkpoint_files(paths):
            if file.step < self._step:
                try:
                    return load_verified(file.path), file.path
                except CheckpointError as error:
                    logger.warning("%s The one before it is used.", error)
        return None

    # The step ------------------------------------------------------------------------------------------

    def _begin_step(self, event: BatchReady) -> None:
        """Look at everything from now on; called after the other handlers, with the batch that will be used."""
        engine = event.engine
        if self._has_begun or not engine.training:
            return
        self._has_begun = True
        if engine.run.skips_batch:
            self._leave(was_left_out=True)
        logger.info("Step %d is made again now.", self._step)
        engine.current.batch = event.batch
        self._observation.begin()
        if self._hook is not None:
            self._hook(engine)
        if self._wanted["debug"]:
            sys.stdout.flush()
            self._debugger = Debugger(self._keep)
            self._debugger.begin()
        elif engine.run.has_validation is None:
            watch_errors(self._keep)

    def _keep(self, error: BaseException) -> None:
        self._error = error

    def _keep_error(self, event: RunFailed) -> None:
        self._error = event.error

    # Its end -------------------------------------------------------------------------------------------

    def _end_step(self, event: Settled) -> None:
        """End the process: nothing else of the script is to run."""
        if not self._has_begun:
            return
        self._error, self._is_whole = None, True  # without an error that the user's code has handled
        self._leave()

    def _end_run(self, event: FitEnd, *, goes_on: bool) -> None:
        """Hear that the run is over, if not by `_end_step`: by an error, or because the loop was left."""
        if self._is_done:
            return
        if not self._has_begun:
            self._tell(reason=f"The run ended at step {event.engine.step}: {event.reason}.")
            if goes_on or not event.engine.run.is_over:
                return  # a later run of this script may be the one; an error is raised
            raise SystemExit(0)
        is_closed = self._error is None or event.engine.run.has_validation is None
        self._finish()
        if is_closed:  # a generator that is being closed cannot raise, and the script would go on
            self._exit()
        raise SystemExit(0)

    def _leave(self, *, was_left_out: bool = False) -> None:
        self._finish(was_left_out=was_left_out)
        raise SystemExit(0)

    def _exit(self) -> None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def _finish(self, *, was_left_out: bool = False) -> None:
        self._is_done = True
        if self._debugger is not None:
            self._debugger.end()
        else:
            sys.settrace(None)
        self._observation.end(is_whole=self._is_whole)
        logging.disable()  # the handlers hear the end of a run that has failed
        made = "left out" if was_left_out else "whole" if self._is_whole else "in part"
        self._tell(made=made, findings=[] if was_left_out else self._findings())

    def _findings(self) -> list[str]:
        """Return what was seen, a text for each thing."""
        debugger = self._debugger
        found = self._observation.findings(None if debugger is not None and debugger.was_left else self._error)
        if debugger is not None and debugger.was_left:
            found.append("The debugger was left within the step.")
        elif debugger is not None and not debugger.has_stopped:
            found.append(
                "The debugger did not stop, because no code of your own ran in the step. "
                "Write a function with breakpoint() in it, and --hook file.py:function."
            )
        return found

    def _tell(self, *, reason: str | None = None, **values: Any) -> None:
        """Write what the command is to know."""
        if reason is not None:
            logger.warning("This run is not the one that is made again: %s", reason)
        if self._engine.ranks.is_main:
            told = json.loads(self._report.read_text()) if self._report.exists() else {"reasons": []}
            told["reasons"] += [] if reason is None else [reason]
            self._report.write_text(json.dumps({**told, **values}))


def _load_hook(text: str) -> Callable[[Engine], object]:
    """Return the function of a file that "file.py:function" names.

    Raises:
        ConfigurationError: if there is no such function.
    """
    path, _, name = text.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"--hook names {path}, which is not a file of Python. Write --hook file.py:function.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function) or not can_take(function, 1):
        raise ConfigurationError(
            f"{path} has no function {name} that can be called with the engine. Write def {name}(engine): ..."
        )
    return function  # type: ignore[no-any-return]  # what it returns is not looked at
