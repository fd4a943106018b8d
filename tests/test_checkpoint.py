"""A directory of checkpoints, of which a good one is never lost, under faults and kills at every call."""

from __future__ import annotations

import errno
import os
import resource
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import kill_before, refused, struck

from camshaft.engine import CheckpointDirectory, CheckpointError
from camshaft.engine.checkpoint import check_plain, load_verified


def state(number: int) -> dict[str, Any]:
    return {"number": number, "weights": torch.full((1000,), float(number))}


def store(path: Path, number: int) -> None:
    """What RunCheckpoint does at each save: write, then prune."""
    directory = CheckpointDirectory(path)
    directory.save(state(number), step=number)
    directory.prune(keep=1, keep_every=None)


def newest(path: Path) -> int:
    found = CheckpointDirectory(path).load_newest()
    assert found is not None
    assert torch.equal(found[0]["weights"], state(found[0]["number"])["weights"])
    return int(found[0]["number"])


def count_calls(path: Path) -> list[str]:
    calls: list[str] = []
    path.mkdir(exist_ok=True)
    store(path, 1)
    with struck(calls.append):
        store(path, 2)
    return calls


def test_a_write_touches_the_disk_in_the_safe_order(tmp_path: Path) -> None:
    calls = count_calls(tmp_path)
    order = [name for position, name in enumerate(calls) if position == 0 or calls[position - 1] != name]
    assert [name for name in order if name not in ("write", "flush")] == [
        "listdir",
        "open",
        "fsync",
        "replace",
        "fsync",
        "listdir",
        "unlink",
    ]
    assert order.index("write") < order.index("fsync")


def test_whichever_call_fails_a_good_checkpoint_loads_afterwards(tmp_path: Path) -> None:
    """The sweep: call 1 fails, then call 2, and so on until none does."""
    total = len(count_calls(tmp_path / "count"))
    for failing in range(1, total + 1):
        path = tmp_path / str(failing)
        path.mkdir()
        store(path, 1)
        calls = 0

        def strike(name: str, failing: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(errno.EIO, "Input/output error")

        with struck(strike), pytest.raises(OSError, match="Input/output"):
            store(path, 2)
        assert newest(path) in (1, 2)
        store(path, 3)
        assert newest(path) == 3
        assert len(list(path.glob("*.pt"))) == 1
    assert total > 10


def test_killed_before_any_call_the_old_or_the_new_loads_and_never_neither(tmp_path: Path) -> None:
    total = len(count_calls(tmp_path / "count"))
    seen = set()
    for fatal in range(1, total + 1):
        path = tmp_path / str(fatal)
        path.mkdir()
        store(path, 1)
        kill_before(fatal, partial(store, path, 2))
        seen.add(newest(path))
        CheckpointDirectory(path).sweep()
        assert not list(path.glob(".*"))
    assert seen == {1, 2}


def test_a_full_disk_is_said_as_such_and_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on file size stands for the full disk: both stop a write in its middle."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        store(tmp_path, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            store(tmp_path, 2)
        except OSError as error:
            os._exit(0 if error.errno == errno.EFBIG else 2)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) == 0
    assert newest(tmp_path) == 1
    assert not list(tmp_path.glob(".*"))


def test_numbers_go_on_after_six_digits_and_are_compared_as_numbers(tmp_path: Path) -> None:
    """The millionth is the newest, is resumed from, and is pruned when its time has come."""
    directory = CheckpointDirectory(tmp_path)
    first = directory.save(state(0), step=3)
    first.path.rename(tmp_path / first.path.name.replace("run-000001", "run-999999"))
    for number in (1_000_000, 1_000_001):
        assert directory.save(state(number), step=number).number == number
        assert newest(tmp_path) == number
    assert [file.number for file in directory.files()] == [1_000_001, 1_000_000, 999_999]
    directory.prune(keep=1, keep_every=None)
    assert [file.number for file in directory.files()] == [1_000_001]


def test_a_file_whose_name_is_not_one_of_a_checkpoint_is_refused_with_what_to_pass(tmp_path: Path) -> None:
    (tmp_path / "run-00001-step-1.pt").touch()
    with refused(CheckpointError, "is not named as a run checkpoint."):
        load_verified(tmp_path / "run-00001-step-1.pt")


@pytest.mark.parametrize("value", [{1, 2}, Path("a"), object(), torch.nn.Linear(1, 1), slice(1)])
def test_what_is_no_plain_value_is_refused_by_its_key(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"state\['a'\]\[1\] is of type"):
        check_plain({"a": [0, value]}, "state")
