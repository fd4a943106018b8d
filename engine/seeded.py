"""A loader whose order and augmentation are functions of a seed: nothing has to be read again to resume."""

from __future__ import annotations

import logging
import random
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
    get_worker_info,
)

from .batch import tree_map
from .data import has_positions, loader_like, one_pass, samplers
from .ranks import Ranks, Share
from .rng import generator_states, mix, preserve_rng, seed_everything, set_generator_states

logger = logging.getLogger("camshaft")


class SeededLoader:
    """A map-style DataLoader whose order and augmentation depend on (seed, epoch, position) alone.

    Args:
        loader: the loader.
        seed: the seed.
        ranks: of which each reads its part of every batch.
        is_resumed: whether a run may be resumed within it: then what does not depend on the seed is warned of.

    Attributes:
        shares: what this rank has of each batch that was asked for and has not come yet, if there are several ranks.
    """

    def __init__(
        self, loader: DataLoader[Any], seed: int, ranks: Ranks | None = None, *, is_resumed: bool = True
    ) -> None:
        self._is_checked = not is_resumed
        self.shares: deque[Share] = deque()
        self._batches = _PositionedBatches(loader, seed, ranks or Ranks(), self.shares)
        self._dataset = _SeededDataset(loader, seed)
        self._loader = loader_like(
            loader,
            dataset=self._dataset,
            batch_sampler=self._batches,
            collate_fn=_as_it_is,
            generator=torch.Generator().manual_seed(mix(seed, 0, 0) % 2**63),  # iterating leaves the global one alone
            persistent_workers=loader.persistent_workers,
        )

    def begin(self, epoch: int, *, skip: int) -> Iterator[Any]:
        """Return an iterator over the epoch's batches after the first ``skip``."""
        if not self._is_checked:
            self._is_checked = True
            self._check_repeats()
        self.shares.clear()
        self._batches.epoch, self._batches.skip = epoch, skip
        return one_pass(self._loader)

    def _check_repeats(self) -> None:
        """Read the first batch twice under one seed, and warn if it differs: something draws from elsewhere."""
        tagged = next(iter(self._batches), None)
        if tagged is None:
            return
        with preserve_rng():
            once, again = (self._dataset.read(tagged[:2]) for _ in range(2))
        if not _alike(once, again):
            logger.warning(
                "The same sample, read twice under one seed, differs: the dataset draws from a generator of its own. "
                "Give it a method set_sample_seed(seed), or a resumed run will see other augmentation."
            )

    @staticmethod
    def fits(data: object) -> TypeGuard[DataLoader[Any]]:
        """Return whether ``data`` is a loader whose samples have positions."""
        return has_positions(data) and data.batch_sampler is not None


class _PositionedBatches:
    """A batch sampler whose lists begin with the tag (epoch, position of the first sample)."""

    def __init__(self, loader: DataLoader[Any], seed: int, ranks: Ranks, shares: deque[Share]) -> None:
        self._loader = loader
        self._seed = seed
        self._ranks = ranks
        self._shares = shares
        self.epoch = 1
        self.skip = 0

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[Any]]:
        return self._divided() if self._ranks.several else self._whole()

    def _divided(self) -> Iterator[list[Any]]:
        """Yield this rank's part of each list; the first sample where it has none."""
        for (epoch, position), *indices in self._whole():
            begin, end = self._ranks.part(len(indices))
            self._shares.append(self._ranks.share(len(indices)))
            yield [(epoch, position + begin), *(indices[begin:end] or indices[:1])]

    def _whole(self) -> Iterator[list[Any]]:
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
        """Run a sampler of another kind under the epoch's seed, also its own torch generators."""
        own = generator_states(self._loader)
        for sampler in samplers(self._loader):
            if callable(set_epoch := getattr(sampler, "set_epoch", None)):
                set_epoch(epoch)
        seed = mix(self._seed, epoch, 1) % 2**63
        with preserve_rng():
            seed_everything(seed)
            set_generator_states(self._loader, [torch.Generator().manual_seed(seed).get_state() for _ in own])
            lists = list(self._loader.batch_sampler or ())
        set_generator_states(self._loader, own)
        position = 0
        for number, indices in enumerate(lists):
            if number >= skip:
                yield [(epoch, position), *indices]
            position += len(indices)


def _as_it_is(batch: Any) -> Any:
    """Return what was collated already."""
    return batch


class _SeededDataset(Dataset[Any]):
    """Seeds the generators for each sample by its position, reads it, and collates each batch.

    What the collate function draws comes after the last sample's random numbers.
    """

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        self._dataset = loader.dataset
        self._collate = loader.collate_fn
        self._draws_nothing = type(_whole(loader.dataset)) is TensorDataset and loader.collate_fn is default_collate
        self._seed = seed

    def __getitems__(self, tagged: list[Any]) -> Any:
        if self._draws_nothing or get_worker_info() is not None:
            return self._collate(self.read(tagged))
        with preserve_rng():
            return self._collate(self.read(tagged))

    def read(self, tagged: list[Any]) -> list[Any]:
        """Return the samples of a batch, which begins with its tag."""
        (epoch, position), *indices = tagged
        if hasattr(_whole(self._dataset), "__getitems__"):  # it reads a batch at a time: one seed for each batch
            self._seed_all(mix(self._seed, epoch, position + 2))
            items: list[Any] = self._dataset.__getitems__(indices)  # type: ignore[attr-defined]  # it was asked
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
            error.add_note(f"While reading sample {index}, at position {position} of pass {epoch}.")
            raise

    def _seed_all(self, seed: int) -> None:
        if self._draws_nothing:  # then seeding would take longer than reading
            return
        random.seed(seed)
        torch.default_generator.manual_seed(seed % 2**63)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed % 2**32)
        if callable(hook := getattr(self._dataset, "set_sample_seed", None)):
            hook(seed)


def _whole(dataset: Dataset[Any]) -> Dataset[Any]:
    """Return the data set of which this is a `Subset`, or itself: that is what reads the samples."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return dataset


def _alike(one: Any, other: Any) -> bool:
    """Return whether two samples hold the same tensors; other values are not compared."""
    ours: list[torch.Tensor] = []
    theirs: list[torch.Tensor] = []
    tree_map(ours.append, one)
    tree_map(theirs.append, other)
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
