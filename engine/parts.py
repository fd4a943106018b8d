"""The named objects of a run: model, optimizer, loss and whatever else it is made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from .callback import Callback
from .errors import ConfigurationError, did_you_mean


class Parts(dict[str, Any]):
    """The objects of a run by name, such as ``model`` and ``optimizer``.

    >>> parts = Parts(model=nn.Linear(2, 1), name="a run")
    >>> list(parts.modules()), str(parts.device)
    (['model'], 'cpu')
    """

    def modules(self) -> dict[str, nn.Module]:
        """Return the parts that are modules, by name."""
        return {name: part for name, part in self.items() if isinstance(part, nn.Module)}

    def module(self, name: str, needed_by: str) -> nn.Module:
        """Return the part that is a module of this name.

        Raises:
            ConfigurationError: if there is none.
        """
        modules = self.modules()
        if name not in modules:
            has = f"the modules among the parts are: {', '.join(modules)}" if modules else "no part is a module"
            raise ConfigurationError(
                f"{needed_by} needs the part named {name}, but {has}. "
                f"{did_you_mean(name, modules)}Write Engine(step, {name}={name}, ...)."
            )
        return modules[name]

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the parts that are optimizers, by name."""
        return {name: part for name, part in self.items() if isinstance(part, torch.optim.Optimizer)}

    def stateful(self) -> dict[str, Any]:
        """Return the parts that have a state which can be saved and loaded, by name."""
        return {
            name: part
            for name, part in self.items()
            if callable(getattr(part, "state_dict", None)) and callable(getattr(part, "load_state_dict", None))
        }

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every parameter of every module, with its name within that module."""
        for module in self.modules().values():
            yield from module.named_parameters()

    @property
    def device(self) -> torch.device:
        """The device of the first parameter; the CPU where there is none."""
        return next((parameter.device for _, parameter in self.named_parameters()), torch.device("cpu"))

    @contextmanager
    def preserve_modes(self) -> Iterator[None]:
        """Set the training or eval mode of each layer back, after the block, to what it was before."""
        modes = {layer: layer.training for module in self.modules().values() for layer in module.modules()}
        try:
            yield
        finally:
            for layer, mode in modes.items():
                layer.training = mode


def check_parts(parts: Mapping[str, Any], parameters: Sequence[str]) -> None:
    """Refuse what is not meant as a part; it would be kept in silence, and have no effect.

    Args:
        parts: by name.
        parameters: the names of the parameters beside them that may be left out.

    Raises:
        ConfigurationError: for the name of a parameter that is misspelt, for callbacks, and for a loader.
    """
    for name, part in parts.items():
        if close := difflib.get_close_matches(name.lower(), parameters, n=1, cutoff=0.8):
            raise ConfigurationError(
                f'"{name}" is too close to a parameter to name a part. Did you mean "{close[0]}"?'
            )
        callbacks = part if isinstance(part, list | tuple) else [part]
        if any(isinstance(one, Callback) for one in callbacks):
            written = ", ".join(map(repr, callbacks))
            raise ConfigurationError(f'"{name}" holds callbacks, which a part cannot be. Write callbacks=[{written}].')
        if isinstance(part, DataLoader):
            raise ConfigurationError(f'"{name}" is a DataLoader, which a part cannot be. Pass it to engine.fit(...).')
