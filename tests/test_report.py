"""The pictures of a run: real files that show what happened."""

from __future__ import annotations

import csv
import logging
import math
from pathlib import Path
from typing import Any

import ignite.metrics
import numpy as np
import pytest
import torch
from helpers import class_batches, make_trainer, run_python, run_script
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from camshaft.callbacks import Report, RunDirectory
from camshaft.callbacks.report import draw_confusion
from camshaft.engine import ConfigurationError, Engine, EpochEnd, StepEnd

TRAIN, VAL = class_batches(8, 8, 3), class_batches(16, 5)
BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # matplotlib's first two colours


def pixels(file: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return a picture as [H, W, 3] whole numbers."""
    with Image.open(file) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(np.int64)


def num_near(picture: np.ndarray[Any, np.dtype[np.int64]], colour: tuple[int, int, int]) -> int:
    """Return how many pixels are of about this colour."""
    return int((np.abs(picture - np.array(colour)).max(axis=2) < 12).sum())


def pngs(directory: Path) -> set[str]:
    return {path.name for path in directory.glob("*.png") if path.is_file()}


def cells(figure: Figure) -> dict[tuple[int, int], str]:
    """Return the numbers written in a confusion matrix: {(row, column): text}."""
    places = [(text.get_position(), text.get_text()) for text in figure.axes[0].texts]
    return {(round(row), round(column)): text for (column, row), text in places}


def test_there_is_a_real_picture_for_each_value(tmp_path: Path) -> None:
    """loss.png and acc.png open, are no stamps, and have both curves in their two colours."""
    trainer = make_trainer(Report(tmp_path), metrics={"acc": MulticlassAccuracy(3)})
    trainer.fit(TRAIN, VAL, epochs=4)
    assert pngs(tmp_path) == {"loss.png", "acc.png"}
    for name in pngs(tmp_path):
        picture = pixels(tmp_path / name)
        assert picture.shape[0] > 300
        assert picture.shape[1] > 400
        assert num_near(picture, BLUE) > 200
        assert num_near(picture, ORANGE) > 200
        assert num_near(picture, (255, 255, 255)) > picture[..., 0].size / 2


def test_a_run_without_validation_has_one_curve(tmp_path: Path) -> None:
    """Only the training's colour is there."""
    make_trainer(Report(tmp_path)).fit(TRAIN, epochs=3)
    picture = pixels(tmp_path / "loss.png")
    assert num_near(picture, BLUE) > 200
    assert num_near(picture, ORANGE) == 0


def test_the_curves_are_those_of_the_history() -> None:
    """Every epoch's training value, and every validation, each over its place on the axis."""
    history = make_trainer().fit(TRAIN, VAL, epochs=4)
    axes = history.plot("loss").axes[0]
    lines = {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in axes.lines}
    assert lines == {
        "training": [[epoch, value] for epoch, value in enumerate(history["train_loss"], 1)],
        "validation": [[epoch, value] for epoch, value in enumerate(history["val_loss"], 1)],
    }
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "loss")


def test_validations_in_mid_epoch_are_all_drawn_over_steps() -> None:
    """An axis of epochs has no place for them; the training's points stand beside them."""
    history = make_trainer().fit(TRAIN, VAL, epochs=2, validate_every="2 steps")
    axes = history.plot("loss").axes[0]
    steps = {str(line.get_label()): np.asarray(line.get_xdata()).tolist() for line in axes.lines}
    assert steps == {"training": [2, 4, 6], "validation": [2, 4, 6]}
    assert axes.get_xlabel() == "step"


def test_one_epoch_is_a_visible_point(tmp_path: Path) -> None:
    """A line of a single point would be nothing."""
    make_trainer(Report(tmp_path)).fit(TRAIN, epochs=1)
    assert num_near(pixels(tmp_path / "loss.png"), BLUE) > 5


def test_nan_in_a_curve_is_a_gap_and_no_error(tmp_path: Path) -> None:
    """Also a curve of NaN alone, or of infinity, is a picture."""
    run_script([1.0, math.nan, 3.0, 2.0, math.inf], Report(tmp_path / "some"))
    run_script([math.nan, math.nan], Report(tmp_path / "all"))
    assert num_near(pixels(tmp_path / "some" / "score.png"), ORANGE) > 100
    assert pixels(tmp_path / "all" / "score.png").shape[0] > 300


def test_the_true_class_is_down_and_the_predicted_class_across() -> None:
    """Three samples of class 0 taken for class 2 stand in the first row and the last column."""
    figure = draw_confusion(torch.tensor([[5, 0, 3], [0, 4, 0], [1, 0, 7]]))
    assert cells(figure) == {(0, 0): "5", (0, 2): "3", (1, 1): "4", (2, 0): "1", (2, 2): "7"}
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    assert axes.get_ylim() == (2.5, -0.5)  # the first class is at the top
    shares = np.asarray(axes.images[0].get_array())
    assert shares[0].tolist() == [5 / 8, 0, 3 / 8]


@pytest.mark.parametrize("house", ["torchmetrics", "ignite"])
def test_a_run_draws_its_confusion_matrix_with_the_true_class_down(house: str, tmp_path: Path) -> None:
    """A model that always says class 2: the picture's right column is dark and all others are empty."""
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight)
    model.bias.data.copy_(torch.tensor([0.0, 0.0, 9.0]))
    metric = MulticlassConfusionMatrix(3) if house == "torchmetrics" else ignite.metrics.ConfusionMatrix(3)
    make_trainer(Report(tmp_path), model=model, metrics={"confusion": metric}, lr=0.0).fit(TRAIN, VAL, epochs=1)
    picture = pixels(tmp_path / "confusion.png")
    (top, bottom), (left, right) = frame(picture)
    height, width = (bottom - top) / 3, (right - left) / 3
    for row in range(3):
        for column in range(3):
            corner = picture[int(top + (row + 0.15) * height), int(left + (column + 0.15) * width)]
            assert (corner.sum() < 250) == (column == 2), (row, column, corner)


def frame(picture: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return top and bottom, left and right of the square whose left column is the palest blue."""
    palest = np.abs(picture - np.array([247, 251, 255])).max(axis=2) < 3
    rows, columns = np.nonzero(palest.sum(axis=1) > 50)[0], np.nonzero(palest.sum(axis=0) > 50)[0]
    top, bottom, left = int(rows[0]), int(rows[-1]), int(columns[0])
    return (top, bottom), (left, left + bottom - top)


@pytest.mark.parametrize("validates", [True, False])
def test_the_matrix_is_the_validations_of_the_last_epoch(validates: bool, tmp_path: Path) -> None:
    """Below its title the picture is, to the pixel, that of this matrix; without a validation it is the training's."""
    trainer = make_trainer(Report(tmp_path), metrics={"confusion": MulticlassConfusionMatrix(3)})
    matrices: list[Tensor] = []
    name = "val_confusion" if validates else "train_confusion"
    trainer.subscribe(EpochEnd, lambda event: matrices.append(event.metrics[name]))
    trainer.fit(TRAIN, VAL if validates else None, epochs=3)
    assert not torch.equal(matrices[-1], matrices[0])
    draw_confusion(matrices[-1], title="confusion, epoch 3").savefig(tmp_path / "expected.png", dpi=120)
    assert np.array_equal(pixels(tmp_path / "confusion.png")[40:], pixels(tmp_path / "expected.png")[40:])


def test_class_names_stand_at_both_axes() -> None:
    """Long ones upright, so that they do not run into each other."""
    names = ["cat", "elephant", "ox"]
    figure = draw_confusion(torch.eye(3), title="animals", class_names=names)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {90.0}
    assert axes.get_title() == "animals"


@pytest.mark.parametrize("num_classes", [1, 2, 20, 60])
def test_a_matrix_of_any_size_is_a_picture(num_classes: int, tmp_path: Path) -> None:
    """Counts are written as long as they can be read; a class without samples is no division by zero."""
    matrix = torch.randint(0, 50, (num_classes, num_classes), generator=torch.Generator().manual_seed(0))
    matrix[0] = 0
    figure = draw_confusion(matrix)
    figure.savefig(tmp_path / "matrix.png")
    assert pixels(tmp_path / "matrix.png").shape[0] >= 400
    assert len(cells(figure)) == (int((matrix > 0).sum()) if num_classes <= 20 else 0)


@pytest.mark.parametrize("num_classes", [100, 1000])
def test_many_classes_do_not_make_a_picture_that_nothing_can_open(num_classes: int) -> None:
    """Half an inch for each of 1,000 classes would be 60,000 pixels a side, more than matplotlib can draw."""
    width, height = draw_confusion(torch.eye(num_classes)).get_size_inches()
    assert width <= 25
    assert height <= 25


def test_large_counts_and_shares_are_written_in_full() -> None:
    """A million is 1000000 and not 1e+06; a normalised matrix shows its shares."""
    assert cells(draw_confusion(torch.tensor([[1234567, 0], [0, 20]])))[0, 0] == "1234567"
    shares = cells(draw_confusion(torch.tensor([[2 / 3, 1 / 3], [0.0, 1.0]])))
    assert all(len(text) <= 5 for text in shares.values()), shares


def test_in_a_run_directory_the_pictures_lie_beside_the_log(tmp_path: Path) -> None:
    """Report() without a directory draws where the run is."""
    run = RunDirectory(tmp_path)
    make_trainer(Report(), run).fit(TRAIN, epochs=1)
    assert pngs(run.path) == {"loss.png"}


def test_a_run_that_failed_is_drawn_as_far_as_it_came(tmp_path: Path) -> None:
    """An error in epoch 3 leaves the curves of two epochs; one in the first leaves no picture, and no second error."""
    for step, expected in ((7, {"loss.png"}), (2, set[str]())):
        trainer = make_trainer(Report(tmp_path / str(step)))
        trainer.subscribe(StepEnd, lambda event: 1 / 0, when=lambda count, step=step: count == step)
        with pytest.raises(ZeroDivisionError) as caught:
            trainer.fit(TRAIN, VAL, epochs=3)
        assert pngs(tmp_path / str(step)) == expected
        assert not any("While the run was ending" in note for note in caught.value.__notes__)


def test_a_second_fit_draws_the_whole_history(tmp_path: Path) -> None:
    """The picture grows; it is not replaced by one of the second part alone."""
    trainer = make_trainer(Report(tmp_path))
    trainer.fit(TRAIN, epochs=1)
    first = num_near(pixels(tmp_path / "loss.png"), BLUE)
    trainer.fit(TRAIN, epochs=5)
    assert num_near(pixels(tmp_path / "loss.png"), BLUE) > 2 * first


@pytest.mark.parametrize("name", ["top/1", "acc@5", "f1 (macro)", "größe", "a.b"])
def test_a_value_of_any_name_has_its_picture(name: str, tmp_path: Path) -> None:
    """What no file can be called is replaced; the other pictures are drawn in any case."""
    engine = Engine(lambda engine, batch: {name: 1.0, "z": 2.0}, callbacks=[Report(tmp_path)])
    engine.fit([torch.zeros(1)], epochs=2)
    assert len(pngs(tmp_path)) == 2
    assert "z.png" in pngs(tmp_path)


def test_a_disk_that_cannot_be_written_warns_and_the_run_ends_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A directory stands where loss.png should be: a warning, and the history is returned."""
    (tmp_path / "loss.png").mkdir()
    with caplog.at_level(logging.WARNING):
        history = make_trainer(Report(tmp_path), metrics={"acc": MulticlassAccuracy(3)}).fit(TRAIN, epochs=2)
    assert len(history["train_loss"]) == 2
    assert [record.message.split(":")[0] for record in caplog.records] == [
        f"Report could not draw {tmp_path / 'loss.png'}"
    ]
    assert "acc.png" in pngs(tmp_path)


def test_class_names_that_are_too_few_do_not_cost_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two names for three classes: said in a warning, and the matrix is drawn with its numbers."""
    report = Report(tmp_path, class_names=["a", "b"])
    history = make_trainer(report, metrics={"confusion": MulticlassConfusionMatrix(3)}).fit(TRAIN, VAL, epochs=2)
    assert len(history["train_loss"]) == 2
    assert "class_names" in caplog.text
    assert pngs(tmp_path) == {"loss.png", "confusion.png"}


def test_without_anywhere_to_draw_it_is_refused_before_step_1() -> None:
    """The message says both ways out."""
    trainer = make_trainer(Report())
    with pytest.raises(ConfigurationError, match=r"Pass it a directory, or add RunDirectory\(\)"):
        trainer.fit(TRAIN, epochs=1)
    assert trainer.step == 0


NO_DISPLAY = """
import sys
sys.path.insert(0, sys.argv[2])
from helpers import class_batches, make_trainer
from camshaft.callbacks import Report
trainer = make_trainer(Report(sys.argv[1]))
assert "matplotlib" not in sys.modules
trainer.fit(class_batches(8), epochs=1)
assert "matplotlib.pyplot" not in sys.modules
print("matplotlib" in sys.modules)
"""


def test_drawing_needs_no_display_and_leaves_pyplot_alone(tmp_path: Path) -> None:
    """It is loaded when the pictures are drawn, without matplotlib's pyplot, its windows and its global state."""
    run = run_python(NO_DISPLAY, tmp_path, Path(__file__).parent)
    assert (run.returncode, run.stdout) == (0, "True\n"), run.stderr
    assert pngs(tmp_path) == {"loss.png"}


def test_drawing_does_not_change_the_weights(tmp_path: Path) -> None:
    """A run with Report is the run without it, to the bit."""
    drawn, plain = make_trainer(Report(tmp_path)), make_trainer()
    for trainer in (drawn, plain):
        trainer.fit(TRAIN, VAL, epochs=2)
    for mine, other in zip(drawn.parts["model"].parameters(), plain.parts["model"].parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", ["=1+1", "a/b", "../up", "x" * 100])
def test_a_value_may_have_any_name(name: str, tmp_path: Path) -> None:
    """Its picture has a name that a file may have, an epoch is one line of the log, and the CSV has it as it is."""
    run = RunDirectory(tmp_path)
    Engine(lambda engine, batch: {name: 1.0}, callbacks=[run, Report()]).fit([torch.zeros(1)], epochs=1)
    assert len(list(run.path.glob("*.png"))) == 1
    assert "epoch 1/1" in next(line for line in (run.path / "log.log").read_text().splitlines() if "1.0000" in line)
    with open(run.path / "history.csv", newline="") as file:
        assert next(csv.reader(file))[2] == f"train_{name}"
