"""Files that are never half there, and the weights of the bare model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from .errors import CheckpointError, ConfigurationError


def write_durably(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that after a crash at any moment ``path`` holds the old content or the new, whole.

    A temporary file in the same directory is written, flushed and synced; it then takes the name in one
    step, and the directory is synced.

    Raises:
        OSError: if the disk is full or the directory cannot be written; ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch.save hides a full disk behind an internal error
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames and removals in ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(path: Path, value: Any) -> None:
    """Write ``value`` with ``torch.save``, durably."""
    write_durably(path, lambda file: torch.save(value, file))


def load_weights(model: nn.Module, weights: dict[str, Any], source: str) -> None:
    """Load a plain state dict into the bare model, or nothing at all.

    Raises:
        CheckpointError: naming the first five differences, if the weights are of another architecture.
    """
    target = bare(model)
    own = target.state_dict()
    differences = [f"{name} is missing" for name in own if name not in weights]
    differences += [f"{name} is unknown to the model" for name in weights if name not in own]
    differences += [
        f"{name} has shape {list(value.shape)}, the model's has {list(own[name].shape)}"
        for name, value in weights.items()
        if name in own and value.shape != own[name].shape
    ]
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise CheckpointError(
            f"{source} is of another architecture: {'; '.join(differences[:5])}{more}. "
            "Build the model as it was when the file was written; nothing was loaded."
        )
    target.load_state_dict(weights)


def bare(model: nn.Module) -> nn.Module:
    """Return the model itself, out of any DataParallel, DistributedDataParallel or compiled wrapper."""
    while True:
        wrapped = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            wrapped = model.module
        if not isinstance(wrapped, nn.Module):
            return model
        model = wrapped


def ensure_writable(directory: Path, owner: str) -> None:
    """Make the directory if need be and try to write in it.

    Raises:
        ConfigurationError: naming the directory and who wanted it, if that fails.
    """
    probe = directory / f".probe.{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigurationError(
            f"{owner} cannot write in {directory}: {error.strerror}. Pass a directory that can be written."
        ) from error
