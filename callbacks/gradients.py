"""What happens to gradients between backward and the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from camshaft.engine import Callback, ConfigurationError, Engine, GradientsReady, parameters_of, whole_number, whole_of


class Accumulate(Callback):
    """One update for several batches, with the gradients of one batch that holds all their samples.

    Each batch counts by its number of samples. A window ends with the epoch: a short last one is updated, too,
    and scaled by what it really held. The loss must be a mean over its batch.

    Args:
        batches: batches per update.
        samples: or samples per update; the window closes with the batch that reaches them.

    Raises:
        ConfigurationError: unless exactly one of them is given, and is at least 1.
    """

    needs_update = True
    unique = True

    def __init__(self, batches: int | None = None, *, samples: int | None = None) -> None:
        if (batches is None) == (samples is None):
            raise ConfigurationError(
                f"Accumulate got batches={batches} and samples={samples}. Pass one of them: Accumulate(batches=4)."
            )
        self.batches = None if batches is None else whole_number("Accumulate's batches", batches, least=1)
        self.samples = None if samples is None else whole_number("Accumulate's samples", samples, least=1)

    def attach(self, engine: Engine) -> None:
        """Set the window of ``engine.update``."""
        super().attach(engine)
        engine.update.accumulate(batches=self.batches, samples=self.samples)

    def __repr__(self) -> str:
        return f"Accumulate(batches={self.batches}, samples={self.samples})"


def _limit(limit: Any) -> float:
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
        raise ConfigurationError(f"ClipGradients got a limit of {limit!r}. Pass a finite number above 0.")
    return limit


class ClipGradients(Callback):
    """Clips the true gradients before each update: after unscaling, over the whole window.

    Args:
        norm: the largest total norm, by ``torch.nn.utils.clip_grad_norm_``.
        value: or the largest absolute value of an element, by ``clip_grad_value_``.
        each: where several optimizers make one update, clip the gradients of each by their own norm, instead of all
            by the norm of all.

    Raises:
        ConfigurationError: unless exactly one of them is given, positive and finite.
    """

    needs_update = True
    steerable: ClassVar = {"norm": _limit, "value": _limit}

    def __init__(self, norm: float | None = None, *, value: float | None = None, each: bool = False) -> None:
        if (norm is None) == (value is None):
            raise ConfigurationError(
                f"ClipGradients got norm={norm} and value={value}. Pass one of them: ClipGradients(norm=1.0)."
            )
        _limit(norm if norm is not None else value)
        self.norm = norm
        self.value = value
        self.each = each

    def on_gradients_ready(self, event: GradientsReady) -> None:
        """Clip the gradients of the update's parameters in place; nothing waits for the device."""
        parameters = parameters_of(event.optimizer)
        if len(event.together) > 1 and not self.each:
            if event.optimizer is not event.together[0]:
                return
            parameters = [parameter for optimizer in event.together for parameter in parameters_of(optimizer)]
        if self.norm is not None and event.engine.ranks.tensor_size > 1:
            _clip_on_meshes(parameters, self.norm)
        elif self.norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.norm)
        elif self.value is not None:
            torch.nn.utils.clip_grad_value_(parameters, self.value)

    def __repr__(self) -> str:
        return f"ClipGradients(norm={self.norm}, value={self.value})"


def _clip_on_meshes(parameters: Iterable[Any], limit: float) -> None:
    """Clip as ``clip_grad_norm_`` does, also where some weights lie on another mesh, which torch does not add up.

    Tensor parallelism cuts some of them over one dimension more than the others.
    """
    by_mesh: dict[Any, list[Any]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh.setdefault(parameter.device_mesh, []).append(parameter)
    norms = [whole_of(torch.nn.utils.get_total_norm([one.grad for one in same])) for same in by_mesh.values()]
    for same in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(same, limit, torch.linalg.vector_norm(torch.stack(norms)))
