"""What a batch is: its inputs and target, its number of samples, and its outputs put together again."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .errors import CamshaftError, DataError, ran_out_of_memory

TARGET_NAMES = ("target", "targets", "label", "labels", "y")


def prepare_batch(batch: Any) -> tuple[Any, Any]:
    """Split a batch into ``(inputs, target)``; pass your own function as ``Trainer(prepare_batch=...)``.

    * a pair (tuple, list or named tuple) is ``(inputs, target)``. Inputs in a list become a tuple, as they were before
      torch's default collate, if all are tensors that share the first dimension of a target that is a tensor; any
      other list has one item per sample, as for detection, and stays one;
    * a single item, also as a tuple of one, is ``(inputs, None)``;
    * a batch of graphs, as PyTorch Geometric makes it (it has ``num_graphs``), is the inputs, its ``y`` the target;
    * a dict, dataclass or longer named tuple has its target under one of ``target``, ``targets``, ``label``,
      ``labels`` or ``y``. What else it holds is the inputs: the value itself if there is one, else a dict.

    A trainer calls the model with ``*inputs`` for a tuple, ``**inputs`` for a mapping, and ``inputs`` otherwise.

    Raises:
        DataError: if which is which cannot be known.

    >>> prepare_batch({"image": "pixels", "label": 3})
    ('pixels', 3)
    """
    if isinstance(batch, Tensor | PackedSequence):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, target = batch
        return (tuple(inputs) if isinstance(inputs, list) and _are_inputs(inputs, target) else inputs), target
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return batch[0], None
    if hasattr(batch, "num_graphs"):
        return batch, getattr(batch, "y", None)
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

    Where the parts are lists, as detection loaders give, it is their length; of a `PackedSequence`, the number of
    sequences; of a batch of graphs, its ``num_graphs``.

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
    if hasattr(batch, "num_graphs"):
        return int(batch.num_graphs)
    if isinstance(batch, PackedSequence):
        batch = [batch]
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


def tree_map(function: Callable[[Tensor], Any], value: Any, *, for_objects: Callable[[Any], Any] | None = None) -> Any:
    """Apply ``function`` to every tensor in nested tuples, lists, mappings and dataclasses; keep the rest.

    Args:
        function: takes a tensor.
        value: the nested values.
        for_objects: takes anything else that has a method ``to``, whatever is in it.

    >>> tree_map(lambda t: t.shape, {"x": torch.zeros(2, 3), "name": "a"})
    {'x': torch.Size([2, 3]), 'name': 'a'}
    """
    if isinstance(value, Tensor):
        return function(value)
    if for_objects is not None and hasattr(value, "to") and not isinstance(value, type):
        return for_objects(value)
    if isinstance(value, Mapping):
        items = {key: tree_map(function, item, for_objects=for_objects) for key, item in value.items()}
        return items if type(value) is dict else _mapping_like(value, items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # the only mark of a named tuple
        return type(value)._make(tree_map(function, item, for_objects=for_objects) for item in value)  # type: ignore[attr-defined]  # as it says
    if isinstance(value, tuple | list):
        return type(value)(tree_map(function, item, for_objects=for_objects) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **tree_map(function, fields, for_objects=for_objects))
    return value


def cut(value: Any, start: int, stop: int, total: int) -> Any:
    """Return some of the samples of a batch; a value without one item per sample is returned unchanged.

    Args:
        value: the batch, or a part of it.
        start: the first sample.
        stop: the one after the last.
        total: the number of samples in the batch.

    Raises:
        DataError: for a `PackedSequence` or a batch of graphs, which cannot be divided.

    >>> cut({"x": torch.arange(4), "names": ["a", "b", "c", "d"], "weight": 0.5}, 1, 3, 4)
    {'x': tensor([1, 2]), 'names': ['b', 'c'], 'weight': 0.5}
    """
    if isinstance(value, dict):
        return {key: cut(item, start, stop, total) for key, item in value.items()}
    if isinstance(value, list) and len(value) == total and not isinstance(value[0], Tensor):
        return value[start:stop]  # names, or targets of differing sizes: an item per sample

    def cut_tensor(tensor: Tensor) -> Tensor:
        return tensor[start:stop] if tensor.ndim and tensor.size(0) == total else tensor

    def cut_object(item: Any) -> Any:
        if isinstance(item, PackedSequence):
            raise DataError("A PackedSequence cannot be divided. Let the model pack its padded input.")
        if hasattr(item, "num_graphs"):
            raise DataError("A batch of graphs cannot be divided. Pass a smaller batch_size to its loader.")
        return tree_map(cut_tensor, item)

    return tree_map(cut_tensor, value, for_objects=cut_object)


def _mapping_like(value: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    """Return a mapping of the same type with these items, or the items where none can be built."""
    try:
        if not isinstance(value, dict | UserDict):
            return type(value)(items)  # type: ignore[call-arg]  # whether that works is the question
        mapping = copy.copy(value)  # with all else that it holds
        for key, item in items.items():
            mapping[key] = item
    except Exception:  # a class of the user's own may refuse in any way
        return items
    return mapping


def move(value: Any, device: torch.device) -> Any:
    """Move what has a method ``to`` to a device, without waiting for it where it can do that.

    >>> move(torch.zeros(2), torch.device("meta")).device
    device(type='meta')
    """
    try:
        moved = value.to(device, non_blocking=True)
    except TypeError:  # it does not know that keyword
        moved = value.to(device)
    return value if moved is None else moved


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
    """Return the model's output: called with ``*inputs`` for a tuple, ``**inputs`` for a mapping, else ``inputs``.

    Raises:
        DataError: if the model takes other arguments, or a layer of torch's refuses its input. An error in the lines
            of the model itself says more where it is, and is raised as it is.

    >>> call_model(lambda left, right: left + right, (1, 2))
    3
    """
    try:
        if isinstance(inputs, Tensor):  # the common case first
            return model(inputs)
        if isinstance(inputs, tuple) and not isinstance(inputs, PackedSequence):
            return model(*inputs)
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(inputs)
    except (TypeError, RuntimeError) as error:
        if isinstance(error, CamshaftError) or ran_out_of_memory(error) or not _is_raised_in_torch(error):
            raise
        name = getattr(model, "__name__", type(model).__name__)
        raise DataError(
            f"The model {name} could not take {outline(inputs)} ({str(error).rstrip('.')}). "
            "Pass a function that returns what it takes: prepare_batch=lambda batch: (inputs, target)."
        ) from error


def _is_raised_in_torch(error: Exception) -> bool:
    """Return whether an error comes out of a line of torch.nn: of a layer, or of the call of a module."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(nn.__file__).parent in Path(trace.tb_frame.f_code.co_filename).parents


def concatenate(outputs: list[Any]) -> Any:
    """Join the outputs of many batches along their first dimension, through tuples and dicts.

    >>> concatenate([{"p": torch.zeros(2, 3)}, {"p": torch.zeros(1, 3)}])["p"].shape
    torch.Size([3, 3])
    """
    first = outputs[0]
    if isinstance(first, Tensor) and first.ndim:
        return torch.cat(outputs)
    if isinstance(first, Mapping):
        return {key: concatenate([output[key] for output in outputs]) for key in first}
    if isinstance(first, tuple) and not isinstance(first, PackedSequence):
        joined = [concatenate(list(items)) for items in zip(*outputs, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)
    if isinstance(first, list):
        return [item for output in outputs for item in output]
    raise DataError(
        f"The model returned {outline(first)}, which cannot be joined over batches. "
        "Select what can: predict(data, output=lambda output: output.logits), or pass join=False."
    )


def _fields(batch: Any) -> dict[str, Any] | None:
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return dict(zip(batch._fields, batch, strict=True))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return None


def _are_inputs(items: list[Any], target: Any) -> bool:
    """Return whether a list holds the inputs of a model, each for all samples, and not one item per sample."""
    size = target.shape[:1] if isinstance(target, Tensor) else ()
    return bool(items and size) and all(isinstance(item, Tensor) and item.shape[:1] == size for item in items)


def _has_dicts(parts: Iterable[Any]) -> bool:
    return any(isinstance(item, Mapping) for part in parts for item in part)


def _first_dimensions(part: Any) -> Iterator[int]:
    if isinstance(part, Tensor):
        if part.ndim:
            yield len(part)
    elif isinstance(part, PackedSequence):
        yield int(part.batch_sizes[0])
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
