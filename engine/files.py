"""Atomic files: after a crash at any moment a name holds the old content or the new one, complete."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard, cast

import torch
from torch import Tensor

from .batch import tree_map
from .errors import ConfigurationError

try:
    import fcntl as _fcntl
except ImportError:
    _fcntl = None  # type: ignore[assignment]  # Windows has none

fcntl: Any = _fcntl
logger = logging.getLogger("camshaft")


def write_durably(
    path: Path, write: Callable[[BinaryIO], object], *, final: Callable[[str], Path] | None = None
) -> Path:
    """Write a file so that after a crash at any moment its name holds the old content or the new one, complete.

    A temporary file in the same directory is written, flushed and synced; it then takes the name in one
    step, and the directory is synced.

    Args:
        path: the name; if ``final`` is given, only the temporary file's name is made from it.
        write: writes the content into an open file.
        final: a function that returns the name, given the SHA-256 of the content.

    Raises:
        OSError: if the disk is full or the directory cannot be written; what was there is as it was.
    """
    with _temporaries() as made:
        temporary, digest = _write_temporary(path, write, made)
        path = path if final is None else final(digest)
        os.replace(temporary, path)
    sync_directory(path.parent)
    return path


@contextlib.contextmanager
def _temporaries() -> Iterator[list[Path]]:
    """Remove the temporary files that were made, if the body fails."""
    made: list[Path] = []
    try:
        yield made
    except BaseException:
        for temporary in made:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise


def _write_temporary(path: Path, write: Callable[[BinaryIO], object], made: list[Path]) -> tuple[Path, str]:
    """Write what is to become ``path`` into a new file beside it; return that file and its SHA-256."""
    temporary, file = _new_file(path)
    made.append(temporary)
    try:
        with file:
            hashing = _HashingFile(file)
            write(cast("BinaryIO", hashing))
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch.save hides a full disk behind an internal error
        raise
    return temporary, hashing.digest.hexdigest()


def _new_file(path: Path) -> tuple[Path, BinaryIO]:
    """Make a file beside ``path``, under a name that nobody else has or can guess, and open it.

    A link in its place is not followed, or somebody else could choose what is written over.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    return temporary, open(temporary, "xb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def remove_temporaries(directory: Path, *names: str) -> None:
    """Remove what writers of files of these names, or patterns such as ``"best*.pt"``, left when they were killed.

    None of them may be writing now.
    """
    for name in names:
        for temporary in directory.glob(f".{name}.*.tmp"):
            temporary.unlink(missing_ok=True)


class _HashingFile:
    """A file that is only written to, and the SHA-256 of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def sync_directory(directory: Path) -> None:
    """Make renames and removals in ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(path: Path, value: Any) -> None:
    """Write ``value`` with ``torch.save``, durably; tensors go to the CPU first, so that it loads anywhere."""
    save_together({path: value})


def save_together(values: dict[Path, Any]) -> list[str]:
    """Write several files of one moment; after a crash at any moment the others are of the first one's, or missing.

    All are complete and on the disk before the first takes its name; what the others replace is removed before that.
    None stands for a file that is not to exist. Return the SHA-256 of each file that was written.
    """
    first, *others = paths = [path for path, value in values.items() if value is not None]
    with _temporaries() as made:
        digests = [
            _write_temporary(path, partial(torch.save, tree_map(Tensor.cpu, values[path])), made)[1] for path in paths
        ]
        _remove_durably([path for path in values if path != first and path.exists()])
        os.replace(made[0], first)
        sync_directory(first.parent)
        for path, temporary in zip(others, made[1:], strict=True):
            os.replace(temporary, path)
    for directory in {path.parent for path in others}:
        sync_directory(directory)
    return digests


def _remove_durably(paths: list[Path]) -> None:
    for path in paths:
        path.unlink()
    for directory in {path.parent for path in paths}:
        sync_directory(directory)


def ensure_writable(directory: Path, owner: str) -> None:
    """Make the directory if need be and try to write in it.

    Raises:
        ConfigurationError: naming the directory and who wanted it, if that fails.
    """
    try:
        _make_directory(directory)
        remove_temporaries(directory, "probe")
        probe, file = _new_file(directory / "probe")
        file.close()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"{owner} cannot write in {directory}: {error.strerror}. Pass a directory that can be written."
        ) from error


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other runs out of a directory that can be written; a lock ends with its process, however that ends.

    Where locks do not work, that is logged, and nothing is locked.

    Raises:
        ConfigurationError: naming the process that has locked it, which may be this one.
    """
    lock = _lock(directory / ".lock")
    try:
        yield
    finally:
        if lock is not None and not lock.closed:
            with contextlib.suppress(OSError):
                (directory / ".lock").unlink()
            lock.close()
        _held.discard(lock)


_held: set[BinaryIO | None] = set()


def _let_go() -> None:
    """Close the locks in a process that was forked, such as a loader's worker: it may live longer than the run."""
    for lock in _held:
        if lock is not None:
            lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _lock(path: Path) -> BinaryIO | None:
    if fcntl is None:
        return None
    try:
        while not _is_at(path, lock := _try_to_lock(path)):  # the run before has ended just now, and removed its file
            lock.close()
    except OSError as error:
        logger.warning("%s cannot be locked: %s. Let no second run write there.", path.parent, error.strerror or error)
        return None
    _held.add(lock)
    return lock


def _try_to_lock(path: Path) -> BinaryIO:
    """Return the file, locked, with the number of this process in it."""
    flags = os.O_CREAT | os.O_NOFOLLOW
    lock = cast("BinaryIO", os.fdopen(os.open(path, flags | os.O_RDWR, 0o666), "r+b", buffering=0))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate()
        lock.write(str(os.getpid()).encode())
    except BlockingIOError as error:
        with lock:
            holder = lock.read().decode(errors="replace") or "of an unknown number"
        raise ConfigurationError(
            f"{path.parent} is in use by another run, in process {holder}. "
            "Pass another directory, or wait until that run has ended."
        ) from error
    except OSError:
        lock.close()
        raise
    return lock


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _make_directory(directory: Path) -> None:
    """Make a directory and those above it, so that after a crash they are there."""
    new = [one for one in (directory, *directory.parents) if not one.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for one in new:
        sync_directory(one.parent)


def directory_for(owner: str, wanted: str | Path | None, run_directory: Path | None, *, within: str = "") -> Path:
    """Return the directory that a handler writes in: the one it wants, or the run directory.

    It is made if it does not exist, and tried.

    Args:
        owner: the name of the handler, for messages.
        wanted: a directory; None for the run directory.
        run_directory: the run directory, ``engine.directory``.
        within: the name of a directory within the run directory.

    Raises:
        ConfigurationError: if there is neither, or it cannot be written.
    """
    if wanted is None and run_directory is None:
        raise ConfigurationError(f"{owner} has nowhere to write. Pass it a directory, or add RunDirectory().")
    directory = Path(wanted) if wanted is not None else Path(str(run_directory), within)
    ensure_writable(directory, owner)
    return directory


def is_plain_name(name: object) -> TypeGuard[str]:
    """Return whether ``name`` is the name of something in a directory, and not a path that leads elsewhere.

    >>> is_plain_name("best.pt"), is_plain_name("../best.pt"), is_plain_name("..")
    (True, False, False)
    """
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
