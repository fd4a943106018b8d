"""Cross-validation: one training for each fold."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from camshaft.engine import ConfigurationError, Engine, History, did_you_mean, format_values, whole_number

logger = logging.getLogger("camshaft")

Fold = tuple[Sequence[int], Sequence[int]]  # the indices to train on, and those to validate on


@dataclass(frozen=True, slots=True)
class CrossValidation:
    """What the folds have reached.

    Args:
        histories: of each fold.
    """

    histories: list[History]

    def values(self, name: str) -> list[float]:
        """Return a value at the end of each fold's last epoch.

        Raises:
            KeyError: if there is no such value.
        """
        known = list(self.histories[0])
        if name not in known:
            raise KeyError(f'There is no value "{name}". {did_you_mean(name, known)}Values: {", ".join(known)}.')
        return [history[name][-1] for history in self.histories]

    def mean(self, name: str) -> float:
        """Return the mean of a value over the folds."""
        return statistics.fmean(self.values(name))

    def std(self, name: str) -> float:
        """Return the standard deviation of a value between the folds; NaN for a single one."""
        values = self.values(name)
        return statistics.stdev(values) if len(values) > 1 else math.nan


def cross_validate(
    make_trainer: Callable[[], Engine],
    dataset: Dataset[Any],
    folds: int | Iterable[Fold] = 5,
    *,
    loader: Callable[[Subset[Any], bool], Iterable[Any]] | None = None,
    batch_size: int = 32,
    seed: int = 0,
    **fit: Any,
) -> CrossValidation:
    """Train once for each fold, on all samples but its own, and validate on those.

    Args:
        make_trainer: makes a new engine, with a new model and new callbacks, for each fold.
        dataset: a map-style dataset of all samples.
        folds: how many folds to draw, at least 2; or what scikit-learn's ``KFold(...).split`` gives: for each fold,
            the indices to train on and those to validate on.
        loader: ``loader(subset, training)`` makes the data of a fold; by default a ``DataLoader``, which shuffles in
            training.
        batch_size: of the default loader.
        seed: for the drawing of the folds.
        fit: what ``engine.fit`` takes: ``epochs=10`` ...

    Raises:
        ConfigurationError: for folds that cannot be, or a ``make_trainer`` that returns the same engine twice.

    >>> from camshaft.engine import Trainer
    >>> from torch import nn
    >>> def make() -> Engine:
    ...     model = nn.Linear(2, 1)
    ...     return Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss())
    >>> data = torch.utils.data.TensorDataset(torch.ones(12, 2), torch.ones(12, 1))
    >>> len(cross_validate(make, data, folds=3, epochs=1).values("val_loss"))
    3
    """
    length = len(dataset)  # type: ignore[arg-type]  # torch does not say that a map-style dataset is sized
    splits = _drawn(length, folds, seed) if isinstance(folds, int) else list(folds)
    histories: list[History] = []
    engines: list[Engine] = []
    for number, (train, val) in enumerate(splits, start=1):
        engine = make_trainer()
        if any(engine is other for other in engines):
            raise ConfigurationError(
                "make_trainer returned the same engine twice, which has learnt from the samples of this fold. "
                "Make a new model, optimizer and engine in it."
            )
        engines.append(engine)
        data = [Subset(dataset, [int(index) for index in indices]) for indices in (train, val)]
        if loader is None:
            loaders: list[Any] = [DataLoader(data[0], batch_size, shuffle=True), DataLoader(data[1], batch_size)]
        else:
            loaders = [loader(data[0], True), loader(data[1], False)]
        histories.append(engine.fit(*loaders, **fit))
        logger.info("fold %d/%d  %s", number, len(splits), format_values(_last(histories[-1])))
        if engine.history.interrupted is not None:
            break
    return CrossValidation(histories)


def _drawn(length: int, folds: int, seed: int) -> list[Fold]:
    """Draw folds whose sizes differ by one at most."""
    whole_number("folds", folds, least=2)
    if folds > length:
        raise ConfigurationError(f"folds={folds} is more than the {length} samples. Pass a smaller number.")
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
    parts = [sorted(order[number::folds]) for number in range(folds)]
    return [(sorted(set(order) - set(part)), part) for part in parts]


def _last(history: History) -> dict[str, float]:
    row = history.rows[-1] if history.rows else {}
    return {name: value for name, value in row.items() if name not in ("epoch", "step")}
