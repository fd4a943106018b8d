"""pytorch-ignite's own handlers and metrics on this engine."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from camshaft.engine import (
    NOTHING,
    BatchReady,
    Callback,
    CheckpointError,
    ConfigurationError,
    Engine,
    EngineStateError,
    EpochEnd,
    EpochStart,
    FitEnd,
    FitStart,
    GradientsReady,
    LossReady,
    Ranks,
    RunFailed,
    Settled,
    StepEnd,
    ValidationEnd,
    ValidationStart,
    ValidationStepEnd,
    check_plain,
    tree_map,
)

if TYPE_CHECKING:
    from ignite.engine import Engine as IgniteEngine


logger = logging.getLogger("camshaft")


class Output(tuple[Any, ...]):
    """What ignite's ``state.output`` is on a `Trainer`: ``(output, target)``, which is what its metrics take.

    Nothing in it holds gradients. ``loss`` is the training loss; in validation it is None.
    """

    loss: Tensor | None = None


class Ignite(Callback):
    """Lets pytorch-ignite's handlers and metrics run on this engine.

    ``train`` and ``val`` are real ``ignite.engine.Engine`` objects, to which anything of ignite's attaches. They
    have no loop of their own: their events fire and their states change as this engine trains and validates.
    ``state.output`` is an `Output` on a `Trainer`, and on another engine what the step measured or else returned;
    ``state.metrics`` holds this engine's values, such as ``val_acc``, beside those that ignite's metrics put there.
    Gradients are cleared before a step ends: to read them, attach to the event ``"gradients_ready"`` of ``train``.

    A handler that calls ``train.terminate()`` stops the run after the present step. After ``val.terminate()``
    ignite's handlers hear nothing more of the present validation, which itself continues.

    Attributes:
        train: an ``ignite.engine.Engine`` that follows the training.
        val: another that follows each validation, like an evaluator that is run on the validation data.

    Raises:
        EngineStateError: when ``run`` is called on either, or a handler calls ``terminate_epoch`` or ``interrupt``.

    >>> import torch
    >>> from ignite.metrics import MeanSquaredError
    >>> from camshaft.engine import Trainer
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
        self._val = _Follower(lambda engine: True)  # the validation continues, but its handlers hear no more of it
        self._events = self._train.events
        self.train: IgniteEngine = self._train.engine
        self.val: IgniteEngine = self._val.engine
        self.train.register_events("gradients_ready", event_to_attr={"gradients_ready": "iteration"})
        self._loss: Tensor | None = None
        self._ranks = Ranks()  # until it is attached
        self._has_seen = False  # whether the metrics have seen anything in this run
        self._is_open = False  # whether they are in the middle of an epoch

    def attach(self, engine: Engine) -> None:
        """Follow the engine."""
        super().attach(engine)
        self._ranks = engine.ranks

    def on_fit_start(self, event: FitStart) -> None:
        """Fire STARTED."""
        engine, run = event.engine, event.engine.run
        self._has_seen = self._is_open = False
        if self._ranks.several:
            _check_ranks([*self._train.metrics(), *self._val.metrics()], self._ranks)
        self._train.start(
            engine,
            epoch=engine.epoch,
            iteration=engine.step,
            epoch_length=run.epoch_length,
            max_epochs=None if run.last_epoch == math.inf else int(run.last_epoch),
            max_iters=None if run.last_step == math.inf else int(run.last_step),
        )

    def on_epoch_start(self, event: EpochStart) -> None:
        """Fire EPOCH_STARTED, and GET_BATCH_STARTED for the first batch."""
        self._train.start_epoch(event.engine, event.engine.epoch)

    def on_batch_ready(self, event: BatchReady) -> Any:
        """Fire GET_BATCH_COMPLETED and ITERATION_STARTED, where a handler may replace ``state.batch``."""
        engine = event.engine
        if engine.current.name == "train":  # a resumed run knows its place by its first batch only
            side, step, place = (
                self._train,
                engine.step,
                {"epoch": engine.epoch, "epoch_length": engine.run.epoch_length},
            )
        elif engine.current.name == "val":
            side, step, place = self._val, engine.validation_step, {"epoch_length": engine.current.length}
        else:
            return None
        place["iteration"] = step - 1
        side.fire(engine, self._events.GET_BATCH_COMPLETED, batch=event.batch, output=None, **place)
        side.fire(engine, self._events.ITERATION_STARTED, iteration=step)  # ignite counts the step only now
        return side.state.batch if side.listening else None

    def on_loss_ready(self, event: LossReady) -> None:
        """Keep the loss for `Output`."""
        self._loss = event.loss.detach()

    def on_gradients_ready(self, event: GradientsReady) -> None:
        """Fire the event ``"gradients_ready"``, which ignite itself does not have."""
        self._train.fire(event.engine, "gradients_ready")

    def on_step_end(self, event: StepEnd) -> None:
        """Fire ITERATION_COMPLETED."""
        self._has_seen = self._is_open = True
        self._train.complete(event.engine, _output(event, self._loss))

    def on_settled(self, event: Settled) -> None:
        """Fire GET_BATCH_STARTED for the next batch of the epoch."""
        engine = event.engine
        if engine.training:
            self._train.obey(engine)  # a handler of a validation in mid-epoch may have terminated the training
            if engine.epoch_step != engine.run.epoch_length and not engine.run.ends_epoch:
                self._train.fire(engine, self._events.GET_BATCH_STARTED)

    def on_validation_start(self, event: ValidationStart) -> None:
        """Fire STARTED, EPOCH_STARTED and GET_BATCH_STARTED."""
        engine = event.engine
        if self._train.listening:  # ignite knows no validation after terminate()
            self._val.start(engine, epoch=0, iteration=0, epoch_length=engine.current.length, max_epochs=1)
            self._val.start_epoch(engine, 1)

    def on_validation_step_end(self, event: ValidationStepEnd) -> None:
        """Fire ITERATION_COMPLETED, and GET_BATCH_STARTED for the next batch."""
        engine = event.engine
        self._val.complete(engine, _output(event))
        if engine.validation_step != engine.current.length:
            self._val.fire(engine, self._events.GET_BATCH_STARTED)

    def on_validation_end(self, event: ValidationEnd) -> None:
        """Fire EPOCH_COMPLETED and COMPLETED."""
        self._val.end_epoch(event.engine, event.metrics)
        self._val.end()

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Fire EPOCH_COMPLETED."""
        self._is_open = False
        self._train.end_epoch(event.engine, event.metrics)

    def on_run_failed(self, event: RunFailed) -> None:
        """Fire EXCEPTION_RAISED, on ``val`` too during a validation; the error still reaches the caller."""
        self._val.fail(event.error)
        self._train.fail(event.error)

    def on_fit_end(self, event: FitEnd) -> None:
        """Fire COMPLETED, unless the run failed."""
        self._train.end()

    def state_dict(self) -> dict[str, Any]:
        """Return what the metrics attached to ``train`` have seen on each rank, and whether their epoch is open."""
        own = [_state_of(metric) for metric in self._train.metrics()] if self._has_seen else []
        return {"is_open": self._is_open, "ranks": self._ranks.gather(own) if self._has_seen else []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the states of the metrics, if as many metrics are attached as were saved.

        Raises:
            CheckpointError: if they were saved in the middle of an epoch on another number of ranks.
        """
        self._is_open, saved = state["is_open"], state["ranks"]
        if not saved:
            return
        self._has_seen = True
        if len(saved) != self._ranks.data_world and self._is_open and any(saved):
            raise CheckpointError(
                f"Metrics of ignite's were saved in the middle of an epoch on {len(saved)} ranks, and cannot be put "
                f"together for {self._ranks.data_world}. Resume on as many ranks."
            )
        self._load(saved[self._ranks.data_rank if len(saved) == self._ranks.data_world else 0])

    def _load(self, states: list[dict[str, Any] | None]) -> None:
        metrics = self._train.metrics()
        if len(metrics) != len(states):
            logger.warning("%d metrics of ignite's were saved, and %d are attached. They begin again.",
                           len(states), len(metrics))  # fmt: skip
            return
        for metric, saved in zip(metrics, states, strict=True):
            if saved is not None:
                metric._load_state_dict_per_rank(saved)


def _state_of(metric: Any) -> dict[str, Any] | None:
    """Return what a metric has seen in this epoch; None if that cannot be saved safely."""
    state: dict[str, Any] = metric._state_dict_per_rank()  # state_dict() asks all ranks for theirs
    try:
        check_plain(state, "metric")
    except CheckpointError:
        return None
    return state


def _check_ranks(metrics: list[Any], ranks: Ranks) -> None:
    """Refuse metrics of which ignite cannot join those of the ranks, or would count some samples twice."""
    for metric in metrics:
        if ranks.tensor_size > 1:
            raise ConfigurationError(
                f"ignite's {type(metric).__name__} adds up what all ranks have seen, and {ranks.tensor_size} of them "
                "see the same samples. Use a metric of torchmetrics, or compute it from what predict returns."
            )
        if any(isinstance(value, list) for value in metric._state_dict_per_rank().values()):
            raise ConfigurationError(
                f"ignite's {type(metric).__name__} keeps every sample, and ignite can join those of several ranks "
                "only if all have as many. Take a metric of torchmetrics, or compute it from what predict returns."
            )


@contextmanager
def _idle(metrics: list[Any]) -> Iterator[None]:
    """Let metrics take nothing in; a running average does, because it asks all ranks for each value."""
    from ignite.metrics import RunningAverage

    idle = [metric for metric in metrics if not isinstance(metric, RunningAverage)]
    for metric in idle:
        metric.update = lambda output: None
    try:
        yield
    finally:
        for metric in idle:
            del metric.update


class _Follower:
    """An engine of ignite's whose state and events are driven from outside.

    Args:
        end: called when a handler has called ``terminate``; returns whether that is granted.
    """

    def __init__(self, end: Callable[[Engine], bool]) -> None:
        from ignite.engine import Engine as IgniteEngine
        from ignite.engine import Events

        self.engine = IgniteEngine(_refuse_to_run)
        self.state: Any = self.engine.state
        self.events = Events
        self._end = end
        self._started = False  # COMPLETED is still to come
        self.listening = False  # whether other events are still to come; if not, the state no longer changes
        self._start_time = self._epoch_start_time = 0.0

    def metrics(self) -> list[Any]:
        """Return the metrics that are attached, in the order of attachment."""
        from ignite.metrics import Metric

        handlers = [handler for handlers in self.engine._event_handlers.values() for handler, *_ in handlers]
        owners = [getattr(handler, "__self__", None) for handler in handlers]
        return list({id(owner): owner for owner in owners if isinstance(owner, Metric)}.values())

    def start(self, engine: Engine, **state: Any) -> None:
        self.engine.should_terminate = self.engine.should_terminate_single_epoch = self.engine.should_interrupt = False
        self._started = self.listening = True
        self._start_time = self._epoch_start_time = time.time()
        self.fire(engine, self.events.STARTED, **state)

    def start_epoch(self, engine: Engine, epoch: int) -> None:
        self._epoch_start_time = time.time()
        self.fire(engine, self.events.EPOCH_STARTED, epoch=epoch)
        self.fire(engine, self.events.GET_BATCH_STARTED)

    def fire(self, engine: Engine, event: Any, **state: Any) -> None:
        if self.listening:
            vars(self.state).update(state)
            self.engine._fire_event(event)  # as ignite's own loop does; fire_event() looks the name up each time
            self.obey(engine)

    def complete(self, engine: Engine, output: Any) -> None:
        """Fire ITERATION_COMPLETED; metrics leave out a batch that is there only for the communication."""
        stands_in = engine.current.is_stand_in
        with _idle(self.metrics()) if stands_in else nullcontext():
            self.fire(engine, self.events.ITERATION_COMPLETED, output=output)

    def obey(self, engine: Engine) -> None:
        """Do what a handler asked for, as ignite's own loop does after each event."""
        if self.engine.should_interrupt or self.engine.should_terminate_single_epoch:
            raise EngineStateError(
                "A handler of ignite's called interrupt() or terminate_epoch(), which this engine cannot do. "
                "Call terminate(), which ends the run."
            )
        if self.listening and self.engine.should_terminate:
            if self._end(engine):
                self.listening = False
                self.engine.fire_event(self.events.TERMINATE)
            else:
                self.engine.should_terminate = False

    def end_epoch(self, engine: Engine, metrics: Mapping[str, Any]) -> None:
        self.state.metrics.update(metrics)
        self.state.times["EPOCH_COMPLETED"] = time.time() - self._epoch_start_time
        self.fire(engine, self.events.EPOCH_COMPLETED)

    def end(self) -> None:
        if self._started and self.engine.should_terminate != "skip_completed":
            self.state.times["COMPLETED"] = time.time() - self._start_time
            self.engine.fire_event(self.events.COMPLETED)
        self._started = self.listening = False

    def fail(self, error: BaseException) -> None:
        if not self._started:
            return
        self._started = self.listening = False
        try:
            self.engine._fire_event(self.events.EXCEPTION_RAISED, error)  # fire_event() cannot pass it
        except BaseException as again:
            if again is not error:  # ignite's handlers raise it again, because ignite would swallow it
                raise


def _output(event: StepEnd | ValidationStepEnd, loss: Tensor | None = None) -> Any:
    target = event.engine.current.target
    if event.output is None or target is NOTHING:
        return event.output
    output = Output((tree_map(Tensor.detach, event.output), target))
    output.loss = loss
    return output


def _stop_run(engine: Engine) -> bool:
    return engine.stop("a handler of pytorch-ignite called terminate()")


def _refuse_to_run(engine: Any, batch: Any) -> NoReturn:
    raise EngineStateError(
        "This engine of ignite's follows another and has no loop of its own. "
        "Call fit(train, val, epochs=...) on the engine that the Ignite callback is attached to."
    )
