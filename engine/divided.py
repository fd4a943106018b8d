"""Data divided among ranks: each reads its part of every batch, and knows how much that is of the whole."""

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

    @property
    def divides(self) -> bool:
        """Whether a rank has its part of the data, and not data of its own."""
        return self._ranks.divides

    def of(self, name: str, data: Data) -> Divided:
        """Return this rank's part of ``data``.

        Raises:
            ConfigurationError: if it cannot be divided.
        """
        if not self._ranks.divides:
            return _OwnData(data, self._ranks)
        if SeededLoader.fits(data):
            return self._of_loader(data, is_resumed=name == "train")
        if isinstance(data, Sequence):
            return _DividedList(data, self._ranks)
        raise ConfigurationError(
            f"{name} is a {type(data).__name__}, whose batches cannot be divided among {self._ranks.world} ranks. "
            'Pass a DataLoader over a map-style dataset, or a list; or write Distributed(data="sharded") if every '
            "rank's data are its own already."
        )

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


class _OwnData:
    """Every rank's data are its own; how many samples all of them have is asked at each batch."""

    def __init__(self, data: Data, ranks: Ranks) -> None:
        self._data = data
        self._ranks = ranks

    def begin(self, epoch: int, *, skip: int) -> Pairs:
        batches, last = one_pass(self._data), None
        for number in itertools.count():
            batch = next(batches, None)
            here = 0 if batch is None else num_samples(batch)
            whole, squares, num_ranks = self._ranks.sum(torch.tensor([here, here**2, batch is not None])).tolist()
            if not num_ranks:
                return
            last = batch if batch is not None else last
            if last is None:
                raise DataError(
                    f"Rank {self._ranks.rank} has no batch, and other ranks have some. Give every rank at least one."
                )
            if number >= skip:
                yield Share(here, whole, is_even=self._ranks.data_world * squares == whole**2), last


class _HasStage(Protocol):
    current: CurrentStage


def take_shares(pairs: Pairs, engine: _HasStage) -> Iterator[Any]:
    """Yield the batches; the engine's present stage gets the share of each."""
    for share, batch in pairs:
        stage = engine.current
        stage.share, stage.is_stand_in = share, not share.here
        yield batch
