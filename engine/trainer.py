"""The supervised step: a model, an optimizer and a loss go in; ``fit``, ``evaluate`` and ``predict`` come out."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batch import call_model, concatenate, num_samples, outline, prepare_batch, tree_map
from .callback import Callback, check_callbacks
from .engine import Engine
from .errors import ConfigurationError, DataError
from .events import FitStart
from .order import Data
from .parameters import held_by
from .update import check_loss

logger = logging.getLogger("camshaft")

Loss = Callable[..., Any]


class Trainer(Engine):
    """Trains a model on ``(inputs, target)`` batches.

    The loss is called as ``loss_fn(output, target)``. One that takes more arguments gets the items of a tuple
    output first (``CosineEmbeddingLoss``: ``loss_fn(*output, target)``), one that takes a single argument gets
    the output alone, and of a named tuple with a field ``loss`` that field is taken.

    Args:
        model: called with the inputs: ``*inputs`` for a tuple, ``**inputs`` for a dict.
        optimizer: over the model's parameters.
        loss_fn: a module or function that returns the mean loss over the batch.
        metrics: ``{"acc": metric}``; a function ``(output, target) -> mean over the batch``, a torchmetrics or an
            ignite metric. Each stage has its own copy. See `camshaft.callbacks.Metrics` for more.
        callbacks: handlers, attached in this order.
        seed: seeds every generator when the first run begins.
        prepare_batch: splits a batch into ``(inputs, target)``; see `camshaft.engine.prepare_batch`.
        parts: further named objects of the run.

    Raises:
        ConfigurationError: if an argument is of the wrong kind, or the optimizer trains another model.

    >>> model = nn.Linear(2, 1)
    >>> trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss())
    >>> history = trainer.fit([(torch.ones(4, 2), torch.ones(4, 1))] * 8, epochs=2)
    >>> history["train_loss"][1] < history["train_loss"][0]
    True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Loss,
        *,
        metrics: Mapping[Any, Any] | nn.ModuleDict | None = None,
        callbacks: Iterable[Callback] = (),
        seed: int | None = None,
        prepare_batch: Callable[[Any], tuple[Any, Any]] = prepare_batch,
        **parts: Any,
    ) -> None:
        _check_instance("model", model, nn.Module)
        _check_instance("optimizer", optimizer, torch.optim.Optimizer)
        _check_loss_fn(loss_fn)
        super().__init__(seed=seed, model=model, optimizer=optimizer, loss_fn=loss_fn, **parts)
        _check_optimizer(optimizer, self)
        self.prepare_batch = prepare_batch
        self.divide: Callable[[Any], None] | None = None  # takes a batch in parts, see MicroBatch
        self._loss_arity = _num_required(loss_fn)
        self.stages.declare("loss", higher_is_better=False)
        self.stages.add_metrics(metrics or {})
        self.subscribe(FitStart, self._before_training)
        for callback in check_callbacks(callbacks):
            self.attach(callback)

    @property
    def model(self) -> nn.Module:
        """The part named ``model``."""
        model: nn.Module = self.parts["model"]
        return model

    def training_step(self, batch: Any) -> None:
        """Forward, loss, update, record: what a fit does with each batch."""
        if self.divide is not None:
            self.divide(batch)
            return
        output, target, loss = self._forward(batch)
        weight = num_samples(batch)
        self.update(loss, weight)
        self._record_step(output, target, loss, weight)

    def train_in_parts(self, parts: Sequence[Any], num_samples_in_all: int) -> None:
        """Train on one batch that comes in parts, with the gradients and the averages of the whole."""
        done: list[tuple[Any, Any, Tensor, int]] = []
        for part in parts:
            output, target, loss = self._forward(part)
            weight = num_samples(part)
            self.update(loss, weight, whole=num_samples_in_all)
            done.append((tree_map(Tensor.detach, output), target, loss.detach(), weight))
        for record in done:  # only when all of them went well
            self._record_step(*record)

    def evaluation_step(self, batch: Any) -> None:
        """Forward, loss, record."""
        output, target, loss = self._forward(batch)
        check_loss(loss, self)
        self._record_step(output, target, loss, num_samples(batch))

    def predict(self, data: Data) -> Any:
        """Return the model's outputs over ``data``, joined along the first dimension, on the CPU."""
        outputs = []
        with self._evaluating("predict"):
            for batch in self._evaluation_batches("data", data):
                with self.scope("forward"):
                    outputs.append(tree_map(Tensor.cpu, call_model(self.parts["model"], self.prepare_batch(batch)[0])))
        return concatenate(outputs)

    def _forward(self, batch: Any) -> tuple[Any, Any, Tensor]:
        inputs, target = self.prepare_batch(batch)
        with self.scope("forward"):
            try:
                output = call_model(self.parts["model"], inputs)
            except ValueError as error:
                if "more than 1 value per channel" in str(error):
                    raise DataError(
                        f"Batch normalisation got a batch of one sample at step {self.step}. "
                        "Pass drop_last=True to the DataLoader, or choose another batch size."
                    ) from error
                raise
            loss = self._call_loss(output, target)
        self.output = output
        return output, target, loss

    def _call_loss(self, output: Any, target: Any) -> Tensor:
        loss_fn = self.parts["loss_fn"]
        arguments: tuple[Any, ...] = (output, target)
        if self._loss_arity == 1:
            arguments = (output,)
        elif self._loss_arity > 2 and isinstance(output, tuple):
            arguments = output if len(output) == self._loss_arity else (*output, target)
        try:
            loss = loss_fn(*arguments)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
            raise DataError(
                f"The loss {_name(loss_fn)} could not take the output, {outline(output)}, and the target, "
                f"{outline(target)} ({str(error).rstrip('.')}). "
                "Pass a function that can: loss_fn=lambda output, target: ..."
            ) from error
        if isinstance(loss, tuple) and "loss" in getattr(loss, "_fields", ()):
            loss = loss.loss  # type: ignore[attr-defined]  # AdaptiveLogSoftmaxWithLoss: a named tuple
        return loss  # type: ignore[no-any-return]  # check_loss sees to it, here or in engine.update

    def _record_step(self, output: Any, target: Any, loss: Tensor, weight: int) -> None:
        record = self._record or self._present_record()
        record.accumulate("loss", loss, weight)
        record.measure(output, target, weight)

    def _before_training(self, event: FitStart) -> None:
        optimizer = self.parts["optimizer"]
        for number, group in enumerate(optimizer.param_groups):
            rate = float(group["lr"])
            if not 0 <= rate < math.inf:
                raise ConfigurationError(
                    f"The learning rate of parameter group {number} is {rate}. Pass a finite lr of at least 0."
                )
        optimizer.zero_grad()


def _check_instance(name: str, value: object, kind: type) -> None:
    if isinstance(value, kind):
        return
    if isinstance(value, type):
        raise ConfigurationError(f"{name} is the class {value.__name__}, not an instance. Did you forget ()?")
    raise ConfigurationError(
        f"{name} is {value!r}, of type {type(value).__name__}. Pass a {kind.__module__.split('.')[0]} {kind.__name__}."
    )


def _check_loss_fn(loss_fn: object) -> None:
    if isinstance(loss_fn, type):
        raise ConfigurationError(f"loss_fn is the class {loss_fn.__name__}, not an instance. Did you forget ()?")
    if not callable(loss_fn):
        raise ConfigurationError(
            f"loss_fn is {loss_fn!r}, which cannot be called. Pass nn.CrossEntropyLoss() or a function."
        )


def _check_optimizer(optimizer: torch.optim.Optimizer, engine: Engine) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigurationError(
            "LBFGS evaluates the loss several times per step, which this step does not. "
            "Write a step function for Engine(step, ...) that calls optimizer.step(closure)."
        )
    trained = {id(parameter) for parameter in held_by(optimizer)}
    trainable = {name: p for name, p in engine.named_parameters() if p.requires_grad}
    missing = [name for name, parameter in trainable.items() if id(parameter) not in trained]
    if trainable and len(missing) == len(trainable):
        raise ConfigurationError(
            "The optimizer holds none of the model's parameters, so the model would not learn. "
            "Build it from the same model: torch.optim.SGD(model.parameters(), ...)."
        )
    if missing:
        logger.warning(
            "%d of %d trainable parameters are not in the optimizer and will not learn: %s%s. "
            "Set requires_grad=False on them, or add them to the optimizer.",
            len(missing), len(trainable), ", ".join(missing[:5]), " ..." if len(missing) > 5 else "",
        )  # fmt: skip


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
