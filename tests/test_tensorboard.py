"""Event files, read back with TensorBoard's own reader."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import class_batches, make_trainer, refused, run_python, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import TENSORS
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginAccumulator
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from camshaft.callbacks import RunCheckpoint, RunDirectory, TensorBoard
from camshaft.engine import ConfigurationError, EngineStateError, EpochEnd, StepEnd, at, every

TRAIN, VAL = class_batches(8, 8, 3), class_batches(16, 5)


def read(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows: for each curve its (step, value) pairs."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def float32(value: float) -> float:
    return float(np.float32(value))


def column(rows: list[dict[str, float]], name: str) -> list[tuple[int, float]]:
    """Return a history's column as an event file holds it."""
    return [(int(row["step"]), float32(row[name])) for row in rows if name in row]


def test_every_value_of_the_history_is_in_the_event_file(tmp_path: Path) -> None:
    """Each epoch's training values and each validation's values, over steps, exactly to float32."""
    trainer = make_trainer(TensorBoard(tmp_path), metrics={"acc": MulticlassAccuracy(3)})
    history = trainer.fit(TRAIN, VAL, epochs=4)
    train_names, val_names = ("train_loss", "train_acc"), ("val_loss", "val_acc")
    expected = {name: column(history.rows, name) for name in train_names}
    expected |= {name: column(history.validations, name) for name in val_names}
    assert read(tmp_path) == expected
    assert [step for step, _ in expected["val_acc"]] == [3, 6, 9, 12]


def test_validations_in_mid_epoch_stand_at_their_own_steps(tmp_path: Path) -> None:
    """All of them, not only the epoch's last, each with the training since the one before."""
    trainer = make_trainer(TensorBoard(tmp_path), metrics={"acc": MulticlassAccuracy(3)})
    history = trainer.fit(TRAIN, VAL, epochs=2, validate_every="2 steps")
    values = read(tmp_path)
    for name in ("train_loss", "val_loss", "val_acc"):
        assert values[name] == column(history.validations, name)
    assert [step for step, _ in values["train_loss"]] == [2, 4, 6]
    assert values["train_acc"] == column(history.rows, "train_acc")  # known for a whole epoch only


def test_nan_and_infinity_are_written_as_they_are(tmp_path: Path) -> None:
    """A run that diverged shows where it did, and tensorboardX's own remark about it is no error."""
    run_script([1.0, math.nan, math.inf], TensorBoard(tmp_path))
    values = [value for _, value in read(tmp_path)["val_score"]]
    assert values == pytest.approx([1.0, math.nan, math.inf], nan_ok=True)


def test_a_metric_that_is_no_scalar_is_left_out(tmp_path: Path) -> None:
    """A confusion matrix has no curve."""
    metrics = {"matrix": MulticlassConfusionMatrix(3)}
    make_trainer(TensorBoard(tmp_path), metrics=metrics).fit(TRAIN, VAL, epochs=1)
    assert set(read(tmp_path)) == {"train_loss", "val_loss"}


def test_in_a_run_directory_it_writes_under_tensorboard(tmp_path: Path) -> None:
    """TensorBoard() without a directory goes where the run is, wherever it stands in the list."""
    run = RunDirectory(tmp_path)
    make_trainer(TensorBoard(), run).fit(TRAIN, epochs=1)
    assert set(read(run.path / "tensorboard")) == {"train_loss"}


def test_a_second_fit_goes_on_in_the_same_directory(tmp_path: Path) -> None:
    """Its steps follow those of the first; TensorBoard shows one curve."""
    trainer = make_trainer(TensorBoard(tmp_path))
    trainer.fit(TRAIN, epochs=2)
    history = trainer.fit(TRAIN, epochs=2)
    assert read(tmp_path)["train_loss"] == column(history.rows, "train_loss")
    assert len(history.rows) == 4


def test_what_was_written_before_a_failure_can_be_read(tmp_path: Path) -> None:
    """A run that raised in epoch 3 has the curves of two epochs, and the writer is closed."""
    trainer = make_trainer(TensorBoard(tmp_path))
    trainer.subscribe(StepEnd, lambda event: 1 / 0, when=lambda step: step == 7)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(TRAIN, VAL, epochs=3)
    assert read(tmp_path)["train_loss"] == column(trainer.history.rows, "train_loss")
    assert len(trainer.history.rows) == 2


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from helpers import class_batches, make_trainer
from camshaft.callbacks import TensorBoard
from camshaft.engine import StepEnd, at
trainer = make_trainer(TensorBoard(sys.argv[1]))
trainer.subscribe(StepEnd, lambda event: (print(trainer.history["train_loss"]), sys.stdout.flush(),
                                          os.kill(os.getpid(), signal.SIGKILL)), when=at(7))
trainer.fit(class_batches(8, 8, 3), epochs=3)
"""


def test_a_killed_run_has_the_curves_of_its_finished_epochs(tmp_path: Path) -> None:
    """Values are on the disk when their epoch ends, not when a buffer is full."""
    run = run_python(KILLED, tmp_path, Path(__file__).parent)
    assert run.returncode == -9, run.stderr
    losses = [float(number) for number in run.stdout.strip("[]\n").split(",")]
    assert read(tmp_path)["train_loss"] == [(3, float32(losses[0])), (6, float32(losses[1]))]


FULL = """
import resource, sys
import torch
from camshaft.callbacks import TensorBoard
from camshaft.engine import Callback, Engine
class Limit(Callback):
    def on_epoch_start(self, event):
        if event.engine.epoch == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
def step(engine, batch):
    return {f"value_{number}": engine.epoch for number in range(int(sys.argv[2]))}
engine = Engine(step, callbacks=[Limit(), TensorBoard(sys.argv[1])])
engine.fit([torch.zeros(1)], epochs=20)
print(engine.epoch)
"""


@pytest.mark.parametrize("num_values", [1, 500])
def test_a_disk_that_is_full_warns_once_and_training_goes_on(num_values: int, tmp_path: Path) -> None:
    """From epoch 3 on no byte more can be written: all 20 epochs run, with one warning, no traceback and no wait."""
    run = run_python(FULL, tmp_path, num_values, timeout=20)
    assert (run.returncode, run.stdout) == (0, "20\n"), run.stderr
    assert run.stderr.count("TensorBoard stops writing") == 1
    assert "Traceback" not in run.stderr


def test_without_anywhere_to_write_it_is_refused_before_step_1() -> None:
    """The message says both ways out."""
    trainer = make_trainer(TensorBoard())
    with pytest.raises(ConfigurationError, match=r"Pass it a directory, or add RunDirectory\(\)"):
        trainer.fit(TRAIN, epochs=1)
    assert trainer.step == 0


def test_a_directory_that_cannot_be_written_is_refused_before_step_1(tmp_path: Path) -> None:
    """A file stands in its way."""
    (tmp_path / "file").write_text("")
    trainer = make_trainer(TensorBoard(tmp_path / "file"))
    with pytest.raises(ConfigurationError, match="TensorBoard cannot write in"):
        trainer.fit(TRAIN, epochs=1)
    assert trainer.step == 0


def test_writing_does_not_change_the_weights(tmp_path: Path) -> None:
    """A run with TensorBoard is the run without it, to the bit."""
    watched, plain = make_trainer(TensorBoard(tmp_path)), make_trainer()
    for trainer in (watched, plain):
        trainer.fit(TRAIN, VAL, epochs=2)
    for mine, other in zip(watched.parts["model"].parameters(), plain.parts["model"].parameters(), strict=True):
        assert torch.equal(mine, other)


def test_ones_own_handler_can_write_beside_it(tmp_path: Path) -> None:
    """A value per step, by tensorboardX itself, in a second file of the same directory."""
    from tensorboardX import SummaryWriter

    trainer = make_trainer(TensorBoard(tmp_path))
    writer: Any = SummaryWriter(str(tmp_path), filename_suffix=".steps")

    @trainer.on(StepEnd, when=every(2))
    def note(event: StepEnd) -> None:
        writer.add_scalar("step_loss", trainer.current.peek()["train_loss"], trainer.step)

    trainer.fit(TRAIN, epochs=2)
    writer.close()
    curves = read(tmp_path)
    assert [step for step, _ in curves["step_loss"]] == [2, 4, 6]
    assert len(curves["train_loss"]) == 2


CUT = """
import os, resource, sys
import torch
from pathlib import Path
from camshaft.callbacks import TensorBoard
from camshaft.engine import Callback, Engine
class Limit(Callback):
    def on_epoch_start(self, event):
        if event.engine.epoch == 3:
            (file,) = Path(sys.argv[1]).iterdir()
            size = file.stat().st_size + 5
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
engine = Engine(lambda engine, batch: {"value": 1.0}, callbacks=[Limit(), TensorBoard(sys.argv[1])])
engine.fit([torch.zeros(1)], epochs=3)
"""


def test_a_last_value_of_which_only_a_part_fits_on_the_disk_warns(tmp_path: Path) -> None:
    """The last record of the run is cut: nothing after it would tell."""
    run = run_python(CUT, tmp_path, timeout=20)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("TensorBoard stops writing") == 1
    assert "Traceback" not in run.stderr
    assert [step for step, _ in read(tmp_path)["train_value"]] == [1, 2]


def read_as_the_server_does(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the same from the newer of TensorBoard's two readers."""
    events = PluginAccumulator(str(directory), size_guidance={TENSORS: 0})
    events.Reload()
    return {
        tag: [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }


def in_child(work: Callable[[], object]) -> None:
    """Do the work in a child, which may be killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def run_until(fatal: int, folder: Path, validate_every: str, save_every: int) -> None:
    """Run with a resume; the process is killed at the end of step ``fatal``, if that is not 0."""
    torch.set_num_threads(1)
    trainer = make_trainer(
        RunCheckpoint(folder / "checkpoints", every_steps=save_every), TensorBoard(folder / "curves")
    )
    if fatal:
        trainer.subscribe(StepEnd, lambda event: os.kill(os.getpid(), signal.SIGKILL), when=at(fatal))
    trainer.fit(TRAIN, VAL, epochs=4, validate_every=validate_every, resume="auto")


@pytest.mark.parametrize(
    ("validate_every", "save_every"), [("1 epochs", 3), ("1 epochs", 4), ("2 steps", 3), ("2 steps", 7)]
)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_killed_run_that_is_resumed_has_each_step_once(validate_every: str, save_every: int, tmp_path: Path) -> None:
    """Killed before its first checkpoint, in mid-epoch, and just after one: the curves are those of one whole run."""
    in_child(lambda: run_until(0, tmp_path / "whole", validate_every, save_every))
    for fatal in (2, 4, 5, 7, 10, 12, 0):
        in_child(lambda fatal=fatal: run_until(fatal, tmp_path / "killed", validate_every, save_every))  # type: ignore[misc]
    whole = read(tmp_path / "whole/curves")
    assert [step for step, _ in whole["train_loss"]][-1] == 12
    assert read(tmp_path / "killed/curves") == whole
    assert read_as_the_server_does(tmp_path / "killed/curves") == whole


def test_a_run_that_finds_no_checkpoint_begins_its_curves_again(tmp_path: Path) -> None:
    """The one before it was killed when its first epoch was written, and not yet saved."""
    make_trainer(TensorBoard(tmp_path / "curves")).fit(TRAIN, epochs=3)
    trainer = make_trainer(TensorBoard(tmp_path / "curves"), RunCheckpoint(tmp_path / "checkpoints"))
    history = trainer.fit(TRAIN, epochs=2, resume="auto")
    assert read(tmp_path / "curves") == {"train_loss": column(history.rows, "train_loss")}


# What handlers of one's own write --------------------------------------------------------------------------


def events_of(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory), size_guidance={"images": 0, "histograms": 0, "tensors": 0})
    events.Reload()
    return events


def test_a_handler_of_ones_own_writes_images_figures_histograms_and_texts(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    board = TensorBoard(tmp_path)
    trainer = make_trainer(board)

    @trainer.on(EpochEnd)
    def write(event: EpochEnd) -> None:
        step, writer = event.engine.step, board.writer
        writer.add_image("floats", torch.linspace(0, 1, 12).reshape(3, 2, 2), step)
        writer.add_image("bytes", torch.full((2, 5), 255, dtype=torch.uint8), step)
        figure = Figure(figsize=(2.0, 1.0), dpi=50)
        figure.subplots().plot([1, 2])
        writer.add_figure("figure", figure, step)
        writer.add_histogram("values", torch.tensor([1.0, 2.0, 2.0, math.nan]), step)
        writer.add_text("note", "**well**", step)
        writer.add_scalar("twice", torch.tensor(2.0 * step), step)

    trainer.fit(TRAIN, epochs=2)
    events = events_of(tmp_path)
    assert {image.step for image in events.Images("floats")} == {3, 6}
    assert [(image.width, image.height) for image in events.Images("bytes")] == [(5, 2)] * 2
    assert [(image.width, image.height) for image in events.Images("figure")] == [(100, 50)] * 2
    histogram = events.Histograms("values")[0].histogram_value
    assert (histogram.num, histogram.min, histogram.max) == (3, 1.0, 2.0)
    assert read(tmp_path)["twice"] == [(3, 6.0), (6, 12.0)]


def test_histograms_of_chosen_parameters_are_written_each_epoch(tmp_path: Path) -> None:
    trainer = make_trainer(TensorBoard(tmp_path, histograms=["weight"]))
    trainer.fit(TRAIN, epochs=2)
    events = events_of(tmp_path)
    assert events.Tags()["histograms"] == ["weight"]
    first, last = events.Histograms("weight")
    assert (first.step, last.step) == (3, 6)
    assert last.histogram_value.sum == pytest.approx(float(trainer.parts["model"].weight.detach().sum()), rel=1e-5)


def test_histograms_of_names_that_match_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="wieght"):
        make_trainer(TensorBoard(tmp_path, histograms=["wieght"]))


def test_the_writer_is_there_only_during_a_fit(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    make_trainer(board).fit(TRAIN, epochs=1)
    for one in (board, TensorBoard(tmp_path)):
        with refused(EngineStateError, "TensorBoard's writer was asked for outside a fit.", "Ask in a handler."):
            _ = one.writer


@pytest.mark.parametrize("step", [4, 5])
def test_what_was_written_at_steps_that_a_resumed_run_repeats_is_there_once(step: int, tmp_path: Path) -> None:
    def make() -> Any:
        board = TensorBoard(tmp_path / "board")
        trainer = make_trainer(board, RunCheckpoint(tmp_path / "checkpoints", every_steps=3))
        trainer.subscribe(StepEnd, lambda event: board.writer.add_scalar("own", event.engine.step, event.engine.step))
        return trainer

    first, resumed = make(), make()
    first.subscribe(StepEnd, lambda event: 1 / 0, when=at(step))
    with pytest.raises(ZeroDivisionError):
        first.fit(TRAIN, epochs=2)
    resumed.fit(TRAIN, epochs=2, resume="auto")
    assert [number for number, _ in read(tmp_path / "board")["own"]][-3:] == [4, 5, 6]
    assert len(read(tmp_path / "board")["own"]) in (5, 6)


def test_the_first_import_of_its_package_draws_no_random_numbers(tmp_path: Path) -> None:
    """The package imports comet_ml where that is installed, which draws some."""
    run_python(
        "import random, sys\n"
        "from camshaft.callbacks import TensorBoard\n"
        "from camshaft.engine import FitStart\n"
        "from camshaft.testing import toy_data, toy_engine\n"
        "engine, states = toy_engine(TensorBoard(sys.argv[1])), []\n"
        "engine.subscribe(FitStart, lambda event: states.append(random.getstate()))\n"
        "assert 'tensorboardX' not in sys.modules\n"
        "before = random.getstate()\n"
        "engine.fit(*toy_data(), epochs=1)\n"
        "assert states == [before]\n",
        tmp_path,
    ).check_returncode()
