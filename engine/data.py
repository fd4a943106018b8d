"""What batches are read from: any iterable of them, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, Protocol, TypeGuard

import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from .errors import ConfigurationError, DataError, check_name
from .workers import patient_workers

Data = Iterable[Any] | Callable[[], Iterable[Any]]
DataSets = Data | Mapping[str, Data]  # one data set, or several by name


def check_data(name: str, data: object) -> None:
    """Refuse, before anything runs, what can give no batch.

    Raises:
        ConfigurationError: if ``data`` is neither an iterable of batches nor a function that returns one.
        DataError: if it is known to be empty.
    """
    if isinstance(data, str | bytes | type) or not (isinstance(data, Iterable) or callable(data)):
        # A DataLoader is iterable; a bare Dataset often is not, or gives samples instead of batches.
        raise ConfigurationError(
            f"{name} is {_kind(data)}, which is not an iterable of batches. "
            "Pass a DataLoader, a list of batches, or a function that returns one."
        )
    if isinstance(data, Mapping):
        raise ConfigurationError(
            f"{name} is {_kind(data)}, which would give its keys for batches. "
            "Pass one data set; several, by name, can be validation data: fit(train, {'clean': a, 'noisy': b})."
        )
    if isinstance(data, list | tuple) and data and all(isinstance(item, DataLoader) for item in data):
        raise ConfigurationError(
            f"{name} is {_kind(data)} of {len(data)} loaders, not of batches. "
            "Pass one of them, or all of them in a row: lambda: itertools.chain(first, second)."
        )
    if num_batches(data) == 0:
        raise DataError(empty_message(name, data))


def as_sets(name: str, data: Data | Mapping[str, Data]) -> dict[str, Data]:
    """Return data sets by name, as they are evaluated one after the other; a single one has the name "".

    Raises:
        ConfigurationError, DataError: for what cannot be a name, and for data that `check_data` refuses.

    >>> as_sets("val", [1, 2]), as_sets("val", {"clean": [1], "noisy": [2]})
    ({'': [1, 2]}, {'clean': [1], 'noisy': [2]})
    """
    if not isinstance(data, Mapping):
        check_data(name, data)
        return {"": data}
    if not data or not all(isinstance(one, str) and one for one in data):
        raise ConfigurationError(
            f"{name} has the names {list(data)}. Write each data set under a name: {{'clean': a, 'noisy': b}}."
        )
    for one, its_data in data.items():
        check_name(one, ConfigurationError)
        check_data(f"{name}[{one!r}]", its_data)
    return dict(data)


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
    except Exception as error:
        raise DataError(
            f"The length of {_kind(data)} cannot be read ({error!r}). "
            "Pass data whose __len__ works, or raises TypeError where the length is unknown."
        ) from error


def one_pass(data: Data) -> Iterator[Any]:
    """Return a fresh iterator over the batches; a loader's workers ignore the first signal."""
    batches = data if isinstance(data, Iterable) else data()
    if isinstance(batches, DataLoader) and batches.num_workers > 0:
        with patient_workers(batches):
            return iter(batches)
    return iter(batches)


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


def has_positions(data: object) -> TypeGuard[DataLoader[Any]]:
    """Return whether ``data`` is a plain loader (not one of a derived class) over a map-style dataset."""
    return type(data) is DataLoader and not isinstance(data.dataset, IterableDataset)


def foreign_sampler(loader: DataLoader[Any]) -> str | None:
    """Return the name of the class of a sampler that is not torch's; None if all of them are."""
    names = (type(one).__name__ for one in samplers(loader) if not type(one).__module__.startswith("torch."))
    return next(names, None)


def foreign_reading(loader: DataLoader[Any]) -> str | None:
    """Return the name of what might draw random numbers when a batch is read: a dataset or a collate function.

    None if both are torch's, which draw none.
    """
    dataset: object = loader.dataset
    collate = loader.collate_fn
    while type(dataset) is Subset:
        dataset = dataset.dataset
    if not isinstance(dataset, torch.Tensor) and type(dataset) not in (TensorDataset, list, tuple, range):
        return type(dataset).__name__
    if getattr(collate, "__module__", "").startswith("torch."):
        return None
    return str(getattr(collate, "__name__", type(collate).__name__))


def samplers(data: object) -> list[Any]:
    """Return the samplers of a loader: its own, its batch sampler and that of its batch sampler."""
    batch_sampler = getattr(data, "batch_sampler", None)
    found = (getattr(data, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    return list({id(one): one for one in found if one is not None}.values())


class Stateful(Protocol):
    """A loader that keeps its own position, as torchdata's StatefulDataLoader does."""

    def state_dict(self) -> Any:
        """Return the position."""

    def load_state_dict(self, state: Any) -> None:
        """Go to a position."""


def is_stateful(data: object) -> TypeGuard[Stateful]:
    """Return whether ``data`` keeps its own position."""
    return callable(getattr(data, "state_dict", None)) and callable(getattr(data, "load_state_dict", None))


def loader_like(loader: DataLoader[Any], **changed: Any) -> DataLoader[Any]:
    """Return a loader with the same settings as this one, except those in ``changed``."""
    same = {
        "dataset": loader.dataset,
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": loader.generator,
        "prefetch_factor": loader.prefetch_factor,
    }
    if hasattr(loader, "in_order"):  # since torch 2.6
        same["in_order"] = loader.in_order
    return DataLoader(**{**same, **changed})


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
