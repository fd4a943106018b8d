"""What objects hold that can change: how it is read, written back and compared, kind by kind."""

from __future__ import annotations

import copy
import enum
import io
import logging
import pickle
import random
import subprocess
import sysconfig
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data.dataloader import _BaseDataLoaderIter

_LONGEST_IN_DATA = 1000  # lists in a data set that are longer are what it reads from
_LEFT_ALONE = (
    type, types.ModuleType, types.CodeType, types.FrameType, enum.Enum, PurePath, io.IOBase, logging.Filterer,
    threading.Thread, subprocess.Popen, weakref.ref, weakref.WeakSet, weakref.WeakKeyDictionary,
    weakref.WeakValueDictionary, _BaseDataLoaderIter, np.memmap,
)  # fmt: skip
_LEFT_ALONE_FROM = (
    "torch._", "torch.fx.", "torch.multiprocessing.", "torch.distributed.", "threading.", "multiprocessing.", "queue.",
    "concurrent.", "asyncio.", "_thread.", "logging.",
)  # fmt: skip
_EMPTY = object()  # the content of a cell or a slot that has none
_OTHERS_CODE = (
    *(str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")),
    *(str(Path(__file__).resolve().parents[1] / name) for name in ("engine", "callbacks", "testing")),
    str(Path(torch.__file__).resolve().parent),
)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of content that objects have.

    Args:
        read: returns the content of an object.
        write: writes it back.
        inside: what else can be reached from a content.
        same: whether two contents are the same.
    """

    read: Callable[[Any], Any]
    write: Callable[[Any, Any], None]
    inside: Callable[[Any], Iterable[Any]]
    same: Callable[[Any, Any], bool]


def key_of(owner: Any) -> Any:
    """Return what tells an object from all others; storages have new Python objects for the same memory."""
    if type(owner) is torch.UntypedStorage:
        return str(owner.device), owner.data_ptr()
    return id(owner)


def kinds_of(owner: Any, *, in_data: bool) -> Iterator[Kind]:
    """Yield the kinds of content that an object has."""
    kind = type(owner)
    if issubclass(kind, torch.nn.Module):  # also a compiled one, which is of torch._dynamo
        yield _ATTRIBUTES
        return
    if issubclass(kind, Tensor | torch.UntypedStorage | np.ndarray):
        if not in_data:
            yield from _kinds_of_numbers(owner)
        return
    if issubclass(kind, torch.Generator | random.Random | np.random.Generator | np.random.RandomState):
        if kind is not random.SystemRandom:
            yield _GENERATOR
        return
    if issubclass(kind, _LEFT_ALONE) or f"{kind.__module__}.".startswith(_LEFT_ALONE_FROM):
        return
    if not (in_data and issubclass(kind, list | dict | set | deque) and len(owner) > _LONGEST_IN_DATA):
        yield from (content for base, content in _CONTAINERS.items() if issubclass(kind, base))
    if kind is types.CellType:
        yield _CELL
    if kind is types.FunctionType and _is_users(owner):
        yield _GLOBALS
    if type(_plain_attribute(owner, "__dict__")) is dict:
        yield _ATTRIBUTES
    if kind.__flags__ & 1 << 9 and any("__slots__" in vars(base) for base in kind.__mro__):  # a class made in Python
        yield _SLOTS


def _kinds_of_numbers(owner: Any) -> Iterator[Kind]:
    if isinstance(owner, torch.UntypedStorage):
        if owner.nbytes() and owner.device.type != "meta":
            yield _MEMORY
    elif isinstance(owner, Tensor):
        yield _ATTRIBUTES
        if not hasattr(type(owner), "__tensor_flatten__"):
            yield _TENSOR
    elif owner.flags.writeable:
        yield _ARRAY


def reached_from(owner: Any) -> Iterable[Any]:
    """Return what can be reached from an object that is not part of a content which is written back."""
    if isinstance(owner, tuple | frozenset):
        return owner
    if isinstance(owner, types.FunctionType):
        return (*(owner.__closure__ or ()), *(owner.__defaults__ or ()), *(owner.__kwdefaults__ or {}).values())
    if isinstance(owner, types.MethodType):
        return owner.__self__, owner.__func__
    if isinstance(owner, types.BuiltinMethodType):
        return (owner.__self__,)
    if type(owner).__name__ == "partial" and type(owner).__module__ == "functools":
        return owner.func, owner.args, owner.keywords
    if isinstance(owner, Tensor) and hasattr(type(owner), "__tensor_flatten__"):
        return [getattr(owner, name) for name in owner.__tensor_flatten__()[0]]  # type: ignore[attr-defined]
    return ()


def _plain_attribute(owner: Any, name: str) -> Any:
    """Return an attribute without asking a ``__getattr__`` for it; None where there is none."""
    try:
        return object.__getattribute__(owner, name)
    except AttributeError:
        return None


# Containers -------------------------------------------------------------------------------------------


def _identical(ours: Iterable[Any], theirs: Iterable[Any]) -> bool:
    ours, theirs = list(ours), list(theirs)
    return len(ours) == len(theirs) and all(one is other for one, other in zip(ours, theirs, strict=True))


def _write_list(owner: Any, value: list[Any]) -> None:
    list.__setitem__(owner, slice(None), value)


def _write_set(owner: Any, value: list[Any]) -> None:
    set.clear(owner)
    set.update(owner, value)


def _write_deque(owner: Any, value: list[Any]) -> None:
    deque.clear(owner)
    deque.extend(owner, value)


def _read_dict(owner: Any) -> list[Any]:
    """Return keys and values in turn; an `OrderedDict` has an order of its own."""
    items = OrderedDict.items(owner) if isinstance(owner, OrderedDict) else dict.items(owner)
    return [one for item in items for one in item]


def _write_dict(owner: Any, value: list[Any]) -> None:
    if _identical(_read_dict(owner), value):
        return
    base: Any = OrderedDict if isinstance(owner, OrderedDict) else dict
    base.clear(owner)
    for key, item in zip(value[::2], value[1::2], strict=True):
        base.__setitem__(owner, key, item)


_CONTAINERS = {
    list: Kind(list.copy, _write_list, list, _identical),
    dict: Kind(_read_dict, _write_dict, list, _identical),
    set: Kind(list, _write_set, list, lambda ours, theirs: {*map(id, ours)} == {*map(id, theirs)}),
    deque: Kind(list, _write_deque, list, _identical),
}

# Attributes, and what functions hold ------------------------------------------------------------------


def _read_attributes(owner: Any) -> list[Any]:
    """Return the class, which a layer changes when its shape becomes known, and the attributes."""
    return [type(owner), *_read_dict(_plain_attribute(owner, "__dict__"))]


def _write_attributes(owner: Any, value: list[Any]) -> None:
    if type(owner) is not value[0]:
        owner.__class__ = value[0]
    _write_dict(_plain_attribute(owner, "__dict__"), value[1:])


_ATTRIBUTES = Kind(_read_attributes, _write_attributes, list, _identical)


def _slots(owner: Any) -> list[Any]:
    return [
        one
        for base in type(owner).__mro__
        if "__slots__" in vars(base)
        for one in vars(base).values()
        if isinstance(one, types.MemberDescriptorType)
    ]


def _read_slot(owner: Any, slot: Any) -> Any:
    try:
        return slot.__get__(owner)
    except AttributeError:
        return _EMPTY


def _write_slots(owner: Any, value: list[Any]) -> None:
    for slot, item in zip(_slots(owner), value, strict=True):
        if item is not _EMPTY:
            slot.__set__(owner, item)
        elif _read_slot(owner, slot) is not _EMPTY:
            slot.__delete__(owner)


_SLOTS = Kind(lambda owner: [_read_slot(owner, slot) for slot in _slots(owner)], _write_slots, list, _identical)


def _read_cell(owner: Any) -> list[Any]:
    try:
        return [owner.cell_contents]
    except ValueError:
        return []


def _write_cell(owner: Any, value: list[Any]) -> None:
    if value:
        owner.cell_contents = value[0]
    elif _read_cell(owner):
        del owner.cell_contents


_CELL = Kind(_read_cell, _write_cell, list, _identical)


def _is_users(function: types.FunctionType) -> bool:
    """Return whether a function is neither Python's, nor of an installed package, nor ours."""
    file = function.__code__.co_filename
    return not file.startswith("<") and not str(Path(file).resolve()).startswith(_OTHERS_CODE)


def _named(code: types.CodeType) -> Iterator[str]:
    """Yield the names that a function, and those within it, may mean global variables by."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _named(constant)


def _read_globals(owner: types.FunctionType) -> list[Any]:
    return [one for name in sorted({*_named(owner.__code__)}) for one in (name, owner.__globals__.get(name, _EMPTY))]


def _write_globals(owner: types.FunctionType, value: list[Any]) -> None:
    for name, item in zip(value[::2], value[1::2], strict=True):
        if item is not _EMPTY:
            owner.__globals__[name] = item
        else:
            owner.__globals__.pop(name, None)


_GLOBALS = Kind(_read_globals, _write_globals, list, _identical)

# Numbers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _TensorContent:
    """What a tensor has beside the values in its memory; ``alias`` is a tensor in the same place."""

    alias: Tensor
    requires_grad: bool
    is_leaf: bool
    grad: Tensor | None

    def place(self) -> tuple[Any, ...]:
        """Return where its values are, and how they are read."""
        alias, where = self.alias, tuple[Any, ...]()
        if alias.layout is torch.strided:
            where = (alias.data_ptr(), alias.storage_offset(), *alias.stride())
        elif alias.layout is torch.sparse_coo:
            where = (alias._indices().data_ptr(), alias._values().data_ptr())
        return where, alias.device, alias.dtype, alias.shape, alias.layout


def _read_tensor(owner: Tensor) -> _TensorContent:
    grad = owner.grad if owner.is_leaf else None  # torch warns of another's
    return _TensorContent(owner.data, owner.requires_grad, owner.is_leaf, grad)


def _write_tensor(owner: Tensor, value: _TensorContent) -> None:
    now = _read_tensor(owner)
    if _same_tensor(now, value):
        return
    owner.grad = None
    if value.is_leaf and not now.is_leaf:
        owner.detach_()
    if now.place() != value.place():
        owner.data = value.alias
    if value.is_leaf:
        owner.requires_grad = value.requires_grad
        owner.grad = value.grad


def _same_tensor(ours: _TensorContent, theirs: _TensorContent) -> bool:
    ours_has, theirs_has = ((one.requires_grad, one.is_leaf) for one in (ours, theirs))
    return ours.grad is theirs.grad and ours_has == theirs_has and ours.place() == theirs.place()


def _inside_tensor(value: _TensorContent) -> Iterator[Any]:
    yield value.grad
    alias = value.alias
    if alias.layout is torch.sparse_coo:
        yield from (alias._indices(), alias._values())
    elif alias.layout is torch.strided and not torch.nn.parameter.is_lazy(alias):
        yield alias.untyped_storage()


def _on_host(memory: torch.UntypedStorage) -> torch.UntypedStorage:
    """Return a copy that is on the host, so that the memory of a device does not have to suffice for both."""
    host: torch.UntypedStorage = memory.clone() if memory.device.type == "cpu" else memory.cpu()
    return host


def _write_memory(owner: torch.UntypedStorage, value: torch.UntypedStorage) -> None:
    if owner.nbytes() != value.nbytes():
        owner.resize_(value.nbytes())
    owner.copy_(value)


def _as_bytes(memory: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(memory)


def _read_generator(owner: Any) -> Any:
    if isinstance(owner, torch.Generator):
        return owner.get_state()
    return owner.getstate() if isinstance(owner, random.Random) else copy.deepcopy(_bits(owner).state)


def _write_generator(owner: Any, value: Any) -> None:
    if isinstance(owner, torch.Generator):
        owner.set_state(value)
    elif isinstance(owner, random.Random):
        owner.setstate(value)
    else:
        _bits(owner).state = value


def _same_state(ours: Any, theirs: Any) -> bool:
    return torch.equal(ours, theirs) if isinstance(ours, Tensor) else pickle.dumps(ours) == pickle.dumps(theirs)


def _bits(owner: Any) -> Any:
    return owner.bit_generator if isinstance(owner, np.random.Generator) else owner._bit_generator


def _write_array(owner: Any, value: Any) -> None:
    owner[...] = value


_TENSOR = Kind(_read_tensor, _write_tensor, _inside_tensor, _same_tensor)
_MEMORY = Kind(
    _on_host,
    _write_memory,
    lambda value: (),
    lambda ours, theirs: torch.equal(_as_bytes(ours), _as_bytes(theirs)),
)
_ARRAY = Kind(
    np.array,
    _write_array,
    lambda value: list(value.flat) if value.dtype == object else (),
    lambda ours, theirs: (
        _identical(ours.flat, theirs.flat) if ours.dtype == object else ours.tobytes() == theirs.tobytes()
    ),
)
_GENERATOR = Kind(_read_generator, _write_generator, lambda value: (), _same_state)
