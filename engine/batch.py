"""What a batch is: its inputs and target, its number of samples, and its outputs put together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import DataError

TARGET_NAMES = ("target", "targets", "label", "labels", "y")


def prepare_batch(batch: Any) -> tuple[Any, Any]:
    """Split a batch into ``(inputs, target)``; pass your own function as ``Trainer(prepare_batch=...)``.

    * a pair (tuple, list or named tuple) is ``(inputs, target)``;
    * a single item, also as a tuple of one, is ``(inputs, None)``;
    * a dict, dataclass or longer named tuple has its target under one of ``target``, ``targets``, ``label``,
      ``labels`` or ``y``. What else it holds is the inputs: the value itself if there is one, else a dict.

    A trainer calls the model with ``*inputs`` for a tuple, ``**inputs`` for a dict, and ``inputs`` otherwise.

    Raises:
        DataError: if which is which cannot be known.

    >>> prepare_batch({"image": "pixels", "label": 3})
    ('pixels', 3)
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return batch[0], None
    fields = _fields(batch)
    if fields is not None:
        targets = [name for name in fields if name in TARGET_NAMES]
        inputs = {name: value for name, value in fields.items() if name not in TARGET_NAMES}
        if inputs and len(targets) <= 1:
            target = fields[targets[0]] if targets else None
            return (next(iter(inputs.values())) if len(inputs) == 1 else inputs), target
    raise DataError(
        f"A batch is {outline(batch)}, and which part is the target cannot be known. "
        "Pass Trainer(prepare_batch=...), a function that returns (inputs, target)."
    )


def num_samples(batch: Any) -> int:
    """Return the number of samples: the first dimension that all tensors of the batch share.

    Where the parts are lists, as detection loaders give, it is their length.

    Raises:
        DataError: if tensors disagree or there are none; then the weight must be stated.

    >>> num_samples((torch.zeros(8, 3), torch.zeros(8)))
    8
    """
    # The common case first: this runs on every step. Tensor.size is C, Tensor.__len__ is not.
    if type(batch) in (tuple, list) and batch and isinstance(batch[0], Tensor) and batch[0].ndim:
        size = batch[0].size(0)
        for item in batch:
            if not isinstance(item, Tensor) or not item.ndim or item.size(0) != size:
                break
        else:
            return size
    parts = list((_fields(batch) or {}).values()) or (batch if isinstance(batch, tuple | list) else [batch])
    lengths = {len(part) if isinstance(part, tuple | list) else -1 for part in parts}
    if len(parts) > 1 and len(lengths) == 1 and -1 not in lengths and _has_dicts(parts):
        return lengths.pop()  # images and their targets, as detection loaders give them: one item per sample
    # Tensors decide; a list among the parts is taken for one item per sample only if there are no tensors.
    sizes = {size for part in parts for size in _first_dimensions(part)}
    sizes = sizes or {len(part) for part in parts if isinstance(part, list)}
    if len(sizes) == 1:
        return sizes.pop()
    raise DataError(
        f"A batch is {outline(batch)}, so its number of samples cannot be known. "
        "State it: engine.record(..., weight=number_of_samples)."
    )


def tree_map(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply ``function`` to every tensor in nested tuples, lists, dicts and dataclasses; keep the rest.

    >>> tree_map(lambda t: t.shape, {"x": torch.zeros(2, 3), "name": "a"})
    {'x': torch.Size([2, 3]), 'name': 'a'}
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: tree_map(function, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # the only mark of a named tuple
        return type(value)(*(tree_map(function, item) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(tree_map(function, item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: tree_map(function, getattr(value, name)) for name in names})
    return value


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor in nested tuples, lists and dicts, or None.

    >>> first_tensor([{"name": "a", "x": torch.zeros(2)}])
    tensor([0., 0.])
    """
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """Return the model's output: called with ``*inputs`` for a tuple, ``**inputs`` for a dict, else ``inputs``.

    >>> call_model(lambda left, right: left + right, (1, 2))
    3
    """
    if isinstance(inputs, tuple):
        return model(*inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(inputs)


def concatenate(outputs: list[Any]) -> Any:
    """Join the outputs of many batches along their first dimension, through tuples and dicts.

    >>> concatenate([{"p": torch.zeros(2, 3)}, {"p": torch.zeros(1, 3)}])["p"].shape
    torch.Size([3, 3])
    """
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    if isinstance(first, Mapping):
        return {key: concatenate([output[key] for output in outputs]) for key in first}
    if isinstance(first, tuple):
        joined = [concatenate(list(items)) for items in zip(*outputs, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)
    if isinstance(first, list):
        return [item for output in outputs for item in output]
    raise DataError(
        f"The model returned {outline(first)}, which cannot be joined over batches. "
        "Return a tensor, or a tuple, list or dict of tensors."
    )


def _fields(batch: Any) -> dict[str, Any] | None:
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return dict(zip(batch._fields, batch, strict=True))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return None


def _has_dicts(parts: Iterable[Any]) -> bool:
    return any(isinstance(item, Mapping) for part in parts for item in part)


def _first_dimensions(part: Any) -> Iterator[int]:
    if isinstance(part, Tensor):
        if part.ndim:
            yield len(part)
    elif not isinstance(part, list):
        for item in part if isinstance(part, tuple) else (_fields(part) or {}).values():
            yield from _first_dimensions(item)


def outline(value: Any) -> str:
    """Return a value's shape in words, for messages.

    >>> outline((torch.zeros(2), {"a": 1}))
    'a tuple of 2 (Tensor [2], dict with keys a)'
    """
    if isinstance(value, Tensor):
        return f"Tensor {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"dict with keys {', '.join(map(str, value))}"
    if isinstance(value, tuple | list):
        parts = ", ".join(outline(item) for item in value[:4])
        return f"a {type(value).__name__} of {len(value)} ({parts})"
    return "None" if value is None else f"of type {type(value).__name__}"
