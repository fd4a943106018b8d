"""Which parameters: chosen by name, by pattern or by a predicate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from .errors import ConfigurationError, did_you_mean, is_number

Selection = Iterable[str] | Callable[[str, nn.Parameter], bool]


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters of every group of an optimizer.

    >>> len(parameters_of(torch.optim.SGD(nn.Linear(2, 2).parameters())))
    2
    """
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def is_weight(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a weight: it has several dimensions and is not called a bias.

    The scales of normalisation layers have one dimension and so are not weights. A LayerNorm over several dimensions
    has scales of several; `weights_of` leaves them out, too.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    >>> [name for name, parameter in model.named_parameters() if is_weight(name, parameter)]
    ['0.weight']
    """
    return parameter.ndim > 1 and not name.rpartition(".")[2].startswith("bias")


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of a model by name: all parameters but biases and the scales of normalisation layers.

    >>> list(weights_of(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm((2, 2)))))
    ['0.weight']
    """
    scales = {id(p) for layer in model.modules() if isinstance(layer, nn.LayerNorm) for p in layer.parameters()}
    return {name: p for name, p in model.named_parameters() if is_weight(name, p) and id(p) not in scales}


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
    if not callable(which) and not isinstance(which, Iterable):
        raise ConfigurationError(f"parameters is {which!r}. Pass names, or a function (name, parameter) -> bool.")
    parameters = dict(model.named_parameters())
    if callable(which):
        chosen = {name: parameter for name, parameter in parameters.items() if which(name, parameter)}
    else:
        chosen = {}
        for pattern in which:
            if not isinstance(pattern, str):
                raise ConfigurationError(
                    f"parameters holds a {type(pattern).__name__}. Pass names, as in model.named_parameters()."
                )
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


def decay_groups(model: nn.Module, weight_decay: float, which: Selection | None = None) -> list[dict[str, Any]]:
    """Return two parameter groups for an optimizer: the chosen parameters with weight decay, the others without.

    Args:
        model: the model to train.
        weight_decay: for the chosen ones; at least 0.
        which: names, patterns or a function; by default all but biases and normalisation layers.

    >>> groups = decay_groups(nn.Linear(3, 2), weight_decay=1e-5)
    >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
    [(1, 1e-05), (1, 0.0)]
    """
    if not (is_number(weight_decay) and weight_decay >= 0):
        raise ConfigurationError(f"weight_decay is {weight_decay!r}. Pass a number of at least 0.")
    chosen = weights_of(model) if which is None else select_parameters(model, which)
    others = [parameter for name, parameter in model.named_parameters() if name not in chosen]
    return [
        {"params": list(chosen.values()), "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def layer_groups(
    model: nn.Module, lr: float, factor: float, layers: Sequence[Selection] | None = None
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer, one a layer: the last layer learns at ``lr``, each earlier one slower.

    Args:
        model: the model to train.
        lr: the learning rate of the last layer; above 0.
        factor: the rate of a layer divided by that of the layer after it; above 0 and at most 1.
        layers: the parameters of each layer, from the input to the output: names, patterns or functions. By default,
            the model's children, in the order in which they were defined.

    Raises:
        ConfigurationError: for numbers that cannot work, a name that matches no parameter, a parameter in two layers,
            or one in none.

    >>> model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> [group["lr"] for group in layer_groups(model, lr=0.1, factor=0.5)]
    [0.05, 0.1]
    """
    if not (is_number(lr) and lr > 0 and is_number(factor) and 0 < factor <= 1):
        raise ConfigurationError(
            f"layer_groups got lr={lr!r} and factor={factor!r}. Pass lr above 0, and a factor above 0 and at most 1."
        )
    if layers is None:
        chosen = [dict(child.named_parameters(prefix=name)) for name, child in model.named_children()]
        chosen.append(dict(model.named_parameters(recurse=False)))
    else:
        chosen = [select_parameters(model, which) for which in layers]
    names = [name for group in chosen for name in group]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(
            f"layer_groups has {', '.join(twice[:5])} in two layers. Write each parameter into one layer only."
        )
    if missing := [name for name, _ in model.named_parameters() if name not in names]:
        raise ConfigurationError(
            f"layer_groups has {', '.join(missing[:5])} in no layer. Write each parameter into a layer."
        )
    groups = [list(group.values()) for group in chosen if group]
    return [{"params": group, "lr": lr * factor ** (len(groups) - 1 - at)} for at, group in enumerate(groups)]
