"""One run: how far it goes, where it is, and what was decided for it.

A little longer than other files, because everything that decides about a run is in this one place.
"""

from __future__ import annotations

import enum
import logging
import math
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from .agreement import Agreement
from .errors import CamshaftError, EngineStateError
from .feed import Feed
from .plan import Plan
from .ranks import Ranks
from .record import Record
from .stages import CurrentStage
from .values import scalars
from .when import NEVER

logger = logging.getLogger("camshaft")


class Phase(enum.IntEnum):
    """Where a run is within an epoch; an epoch goes through these in order."""

    BETWEEN = 0  # no epoch is open
    READING = 1  # batches are being read; validations in mid-epoch happen here
    FLUSHING = 2  # the data are exhausted, and the window that they left open is being updated
    VALIDATING = 3  # the validation at the end of the epoch
    ENDING = 4  # only the epoch's end is still to be announced


@dataclass(frozen=True, slots=True)
class Decision:
    """What a handler or a signal decides for a run.

    Its end, for a reason; its interruption; a checkpoint; the end of the present epoch; or a validation.
    """

    stop: str | None = None
    interrupt: signal.Signals | None = None
    save: bool = False
    end_epoch: bool = False
    validate: bool = False


class Run:
    """A run from its start to its end; each `fit` makes a new one.

    Handlers ask a run for something (`stop`, `interrupt`, `save`, `skip_update`); it happens when the step settles
    (`settle`), or for an update, just before it is made (`settle_update`).

    Args:
        plan: what was asked for.
        epoch, step: the engine's counters when the run begins.
        feed: its training data.
        ranks: the processes that make the run together.
        validation_sets: the names of the validation data; none if there are no such data, and None where that is
            unknown (script style).
        is_resuming: whether the run was asked to resume an earlier one.
        goes_on: whether that earlier one is the run before it in the same call, which has gone back.

    Attributes:
        first_epoch, first_step: the engine's counters when the run, or the run that it resumes, began.
        last_epoch, last_step: where it will end; infinite where there is no limit.
        phase: where it is within an epoch.
        training_stage: the training stage of the present epoch.
        epoch_length: training steps of an epoch; None where that is unknown.
        step_before_epoch: the training steps done before the present epoch.
        ended_step: the last step whose `StepEnd` was announced.
        stop_reason: why it was asked to stop; None if it was not.
        interrupted: the signal that interrupted it, or None.
        is_over: whether nothing is left to do, as of the last settling.
        save_is_due: whether somebody asked for a checkpoint, as of the last settling.
        next_validation: the next step with a validation in mid-epoch.
        goes_back_to: an earlier state of the run to go on from, and where it was kept; None if it does not go back.
        validation_limit: how many batches of each validation set are read at most; None for all.
        validation_was_cut: whether a validation was interrupted, and must be made again.
        last_validation: the values of the newest validation of the present epoch.
        due: the loop need not settle anything before this step.
        ends_epoch: whether no further batch of the present epoch is to be read.
        may_skip_batch: whether a training batch was read and is not used yet.
        skips_batch: whether that batch is to be left out.
        num_skipped_batches: how many were left out, also before a resume.
    """

    __slots__ = (
        "_agreement", "_change", "_ends_epoch_early", "_is_updating", "_num_passes", "_num_passes_to_skip",
        "_num_validated", "_num_validations_to_skip", "_save_was_asked", "_skips_update", "_validates_in_step",
        "_validation_was_asked", "due", "ended_step", "ends_epoch", "epoch_length", "feed", "first_epoch",
        "first_step", "goes_back_to", "goes_on", "interrupted", "is_over", "is_resuming", "last_epoch", "last_step",
        "last_validation", "may_skip_batch", "next_validation", "num_skipped_batches", "phase", "plan", "ranks",
        "save_is_due", "skips_batch", "step_before_epoch", "stop_reason", "training_stage", "validation_limit",
        "validation_sets", "validation_was_cut",
    )  # fmt: skip

    def __init__(
        self,
        plan: Plan,
        feed: Feed,
        ranks: Ranks,
        *,
        epoch: int,
        step: int,
        validation_sets: tuple[str, ...] | None,
        is_resuming: bool,
        goes_on: bool = False,
    ) -> None:
        self.plan = plan
        self.feed = feed
        self.ranks = ranks
        self._agreement = Agreement[Decision](ranks) if ranks.several else None
        self.validation_sets = validation_sets
        self.validation_limit = plan.limit
        self._change: Callable[[str, float], float] | None = None
        self.is_resuming = is_resuming
        self.goes_on = goes_on
        self.first_epoch, self.first_step = epoch, step
        self.last_epoch, self.last_step = self._goal()
        self.phase = Phase.BETWEEN
        self.training_stage = CurrentStage()
        self.epoch_length = plan.length_of_epoch(feed.length)
        self.step_before_epoch = self.ended_step = step
        self.stop_reason: str | None = None
        self.interrupted: signal.Signals | None = None
        self.is_over = False
        self.save_is_due = False
        self.goes_back_to: tuple[dict[str, Any], Path] | None = None
        self.next_validation = plan.next_validation(step)
        self.validation_was_cut = False
        self.last_validation: dict[str, Any] = {}
        self.due = 0
        self.ends_epoch = False
        self.may_skip_batch = self.skips_batch = False
        self.num_skipped_batches = 0
        self._ends_epoch_early = False  # whether somebody asked for the end of the present epoch
        self._save_was_asked = False
        self._is_updating = False  # whether an update is about to be made
        self._skips_update = False
        self._num_passes = 0  # loops over training data that this epoch has ended
        self._num_passes_to_skip = 0  # of those, the ones that ended before the run was resumed
        self._num_validated = 0  # validations of this epoch that were not within a step
        self._num_validations_to_skip = 0  # of those, the ones that were done before the run was resumed
        self._validates_in_step = False
        self._validation_was_asked = False

    # What is decided for the run ---------------------------------------------------------------------------

    def stop(self, reason: str, epoch: int) -> bool:
        """Ask for the end of the run after the present step; return False if it continues until ``min_epochs``."""
        if not self.may_stop(epoch):
            logger.info("Training continues until min_epochs=%d, although a stop was asked for: %s",
                        self.plan.min_epochs, reason)  # fmt: skip
            return False
        self._decide(Decision(stop=reason))
        return True

    def may_stop(self, epoch: int) -> bool:
        """Return whether a stop counts now: ``min_epochs`` are done."""
        num_epochs = epoch - self.first_epoch - (not self.data_exhausted)
        return num_epochs >= self.plan.min_epochs

    def interrupt(self, signal: signal.Signals) -> None:
        """Stop after the current step and leave the epoch open, so that a checkpoint can resume it."""
        self._decide(Decision(interrupt=signal))

    def end_epoch(self) -> None:
        """End the epoch after the present step: its validation and its `EpochEnd` are next.

        Does nothing where the epoch's training is over.
        """
        if not self.data_exhausted:
            self._decide(Decision(end_epoch=True))

    def save(self) -> None:
        """Ask for a checkpoint as soon as the present step has settled."""
        self._decide(Decision(save=True))

    def validate(self) -> None:
        """Ask for a validation after the next step, unless one ends the present epoch before.

        Raises:
            EngineStateError: if the engine has no validation data of its own.
        """
        if not self.has_validation:
            raise EngineStateError(
                "run.validate was called in a run without validation data that the engine knows. "
                "Pass them: fit(train, val, ...); in a loop of your own, validate there."
            )
        self._decide(Decision(validate=True))

    def go_back(self, state: dict[str, Any], source: Path) -> None:
        """Ask for the end of this run when the present step has settled, and for another from an earlier state of it.

        The handlers hear `FitEnd` and then `FitStart`, as of a run that was interrupted and is resumed; but the call
        of ``fit`` does not return, and nothing needs to be on the disk.

        Args:
            state: what `run_state` returned.
            source: where it was kept, for messages.

        Raises:
            EngineStateError: on several ranks.
        """
        if self._agreement is not None:
            raise EngineStateError(
                "run.go_back was called on several ranks, which it does not work for yet. Train on one process."
            )
        self.goes_back_to = state, source
        self.due, self.ends_epoch = 0, True

    def limit_validation(self, num_batches: int) -> None:
        """Read only so many batches of each validation set from now on: for a run that is only tried."""
        self.validation_limit = num_batches

    def change_values(self, change: Callable[[str, float], float]) -> None:
        """Let handlers and the history get ``change(name, value)`` for each value: for a run that is only tried."""
        self._change = change

    def changed(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return what a validation or an epoch came to, as handlers and the history get it."""
        if self._change is None:
            return values
        numbers = {name: value for name, value in scalars(values).items() if math.isfinite(value)}
        return values | {name: self._change(name, value) for name, value in numbers.items()}

    def jump(self, step: int, *, epoch: int = 0, skips: int = 0) -> None:
        """Go on as if ``step`` steps had been done, also after a stop: for a run that is only tried.

        Called between epochs, or before the first batch of one. The engine's counters are set by the caller.

        Args:
            step: the engine's counter.
            epoch: that of the engine, where ``skips`` is given.
            skips: let the data of this epoch begin after so many batches, if these need not be read for that.
        """
        self.stop_reason = None
        self.last_epoch, self.last_step = self._goal()
        self.ended_step = step
        self.ends_epoch = self._ends_epoch_early = False
        self.next_validation = self.plan.next_validation(step)
        self.feed.jump(epoch, skips)

    def _decide(self, decision: Decision) -> None:
        """Take a decision over at once, or on several ranks, when all of them meet."""
        if self._agreement is None:
            self._take_over(decision)
        else:
            self._agreement.ask_for(decision)

    def _take_over(self, decision: Decision) -> None:
        """Let a decision take effect when the step settles.

        A signal may come within this, so nothing is written but what was decided.
        """
        if decision.interrupt is not None:
            self.interrupted = self.interrupted or decision.interrupt
        if decision.stop is not None:
            self.stop_reason = self.stop_reason or decision.stop
        if decision.end_epoch:
            self._ends_epoch_early = not self.data_exhausted
        if decision.validate:
            self._validation_was_asked, self.next_validation = True, 0
        if decision.save or decision.validate:
            self._save_was_asked |= decision.save
        elif not decision.end_epoch or self._ends_epoch_early:
            self.ends_epoch = True
        self.due = 0

    def skip_batch(self) -> None:
        """Leave out the training batch that was just read; for handlers of `BatchReady`.

        It counts as a step in which nothing is done: there is no loss, no update and no `StepEnd`.

        Raises:
            EngineStateError: at any other moment.
        """
        if not self.may_skip_batch:
            raise EngineStateError(
                "skip_batch was called when no training batch had just been read. "
                "Ask for it in a handler of BatchReady, if event.engine.training."
            )
        self.skips_batch = True

    def settle_batch(self, step: int) -> None:
        """Take note that the batch of ``step`` is left out, if somebody asked for that."""
        self.may_skip_batch = False
        if self.skips_batch:
            self.skips_batch = False
            self.num_skipped_batches += 1
            self.ended_step = step

    def skip_update(self) -> None:
        """Leave out the update that is about to be made; for handlers of `GradientsReady`.

        Raises:
            EngineStateError: at any other moment.
        """
        if not self._is_updating:
            raise EngineStateError(
                "skip_update was called when no update was about to be made. Call it in a handler of GradientsReady."
            )
        self._skips_update = True

    def settle(self, epoch: int, step: int, *, is_announced: bool = False) -> bool:
        """Settle what was asked for up to ``step``, and return whether the run is over.

        Everything that handlers and signals decide for the run takes effect here: at the end of a step, at the end of
        an epoch and before the first step. On several ranks, it takes effect at the same step of each.

        Args:
            epoch: the engine's counter.
            step: the engine's counter.
            is_announced: whether `Settled` is announced next. A checkpoint that was asked for becomes due only then.
        """
        if self._agreement is not None:
            self._take_over_all(self._agreement)
        if self.stop_reason is not None:
            self.last_step = min(self.last_step, step)
        if is_announced:
            self.save_is_due, self._save_was_asked = self._save_was_asked, False
        self.due = 0 if self.save_is_due or self._save_was_asked else int(min(self.epoch_goal, NEVER))
        self.ends_epoch = self._ends_epoch_early or self.stop_reason is not None or step >= self.epoch_goal
        if self.breaks_off:  # looked at last, because a signal may come at any moment
            self.due, self.ends_epoch = 0, True
        if self._agreement is not None:
            self.due = 0  # each settling is a checkpoint of the agreement, so none is left out
        goes_on = epoch < self.last_epoch and step < self.last_step
        self.is_over = self.breaks_off or (self.phase is Phase.BETWEEN and not goes_on)
        return self.is_over

    def validates_after_step(self, step: int) -> bool:
        """Return whether a validation is to be made now, after this step; asked only at `next_validation`."""
        is_last = step - self.step_before_epoch == self.epoch_length
        asked = self._validation_was_asked and not is_last  # the one at the epoch's end would be the same
        if asked or not self._validation_was_asked:
            self.next_validation = self.plan.next_validation(step)
        return asked or self.plan.validates_after_step(step)

    def _take_over_all(self, agreement: Agreement[Decision]) -> None:
        """Take over what all ranks have asked for, if they meet here."""
        for decision in agreement.decisions_here():
            self._take_over(decision)

    def begin_update(self) -> None:
        """Let handlers decide about the update that is about to be made."""
        self._is_updating = True

    def settle_update(self) -> bool:
        """Return whether the update that is about to be made is to be left out."""
        skips, self._skips_update, self._is_updating = self._skips_update, False, False
        return skips

    # Where it is -------------------------------------------------------------------------------------------

    @property
    def data_exhausted(self) -> bool:
        """Whether the present epoch's training data were read to their end."""
        return self.phase is not Phase.READING

    @property
    def epoch_goal(self) -> float:
        """The step after which the training of the present epoch ends; infinite if only the data can end it."""
        length = self.plan.epoch_length or self.plan.limit or math.inf
        return min(self.last_step, self.step_before_epoch + length)

    @property
    def has_validation(self) -> bool | None:
        """Whether there are validation data; None where that is unknown."""
        return None if self.validation_sets is None else bool(self.validation_sets)

    @property
    def breaks_off(self) -> bool:
        """Whether the run ends where it is, to be gone on with: after an interruption, or from an earlier state."""
        return self.interrupted is not None or self.goes_back_to is not None

    @property
    def is_cut(self) -> bool:
        """Whether the run breaks off and leaves the present epoch open."""
        return self.breaks_off and (not self.data_exhausted or self.validation_was_cut)

    def begin_epoch(self, record: Record, step: int) -> None:
        """Open an epoch, whose training values go into ``record``."""
        self.phase = Phase.READING
        self.training_stage = CurrentStage("train", record)
        self.step_before_epoch = step
        self.last_validation = {}
        self._ends_epoch_early = False
        self._num_passes = self._num_passes_to_skip = 0
        self._num_validated = self._num_validations_to_skip = 0

    def begin_pass(self) -> bool:
        """Return whether a loop over training data begins now; not if it ended before the run was resumed."""
        if self._num_passes_to_skip:
            self._num_passes_to_skip -= 1
            return False
        self.phase = Phase.READING
        return True

    def end_pass(self) -> None:
        """Take note that a loop over training data, and the update of the window that it left open, are done."""
        self.phase = Phase.ENDING
        self._num_passes += 1

    def begin_validation(self, *, in_step: bool) -> bool:
        """Return whether a validation begins now: not if it was done before a resume, or if the run is interrupted.

        Args:
            in_step: whether this is within a training step.
        """
        self._validates_in_step = in_step or (self.validation_was_cut and not self.data_exhausted)
        if self._num_validations_to_skip and not self._validates_in_step:
            self._num_validations_to_skip -= 1
            return False
        if self.data_exhausted:
            self.phase = Phase.VALIDATING
        if self.cuts_validation:
            self.cut_validation()
            return False
        return True

    @property
    def cuts_validation(self) -> bool:
        """Whether the present validation ends here, because the run breaks off.

        A validation within a step of the user's own loop does not: it could not be made again, because its step is not
        repeated.
        """
        if self._agreement is not None:
            self._take_over_all(self._agreement)
        is_repeatable = self.has_validation is not None or not self._validates_in_step
        return self.breaks_off and is_repeatable

    def cut_validation(self) -> None:
        """Leave the present validation to the run that resumes this one."""
        self.validation_was_cut |= self._validates_in_step or self.data_exhausted

    def end_validation(self, values: dict[str, Any]) -> None:
        """Take in the values of a validation that is done."""
        self.last_validation |= values
        self.validation_was_cut = self._validation_was_asked = False
        self._num_validated += not self._validates_in_step
        if self.data_exhausted:
            self.phase = Phase.ENDING

    def num_planned(self, unit: Literal["step", "epoch"]) -> int | None:
        """Return how many of these the run makes if nothing stops it; None where that is unknown."""
        if unit == "epoch":
            return self.plan.num_epochs(self.epoch_length)
        return self.plan.num_steps(self.epoch_length)

    def reason(self, epoch: int, step: int, error: BaseException | None) -> str:
        """Return, in words, why the run ends."""
        if isinstance(error, GeneratorExit):
            return f"the loop was left in epoch {epoch}"
        if error is not None:
            return f"failed with {type(error).__name__}: {error}"
        if self.interrupted is not None:
            return f"interrupted by {self.interrupted.name}"
        if self.goes_back_to is not None:
            return f"goes back to step {self.goes_back_to[0]['counters']['step']}"
        is_whole_epoch = step - self.step_before_epoch == self.epoch_length
        by_steps = step >= self.last_step and not (epoch >= self.last_epoch and is_whole_epoch)
        return self.stop_reason or self.plan.goal(by_steps=by_steps)

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks that this one ends with an error; or add to the error which of them failed before."""
        if self._agreement is None or self.ranks.is_broken or isinstance(error, GeneratorExit):
            return
        self.ranks.is_broken = True
        try:
            self._tell(self._agreement, error)
        except RuntimeError as second:  # the store that all share is gone with the process that held it
            error.add_note(f"The other ranks cannot be asked what happened to them: {second}")

    def _tell(self, agreement: Agreement[Decision], error: BaseException) -> None:
        may_be_theirs = isinstance(error, RuntimeError) and not isinstance(error, CamshaftError)
        failure, own = agreement.failure(looks_for_life=may_be_theirs), f"{type(error).__name__}: {error}"
        if failure is None:
            agreement.announce(own)
        elif failure not in own and not failure.endswith(own):  # otherwise it is said, or all ranks have raised it
            error.add_note(f"This is rank {self.ranks.rank}, which cannot continue alone. {failure}")

    def close(self) -> None:
        """End what the run has needed beside its loop."""
        if self._agreement is not None:
            self._agreement.close()

    # Its state ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a later run needs to continue from here, but for the position in the data."""
        return {
            "plan": {"epochs": self.plan.epochs, "max_steps": self.plan.max_steps},
            "first_epoch": self.first_epoch,
            "first_step": self.first_step,
            "step_before_epoch": self.step_before_epoch,
            "epoch_length": self.epoch_length,
            "phase": int(self.phase),
            "stop_reason": self.stop_reason,
            "ends_epoch_early": self._ends_epoch_early,
            "validation_was_asked": self._validation_was_asked,
            "num_skipped_batches": self.num_skipped_batches,
            "num_passes": self._num_passes,
            "num_validated": self._num_validated,
            "validation_was_cut": self.validation_was_cut,
            "last_validation": self.last_validation,
        }

    def load_state_dict(self, state: dict[str, Any], record: Record, step: int) -> None:
        """Continue where `state_dict` was called; ``epochs`` and ``max_steps`` count from where that run began."""
        self.first_epoch, self.first_step = state["first_epoch"], state["first_step"]
        self.last_epoch, self.last_step = self._goal()
        self.step_before_epoch = state["step_before_epoch"]
        self.epoch_length = self.epoch_length or state["epoch_length"]
        self.phase = Phase(state["phase"])
        self.training_stage = CurrentStage("train", record)
        self.ended_step = step
        if not self.plan.reaches_further(**state["plan"]):
            self.stop_reason = self.stop_reason or state["stop_reason"]
        self._ends_epoch_early = state["ends_epoch_early"]
        self._validation_was_asked = state["validation_was_asked"]
        self.next_validation = 0 if self._validation_was_asked else self.plan.next_validation(step)
        self.num_skipped_batches = state["num_skipped_batches"]
        self._num_passes = self._num_passes_to_skip = state["num_passes"]
        self._num_validated = self._num_validations_to_skip = state["num_validated"]
        self.validation_was_cut = state["validation_was_cut"]
        self.last_validation = dict(state["last_validation"])

    def _goal(self) -> tuple[float, float]:
        epochs, steps = self.plan.epochs, self.plan.max_steps
        return (
            math.inf if epochs is None else self.first_epoch + epochs,
            math.inf if steps is None else self.first_step + steps,
        )


class _NoRun:
    """What an engine has between two runs: whatever is asked of it is refused.

    There is one, also in a copy of an engine.
    """

    def __reduce__(self) -> str:
        return "NO_RUN"

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # asked by Python itself, as when the engine is copied
            raise AttributeError(name)
        raise EngineStateError(
            f"engine.run.{name} was asked for outside a run. Ask in a handler, or in the body of engine.epochs(n)."
        )


NO_RUN = cast("Run", _NoRun())
