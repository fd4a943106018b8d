"""Whatever a trial changes, put back into the same objects.

A copy of an engine would not do: handlers, optimizers and the user's own functions hold the objects themselves. So the
content of each object that can be reached is recorded, and written back into it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .contents import Kind, key_of, kinds_of, reached_from
from .errors import EngineStateError
from .rng import rng_state, set_rng_state

_ATOMS = {int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device}


@contextmanager
def put_back(*roots: Any) -> Iterator[None]:
    """Put everything that can be reached from ``roots`` back, after the block, to what it was before.

    Each object stays the same one, and gets its content back: lists, dicts, attributes, what functions keep from
    around them, tensors with their memory and gradients, and random generators, the global ones too. A tensor that was
    moved to another device is where it was again; its values are kept on the host in between.

    Of a function of the user's own, the global variables that it names are put back, too. What is not looked into:
    classes, threads, files, iterators that have begun, and the samples of a data set, which are read and not written.

    Raises:
        EngineStateError: if something is not as it was.

    >>> numbers = [1, 2]
    >>> with put_back(numbers):
    ...     numbers.append(3)
    >>> numbers
    [1, 2]
    """
    rng, contents = rng_state(), _contents(roots)
    try:
        yield
    finally:
        for content in contents:
            content.kind.write(content.owner, content.value)
        set_rng_state(rng)
        _check(contents)


@dataclass(frozen=True, slots=True)
class _Content:
    kind: Kind
    owner: Any
    value: Any


def _contents(roots: Iterable[Any]) -> list[_Content]:
    """Return the content of every object that can be reached; that of data sets last, as they hold samples."""
    contents: list[_Content] = []
    seen: dict[Any, Any] = {}  # holds what it has seen, so that no id is given again
    data: list[Any] = []
    of_loaders: set[int] = set()  # also a list is a data set there
    rest = list(roots)
    while rest or data:
        in_data = not rest
        owner = (rest or data).pop()
        kind_of_owner, key = type(owner), key_of(owner)
        if kind_of_owner in _ATOMS or key in seen:
            continue
        if not in_data and (issubclass(kind_of_owner, Dataset) or key in of_loaders):
            data.append(owner)
            continue
        if issubclass(kind_of_owner, DataLoader):
            of_loaders.add(id(owner.dataset))
        seen[key] = owner
        found = rest if not in_data else data
        for kind in kinds_of(owner, in_data=in_data):
            content = _Content(kind, owner, kind.read(owner))
            contents.append(content)
            found.extend(kind.inside(content.value))
        found.extend(reached_from(owner))
    return contents


def _check(contents: Iterable[_Content]) -> None:
    for content in contents:
        if not content.kind.same(content.kind.read(content.owner), content.value):
            raise EngineStateError(
                f"{_short(content.owner)} could not be put back to what it was before the trial. "
                "Look for a thread that changes it, and build it anew before you train."
            )


def _short(owner: Any) -> str:
    return f"A {type(owner).__name__} ({owner!r:.80})"
