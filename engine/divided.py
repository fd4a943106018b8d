"""The data of several ranks: each knows how much its batch is of what all of them have read.

They are divided, so that each rank reads its part of every batch; or each rank's data are its own already.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.data import DataLoader

from .batch import cut, num_samples
from .data import Data, one_pass
from .errors import ConfigurationError, DataError
from .ranks import Ranks, Share
from .seeded import SeededLoader

if TYPE_CHECKING:
    from .stages import CurrentStage

Pairs = Iterator[tuple[Share, Any]]


class Division:
    """What each data set of a run becomes on one of several ranks.

    Args:
        seed: the engine's seed, which is the same on every rank.
        ranks: among which the data are divided.
    """

    def __init__(self, seed: int | None, ranks: Ranks) -> None:
        self._seed = seed
        self._ranks = ranks
        self._kept: dict[int, tuple[Data, Divided]] = {}  # loaders with workers that persist

    def of(self, name: str, data: Data) -> Divided:
        """Return this rank's part of ``data``.

        Raises:
            ConfigurationError: if it cannot be divided.
        """
        if SeededLoader.fits(data):
            return self._of_loader(data, is_resumed=name == "train")
        if isinstance(data, Sequence):
            return _DividedList(data, self._ranks)
        raise ConfigurationError(
            f"{name} is a {type(data).__name__}, whose batches cannot be divided among {self._ranks.world} ranks. "
            'Pass a DataLoader over a map-style dataset, or a list; or write Distributed(data="sharded") if every '
            "rank's data are its own already."
        )

    def read(self, name: str, data: Data) -> Pairs:
        """Return this rank's batches of a data set that is evaluated, each with its share."""
        if self._ranks.divides:
            return self.of(name, data).begin(0, skip=0)
        return OwnBatches(one_pass(data), self._ranks)

    def _of_loader(self, loader: DataLoader[Any], *, is_resumed: bool) -> Divided:
        if id(loader) in self._kept:
            return self._kept[id(loader)][1]
        divided = _DividedLoader(SeededLoader(loader, self._seed or 0, self._ranks, is_resumed=is_resumed))
        if loader.persistent_workers:
            self._kept[id(loader)] = (loader, divided)
        return divided


class Divided(Protocol):
    """One rank's part of a data set."""

    def begin(self, epoch: int, *, skip: int) -> Pairs:
        """Return an iterator over the epoch's batches after the first ``skip``, each with its share."""


class _DividedLoader:
    """Each list of indices is divided: a rank reads only its own samples."""

    def __init__(self, loader: SeededLoader) -> None:
        self._loader = loader

    def begin(self, epoch: int, *, skip: int) -> Pairs:
        batches, shares = self._loader.begin(epoch, skip=skip), self._loader.shares
        return ((shares.popleft(), batch) for batch in batches)


class _DividedList:
    """Each batch of a list is divided along the first dimension of its tensors."""

    def __init__(self, batches: Sequence[Any], ranks: Ranks) -> None:
        self._batches = batches
        self._ranks = ranks

    def begin(self, epoch: int, *, skip: int) -> Pairs:
        for batch in itertools.islice(self._batches, skip, None):
            whole = num_samples(batch)
            begin, end = self._ranks.part(whole)
            yield self._ranks.share(whole), cut(batch, begin, end if end > begin else begin + 1, whole)


class OwnBatches:
    """A pass over this rank's own data, which ends when all ranks' passes have ended.

    How many samples all of them have is asked at each batch. A rank whose data have ended before computes the first
    batch of its pass again, as a stand-in: the one that a resumed run can read without reading all others.

    Args:
        batches: those of this rank.
        ranks: all of them.
        first: the first batch of the pass, if ``batches`` begin after it.
        has_ended: whether there are no more batches.
    """

    def __init__(self, batches: Iterator[Any], ranks: Ranks, *, first: Any = None, has_ended: bool = False) -> None:
        self._batches = batches
        self._ranks = ranks
        self._first = first
        self.has_ended = has_ended

    def __iter__(self) -> Iterator[tuple[Share, Any]]:
        return self

    def __next__(self) -> tuple[Share, Any]:
        batch = None if self.has_ended else next(self._batches, None)
        self.has_ended = batch is None
        here = 0 if batch is None else num_samples(batch)
        whole, squares, num_ranks = self._ranks.sum(torch.tensor([here, here**2, batch is not None])).tolist()
        if not num_ranks:
            raise StopIteration
        self._first = batch if self._first is None else self._first
        if self._first is None:
            raise DataError(
                f"Rank {self._ranks.rank} has no batch, and other ranks have some. Give every rank at least one."
            )
        share = Share(here, whole, is_even=self._ranks.data_world * squares == whole**2)
        return share, self._first if batch is None else batch


class _HasStage(Protocol):
    current: CurrentStage


def take_shares(pairs: Pairs, engine: _HasStage) -> Iterator[Any]:
    """Yield the batches; the engine's present stage gets the share of each."""
    for share, batch in pairs:
        stage = engine.current
        stage.share, stage.is_stand_in = share, not share.here
        yield batch
