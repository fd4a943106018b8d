"""What is done with one batch: handed to the engine, which owns the loop around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

from .batch import call_model, outline, prepare_batch
from .dispatch import describe
from .errors import ConfigurationError, DataError, can_take, ran_out_of_memory
from .loss_check import check_loss
from .stages import refuse_outside_a_stage

if TYPE_CHECKING:
    from .engine import Engine
    from .record import Record

StepOutput = Tensor | Mapping[str, Any] | None
StepFunction = Callable[["Engine", Any], StepOutput]
Loss = Callable[..., Any]
Terms = Mapping[str, Any]  # of a loss, by name
_NO_TERMS: Terms = {}


@runtime_checkable
class Step(Protocol):
    """What an engine does with a batch."""

    def train(self, engine: Engine, batch: Any, /) -> StepOutput:
        """Train on a batch, and return what to record: None, a tensor (recorded as ``loss``) or ``{name: tensor}``."""

    def evaluate(self, engine: Engine, batch: Any, /) -> StepOutput:
        """Evaluate a batch, and return what to record."""

    def inputs(self, batch: Any, /) -> Any:
        """Return what the model is called with."""


class FunctionStep:
    """A function ``step(engine, batch)`` as a step: it looks at ``engine.training`` to know what to do."""

    def __init__(self, function: StepFunction) -> None:
        if not callable(function):
            raise ConfigurationError(f"step is {function!r}, not a function. Write def step(engine, batch): ...")
        if not can_take(function, 2):
            takes = ", ".join(inspect.signature(function).parameters) or "no arguments"
            raise ConfigurationError(
                f"{describe(function)} takes {takes}, but a step is called with the engine and the batch. "
                "Write def step(engine, batch): ..."
            )
        self.train = self.evaluate = function

    def inputs(self, batch: Any, /) -> Any:
        """Return the first of a pair, and otherwise what `prepare_batch` takes for the inputs."""
        return prepare_batch(batch)[0]


def as_step(step: StepFunction | Step) -> Step:
    """Return a function as a step, and a step as it is.

    Raises:
        ConfigurationError: for a class, or anything else.
    """
    if isinstance(step, type):
        raise ConfigurationError(f"step is the class {step.__name__}, not an instance. Did you forget ()?")
    return step if isinstance(step, Step) else FunctionStep(step)


class SupervisedStep:
    """Forward, loss, update, record: the step of a `Trainer`.

    Model and loss are the parts ``model`` and ``loss_fn`` of the engine that runs it.

    Args:
        loss_fn: a module or function that returns the mean loss over the batch; or a dict of means by name, of which
            ``loss`` is differentiated, and all are recorded.
        prepare_batch: splits a batch into ``(inputs, target)``.
        optimizer: the names of the optimizers that step together; None for the part ``optimizer``.
    """

    def __init__(
        self,
        loss_fn: Loss,
        prepare_batch: Callable[[Any], tuple[Any, Any]] = prepare_batch,
        optimizer: Sequence[str] | None = None,
    ) -> None:
        self.prepare_batch = prepare_batch
        self.optimizer = optimizer
        self._num_loss_arguments = _num_required(loss_fn)

    def train(self, engine: Engine, batch: Any, /) -> None:
        """Train on one batch."""
        output, target, loss, terms = self._forward(engine, batch)
        current = engine.current
        record = current.record or refuse_outside_a_stage()
        weight = 0 if current.is_stand_in else record.num_samples(batch)
        engine.update(loss, weight if current.share is None else None, optimizer=self.optimizer)
        _record(record, output, target, loss, terms, weight)

    def evaluate(self, engine: Engine, batch: Any, /) -> None:
        """Evaluate one batch."""
        output, target, loss, terms = self._forward(engine, batch)
        check_loss(loss, engine.parts)
        record = engine.current.record or refuse_outside_a_stage()
        _record(record, output, target, loss, terms, 0 if engine.current.is_stand_in else record.num_samples(batch))

    def inputs(self, batch: Any, /) -> Any:
        """Return what ``prepare_batch`` takes for the inputs."""
        return self.prepare_batch(batch)[0]

    def _forward(self, engine: Engine, batch: Any) -> tuple[Any, Any, Tensor, Terms]:
        inputs, target = self.prepare_batch(batch)
        with engine.scope("forward"):
            try:
                output = call_model(engine.parts["model"], inputs)
            except ValueError as error:
                if "more than 1 value per channel" in str(error):
                    raise DataError(
                        f"Batch normalisation got a batch of one sample at step {engine.step}. "
                        "Pass drop_last=True to the DataLoader, or choose another batch size."
                    ) from error
                raise
            loss = self._call_loss(engine.parts["loss_fn"], output, target)
        current = engine.current
        current.output, current.target = output, target
        if not isinstance(loss, Tensor) and isinstance(loss, Mapping):  # the first is cheap, the second is not
            return output, target, *_split_off_loss(loss, engine.parts["loss_fn"])
        return output, target, loss, _NO_TERMS

    def _call_loss(self, loss_fn: Loss, output: Any, target: Any) -> Tensor | Mapping[str, Any]:
        arguments: tuple[Any, ...] = (output, target)
        if self._num_loss_arguments == 1:
            arguments = (output,)
        elif self._num_loss_arguments > 2 and isinstance(output, tuple):
            arguments = output if len(output) == self._num_loss_arguments else (*output, target)
        try:
            loss = loss_fn(*arguments)
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
            if ran_out_of_memory(error):
                raise
            taken, arguments_text = f"the output, {outline(output)}", "output"
            if self._num_loss_arguments != 1:
                taken, arguments_text = f"{taken}, and the target, {outline(target)}", "output, target"
            raise DataError(
                f"The loss {_name(loss_fn)} could not take {taken} ({str(error).rstrip('.')}). "
                f"Pass a function that can: loss_fn=lambda {arguments_text}: ..."
            ) from error
        if isinstance(loss, tuple) and "loss" in getattr(loss, "_fields", ()):
            loss = loss.loss  # type: ignore[attr-defined]  # AdaptiveLogSoftmaxWithLoss: a named tuple
        return loss  # type: ignore[no-any-return]  # check_loss sees to it, here or in engine.update


def _split_off_loss(values: Mapping[str, Any], loss_fn: Loss) -> tuple[Tensor, Terms]:
    """Return what is differentiated, and what is recorded beside it."""
    if "loss" not in values:
        raise DataError(
            f"The loss {_name(loss_fn)} returned the values {', '.join(map(str, values))}, and none is named loss. "
            'Return the one that is differentiated, too: {"loss": total, ...}.'
        )
    return values["loss"], {name: value for name, value in values.items() if name != "loss"}


def _record(record: Record, output: Any, target: Any, loss: Tensor, terms: Terms, weight: float | Tensor) -> None:
    if terms:
        record.add(terms, weight)
    if isinstance(weight, Tensor) or weight:
        record.accumulate("loss", loss, weight)
    else:  # the loss of an empty batch is the mean of nothing, which is NaN
        record.expect(("loss",))
    record.measure(output, target, weight)


def _num_required(function: Loss) -> int:
    """Return how many positional arguments the loss needs; 2 where that cannot be known."""
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except ValueError:
        return 2
    kinds = [p.kind for p in signature.parameters.values() if p.default is p.empty]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return 2
    return sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)


def _name(function: Loss) -> str:
    return type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", "loss_fn")
