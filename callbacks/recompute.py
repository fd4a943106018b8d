"""Activations that are computed again instead of kept."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from camshaft.engine import Callback, ConfigurationError, Engine, did_you_mean, unwrap


class Recompute(Callback):
    """Saves memory: what some modules keep for the backward pass is computed again when that comes to it.

    By torch's activation checkpointing, in place: names of weights and modules stay, dropout draws the same numbers
    the second time, and the weights of the run are the same, to the bit. Each step takes longer by about one forward
    pass of those modules. What a module returns is kept; so choose blocks, each large, rather than single layers.

    Args:
        modules: names or patterns of modules of the part, such as ``["blocks.*"]``. Of a module and one within it, the
            outer one is taken.
        part: the part whose modules they are.

    Raises:
        ConfigurationError: if nothing is named, a name matches no module, or there is no such part.

    >>> model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 1))
    >>> engine = Engine(model=model, callbacks=[Recompute(["0"])])
    """

    def __init__(self, modules: Sequence[str], *, part: str = "model") -> None:
        if isinstance(modules, str) or not modules or not all(isinstance(one, str) for one in modules):
            raise ConfigurationError(f'Recompute has modules={modules!r}. Write a list of names: ["blocks.*"].')
        self.modules = list(modules)
        self.part = part

    def attach(self, engine: Engine) -> None:
        """Put torch's hooks on the modules."""
        super().attach(engine)
        from torch.distributed._composable.checkpoint_activation import checkpoint

        for module in self._outermost(unwrap(engine.parts.module(self.part, "Recompute"))):
            checkpoint(module)

    def _outermost(self, model: nn.Module) -> list[nn.Module]:
        named = {name: module for name, module in model.named_modules() if name}
        chosen: dict[str, nn.Module] = {}
        for pattern in self.modules:
            matches = {name: module for name, module in named.items() if fnmatchcase(name, pattern)}
            if not matches:
                guess = did_you_mean(pattern, named)
                raise ConfigurationError(
                    f'No module of {self.part} matches "{pattern}". {guess}Look at: dict(model.named_modules()).'
                )
            chosen |= matches
        within = {name for name in chosen for outer in chosen if name.startswith(f"{outer}.")}
        return [module for name, module in chosen.items() if name not in within]

    def __repr__(self) -> str:
        return f"Recompute({self.modules})"
