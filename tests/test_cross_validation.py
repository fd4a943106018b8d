"""One training for each fold: each sample validates once, and each fold is the run that one would write by hand."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import pytest
from helpers import class_batches, linear, make_trainer, refused
from sklearn.model_selection import StratifiedKFold
from torch.utils.data import DataLoader, Subset, TensorDataset

from camshaft.callbacks import cross_validate
from camshaft.engine import ConfigurationError, Engine, ValidationStepEnd

INPUTS, TARGET = class_batches(23)[0]
DATA = TensorDataset(INPUTS, TARGET)


def in_order(subset: Subset[Any], training: bool) -> Iterable[Any]:
    return DataLoader(subset, 4)


def test_each_sample_validates_once_and_trains_in_all_other_folds() -> None:
    seen: list[list[tuple[float, ...]]] = []

    def make() -> Engine:
        own: list[tuple[float, ...]] = []
        seen.append(own)
        trainer = make_trainer()
        trainer.subscribe(ValidationStepEnd, lambda event: own.extend(map(tuple, event.batch[0].tolist())))
        return trainer

    result = cross_validate(make, DATA, folds=4, epochs=1)
    assert [len(own) for own in seen] == [6, 6, 6, 5]
    assert sorted(row for own in seen for row in own) == sorted(map(tuple, INPUTS.tolist()))
    assert len(result.histories) == 4


def test_each_fold_is_the_run_by_hand() -> None:
    splits = list(StratifiedKFold(3).split(INPUTS, TARGET))
    result = cross_validate(make_trainer, DATA, splits, loader=in_order, epochs=2)
    for history, (train, val) in zip(result.histories, splits, strict=True):
        by_hand = make_trainer()
        expected = by_hand.fit(
            DataLoader(Subset(DATA, train.tolist()), 4), DataLoader(Subset(DATA, val.tolist()), 4), epochs=2
        )
        assert history.rows == expected.rows
    losses = [history["val_loss"][-1] for history in result.histories]
    assert result.values("val_loss") == losses
    assert result.mean("val_loss") == statistics.fmean(losses)
    assert result.std("val_loss") == statistics.stdev(losses)


def test_the_folds_follow_the_seed() -> None:
    first, same, other = (
        cross_validate(make_trainer, DATA, 3, loader=in_order, seed=seed, epochs=1).values("val_loss")
        for seed in (1, 1, 2)
    )
    assert first == same != other


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="folds"):
        cross_validate(make_trainer, DATA, 1, epochs=1)
    with refused(ConfigurationError, "folds=24 is more than the 23 samples.", "Pass a smaller number."):
        cross_validate(make_trainer, DATA, 24, epochs=1)
    one = make_trainer(model=linear())
    with refused(ConfigurationError, "make_trainer returned the same engine twice"):
        cross_validate(lambda: one, DATA, 3, epochs=1)
    with pytest.raises(KeyError, match="val_loss"):
        cross_validate(make_trainer, DATA, 2, epochs=1).values("val_los")
