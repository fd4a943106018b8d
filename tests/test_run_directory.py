"""The run directory: everything needed to understand a run, and logging left as it was found."""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import class_batches, make_trainer, refused, regression, run_python
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from camshaft.callbacks import BestCheckpoint, EarlyStopping, ProgressBar, RunCheckpoint, RunDirectory
from camshaft.engine import ConfigurationError, Engine, EpochEnd, EpochStart, FitEnd, FitStart, History, StepEnd, at

TRAIN, VAL = class_batches(8, 8, 3), class_batches(16, 5)


@dataclass
class Settings:
    lr: float
    data: Path


@contextmanager
def bare_logging() -> Iterator[logging.Logger]:
    """The root logger as a script has it, at level WARNING and without pytest's handlers; it is left that way."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers
    root.handlers = []
    root.setLevel(logging.WARNING)
    try:
        yield root
        assert (root.level, root.handlers) == (logging.WARNING, [])
    finally:
        root.handlers = handlers
        root.setLevel(level)


def log(run: RunDirectory) -> str:
    return (run.path / "log.log").read_text()


def test_it_holds_log_settings_environment_and_history(tmp_path: Path) -> None:
    """Seven files after a plain run, in a directory named by the time at which the run started."""
    run = RunDirectory(tmp_path / "deep" / "runs")
    make_trainer(run).fit(TRAIN, VAL, epochs=2)
    assert {path.name for path in run.path.iterdir()} == {
        "log.log", "settings.json", "environment.json", "history.csv", "handlers.txt", "model.txt", "timeline.jsonl",
    }  # fmt: skip
    assert run.path.parent == tmp_path / "deep" / "runs"
    assert pd.to_datetime(run.path.name, format="%Y-%m-%d_%H-%M-%S") <= pd.Timestamp.now()


@pytest.mark.parametrize(
    "settings",
    [{"lr": 0.1, "data": Path("a")}, argparse.Namespace(lr=0.1, data=Path("a")), Settings(0.1, Path("a"))],
    ids=["dict", "Namespace", "dataclass"],
)
def test_settings_are_written_when_the_run_is_set_up(settings: object, tmp_path: Path) -> None:
    """Before the first step, from whatever holds names and values; what JSON has no form for is written as text."""
    run = RunDirectory(tmp_path, settings=settings)
    make_trainer(run)
    assert json.loads((run.path / "settings.json").read_text()) == {"lr": 0.1, "data": "a"}


def test_settings_stand_in_the_log_too(tmp_path: Path) -> None:
    """One file tells the whole story: the settings are near its top."""
    run = RunDirectory(tmp_path, settings={"lr": 0.1, "name": "first"})
    make_trainer(run).fit(TRAIN, epochs=1)
    assert '{"lr": 0.1, "name": "first"}' in "".join(log(run).splitlines()[:3])


def test_settings_without_names_are_refused_at_construction(tmp_path: Path) -> None:
    """And no empty directory is left behind."""
    with pytest.raises(ConfigurationError, match=r"Pass a dict, an argparse\.Namespace or a dataclass"):
        RunDirectory(tmp_path, settings=["lr", 0.1])
    assert list(tmp_path.iterdir()) == []


def test_the_environment_tells_versions_machine_and_command(tmp_path: Path) -> None:
    """What ran, with what, on what."""
    run = RunDirectory(tmp_path)
    make_trainer(run)
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["command"] == sys.argv
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0]
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["devices"] == [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    assert {"started", "platform", "cpus"} <= set(environment)


def read_back(run: RunDirectory) -> dict[str, list[float]]:
    with open(run.path / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name] or math.nan) for row in rows] for name in rows[0]}


def assert_same(table: dict[str, list[float]], history: History) -> None:
    assert list(table) == list(history)
    for name in history:
        assert table[name] == pytest.approx(history[name], abs=0.0, rel=0.0, nan_ok=True), name


def test_history_csv_is_the_history_exactly(tmp_path: Path) -> None:
    """Every column in the same order, every number to its last bit, a matrix left out."""
    run = RunDirectory(tmp_path)
    metrics = {"acc": MulticlassAccuracy(3), "matrix": MulticlassConfusionMatrix(3)}
    history = make_trainer(run, metrics=metrics).fit(TRAIN, VAL, epochs=3)
    assert_same(read_back(run), history)


def test_epochs_without_a_validation_and_values_that_are_nan_are_nan_in_the_csv(tmp_path: Path) -> None:
    """validate_every=2 leaves every other cell empty, which reads as NaN; a NaN loss is NaN as well."""
    data = class_batches(8, 8, 3)
    data[2][0][0, 0] = math.nan
    run = RunDirectory(tmp_path)
    history = make_trainer(run).fit(data, VAL, epochs=4, validate_every=2)
    assert [math.isnan(value) for value in read_back(run)["train_loss"]] == [True] * 4
    assert_same(read_back(run), history)


def test_history_csv_is_whole_after_every_epoch(tmp_path: Path) -> None:
    """Whoever looks at a running experiment sees all epochs so far."""
    run, lengths = RunDirectory(tmp_path), list[int]()
    trainer = make_trainer(run)
    trainer.subscribe(EpochEnd, lambda event: lengths.append(len(read_back(run)["epoch"])))
    trainer.fit(TRAIN, VAL, epochs=3)
    assert lengths == [1, 2, 3]


def test_each_epoch_has_one_line_in_the_log_with_its_values(tmp_path: Path) -> None:
    """With the time, and at the end the reason why the run stopped."""
    run = RunDirectory(tmp_path)
    stopping = EarlyStopping("train_loss", "max", patience=1)
    history = make_trainer(run, stopping).fit(TRAIN, VAL, epochs=9)
    lines = log(run).splitlines()
    epochs = [line for line in lines if "camshaft.epochs: epoch" in line]
    assert [line.split("epoch ")[1].split()[0] for line in epochs] == ["1/9", "2/9"]
    for line, loss in zip(epochs, history["val_loss"], strict=True):
        assert f"val_loss {loss:.4f}" in line
        assert line[:4].isdigit()
    assert history.reason in log(run)


def test_ones_own_loggers_land_in_the_log(tmp_path: Path) -> None:
    """Whatever goes through Python's logging during a fit, from INFO up, with its logger's name and level."""
    run = RunDirectory(tmp_path, terminal=False)
    trainer = make_trainer(run)
    mine = logging.getLogger("my.project")
    trainer.subscribe(StepEnd, lambda event: mine.info("step %d: größer", event.engine.step))
    trainer.subscribe(StepEnd, lambda event: mine.warning("careful"), when=at(2))
    with bare_logging():
        trainer.fit(TRAIN, epochs=1)
    assert "INFO my.project: step 3: größer" in log(run)
    assert "WARNING my.project: careful" in log(run)


def test_python_warnings_do_not_get_lost_with_a_captured_log(tmp_path: Path) -> None:
    """With logging.captureWarnings(True), which is the user's to call, they are in the log, too."""
    run = RunDirectory(tmp_path, terminal=False)
    trainer = make_trainer(run)
    trainer.subscribe(StepEnd, lambda event: warnings.warn("odd data", stacklevel=1), when=at(1))
    with bare_logging(), warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        trainer.fit(TRAIN, epochs=1)
        logging.captureWarnings(False)
    assert "odd data" in log(run)


def test_two_runs_within_a_second_get_two_directories(tmp_path: Path) -> None:
    """Also twenty, and those of processes at the same time: nobody writes into another's."""
    paths = [RunDirectory(tmp_path).path for _ in range(20)]
    script = "import sys; from camshaft.callbacks import RunDirectory; RunDirectory(sys.argv[1])"
    processes = [subprocess.Popen([sys.executable, "-c", script, tmp_path]) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert len(set(paths)) == 20
    assert len(list(tmp_path.iterdir())) == 22
    assert sorted(paths, key=lambda path: path.stat().st_ctime_ns) == paths


def test_the_names_of_many_runs_sort_by_time(tmp_path: Path) -> None:
    """A listing shows the runs of one second in the order in which they started."""
    names = [RunDirectory(tmp_path).path.name for _ in range(11)]
    assert sorted(names) == names


@pytest.mark.parametrize("terminal", [True, False])
def test_the_root_logger_is_put_back_after_a_run(terminal: bool, tmp_path: Path) -> None:
    """Level and handlers are the user's again; during the run there are those for the file and the terminal."""
    trainer = make_trainer(RunDirectory(tmp_path, terminal=terminal))
    during: list[tuple[int, int]] = []
    with bare_logging() as root:
        trainer.subscribe(StepEnd, lambda event: during.append((root.level, len(root.handlers))), when=at(1))
        trainer.fit(TRAIN, epochs=1)
    assert during == [(logging.INFO, 2 if terminal else 1)]


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO, logging.ERROR])
def test_a_level_and_handlers_of_ones_own_are_kept(level: int, tmp_path: Path) -> None:
    """A finer level stays, a coarser one is INFO for the length of the run; both come back."""
    mine = logging.NullHandler()
    trainer = make_trainer(RunDirectory(tmp_path, terminal=False))
    during: list[int] = []
    trainer.subscribe(StepEnd, lambda event: during.append(logging.getLogger().level), when=at(1))
    with bare_logging() as root:
        root.addHandler(mine)
        root.setLevel(level)
        trainer.fit(TRAIN, epochs=1)
        assert (root.level, root.handlers) == (level, [mine])
        root.removeHandler(mine)
        root.setLevel(logging.WARNING)
    assert during == [min(level, logging.INFO)]


def test_the_root_logger_is_put_back_after_a_failure(tmp_path: Path) -> None:
    """And the error's traceback, with the handler that raised it, is in the log."""
    run = RunDirectory(tmp_path, terminal=False)
    trainer = make_trainer(run)
    trainer.subscribe(StepEnd, broken_handler, when=at(2))
    with bare_logging(), pytest.raises(ZeroDivisionError):
        trainer.fit(TRAIN, epochs=1)
    assert "Traceback (most recent call last)" in log(run)
    assert "in broken_handler" in log(run)
    assert "ZeroDivisionError: division by zero" in log(run)
    assert "Raised by broken_handler, a handler of StepEnd, at step 2." in log(run)
    assert "End of the run: failed with ZeroDivisionError" in log(run)


def broken_handler(event: StepEnd) -> None:
    _ = 1 / 0


def test_a_handler_that_fails_while_the_run_ends_is_in_the_log_too(tmp_path: Path) -> None:
    """An error in FitEnd is an error of the run."""
    run = RunDirectory(tmp_path, terminal=False)
    trainer = make_trainer(run)
    trainer.subscribe(FitEnd, lambda event: [][0])
    with bare_logging(), pytest.raises(IndexError):
        trainer.fit(TRAIN, epochs=1)
    assert "IndexError: list index out of range" in log(run)


def test_a_loop_that_the_user_leaves_is_no_failure(tmp_path: Path) -> None:
    """In the script style, by a break: the reason is in the log, and neither an ERROR nor a traceback."""
    run = RunDirectory(tmp_path, terminal=False)
    engine = Engine(callbacks=[run])
    with bare_logging():
        for _ in engine.epochs(5):
            for _ in engine.train([torch.zeros(1)] * 2):
                engine.record(loss=1.0)
            break
    assert "the loop was left in epoch 1" in log(run)
    assert "ERROR" not in log(run)
    assert "GeneratorExit" not in log(run)


def test_ctrl_c_is_in_the_log_and_the_loggers_are_put_back(tmp_path: Path) -> None:
    """KeyboardInterrupt ends a run like any error does."""

    def interrupt(event: StepEnd) -> None:
        raise KeyboardInterrupt

    run = RunDirectory(tmp_path, terminal=False)
    trainer = make_trainer(run)
    trainer.subscribe(StepEnd, interrupt, when=at(2))
    with bare_logging(), pytest.raises(KeyboardInterrupt):
        trainer.fit(TRAIN, epochs=1)
    assert "KeyboardInterrupt" in log(run)


def test_a_second_fit_goes_on_in_the_same_log(tmp_path: Path) -> None:
    """Nothing of the first is overwritten, and no line is written twice."""
    run = RunDirectory(tmp_path)
    trainer = make_trainer(run)
    trainer.fit(TRAIN, epochs=2)
    history = trainer.fit(TRAIN, epochs=2)
    numbers = [line.split("epoch ")[1].split("/")[0] for line in log(run).splitlines() if "epochs: epoch" in line]
    assert numbers == ["1", "2", "3", "4"]
    assert_same(read_back(run), history)


KILLED = """
import logging, os, signal, sys
sys.path.insert(0, sys.argv[2])
from helpers import class_batches, make_trainer
from camshaft.callbacks import RunDirectory
from camshaft.engine import StepEnd, at
trainer = make_trainer(RunDirectory(sys.argv[1]))
def kill(event):
    logging.getLogger("mine").info("the last line")
    os.kill(os.getpid(), signal.SIGKILL)
trainer.subscribe(StepEnd, kill, when=at(8))
trainer.fit(class_batches(8, 8, 3), epochs=9)
"""


def test_the_log_and_the_history_of_a_killed_run_go_up_to_its_last_moment(tmp_path: Path) -> None:
    """SIGKILL in epoch 3: the last line that was logged is there, and so are two epochs in the csv."""
    run = run_python(KILLED, tmp_path, Path(__file__).parent)
    assert run.returncode == -9, run.stderr
    (path,) = tmp_path.iterdir()
    assert (path / "log.log").read_text().endswith("INFO mine: the last line\n")
    assert len((path / "history.csv").read_text().splitlines()) == 1 + 2


TERMINAL = """
import logging, sys
sys.path.insert(0, sys.argv[2])
from helpers import class_batches, make_trainer
from camshaft.callbacks import ProgressBar, RunDirectory
from camshaft.engine import StepEnd, at
for way in ("plain", "configured", "bar", "quiet"):
    print("==", way, file=sys.stderr)
    if way == "configured":
        logging.basicConfig(format="MINE %(message)s")
    callbacks = [ProgressBar()] if way == "bar" else []
    trainer = make_trainer(RunDirectory(sys.argv[1], terminal=way != "quiet"), *callbacks)
    trainer.subscribe(StepEnd, lambda event: logging.getLogger("mine").info("a line of mine"), when=at(2))
    trainer.fit(class_batches(8, 8, 3), epochs=2)
    logging.getLogger().handlers.clear()
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What a script shows on the terminal, for each way of setting up logging."""
    run = run_python(TERMINAL, tmp_path_factory.mktemp("runs"), Path(__file__).parent)
    assert run.returncode == 0, run.stderr
    parts = run.stderr.split("== ")[1:]
    return {part.splitlines()[0]: part.splitlines()[1:] for part in parts}


@pytest.mark.parametrize(("way", "times"), [("plain", 1), ("configured", 1), ("bar", 1), ("quiet", 0)])
def test_each_line_is_on_the_terminal_once_however_logging_is_set_up(
    way: str, times: int, shown: dict[str, list[str]]
) -> None:
    """By itself, through the user's own handler, beside a bar that writes the epochs, or not at all."""
    for text in ("a line of mine", "epoch 1/2", "epoch 2/2", "2 epochs done"):
        assert sum(text in line for line in shown[way]) == times, text
    assert any(line.startswith("MINE") for line in shown[way]) == (way == "configured")


def test_settings_and_environment_end_with_a_newline(tmp_path: Path) -> None:
    """They are text files: cat leaves the prompt on its own line."""
    run = RunDirectory(tmp_path, settings={"lr": 0.1})
    make_trainer(run)
    for name in ("settings.json", "environment.json"):
        assert (run.path / name).read_text().endswith("}\n")


def test_a_root_that_cannot_be_written_is_refused_at_construction(tmp_path: Path) -> None:
    """A file stands in its place."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"RunDirectory cannot write in .*/file: File exists"):
        RunDirectory(tmp_path / "file")


def test_a_second_run_directory_is_refused(tmp_path: Path) -> None:
    """Handlers that write could not know which one is meant."""
    with pytest.raises(ConfigurationError, match="The engine has a RunDirectory already"):
        make_trainer(RunDirectory(tmp_path), RunDirectory(tmp_path))


FULL = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from helpers import class_batches, make_trainer
from camshaft.callbacks import RunDirectory
from camshaft.engine import EpochStart, at
trainer = make_trainer(RunDirectory(sys.argv[1]))
trainer.subscribe(EpochStart, lambda event: resource.setrlimit(resource.RLIMIT_FSIZE, (80, 80)), when=at(3))
print(trainer.fit(class_batches(8, 8, 3), epochs=5)["epoch"])
"""


def test_a_full_disk_does_not_end_the_training(tmp_path: Path) -> None:
    """From epoch 3 on nothing can be written: five epochs run, warnings say what is missing, the csv has two."""
    run = run_python(FULL, tmp_path, Path(__file__).parent)
    assert (run.returncode, run.stdout) == (0, "[1, 2, 3, 4, 5]\n"), run.stderr
    assert "history.csv could not be written" in run.stderr
    (path,) = tmp_path.iterdir()
    assert len((path / "history.csv").read_text().splitlines()) == 1 + 2


def test_logging_does_not_change_the_weights(tmp_path: Path) -> None:
    """A run with RunDirectory and ProgressBar is the run without them, to the bit."""
    with open(tmp_path / "bar.txt", "w") as file:
        watched, plain = make_trainer(RunDirectory(tmp_path), ProgressBar(file=file)), make_trainer()
        for trainer in (watched, plain):
            trainer.fit(TRAIN, VAL, epochs=2)
    for mine, other in zip(watched.parts["model"].parameters(), plain.parts["model"].parameters(), strict=True):
        assert torch.equal(mine, other)


def test_validations_in_mid_epoch_have_a_table_and_a_line_each(tmp_path: Path) -> None:
    """In each style; validations after an epoch are in its row and line."""
    data, val = class_batches(8, 8, 8, 8), class_batches(8)
    run = RunDirectory(tmp_path, terminal=False)
    engine = Engine(callbacks=[run])
    for _ in engine.epochs(1):
        for _ in engine.train(data):
            engine.record(loss=float(engine.step))
            if engine.step % 2 == 0:
                for _ in engine.validate(val):
                    engine.record(loss=9.0)
    table = (run.path / "validations.csv").read_text()
    assert table == "epoch,step,train_loss,val_loss\n1,2,1.5,9.0\n1,4,3.5,9.0\n"
    assert "step 2  train_loss 1.5000  val_loss 9.0000" in (run.path / "log.log").read_text()
    plain = RunDirectory(tmp_path, terminal=False)
    make_trainer(plain).fit(data, val, epochs=1)
    assert not (plain.path / "validations.csv").exists()


def directories(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir())


def run_to_4(root: Path, checkpoints: Path, *, stop_at: int | None = None, name: str | None = None) -> Engine:
    """Resume what there is, with a fresh run directory, up to epoch 4; ``stop_at`` is the step of a signal.

    ``name`` is for the directory, which may otherwise have that of another run of this second under another root.
    The loss falls and the highest is kept, so the best weights are those of the first epoch.
    """
    run, best = RunDirectory(root, terminal=False), BestCheckpoint("train_loss", "max", restore=True)
    run.run_directory = run.path.rename(run.path.with_name(name or run.path.name))
    trainer = make_trainer(best, run, RunCheckpoint(checkpoints))
    trainer.subscribe(
        StepEnd, lambda event: trainer.run.interrupt(signal.SIGTERM) if trainer.step == stop_at else None
    )
    trainer.fit(TRAIN, VAL, epochs=4, resume="auto")
    return trainer


def test_a_resumed_run_goes_on_in_the_directory_of_the_run_that_was_interrupted(tmp_path: Path) -> None:
    """One directory, one log, the whole history, and at the end the best weights from before the interruption."""
    root, checkpoints = tmp_path / "runs", tmp_path / "checkpoints"
    run_to_4(root, checkpoints, stop_at=5)
    (path,) = directories(root)
    first_log = (path / "log.log").read_text()
    best = torch.load(path / "checkpoints" / "best.pt", weights_only=True)
    trainer = run_to_4(root, checkpoints)
    assert (directories(root), trainer.directory) == ([path], path)
    log = (path / "log.log").read_text()
    assert log.startswith(first_log)
    assert [log.count(f"epoch {number}/4 ") for number in range(1, 5)] == [1, 1, 1, 1]
    assert len((path / "history.csv").read_text().splitlines()) == 1 + 4
    for name, value in trainer.parts["model"].state_dict().items():
        assert torch.equal(value, best[name])


def test_a_run_resumed_under_another_root_goes_on_there_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The best weights stayed in the earlier directory; of those that are here, the ones of epoch 2 are best."""
    run_to_4(tmp_path / "old", tmp_path / "checkpoints", stop_at=5, name="the first")
    (old,) = directories(tmp_path / "old")
    before = (old / "log.log").read_text()
    trainer = run_to_4(tmp_path / "new", tmp_path / "checkpoints")
    (new,) = directories(tmp_path / "new")
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == [
        f"The directory of the resumed run is not in {tmp_path / 'new'}. The run continues in {new}.",
        f"The best weights of the resumed run are not in {new / 'checkpoints'}. BestCheckpoint starts again.",
    ]
    assert (trainer.directory, (old / "log.log").read_text()) == (new, before)
    assert "at epoch 2" in (new / "log.log").read_text()
    best = torch.load(new / "checkpoints" / "best.pt", weights_only=True)
    assert all(torch.equal(value, best[name]) for name, value in trainer.parts["model"].state_dict().items())


@pytest.mark.parametrize("name", ["../elsewhere", "", ".", "..", 3, None])
def test_the_name_of_an_earlier_directory_that_leads_elsewhere_is_not_followed(
    name: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A forged checkpoint cannot make a run write outside its root; absolute names neither."""
    (tmp_path / "elsewhere").mkdir()
    run = RunDirectory(tmp_path / "runs", terminal=False)
    path = run.path
    for forged in (name, str(tmp_path / "elsewhere")):
        run.before_resume({"name": forged})
        assert run.path == path
    assert path.is_dir()
    assert caplog.text.count("The directory of the resumed run is not in") == 2


def test_an_earlier_directory_that_is_a_link_to_elsewhere_is_not_followed(tmp_path: Path) -> None:
    """But the root itself may be a link, and a link may lead to another directory in the root."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "disk" / "first").mkdir(parents=True)
    root = tmp_path / "runs"
    root.symlink_to("disk")
    (root / "out").symlink_to(tmp_path / "elsewhere")
    (root / "latest").symlink_to("first")
    run = RunDirectory(root, terminal=False)
    for name, taken in (("out", False), ("latest", True), ("first", True)):
        run.before_resume({"name": name})
        assert (run.path == root / name) == taken
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_what_a_killed_run_left_half_written_is_removed_when_it_is_resumed(tmp_path: Path) -> None:
    """Of its tables and of its descriptions; no other file is touched."""
    run = RunDirectory(tmp_path, terminal=False)
    Engine(lambda engine, batch: {"loss": 1.0}, callbacks=[run]).fit([torch.ones(1)], epochs=1)
    half = [".history.csv.a1b2.tmp", ".validations.csv.a.tmp", ".settings.json.a.tmp", ".environment.json.a.tmp"]
    for name in (*half, ".handlers.txt.a.tmp", ".mine.tmp", ".history.csv.swp"):
        (run.path / name).touch()
    again = RunDirectory(tmp_path, terminal=False)
    again.before_resume(run.state_dict())
    assert {path.name for path in run.path.glob(".*")} == {".mine.tmp", ".history.csv.swp"}


def test_a_new_run_directory_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root in which it lies is synced after it was made."""
    synced: dict[int, list[str]] = {}
    fsync = os.fsync

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        synced[os.fstat(descriptor).st_ino] = os.listdir(tmp_path)

    monkeypatch.setattr(os, "fsync", sync)
    run = RunDirectory(tmp_path)
    assert synced == {tmp_path.stat().st_ino: [run.path.name]}


@pytest.mark.parametrize("settings", ["fast", 3, ["lr", 0.1]])
def test_settings_of_a_run_need_names(settings: object, tmp_path: Path) -> None:
    with refused(ConfigurationError, f"settings is {settings!r}"):
        RunDirectory(tmp_path, settings=settings)


def test_two_run_directories_are_refused(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path)
    with refused(ConfigurationError, "has a RunDirectory already"):
        regression(callbacks=[first, RunDirectory(tmp_path)])


def test_a_run_directory_that_cannot_be_made_is_refused_where_it_is_written(below_a_file: Path) -> None:
    with refused(ConfigurationError, f"RunDirectory cannot write in {below_a_file}: Not a directory."):
        RunDirectory(below_a_file)


def test_rows_are_appended_to_the_history_and_the_file_is_written_again_only_for_a_new_column(tmp_path: Path) -> None:
    """So that an epoch costs the same however many came before it."""
    run = RunDirectory(tmp_path, terminal=False)
    trainer = make_trainer(run)
    files: list[int] = []

    def look(event: EpochEnd) -> None:
        files.append((run.path / "history.csv").stat().st_ino)

    def add(event: StepEnd) -> None:
        if event.engine.epoch >= 4:
            event.engine.record(extra=float(event.engine.epoch), weight=1)

    trainer.subscribe(StepEnd, add)
    trainer.subscribe(EpochEnd, look)
    history = trainer.fit(TRAIN, epochs=6)
    assert len(set(files[:3])) == 1
    assert files[3] != files[2]
    assert len(set(files[3:])) == 1
    table = pd.read_csv(run.path / "history.csv")
    pd.testing.assert_frame_equal(table, history.to_frame(), check_dtype=False)


def test_a_resumed_run_continues_the_same_table_without_a_gap_or_a_row_twice(tmp_path: Path) -> None:
    """The first run wrote two epochs more than its last checkpoint holds."""

    def make() -> Engine:
        checkpoint = RunCheckpoint(tmp_path / "checkpoints", every_epochs=3)
        return make_trainer(RunDirectory(tmp_path / "runs", terminal=False), checkpoint)

    first, resumed = make(), make()
    first.subscribe(EpochEnd, lambda event: 1 / 0, when=at(5))
    with pytest.raises(ZeroDivisionError):
        first.fit(TRAIN, epochs=6)
    resumed.fit(TRAIN, epochs=6, resume="auto")
    assert resumed.directory == first.directory
    table = pd.read_csv(Path(str(resumed.directory)) / "history.csv")
    assert table["epoch"].tolist() == [1, 2, 3, 4, 5, 6]


@dataclass
class Account:
    user: str
    password: str


SECRETS = {
    "hf_token": "s3cret", "apiKey": "s3cret", "API_KEYS": ["s3cret"], "password": 53211, "SECRET": {"a": "s3cret"},
    "login": {"deep": [{"access_key": "s3cret"}]}, "account": Account("me", "s3cret"),
    "options": argparse.Namespace(db=argparse.Namespace(passwd="s3cret")),
}  # fmt: skip


@pytest.mark.parametrize("kind", [dict, lambda settings: argparse.Namespace(**settings)])
def test_secrets_among_the_settings_are_written_nowhere(kind: Callable[..., object], tmp_path: Path) -> None:
    """What has key, token, password or secret in its name, at any depth; the rest is written as it is."""
    harmless = {"max_tokens": 512, "key_size": 64, "tokenizer": "bpe", "keywords": "a", "lr": 0.1}
    run = RunDirectory(tmp_path, settings=kind(SECRETS | harmless))
    make_trainer(run).fit(TRAIN, epochs=1)
    written = "".join(file.read_text() for file in run.path.iterdir())
    assert "s3cret" not in written
    assert "53211" not in written
    settings = json.loads((run.path / "settings.json").read_text())
    assert settings["hf_token"] == settings["SECRET"] == settings["account"]["password"] == "***"
    assert settings["account"]["user"] == "me"
    assert settings["login"] == {"deep": [{"access_key": "***"}]}
    assert {name: settings[name] for name in harmless} == harmless
    assert run.settings["hf_token"] == "s3cret"  # the program's own is unchanged


@pytest.mark.parametrize(
    ("command", "written"),
    [
        (["--token", "s3cret", "--lr", "0.1"], ["--token", "***", "--lr", "0.1"]),
        (["--api-keys", "s3cret", "s3cret", "-v"], ["--api-keys", "***", "***", "-v"]),
        (["--hub-token=s3cret"], ["--hub-token=***"]),
        (["model.api_key=s3cret", "data=a"], ["model.api_key=***", "data=a"]),
        (["--env=WANDB_API_KEY=s3cret"], ["--env=WANDB_API_KEY=***"]),
        (["--no-password", "--lr", "1"], ["--no-password", "--lr", "1"]),
        (["--tokenizer", "bpe", "keys/train.csv"], ["--tokenizer", "bpe", "keys/train.csv"]),
    ],
)
def test_secrets_of_the_command_line_are_written_nowhere(
    command: list[str], written: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["my_key_train.py", *command])
    run = RunDirectory(tmp_path)
    make_trainer(run).fit(TRAIN, epochs=1)
    assert json.loads((run.path / "environment.json").read_text())["command"] == ["my_key_train.py", *written]


def test_two_runs_in_two_threads_have_a_log_each(tmp_path: Path) -> None:
    """The lines of camshaft go to their own run, also after the other run has ended; those of others to both."""
    both_run, first_is_over = threading.Barrier(2, timeout=20), threading.Event()
    first, second = RunDirectory(tmp_path / "first"), RunDirectory(tmp_path / "second")

    def train(run: RunDirectory, value: float) -> None:
        engine = Engine(lambda engine, batch: {"value": value}, callbacks=[run])
        engine.subscribe(FitStart, lambda event: both_run.wait() and None)
        if run is second:
            engine.subscribe(EpochStart, lambda event: first_is_over.wait(20) and None, when=at(2))
        engine.subscribe(EpochEnd, lambda event: logging.getLogger("own").info("value is %s", value), when=at(1))
        engine.fit([torch.zeros(1)], epochs=2)

    def train_first() -> None:
        train(first, 1.0)
        first_is_over.set()

    with bare_logging() as root:
        threads = [threading.Thread(target=train_first), threading.Thread(target=train, args=(second, 2.0))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert root.level == logging.WARNING
    for run, mine, other in ((first, "1.0000", "2.0000"), (second, "2.0000", "1.0000")):
        log = (run.path / "log.log").read_text()
        assert log.count(f"train_value {mine}") == 2
        assert f"train_value {other}" not in log
        assert log.count("Run directory:") == log.count("End of the run") == 1
        assert f"value is {mine[:3]}" in log


def test_a_line_that_is_on_its_way_when_another_run_ends_reaches_its_own_log(tmp_path: Path) -> None:
    """Logging goes through the list of handlers; the first of them leaves it in between."""
    is_on_its_way, first_is_over = threading.Event(), threading.Event()
    first, second = RunDirectory(tmp_path / "first", terminal=False), RunDirectory(tmp_path / "second", terminal=False)

    def wait(record: logging.LogRecord) -> bool:
        if record.msg == "a line of the second":
            is_on_its_way.set()
            assert first_is_over.wait(20)
        return True

    def train_second(event: EpochStart) -> None:
        logging.getLogger().handlers[0].addFilter(wait)
        thread.start()
        assert is_on_its_way.wait(20)

    engine, other = Engine(lambda engine, batch: None, callbacks=[first]), Engine(lambda engine, batch: None)
    engine.subscribe(EpochStart, train_second)
    other.attach(second)
    other.subscribe(EpochEnd, lambda event: logging.getLogger("own").info("a line of the second"))
    thread = threading.Thread(target=lambda: other.fit([torch.zeros(1)], epochs=1))
    with bare_logging():
        engine.fit([torch.zeros(1)], epochs=1)
        first_is_over.set()
        thread.join()
    assert "a line of the second" in log(second)


def test_a_line_of_another_thread_after_the_end_does_not_open_the_log_again(tmp_path: Path) -> None:
    """It may have been on its way to the log when the run ended."""
    kept: list[logging.Handler] = []
    run = RunDirectory(tmp_path, terminal=False)
    engine = Engine(lambda engine, batch: None, callbacks=[run])
    engine.subscribe(FitStart, lambda event: kept.extend(logging.getLogger().handlers))
    engine.fit([torch.zeros(1)], epochs=1)
    before = (run.path / "log.log").read_text()
    late = logging.LogRecord("late", logging.INFO, __file__, 1, "too late", (), None)
    (log_file,) = [one for one in kept if getattr(one, "baseFilename", None) == str(run.path / "log.log")]
    log_file.handle(late)
    assert isinstance(log_file, logging.FileHandler)
    assert log_file.stream is None
    assert (run.path / "log.log").read_text() == before
