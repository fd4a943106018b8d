"""Tensors of which each rank holds a part: torch's DTensor. Here they become whole, and whole ones become parts.

Without several ranks there are none, and everything is returned as it is.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .batch import tree_map
from .parameters import parameters_of


def is_sharded(tensor: object) -> bool:
    """Return whether a tensor is one that ranks hold in parts."""
    module: Any = sys.modules.get("torch.distributed.tensor")  # imported only where there are such tensors
    return module is not None and isinstance(tensor, module.DTensor)


def has_shards(tensors: Iterable[object]) -> bool:
    """Return whether any of the tensors is held in parts."""
    return "torch.distributed.tensor" in sys.modules and any(map(is_sharded, tensors))


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part, which shares its memory with the tensor; a tensor that is whole as it is."""
    part: Any = tensor.detach()
    return part.to_local() if is_sharded(tensor) else tensor


def whole_of(tensor: Any) -> Tensor:
    """Return the whole of a tensor that ranks hold in parts; all of them must call this.

    It is torch's ``full_tensor``, over one dimension of the mesh after the other; torch warns when it does so.
    """
    from torch.distributed.tensor import Replicate

    placements = list(tensor.placements)
    for dim in range(len(placements)):  # first what `fully_shard` has cut, which it did last
        placements[dim] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    whole: Tensor = tensor.to_local()
    return whole


def made_whole(value: Any, *, is_kept: bool = True) -> Any:
    """Return nested values with whole tensors, on the CPU, in the place of those that are held in parts.

    All ranks must call this, with values of the same structure.

    Args:
        value: tensors in tuples, lists and dicts.
        is_kept: whether this rank needs them; if not, there are empty ones in their place.
    """

    def gather(tensor: Any) -> Any:
        if not is_sharded(tensor):
            return tensor
        gathered = whole_of(tensor.detach())
        return gathered.cpu() if is_kept else torch.empty(0)

    return tree_map(gather, value)


def parts_like(value: Any, own: Any) -> Any:
    """Return this rank's part of a saved tensor, laid out as ``own`` is; nothing is sent."""
    if not is_sharded(own):
        return read_whole(value)
    if is_sharded(value) or not isinstance(value, Tensor):
        return value
    if isinstance(value, InParts):
        if sum(not one.is_replicate() for one in own.placements) == 1:
            return value.like(own)
        value = value.whole()
    from torch.distributed.tensor import distribute_tensor

    placed = distribute_tensor(value.detach().to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    return placed.clone()  # a part of the whole would keep all of it in memory


def like_module(state: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
    """Return a module's whole state with parts in the place of those tensors that the module holds in parts."""
    own = module.state_dict()
    if not has_shards(own.values()):
        return state
    return {name: parts_like(value, own.get(name)) for name, value in state.items()}


def like_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's whole state with parts in the place of what it holds for parameters in parts."""
    parameters = parameters_of(optimizer)
    if not has_shards(parameters):
        return state
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    own = dict(zip(numbers, parameters, strict=True))
    placed = {
        number: state_like(values, own[number]) if number in own else values
        for number, values in state["state"].items()
    }
    return state | {"state": placed}


def state_like(values: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Return what an optimizer keeps for a parameter, laid out as that is where it has its shape."""
    return {
        key: parts_like(value, parameter if isinstance(value, Tensor) and value.shape == parameter.shape else None)
        for key, value in values.items()
    }


def shell_of(module: nn.Module) -> nn.Module:
    """Return copies of a module's parameters and buffers under their names, in modules that compute nothing.

    A module that is held in parts cannot be copied itself.
    """
    return _shell(module, {})


def _shell(module: nn.Module, copies: dict[int, Any]) -> nn.Module:
    if id(module) in copies:
        return copies[id(module)]  # type: ignore[no-any-return]
    copy = copies[id(module)] = nn.Module()
    for name, parameter in module._parameters.items():
        if parameter is not None and id(parameter) not in copies:
            copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        copy.register_parameter(name, None if parameter is None else copies[id(parameter)])
    for name, buffer in module._buffers.items():
        is_saved = name not in module._non_persistent_buffers_set
        copy.register_buffer(name, None if buffer is None else buffer.clone(), persistent=is_saved)
    for name, child in module._modules.items():
        copy.add_module(name, None if child is None else _shell(child, copies))
    return copy


IN_PARTS = "__in_parts__"  # the key of what stands for a tensor that was taken out of a state
Parts = dict[int, dict[str, Any]]


def take_apart(state: Any) -> tuple[Any, Parts]:
    """Return a state without the tensors that ranks hold in parts, and this rank's part of each by its number.

    Of a part that several ranks hold, the first of them keeps it.
    """
    parts: Parts = {}
    number = itertools.count()

    def take(tensor: Any) -> Any:
        if not is_sharded(tensor):
            return tensor
        key = next(number)
        place = _place(tensor)
        if place is not None:
            parts[key] = place | {"content": local_part(tensor)}
        return {IN_PARTS: key, "shape": list(tensor.shape), "dtype": tensor.dtype}

    return tree_map(take, state), parts


def _place(tensor: Any) -> dict[str, int] | None:
    """Return along which dimension this rank's part lies, and where it begins; None if another rank keeps it."""
    coordinates = tensor.device_mesh.get_coordinate()
    if any(position for position, one in zip(coordinates, tensor.placements, strict=True) if not one.is_shard()):
        return None
    dim, begin = _range_of(tensor)
    return {"dim": dim, "begin": begin}


def _range_of(tensor: Any) -> tuple[int, int]:
    """Return along which dimension this rank's part lies, and where it begins."""
    dim = begin = 0
    for size, position, placement in zip(
        tensor.device_mesh.shape, tensor.device_mesh.get_coordinate(), tensor.placements, strict=True
    ):
        if placement.is_shard():
            dim = placement.dim
            begin = min(tensor.shape[dim], -(-tensor.shape[dim] // size) * position)
    return dim, begin


class InParts(Tensor):
    """A tensor of a checkpoint whose content is in the files of several ranks, and is read when it is needed.

    It has a shape and a type, and no content of its own: what computes with it raises.

    Attributes:
        parts: what each rank has written: its ``content``, along which ``dim`` it lies, and where it begins.
    """

    parts: list[dict[str, Any]]

    @staticmethod
    def of(shape: list[int], dtype: torch.dtype, parts: list[dict[str, Any]]) -> InParts:
        """Return a tensor that these parts make up.

        Raises:
            ValueError: if they do not.
        """
        tensor = torch.empty(shape, dtype=dtype, device="meta").as_subclass(InParts)
        if sum(part["content"].numel() for part in parts) != tensor.numel():
            raise ValueError(f"the parts of a tensor of shape {shape} are not all there")
        tensor.parts = parts
        return tensor

    def whole(self) -> Tensor:
        """Read all of it."""
        whole = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        for part in self.parts:
            content = part["content"]
            whole.narrow(part["dim"], part["begin"], content.shape[part["dim"]]).copy_(content)
        return whole

    def like(self, own: Any) -> Tensor:
        """Read this rank's part of it, laid out as ``own`` is, which is cut along one dimension of its mesh."""
        from torch.distributed.tensor import DTensor

        mine = torch.empty(local_part(own).shape, dtype=self.dtype, device="cpu")
        dim, begin = _range_of(own)
        for part in self.parts:
            here, there = mine, part["content"]
            for one in {dim, part["dim"]}:
                our_begin, their_begin = begin * (one == dim), part["begin"] * (one == part["dim"])
                first = max(our_begin, their_begin)
                end = max(first, min(our_begin + here.shape[one], their_begin + there.shape[one]))
                here = _span(here, one, first - our_begin, end - our_begin)
                there = _span(there, one, first - their_begin, end - their_begin)
            here.copy_(there)
        return DTensor.from_local(
            mine.to(own.device), own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
        )


def _span(tensor: Tensor, dim: int, begin: int, end: int) -> Tensor:
    return tensor[(slice(None),) * dim + (slice(begin, end),)]


def put_together(state: Any, parts: list[Parts]) -> Any:
    """Return what was taken apart, given the parts of all ranks; its tensors are read when they are needed.

    Raises:
        ValueError: if the parts do not make up a tensor.
    """
    if isinstance(state, dict):
        if IN_PARTS in state:
            number = state[IN_PARTS]
            return InParts.of(state["shape"], state["dtype"], [one[number] for one in parts if number in one])
        return type(state)({key: put_together(value, parts) for key, value in state.items()})
    if isinstance(state, list | tuple):
        return type(state)(put_together(value, parts) for value in state)
    return state


def read_whole(value: Any) -> Any:
    """Return nested values with whole tensors in the place of those whose parts are in files."""
    return tree_map(lambda tensor: tensor.whole() if isinstance(tensor, InParts) else tensor, value)
