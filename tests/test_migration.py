"""A checkpoint of each format so far, written by the version of its time, is resumed by this one.

Each was written after step 5 of 12, in the second epoch, within a window of accumulation, by a run with the settings
of `trainer`. A new format keeps a file of the one before, in ``data/checkpoint_format_<number>``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers import GOLDEN, class_batches, refused
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from camshaft.callbacks import Accumulate, EarlyStopping, FreezeUntil, RunCheckpoint, Schedule, WeightAverage
from camshaft.engine import Callback, CheckpointDirectory, CheckpointError, Engine, Trainer
from camshaft.engine.migration import FORMAT

OLDER = range(1, FORMAT)
TRAIN, VAL = class_batches(8, 8, 8, 8), class_batches(8, 8, seed=1)


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float().mean()


def trainer(*callbacks: Callback) -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Linear(6, 3))
    return Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        nn.CrossEntropyLoss(),
        metrics={"acc": accuracy, "micro": MulticlassAccuracy(3, average="micro")},
        callbacks=[
            Accumulate(batches=2),
            Schedule(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), per="update"),
            WeightAverage(decay=0.5),
            EarlyStopping("val_loss", mode="min", patience=9),
            FreezeUntil(2, ["0.bias"]),
            *callbacks,
        ],
        seed=0,
    )


def file(number: int) -> Path:
    (path,) = (GOLDEN / f"checkpoint_format_{number}").iterdir()
    return path


def test_there_is_a_file_of_each_older_format() -> None:
    assert len(list(GOLDEN.glob("checkpoint_format_*"))) == len(OLDER)
    for number in OLDER:
        assert torch.load(file(number), weights_only=True)["format"] == number


@pytest.mark.parametrize("number", OLDER)
def test_a_run_of_an_older_format_ends_as_one_that_was_never_cut(number: int) -> None:
    """With the weights, the average, the optimizer's state and the history, also that of the epoch that was open."""
    whole, resumed = trainer(), trainer()
    whole.fit(TRAIN, VAL, epochs=3)
    resumed.fit(TRAIN, VAL, epochs=3, resume=file(number))
    for name in ("model", "weight_average"):
        theirs = whole.parts[name].state_dict()
        for key, value in resumed.parts[name].state_dict().items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-6)
    assert resumed.parts["optimizer"].param_groups[0]["lr"] == whole.parts["optimizer"].param_groups[0]["lr"]
    assert (resumed.epoch, resumed.step, resumed.num_updates) == (whole.epoch, whole.step, whole.num_updates)
    for ours, expected in zip(resumed.history.rows, whole.history.rows, strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("number", OLDER)
def test_what_it_saves_next_is_of_the_present_format(number: int, tmp_path: Path) -> None:
    old = Path(shutil.copy(file(number), tmp_path))
    checkpoint = RunCheckpoint(tmp_path / "new")
    trainer(checkpoint).fit(TRAIN, VAL, epochs=3, resume=old)
    newest = checkpoint.checkpoints.files()[0].path
    assert torch.load(newest, weights_only=True)["format"] == FORMAT


@pytest.mark.parametrize("number", OLDER)
def test_an_older_file_in_which_something_is_missing_is_refused_with_nothing_loaded(
    number: int, tmp_path: Path
) -> None:
    state = torch.load(file(number), weights_only=True)
    for key in sorted(state.keys() - {"format"}):
        (forged := tmp_path / key).mkdir()
        CheckpointDirectory(forged).save({name: value for name, value in state.items() if name != key}, 5)
        engine = trainer()
        before = [value.clone() for value in engine.parts["model"].state_dict().values()]
        with refused(CheckpointError, "does not hold what a checkpoint holds", "nothing was loaded"):
            engine.fit(TRAIN, VAL, epochs=3, resume=forged)
        after = engine.parts["model"].state_dict().values()
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
