"""A directory of verified checkpoints, of which a good one is never lost."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .errors import CheckpointError
from .files import locked, remove_temporaries, sync_directory, write_durably
from .sharded import Parts, put_together, read_whole

logger = logging.getLogger("camshaft")

PART_DIGESTS = "part_digests"  # the key, in a checkpoint, of the digests of its parts in the order of the ranks
_NAME = re.compile(r"run-(\d{6,})-step-(\d+)-([0-9a-f]{32})\.pt")


class _WrongDigest(Exception):  # noqa: N818 - raised and caught in this file
    """A file is not the one that its name says."""


def _alone(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU without what else is in its memory, which would be saved with it."""
    return tensor.to("cpu", copy=tensor.untyped_storage().nbytes() != tensor.nbytes)


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """One run checkpoint: a higher number is newer, and the name holds the digest of the content."""

    path: Path
    number: int
    step: int
    digest: str


class CheckpointDirectory:
    """The run checkpoints in a directory.

    A file's name is ``run-<number>-step-<step>-<first half of its SHA-256>.pt``. It takes that name only when it is
    complete and on the disk, so the listing of the directory is the index.

    What several ranks hold in parts may be in files of theirs, in the directory ``.run-<number>.parts``. The
    checkpoint then holds their digests, and is written last and removed first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def files(self) -> list[CheckpointFile]:
        """Return the checkpoints, newest first."""
        return checkpoint_files(self.path / name for name in (os.listdir(self.path) if self.path.is_dir() else ()))

    def save(self, state: dict[str, Any], step: int) -> CheckpointFile:
        """Write one more; if it is in parts, after those are written.

        Raises:
            OSError: if that fails; the others are as they were.
        """
        number = self._next_number()
        stem = f"run-{number:06d}-step-{step}"
        path = write_durably(
            self.path / stem,
            lambda file: torch.save(state, file),
            final=lambda digest: self.path / f"{stem}-{digest[:32]}.pt",
        )
        return CheckpointFile(path, number, step, path.stem[-32:])

    def adopt(self, name: str, write: Callable[[BinaryIO], object]) -> bool:
        """Write a checkpoint of another place, under its name; return False if its digest is not the one in the name.

        Raises:
            OSError: if it cannot be written.
        """

        def final(digest: str) -> Path:
            if name.endswith(f"-{digest[:32]}.pt"):
                return self.path / name
            raise _WrongDigest

        try:
            write_durably(self.path / name.rpartition("-")[0], write, final=final)
        except _WrongDigest:
            return False
        return True

    def _next_number(self) -> int:
        damaged = checkpoint_files(path.with_suffix(".pt") for path in self.path.glob("run-*.damaged"))
        return max((file.number for file in [*self.files(), *damaged]), default=0) + 1

    def begin_parts(self) -> Path:
        """Make a new directory for the parts of the next checkpoint; one that was left there was never complete."""
        directory = parts_of(self.path, self._next_number())
        if directory.exists():
            shutil.rmtree(directory)
        directory.mkdir()
        sync_directory(self.path)
        return directory

    def load_newest(self, *, reads: bool = True) -> tuple[dict[str, Any], Path] | None:
        """Return the newest checkpoint that is complete, and its path; None if there are no checkpoints.

        A damaged one is put aside with a warning that says why, and the one before it is used. Only a wrong digest is
        damage: a file that cannot be read now may be read at the next try.

        Args:
            reads: whether to read what several ranks have written in parts, whole; otherwise it is read when it is
                needed, as far as it is.

        Raises:
            CheckpointError: if a file cannot be read or loaded; or if there are files, but every one is damaged.
        """
        with _reading(self.path):
            files = self.files()
        for file in files:
            state, damage = _load(file.path, file.digest, reads=reads)
            if damage is None:
                return state, file.path
            logger.warning("%s The one before it is used.", damage)
            file.path.rename(file.path.with_suffix(".damaged"))
        if names := sorted(path.name for path in self.path.glob("run-*.damaged")):
            raise CheckpointError(
                f"Every checkpoint in {self.path} is damaged: {', '.join(names)}. "
                "Use another directory, or remove these files to start from the beginning."
            )
        return None

    def locked(self) -> AbstractContextManager[None]:
        """Keep other runs out of the directory, which must be there, for the length of a ``with`` block.

        Raises:
            ConfigurationError: naming the process that has locked it.
        """
        return locked(self.path)

    def sweep(self) -> None:
        """Remove the temporary files of writers that were killed, and parts that belong to no checkpoint."""
        remove_temporaries(self.path, "run-*-step-*")
        named = {file.name.split("-")[1] for file in self.path.glob("run-*-step-*")}
        for directory in self.path.glob(".run-*.parts"):
            if directory.name.removeprefix(".run-").removesuffix(".parts") not in named:
                shutil.rmtree(directory)

    def prune(self, keep: int, keep_every: int | None) -> None:
        """Remove all but the newest ``keep``, and of the others every ``keep_every``-th."""
        for file in superseded(self.files(), keep, keep_every):
            file.path.unlink(missing_ok=True)
            if (parts := parts_of(self.path, file.number)).exists():
                sync_directory(self.path)  # no checkpoint may be without its parts
                shutil.rmtree(parts)


def checkpoint_files(paths: Iterable[Path]) -> list[CheckpointFile]:
    """Return what of the paths is named as a checkpoint, newest first."""
    matches = [(path, _NAME.fullmatch(path.name)) for path in paths]
    found = [CheckpointFile(path, int(match[1]), int(match[2]), match[3]) for path, match in matches if match]
    return sorted(found, key=lambda file: file.number, reverse=True)


def superseded(files: list[CheckpointFile], keep: int, keep_every: int | None) -> list[CheckpointFile]:
    """Return those that are neither among the newest ``keep`` nor a ``keep_every``-th."""
    return [file for file in files[keep:] if keep_every is None or file.number % keep_every]


def keep_checkpoint(file: CheckpointFile, directory: Path) -> None:
    """Keep a checkpoint, with its parts, in another directory, too; as links where the file system has them.

    Raises:
        OSError: if that fails; FileNotFoundError if it was removed meanwhile.
    """
    directory.mkdir(parents=True, exist_ok=True)
    parts, kept = parts_of(file.path.parent, file.number), parts_of(directory, file.number)
    if parts.exists():
        kept.mkdir(exist_ok=True)
        for part in parts.iterdir():
            _link(part, kept / part.name)
    _link(file.path, directory / file.path.name)


def _link(path: Path, other: Path) -> None:
    if other.exists():
        return
    try:
        other.hardlink_to(path)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copyfile(path, other)


def parts_of(path: Path, number: int) -> Path:
    """Return the directory for the parts of a checkpoint."""
    return path / f".run-{number:06d}.parts"


def write_part(directory: Path, rank: int, parts: Parts) -> str:
    """Write a rank's part, durably, and return its SHA-256.

    Raises:
        OSError: if that fails.
    """
    digests: list[str] = []
    own = {key: part | {"content": _alone(part["content"])} for key, part in parts.items()}

    def final(digest: str) -> Path:
        digests.append(digest)
        return directory / f"part-{rank}.pt"

    write_durably(directory / f"part-{rank}", lambda file: torch.save(own, file), final=final)
    return digests[0]


def load_verified(path: Path, *, reads: bool = True, looks_at_parts: bool = True) -> dict[str, Any]:
    """Load a run checkpoint after its digest has been checked against its name.

    Args:
        path: the file.
        reads: whether to read what several ranks have written in parts, whole.
        looks_at_parts: whether to check the digests of the parts, too; another rank may have done so.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(
            f"{path} is not named as a run checkpoint. "
            "Pass the directory, or a file run-<number>-step-<step>-<digest>.pt."
        )
    state, damage = _load(path, match[3], reads=reads, looks_at_parts=looks_at_parts)
    if damage is not None:
        raise CheckpointError(f"{damage} Use another checkpoint.")
    return state


def _load(path: Path, digest: str, *, reads: bool, looks_at_parts: bool = True) -> tuple[dict[str, Any], str | None]:
    """Return what a file holds; and None, or if its digest is not this one, in words, the damage."""
    with _reading(path), open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()[:32]
        size = file.seek(0, os.SEEK_END)
        if found != digest:
            says = f"the SHA-256 of its {size} bytes begins with {found}, and its name says {digest}"
            return {}, f"{path} is damaged: {says}."
        file.seek(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Validating sparse tensor")  # sparse gradients: it is what we want
            state = torch.load(file, weights_only=True, map_location="cpu")
        if isinstance(state, dict) and PART_DIGESTS in state:
            state, damage = _load_parts(path, state, looks_at_parts=looks_at_parts)
            return read_whole(state) if reads else state, damage
        return state, None


def _load_parts(path: Path, state: dict[str, Any], *, looks_at_parts: bool) -> tuple[dict[str, Any], str | None]:
    """Return a state with what is in the files of its parts; or, in words, the damage of one of them."""
    match = _NAME.fullmatch(path.name)
    directory = parts_of(path.parent, int(match[1]) if match else 0)
    files = {directory / f"part-{rank}.pt": digest for rank, digest in enumerate(state.pop(PART_DIGESTS))}
    for file, digest in files.items():
        if looks_at_parts and (damage := _damage(file, digest)):
            return {}, f"{path} is damaged: its {file.name} {damage}."
    parts = [torch.load(file, weights_only=True, map_location="cpu", mmap=True) for file in files]
    whole: dict[str, Any] = put_together(state, parts)
    return whole, None


def _damage(file: Path, digest: str) -> str:
    """Return, in words, what is wrong with the file of a part; nothing if it is whole."""
    if not file.exists():
        return "is missing"
    with open(file, "rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    return "" if found == digest else f"has a SHA-256 that begins with {found[:32]}, and not with {digest[:32]}"


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise what goes wrong as an error that names the file; but a lack of memory as it is."""
    try:
        yield
    except MemoryError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}. Look for the cause, and resume again."
        ) from error
    except Exception as error:  # torch raises at least four kinds
        raise CheckpointError(f"{path} is complete but cannot be loaded: {error}. Use another checkpoint.") from error


_PLAIN = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device)


def check_plain(value: Any, name: str) -> None:
    """Refuse what ``torch.load(weights_only=True)`` would not load, by the name of its key.

    Raises:
        CheckpointError: naming the key, the value's type and what to keep instead.

    >>> check_plain({"a": [1, torch.zeros(2)]}, "state")
    """
    for key, item in _leaves(value, name):
        if type(item) not in _PLAIN and not isinstance(item, Tensor):
            raise CheckpointError(
                f"{key} is of type {type(item).__module__}.{type(item).__qualname__}, which cannot be loaded safely. "
                "Keep tensors, numbers, strings, lists and dicts in states: float(x) for a NumPy number."
            )


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if type(value) in (dict, OrderedDict, Counter):
        for key, item in value.items():
            yield from _leaves(item, f"{name}[{key!r}]")
            if type(key) not in _PLAIN:
                yield f"a key of {name}", key
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{name}[{number}]")
    else:
        yield name, value
