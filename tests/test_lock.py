"""Two runs never write in one checkpoint directory at once, whichever processes they are in."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import class_batches, make_trainer, refused, run_python

from camshaft.callbacks import RunCheckpoint, RunDirectory
from camshaft.engine import ConfigurationError, Engine, StepEnd, files
from camshaft.engine.files import locked

HOLDER = """
import sys, time, torch
from torch.utils.data import DataLoader
from camshaft.callbacks import RunCheckpoint
from camshaft.engine import Engine
def step(engine, batch):
    if engine.step == 2:
        print("holding", flush=True)
        time.sleep(600)
loader = DataLoader(torch.zeros(9, 1), num_workers=int(sys.argv[2]))
Engine(step, callbacks=[RunCheckpoint(sys.argv[1], every_steps=1)]).fit(loader, epochs=1)
"""


@contextmanager
def holder(directory: Path, workers: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A process in the second step of a run that has saved once."""
    command = [sys.executable, "-c", HOLDER, str(directory), str(workers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        try:
            yield process
        finally:
            process.kill()


def idle(directory: Path) -> Engine:
    return Engine(lambda engine, batch: None, callbacks=[RunCheckpoint(directory)])


DATA = [0] * 9


def test_a_second_process_is_refused_before_its_first_step_and_the_files_stay(tmp_path: Path) -> None:
    """Whether it resumes or not."""
    with holder(tmp_path) as process:
        before = sorted(tmp_path.iterdir())
        for resume in (None, "auto"):
            engine = idle(tmp_path)
            with refused(ConfigurationError, f"{tmp_path} is in use by another run, in process {process.pid}."):
                engine.fit(DATA, epochs=1, resume=resume)
            assert (engine.step, sorted(tmp_path.iterdir())) == (0, before)


def test_a_refused_run_neither_puts_a_damaged_file_aside_nor_goes_on_in_the_run_directory(tmp_path: Path) -> None:
    """It could be the file that the other run is about to replace."""
    checkpoints = tmp_path / "checkpoints"
    earlier = RunDirectory(tmp_path / "runs")
    make_trainer(earlier, RunCheckpoint(checkpoints)).fit(class_batches(4), epochs=2)
    newest = max(checkpoints.glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:-1])
    content = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with locked(checkpoints):
        second = make_trainer(RunDirectory(tmp_path / "runs"), RunCheckpoint(checkpoints))
        with refused(ConfigurationError, f"{checkpoints} is in use by another run, in process {os.getpid()}."):
            second.fit(class_batches(4), epochs=3, resume="auto")
    assert {path: path.read_bytes() for path in content} == content


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_lock_of_a_killed_run_ends_with_it_though_its_workers_may_live_on(tmp_path: Path, workers: int) -> None:
    with holder(tmp_path, workers) as process:
        process.kill()
        process.wait()
        engine = idle(tmp_path)
        engine.fit(DATA, epochs=1, resume="auto")
    assert engine.step == 9
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"] * 2


def test_a_second_engine_of_this_process_is_refused_and_may_run_afterwards(tmp_path: Path) -> None:
    first, second = make_trainer(RunCheckpoint(tmp_path)), make_trainer(RunCheckpoint(tmp_path))

    def nest(event: StepEnd) -> None:
        with refused(ConfigurationError, f"in process {os.getpid()}."):
            second.fit(class_batches(4), epochs=1, resume="auto")

    first.subscribe(StepEnd, nest)
    first.fit(class_batches(4, 4), epochs=1)
    second.fit(class_batches(4, 4), epochs=2, resume="auto")
    assert (first.step, second.step) == (2, 4)


def test_a_run_that_fails_or_is_left_lets_go(tmp_path: Path) -> None:
    engine = idle(tmp_path)
    engine.subscribe(StepEnd, lambda event: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.fit(DATA, epochs=1)
    for _ in (script := Engine(callbacks=[RunCheckpoint(tmp_path)])).epochs(2):
        break
    del script
    idle(tmp_path).fit(DATA, epochs=1)
    assert not (tmp_path / ".lock").exists()


def test_two_runs_in_a_row_leave_no_lock_and_an_old_one_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("12345678901234567890")
    engine = idle(tmp_path)
    engine.fit(DATA, epochs=1)
    engine.fit(DATA, epochs=1)
    assert engine.step == 18
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"] * 2


def test_where_locks_do_not_work_that_is_said_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    engine = idle(tmp_path)
    engine.fit(DATA, epochs=2)
    assert engine.step == 18
    assert caplog.text.count(f"{tmp_path} cannot be locked: No locks available. Let no second run") == 1


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "victim").write_text("somebody else's")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "victim")
    idle(tmp_path / "run").fit(DATA, epochs=1)
    assert (tmp_path / "victim").read_text() == "somebody else's"
    assert "cannot be locked" in caplog.text


def test_without_fcntl_as_on_windows_nothing_is_locked(tmp_path: Path) -> None:
    script = """
import sys
sys.modules["fcntl"] = None
from camshaft.callbacks import RunCheckpoint
from camshaft.engine import Engine
engine = Engine(lambda engine, batch: None, callbacks=[RunCheckpoint(sys.argv[1])])
engine.fit([0, 0], epochs=1)
assert engine.step == 2
"""
    run = run_python(script, tmp_path)
    assert run.returncode == 0, run.stderr
