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
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor, nn

from .batch import outline, tree_map
from .checkpoint import checkpoint_files, load_verified
from .debugging import Debugger, is_own_code, watch_errors
from .dispatch import Subscription
from .errors import CheckpointError, ConfigurationError, can_take
from .events import BatchReady, FitEnd, LossReady, RunFailed, Settled
from .finite import is_finite, non_finite_outputs, num_non_finite
from .sharded import local_part
from .state import Found, fitting_state
from .trial import Trial, asked_trial, lead_files
from .weights import unwrap
from .when import at

if TYPE_CHECKING:
    from .engine import Engine

logger = logging.getLogger("camshaft")

_MOST_SHOWN = 6


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
        self._observers = ExitStack()
        self._debugger: Debugger | None = None
        self._error: BaseException | None = None
        self._anomaly = ""  # what torch says of it
        self._has_begun = self._is_whole = self._is_done = False
        self._losses: list[Tensor] = []
        self._recorded: dict[str, float] = {}
        self._non_finite: list[str] = []  # in the order in which it was computed
        self._outputs: list[str] = []
        self._norms: dict[str, float] = {}  # of gradients

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
            engine.subscribe(LossReady, self._keep_loss, when=at(self._step)),
            engine.subscribe(Settled, self._end_step, when=at(self._step)),
            engine.subscribe(RunFailed, self._keep_error),
        ]

        def end(event: FitEnd) -> None:
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
        engine.stages["train"].since_mark()
        self._look_at_what_is_there()
        self._observe()
        if self._hook is not None:
            self._hook(engine)
        if self._wanted["debug"]:
            sys.stdout.flush()
            self._debugger = Debugger(self._keep)
            self._debugger.begin()
        elif engine.run.has_validation is None:
            watch_errors(self._keep)

    def _look_at_what_is_there(self) -> None:
        tensors: list[Tensor] = []
        tree_map(tensors.append, self._engine.batch)
        for number, tensor in enumerate(tensors):
            if wrong := num_non_finite(tensor):
                self._non_finite.append(f"tensor {number} of the batch ({wrong} of {tensor.numel()} numbers)")
        self._look_at_parameters("before")

    def _look_at_parameters(self, when: str) -> None:
        for name, parameter in self._engine.parts.named_parameters():
            if f"parameter {name}, before the step" not in self._non_finite and not is_finite(parameter):
                self._non_finite.append(f"parameter {name}, {when} the step")

    def _observe(self) -> None:
        """Hear of outputs and gradients; what is switched on stays so, as the process ends after the step."""
        parts = self._engine.parts
        modules = {name: unwrap(module) for name, module in parts.modules().items()}
        if any(_is_compiled(module) for module in parts.modules().values()):
            logger.info("What modules return is not looked at, because that would compile the model in another way.")
        else:
            bare = {"" if name == "model" else name: module for name, module in modules.items()}
            self._outputs = self._observers.enter_context(non_finite_outputs(bare))
        scaler = self._engine.update.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        for name, parameter in parts.named_parameters():
            if parameter.requires_grad and parameter.is_leaf:
                handle = parameter.register_post_accumulate_grad_hook(self._look_at_gradient(name, scale))
                self._observers.callback(handle.remove)
        if self._wanted["anomaly"]:
            warnings.filterwarnings("always", message="Error detected in")
            self._show_warning, warnings.showwarning = warnings.showwarning, self._keep_warning
            torch.autograd.set_detect_anomaly(True)

    def _look_at_gradient(self, name: str, scale: float) -> Callable[[Tensor], None]:
        def look(parameter: Tensor) -> None:
            gradient = parameter.grad
            if gradient is None:
                return
            values = local_part(gradient.detach())
            values = values.coalesce().values() if values.layout is torch.sparse_coo else values
            self._norms[name] = float(torch.linalg.vector_norm(values.float())) / scale
            if not is_finite(values) and (text := f"the gradient of {name}") not in self._non_finite:
                self._take_over_outputs()
                self._non_finite.append(text)

        return look

    def _take_over_outputs(self) -> None:
        """Put what modules have returned so far into the order of all that was computed."""
        self._non_finite += [f"the output of {one}" for one in self._outputs]
        self._outputs.clear()

    def _keep_loss(self, event: LossReady) -> None:
        self._losses.append(event.loss.detach())
        self._take_over_outputs()
        if not is_finite(event.loss):
            self._non_finite.append("the loss")

    def _keep(self, error: BaseException) -> None:
        self._error = error

    def _keep_error(self, event: RunFailed) -> None:
        self._error = event.error

    def _keep_warning(
        self, message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: TextIO | None = None, line: str | None = None,
    ) -> None:  # fmt: skip
        if str(message).startswith("Error detected in"):
            self._anomaly = str(message).partition("(Triggered internally")[0].rstrip()
        else:
            self._show_warning(message, category, filename, lineno, file, line)

    # Its end -------------------------------------------------------------------------------------------

    def _end_step(self, event: Settled) -> None:
        """End the process: nothing else of the script is to run."""
        self._error, self._is_whole = None, True  # without an error that the user's code has handled
        self._recorded = event.engine.stages["train"].since_mark()
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
        self._observers.close()
        self._take_over_outputs()
        self._look_at_parameters("after")
        logging.disable()  # the handlers hear the end of a run that has failed
        made = "left out" if was_left_out else "whole" if self._is_whole else "in part"
        self._tell(made=made, findings=[] if was_left_out else self._findings())

    def _findings(self) -> list[str]:
        """Return what was seen, a text for each thing."""
        engine = self._engine
        self._take_over_outputs()
        found = [
            f"It is batch {engine.epoch_step} of epoch {engine.epoch}: {outline(engine.run.training_stage.batch)}."
        ]
        if self._losses:
            losses = ", ".join(f"{float(loss):.6g}" for loss in self._losses)
            found.append(f"Loss: {losses}")
        if self._norms:
            largest = sorted(self._norms.items(), key=lambda item: item[1] if item[1] == item[1] else float("inf"))
            shown = [f"  {norm:<12.6g} {name}" for name, norm in largest[: -_MOST_SHOWN - 1 : -1]]
            left = len(largest) - len(shown)
            more = [f"  and {left} more"] if left else []
            found.append("\n".join(["Norms of gradients, largest first:", *shown, *more]))
        if self._non_finite:
            shown = [f"  {one}" for one in self._non_finite[: 2 * _MOST_SHOWN]]
            left = len(self._non_finite) - len(shown)
            more = [f"  and {left} more"] if left else []
            found.append("\n".join(["NaN or infinite, in the order of the computation:", *shown, *more]))
        else:
            found.append("Batch, parameters, outputs of modules, loss and gradients are finite.")
        if self._debugger is not None and not self._debugger.has_stopped:
            found.append(
                "The debugger did not stop, because no code of your own ran in the step. "
                "Write a function with breakpoint() in it, and --hook file.py:function."
            )
        if self._debugger is not None and self._debugger.was_left:
            found.append("The debugger was left within the step.")
        elif self._anomaly:
            found.append(
                f"Anomaly mode of torch has ended the step: {self._error}\n{_without_others(self._anomaly)}\n"
                "With --no-anomaly, the step is made whole."
            )
        elif self._error is not None:
            found.append("The step raised:\n" + "".join(traceback.format_exception(self._error)).rstrip())
        return found

    def _tell(self, *, reason: str | None = None, **values: Any) -> None:
        """Write what the command is to know."""
        if reason is not None:
            logger.warning("This run is not the one that is made again: %s", reason)
        if self._engine.ranks.is_main:
            told = json.loads(self._report.read_text()) if self._report.exists() else {"reasons": []}
            told["reasons"] += [] if reason is None else [reason]
            self._report.write_text(json.dumps({**told, **values}))


def _listed(title: str, lines: list[str]) -> str:
    shown = [f"  {line}" for line in lines[:_MOST_SHOWN]]
    left = len(lines) - len(shown)
    return "\n".join([title, *shown, *([f"  and {left} more"] if left else [])])


def _without_others(traceback: str) -> str:
    """Return a traceback with the frames of the user's own code and the last one."""
    head, *frames = re.split(r"(?m)^(?=  File )", traceback)
    own = [one for one in frames[:-1] if is_own_code(one.split('"')[1])]
    return "".join([head, *own, *frames[-1:]]).rstrip()


def _is_compiled(module: nn.Module) -> bool:
    return any(hasattr(one, "_orig_mod") or one._compiled_call_impl is not None for one in module.modules())


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
