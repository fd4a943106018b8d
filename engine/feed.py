"""Where batches come from: any iterable of them, which can be begun again in its middle."""

from __future__ import annotations

import itertools
import logging
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeGuard

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, get_worker_info

from .batch import tree_map
from .errors import ConfigurationError, DataError
from .rng import generator_states, mix, preserve_rng, rng_state, seed_everything, set_generator_states, set_rng_state
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


class Feed:
    """The training data of one run, and where the run is in them.

    Without a seed, a loader is used as it is. To begin again after ``n`` batches, the generators are set to where they
    were when the pass began, the batch sampler is run past the first ``n`` lists of indices without loading them,
    and the generators are set to where they were after batch ``n``.

    With a seed, the order is a function of (seed, epoch), and the random numbers of a sample are a function of (seed,
    epoch, position): nothing has to be run again, and the number of workers does not matter.

    Args:
        seed: the engine's seed; None uses the data as they are.

    Attributes:
        data: the present data set; None until one was opened.
        length: its number of batches; None where that is unknown.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seed = seed
        self.data: Data | None = None
        self.length: int | None = None
        self._seeded: SeededLoader | None = None
        self._pass: _Pass | None = None
        self._saved: dict[str, Any] | None = None  # a checkpoint's position, until an epoch begins there

    def open(self, data: Data) -> None:
        """Check a data set and make it the present one; the same one again changes nothing.

        Raises:
            ConfigurationError, DataError: as `check_data` does.
        """
        if data is self.data:
            return
        check_data("train", data)
        self.data = data
        self.length = num_batches(data)
        self._seeded = SeededLoader(data, self._seed) if self._seed is not None and SeededLoader.fits(data) else None
        self._pass = None

    def begin(self, data: Data, epoch: int, step: int, *, go_on: bool) -> Iterator[Any]:
        """Return the batches of an epoch, or of the rest of it in a run that was resumed within one.

        Args:
            data: what to read; opened if it is not the present data set.
            epoch: the number of the epoch.
            step: the training steps done so far.
            go_on: continue the pass of the epoch before, where it stopped.
        """
        self.open(data)
        saved, self._saved = self._saved, None
        if saved is not None and saved["pass"] is not None:
            self._pass = self._resumed(data, saved["pass"], saved["generators"], step)
            return self._pass.batches
        if saved is not None:
            set_generator_states(data, saved["generators"])
        if self._pass is None or not go_on:
            rng = rng_state() | {"loader": generator_states(data)}
            batches = one_pass(data) if self._seeded is None else self._seeded.begin(epoch, skip=0)
            self._pass = _Pass(epoch, step, rng, batches)
        return self._pass.batches

    def end(self) -> None:
        """End the pass: the next epoch begins a new one."""
        self._pass = None

    def exactness(self) -> str:
        """Return how exactly a run over the present data can be resumed within an epoch, in words."""
        data = self.data
        if self._seeded is not None:
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

    def state_dict(self, step: int) -> dict[str, Any] | None:
        """Return the position in the data after ``step``; None if there are no data yet."""
        if self._saved is not None or self.data is None:
            return self._saved
        return {
            "generators": generator_states(self.data),
            "pass": None if self._pass is None else self._position(self._pass, step),
        }

    def _position(self, now: _Pass, step: int) -> dict[str, Any]:
        return {
            "epoch": now.epoch,
            "consumed": step - now.first_step,
            "rng": now.rng,
            "own": self.data.state_dict() if _is_stateful(self.data) else None,
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Let the next epoch begin at the position that `state_dict` returned.

        The global generators must then be as they were after the last batch; they are so again when the next one is
        read.
        """
        self._pass, self._saved = None, state

    def _resumed(self, data: Data, state: dict[str, Any], generators: list[torch.Tensor], step: int) -> _Pass:
        consumed = state["consumed"]
        if self._seeded is not None:
            batches = self._seeded.begin(state["epoch"], skip=consumed)
        elif state["own"] is not None and _is_stateful(loader := data):
            loader.load_state_dict(state["own"])
            batches = one_pass(data)
        else:
            now = rng_state()
            set_rng_state(state["rng"])
            set_generator_states(data, state["rng"]["loader"])

            def restore_generators() -> None:
                set_rng_state(now)
                set_generator_states(data, generators)

            batches = _skip_batches(data, consumed, restore_generators)
        return _Pass(state["epoch"], step - consumed, state["rng"], batches)


@dataclass(frozen=True, slots=True)
class _Pass:
    """One pass over the training data.

    Attributes:
        epoch: the epoch in which it began.
        first_step: the training steps done before its first batch.
        rng: the generators when it began.
        batches: those that are still to come.
    """

    epoch: int
    first_step: int
    rng: dict[str, Any]
    batches: Iterator[Any]


class SeededLoader:
    """A map-style DataLoader whose order and augmentation depend on (seed, epoch, position) alone."""

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        self._is_checked = False
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
        """Return an iterator over the epoch's batches after the first ``skip``."""
        if not self._is_checked:
            self._is_checked = True
            self._check_repeats()
        self._batches.epoch, self._batches.skip = epoch, skip
        return one_pass(self._loader)

    def _check_repeats(self) -> None:
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
        with preserve_rng():
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
            with preserve_rng():
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


class _SkippingSampler:
    """A sampler without its first ``num`` items; ``on_skipped`` is called after they were drawn."""

    def __init__(self, sampler: Iterable[Any], num: int, on_skipped: Callable[[], None]) -> None:
        self._sampler = sampler
        self._num = num
        self._on_skipped = on_skipped

    def __iter__(self) -> Iterator[Any]:
        items = iter(self._sampler)
        for _ in itertools.islice(items, self._num):
            pass
        self._on_skipped()
        yield from items


def _skip_batches(data: Data, num: int, on_skipped: Callable[[], None]) -> Iterator[Any]:
    """Return the batches after the first ``num``, which are not loaded where that can be avoided."""
    if _has_positions(data):
        if data.batch_sampler is not None:
            return one_pass(_like(data, batch_sampler=_SkippingSampler(data.batch_sampler, num, on_skipped)))
        return one_pass(_like(data, sampler=_SkippingSampler(data.sampler, num, on_skipped), batch_size=None))
    if isinstance(data, Sequence):
        on_skipped()
        return itertools.islice(data, num, None)
    batches = one_pass(data)
    for _ in itertools.islice(batches, num):
        pass
    on_skipped()
    return batches


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


class _Stateful(Protocol):
    """A loader that keeps its own position, as torchdata's StatefulDataLoader does."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> None: ...


def _is_stateful(data: object) -> TypeGuard[_Stateful]:
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
