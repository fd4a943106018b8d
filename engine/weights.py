"""Plain weights: unwrapped, compared, and loaded completely or not at all."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .errors import CheckpointError
from .sharded import like_module


def load_weights(model: nn.Module, weights: dict[str, Any], source: str) -> None:
    """Load a plain state dict into the bare model, or nothing at all.

    Raises:
        CheckpointError: naming the first five differences, if the weights are of another architecture.
    """
    target = unwrap(model)
    if differences := weight_differences(target, weights):
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise CheckpointError(
            f"{source} is of another architecture: {'; '.join(differences[:5])}{more}. "
            "Build the model as it was when the file was written; nothing was loaded."
        )
    target.load_state_dict(like_module(weights, target))


def average_name(part: str = "model") -> str:
    """Return the name of the part that holds the average of a part's weights.

    >>> average_name(), average_name("generator")
    ('weight_average', 'weight_average_generator')
    """
    return "weight_average" if part == "model" else f"weight_average_{part}"


def weight_differences(model: nn.Module, weights: Mapping[str, Any]) -> list[str]:
    """Return, in words, where a state dict differs from the model's in names or shapes."""
    own = model.state_dict()
    differences = [f"{name} is missing" for name in own if name not in weights]
    differences += [f"{name} is unknown to the model" for name in weights if name not in own]
    shared = {name: value for name, value in weights.items() if isinstance(own.get(name), Tensor)}
    differences += [f"{name} is not a tensor" for name, value in shared.items() if not isinstance(value, Tensor)]
    differences += [
        f"{name} has shape {list(value.shape)}, the model's has {list(own[name].shape)}"
        for name, value in shared.items()
        if isinstance(value, Tensor) and value.shape != own[name].shape and not _takes(model, name, weights)
    ]
    return differences


def _takes(model: nn.Module, name: str, weights: Mapping[str, Any]) -> bool:
    """Return whether a module that loads itself takes a buffer of another shape, as observers of quantization do.

    Only a copy of that module, which is small, is loaded to find out.
    """
    path = name.rpartition(".")[0]
    module = model.get_submodule(path)
    if type(module)._load_from_state_dict is nn.Module._load_from_state_dict:
        return False
    prefix = f"{path}." if path else ""
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    try:
        copy.deepcopy(module).load_state_dict(own)
    except RuntimeError:
        return False
    return True


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model itself, out of any DataParallel, DistributedDataParallel or compiled wrapper."""
    while True:
        wrapped = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            wrapped = model.module
        if not isinstance(wrapped, nn.Module):
            return model
        model = wrapped
