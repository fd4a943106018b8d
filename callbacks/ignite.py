"""pytorch-ignite's own handlers and metrics on this engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from camshaft.engine import (
    BatchReady,
    Callback,
    Engine,
    EngineStateError,
    EpochEnd,
    EpochStart,
    FitEnd,
    FitStart,
    LossReady,
    RunFailed,
    Settled,
    StepEnd,
    Trainer,
    ValidationEnd,
    ValidationStart,
    ValidationStepEnd,
)
from camshaft.engine.batch import tree_map

if TYPE_CHECKING:
    from ignite.engine import Engine as IgniteEngine


class Output(tuple[Any, ...]):
    """What ignite's ``state.output`` is on a `Trainer`: ``(output, target)``, which is what its metrics take.

    Nothing in it holds gradients. ``loss`` is the training loss; in validation it is None.
    """

    loss: Tensor | None = None


class Ignite(Callback):
    """Lets pytorch-ignite's handlers and metrics run on this engine.

    ``train`` and ``val`` are real ``ignite.engine.Engine`` objects, to which anything of ignite's attaches. They
    have no loop of their own: their events fire and their states change as this engine trains and validates.
    ``state.output`` is an `Output` on a `Trainer`, and what the step returned on another engine;
    ``state.metrics`` holds this engine's values, such as ``val_acc``, beside those that ignite's metrics put there.

    A handler that calls ``train.terminate()`` stops the run after the present step. After ``val.terminate()``
    ignite's handlers hear nothing more of the present validation, which itself goes on.

    Attributes:
        train: an ``ignite.engine.Engine`` that follows the training.
        val: another that follows each validation, as an evaluator of ignite's that is run on the validation data.

    Raises:
        EngineStateError: when ``run`` is called on either, or a handler calls ``terminate_epoch`` or ``interrupt``.

    >>> import torch
    >>> from ignite.metrics import MeanSquaredError
    >>> bridge = Ignite()
    >>> MeanSquaredError().attach(bridge.train, "mse")
    >>> model = torch.nn.Linear(2, 1)
    >>> trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.MSELoss(), callbacks=[bridge])
    >>> history = trainer.fit([(torch.ones(4, 2), torch.ones(4, 1))] * 8, epochs=1)
    >>> abs(bridge.train.state.metrics["mse"] - history["train_loss"][0]) < 1e-6
    True
    """

    def __init__(self) -> None:
        self._train = _Follower(_stop_run)
        self._val = _Follower(lambda engine: True)  # a validation cannot be cut short
        self.train: IgniteEngine = self._train.engine
        self.val: IgniteEngine = self._val.engine
        self._loss: Tensor | None = None

    def on_fit_start(self, event: FitStart) -> None:
        """Fire STARTED."""
        engine = event.engine
        length = engine.epoch_length or (engine.plan.epoch_length if engine.plan else None)
        self._train.start(engine, engine.epoch, engine.step, engine.last_epoch, engine.last_step, length)

    def on_epoch_start(self, event: EpochStart) -> None:
        """Fire EPOCH_STARTED, and GET_BATCH_STARTED for the first batch."""
        self._train.start_epoch(event.engine, event.engine.epoch)

    def on_batch_ready(self, event: BatchReady) -> Any:
        """Fire GET_BATCH_COMPLETED and ITERATION_STARTED, where a handler may replace ``state.batch``."""
        engine = event.engine
        if engine.stage == "train":
            return self._train.start_iteration(engine, event.batch, engine.step, engine.epoch_length)
        if engine.stage == "val":
            return self._val.start_iteration(engine, event.batch, engine.validation_step, engine.validation_length)
        return None

    def on_loss_ready(self, event: LossReady) -> None:
        """Keep the loss for `Output`."""
        self._loss = event.loss.detach()

    def on_step_end(self, event: StepEnd) -> None:
        """Fire ITERATION_COMPLETED."""
        self._train.end_iteration(event.engine, _output(event, self._loss))

    def on_settled(self, event: Settled) -> None:
        """Fire GET_BATCH_STARTED for the next batch of the epoch."""
        engine = event.engine
        if engine.training:
            self._train.obey(engine)  # a handler of a validation in mid-epoch may have terminated the training
            if engine.epoch_step != engine.epoch_length and engine.step < engine.last_step:
                self._train.fire(engine, "GET_BATCH_STARTED")

    def on_validation_start(self, event: ValidationStart) -> None:
        """Fire STARTED, EPOCH_STARTED and GET_BATCH_STARTED."""
        self._val.start(event.engine, 0, 0, 1, math.inf, event.engine.validation_length)
        self._val.start_epoch(event.engine, 1)

    def on_validation_step_end(self, event: ValidationStepEnd) -> None:
        """Fire ITERATION_COMPLETED, and GET_BATCH_STARTED if there are more batches."""
        engine = event.engine
        self._val.end_iteration(engine, _output(event))
        if engine.validation_step != engine.validation_length:
            self._val.fire(engine, "GET_BATCH_STARTED")

    def on_validation_end(self, event: ValidationEnd) -> None:
        """Fire EPOCH_COMPLETED and COMPLETED."""
        self._val.end_epoch(event.engine, event.metrics)
        self._val.end()

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Fire EPOCH_COMPLETED."""
        self._train.end_epoch(event.engine, event.metrics)

    def on_run_failed(self, event: RunFailed) -> None:
        """Fire EXCEPTION_RAISED, on ``val`` too if it was at work; the error goes on whatever handlers do."""
        self._val.fail(event.error)
        self._train.fail(event.error)

    def on_fit_end(self, event: FitEnd) -> None:
        """Fire COMPLETED, unless the run failed."""
        self._train.end()


class _Follower:
    """An engine of ignite's, its state and events driven from outside.

    Args:
        end: asked when a handler has called ``terminate``; returns whether the run of this engine is over.
    """

    def __init__(self, end: Callable[[Engine], bool]) -> None:
        from ignite.engine import Engine as IgniteEngine
        from ignite.engine import Events

        self.engine = IgniteEngine(_refuse_to_run)
        self._events = Events
        self._state: Any = self.engine.state
        self._end = end
        self._started = False  # COMPLETED is still to come
        self._listening = False  # other events are, too
        self._start_time = self._epoch_start_time = 0.0

    def fire(self, engine: Engine, name: str) -> None:
        if self._listening:
            self.engine.fire_event(self._events[name])
            self.obey(engine)

    def obey(self, engine: Engine) -> None:
        """Do what a handler asked for, as ignite's own loop does after each event."""
        if self.engine.should_interrupt or self.engine.should_terminate_single_epoch:
            raise EngineStateError(
                "A handler of ignite's called interrupt() or terminate_epoch(), which this engine does not do. "
                "Call terminate(), which ends the run."
            )
        if self._listening and self.engine.should_terminate:
            if self._end(engine):
                self._listening = False
                self.engine.fire_event(self._events.TERMINATE)
            else:
                self.engine.should_terminate = False

    def start(
        self, engine: Engine, epoch: int, step: int, last_epoch: float, last_step: float, length: int | None
    ) -> None:
        state = self._state
        state.epoch, state.iteration, state.epoch_length = epoch, step, length
        state.max_epochs = None if last_epoch == math.inf else int(last_epoch)
        state.max_iters = None if last_step == math.inf else int(last_step)
        self.engine.should_terminate = self.engine.should_terminate_single_epoch = False
        self.engine.should_interrupt = False
        self._started = self._listening = True
        self._start_time = time.time()
        self.fire(engine, "STARTED")

    def start_epoch(self, engine: Engine, epoch: int) -> None:
        self._state.epoch = epoch
        self._epoch_start_time = time.time()
        self.fire(engine, "EPOCH_STARTED")
        self.fire(engine, "GET_BATCH_STARTED")

    def start_iteration(self, engine: Engine, batch: Any, step: int, length: int | None) -> Any:
        state = self._state
        state.batch, state.output, state.epoch_length = batch, None, length
        self.fire(engine, "GET_BATCH_COMPLETED")
        state.iteration = step  # ignite counts the step only now
        self.fire(engine, "ITERATION_STARTED")
        return state.batch

    def end_iteration(self, engine: Engine, output: Any) -> None:
        self._state.output = output
        self.fire(engine, "ITERATION_COMPLETED")

    def end_epoch(self, engine: Engine, metrics: Mapping[str, Any]) -> None:
        self._state.metrics.update(metrics)
        self._state.times["EPOCH_COMPLETED"] = time.time() - self._epoch_start_time
        self.fire(engine, "EPOCH_COMPLETED")

    def end(self) -> None:
        if self._started and self.engine.should_terminate != "skip_completed":
            self._state.times["COMPLETED"] = time.time() - self._start_time
            self.engine.fire_event(self._events.COMPLETED)
        self._started = self._listening = False

    def fail(self, error: BaseException) -> None:
        if not self._started:
            return
        self._started = self._listening = False
        try:
            self.engine._fire_event(self._events.EXCEPTION_RAISED, error)  # the public way passes no argument
        except BaseException as again:
            if again is not error:  # ignite's handlers raise it again, or ignite would swallow it
                raise


def _output(event: StepEnd | ValidationStepEnd, loss: Tensor | None = None) -> Any:
    if not isinstance(event.engine, Trainer):
        return event.output
    target = event.engine.prepare_batch(event.batch)[1]
    output = Output((tree_map(Tensor.detach, event.output), target))
    output.loss = loss
    return output


def _stop_run(engine: Engine) -> bool:
    engine.stop("a handler of pytorch-ignite called terminate()")
    return engine.step >= engine.last_step  # not so if the run must go on, for min_epochs


def _refuse_to_run(engine: Any, batch: Any) -> NoReturn:
    raise EngineStateError(
        "This engine of ignite's follows another and has no loop of its own. "
        "Call fit(train, val, epochs=...) on the engine that the Ignite callback is attached to."
    )
