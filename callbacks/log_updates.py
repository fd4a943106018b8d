"""The size of gradients and of updates, at the steps that a `Log` announces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from camshaft.engine import (
    Engine,
    GradientsReady,
    Selection,
    UpdateEnd,
    has_shards,
    made_whole,
    parameters_of,
    select_parameters,
)

from .rates import name_after


class UpdateMeter:
    """Measures the last updates before every ``every``-th step; the values stay on the device.

    Args:
        engine: whose updates.
        every: steps from row to row.
        each: the parameters of the part ``model`` whose own gradient norms are measured, too.

    Raises:
        ConfigurationError: if they cannot be found.
    """

    def __init__(self, engine: Engine, every: int, each: Selection) -> None:
        self._engine = engine
        self._each = select_parameters(engine.parts.module("model", "Log"), each) if each != () else {}
        self._measured: dict[str, Tensor] = {}
        self._weights: dict[torch.optim.Optimizer, list[Tensor]] = {}  # as they were before the present update
        engine.subscribe(GradientsReady, self._look_at_gradients, when=JustBefore(engine, every))
        engine.subscribe(UpdateEnd, self._look_at_update, when=JustBefore(engine, every))

    def take(self) -> dict[str, Tensor]:
        """Return the values of the newest update, and forget them."""
        measured, self._measured, self._weights = self._measured, {}, {}
        return measured

    def _look_at_gradients(self, event: GradientsReady) -> None:
        held = {id(one): one.grad for one in parameters_of(event.optimizer) if one.grad is not None}
        if not held:
            return
        self._measured[name_after("grad_norm", self._engine, event.optimizer)] = total_norm(list(held.values()))
        for name, parameter in self._each.items():
            if id(parameter) in held:
                self._measured[f"grad_norm/{name}"] = total_norm([held[id(parameter)]])
        self._weights[event.optimizer] = [one.detach().clone() for one in _learning(event.optimizer)]

    def _look_at_update(self, event: UpdateEnd) -> None:
        before = self._weights.pop(event.optimizer, [])
        after = [one.detach() for one in _learning(event.optimizer)]
        if before and len(before) == len(after):  # not if a handler has taken gradients away in between
            changes = [one - other for one, other in zip(after, before, strict=True)]
            name = name_after("update_ratio", self._engine, event.optimizer)
            self._measured[name] = total_norm(changes) / total_norm(before)


class JustBefore:
    """A filter over what happens once in a step or less: the last before each ``every``-th step has ended, at least.

    An update is made at least once in a window, so it is enough to look at those of the last window.
    """

    def __init__(self, engine: Engine, every: int) -> None:
        self._engine = engine
        self._every = every

    def __call__(self, count: int, /) -> bool:
        """Return whether this one is to be looked at."""
        return self._steps_to_wait() <= 0

    def next_due(self, count: int, /) -> int:
        """Return the count up to which none has to be looked at."""
        return count + max(1, self._steps_to_wait() // (2 * self._window()))  # half of the way, as some may be skipped

    def _steps_to_wait(self) -> int:
        return -self._engine.step % self._every - self._window() + 1

    def _window(self) -> int:
        size = self._engine.update.window_size
        return self._every if size.samples is not None else size.batches

    def __repr__(self) -> str:
        return f"before every {self._every}. step"


def _learning(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for parameter in parameters_of(optimizer) if parameter.grad is not None]


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of all of them as one vector, in single precision or better; made whole if ranks hold parts."""
    dense = [_dense(one) for one in tensors]
    if hasattr(nn.utils, "get_total_norm") and not has_shards(dense):  # torch 2.6: few calls, however many tensors
        fast: Tensor = nn.utils.get_total_norm(dense)
        return fast
    norms = [torch.linalg.vector_norm(one) for one in dense]
    whole: Tensor = made_whole(torch.linalg.vector_norm(torch.stack([one.to(norms[0].device) for one in norms])))
    return whole


def _dense(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce().values()
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
