"""The life of a run: how it begins, goes from epoch to epoch, and ends, however that comes about."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from .announcer import Announcer
from .batch import num_samples
from .checkpoint import CheckpointDirectory, ensure_writable
from .errors import ConfigurationError, EngineStateError, whole_number
from .events import EpochEnd, EpochStart, FitEnd, FitStart, RunFailed, Settled, StepEnd
from .history import History
from .order import Pass
from .plan import Plan
from .record import Record, prefixed, scalars
from .rng import own_rng, seed_everything
from .signals import handled_signals
from .stages import Stages
from .state import find, load_run_state
from .update import Update
from .when import NEVER

if TYPE_CHECKING:
    from .engine import Engine

logger = logging.getLogger("camshaft")


class Run(Announcer):
    """The part of an `Engine` that knows where a run stands, and when it is over; the loop itself is the engine's."""

    def __init__(self, seed: int | None, parts: dict[str, Any]) -> None:
        if seed is not None:
            whole_number("seed", seed, least=0)
        super().__init__()
        self.seed = seed
        self.parts = parts
        self.history = History()
        self.stages = Stages()
        self.directory: Path | None = None
        self.epoch = self.step = self.validation_step = 0
        self.num_fits = self.num_validations = self.num_updates = self.num_skipped_updates = 0
        self.stage = ""
        self.batch: Any = None
        self.output: Any = None
        self.plan: Plan | None = None
        self.validates: bool | None = None  # None: unknown, the script style decides as it goes
        self.epoch_length: int | None = None
        self.validation_length: int | None = None
        self.last_epoch = self.last_step = math.inf
        self._end_of_epoch = NEVER
        self.stop_reason: str | None = None
        self.first_epoch = self.first_step = self.step_before_epoch = self.validated_step = 0
        self.epoch_is_open = False
        self.interrupted: signal.Signals | None = None
        self.resumes = False  # whether this run was asked to resume
        self.checkpoints: CheckpointDirectory | None = None
        self._ended_step = 0
        self._passed = False  # whether this epoch's training data are through
        self._pass: Pass | None = None
        self._resumed_data: dict[str, Any] | None = None
        self._record: Record | None = None
        self.newest: dict[str, Any] = {}
        self._modes: dict[nn.Module, bool] = {}
        self._step_end = self.dispatch.channel(StepEnd)
        self.update = Update(_engine(self))

    def stop(self, reason: str) -> None:
        """End the run after this step (or epoch, or validation); ``history.reason`` will say why.

        Before ``min_epochs`` are done it does not count. The other handlers of the present event still run.
        """
        plan = self._require_run("stop")
        if self.epoch - self.first_epoch - (not self._passed) < plan.min_epochs:
            logger.info("Going on, for min_epochs=%d, though asked to stop: %s", plan.min_epochs, reason)
            return
        self.stop_reason = self.stop_reason or reason
        self.last_step = self._end_of_epoch = self.step

    def interrupt(self, signal: signal.Signals) -> None:
        """End the run behind this step without ending the epoch, so that a checkpoint can take it up again."""
        self.interrupted = signal
        self._end_of_epoch = 0

    def _run(self, plan: Plan, resume: str | Path | None = None) -> Generator[int, None, None]:
        """Yield each epoch; begin the run before the first and end it after the last, however it ends."""
        if self.plan is not None:
            raise EngineStateError("The engine is already running. Let this run end first, or make a second Engine.")
        self._begin_run(plan)
        self.resumes = resume is not None
        try:
            with self.scope("fit"), handled_signals(self.interrupt):
                try:
                    self.emit(FitStart(_engine(self)))
                    self._resume(plan, resume)
                    while not self.is_over():
                        if not self.epoch_is_open:
                            self._begin_epoch()
                        yield self.epoch
                        self._end_epoch()
                    if self.interrupted:
                        self.emit(Settled(_engine(self)))  # once more: the signal may have come behind the last one
                except BaseException as error:
                    self._announce_end(error)
                    raise
                self._announce_end()
        finally:
            self._leave_run()

    def _begin_run(self, plan: Plan) -> None:
        if self.num_fits:
            logger.info("Going on from epoch %d, step %d.", self.epoch, self.step)
        elif self.seed is not None:
            seed_everything(self.seed)
        self.num_fits += 1
        self.first_epoch, self.first_step = self.epoch, self.step
        self.epoch_is_open, self._passed = False, True
        self.stop_reason = self.interrupted = None
        self._set_goal(plan)
        self.dispatch.rewind()
        self.update.reset()
        self._begin_modes()
        self.plan = plan

    def _begin_modes(self) -> None:
        model = self.modules().get("model")
        self._modes = {} if model is None else {module: module.training for module in model.modules()}
        if model is not None and not model.training:
            logger.info("The model was in eval mode: set to training for the run.")
            model.train()

    def _set_goal(self, plan: Plan) -> None:
        self.last_epoch = math.inf if plan.epochs is None else self.first_epoch + plan.epochs
        self.last_step = math.inf if plan.max_steps is None else self.first_step + plan.max_steps
        if self.stop_reason is not None:
            self.last_step = self.step

    def is_over(self) -> bool:
        """Return whether nothing is left to do: the goal is reached, or a signal has come."""
        return bool(self.interrupted) or not (self.epoch_is_open or self._goes_on())

    def _goes_on(self) -> bool:
        return self.epoch < self.last_epoch and self.step < self.last_step

    def _resume(self, plan: Plan, resume: str | Path | None) -> None:
        if resume is None:
            return
        if (found := find(_engine(self), resume)) is None:
            logger.info("No checkpoint yet: a fresh start.")
            return
        state, source = found
        load_run_state(_engine(self), state, source)
        self._resumed_data = state["data"]
        self._ended_step = self.step
        self._passed = not self.epoch_is_open
        if plan.reaches_further(**state["plan"]):
            self.stop_reason = None
        self._set_goal(plan)
        self.dispatch.rewind()
        if not self.epoch_is_open and not self._goes_on():
            logger.info(
                "The run is finished (%s). Pass more epochs or steps to go on.", self.stop_reason or "its goal"
            )

    def _begin_epoch(self) -> None:
        self.epoch += 1
        self.epoch_is_open = True
        self.step_before_epoch = self.step
        self._passed = False
        self.newest = {}
        self.stages["train"].reset()
        self.emit(EpochStart(_engine(self)))

    def _epoch_is_over(self) -> bool:
        length = self._require_run("train").epoch_length
        return bool(self.interrupted) or self.step >= self.last_step or self.epoch_step == length

    def _flush(self) -> None:
        """Make the update of a window that the epoch's end cut short; that is still training."""
        self.stage, self._record = "train", self.stages["train"]
        self.update.flush()
        self.stage, self._record = "", None

    def _end_step(self) -> None:
        if self.step > self._ended_step:
            self._ended_step = self.step
            if self.step >= self._step_end.due:
                self._step_end.emit(StepEnd(_engine(self), self.batch, self.output), self.step)

    def _end_epoch(self) -> None:
        self._end_step()  # open still if the user's loop was left by a break
        if self.interrupted:
            return
        self._flush()
        self._check_updates()
        with own_rng():
            metrics = prefixed("train", self.stages["train"].compute()) | self.newest
            self.history.add_epoch(self.epoch, self.step, scalars(metrics))
            self.emit(EpochEnd(_engine(self), metrics))
        self.epoch_is_open = False
        self.emit(Settled(_engine(self)))

    def _check_updates(self) -> None:
        """Refuse handlers that hear nothing because the step goes past ``engine.update``."""
        if self.num_updates or self.num_skipped_updates:
            return
        if deaf := [repr(callback) for callback in self.callbacks if callback.needs_update]:
            raise ConfigurationError(
                f"{', '.join(deaf)} had no effect in this epoch, for the step never called engine.update. "
                "Write engine.update(loss) in place of loss.backward(), optimizer.step() and optimizer.zero_grad()."
            )

    def _announce_end(self, error: BaseException | None = None) -> None:
        plan = self._require_run("fit")
        reason = self.stop_reason or plan.goal(by_steps=self.epoch < self.last_epoch)
        if self.interrupted:
            reason = f"interrupted by {self.interrupted.name}"
        if isinstance(error, GeneratorExit):
            reason = f"the loop was left in epoch {self.epoch}"
        elif error is not None:
            reason = f"failed with {type(error).__name__}: {error}"
            error.add_note(f"At step {self.step}, batch {self.epoch_step} of epoch {self.epoch}.")
            if "DataLoader worker" in str(error):  # torch interrupts whatever runs when a worker of its has died
                error.add_note(
                    "A loader's worker died. Look for a lack of memory or shared memory; try num_workers=0."
                )
        self.history.reason = reason
        self.history.interrupted = self.interrupted
        if error is not None and not isinstance(error, GeneratorExit):
            self._emit_last(RunFailed(_engine(self), error), error)
        self._emit_last(FitEnd(_engine(self), reason), error)

    def _emit_last(self, event: RunFailed | FitEnd, error: BaseException | None) -> None:
        """Let every handler hear the end; an error of theirs never hides the one that ended the run."""
        try:
            self.dispatch.channel(type(event)).emit_to_all(event, self.num_fits)
        except Exception as second:
            if error is None:
                raise
            error.add_note(f"While the run was ending, too: {second!r}")

    def _leave_run(self) -> None:
        self.plan = self._pass = self._resumed_data = None
        self.stage, self._record, self.batch, self.output = "", None, None, None
        for module, mode in self._modes.items():
            module.training = mode

    def planned(self, unit: Literal["update", "step", "epoch"]) -> int | None:
        """Return how many of these the run is to make if nothing stops it; None where that is unknown.

        Of updates, one is counted for each step, or for each window of `Accumulate`.
        """
        plan, length = self._require_run("planned"), self.epoch_length
        if unit == "epoch":
            return plan.num_epochs(length)
        steps, window = plan.num_steps(length), self.update.window_batches
        if steps is None or unit == "step":
            return steps
        if self.update.window_samples is not None:
            return None
        whole, rest = divmod(steps, length or steps or 1)  # a window ends with its epoch
        return whole * -(-(length or steps) // window) + -(-rest // window)

    @property
    def epoch_step(self) -> int:
        """The number of the present step within its epoch."""
        return self.step - self.step_before_epoch

    @property
    def in_mid_epoch(self) -> bool:
        """Whether the epoch's training data are not through yet."""
        return not self._passed

    @property
    def training(self) -> bool:
        """Whether the present stage is training."""
        return self.stage == "train"

    def directory_for(self, owner: str, wanted: str | Path | None = None, *, within: str = "") -> Path:
        """Return the directory that ``owner`` writes in: the one it wants, or one ``within`` the run directory.

        It is made if need be, and tried.

        Raises:
            ConfigurationError: if there is neither, or it cannot be written.
        """
        if wanted is None and self.directory is None:
            raise ConfigurationError(f"{owner} has nowhere to write. Pass it a directory, or add RunDirectory().")
        directory = Path(wanted) if wanted is not None else Path(str(self.directory), within)
        ensure_writable(directory, owner)
        return directory

    def num_samples(self) -> int:
        """Return the number of samples in the present batch."""
        return num_samples(self.batch)

    def peek(self) -> dict[str, float]:
        """Return the present stage's newest averages that have reached the host, without waiting for more."""
        return {} if self._record is None else prefixed(self.stage, self._record.peek())

    def modules(self) -> dict[str, nn.Module]:
        """Return those parts that are modules, by name."""
        return {name: part for name, part in self.parts.items() if isinstance(part, nn.Module)}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return those parts that are optimizers, by name."""
        return {name: part for name, part in self.parts.items() if isinstance(part, torch.optim.Optimizer)}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every parameter of every module, under its name within its part."""
        for module in self.modules().values():
            yield from module.named_parameters()

    @property
    def device(self) -> torch.device:
        """The device of the first parameter; the CPU where there is none."""
        return next((parameter.device for _, parameter in self.named_parameters()), torch.device("cpu"))

    def _require_run(self, what: str) -> Plan:
        if self.plan is None:
            raise EngineStateError(f"engine.{what} stands outside a run. Write: for epoch in engine.epochs(n): ...")
        return self.plan


def _engine(run: Run) -> Engine:
    """Return the run as what it is: only an `Engine` derives from `Run`."""
    return cast("Engine", run)
