"""Files that are never half there, whichever call fails while they are written."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import kill_before, num_calls, pairs, refused, regression, run_python, struck

from camshaft.callbacks import BestCheckpoint, Report, RunDirectory, TensorBoard
from camshaft.engine import (
    Callback,
    ConfigurationError,
    Engine,
    directory_for,
    ensure_writable,
    remove_temporaries,
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


def test_whichever_call_fails_what_is_there_is_whole_and_of_one_moment(tmp_path: Path) -> None:
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
        assert left.keys() <= {"a.pt", "b.pt"}
        assert left.get("b.pt", left["a.pt"]) == left["a.pt"], "of another moment"
    assert total > 10


def test_no_power_cut_leaves_files_of_two_moments(tmp_path: Path) -> None:
    """Between the removal of the old second file and the new name of the first, and after that, there is a sync."""
    save_together({tmp_path / "a.pt": 1, tmp_path / "b.pt": 1})
    calls = [name for name in calls_of(tmp_path) if name in ("unlink", "replace", "fsync")]
    assert calls == ["fsync", "fsync", "unlink", "fsync", "replace", "fsync", "replace", "fsync"]
    assert contents(tmp_path) == {"a.pt": 2, "b.pt": 2}


def test_a_file_that_is_not_to_exist_is_removed_and_the_others_digests_are_returned(tmp_path: Path) -> None:
    save_together({tmp_path / "a.pt": 1, tmp_path / "b.pt": 1})
    digests = save_together({tmp_path / "a.pt": 2, tmp_path / "b.pt": None, tmp_path / "c.pt": None})
    assert contents(tmp_path) == {"a.pt": 2}
    assert digests == [hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest()]


# Somebody who puts a link where a new file is about to be made, at the last moment.
ADVERSARY = """
import os, sys
from pathlib import Path
from camshaft.engine import ensure_writable, save_together, write_durably
from camshaft.engine.errors import ConfigurationError
victim, directory = Path(sys.argv[1]), Path(sys.argv[2])
planted = []
def plant(event, arguments):
    if event == "open" and str(arguments[0]).startswith(f"{directory}/.") and not os.path.lexists(arguments[0]):
        planted.append(arguments[0])
        os.symlink(victim, arguments[0])
sys.addaudithook(plant)
calls = {
    "write": lambda: write_durably(directory / "a.pt", lambda file: file.write(b"overwritten")),
    "save": lambda: save_together({directory / "a.pt": 1, directory / "b.pt": 2}),
    "try": lambda: ensure_writable(directory, "Mine"),
}
try:
    calls[sys.argv[3]]()
except (OSError, ConfigurationError) as error:
    assert "File exists" in str(error), error
else:
    sys.exit("the link was followed")
assert planted
"""


@pytest.mark.parametrize("call", ["write", "save", "try"])
def test_a_link_in_the_place_of_a_temporary_file_is_never_followed(call: str, tmp_path: Path) -> None:
    """What it points at stays as it is, whether it exists or would be made."""
    for target in ("there", "missing"):
        directory, victim = tmp_path / f"of-{target}", tmp_path / target
        directory.mkdir()
        (tmp_path / "there").write_text("somebody else's")
        run = run_python(ADVERSARY, victim, directory, call)
        assert run.returncode == 0, run.stderr
        assert (tmp_path / "there").read_text() == "somebody else's"
        assert not (tmp_path / "missing").exists()
        assert not [path for path in directory.iterdir() if not path.is_symlink()]


def test_the_name_of_a_temporary_file_is_another_each_time(tmp_path: Path) -> None:
    seen: list[str] = []
    for _ in range(2):
        write_durably(tmp_path / "a.pt", lambda file: seen.extend(path.name for path in tmp_path.glob(".*")))
    assert len(seen) == len(set(seen)) == 2
    assert all(re.fullmatch(r"\.a\.pt\.[0-9a-f]{16}\.tmp", name) for name in seen)


def test_a_new_file_has_the_permissions_of_any_other_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    path = write_durably(tmp_path / "a.pt", lambda file: file.write(b"a"))
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_two_threads_may_write_the_same_file_at_once_and_it_is_whole(tmp_path: Path) -> None:
    """Each is in the middle of its write when the other begins; the one that ends last is the content."""
    both = threading.Barrier(2, timeout=30)

    def write(content: bytes) -> None:
        def halves(file: Any) -> None:
            file.write(content)
            both.wait()
            file.write(content)

        write_durably(tmp_path / "a.pt", halves)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, [b"1" * 10_000, b"2" * 10_000]))
    assert (tmp_path / "a.pt").read_bytes() in (b"1" * 20_000, b"2" * 20_000)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def kill_each(calls: int, directory: Path, work: Callable[[Path], object]) -> Iterator[Path]:
    """The directories in which the work was killed: before its first call that touches the disk, its second, ..."""
    for fatal in range(1, calls + 1):
        path = directory / str(fatal)
        path.mkdir()
        kill_before(fatal, partial(work, path))
        yield path


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """Whichever call it was killed before."""
    left = 0
    (tmp_path / "count").mkdir()
    num_calls = len(calls_of(tmp_path / "count"))
    for path in kill_each(num_calls, tmp_path, lambda path: save_together({path / "a.pt": 2, path / "b.pt": 2})):
        others = [path / name for name in (".c.pt.0123456789abcdef.tmp", ".a.pt", "a.pt.tmp", ".a.pt.swp")]
        for other in others:
            other.touch()
        left += len(list(path.glob(".?.pt.*.tmp"))) - 1
        remove_temporaries(path, "a.pt", "b.pt")
        names = {one.name for one in path.iterdir()}
        assert {other.name for other in others} <= names <= {other.name for other in others} | {"a.pt", "b.pt"}
    assert left > 10


def test_a_trial_of_a_directory_that_was_killed_leaves_nothing_after_the_next(tmp_path: Path) -> None:
    calls: list[str] = []
    with struck(calls.append):
        ensure_writable(tmp_path, "Mine")
    left = 0
    for path in kill_each(len(calls), tmp_path, lambda path: ensure_writable(path, "Mine")):
        left += len(list(path.iterdir()))
        ensure_writable(path, "Mine")
        assert list(path.iterdir()) == []
    assert left == 1


def test_a_new_directory_is_on_the_disk_with_those_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory in which each new one lies is synced; where none is new, nothing is."""
    synced: set[int] = set()
    fsync = os.fsync

    def sync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    ensure_writable(tmp_path / "a" / "b", "Mine")
    assert synced == {tmp_path.stat().st_ino, (tmp_path / "a").stat().st_ino}
    synced.clear()
    ensure_writable(tmp_path / "a" / "b", "Mine")
    assert synced == set()


def test_a_relative_directory_is_made_where_the_process_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ensure_writable(Path("a/b"), "Mine")
    ensure_writable(Path(), "Mine")
    assert (tmp_path / "a" / "b").is_dir()


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
