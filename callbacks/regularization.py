"""What keeps weights small, or still."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    whole_of,
)


class Penalty(Callback):
    """Adds ``l1 * sum(abs(w)) + l2 * 0.5 * sum(w ** 2)`` to the loss that is differentiated.

    The recorded ``train_loss`` is without it, so that it compares with ``val_loss``.

    Args:
        l1, l2: the factors; at least 0, and one of them above.
        parameters: names, patterns such as ``"encoder.*"``, or a function ``(name, parameter) -> bool``; by default
            all but biases and normalisation layers.
        part: the part whose parameters they are.

    Raises:
        ConfigurationError: for factors that cannot work; at attachment for a name that matches no part or parameter.
    """

    needs_update = True

    def __init__(
        self, *, l1: float = 0.0, l2: float = 0.0, parameters: Selection | None = None, part: str = "model"
    ) -> None:
        if not (is_number(l1) and is_number(l2) and min(l1, l2) >= 0 and max(l1, l2) > 0):
            raise ConfigurationError(
                f"Penalty got l1={l1!r} and l2={l2!r}. Pass numbers of at least 0, of which at least one is positive."
            )
        self.l1 = l1
        self.l2 = l2
        self.part = part
        self._which = parameters
        self._weights: list[nn.Parameter] = []
        self._sum: Callable[[Tensor], Tensor] = Tensor.sum

    def attach(self, engine: Engine) -> None:
        """Choose the parameters."""
        super().attach(engine)
        model = unwrap(engine.parts.module(self.part, "Penalty"))
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
    return whole_of(values.sum())


class FreezeUntil(Callback):
    """Keeps parameters still until an epoch begins; then they learn with the rest.

    They must be in the optimizer from the start: an optimizer skips what has no gradient. Rates of their own for
    layers are parameter groups, see `camshaft.engine.layer_groups`.

    Args:
        epoch: the first epoch in which they learn, at least 2; or several, each with the parameters that learn from
            it on: ``{3: ["layer4.*"], 6: ["layer1.*", "layer2.*", "layer3.*"]}``.
        parameters: names, patterns such as ``"backbone.*"``, or a function ``(name, parameter) -> bool``.
        part: the part whose parameters they are.
        batch_norm: keep batch-normalisation layers in eval mode, too, as long as their parameters are still.
            Otherwise their running statistics, which are buffers, move with each batch.

    Raises:
        ConfigurationError: for an epoch that cannot be; at attachment for a name that matches no part or parameter, or
            a parameter that is named for two epochs.

    >>> FreezeUntil({2: ["head.*"], 4: ["body.*"]})
    FreezeUntil({2: ['head.*'], 4: ['body.*']})
    """

    def __init__(
        self,
        epoch: int | Mapping[int, Selection],
        parameters: Selection | None = None,
        *,
        part: str = "model",
        batch_norm: bool = False,
    ) -> None:
        if isinstance(epoch, Mapping) == (parameters is not None) or epoch == {}:
            raise ConfigurationError(
                f"FreezeUntil got epoch={epoch!r} and parameters={parameters!r}. "
                'Write FreezeUntil(3, ["backbone.*"]), or FreezeUntil({3: ["layer4.*"], 6: ["layer1.*"]}).'
            )
        stages: Mapping[Any, Any] = epoch if isinstance(epoch, Mapping) else {epoch: parameters}
        self.stages: dict[int, Selection] = {
            whole_number("FreezeUntil's epoch", one, least=2): which for one, which in stages.items()
        }
        self.part = part
        self.batch_norm = batch_norm
        self._chosen: dict[int, dict[str, nn.Parameter]] = {}  # by epoch
        self._norms: dict[int, list[nn.Module]] = {}  # by epoch: those that learn with it

    def attach(self, engine: Engine) -> None:
        """Choose the parameters."""
        super().attach(engine)
        module = unwrap(engine.parts.module(self.part, "FreezeUntil"))
        self._chosen = {epoch: select_parameters(module, which) for epoch, which in self.stages.items()}
        names = [name for chosen in self._chosen.values() for name in chosen]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigurationError(
                f"FreezeUntil has two epochs for {', '.join(twice[:5])}. Write each parameter for one epoch only."
            )
        if self.batch_norm:
            self._norms = {epoch: _norms(module, chosen) for epoch, chosen in self._chosen.items()}
        if optimizers := engine.parts.optimizers().values():
            held = {id(parameter) for optimizer in optimizers for parameter in parameters_of(optimizer)}
            every = {name: parameter for chosen in self._chosen.values() for name, parameter in chosen.items()}
            if missing := [name for name, parameter in every.items() if id(parameter) not in held]:
                raise ConfigurationError(
                    f"FreezeUntil should unfreeze {', '.join(missing[:5])}, which the optimizer does not hold. "
                    "Build the optimizer over all parameters that will ever learn."
                )

    def on_epoch_start(self, event: EpochStart) -> None:
        """Freeze before the epoch, thaw from it on."""
        self._set(event.engine.epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return up to which epoch's parameters learn; 0 for none."""
        learning = [epoch for epoch, chosen in self._chosen.items() if any(p.requires_grad for p in chosen.values())]
        return {"learning": max(learning, default=0)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set which learn: a run resumed in mid-epoch hears no EpochStart."""
        self._set(state["learning"])

    def _set(self, epoch: int) -> None:
        for first, chosen in self._chosen.items():
            learns = epoch >= first
            for parameter in chosen.values():
                parameter.requires_grad_(learns)
                if not learns:
                    parameter.grad = None  # one from before the run would move it
            for norm in self._norms.get(first, ()):
                norm.train(learns)

    def __repr__(self) -> str:
        stages = {epoch: _described(which) for epoch, which in self.stages.items()}
        if len(stages) == 1:
            ((epoch, which),) = stages.items()
            return f"FreezeUntil({epoch}, {which})"
        return f"FreezeUntil({stages})"


def _described(which: Selection) -> Any:
    return getattr(which, "__qualname__", "a function") if callable(which) else list(which)


def _norms(module: nn.Module, chosen: Mapping[str, nn.Parameter]) -> list[nn.Module]:
    """Return the batch-normalisation layers all of whose parameters are chosen."""
    ids = {id(parameter) for parameter in chosen.values()}
    norms = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    return [one for one in norms if (own := list(one.parameters())) and all(id(p) in ids for p in own)]
