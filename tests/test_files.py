"""Files that are never half there, whichever call fails while they are written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import num_calls, pairs, refused, regression, struck

from camshaft.callbacks import BestCheckpoint, Report, RunDirectory, TensorBoard
from camshaft.engine import (
    Callback,
    ConfigurationError,
    Engine,
    directory_for,
    ensure_writable,
    save_together,
    write_durably,
)
from camshaft.engine.files import save


def contents(directory: Path) -> dict[str, Any]:
    return {path.name: torch.load(path, weights_only=True) for path in directory.iterdir()}


def test_a_write_that_raises_leaves_neither_temporary_nor_half_a_file(tmp_path: Path) -> None:
    save(tmp_path / "a.pt", 1)

    def write(file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_durably(tmp_path / "a.pt", write)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert torch.load(tmp_path / "a.pt", weights_only=True) == 1


def test_a_file_may_be_named_by_what_is_in_it(tmp_path: Path) -> None:
    path = write_durably(
        tmp_path / "a", lambda file: file.write(b"content"), final=lambda digest: tmp_path / digest[:8]
    )
    assert path.name == "ed7002b4"  # of sha256sum
    assert [file.name for file in tmp_path.iterdir()] == ["ed7002b4"]


def test_a_full_disk_comes_out_of_torchs_writer_as_what_it_is(tmp_path: Path) -> None:
    def strike(name: str) -> None:
        if name == "write":
            raise OSError(errno.ENOSPC, "No space left on device")

    with struck(strike), pytest.raises(OSError, match="No space left") as caught:
        save(tmp_path / "a.pt", {"weights": torch.zeros(1000)})
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def calls_of(path: Path) -> list[str]:
    """The calls that touch the disk while two files are saved together."""
    calls: list[str] = []
    with struck(calls.append):
        save_together({path / "a.pt": 2, path / "b.pt": 2})
    return calls


def test_files_of_one_moment_are_all_on_the_disk_before_one_takes_its_name(tmp_path: Path) -> None:
    calls = calls_of(tmp_path)
    *_, first_name, last_name = [position for position, name in enumerate(calls) if name == "replace"]
    assert "write" not in calls[first_name:]
    assert calls[last_name + 1 :] == ["fsync"]
    assert contents(tmp_path) == {"a.pt": 2, "b.pt": 2}


def test_whichever_call_fails_both_files_are_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    total = len(calls_of(tmp_path))
    for failing in range(1, total + 1):
        path = tmp_path / str(failing)
        path.mkdir()
        save_together({path / "a.pt": 1, path / "b.pt": 1})
        calls = 0

        def strike(name: str, failing: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(errno.EIO, "Input/output error")

        with struck(strike), pytest.raises(OSError, match="Input/output"):
            save_together({path / "a.pt": 2, path / "b.pt": 2})
        left = contents(path)
        assert left.keys() == {"a.pt", "b.pt"}
        assert left["a.pt"] >= left["b.pt"], "the first takes its name first"
    assert total > 10


def test_a_directory_is_made_and_tried_and_the_trial_leaves_nothing(tmp_path: Path) -> None:
    ensure_writable(tmp_path / "a" / "b", "Mine")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_directory_that_cannot_be_made_is_refused_with_its_owner(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused(ConfigurationError, f"Mine cannot write in {tmp_path / 'file' / 'below'}: Not a directory."):
        ensure_writable(tmp_path / "file" / "below", "Mine")


def test_a_handler_writes_where_it_wants_or_else_in_the_run_directory(tmp_path: Path) -> None:
    run_directory = RunDirectory(tmp_path / "runs")
    engine = Engine(callbacks=[run_directory])
    assert directory_for("Mine", tmp_path / "own", engine.directory, within="ignored") == tmp_path / "own"
    assert directory_for("Mine", None, engine.directory) == run_directory.path
    assert directory_for("Mine", None, engine.directory, within="plots") == run_directory.path / "plots"
    assert os.path.isdir(run_directory.path / "plots")


def test_a_handler_without_a_directory_of_any_kind_is_told_the_two_ways_to_have_one() -> None:
    with refused(ConfigurationError, "Mine has nowhere to write.", "RunDirectory()"):
        directory_for("Mine", None, Engine().directory)


@pytest.mark.parametrize("make", [partial(BestCheckpoint, "val_loss", "min"), Report, TensorBoard])
def test_a_directory_that_cannot_be_written_is_refused_before_the_first_step(
    make: Callable[..., Callback], below_a_file: Path
) -> None:
    trainer = regression(callbacks=[make(directory=below_a_file)])
    with refused(ConfigurationError, f"cannot write in {below_a_file}: Not a directory.", "that can be written"):
        trainer.fit(pairs(), pairs(), epochs=1)
    assert num_calls(trainer) == 0


@pytest.mark.parametrize("make", [Report, TensorBoard])
def test_a_handler_with_nowhere_to_write_says_so_before_the_first_step(make: Callable[[], Callback]) -> None:
    trainer = regression(callbacks=[make()])
    with refused(ConfigurationError, f"{make.__name__} has nowhere to write", "RunDirectory()"):
        trainer.fit(pairs(), epochs=1)
    assert num_calls(trainer) == 0
