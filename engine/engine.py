"""The loop.

`Engine.fit` is all of it. `Engine.epochs`, `Engine.train` and `Engine.validate` are its parts, and the script
style: your own two loops over the same events.

This file is longer than the others because it contains the complete order in which a run does things. The objects
that a run is made of are in files of their own.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, TypeVar, final

import torch
from torch import Tensor

from .batch import call_model, concatenate, tree_map
from .callback import Callback, check_callbacks
from .data import Data, DataSets, as_sets, check_data, empty_message, num_batches, one_pass
from .dispatch import Subscription
from .divided import Division, take_shares
from .errors import ConfigurationError, DataError, EngineStateError, whole_number
from .events import (
    BatchReady,
    EpochEnd,
    EpochStart,
    Event,
    FitEnd,
    FitStart,
    RunFailed,
    Settled,
    StepEnd,
    ValidationEnd,
    ValidationStart,
    ValidationStepEnd,
)
from .feed import Feed
from .history import History
from .listeners import Listeners, Scope
from .meter import as_weight
from .parts import Parts, check_parts
from .plan import Plan
from .ranks import Ranks, check_joined
from .rehearsal import rehearse
from .rehearsed import Rehearsal
from .renamed import OF_ENGINE, refuse_old_names
from .replay import begin_replay
from .rng import generator_states, preserve_rng, seed_everything, set_generator_states
from .run import NO_RUN, Phase, Run
from .signals import handled_signals
from .stages import NOTHING, CurrentStage, Stages, record_output, refuse_outside_a_stage
from .state import Found, find_state, load_state
from .step import Step, StepFunction, StepOutput, as_step
from .update import Update
from .values import label, prefixed, scalars

E = TypeVar("E", bound=Event)

logger = logging.getLogger("camshaft")


@refuse_old_names("engine", OF_ENGINE)
@final
class Engine:
    """Runs training and validation, and announces each moment as an event.

    Args:
        step: ``step(engine, batch)``, called with each batch; ``engine.training`` distinguishes training
            from validation. It returns what to record: None, a tensor (recorded as ``loss``) or ``{name: tensor}``.
            Or a `Step`. None is for the script style, where your own loop does the work.
        callbacks: handlers, attached in this order.
        seed: seeds python, numpy and torch when the first run begins; None leaves them alone.
        num_samples: ``num_samples(batch)`` tells by how much a batch counts in updates, averages and evaluations: a
            number or a tensor of one element, such as the number of tokens ``batch["mask"].sum()``. A loss is then a
            mean over those. By default, the first dimension of the batch's tensors.
        fixed_validation_noise: let each validation and evaluation draw the same random numbers, so that one with noise
            of its own (diffusion, a variational model) compares with the one before.
        parts: the named objects of the run, such as ``model=`` and ``optimizer=``.

    Raises:
        ConfigurationError: if an argument is of the wrong kind, or a part looks like another argument.

    Attributes:
        epoch, step, num_fits, num_validations, num_updates, num_skipped_updates: what was done so far, also in earlier
            runs. Counted from 1: during the first step ``step`` is 1.
        validation_step: the number of the present batch within its validation.
        parts: the named objects, a `Parts`.
        history: the `History` of all runs of this engine.
        stages: what each stage records, a `Stages`.
        current: the stage that is running now, with its batch, a `CurrentStage`.
        run: the present `Run`; outside a run it refuses whatever is asked of it.
        update: ``engine.update(loss)``, an `Update`.
        stepper: what is done with a batch, a `Step`; None in the script style.
        listeners: who hears the events, a `Listeners`.
        ranks: the processes that train together, a `Ranks`.
        seed: as given.

    >>> engine = Engine(lambda engine, batch: {"loss": batch.mean()})
    >>> engine.fit([torch.ones(4, 1), torch.zeros(2, 1)], epochs=1)["train_loss"]
    [0.6666666666666666]
    """

    def __init__(
        self,
        step: StepFunction | Step | None = None,
        *,
        callbacks: Iterable[Callback] = (),
        seed: int | None = None,
        num_samples: Callable[[Any], float | Tensor] | None = None,
        fixed_validation_noise: bool = False,
        **parts: Any,
    ) -> None:
        self.seed = None if seed is None else whole_number("seed", seed, least=0)
        if self.seed is not None and self.seed >= 2**64:
            raise ConfigurationError(f"seed is {seed}, which torch cannot take. Pass a whole number below 2**64.")
        self.stepper = step if step is None else as_step(step)
        self.epoch = self.step = self.validation_step = 0
        self.num_fits = self.num_validations = self.num_updates = self.num_skipped_updates = 0
        check_parts(parts, ("step", "callbacks", "seed", "num_samples", "fixed_validation_noise"))
        self.parts = Parts(parts)
        self.history = History()
        self.ranks = Ranks()
        self.stages = Stages(self.ranks, num_samples)
        self.current = CurrentStage()
        self.run: Run = NO_RUN
        self.listeners = Listeners(self)
        self.update = Update(self.parts, self.listeners, self, self.ranks, asks=num_samples is not None)
        self._fixed_noise = fixed_validation_noise
        self._division = Division(self.seed, self.ranks)
        self._batch_ready = self.listeners.channel(BatchReady)
        self._step_end = self.listeners.channel(StepEnd)
        self._settled = self.listeners.channel(Settled)
        self._validation_step_end = self.listeners.channel(ValidationStepEnd)
        self._training_loops: list[weakref.ref[Generator[Any, None, None]]] = []  # those of the present epoch
        for callback in check_callbacks(callbacks):
            self.attach(callback)

    # The loop ------------------------------------------------------------------------------------------

    def fit(
        self,
        train: Data,
        val: DataSets | None = None,
        *,
        epochs: int | None = None,
        max_steps: int | None = None,
        min_epochs: int = 0,
        epoch_length: int | None = None,
        validate_every: int | str | None = None,
        limit: int | None = None,
        resume: str | Path | None = None,
    ) -> History:
        """Train on ``train``, validate on ``val``, and return the history.

        How far a run goes (``epochs``, ``max_steps``, ``min_epochs``, ``epoch_length``), when it validates
        (``validate_every``), and how to try it with a little of the data (``limit``) is described at `Plan`. For a
        resumed run, ``epochs`` and ``max_steps`` count from where the run that is resumed began.

        A second call continues where the first stopped, and so do the counters. A signal (SIGTERM, SIGUSR1, Ctrl-C)
        ends the run after the present step; ``history.exit_code`` says so.

        ``train`` and ``val`` are iterables of batches, or functions that return one. ``val`` may be several of them by
        name, ``{"clean": a, "noisy": b}``: then a validation goes through all, and its values are ``val_clean_loss``,
        ``val_noisy_loss`` ... ``resume`` is "auto" for the
        newest checkpoint of the attached `RunCheckpoint`, or a fresh start if there is none; or the path of a
        checkpoint, or of a directory of them.

        Raises:
            ConfigurationError, DataError, CheckpointError: for what cannot work, before the first step where it can
                be known.
        """
        plan = Plan(epochs, max_steps, min_epochs, epoch_length, validate_every, limit)
        feed, step, sets = self._expect(plan, train, val)
        loop = self._epochs(plan, feed, sets, resume)
        try:
            for _ in loop:
                self._repeat_cut_validation(val)
                run = self.run
                for batch in self.train(train):
                    if (output := step(batch)) is not None:
                        record_output(self.current, output)
                    if self.step >= run.next_validation and run.validates_after_step(self.step):
                        self._validate(val)
                if plan.validates_after_epoch(self.epoch):
                    self._validate(val)
        except BaseException as error:
            loop.throw(error)  # the run ends inside, where RunFailed and FitEnd are announced; it raises the same
        return self.history

    def rehearse(
        self,
        train: Data,
        val: DataSets | None = None,
        *,
        epochs: int | None = None,
        max_steps: int | None = None,
        min_epochs: int = 0,
        epoch_length: int | None = None,
        validate_every: int | str | None = None,
    ) -> Rehearsal:
        """Try a whole run in seconds, before `fit` makes it: its first epoch, its last, and what happens in between.

        The arguments are those of `fit`. A few batches of some epochs are read; validations, saving, handlers that run
        now and then, the end of the run and a resume are tried, too. What fails there is raised here.
        Afterwards everything is as it was: weights, random numbers, handlers and files. What was tried, and what the
        whole run will need, is printed and returned.

        Raises:
            ConfigurationError: on several ranks, and for data that can be read only once.
            EngineStateError: if the script, started again, cannot resume the run, or something cannot be put back.
        """
        return rehearse(self, train, val, Plan(epochs, max_steps, min_epochs, epoch_length, validate_every))

    def epochs(
        self,
        epochs: int | None = None,
        *,
        max_steps: int | None = None,
        min_epochs: int = 0,
        resume: str | Path | None = None,
    ) -> Iterator[int]:
        """Run epochs in your own loop: ``for epoch in engine.epochs(20): ...``; yields the epoch's number."""
        feed = self._feed(None)
        return self._epochs(Plan(epochs, max_steps, min_epochs), feed, None, resume)

    def train(self, data: Data) -> Iterator[Any]:
        """Yield each training batch; the loop body is the training step. It ends with the epoch."""
        loop = self._training_loop(self._require_run("train"), data)
        self._training_loops.append(weakref.ref(loop))
        return loop

    def _training_loop(self, run: Run, data: Data) -> Generator[Any, None, None]:
        if not run.begin_pass():
            return
        batches = self._begin_training(run, data)
        batch_ready, step_end, settled = self._batch_ready, self._step_end, self._settled
        self.current = stage = run.training_stage
        step, reading = self.step, True
        try:
            for batch in batches:
                reading = False
                self.step = step = step + 1
                if step >= batch_ready.due:
                    run.may_skip_batch = True
                    batch = batch_ready.transform(lambda batch: BatchReady(self, batch), batch, step)
                    run.may_skip_batch = False
                    if run.skips_batch:
                        run.settle_batch(step)
                if step > run.ended_step:  # not left out
                    stage.batch, stage.output, stage.target = batch, None, NOTHING
                    yield batch
                if step >= step_end.due and step > run.ended_step:  # a validation in the loop's body has ended it
                    run.ended_step = step
                    step_end.emit(StepEnd(self, batch, stage.output), step)
                if step >= run.due or step >= settled.due:
                    if step >= run.due:
                        run.settle(self.epoch, step, is_announced=True)
                    if step >= settled.due:
                        settled.emit(Settled(self), step)
                    if run.ends_epoch:
                        break
                reading = True
        except Exception as error:
            if reading:
                self._add_reading_note(error, "train", self.epoch_step + 1)
            raise
        finally:
            self.current = CurrentStage()
        self._end_training(run)

    def validate(self, data: DataSets) -> Iterator[Any]:
        """Yield each validation batch, in eval mode and without gradients; training continues unchanged afterwards.

        Of several data sets by name, all are read, one after the other: ``engine.current.dataset`` is the present one.
        """
        run = self._require_run("validate")
        self._end_step(run)
        if not run.begin_validation(in_step=self.current is run.training_stage):
            return
        self.num_validations += 1
        step_end = self._validation_step_end
        step_end.rewind()  # its counter begins again at 1
        sets = as_sets("val", data)
        with self._evaluation("val", sets):
            self.emit(ValidationStart(self))
            for batch in self._evaluation_batches("val", sets, run.validation_limit):
                yield batch
                if self.validation_step >= step_end.due:
                    event = ValidationStepEnd(self, batch, self.output, self.current.dataset)
                    step_end.emit(event, self.validation_step)
                if run.cuts_validation:
                    run.cut_validation()
                    self.num_validations -= 1
                    return
            metrics = run.changed(self._values_of("val", sets))
            run.end_validation(metrics)
            trained = {} if run.data_exhausted else prefixed("train", self.stages["train"].since_mark())
            self.history.add_validation(self.epoch, self.step, trained | scalars(metrics), sets)
            self.emit(ValidationEnd(self, metrics))

    # What a step calls ---------------------------------------------------------------------------------

    def record(self, *, weight: float | Tensor | None = None, **values: float | Tensor) -> None:
        """Add values, each the mean over ``weight`` samples, to the averages of the present stage.

        ``weight`` is a number or a tensor of one element, such as ``mask.sum()``; where it is 0, there is nothing to
        add. Without it, the number of samples is taken from the batch. Nothing waits for the device.

        Raises:
            DataError: if a value is not one number, the weight is not a number of samples, or the number of samples
                cannot be read from the batch.
        """
        current = self.current
        record = current.record or refuse_outside_a_stage()
        record.add(values, current.num_samples() if weight is None or current.is_stand_in else as_weight(weight))

    def measure(self, output: Any, target: Any, *, weight: float | Tensor | None = None) -> None:
        """Give one batch's output and target to every metric of the present stage.

        ``weight`` is as for `record`; where it is the number 0, nothing is measured. Handlers find the output as
        ``event.output``.
        """
        current = self.current
        record = current.record or refuse_outside_a_stage()
        current.output, current.target = output, target
        if weight is None or current.is_stand_in:
            weight = current.num_samples()
        record.measure(output, target, as_weight(weight))

    def stop(self, reason: str) -> bool:
        """End the run after this step (or epoch, or validation); ``history.reason`` will say why.

        The other handlers of the present event still run. Return whether it counts: before ``min_epochs`` are done it
        does not.
        """
        return self._require_run("stop").stop(reason, self.epoch)

    def wrap_step(self, wrapper: Callable[[Step], Step]) -> None:
        """Put ``wrapper(step)`` in the place of the step: for handlers that do something else with a batch.

        Raises:
            ConfigurationError: in the script style, which has no step.
        """
        if self.stepper is None:
            raise ConfigurationError("This engine has no step to wrap. Write Engine(step, ...) or Trainer(...).")
        self.stepper = wrapper(self.stepper)

    # Evaluation ----------------------------------------------------------------------------------------

    def evaluate(self, data: DataSets) -> dict[str, Any]:
        """Return ``{"loss": ..., "acc": ...}`` over ``data``, without changing the run.

        Scalars are floats; any other metric (a confusion matrix) is a tensor on the CPU. Of several data sets by name,
        the values are ``{"clean_loss": ..., "noisy_loss": ...}``.
        """
        step, sets = self._require_step(), as_sets("data", data)
        with self._evaluation("test", sets):
            for batch in self._evaluation_batches("data", sets):
                record_output(self.current, step.evaluate(self, batch))
            values = self._values_of("test", sets)
        return {name.removeprefix("test_"): value for name, value in values.items()}

    def predict(self, data: Data, *, output: Callable[[Any], Any] | None = None, join: bool = True) -> Any:
        """Return the outputs of the part ``model`` over ``data``, on the CPU; on several ranks, each returns all.

        Args:
            data: an iterable of batches, or a function that returns one.
            output: what to keep of each batch's output, such as ``lambda output: output.logits``.
            join: join the outputs of all batches along their first dimension; otherwise, return a list of them.

        Raises:
            ConfigurationError: if there is no part ``model``, or ``output`` is not a function.
            DataError: if there is no batch, or outputs cannot be joined.
        """
        outputs = []
        for _, one in self._predictions(data, output):
            outputs.append(None if self.current.is_stand_in else tree_map(Tensor.cpu, one))
        if not self.ranks.several:
            return concatenate(outputs) if join else outputs
        in_parts = zip(*self.ranks.gather(outputs), strict=True)  # each batch, in the order of the ranks
        batches = [concatenate([part for part in parts if part is not None]) for parts in in_parts]
        return concatenate(batches) if join else batches

    def predictions(self, data: Data, *, output: Callable[[Any], Any] | None = None) -> Iterator[tuple[Any, Any]]:
        """Yield each batch and its output, one at a time, so that memory does not grow with the data.

        An output stays on its device and is what the model returns, or what ``output`` makes of it. The loop's body
        runs in eval mode and without gradients, as that of `validate`. On several ranks, each yields its part.

        Args and errors are those of `predict`.

        >>> engine = Engine(lambda engine, batch: None, model=torch.nn.Linear(2, 1))
        >>> data = [(torch.ones(2, 2), ["first", "second"]), (torch.ones(1, 2), ["third"])]
        >>> scores = {}
        >>> for (_, names), output in engine.predictions(data):
        ...     scores.update(zip(names, output.tolist()))
        >>> list(scores)
        ['first', 'second', 'third']
        """
        pairs = self._predictions(data, output)
        return (pair for pair in pairs if not self.current.is_stand_in)

    def _predictions(self, data: Data, output: Callable[[Any], Any] | None) -> Iterator[tuple[Any, Any]]:
        step = self._require_step()
        if "model" not in self.parts:
            raise ConfigurationError("predict needs the part named model. Write Engine(step, model=model, ...).")
        if output is not None and not callable(output):
            raise ConfigurationError(f"output is {output!r}, not a function. Write output=lambda output: ...")

        def loop() -> Iterator[tuple[Any, Any]]:
            check_data("data", data)
            with self._evaluation("predict", {"": data}):
                for batch in self._evaluation_batches("data", {"": data}):
                    with self.scope("forward"):
                        made = call_model(self.parts["model"], step.inputs(batch))
                    yield batch, made if output is None else output(made)

        return loop()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put modules into eval mode, with the weights that evaluations use, without gradients, for a ``with`` block.

        All is undone at the end: modes, weights, and random numbers, so that a handler that draws samples changes
        nothing in the training. Nothing can be recorded within the block.

        >>> model = torch.nn.Dropout()
        >>> with Engine(model=model).evaluating():
        ...     model.training
        False
        """
        outer, self.current = self.current, CurrentStage()
        try:
            with preserve_rng(), torch.no_grad(), self.parts.preserve_modes():
                for module in self.parts.modules().values():
                    module.eval()
                with self.scope("evaluation"):
                    yield
        finally:
            self.current = outer

    @contextmanager
    def _evaluation(self, name: str, sets: Mapping[str, Data]) -> Iterator[None]:
        """Be in a stage of evaluation, with fresh records; all is undone at the end."""
        outer = self.current
        outer_step, self.validation_step = self.validation_step, 0
        generators = [generator_states(data) for data in sets.values()]
        for one in sets:
            self.stages[label(name, one)].reset()
        try:
            with self.evaluating():
                if self._fixed_noise:
                    seed_everything(self.ranks.seed(self.seed or 0))
                self.current = self._stage_of(name, sets, next(iter(sets)))
                yield
        finally:
            for data, states in zip(sets.values(), generators, strict=True):
                set_generator_states(data, states)
            self.current = outer
            if outer.name not in ("", "train"):  # an evaluation within a validation
                self.validation_step = outer_step

    def _stage_of(self, name: str, sets: Mapping[str, Data], one: str) -> CurrentStage:
        lengths = [num_batches(data) for data in sets.values()]
        length = None if None in lengths else sum(number or 0 for number in lengths)
        return CurrentStage(name, self.stages[label(name, one)], length, one)

    def _evaluation_batches(self, what: str, sets: Mapping[str, Data], limit: int | None = None) -> Iterator[Any]:
        """Yield the batches of each data set; ``what`` names the argument, for messages."""
        for one, data in sets.items():
            self.current = current = self._stage_of(self.current.name, sets, one)
            batches, before = islice(self._read(what, data), limit), self.validation_step
            while True:
                try:
                    batch = next(batches)
                except StopIteration:
                    break
                except Exception as error:
                    self._add_reading_note(error, label(current.name, one), self.validation_step - before + 1)
                    raise
                self.validation_step += 1
                if self.step >= self._batch_ready.due:
                    batch = self._batch_ready.transform(lambda batch: BatchReady(self, batch), batch, self.step)
                current.batch, current.output, current.target = batch, None, NOTHING
                yield batch
            if self.validation_step == before:
                raise DataError(empty_message(f"{what}[{one!r}]" if one else what, data))

    def _values_of(self, name: str, sets: Iterable[str]) -> dict[str, Any]:
        """Return what a stage's data sets have recorded, under their names."""
        values: dict[str, Any] = {}
        for one in sets:
            values |= prefixed(label(name, one), self.stages[label(name, one)].compute())
        return values

    def _read(self, name: str, data: Data) -> Iterator[Any]:
        """Return the batches of an evaluation, of which each of several ranks reads its part."""
        if not self.ranks.several:
            return one_pass(data)
        return take_shares(self._division.read(name, data), self)

    def _validate(self, val: DataSets | None) -> None:
        if val is not None:
            step = self._require_step()
            for batch in self.validate(val):
                record_output(self.current, step.evaluate(self, batch))

    def _repeat_cut_validation(self, val: DataSets | None) -> None:
        """Make the validation in mid-epoch in which the run that is resumed was interrupted."""
        run = self.run
        if run.validation_was_cut and not run.data_exhausted:
            self._validate(val)

    # The life of a run ---------------------------------------------------------------------------------

    def _epochs(
        self, plan: Plan, feed: Feed, sets: tuple[str, ...] | None, resume: str | Path | None
    ) -> Generator[int, None, None]:
        """Yield each epoch; begin the run before the first and end it after the last, however it ends."""
        if self.run is not NO_RUN:
            raise EngineStateError("The engine is already running. Let this run end first, or make a second Engine.")
        check_joined(self.ranks)
        replayed = begin_replay(self)  # None, unless the process is there to make a step of an earlier run again
        with self.scope("lock"):
            found = replayed or (None if resume is None else find_state(self, resume))
            is_resuming, goes_on = found is not None or resume is not None, False
            while True:
                run = self._begin_run(plan, feed, sets, is_resuming=is_resuming, goes_on=goes_on)
                found = yield from self._epochs_of(run, found)
                if found is None:
                    return
                is_resuming = goes_on = True  # the run has gone back to an earlier state

    def _epochs_of(self, run: Run, found: Found | None) -> Generator[int, None, Found | None]:
        """Yield the epochs of one run; return the state to go on from, if it has gone back to an earlier one."""
        try:
            with self.parts.preserve_modes(), self.scope("fit"), handled_signals(run.interrupt):
                try:
                    self._set_to_training()
                    self.emit(FitStart(self))
                    if found is not None:
                        self._resume(run, *found)
                    elif run.is_resuming:
                        logger.info("No checkpoint yet: the run starts from the beginning.")
                    while not run.settle(self.epoch, self.step):
                        if run.phase is Phase.BETWEEN:
                            self._begin_epoch(run)
                        with self.scope("epoch"):
                            yield self.epoch
                        self._end_epoch(run)
                    if run.interrupted:
                        self.emit(Settled(self))  # once more: the signal may have come after the last one
                except BaseException as error:
                    self._end_run(run, error)
                    raise
                self._end_run(run)
        except BaseException as error:
            run.fail(error)  # unless that was done: this one came while the run was beginning or ending
            raise
        finally:
            self._end_training_loops()
            run.close()
            self.run, self.current = NO_RUN, CurrentStage()
        return run.goes_back_to

    def _begin_run(
        self, plan: Plan, feed: Feed, sets: tuple[str, ...] | None, *, is_resuming: bool, goes_on: bool
    ) -> Run:
        if self.epoch and not goes_on:
            logger.info("Continuing from epoch %d, step %d.", self.epoch, self.step)
        elif self.seed is not None and not self.epoch:
            seed_everything(self.ranks.seed(self.seed))
        self.num_fits += 1
        self.history.reason, self.history.interrupted = "", None
        self.listeners.rewind()
        self.update.begin_run()
        self.run = Run(
            plan,
            feed,
            self.ranks,
            epoch=self.epoch,
            step=self.step,
            validation_sets=sets,
            is_resuming=is_resuming,
            goes_on=goes_on,
        )
        return self.run

    def _set_to_training(self) -> None:
        model = self.parts.modules().get("model")
        if model is not None and not model.training:
            logger.info("The model was in eval mode: set to training for the run.")
            model.train()

    def _resume(self, run: Run, state: dict[str, Any], source: Path) -> None:
        counters = load_state(self, state, source)
        self.epoch, self.step = counters["epoch"], counters["step"]
        self.num_updates, self.num_skipped_updates = counters["num_updates"], counters["num_skipped_updates"]
        self.num_validations = counters["num_validations"]
        self.listeners.rewind()
        logger.info("Resumed from %s: epoch %d, step %d.", source, self.epoch, self.step)
        if run.settle(self.epoch, self.step) and not run.breaks_off:
            logger.info(
                "The run is finished (%s). Pass more epochs or steps to continue.", run.stop_reason or "its goal"
            )

    def _begin_epoch(self, run: Run) -> None:
        self.epoch += 1
        self.stages["train"].reset()
        run.begin_epoch(self.stages["train"], self.step)
        self.emit(EpochStart(self))

    def _begin_training(self, run: Run, data: Data) -> Iterator[Any]:
        if run.breaks_off or (self.epoch_step and run.ends_epoch):
            return iter(())  # as when resumed after the last batch of an epoch, whose end is still to come
        batches = run.feed.begin(data, self.epoch, self.step)
        run.epoch_length = run.plan.length_of_epoch(run.feed.length)
        run.settle(self.epoch, self.step)
        return take_shares(batches, self) if self.ranks.several else batches

    def _end_step(self, run: Run) -> None:
        """Announce the end of the present step, if that was not done."""
        if self.step > run.ended_step:
            run.ended_step = self.step
            if self.step >= self._step_end.due:
                outer, self.current = self.current, run.training_stage  # a loop that was left has no stage any more
                self._step_end.emit(StepEnd(self, self.batch, self.output), self.step)
                self.current = outer

    def _end_training(self, run: Run) -> None:
        if run.breaks_off:
            return
        run.feed.end(self.epoch, self.epoch_step, is_complete=run.ends_epoch)
        run.phase = Phase.FLUSHING
        self._flush(run)
        run.end_pass()

    def _flush(self, run: Run) -> None:
        """Make the update of a window that the epoch's end cut short; that is still training."""
        self.current = run.training_stage
        self.update.flush()
        self.current = CurrentStage()

    def _end_training_loops(self) -> None:
        """Let an iterator that somebody kept give no further batch."""
        for reference in self._training_loops:
            if (loop := reference()) is not None:
                loop.close()
        self._training_loops.clear()

    def _end_epoch(self, run: Run) -> None:
        self._end_training_loops()
        self._end_step(run)  # still open if the user's loop was left by a break
        if run.is_cut:
            return
        self._flush(run)
        run.phase = Phase.ENDING
        self.update.check_heard()
        with preserve_rng():
            metrics = run.changed(prefixed("train", self.stages["train"].compute())) | run.last_validation
            self.history.add_epoch(self.epoch, self.step, scalars(metrics))
            self.emit(EpochEnd(self, metrics))
        run.phase = Phase.BETWEEN
        run.settle(self.epoch, self.step, is_announced=True)
        self.emit(Settled(self))

    def _end_run(self, run: Run, error: BaseException | None = None) -> None:
        """Announce the end to every handler, however the run ended."""
        self.history.reason = reason = run.reason(self.epoch, self.step, error)
        self.history.interrupted = run.interrupted
        if error is not None and not isinstance(error, GeneratorExit):
            error.add_note(f"At step {self.step}, batch {self.epoch_step} of epoch {self.epoch}.")
            run.fail(error)
            if "DataLoader worker" in str(error):  # torch interrupts whatever runs when one of its workers has died
                error.add_note(
                    "A loader's worker died. Look for a lack of memory or shared memory; try num_workers=0."
                )
            self._emit_last(RunFailed(self, error), error)
        self._emit_last(FitEnd(self, reason), error)

    def _emit_last(self, event: RunFailed | FitEnd, error: BaseException | None) -> None:
        """Let every handler hear the end; an error of theirs never hides the one that ended the run."""
        try:
            self.listeners.channel(type(event)).emit_to_all(event, self.num_fits)
        except Exception as second:
            if error is None:
                raise
            if isinstance(error, GeneratorExit):  # a loop that was left: nobody sees its notes
                logger.error("A handler failed while the run was ending.", exc_info=second)
            error.add_note(f"While the run was ending, too: {second!r}")

    # Small things --------------------------------------------------------------------------------------

    def _expect(
        self, plan: Plan, train: Data, val: DataSets | None
    ) -> tuple[Feed, Callable[[Any], StepOutput], tuple[str, ...]]:
        """Refuse what a fit could not run with, before it begins.

        Return its feed, what trains on a batch, and the names of the validation data.
        """
        step, feed = self._require_step(), self._feed(plan.epoch_length)
        feed.open(train)
        sets = {} if val is None else as_sets("val", val)
        if self.ranks.several and self.ranks.divides:
            for data in sets.values():
                self._division.of("val", data)
        if not sets and plan.validate_every is not None:
            raise ConfigurationError(
                f"validate_every={plan.validate_every!r} was passed without validation data. "
                "Pass them, too: fit(train, val, ...); or leave it out."
            )
        return feed, partial(step.train, self), tuple(sets)

    def _feed(self, epoch_length: int | None) -> Feed:
        ranks = self.ranks
        if ranks.several and not ranks.divides:
            return Feed(ranks.seed(self.seed or 0), epoch_length, ranks=ranks)
        return Feed(self.seed, epoch_length, self._division if ranks.several else None)

    def _require_step(self) -> Step:
        if self.stepper is None:
            raise ConfigurationError(
                "This engine has no step. Write Engine(step, ...), or loop over engine.epochs(n)."
            )
        return self.stepper

    def _require_run(self, what: str) -> Run:
        if self.run is NO_RUN:
            raise EngineStateError(
                f"engine.{what} was called outside a run. Write: for epoch in engine.epochs(n): ..."
            )
        return self.run

    def _add_reading_note(self, error: Exception, stage: str, position: int) -> None:
        error.add_note(f"While reading batch {position} of the {stage} data in epoch {self.epoch}.")

    @property
    def epoch_step(self) -> int:
        """The number of the present step within its epoch; 0 between runs."""
        return 0 if self.run is NO_RUN else self.step - self.run.step_before_epoch

    @property
    def training(self) -> bool:
        """Whether the present stage is training."""
        return self.current.name == "train"

    @property
    def batch(self) -> Any:
        """The present batch."""
        return self.current.batch

    @property
    def output(self) -> Any:
        """What the model or the step made of the present batch."""
        return self.current.output

    @property
    def directory(self) -> Path | None:
        """Where handlers write their files; None without a `RunDirectory`."""
        return next((one.run_directory for one in self.listeners.callbacks if one.run_directory is not None), None)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise EngineStateError(
            "An engine cannot be copied or pickled, because its handlers hold it. "
            "Make a second one, with callbacks of its own; a RunCheckpoint saves what a run has reached."
        )

    # Listening -----------------------------------------------------------------------------------------

    def attach(self, callback: Callback) -> None:
        """Attach one more callback; see `Listeners.attach`."""
        self.listeners.attach(callback)

    def subscribe(self, event: type[E], handler: Callable[[E], object], when: object = None) -> Subscription[E]:
        """Call ``handler(event)`` whenever ``event`` happens and ``when`` allows; ``.cancel()`` the result to stop.

        Raises:
            HandlerError: if ``event`` is not an event class, or the handler cannot be called with one event.
            ConfigurationError: if ``when`` is not a filter.
        """
        return self.listeners.subscribe(event, handler, when)

    def on(self, event: type[E], when: object = None) -> Callable[[Callable[[E], object]], Callable[[E], object]]:
        """Subscribe the decorated function: ``@engine.on(StepEnd, when=every(100))``."""
        self.listeners.channel(event)  # refuses what is not an event, as in @engine.on without its parentheses

        def decorate(handler: Callable[[E], object]) -> Callable[[E], object]:
            self.subscribe(event, handler, when)
            return handler

        return decorate

    def emit(self, event: Event) -> None:
        """Announce an event, your own or a built-in one, to its handlers."""
        channel = self.listeners.channel(type(event))
        count = getattr(self, event.counter)
        if count >= channel.due:
            channel.emit(event, count)

    def scope(self, scope: Scope) -> AbstractContextManager[Any]:
        """Return the context that callbacks put around ``scope``; write ``with engine.scope("forward"):``."""
        return self.listeners.scope(scope)

    def explain(self, *, times: bool = False) -> str:
        """Return which handlers run, when and in which order, one event a paragraph, in firing order.

        With ``times``, and a `Profile` attached, also how often each was called and how long that took.
        """
        return self.listeners.explain(times=times)
