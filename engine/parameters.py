"""Which parameters: chosen by name, by pattern or by a predicate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .errors import ConfigurationError, did_you_mean

Selection = Iterable[str] | Callable[[str, nn.Parameter], bool]


def is_weight(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a weight: biases and the scales of normalisation layers have one dimension.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    >>> [name for name, parameter in model.named_parameters() if is_weight(name, parameter)]
    ['0.weight']
    """
    return parameter.ndim > 1


def select_parameters(model: nn.Module, which: Selection) -> dict[str, nn.Parameter]:
    """Return the chosen parameters by name.

    Args:
        model: whose ``named_parameters`` to choose from.
        which: names, patterns such as ``"encoder.*"``, or a function ``(name, parameter) -> bool``.

    Raises:
        ConfigurationError: if a name matches no parameter, or nothing is chosen.

    >>> list(select_parameters(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["0.*"]))
    ['0.weight', '0.bias']
    """
    if isinstance(which, str):
        raise ConfigurationError(f"parameters is the string {which!r}. Pass a list: [{which!r}].")
    parameters = dict(model.named_parameters())
    if callable(which):
        chosen = {name: parameter for name, parameter in parameters.items() if which(name, parameter)}
    else:
        chosen = {}
        for pattern in which:
            matching = {name: p for name, p in parameters.items() if fnmatchcase(name, pattern)}
            if not matching:
                raise ConfigurationError(
                    f'No parameter matches "{pattern}". {did_you_mean(pattern, parameters)}'
                    f"Parameters: {', '.join(list(parameters)[:8])}{' ...' if len(parameters) > 8 else ''}."
                )
            chosen |= matching
    if not chosen:
        raise ConfigurationError("No parameter was chosen. Pass names or a predicate that match at least one.")
    return chosen


def decay_groups(model: nn.Module, weight_decay: float, which: Selection = is_weight) -> list[dict[str, Any]]:
    """Return two parameter groups for an optimizer: the chosen parameters with weight decay, the others without.

    Args:
        model: the model to train.
        weight_decay: for the chosen ones; at least 0.
        which: names, patterns or a predicate; by default all but biases and normalisation layers.

    >>> groups = decay_groups(nn.Linear(3, 2), weight_decay=1e-5)
    >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
    [(1, 1e-05), (1, 0.0)]
    """
    if not weight_decay >= 0:
        raise ConfigurationError(f"weight_decay is {weight_decay}. Pass a number of at least 0.")
    chosen = select_parameters(model, which)
    others = [parameter for name, parameter in model.named_parameters() if name not in chosen]
    return [
        {"params": list(chosen.values()), "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
