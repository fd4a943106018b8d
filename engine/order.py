"""Which samples come next: one pass over any iterable of batches, that can be begun again in its middle.

Without a seed, a loader is used as it is. To begin again behind ``n`` batches, the generators are put back to where
they were when the pass began, the batch sampler is run past the first ``n`` lists of indices without loading them, and
the generators are set to where they were behind batch ``n``.

With a seed, the order is a function of (seed, epoch), and the random numbers of a sample are one of (seed, epoch,
position): nothing has to be run again, and the number of workers does not matter.
"""

from __future__ import annotations

import itertools
import logging
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import partial
from typing import Any, TypeGuard

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, get_worker_info

from .batch import tree_map
from .errors import ConfigurationError, DataError
from .rng import generator_states, mix, own_rng, rng_state, seed_everything, set_generator_states, set_rng_state
from .signals import patient_worker

logger = logging.getLogger("camshaft")

Data = Iterable[Any] | Callable[[], Iterable[Any]]


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
    """Return a fresh iterator over the batches; a loader's workers outlive the first signal."""
    if isinstance(data, DataLoader) and data.num_workers > 0:
        given = data.worker_init_fn
        data.worker_init_fn = partial(patient_worker, given)
        try:
            return iter(data)
        finally:
            data.worker_init_fn = given
    return iter(data if isinstance(data, Iterable) else data())


class Pass:
    """One pass over training data, and what it takes to begin it again in its middle.

    Args:
        data: what to pass over.
        seeded: the engine's seeded view of ``data``, or None without a seed.
        epoch: the epoch in which the pass begins.
        step: the step before its first batch; the batches consumed are counted from there.
    """

    def __init__(self, data: Data, *, seeded: SeededLoader | None, epoch: int, step: int) -> None:
        self.data = data
        self.epoch = epoch
        self.first_step = step
        self._rng = rng_state() | {"loader": generator_states(data)}
        self.iterator = one_pass(data) if seeded is None else seeded.begin(epoch, skip=0)

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return where the pass stands behind ``step``."""
        own = self.data.state_dict() if _is_stateful(self.data) else None  # type: ignore[union-attr]  # just asked
        return {
            "epoch": self.epoch,
            "consumed": step - self.first_step,
            "rng": self._rng,
            "loader_now": generator_states(self.data),
            "own": own,
        }

    @classmethod
    def resume(cls, data: Data, state: dict[str, Any], *, seeded: SeededLoader | None, step: int) -> Pass:
        """Return the pass, standing where ``state`` says.

        The global generators must be as they were behind the last batch; they are so again when the next is read.
        """
        self = cls.__new__(cls)
        self.data = data
        self.epoch = state["epoch"]
        self.first_step = step - state["consumed"]
        self._rng = state["rng"]
        if seeded is not None:
            self.iterator = seeded.begin(self.epoch, skip=state["consumed"])
        elif state["own"] is not None and _is_stateful(data):
            data.load_state_dict(state["own"])  # type: ignore[union-attr]  # just asked
            self.iterator = one_pass(data)
        else:
            now = rng_state()
            set_rng_state(self._rng)
            set_generator_states(data, self._rng["loader"])

            def put_back() -> None:
                set_rng_state(now)
                set_generator_states(data, state["loader_now"])

            self.iterator = _behind(data, state["consumed"], put_back)
        return self


def exactness(data: Data, *, seeded: bool) -> str:
    """Return how exactly a run over ``data`` can be resumed in mid-epoch, in words."""
    if seeded:
        return "bit-identical"
    if _is_stateful(data):
        return "as exact as the loader's own state_dict"
    if _has_positions(data):
        if data.num_workers == 0:
            return "bit-identical"
        return "same order (random augmentation in workers differs; pass seed= to make it exact)"
    if isinstance(data, Sequence):
        return "bit-identical"
    return "replayed: the consumed batches are read again, and must come out alike"


class SeededLoader:
    """A map-style DataLoader whose order and augmentation depend on (seed, epoch, position) alone."""

    def __init__(self, data: DataLoader[Any], seed: int) -> None:
        loader = self.data = data
        self._batches = _PositionedBatches(loader, seed)
        self._dataset = _SeededDataset(loader.dataset, seed)
        self._loader = _like(
            loader,
            dataset=self._dataset,
            batch_sampler=self._batches,
            generator=torch.Generator().manual_seed(mix(seed, 0, 0) % 2**63),  # iterating leaves the global one alone
            persistent_workers=loader.persistent_workers,
        )

    def begin(self, epoch: int, *, skip: int) -> Iterator[Any]:
        """Return an iterator over the epoch's batches behind the first ``skip``."""
        self._batches.epoch, self._batches.skip = epoch, skip
        return one_pass(self._loader)

    def check_repeats(self) -> None:
        """Read the first batch twice under one seed, and warn if it differs: something draws from elsewhere."""
        tagged = next(iter(self._batches), None)
        if tagged is None:
            return
        once, again = (self._dataset.__getitems__(tagged[:2]) for _ in range(2))
        if not _alike(once, again):
            logger.warning(
                "The same sample, read twice under one seed, differs: the dataset draws from a generator of its own. "
                "Give it a method set_sample_seed(seed), or a resumed run will see other augmentation."
            )

    @staticmethod
    def fits(data: object) -> TypeGuard[DataLoader[Any]]:
        """Return whether ``data`` is a loader whose samples have positions."""
        return _has_positions(data) and data.batch_sampler is not None


class _PositionedBatches:
    """A batch sampler whose lists begin with the tag (epoch, position of the first sample)."""

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        self._loader = loader
        self._seed = seed
        self.epoch = 1
        self.skip = 0

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[Any]]:
        epoch, skip = self.epoch, self.skip
        if type(self._loader.sampler) not in (RandomSampler, SequentialSampler) or not self._plain_batches():
            yield from self._foreign(epoch, skip)
            return
        order = self._order(epoch)
        size = self._loader.batch_size or 1
        end = len(order) - len(order) % size if self._loader.drop_last else len(order)
        for position in range(skip * size, end, size):
            yield [(epoch, position), *order[position : position + size].tolist()]

    def _plain_batches(self) -> bool:
        sampler = self._loader.sampler
        replaces = isinstance(sampler, RandomSampler) and (
            sampler.replacement or len(sampler) != len(sampler.data_source)
        )
        return self._loader.batch_size is not None and not replaces

    def _order(self, epoch: int) -> torch.Tensor:
        num = len(self._loader.sampler)  # type: ignore[arg-type]  # both kinds have a length
        if isinstance(self._loader.sampler, SequentialSampler):
            return torch.arange(num)
        return torch.randperm(num, generator=torch.Generator().manual_seed(mix(self._seed, epoch, 1) % 2**63))

    def _foreign(self, epoch: int, skip: int) -> Iterator[list[Any]]:
        """Run a sampler of someone else's under the epoch's seed."""
        sampler = self._loader.sampler
        if callable(set_epoch := getattr(sampler, "set_epoch", None)):
            set_epoch(epoch)
        with own_rng():
            seed_everything(mix(self._seed, epoch, 1) % 2**63)
            lists = list(self._loader.batch_sampler or ())
        position = 0
        for number, indices in enumerate(lists):
            if number >= skip:
                yield [(epoch, position), *indices]
            position += len(indices)


class _SeededDataset(Dataset[Any]):
    """Seeds the generators for each sample by its position, and reads it."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitems__(self, tagged: list[Any]) -> list[Any]:
        if get_worker_info() is None:
            with own_rng():
                return self._read(tagged)
        return self._read(tagged)

    def _read(self, tagged: list[Any]) -> list[Any]:
        (epoch, position), *indices = tagged
        if hasattr(self._dataset, "__getitems__"):  # it reads whole batches: one seed for each
            self._seed_all(mix(self._seed, epoch, position + 2))
            items: list[Any] = self._dataset.__getitems__(indices)
            return items
        items = []
        for offset, index in enumerate(indices):
            self._seed_all(mix(self._seed, epoch, position + offset + 2))
            items.append(self._read_one(index, epoch, position + offset))
        return items

    def _read_one(self, index: int, epoch: int, position: int) -> Any:
        try:
            return self._dataset[index]
        except Exception as error:
            error.add_note(f"While reading sample {index}, at position {position} of epoch {epoch}.")
            raise

    def _seed_all(self, seed: int) -> None:
        random.seed(seed)
        torch.default_generator.manual_seed(seed % 2**63)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed % 2**32)
        if callable(hook := getattr(self._dataset, "set_sample_seed", None)):
            hook(seed)


class _Behind:
    """A sampler from its ``num``-th item on; ``then`` is called when the others are through."""

    def __init__(self, sampler: Iterable[Any], num: int, then: Callable[[], None]) -> None:
        self._sampler = sampler
        self._num = num
        self._then = then

    def __iter__(self) -> Iterator[Any]:
        items = iter(self._sampler)
        for _ in itertools.islice(items, self._num):
            pass
        self._then()
        yield from items


def _behind(data: Data, num: int, then: Callable[[], None]) -> Iterator[Any]:
    """Return an iterator behind the first ``num`` batches, not loading them where that can be helped."""
    if _has_positions(data):
        if data.batch_sampler is not None:
            return one_pass(_like(data, batch_sampler=_Behind(data.batch_sampler, num, then)))
        return one_pass(_like(data, sampler=_Behind(data.sampler, num, then), batch_size=None))
    if isinstance(data, Sequence):
        then()
        return itertools.islice(data, num, None)
    iterator = one_pass(data)
    for _ in itertools.islice(iterator, num):
        pass
    then()
    return iterator


def _like(loader: DataLoader[Any], **changed: Any) -> DataLoader[Any]:
    """Return a loader like this one, but for what is ``changed``."""
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


def _alike(one: Any, other: Any) -> bool:
    """Return whether two samples hold the same tensors; other values are not compared."""
    ours: list[torch.Tensor] = []
    theirs: list[torch.Tensor] = []
    tree_map(ours.append, one)
    tree_map(theirs.append, other)
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _has_positions(data: object) -> TypeGuard[DataLoader[Any]]:
    """Return whether ``data`` is a plain loader (not one of a derived class) over a map-style dataset."""
    return type(data) is DataLoader and not isinstance(data.dataset, IterableDataset)


def _is_stateful(data: object) -> bool:
    return callable(getattr(data, "state_dict", None)) and callable(getattr(data, "load_state_dict", None))


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
