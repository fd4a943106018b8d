"""What is measured in each stage of a run, what is known of it beforehand, and the stage that is running now."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor, nn

from .batch import num_samples, outline
from .errors import ConfigurationError, DataError, EngineStateError, can_take, check_name
from .meter import as_weight, described
from .metric import ComputedMetric, Metric, as_metrics, higher_is_better, names_of
from .ranks import Ranks, Share
from .record import Record
from .values import label, prefixed


class Nothing(enum.Enum):
    """The target of a step that has measured nothing; not None, because a target may be None."""

    NOTHING = "nothing was measured"


NOTHING = Nothing.NOTHING


class CurrentStage:
    """The stage that is running now, and its present batch.

    Attributes:
        name: "train", "val", "test" or "predict"; "" between stages.
        record: its averages and metrics; None between stages.
        length: its number of batches, those of all validation sets together; None where that is unknown.
        dataset: the name of the present one of several validation sets, or "".
        batch: the present batch.
        output: what the step gave to ``engine.measure`` for the batch, or else returned.
        target: what the step gave to ``engine.measure`` beside the output; `NOTHING` if it measured nothing.
        share: what this rank has of the batch; None in one process.
        is_stand_in: whether the batch is there only for the communication, because this rank has no part of the whole.
    """

    __slots__ = ("batch", "dataset", "is_stand_in", "length", "name", "output", "record", "share", "target")

    def __init__(
        self, name: str = "", record: Record | None = None, length: int | None = None, dataset: str = ""
    ) -> None:
        self.name = name
        self.record = record
        self.length = length
        self.dataset = dataset
        self.batch: Any = None
        self.output: Any = None
        self.target: Any = NOTHING
        self.share: Share | None = None
        self.is_stand_in = False

    def num_samples(self) -> float | Tensor:
        """Return by how much the present batch counts, by default its number of samples; 0 for a stand-in."""
        if self.is_stand_in:
            return 0
        return num_samples(self.batch) if self.record is None else self.record.num_samples(self.batch)

    @contextmanager
    def part(self, batch: Any) -> Iterator[Record]:
        """Let ``batch`` be the present one in the block, such as a part; what that records counts if it succeeds."""
        record, whole = self.record or refuse_outside_a_stage(), self.batch
        self.batch = batch
        try:
            with record.postponed():
                yield record
        finally:
            self.batch = whole

    def forget_output(self) -> None:
        """Have no output: where there is none yet, or it would be that of a part of the batch."""
        self.output, self.target = None, NOTHING

    def weigh(self, gradients: Tensor) -> None:
        """Multiply this rank's gradients, in place, by its share of the batch; without one they become 0.

        They are not multiplied by 0, because a stand-in's gradient may be NaN.
        """
        if self.share is None or not self.share.here:
            gradients.zero_()
        else:
            gradients.mul_(self.share.weight)

    def peek(self) -> dict[str, float]:
        """Return the newest averages that have reached the host, without waiting for the device."""
        return {} if self.record is None else prefixed(label(self.name, self.dataset), self.record.peek())


def refuse_outside_a_stage() -> NoReturn:
    """Refuse what can only be recorded within a stage."""
    raise EngineStateError(
        "Values were recorded outside a stage. Record inside the body of engine.train(...) or engine.validate(...)."
    )


def record_output(current: CurrentStage, output: Any) -> None:
    """Record what a step returned; it is also the output that handlers see, if the step measured none.

    Raises:
        DataError: if it cannot be recorded.
    """
    if current.output is None:
        current.output, current.target = output, NOTHING
    if output is None:
        return
    if not isinstance(output, Tensor | Mapping):
        raise DataError(
            f"The step returned {output!r}, of type {type(output).__name__}. "
            "Return None, a tensor, or a dict such as {'loss': loss}."
        )
    record = current.record or refuse_outside_a_stage()
    record.add({"loss": output} if isinstance(output, Tensor) else output, current.num_samples())


def checked_count(function: Callable[[Any], float | Tensor]) -> Callable[[Any], float | Tensor]:
    """Return a function of the user's that counts a batch, with a check of what it returns."""
    if not callable(function) or not can_take(function, 1):
        raise ConfigurationError(
            f"num_samples is {function!r}, which cannot be called with a batch. Write num_samples=lambda batch: ..."
        )

    def count(batch: Any) -> float | Tensor:
        counted = function(batch)
        try:
            return as_weight(counted)
        except DataError as error:
            raise DataError(
                f"num_samples returned {described(counted)} for a batch that is {outline(batch)}. "
                "Return a finite number of at least 0, or a tensor of one element."
            ) from error

    return count


class Stages:
    """The records of the stages ("train", "val", "test"), and the metrics of which each has its own copy.

    Validation data with names have a record each, such as "val_clean".

    Args:
        ranks: over which averages and metrics are put together.
        num_samples: a function of the user's that tells the weight of a batch; None counts the samples.

    Raises:
        ConfigurationError: if it cannot be called with a batch.
    """

    def __init__(self, ranks: Ranks, num_samples: Callable[[Any], float | Tensor] | None = None) -> None:
        self._ranks = ranks
        self._counts = {} if num_samples is None else {"num_samples": checked_count(num_samples)}
        self.directions: dict[str, bool | None] = {}
        self._metrics: dict[str, Metric] = {}
        self._only_evaluated: set[str] = set()
        self._records: dict[str, Record] = {}

    def add_metrics(self, metrics: Mapping[Any, Any] | nn.ModuleDict, *, train: bool = True) -> None:
        """Add metrics by name; they are updated by ``engine.measure`` and computed at the end of each stage.

        Args:
            metrics: by name; a tuple of names selects those values from a metric that returns a dict.
            train: measure in training, too.

        Raises:
            ConfigurationError: if a name is taken, or what should be a metric is not one.
        """
        for key, metric in as_metrics(metrics).items():
            taken = self._names() & set(_names(key, metric))
            if taken:
                raise ConfigurationError(f'Two metrics are named "{min(taken)}". Give one of them another name.')
            self._metrics[key] = metric
            if not train:
                self._only_evaluated.add(key)

    def declare(self, name: str, *, higher_is_better: bool | None = None) -> None:
        """Say that every stage will record this value besides its metrics, and whether more of it is better.

        A `Trainer` declares its loss. Declare what a handler of yours records, and others can watch it.

        Raises:
            ConfigurationError: if the name is longer than 100 characters or not printable.
        """
        check_name(name, ConfigurationError)
        self.directions[name] = higher_is_better

    def __getitem__(self, stage: str) -> Record:
        """Return the stage's record, made on first request."""
        if stage not in self._records:
            self._records[stage] = Record(self._measured(stage), self._ranks, **self._counts)
        return self._records[stage]

    def expected(self, sets: Collection[str] | None) -> list[str]:
        """Return the names a run will have, such as ``val_acc``; empty where they cannot be known.

        Args:
            sets: the names of the validation data; "" is that of a single one. None where that is unknown.
        """
        if not self.directions:
            return []
        return [f"{one}_{name}" for one in _labels(sets) for name in self._recorded(one)]

    def may_have(self, name: str, sets: Collection[str] | None) -> bool:
        """Return whether a run may have a value of this name, as far as can be known beforehand."""
        expected = self.expected(sets)
        if not expected or name in expected:
            return True
        if sets is None and name.startswith("val_") and name.endswith(tuple(f"_{one}" for one in self._names())):
            return True  # of a validation set with a name
        starts = [
            f"{one}_{key}_"
            for one in _labels(sets)
            for key, metric in self._measured(one).items()
            if isinstance(metric, ComputedMetric)
        ]
        return name.startswith(tuple(starts))

    def higher_is_better(self, name: str, sets: Collection[str] | None = None) -> bool | None:
        """Return whether more of a value such as ``val_acc`` is better; None where nothing says so."""
        shorts = [name.removeprefix(f"{one}_") for one in _labels(sets) if name.startswith(f"{one}_")]
        if sets is None:
            shorts += [one for one in self._names() if name.endswith(f"_{one}")]
        for short in shorts:
            for key, metric in self._metrics.items():
                if short in _names(key, metric):
                    return higher_is_better(metric)
            if short in self.directions:
                return self.directions[short]
        return None

    def _recorded(self, stage: str) -> list[str]:
        """Return the names of the values of a stage, without its own."""
        return [*self.directions, *(n for key, metric in self._measured(stage).items() for n in _names(key, metric))]

    def _measured(self, stage: str) -> dict[str, Metric]:
        return {
            key: metric for key, metric in self._metrics.items() if stage != "train" or key not in self._only_evaluated
        }

    def _names(self) -> set[str]:
        return {name for key, metric in self._metrics.items() for name in _names(key, metric)} | set(self.directions)


def _labels(sets: Collection[str] | None) -> list[str]:
    return ["train", *(label("val", one) for one in ([""] if sets is None else sets))]


def _names(key: str, metric: Metric) -> tuple[str, ...]:
    return names_of(metric.name) if isinstance(metric, ComputedMetric) else (key,)
