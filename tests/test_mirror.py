"""Checkpoints are copied to another storage, and a run goes on from there on another machine."""

from __future__ import annotations

import logging
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from helpers import class_batches, refused
from torch import nn

from camshaft.callbacks import RunCheckpoint
from camshaft.engine import (
    Callback,
    CheckpointDirectory,
    CheckpointError,
    ConfigurationError,
    Engine,
    MissingPackageError,
    StepEnd,
    Trainer,
    at,
)


class Unreliable(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Fails, or is slow, at the writes of checkpoints that a test says."""

    protocol = "unreliable"
    store: dict[str, Any] = {}  # noqa: RUF012 - as in the class above, of which this must not be the store
    pseudo_dirs = [""]  # noqa: RUF012
    fails: set[int] = set()  # noqa: RUF012
    breaks: set[int] = set()  # noqa: RUF012 - in the middle
    seconds = 0.0
    started: list[str] = []  # noqa: RUF012
    threads: set[str] = set()  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("unreliable://", "memory://")))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if "w" in mode and "/run-" in path:
            self.started.append(path)
            self.threads.add(threading.current_thread().name)
            time.sleep(self.seconds)
            if len(self.started) in self.fails:
                raise ConnectionResetError("the other side is gone")
            file = super()._open(path, mode, **options)
            if len(self.started) in self.breaks:
                file.write = partial(break_off, file, file.write)
            return file
        return super()._open(path, mode, **options)


def break_off(file: Any, write: Any, data: bytes) -> int:
    write(data[: len(data) // 2])
    raise ConnectionResetError("the other side is gone")


fsspec.register_implementation("unreliable", Unreliable, clobber=True)


@pytest.fixture
def unreliable() -> Iterator[str]:
    yield f"unreliable://{uuid.uuid4()}"
    Unreliable.fails, Unreliable.breaks, Unreliable.seconds = set(), set(), 0.0
    Unreliable.started, Unreliable.threads = [], set()


@pytest.fixture(params=["memory", "local"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid.uuid4()}/run" if request.param == "memory" else f"file://{tmp_path}/far/away"


def trainer_of(directory: Path, *callbacks: Callback, **settings: Any) -> Engine:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3))
    checkpoint = RunCheckpoint(directory, **{"every_steps": 2, **settings})
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[checkpoint, *callbacks], seed=7)


def fitted(trainer: Engine, **settings: Any) -> list[bytes]:
    trainer.fit(class_batches(8, 8, 8), class_batches(4), **{"epochs": 4, **settings})
    return [value.numpy().tobytes() for value in trainer.parts["model"].state_dict().values()]


def names(url: str) -> list[str]:
    system, root = fsspec.core.url_to_fs(url)
    system.invalidate_cache()
    return sorted(Path(path).name for path in system.ls(root, detail=False))


@pytest.mark.parametrize("background", [False, True])
def test_a_run_goes_on_from_the_mirror_in_an_empty_directory(url: str, background: bool, tmp_path: Path) -> None:
    """As on another machine, after a stop in mid-epoch: weights and history are those of the run left alone."""
    whole = trainer_of(tmp_path / "whole")
    expected = fitted(whole)
    first = trainer_of(tmp_path / "first", mirror=url, background=background)
    first.subscribe(StepEnd, lambda event: signal.raise_signal(signal.SIGTERM), when=at(8))
    fitted(first, resume="auto")
    assert first.history.interrupted is not None
    second = trainer_of(tmp_path / "second", mirror=url, background=background)
    assert fitted(second, resume="auto") == expected
    assert second.history.rows == whole.history.rows
    assert names(url) == sorted(path.name for path in (tmp_path / "second").glob("run-*"))


def test_as_many_are_kept_as_in_the_directory(url: str, tmp_path: Path) -> None:
    fitted(trainer_of(tmp_path / "run", mirror=url, keep=1, keep_every=3))
    assert names(url) == sorted(path.name for path in (tmp_path / "run").glob("run-*"))
    assert len(names(url)) == 3


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_mirror import fitted, trainer_of
from camshaft.engine import StepEnd
trainer = trainer_of(Path(sys.argv[1]), mirror=sys.argv[2], every_steps=1)
trainer.subscribe(StepEnd, lambda event: print(event.engine.step, time.sleep(0.05), flush=True))
sys.stdout.write("|".join(one.hex() for one in fitted(trainer, resume="auto", epochs=8)))
"""


@pytest.mark.slow
def test_killed_again_and_again_each_time_on_another_machine(tmp_path: Path) -> None:
    """Each process has an empty directory of its own, and only the mirror in common."""
    expected = "|".join(one.hex() for one in fitted(trainer_of(tmp_path / "whole"), epochs=8))
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    lottery, url, said = random.Random(5), f"file://{tmp_path}/mirror", ""
    for machine in range(5):
        command = [sys.executable, "-c", script, str(tmp_path / f"machine-{machine}"), url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            if machine < 4:
                for _ in range(lottery.randint(2, 3)):
                    assert process.stdout.readline()
                time.sleep(lottery.random() / 100)  # also into the middle of a copy
                process.kill()
            said = process.stdout.read()
    steps, _, weights = said.rpartition("\n")
    assert int(steps.split()[0]) > 2, "the last one has begun anew"
    assert weights == expected


def test_a_failed_copy_is_a_warning_and_the_next_one_is_made(
    unreliable: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Unreliable.fails = {1, 2}
    trainer = trainer_of(tmp_path / "run", mirror=unreliable)
    trainer.subscribe(StepEnd, lambda event: time.sleep(0.05))  # so that no copy overtakes another
    with caplog.at_level(logging.WARNING):
        fitted(trainer)
    assert trainer.history.reason == "4 epochs done"
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2
    assert all("could not be copied" in one and "the other side is gone" in one for one in warned)
    assert names(unreliable) == sorted(path.name for path in (tmp_path / "run").glob("run-*"))


def test_what_a_copy_that_broke_off_has_left_is_removed(unreliable: str, tmp_path: Path) -> None:
    Unreliable.breaks = set(range(2, 100))
    trainer = trainer_of(tmp_path / "run", mirror=unreliable)
    trainer.subscribe(StepEnd, lambda event: time.sleep(0.05))
    with pytest.raises(OSError, match="the other side is gone"):
        fitted(trainer)
    assert [name.split("-")[1] for name in names(unreliable)] == ["000001"]


def test_if_the_last_copy_failed_it_is_an_error_when_all_else_is_done(unreliable: str, tmp_path: Path) -> None:
    Unreliable.fails = set(range(1, 100))
    trainer = trainer_of(tmp_path / "run", mirror=unreliable)
    with pytest.raises(OSError, match="the other side is gone"):
        fitted(trainer)
    assert trainer.epoch == 4
    assert CheckpointDirectory(tmp_path / "run").files()[0].step == 12
    assert names(unreliable) == []


def test_training_does_not_wait_for_a_slow_storage_and_the_newest_is_copied_in_the_end(
    unreliable: str, tmp_path: Path
) -> None:
    Unreliable.seconds = 0.4
    trainer = trainer_of(tmp_path / "run", mirror=unreliable, every_steps=1)
    ended: list[float] = []
    trainer.subscribe(StepEnd, lambda event: ended.append(time.monotonic()))
    fitted(trainer)
    took = [after - before for before, after in pairwise(ended)]
    assert sum(took) < 12 * 0.4 / 2
    assert len(Unreliable.started) < 12, "those that a newer one had overtaken were left out"
    assert names(unreliable)[-1] == CheckpointDirectory(tmp_path / "run").files()[0].path.name
    assert all(name.startswith("camshaft-mirror") for name in Unreliable.threads)
    assert not [one.name for one in threading.enumerate() if one.name.startswith("camshaft-mirror")]


def damage(url: str, name: str) -> None:
    """Cut a copy short, as a process that is killed while it writes does."""
    system, root = fsspec.core.url_to_fs(url)
    content = system.cat_file(f"{root}/{name}")
    system.pipe_file(f"{root}/{name}", content[: len(content) // 2])


def test_a_copy_that_was_cut_short_is_not_used(url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = fitted(trainer_of(tmp_path / "whole", mirror=url))
    newest = names(url)[-1]
    damage(url, newest)
    again = trainer_of(tmp_path / "again", mirror=url)
    assert fitted(again, resume="auto") == expected
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        f"{newest} in {url} is damaged: its content does not fit its name."
    ]
    for name in names(url):
        damage(url, name)
    with refused(CheckpointError, "Every checkpoint in", "Use another mirror"):
        fitted(trainer_of(tmp_path / "third", mirror=url), resume="auto")


def test_without_resume_a_mirror_that_holds_a_run_is_refused(url: str, tmp_path: Path) -> None:
    fitted(trainer_of(tmp_path / "one", mirror=url))
    with pytest.raises(ConfigurationError, match="holds checkpoints of an earlier run"):
        fitted(trainer_of(tmp_path / "other", mirror=url))


def test_the_mirror_of_another_run_is_refused(url: str, tmp_path: Path) -> None:
    fitted(trainer_of(tmp_path / "one", mirror=url))
    other = trainer_of(tmp_path / "two")
    other.fit(class_batches(4, 4, 4), epochs=4)
    with refused(ConfigurationError, "so they are of two runs", "Pass another mirror"):
        fitted(trainer_of(tmp_path / "two", mirror=url), resume="auto")


def test_the_number_of_a_damaged_checkpoint_is_not_given_again(tmp_path: Path) -> None:
    """Two files of one number would look like those of two runs."""
    url = f"memory://{uuid.uuid4()}"
    expected = fitted(trainer_of(tmp_path / "run", mirror=url))
    newest = CheckpointDirectory(tmp_path / "run").files()[0]
    newest.path.write_bytes(b"damaged")
    for _ in range(2):
        assert fitted(trainer_of(tmp_path / "run", mirror=url), resume="auto") == expected
    assert CheckpointDirectory(tmp_path / "run").files()[0].number > newest.number


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(ConfigurationError, "is in no storage that fsspec knows (Protocol not known: foo)"):
        RunCheckpoint(tmp_path, mirror="foo://bucket/run")
    with refused(ConfigurationError, "sharded=True and a mirror"):
        RunCheckpoint(tmp_path, mirror="memory://run", sharded=True)
    trainer = trainer_of(tmp_path / "run", mirror="file:///proc/no/such/place")
    with refused(ConfigurationError, "The mirror file:///proc/no/such/place cannot be written"):
        fitted(trainer)
    assert trainer.step == 0
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingPackageError, match=r"needs the package s3fs, .*Write: pip install s3fs\.$"):
        RunCheckpoint(tmp_path, mirror="s3://bucket/run")
