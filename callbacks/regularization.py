"""What keeps weights small, or still."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from camshaft.engine import (
    Callback,
    ConfigurationError,
    Engine,
    EpochStart,
    LossReady,
    Selection,
    has_shards,
    is_number,
    parameters_of,
    select_parameters,
    unwrap,
    weights_of,
    whole_number,
)


class Penalty(Callback):
    """Adds ``l1 * sum(abs(w)) + l2 * 0.5 * sum(w ** 2)`` to the loss that is differentiated.

    The recorded ``train_loss`` is without it, so that it compares with ``val_loss``.

    Args:
        l1, l2: the factors; at least 0, and one of them above.
        parameters: names, patterns such as ``"encoder.*"``, or a function ``(name, parameter) -> bool``; by default
            all but biases and normalisation layers.

    Raises:
        ConfigurationError: for factors that cannot work; at attachment for a name that matches no parameter.
    """

    needs_update = True

    def __init__(self, *, l1: float = 0.0, l2: float = 0.0, parameters: Selection | None = None) -> None:
        if not (is_number(l1) and is_number(l2) and min(l1, l2) >= 0 and max(l1, l2) > 0):
            raise ConfigurationError(
                f"Penalty got l1={l1!r} and l2={l2!r}. Pass numbers of at least 0, of which at least one is positive."
            )
        self.l1 = l1
        self.l2 = l2
        self._which = parameters
        self._weights: list[nn.Parameter] = []
        self._sum: Callable[[Tensor], Tensor] = Tensor.sum

    def attach(self, engine: Engine) -> None:
        """Choose the parameters."""
        super().attach(engine)
        model = _model(engine, "Penalty")
        chosen = weights_of(model) if self._which is None else select_parameters(model, self._which)
        self._weights = list(chosen.values())
        self._sum = _sum_of_parts if has_shards(self._weights) else Tensor.sum

    def on_loss_ready(self, event: LossReady) -> Tensor:
        """Return the loss with the penalty."""
        loss = event.loss
        for weight in self._weights:
            if self.l1:
                loss = loss + self.l1 * self._sum(weight.abs())
            if self.l2:
                loss = loss + self.l2 * 0.5 * self._sum(weight.square())
        return loss

    def __repr__(self) -> str:
        return f"Penalty(l1={self.l1}, l2={self.l2})"


def _sum_of_parts(values: Any) -> Any:
    """Return the sum of values that ranks hold in parts."""
    return values.sum().full_tensor()


class FreezeUntil(Callback):
    """Keeps parameters still until an epoch begins; then they learn with the rest.

    They must be in the optimizer from the start: an optimizer skips what has no gradient. Only parameters are kept
    still: the running statistics of batch normalisation are buffers, and move with each batch unless such a layer is
    in eval mode.

    Args:
        epoch: the first epoch in which they learn; at least 2.
        parameters: names, patterns such as ``"backbone.*"``, or a function ``(name, parameter) -> bool``.

    Raises:
        ConfigurationError: for an epoch that cannot be; at attachment for a name that matches no parameter.
    """

    def __init__(self, epoch: int, parameters: Selection) -> None:
        self.epoch = whole_number("FreezeUntil's epoch", epoch, least=2)
        self._which = parameters
        self._chosen: dict[str, nn.Parameter] = {}

    def attach(self, engine: Engine) -> None:
        """Choose the parameters."""
        super().attach(engine)
        self._chosen = select_parameters(_model(engine, "FreezeUntil"), self._which)
        if optimizers := engine.parts.optimizers().values():
            held = {id(parameter) for optimizer in optimizers for parameter in parameters_of(optimizer)}
            if missing := [name for name, parameter in self._chosen.items() if id(parameter) not in held]:
                raise ConfigurationError(
                    f"FreezeUntil should unfreeze {', '.join(missing[:5])}, which the optimizer does not hold. "
                    "Build the optimizer over all parameters that will ever learn."
                )

    def on_epoch_start(self, event: EpochStart) -> None:
        """Freeze before the epoch, thaw from it on."""
        self._set(learns=event.engine.epoch >= self.epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return whether they learn."""
        return {"learns": any(parameter.requires_grad for parameter in self._chosen.values())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set whether they learn: a run resumed in mid-epoch hears no EpochStart."""
        self._set(learns=state["learns"])

    def _set(self, *, learns: bool) -> None:
        for parameter in self._chosen.values():
            parameter.requires_grad_(learns)
            if not learns:
                parameter.grad = None  # one from before the run would move it

    def __repr__(self) -> str:
        return f"FreezeUntil({self.epoch}, {len(self._chosen)} parameters)"


def _model(engine: Engine, owner: str) -> nn.Module:
    model: Any = engine.parts.modules().get("model")
    if model is None:
        raise ConfigurationError(f"{owner} needs the model. Write Engine(step, model=model, ...).")
    return unwrap(model)
