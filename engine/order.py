"""Which samples come next: from any iterable of batches to one pass over it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

from .errors import ConfigurationError, DataError

Data = Iterable[Any] | Callable[[], Iterable[Any]]


def check_data(name: str, data: object) -> None:
    """Refuse, before anything runs, what can give no batch.

    Raises:
        ConfigurationError: if ``data`` is neither an iterable of batches nor a function that returns one.
        DataError: if it is known to be empty.
    """
    if isinstance(data, str | bytes) or not (isinstance(data, Iterable) or callable(data)):
        # A DataLoader is iterable; a bare Dataset often is not, or gives samples instead of batches.
        raise ConfigurationError(
            f"{name} is {_kind(data)}, which is not an iterable of batches. "
            "Pass a DataLoader, a list of batches, or a function that returns one."
        )
    if num_batches(data) == 0:
        raise DataError(empty_message(name, data))


def num_batches(data: object) -> int | None:
    """Return the number of batches in one pass, or None where it is unknown.

    >>> num_batches([1, 2, 3]), num_batches(iter([1, 2, 3]))
    (3, None)
    """
    if not isinstance(data, Sized):
        return None
    try:
        return len(data)
    except TypeError:  # a DataLoader over an iterable dataset has a __len__ that raises
        return None


def one_pass(data: Data) -> Iterator[Any]:
    """Return a fresh iterator over the batches."""
    if isinstance(data, Iterable):
        return iter(data)
    return iter(data())


class repeat:  # noqa: N801 - reads as a word: fit(repeat(loader), epoch_length=100)
    """An endless iterable over ``data``: a fresh pass begins when one ends.

    >>> from itertools import islice
    >>> list(islice(repeat([1, 2]), 5))
    [1, 2, 1, 2, 1]
    """

    def __init__(self, data: Data) -> None:
        check_data("repeat(data)", data)
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        while True:
            empty = True
            for batch in one_pass(self.data):
                empty = False
                yield batch
            if empty:
                raise DataError(empty_message("repeat(data)", self.data))


def empty_message(name: str, data: object) -> str:
    """Return what to say about data without a single batch."""
    if isinstance(data, Iterator):
        return (
            f"{name} is {_kind(data)} that is used up, so a further pass has no batches. "
            "Pass something that can be iterated again (a DataLoader, a list), or a function that returns it."
        )
    hint = "Look at the dataset's length"
    if getattr(data, "drop_last", False):
        hint += f"; drop_last=True drops a last batch of fewer than {getattr(data, 'batch_size', 'batch_size')}"
    return f"{name} is {_kind(data)} without a single batch. {hint}."


def _kind(value: object) -> str:
    return f"a {type(value).__name__}" if not isinstance(value, type) else f"the class {value.__name__}"
