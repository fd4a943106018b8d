"""The loop.

`Engine.fit` is all of it. `Engine.epochs`, `Engine.train` and `Engine.validate` are its parts, and the script
style: your own two loops over the same events.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .callback import Callback, check_callbacks
from .errors import ConfigurationError, DataError, EngineStateError
from .events import (
    BatchReady,
    Settled,
    StepEnd,
    ValidationEnd,
    ValidationStart,
    ValidationStepEnd,
)
from .history import History
from .order import Data, Pass, SeededLoader, check_data, empty_message, exactness, num_batches, one_pass
from .plan import Plan
from .record import Record, prefixed, scalars
from .rng import own_rng
from .run import Run
from .when import NEVER

StepOutput = Tensor | Mapping[str, Any] | None
StepFunction = Callable[["Engine", Any], StepOutput]

logger = logging.getLogger("camshaft")


class Engine(Run):
    """Runs training and validation, and announces each moment as an event.

    Args:
        step: ``step(engine, batch)``, called with each batch; ``engine.training`` tells training from
            validation. It returns what to record: None, a tensor (recorded as ``loss``) or ``{name: tensor}``.
            None as step is for the script style, where your own loop does the work.
        callbacks: handlers, attached in this order.
        seed: seeds python, numpy and torch when the first run begins; None leaves them alone.
        parts: the named objects of the run, such as ``model=`` and ``optimizer=``.

    Attributes:
        epoch, step, num_validations, num_updates: counters, 1-based. During the first step ``step`` is 1.
        epoch_step, validation_step: the step's number within its epoch or its validation.
        stage: "train", "val", "test", "predict", or "" between them.
        batch, output: the present batch, and what the model or the step made of it.
        history: the `History` of all runs of this engine.
        parts: the named objects of the run.
        directory: where handlers write what a run leaves behind; None writes nothing.

    >>> engine = Engine(lambda engine, batch: {"loss": batch.mean()})
    >>> engine.fit([torch.ones(4, 1), torch.zeros(2, 1)], epochs=1)["train_loss"]
    [0.6666666666666666]
    """

    def __init__(
        self,
        step: StepFunction | None = None,
        *,
        callbacks: Iterable[Callback] = (),
        seed: int | None = None,
        **parts: Any,
    ) -> None:
        if step is not None and not callable(step):
            raise ConfigurationError(f"step is {step!r}, not a function. Write def step(engine, batch): ...")
        super().__init__(seed, parts)
        self._step_function = step
        self._seeded: SeededLoader | None = None
        self._said_exactness = False
        self._batch_ready = self.dispatch.channel(BatchReady)
        self._settled = self.dispatch.channel(Settled)
        self._validation_step_end = self.dispatch.channel(ValidationStepEnd)
        for callback in check_callbacks(callbacks):
            self.attach(callback)

    # The loop ------------------------------------------------------------------------------------------

    def fit(
        self,
        train: Data,
        val: Data | None = None,
        *,
        epochs: int | None = None,
        max_steps: int | None = None,
        min_epochs: int = 0,
        epoch_length: int | None = None,
        validate_every: int | str | None = None,
        resume: str | Path | None = None,
    ) -> History:
        """Train on ``train``, validate on ``val``, and return the history.

        How far a run goes (``epochs``, ``max_steps``, ``min_epochs``, ``epoch_length``) and when it validates
        (``validate_every``) is described at `Plan`; for a resumed run, ``epochs`` and ``max_steps`` count from where
        the run that is resumed began.

        A second call goes on from where the first stopped, with the counters running on. A signal (SIGTERM, SIGUSR1,
        Ctrl-C) ends the run behind the present step; ``history.exit_code`` tells.

        ``train`` and ``val`` are iterables of batches, or functions that return one. ``resume`` is "auto" for the
        newest checkpoint of the attached `RunCheckpoint`, or a fresh start if there is none; or the path of a
        checkpoint, or of a directory of them.

        Raises:
            ConfigurationError, DataError, CheckpointError: for what cannot work, before the first step where it can
                be known.
        """
        plan = Plan(epochs, max_steps, min_epochs, epoch_length, validate_every)
        self._expect(plan, train, val)
        loop, step = self._run(plan, resume), self._bound_step()
        try:
            for _ in loop:
                if self._validation_was_cut_short(plan):
                    self._validate(val)
                next_validation = plan.next_validation(self.step)
                for batch in self.train(train):
                    if (output := step(batch)) is not None:
                        self._take(output)
                    if self.step >= next_validation and plan.validates_after_step(self.step):
                        next_validation = plan.next_validation(self.step)
                        self._validate(val)
                if plan.validates_after_epoch(self.epoch):
                    self._validate(val)
        except BaseException as error:
            loop.throw(error)  # the run ends inside, where RunFailed and FitEnd are fired; it raises the same
        return self.history

    def epochs(
        self,
        epochs: int | None = None,
        *,
        max_steps: int | None = None,
        min_epochs: int = 0,
        resume: str | Path | None = None,
    ) -> Iterator[int]:
        """Run epochs in your own loop: ``for epoch in engine.epochs(20): ...``; yields the epoch's number."""
        self.epoch_length = self.validation_length = None  # known once the data are seen
        return self._run(Plan(epochs, max_steps, min_epochs), resume)

    def train(self, data: Data) -> Iterator[Any]:
        """Yield each training batch; what stands in the loop's body is the step."""
        batches = self._begin_training(data)
        batch_ready, step_end, settled = self._batch_ready, self._step_end, self._settled
        step, reading = self.step, True
        try:
            for batch in batches:
                reading = False
                self.step = step = step + 1
                if step >= batch_ready.due:
                    batch = batch_ready.transform(lambda batch: BatchReady(self, batch), batch, step)
                self.batch, self.output = batch, None
                yield batch
                if step >= step_end.due and step > self._ended_step:  # a validation in the loop's body has ended it
                    self._ended_step = step
                    step_end.emit(StepEnd(self, batch, self.output), step)
                if step >= settled.due:
                    settled.emit(Settled(self), step)
                if step >= self._end_of_epoch and self._epoch_is_over():
                    break
                reading = True
        except Exception as error:
            if reading:
                self._add_reading_note(error, self.epoch_step + 1)
            raise
        finally:
            self.stage, self._record = "", None
        self._end_training(data)

    def validate(self, data: Data) -> Iterator[Any]:
        """Yield each validation batch, in eval mode and without gradients; training resumes unchanged."""
        self._require_run("validate")
        self._end_step()
        self.num_validations += 1
        step_end = self._validation_step_end
        step_end.rewind()  # its counter starts anew
        with self._evaluating("val") as record:
            self.validation_length = num_batches(data)
            self.emit(ValidationStart(self))
            for batch in self._evaluation_batches("val", data):
                yield batch
                if self.validation_step >= step_end.due:
                    step_end.emit(ValidationStepEnd(self, batch, self.output), self.validation_step)
                if self.interrupted:
                    self.num_validations -= 1  # it will be made anew when the run is resumed
                    return
            self.validated_step = self.step
            metrics = prefixed("val", record.compute())
            self.newest.update(metrics)
            trained = prefixed("train", self.stages["train"].since_mark()) if self.in_mid_epoch else {}
            self.history.add_validation(self.epoch, self.step, trained | scalars(metrics))
            self.emit(ValidationEnd(self, metrics))

    # What a step does ----------------------------------------------------------------------------------

    def training_step(self, batch: Any) -> StepOutput:
        """Train on one batch and return what to record: what the step function does."""
        return self._step_function(self, batch)  # type: ignore[misc]  # fit has checked it

    def evaluation_step(self, batch: Any) -> StepOutput:
        """Evaluate one batch: the same step function, which can look at ``engine.training``."""
        return self.training_step(batch)

    def _bound_step(self) -> Callable[[Any], StepOutput]:
        """Return what trains on a batch: the step function itself where that is all, which saves a call per step."""
        if self._step_function is not None and type(self).training_step is Engine.training_step:
            return partial(self._step_function, self)
        return self.training_step

    def record(self, *, weight: float | None = None, **values: float | Tensor) -> None:
        """Add values, each the mean over ``weight`` samples, to the averages of the present stage.

        Nothing waits for the device. Without ``weight``, the number of samples is read off the batch.

        Raises:
            DataError: if a value is not one number, or the batch does not tell its number of samples.
        """
        self._present_record().add(values, self.num_samples() if weight is None else weight)

    def measure(self, output: Any, target: Any, *, weight: float | None = None) -> None:
        """Give one batch's output and target to every metric of the present stage.

        Handlers find the output as ``event.output``.
        """
        self.output = output
        self._present_record().measure(output, target, self.num_samples() if weight is None else weight)

    def _take(self, output: StepOutput) -> None:
        """Record what a step returned; handlers see it where the step has given its output to no metric."""
        if self.output is None:
            self.output = output
        if output is None:
            return
        if isinstance(output, Tensor):
            self.record(loss=output)
        elif isinstance(output, Mapping):
            self.record(**output)
        else:
            raise DataError(
                f"The step returned {output!r}, of type {type(output).__name__}. "
                "Return None, a tensor, or a dict such as {'loss': loss}."
            )

    def _present_record(self) -> Record:
        if self._record is None:
            raise EngineStateError(
                "Values were recorded outside a stage. "
                "Record inside the body of engine.train(...) or engine.validate(...)."
            )
        return self._record

    # Evaluation ----------------------------------------------------------------------------------------

    def evaluate(self, data: Data) -> dict[str, Any]:
        """Return ``{"loss": ..., "acc": ...}`` over ``data``, without touching the run.

        Scalars are floats; a metric that is none (a confusion matrix) is a tensor on the CPU.
        """
        with self._evaluating("test") as record:
            for batch in self._evaluation_batches("data", data):
                self._take(self.evaluation_step(batch))
            return record.compute()

    @contextmanager
    def _evaluating(self, stage: str) -> Iterator[Record]:
        """Eval mode, no gradients, random numbers of its own and a fresh record; all undone at the end."""
        modes = {module: module.training for part in self.modules().values() for module in part.modules()}
        outer = self.stage, self._record, self.batch, self.output
        record = self.stages[stage]
        record.reset()
        self.stage, self._record = stage, record
        self.validation_step = 0
        try:
            with own_rng(), torch.no_grad():
                for part in self.modules().values():
                    part.eval()
                with self.scope("evaluation"):
                    yield record
        finally:
            self.stage, self._record, self.batch, self.output = outer
            for module, mode in modes.items():
                module.training = mode

    def _evaluation_batches(self, name: str, data: Data) -> Iterator[Any]:
        check_data(name, data)
        batches = one_pass(data)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except Exception as error:
                self._add_reading_note(error, self.validation_step + 1)
                raise
            self.validation_step += 1
            if self.step >= self._batch_ready.due:
                batch = self._batch_ready.transform(lambda batch: BatchReady(self, batch), batch, self.step)
            self.batch, self.output = batch, None
            yield batch
        if not self.validation_step:
            raise DataError(empty_message(name, data))

    def _validate(self, val: Data | None) -> None:
        if val is not None and not self.interrupted:
            for batch in self.validate(val):
                self._take(self.evaluation_step(batch))

    def _validation_was_cut_short(self, plan: Plan) -> bool:
        """Return whether the run was interrupted in a validation in mid-epoch, and has just been resumed."""
        return self.step > self.validated_step and self.epoch_step > 0 and plan.validates_after_step(self.step)

    # Training data -------------------------------------------------------------------------------------

    def _expect(self, plan: Plan, train: Data, val: Data | None) -> None:
        """Refuse what a fit could not run with, before it begins."""
        if self._step_function is None and type(self).training_step is Engine.training_step:
            raise ConfigurationError(
                "This engine has no step. Write Engine(step, ...), or loop over engine.epochs(n)."
            )
        check_data("train", train)
        if val is not None:
            check_data("val", val)
        self.validates = val is not None
        length = num_batches(train)
        if length is not None and plan.epoch_length is not None and length < plan.epoch_length:
            raise DataError(_too_short(length, plan.epoch_length, "an epoch"))
        self.epoch_length = plan.epoch_length or length
        self.validation_length = None if val is None else num_batches(val)

    def _begin_training(self, data: Data) -> Iterator[Any]:
        plan = self._require_run("train")
        check_data("train", data)
        self.epoch_length = plan.epoch_length or num_batches(data)
        end = min(self.last_step, self.step_before_epoch + (plan.epoch_length or NEVER), NEVER)
        self._end_of_epoch = 0 if self.interrupted else int(end)
        self.stage, self._record = "train", self.stages["train"]
        if self.epoch_step and self.step >= self.last_step:  # resumed behind the last step: its epoch's end is to come
            return iter(())
        seeded = self.seeded_view(data)
        if self._resumed_data is not None:
            self._pass = Pass.resume(data, self._resumed_data, seeded=seeded, step=self.step)
            self._resumed_data = None
        elif plan.epoch_length is None or self._pass is None or self._pass.data is not data:
            # Only epochs of a set length share one pass.
            self._pass = Pass(data, seeded=seeded, epoch=self.epoch, step=self.step)
        if self.checkpoints is not None and not self._said_exactness:
            self._said_exactness = True
            logger.info("Resumed in mid-epoch, this run would be: %s.", exactness(data, seeded=seeded is not None))
        return self._pass.iterator

    def _end_training(self, data: Data) -> None:
        if self.interrupted:
            return
        if not self.epoch_step:
            raise DataError(empty_message("train", data))
        if self._require_run("train").epoch_length is None:
            self._pass = None
        elif not self._epoch_is_over():
            raise DataError(_too_short(self.epoch_step, self.epoch_length, f"epoch {self.epoch}"))
        self._passed = True
        self._flush()

    def seeded_view(self, data: Data) -> SeededLoader | None:
        """Return the view of a loader whose order depends on the seed alone; None without a seed or positions."""
        if self.seed is None or not SeededLoader.fits(data):
            return None
        if self._seeded is None or self._seeded.data is not data:
            self._seeded = SeededLoader(data, self.seed)
            self._seeded.check_repeats()
        return self._seeded

    def data_state(self) -> dict[str, Any] | None:
        """Return where the training data stand, or None between two passes."""
        return None if self._pass is None else self._pass.state_dict(self.step)

    def _add_reading_note(self, error: Exception, position: int) -> None:
        error.add_note(f"While reading batch {position} of the {self.stage} data in epoch {self.epoch}.")


def _too_short(num: int, epoch_length: int | None, where: str) -> str:
    return (
        f"Data ended after {num} steps of {where}, but epoch_length={epoch_length}. "
        f"Pass epoch_length={num}, or repeat the data: fit(repeat(train), ...)."
    )
