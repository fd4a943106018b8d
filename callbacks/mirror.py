"""Copies of a run's checkpoints in another storage, such as an object store."""

from __future__ import annotations

import contextlib
import importlib
import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from camshaft.engine import (
    CheckpointDirectory,
    CheckpointError,
    CheckpointFile,
    ConfigurationError,
    MissingPackageError,
    checkpoint_files,
    import_optional,
    superseded,
)

logger = logging.getLogger("camshaft")

_PIECE = 2**22  # bytes that are copied at once


class Mirror:
    """Copies each checkpoint, when it is complete and on the disk, into a directory that fsspec can reach.

    Copies are made on a thread, one at a time; while one is being made, only the newest of those that come is kept for
    the next. A copy that was cut short is known by its digest, which does not fit its name, and is never used. Older
    copies are removed when a newer one is complete.

    Args:
        url: the directory: ``"s3://bucket/run"``, ``"gs://..."``, ``"memory://..."``, a path.
        keep, keep_every: which to keep, as in `RunCheckpoint`.

    Raises:
        ConfigurationError: if fsspec knows no such storage.
        MissingPackageError: naming the package that it needs for it.
    """

    def __init__(self, url: str, keep: int, keep_every: int | None) -> None:
        self.url = url
        self._keep, self._keep_every = keep, keep_every
        self._system, self._root = _opened(url)
        self._thread: ThreadPoolExecutor | None = None
        self._copies: list[Future[None]] = []

    def files(self) -> list[CheckpointFile]:
        """Return the copies, newest first, the damaged ones among them."""
        self._system.invalidate_cache()
        try:
            paths = self._system.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        return checkpoint_files(Path(path) for path in paths)

    def fetch_newer(self, directory: CheckpointDirectory) -> None:
        """Copy the newest checkpoint into the directory, if that has none which is as new.

        Raises:
            ConfigurationError: if the copies cannot be read, or are those of another run.
            CheckpointError: if there are copies alone, and every one is damaged.
        """
        own, copies = directory.files(), self._listed()
        newest = own[0].number if own else 0
        others = {file.number: file.path.name for file in copies}
        for file in own:
            if others.get(file.number, file.path.name) != file.path.name:
                raise ConfigurationError(
                    f"{self.url} has {others[file.number]}, and {directory.path} has {file.path.name}, so they are of "
                    "two runs. Pass another mirror, or the directory that it belongs to."
                )
        newer = [file for file in copies if file.number > newest]
        for file in newer:
            if self._fetch(file, directory):
                logger.info("Fetched %s from %s.", file.path.name, self.url)
                return
            logger.warning("%s in %s is damaged: its content does not fit its name.", file.path.name, self.url)
        if newer and not own:
            raise CheckpointError(
                f"Every checkpoint in {self.url} is damaged. "
                "Use another mirror, or remove these files to start from the beginning."
            )

    def check(self) -> None:
        """Write a file there, and remove it.

        Raises:
            ConfigurationError: if that cannot be done.
        """
        path = f"{self._root}/.camshaft"
        try:
            self._system.makedirs(self._root, exist_ok=True)
            self._system.pipe_file(path, b"")
            self._system.rm_file(path)
        except Exception as error:  # each storage has kinds of its own
            raise ConfigurationError(
                f"The mirror {self.url} cannot be written: {error!r}. Look for the cause, or pass another one."
            ) from error

    def send(self, path: Path) -> None:
        """Begin to copy a file; one that still waits for its turn is left out."""
        for copy in self._copies:
            copy.cancel()
        self._copies = [copy for copy in self._copies if not copy.cancelled()]
        self._thread = self._thread or ThreadPoolExecutor(1, "camshaft-mirror")
        file = open(path, "rb")  # noqa: SIM115 - closed by the thread; so it can be read when it has been pruned
        self._copies.append(self._thread.submit(self._copy, path.name, file))
        self._copies[-1].add_done_callback(lambda _: file.close())

    def wait(self) -> OSError | None:
        """Wait for the copies, and return the error of the newest, if it failed."""
        if any(not copy.done() for copy in self._copies):
            logger.info("Waiting for the copy of the last checkpoint to %s.", self.url)
        error = self._copies[-1].exception() if self._copies else None
        if self._thread is not None:
            self._thread.shutdown()
        self._thread, self._copies = None, []
        if error is None or isinstance(error, OSError):
            return error
        return OSError(f"{self.url}: {error!r}")

    def _copy(self, name: str, file: BinaryIO) -> None:
        target = f"{self._root}/{name}"
        try:
            with self._system.open(target, "wb") as copy:
                shutil.copyfileobj(file, copy, _PIECE)
        except Exception as error:
            logger.warning("%s could not be copied to %s: %r. The one on the disk is good.", name, self.url, error)
            with contextlib.suppress(Exception):  # where there is a piece of it; its digest would give it away, too
                self._system.rm_file(target)
            raise
        try:
            for old in superseded(self.files(), self._keep, self._keep_every):
                self._system.rm_file(f"{self._root}/{old.path.name}")
        except Exception as error:
            logger.warning("Older copies are still in %s: %r. The next copy tries again.", self.url, error)

    def _listed(self) -> list[CheckpointFile]:
        try:
            return self.files()
        except Exception as error:
            raise ConfigurationError(
                f"The mirror {self.url} cannot be read: {error!r}. Look for the cause, or pass another one."
            ) from error

    def _fetch(self, file: CheckpointFile, directory: CheckpointDirectory) -> bool:
        source = f"{self._root}/{file.path.name}"

        def write(target: BinaryIO) -> None:
            with self._system.open(source, "rb") as copy:
                shutil.copyfileobj(copy, target, _PIECE)

        try:
            return directory.adopt(file.path.name, write)
        except Exception as error:
            raise ConfigurationError(
                f"{file.path.name} cannot be fetched from {self.url}: {error!r}. Look for the cause, and start again."
            ) from error


def _opened(url: str) -> tuple[Any, str]:
    """Return fsspec's file system, and the path in it."""
    fsspec = import_optional("fsspec", used_by="RunCheckpoint's mirror")
    try:
        system, root = fsspec.core.url_to_fs(str(url))
    except ImportError as error:
        registry = importlib.import_module("fsspec.registry")
        package = registry.known_implementations[str(url).partition(":")[0]]["class"].partition(".")[0]
        raise MissingPackageError(
            f"The mirror {url} needs the package {package}, which is not installed. Write: pip install {package}."
        ) from error
    except (ValueError, TypeError) as error:
        raise ConfigurationError(
            f"The mirror {url!r} is in no storage that fsspec knows ({error}). "
            'Write "s3://bucket/run", or what fsspec.available_protocols() returns.'
        ) from error
    return system, str(PurePosixPath(root))
