"""The class style: a model, an optimizer and a loss go in; an engine with a supervised step comes out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .batch import prepare_batch
from .callback import Callback, check_callbacks
from .engine import Engine
from .errors import ConfigurationError
from .events import FitStart
from .parameters import parameters_of
from .parts import check_parts
from .step import Loss, SupervisedStep

logger = logging.getLogger("camshaft")


def Trainer(  # noqa: N802 - what it returns is used as the classes of this name elsewhere are
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer],
    loss_fn: Loss,
    *,
    metrics: Mapping[Any, Any] | nn.ModuleDict | None = None,
    callbacks: Iterable[Callback] = (),
    seed: int | None = None,
    prepare_batch: Callable[[Any], tuple[Any, Any]] = prepare_batch,
    num_samples: Callable[[Any], float | Tensor] | None = None,
    fixed_validation_noise: bool = False,
    **parts: Any,
) -> Engine:
    """Return an `Engine` that trains a model on ``(inputs, target)`` batches.

    The loss is called as ``loss_fn(output, target)``. If it needs more arguments, it gets the items of a tuple output
    first (``CosineEmbeddingLoss``: ``loss_fn(*output, target)``); if it needs one, it gets the output alone; if it
    returns a named tuple with a field ``loss``, that field is taken. If it returns a dict,
    ``{"loss": total, "kl": kl, ...}``, ``loss`` is differentiated, and all of them are recorded (``train_kl``,
    ``val_kl``); declare a name before you watch it: ``trainer.stages.declare("kl", higher_is_better=False)``.

    Args:
        model: called with the inputs: ``*inputs`` for a tuple, ``**inputs`` for a mapping.
        optimizer: over the model's parameters; or several that step together, by name, such as
            ``{"muon": torch.optim.SGD(matrices), "adamw": torch.optim.AdamW(others)}``.
        loss_fn: a module or function that returns the mean loss over the batch, or a dict of it and its terms.
        metrics: ``{"acc": metric}``; a function ``(output, target) -> mean over the batch``, a torchmetrics or an
            ignite metric. Each stage has its own copy. See `camshaft.callbacks.Metrics` for more.
        callbacks: handlers, attached in this order.
        seed: seeds every generator when the first run begins.
        prepare_batch: splits a batch into ``(inputs, target)``; see `camshaft.engine.prepare_batch`.
        num_samples: by how much a batch counts, where the loss is a mean over something else than samples, such as
            tokens: ``num_samples=lambda batch: (batch["labels"] != -100).sum()``; see `Engine`.
        fixed_validation_noise: let each validation draw the same random numbers; see `Engine`.
        parts: further named objects of the run.

    Raises:
        ConfigurationError: if an argument is of the wrong kind, or the optimizer trains another model, or a part looks
            like another argument.

    >>> model = nn.Linear(2, 1)
    >>> trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss())
    >>> history = trainer.fit([(torch.ones(4, 2), torch.ones(4, 1))] * 8, epochs=2)
    >>> history["train_loss"][1] < history["train_loss"][0]
    True
    """
    _check_instance("model", model, nn.Module)
    optimizers: dict[str, Any] = dict(optimizer) if isinstance(optimizer, Mapping) else {"optimizer": optimizer}
    for name, one in (optimizers or {"optimizer": optimizer}).items():
        _check_instance(name, one, torch.optim.Optimizer)
    _check_loss_fn(loss_fn)
    check_parts(parts, ("metrics", "callbacks", "seed", "prepare_batch", "num_samples", "fixed_validation_noise"))
    step = SupervisedStep(loss_fn, prepare_batch, tuple(optimizers) if isinstance(optimizer, Mapping) else None)
    engine = Engine(
        step,
        seed=seed,
        num_samples=num_samples,
        fixed_validation_noise=fixed_validation_noise,
        model=model,
        **optimizers,
        loss_fn=loss_fn,
        **parts,
    )
    _check_optimizers(list(optimizers.values()), engine)
    engine.stages.declare("loss", higher_is_better=False)
    engine.stages.add_metrics(metrics or {})
    engine.subscribe(FitStart, _before_training)
    for callback in check_callbacks(callbacks):
        engine.attach(callback)
    return engine


def _before_training(event: FitStart) -> None:
    for optimizer in event.engine.parts.optimizers().values():
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


def _check_optimizers(optimizers: list[torch.optim.Optimizer], engine: Engine) -> None:
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        raise ConfigurationError(
            "LBFGS evaluates the loss several times per step, which this step does not. "
            "Write a step function for Engine(step, ...) that calls optimizer.step(closure)."
        )
    trained = {id(parameter) for optimizer in optimizers for parameter in parameters_of(optimizer)}
    trainable = [(name, p) for name, p in engine.parts.named_parameters() if p.requires_grad]
    missing = [name for name, parameter in trainable if id(parameter) not in trained]
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
