"""Writing files that are never half there, under faults at every call and kills at every stage."""

from __future__ import annotations

import builtins
import errno
import logging
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from camshaft.callbacks import RunCheckpoint
from camshaft.engine import CheckpointError, ConfigurationError, Engine, Trainer
from camshaft.engine import files as module
from camshaft.engine.checkpoint import CheckpointDirectory, check_plain
from camshaft.engine.files import save, write_durably
from camshaft.engine.weights import load_weights, unwrap


class Failing:
    """A file of which every call first asks ``strike``."""

    def __init__(self, file: Any, strike: Callable[[str], None]) -> None:
        self._file, self._strike = file, strike

    def write(self, data: Any) -> int:
        self._strike("write")
        return int(self._file.write(data))

    def flush(self) -> None:
        self._strike("flush")
        self._file.flush()

    def __enter__(self) -> Failing:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def struck(strike: Callable[[str], None]) -> Iterator[None]:
    """Call ``strike(name)`` before each call that touches the disk while a checkpoint is written."""
    patch = pytest.MonkeyPatch()

    def before(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            strike(name)
            result = function(*args, **kwargs)
            return Failing(result, strike) if name == "open" else result

        return call

    patch.setattr(module, "open", before("open", builtins.open), raising=False)
    patch.setattr(os, "fsync", before("fsync", os.fsync))
    patch.setattr(os, "replace", before("replace", os.replace))
    patch.setattr(Path, "unlink", before("unlink", Path.unlink))
    try:
        yield
    finally:
        patch.undo()


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
        "open",
        "fsync",
        "replace",
        "fsync",
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
        child = os.fork()
        if child == 0:
            calls = 0

            def strike(name: str, fatal: int = fatal) -> None:
                nonlocal calls
                calls += 1
                if calls == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)

            with struck(strike):
                store(path, 2)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
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


def small_trainer(directory: Path, **settings: Any) -> Engine:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return Trainer(model, optimizer, nn.MSELoss(), callbacks=[RunCheckpoint(directory, every_steps=1, **settings)])


DATA = [(torch.ones(4, 2), torch.ones(4, 1))] * 6


def test_a_failed_save_warns_and_the_next_due_point_tries_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    replaced = 0

    def strike(name: str) -> None:
        nonlocal replaced
        replaced += name == "replace"
        if name == "replace" and replaced in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")

    trainer = small_trainer(tmp_path, keep=9)
    with struck(strike), caplog.at_level(logging.WARNING):
        trainer.fit(DATA, epochs=1)
    assert [file.step for file in CheckpointDirectory(tmp_path).files()] == [6, 6, 5, 4, 1]
    assert caplog.text.count("No space left on device. Training goes on; run-000001-step-1-") == 2


@pytest.mark.parametrize(("failures", "settings"), [(3, {}), (1, {"on_error": "raise"}), (3, {"background": True})])
def test_failures_in_a_row_or_by_wish_the_first_end_the_run(
    tmp_path: Path, failures: int, settings: dict[str, Any]
) -> None:
    failed = 0

    def strike(name: str) -> None:
        nonlocal failed
        if name == "replace":
            failed += 1
            raise OSError(errno.ENOSPC, "No space left on device")

    trainer = small_trainer(tmp_path, **settings)
    with struck(strike), pytest.raises(OSError, match="No space left"):
        trainer.fit(DATA, epochs=1)
    assert failures <= failed <= failures + 1


def test_a_directory_that_cannot_be_written_is_found_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    trainer = small_trainer(tmp_path / "file" / "below")
    with pytest.raises(ConfigurationError, match="RunCheckpoint cannot write in"):
        trainer.fit(DATA, epochs=1)
    assert trainer.step == 0


@pytest.mark.parametrize("value", [{1, 2}, Path("a"), object(), torch.nn.Linear(1, 1), slice(1)])
def test_what_is_no_plain_value_is_refused_by_its_key(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"state\['a'\]\[1\] is of type"):
        check_plain({"a": [0, value]}, "state")


def test_weights_of_another_architecture_are_refused_with_five_differences() -> None:
    small, large = nn.Sequential(*[nn.Linear(2, 2)] * 3), nn.Sequential(*[nn.Linear(2, 3)] * 4)
    before = [parameter.clone() for parameter in small.parameters()]
    with pytest.raises(CheckpointError, match=r"3.weight is unknown to the model.*and 3 more"):
        load_weights(small, large.state_dict(), "best.pt")
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), before, strict=True))


def test_wrappers_leave_no_trace_in_the_weights() -> None:
    model = nn.Linear(2, 2)
    compiled: nn.Module = torch.compile(model)  # type: ignore[assignment]  # it wraps a module in a module
    wrapped = nn.DataParallel(compiled)
    assert unwrap(wrapped) is model


def test_a_write_that_raises_leaves_neither_temporary_nor_half_a_file(tmp_path: Path) -> None:
    save(tmp_path / "a.pt", 1)

    def write(file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_durably(tmp_path / "a.pt", write)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert torch.load(tmp_path / "a.pt", weights_only=True) == 1
