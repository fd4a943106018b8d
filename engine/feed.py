"""The training data of a run, and the position in them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from .data import (
    Data,
    check_data,
    empty_message,
    foreign_reading,
    foreign_sampler,
    has_positions,
    is_stateful,
    loader_like,
    num_batches,
    one_pass,
    repeat,
    samplers,
)
from .divided import Divided, Division, OwnBatches
from .errors import DataError
from .ranks import Ranks
from .rng import generator_states, rng_state, set_generator_states, set_rng_state
from .seeded import SeededLoader


class Feed:
    """The training data of one run, and where the run is in them.

    Without a seed, a loader is used as it is. To begin again after ``n`` batches, the generators are set to where they
    were when the pass began, the batch sampler is run past the first ``n`` lists of indices without loading them,
    and the generators are set to where they were after batch ``n``.

    With a seed, the order is a function of (seed, epoch), and the random numbers of a sample are a function of (seed,
    epoch, position): nothing has to be run again, and the number of workers does not matter.

    The passes of `repeat` are those of what it repeats. They are numbered on from the epoch in which the first one
    began, and with a seed, pass n is that of epoch n.

    Data that each of several ranks has of its own are read in the same way on each, only that a pass ends on all of
    them at once.

    Args:
        seed: the engine's seed, or this rank's for data of its own; None uses the data as they are.
        epoch_length: batches of an epoch, if it is not one pass: then the epochs share one pass, and each continues
            where the one before stopped.
        division: how the data are divided among several ranks; then each batch comes with this rank's share of it.
        ranks: all of them, if each has data of its own; then, too, each batch comes with its share.

    Attributes:
        data: the present data set, without `repeat`; None until one was opened.
        length: its number of batches; None where that is unknown.
    """

    def __init__(
        self,
        seed: int | None = None,
        epoch_length: int | None = None,
        division: Division | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._seed = seed
        self._division = division
        self._ranks = ranks
        self._epoch_length = epoch_length
        self._given: Data | None = None
        self.data: Data | None = None
        self.length: int | None = None
        self._seeded: SeededLoader | Divided | None = None
        self._pass: _Pass | None = None
        self._saved: dict[str, Any] | None = None  # a checkpoint's position, until an epoch begins there

    def open(self, data: Data) -> None:
        """Check a data set and make it the present one; the same one again changes nothing.

        Raises:
            ConfigurationError, DataError: as `check_data` does, or if it is too short for an epoch.
        """
        if data is self._given:
            return
        check_data("train", data)
        self.data = self._given = data
        while isinstance(self.data, repeat):
            self.data = self.data.data
        self.length = num_batches(data)
        if self._ranks is not None:  # a pass ends when the longest does
            lengths = self._ranks.gather_all(self.length)
            self.length = None if None in lengths else max(lengths, key=lambda length: length or 0)
        if self.length is not None and self._epoch_length is not None and self.length < self._epoch_length:
            raise DataError(_too_short(self.length, self._epoch_length, "an epoch"))
        self._seeded = None
        if self._division is not None:
            self._seeded = self._division.of("train", self.data)
        elif self._seed is not None and SeededLoader.fits(self.data):
            self._seeded = SeededLoader(self.data, self._seed)
        self._pass = None

    def begin(self, data: Data, epoch: int, step: int) -> Iterator[Any]:
        """Return the batches of an epoch, or of the rest of it in a run that was resumed within one.

        Args:
            data: what to read; opened if it is not the present data set.
            epoch: the number of the epoch.
            step: the training steps done so far.
        """
        self.open(data)
        saved, self._saved = self._saved, None
        if saved is not None and saved["pass"] is not None:
            now = self._pass = self._resumed(saved["pass"], saved["loader"], step)
        else:
            if saved is not None:
                set_generator_states(self.data, saved["loader"]["generators"])
            now = self._pass if self._pass is not None and self._epoch_length is not None else self._next(epoch, step)
        return self._repeated(now, step) if isinstance(data, repeat) else now.batches

    def _next(self, number: int, step: int) -> _Pass:
        """Begin a pass."""
        assert self.data is not None
        rng = rng_state() | {"loader": _loader_state(self.data)}
        batches = self._from_beginning(self.data, number)
        self._pass = _Pass(number, step, rng, batches if self._ranks is None else OwnBatches(batches, self._ranks))
        return self._pass

    def _from_beginning(self, data: Data, number: int) -> Iterator[Any]:
        """Return all batches of a pass, of this rank's own data without the other ranks."""
        return one_pass(data) if self._seeded is None else self._seeded.begin(number, skip=0)

    def _repeated(self, now: _Pass, step: int) -> Iterator[Any]:
        """Yield the batches of a pass and of those after it, without an end."""
        while True:
            for batch in now.batches:
                step += 1
                yield batch
            if step == now.first_step:
                raise DataError(empty_message("repeat(data)", self.data))
            now = self._next(now.epoch + 1, step)

    def end(self, epoch: int, num_steps: int, *, is_complete: bool) -> None:
        """End an epoch: the next one begins a new pass, unless epochs have a set length.

        Args:
            epoch: the number of the epoch.
            num_steps: its training steps.
            is_complete: whether it ends because it is as long as it should be, and not because the data ended.

        Raises:
            DataError: if the data ended before the epoch was complete, or there were none at all.
        """
        if not num_steps and self._pass is not None and self._pass.epoch < epoch:
            raise DataError(
                f"Data ended before epoch {epoch}, because epochs of epoch_length={self._epoch_length} share a pass. "
                "Pass fewer epochs, or repeat the data: fit(repeat(train), ...)."
            )
        if not num_steps:
            raise DataError(empty_message("train", self.data))
        if self._epoch_length is None:
            self._pass = None
            if self._saved is not None:  # a resumed run that had nothing more to read in this epoch
                self._saved = {**self._saved, "pass": None}
        elif not is_complete:
            raise DataError(_too_short(num_steps, self._epoch_length, f"epoch {epoch}"))

    def jump(self, epoch: int, skips: int) -> None:
        """Let the next epoch begin a pass; after ``skips`` batches of it, if these need not be read for that."""
        self._pass = self._saved = None
        if skips and self._has_places:
            loader = _loader_state(self.data)
            position = {"epoch": epoch, "consumed": skips, "rng": rng_state() | {"loader": loader}, "own": None}
            self._saved = {"loader": loader, "pass": position | {"has_ended": None}}

    def exactness(self) -> str:
        """Return how exactly a run over the present data can be resumed, in words."""
        data, is_seeded = self.data, self._seeded is not None
        if is_stateful(data):
            return "as exact as the loader's own state_dict"
        if isinstance(data, DataLoader) and data.num_workers and not is_seeded and _is_unknown(data):
            return "not known (persistent workers, or a generator of the loader's own; pass seed= to make it exact)"
        if _is_plain(data):
            return "bit-identical"
        if not has_positions(data):
            return "replayed: the consumed batches are read again, and must come out alike"
        order, reading = _order_condition(data, is_seeded), _reading_condition(data, is_seeded)
        if data.num_workers and reading and not is_seeded:
            return f"same order{_if(order)} (random augmentation in workers differs; pass seed= to make it exact)"
        return "bit-identical" + _if(order, reading)

    def state_dict(self, step: int) -> dict[str, Any] | None:
        """Return the position in the data after ``step``; None if there are no data yet."""
        if self._saved is not None or self.data is None:
            return self._saved
        return {
            "loader": _loader_state(self.data),
            "pass": None if self._pass is None else self._position(self._pass, step),
        }

    def _position(self, now: _Pass, step: int) -> dict[str, Any]:
        return {
            "epoch": now.epoch,
            "consumed": step - now.first_step,
            "rng": now.rng,
            "own": self.data.state_dict() if is_stateful(self.data) else None,
            "has_ended": now.batches.has_ended if isinstance(now.batches, OwnBatches) else None,
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Let the next epoch begin at the position that `state_dict` returned.

        The global generators must then be as they were after the last batch; they are so again when the next one is
        read.
        """
        self._pass, self._saved = None, state

    def _resumed(self, state: dict[str, Any], loader: dict[str, Any], step: int) -> _Pass:
        data, consumed, now, first = self.data, state["consumed"], rng_state(), None
        assert data is not None
        stateful = data if state["own"] is not None and is_stateful(data) else None

        def rewind() -> None:
            set_rng_state(state["rng"])
            _set_loader_state(data, state["rng"]["loader"])

        def restore() -> None:
            set_rng_state(now)
            _set_loader_state(data, loader)

        if self._ranks is not None and consumed and (self._has_places or stateful is not None):
            rewind()  # for what a stand-in is computed with, once the data have ended
            first = next(self._from_beginning(data, state["epoch"]), None)
            restore()
        if state["has_ended"] and self._has_places:
            batches: Iterator[Any] = iter(())  # a loader restores when it is read, and this one is not
        elif self._seeded is not None:
            batches = self._seeded.begin(state["epoch"], skip=consumed)
        elif stateful is not None:
            stateful.load_state_dict(state["own"])
            batches = one_pass(data)
            restore()  # a loader draws a seed for its workers when a pass begins
        elif self._has_places:
            rewind()
            batches = _skip_batches(data, consumed, restore)
        else:
            rewind()
            batches = one_pass(data)
            first = _read_past(batches, consumed)
            restore()
        if self._ranks is not None:
            batches = OwnBatches(batches, self._ranks, first=first, has_ended=bool(state["has_ended"]))
        return _Pass(state["epoch"], step - consumed, state["rng"], batches)

    @property
    def _has_places(self) -> bool:
        """Whether a batch can be read without those before it."""
        return self._seeded is not None or has_positions(self.data) or _is_plain(self.data)


def _loader_state(data: object) -> dict[str, Any]:
    """Return what decides the order of a loader's next pass: its generators, and the epochs its samplers were told."""
    told = [one.epoch if _is_told(one) else None for one in samplers(data)]
    return {"generators": generator_states(data), "epochs": told}


def _set_loader_state(data: object, state: dict[str, Any]) -> None:
    set_generator_states(data, state["generators"])
    for sampler, epoch in zip(samplers(data), state["epochs"], strict=False):
        if epoch is not None and _is_told(sampler):
            sampler.set_epoch(epoch)


def _is_told(sampler: object) -> bool:
    """Return whether a sampler is told the epoch, as a DistributedSampler is."""
    return callable(getattr(sampler, "set_epoch", None)) and type(getattr(sampler, "epoch", None)) is int


def _is_unknown(loader: DataLoader[Any]) -> bool:
    """Return whether a loader with workers has drawn random numbers that a checkpoint does not know of."""
    return loader.persistent_workers or (has_positions(loader) and bool(generator_states(loader)))


def _order_condition(loader: DataLoader[Any], is_seeded: bool) -> str | None:
    """Return what must be true of a loader's sampler, so that a resumed run has its order."""
    name = foreign_sampler(loader)
    when = "" if is_seeded else ", and all of it when a pass begins"
    return name and f"{name} draws its order only from the global generators{when}"


def _reading_condition(loader: DataLoader[Any], is_seeded: bool) -> str | None:
    """Return what must be true of a loader's dataset, so that a resumed run reads the same samples."""
    if is_seeded and callable(getattr(loader.dataset, "set_sample_seed", None)):
        return None
    name = foreign_reading(loader)
    return name and f"{name} draws random numbers only from the global generators"


def _if(*conditions: str | None) -> str:
    return "".join(f"{link} {one}" for link, one in zip((", if", ", and if"), filter(None, conditions), strict=False))


@dataclass(frozen=True, slots=True)
class _Pass:
    """One pass over the training data.

    Attributes:
        epoch: the epoch in which it began; the passes of `repeat` are numbered on from there.
        first_step: the training steps done before its first batch.
        rng: the generators when it began.
        batches: those that are still to come.
    """

    epoch: int
    first_step: int
    rng: dict[str, Any]
    batches: Iterator[Any]


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


def _skip_batches(data: Any, num: int, on_skipped: Callable[[], None]) -> Iterator[Any]:
    """Return the batches after the first ``num`` of a loader or a list, which are not loaded."""
    if not has_positions(data):
        on_skipped()
        return itertools.islice(data, num, None)
    if data.batch_sampler is not None:
        return one_pass(loader_like(data, batch_sampler=_SkippingSampler(data.batch_sampler, num, on_skipped)))
    return one_pass(loader_like(data, sampler=_SkippingSampler(data.sampler, num, on_skipped), batch_size=None))


def _read_past(batches: Iterator[Any], num: int) -> Any:
    """Read ``num`` batches, and return the first of them; None if there is none."""
    passed = itertools.islice(batches, num)
    first = next(passed, None)
    for _ in passed:
        pass
    return first


def _is_plain(data: object) -> bool:
    """Return whether reading from it draws no random numbers; a sequence of another kind may make what it gives."""
    return type(data) in (list, tuple, range)


def _too_short(num: int, epoch_length: int, where: str) -> str:
    return (
        f"Data ended after {num} steps of {where}, but epoch_length={epoch_length}. "
        f"Pass epoch_length={num}, or repeat the data: fit(repeat(train), ...)."
    )
