"""Which values are NaN or infinite, and which modules return such values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .batch import tree_map
from .sharded import local_part


def num_non_finite(tensor: Tensor) -> int:
    """Return how many numbers of a tensor are NaN or infinite; of one that ranks hold in parts, on this rank.

    >>> num_non_finite(torch.tensor([1.0, float("nan")]))
    1
    """
    values = local_part(tensor.detach())
    if not (values.is_floating_point() or values.is_complex()):
        return 0
    values = values.coalesce().values() if values.layout is torch.sparse_coo else values
    return int((~torch.isfinite(values)).sum())


def is_finite(values: Any) -> bool:
    """Return whether all tensors in a value, at any depth, hold finite numbers only."""
    numbers: list[int] = []
    tree_map(lambda tensor: numbers.append(num_non_finite(tensor)), values)
    return not any(numbers)


@contextmanager
def non_finite_outputs(modules: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Yield a list to which each module is added, as text, that returns what is not finite within the block.

    They come in the order in which they return, so the first is where such values begin. The device is waited for.

    Args:
        modules: bare ones, by the names that are put before those of the modules within them.

    >>> with non_finite_outputs({"": nn.Sequential(nn.Linear(1, 1), nn.ReLU())}) as found:
    ...     found
    []
    """
    found: list[str] = []

    def hook_of(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not is_finite(output):
                text = f'"{name}" ({type(module).__name__})' if name else type(module).__name__
                found.append(text if is_finite([args, kwargs]) else f"{text}, whose inputs are not finite either")

        return look

    with ExitStack() as stack:
        for prefix, root in modules.items():
            for name, module in root.named_modules():
                hook = hook_of(".".join(filter(None, (prefix, name))))
                handle = module.register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        yield found
