"""What a power cut at any moment of a run leaves on the disk: the run's write log is replayed up to that moment."""

from __future__ import annotations

import builtins
import hashlib
import io
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import class_batches, make_trainer
from torch import Tensor, nn

from camshaft.callbacks import BestCheckpoint, RunCheckpoint, RunDirectory, TensorBoard
from camshaft.callbacks.best_checkpoint import Kept
from camshaft.engine import CheckpointDirectory, Engine, EpochEnd

# The log ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """Names that were given to files and directories, or taken away (None), in one step."""

    names: dict[str, int | None]


@dataclass(frozen=True)
class Data:
    """Bytes that were written into a file; after those that are there already if ``appends``."""

    node: int
    offset: int
    content: bytes
    appends: bool


@dataclass(frozen=True)
class Truncate:
    """A file that was made this long."""

    node: int
    size: int


@dataclass(frozen=True)
class Sync:
    """A file or a directory that was synced."""

    node: int


Operation = Link | Data | Truncate | Sync
ROOT = 0


@dataclass
class Log:
    """The operations below a directory, in the order in which they were made. A node is a file or a directory."""

    root: Path
    operations: list[Operation] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=lambda: {"": ROOT})
    directories: set[int] = field(default_factory=lambda: {ROOT})
    descriptors: dict[int, int] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.RLock)

    def name_of(self, path: Any) -> str | None:
        """Return the path within the root; None where it is outside, or no path."""
        if not isinstance(path, str | os.PathLike):
            return None
        absolute, root = os.path.abspath(path), str(self.root)
        if absolute == root:
            return ""
        return absolute[len(root) + 1 :] if absolute.startswith(f"{root}/") else None

    def link(self, names: dict[str, int | None]) -> None:
        """Note that these names have changed."""
        self.operations.append(Link(names))
        for name, node in names.items():
            if node is None:
                del self.names[name]
            else:
                self.names[name] = node

    def new(self, name: str) -> int:
        """Note that there is a new node of this name."""
        node = 1 + sum(len(operation.names) for operation in self.operations if isinstance(operation, Link))
        self.link({name: node})
        return node


class Written:
    """A file that is written to; what it was given counts as written when it is flushed."""

    def __init__(self, file: Any, log: Log, node: int, mode: str, *, is_buffered: bool) -> None:
        self._file, self._log, self._node = file, log, node
        self._appends, self._is_buffered = "a" in mode, is_buffered
        self._pending = b""
        self._at = os.fstat(file.fileno()).st_size

    def write(self, data: Any) -> int:
        with self._log.lock:
            written: int = self._file.write(data)
            self._pending += data.encode() if isinstance(data, str) else bytes(data)[:written]
            if not self._is_buffered:
                self._note()
        return written

    def flush(self) -> None:
        with self._log.lock:
            self._file.flush()
            self._note()

    def truncate(self, size: int) -> None:
        with self._log.lock:
            self.flush()
            self._file.truncate(size)
            self._log.operations.append(Truncate(self._node, size))
            self._at = size

    def close(self) -> None:
        with self._log.lock:
            self._file.close()
            self._note()

    def _note(self) -> None:
        if self._pending:
            self._log.operations.append(Data(self._node, self._at, self._pending, self._appends))
        self._at += len(self._pending)
        self._pending = b""

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def recording(root: Path) -> Iterator[Log]:
    """Log every operation below a directory, which is still made."""
    log, patch = Log(root), pytest.MonkeyPatch()

    def wrap(name: str, around: Callable[..., Any]) -> None:
        real = getattr(os, name)
        patch.setattr(os, name, lambda *args, **kwargs: around(real, *args, **kwargs))

    def open_file(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        name = log.name_of(file)
        if name is None or not set(mode) & set("wxa+"):
            return real_open(file, mode, buffering, *args, **kwargs)
        with log.lock:
            opened = real_open(file, mode, buffering, *args, **kwargs)
            node = log.names[name] if name in log.names else log.new(name)
            if "w" in mode:
                log.operations.append(Truncate(node, 0))
            log.descriptors[opened.fileno()] = node
            return Written(opened, log, node, mode, is_buffered=buffering != 0)

    def open_directory(real: Callable[..., int], path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        descriptor = real(path, flags, *args, **kwargs)
        name = log.name_of(path)
        if name is not None and name not in log.names and flags & os.O_CREAT:  # a lock, whose content is not asked for
            log.new(name)
        if name is not None and log.names.get(name) in log.directories:
            log.descriptors[descriptor] = log.names[name]
        return descriptor

    def sync(real: Callable[[int], None], descriptor: int) -> None:
        with log.lock:
            real(descriptor)
            log.operations.append(Sync(log.descriptors[descriptor]))

    def rename(real: Callable[..., None], source: Any, target: Any) -> None:
        with log.lock:
            real(source, target)
            old, new = log.name_of(source), log.name_of(target)
            assert old is not None
            assert new is not None
            log.link({new: log.names[old], old: None})

    def remove(real: Callable[..., None], path: Any) -> None:
        with log.lock:
            real(path)
            name = log.name_of(path)
            if name is not None:
                log.link({name: None})

    def mkdir(real: Callable[..., None], path: Any, *args: Any, **kwargs: Any) -> None:
        with log.lock:
            real(path, *args, **kwargs)
            name = log.name_of(path)
            if name is not None:
                log.directories.add(log.new(name))

    real_open = builtins.open
    patch.setattr(builtins, "open", open_file)
    patch.setattr(io, "open", open_file)
    around: dict[str, Callable[..., Any]] = {"open": open_directory, "fsync": sync, "mkdir": mkdir}
    around |= {"replace": rename, "rename": rename, "unlink": remove, "remove": remove, "rmdir": remove}
    for name, function in around.items():
        wrap(name, function)
    try:
        yield log
    finally:
        patch.undo()


# The disk -----------------------------------------------------------------------------------------------------

Disk = dict[str, bytes | None]  # what is under each name; None for a directory


def replay(log: Log, length: int, loss: float = 0, dice: random.Random | None = None) -> Disk:
    """Return what is on the disk after the first ``length`` operations and a power cut.

    What was synced is there. Of the rest each operation is lost with the probability ``loss``, in any combination,
    and of the others that write some are cut short; only what was appended is lost from its end.
    """
    dice = random.Random(0) if dice is None else dice
    operations = log.operations[:length]
    synced = {one.node: position for position, one in enumerate(operations) if isinstance(one, Sync)}
    names: dict[str, int] = {"": ROOT}
    contents: dict[int, bytearray] = {}
    torn: set[int] = set()
    for position, one in enumerate(operations):
        if isinstance(one, Link):
            if position < synced_until(one, names, synced) or dice.random() >= loss:
                apply(one, names)
        elif isinstance(one, Data | Truncate):
            content = contents.setdefault(one.node, bytearray())
            is_safe = position < synced.get(one.node, -1)
            is_lost = not is_safe and dice.random() < loss
            if isinstance(one, Truncate) and not is_lost:
                del content[one.size :]
            elif isinstance(one, Data) and one.node not in torn:
                size = dice.randrange(len(one.content)) if is_lost else len(one.content)
                if one.appends and is_lost:
                    torn.add(one.node)
                write(content, one.offset, one.content[:size])
    return {
        name: None if node in log.directories else bytes(contents.get(node, b""))
        for name, node in names.items()
        if name and all(str(parent) in names for parent in Path(name).parents if str(parent) != ".")
    }


def synced_until(link: Link, names: dict[str, int], synced: dict[int, int]) -> int:
    """Return the position before which a change of these names is safe: that of the last sync of their directory."""
    (directory,) = {os.path.dirname(name) for name in link.names}
    return synced.get(names.get(directory, -1), -1)


def apply(link: Link, names: dict[str, int]) -> None:
    for name, node in link.names.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def write(content: bytearray, offset: int, data: bytes) -> None:
    """Write at an offset; where nothing was written before it there are zeros."""
    if data:
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + len(data)] = data


def fill(root: Path, disk: Disk) -> None:
    """Make a real directory of it."""
    root.mkdir(parents=True)
    for name, content in sorted(disk.items()):
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)


def look(root: Path) -> Disk:
    """Return what is in a real directory."""
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


# The runs -----------------------------------------------------------------------------------------------------

EPOCHS = 6
TRAIN, VAL = class_batches(8, 8, 3), class_batches(32, seed=5)


@dataclass(frozen=True)
class Setting:
    """How a run is kept."""

    top_k: int
    background: bool
    every_epochs: int | None = None
    every_steps: int | None = None

    def make(self, root: Path) -> Run:
        return Run(self, root)


@dataclass
class Moment:
    """The model and its optimizer at the end of an epoch."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]


class Run:
    """A run whose files are all below one directory, and what it was like at the end of each epoch."""

    def __init__(self, setting: Setting, root: Path) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))
        self.root = root
        self.best = BestCheckpoint("val_loss", "max", top_k=setting.top_k, restore=True)  # 1, then 4, then 5
        self.checkpoint = RunCheckpoint(
            root / "resume",
            background=setting.background,
            every_epochs=setting.every_epochs,
            every_steps=setting.every_steps,
        )
        self.directory = RunDirectory(root / "runs", terminal=False)
        self.trainer = make_trainer(self.directory, TensorBoard(), self.best, self.checkpoint, model=model, lr=0.15)
        self.moments: dict[int, Moment] = {}
        self.trainer.subscribe(EpochEnd, self._remember)

    def _remember(self, event: EpochEnd) -> None:
        self.moments[event.engine.epoch] = moment_of(event.engine)

    def fit(self, epochs: int = EPOCHS) -> Run:
        self.trainer.fit(TRAIN, VAL, epochs=epochs, resume="auto")
        return self


def moment_of(engine: Engine) -> Moment:
    """Return a copy of the present state of model and optimizer."""
    file = io.BytesIO()
    torch.save([engine.parts["model"].state_dict(), engine.parts["optimizer"].state_dict()], file)
    file.seek(0)
    return Moment(*torch.load(file, weights_only=True))


def same(first: Any, second: Any) -> bool:
    """Return whether two states are the same to the bit."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return (
            isinstance(second, dict) and list(first) == list(second) and all(same(first[k], second[k]) for k in first)
        )
    if isinstance(first, list):
        return isinstance(second, list) and len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


class Recorded:
    """A run that was resumed once, with its write log; and the same run uninterrupted."""

    def __init__(self, setting: Setting, path: Path) -> None:
        self.setting = setting
        self.whole = setting.make(path / "whole").fit()
        (path / "run").mkdir()
        with recording(path / "run") as self.log:
            setting.make(path / "run").fit(epochs=4)
            setting.make(path / "run").fit()
        self.history = (self.whole.directory.path / "history.csv").read_bytes()

    def durable(self, length: int) -> int:
        """Return the number of the newest checkpoint whose save was done within so many operations; 0 if none was."""
        node, newest = self.log.names["resume"], 0
        done = max((p for p, one in enumerate(self.log.operations[:length]) if one == Sync(node)), default=0)
        for one in self.log.operations[:done]:
            numbers = (
                [int(name[11:17]) for name in one.names if name[:11] == "resume/run-"] if isinstance(one, Link) else ()
            )
            newest = max(newest, *numbers) if numbers else newest
        return newest

    def states(self, losses: Sequence[float], dice: random.Random) -> Iterator[tuple[int, float, Disk]]:
        """Return each state of the disk once: after each operation, without and with losses."""
        seen: set[str] = set()
        for length in range(len(self.log.operations) + 1):
            for loss in losses:
                disk = replay(self.log, length, loss, dice)
                digest = hashlib.sha256(repr(sorted(disk.items())).encode()).hexdigest()
                if digest not in seen:
                    seen.add(digest)
                    yield length, loss, disk


# What must be so ----------------------------------------------------------------------------------------------


class Check:
    """One state of the disk after a power cut, and what is resumed from it."""

    def __init__(self, recorded: Recorded, root: Path, length: int, loss: float) -> None:
        self.recorded, self.root, self.length, self.loss = recorded, root, length, loss
        self.moments = recorded.whole.moments
        self.state = self.newest_checkpoint()

    def newest_checkpoint(self) -> dict[str, Any] | None:
        """A checkpoint at least as new as the last whose save was done is found, and no file is a damaged one."""
        directory, durable = CheckpointDirectory(self.root / "resume"), self.recorded.durable(self.length)
        found = directory.load_newest()
        assert not list(self.root.rglob("*.damaged"))
        if found is None:
            assert durable == 0
            return None
        assert directory.files()[0].number >= durable
        return found[0]

    def tables_are_clean(self) -> None:
        """A table is the beginning of the whole one; only a power cut may break its last line."""
        for file in self.root.glob("runs/*/history.csv"):
            content = file.read_bytes()
            assert self.recorded.history.startswith(content)
            assert content.endswith(b"\n") or self.loss

    def best_files_are_of_one_moment(self) -> None:
        for weights in self.root.glob("runs/*/checkpoints/best.pt"):
            loaded = torch.load(weights, weights_only=True)
            (moment,) = [one for one in self.moments.values() if same(one.weights, loaded)]
            optimizer = weights.with_name("best.optimizer.pt")
            if optimizer.exists():
                assert same(torch.load(optimizer, weights_only=True), moment.optimizer)

    def resumed_best_is_what_the_state_says(self, caplog: pytest.LogCaptureFixture) -> bool:
        """Each file that is kept is of its epoch, and what is lost is not kept; return whether the best is."""
        if self.state is None:
            return True
        saved = self.state["callbacks"]["BestCheckpoint"]
        best = BestCheckpoint("val_loss", "max", top_k=self.recorded.setting.top_k)
        best.directory = self.root / "runs" / self.state["callbacks"]["RunDirectory"]["name"] / "checkpoints"
        caplog.clear()
        best.load_state_dict(saved)
        said = [Kept(**one) for one in saved["kept"]]
        assert set(best.kept) <= set(said)
        if not best.kept:
            assert ("The best weights of the resumed run are not in" in caplog.text) == bool(said)
            there = [hashlib.sha256(path.read_bytes()).hexdigest() for path in best.directory.glob("*")]
            assert not said or said[0].digest not in there
            return not said
        assert best.kept[0] == said[0]
        assert same(best.weights(), self.moments[said[0].epoch].weights)
        for kept in best.kept if self.recorded.setting.top_k > 1 else ():
            assert same(torch.load(best.directory / kept.file, weights_only=True), self.moments[kept.epoch].weights)
        return True

    def a_resumed_run_ends_as_if_it_had_not_been_cut(self) -> None:
        whole, run = self.recorded.whole, self.recorded.setting.make(self.root)
        run.fit()
        if self.state is not None:
            assert run.directory.path.name == self.state["callbacks"]["RunDirectory"]["name"]
        if run.moments:
            assert same(vars(run.moments[EPOCHS]), vars(whole.moments[EPOCHS]))
        assert (run.trainer.epoch, run.trainer.step) == (whole.trainer.epoch, whole.trainer.step)
        assert run.best.kept == whole.best.kept
        assert same(run.best.weights(), whole.best.weights())
        assert same(dict(run.trainer.parts["model"].state_dict()), dict(whole.trainer.parts["model"].state_dict()))
        self.files_are_those_of_the_run(run)

    def files_are_those_of_the_run(self, run: Run) -> None:
        """No temporary file is left, and the table is whole."""
        own = [self.root / "resume", run.directory.path, run.directory.path / "checkpoints"]
        assert not [path for directory in own for path in directory.glob(".*")]
        kept = {one.file for one in run.best.kept} if self.recorded.setting.top_k > 1 else set()
        there = {path.name for path in own[2].iterdir()}
        assert there >= {"best.pt", "best.optimizer.pt", *kept}
        assert there == {"best.pt", "best.optimizer.pt", *kept} or self.loss, "only a power cut undoes a removal"
        if run.moments:
            assert (run.directory.path / "history.csv").read_bytes() == self.recorded.history


SETTINGS = {
    "foreground": Setting(top_k=2, background=False, every_epochs=3),
    "background": Setting(top_k=2, background=True, every_steps=4),
    "only the best": Setting(top_k=1, background=False, every_epochs=3),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recorded]:
    return {name: Recorded(setting, tmp_path_factory.mktemp("recorded")) for name, setting in SETTINGS.items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_whole_log_gives_what_is_in_the_directory(name: str, recorded: dict[str, Recorded]) -> None:
    """Or the log would have missed something; and the best is a later epoch more than once."""
    log = recorded[name].log
    assert replay(log, len(log.operations)) == look(log.root)
    assert [kept.epoch for kept in recorded[name].whole.best.kept] == [5, 6][: SETTINGS[name].top_k]


def check_states(recorded: Recorded, share: float, path: Path, caplog: pytest.LogCaptureFixture) -> tuple[int, int]:
    """Check this share of the states; return their number, and in how many the state's best weights were lost."""
    num_states = num_lost = 0
    dice, choice = random.Random(0), random.Random(1)
    for number, (length, loss, disk) in enumerate(recorded.states((0, 0.2, 0.5, 0.8, 1), dice)):
        if choice.random() < share:
            fill(path / str(number), disk)
            check = Check(recorded, path / str(number), length, loss)
            check.tables_are_clean()
            check.best_files_are_of_one_moment()
            num_lost += not check.resumed_best_is_what_the_state_says(caplog)
            check.a_resumed_run_ends_as_if_it_had_not_been_cut()
            shutil.rmtree(path / str(number))
            num_states += 1
    print(
        f"{num_states} states of {len(recorded.log.operations)} operations; the best weights were lost in {num_lost}"
    )
    return num_states, num_lost


@pytest.mark.slow
def test_a_power_cut_at_some_moments_loses_nothing_that_was_saved(
    recorded: dict[str, Recorded], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, one in recorded.items():
        assert check_states(one, 0.02, tmp_path / name, caplog)[0] >= 8


@pytest.mark.slow
def test_a_power_cut_at_any_moment_loses_nothing_that_was_saved(
    recorded: dict[str, Recorded], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only where nothing but the best is kept can a later best have taken its place; that is said."""
    counts = {name: check_states(one, 1, tmp_path / name, caplog) for name, one in recorded.items()}
    assert sum(states for states, _ in counts.values()) >= 1000
