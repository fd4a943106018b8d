"""What a run ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from camshaft.engine import launched_world

from .secrets import command_without_secrets


def environment() -> dict[str, Any]:
    """Return what a run ran on: command, versions, machine, devices, and the commit that was checked out."""
    packages = ("camshaft", "torch", "torchvision", "numpy", "pytorch-ignite", "torchmetrics", "tensorboardX")
    return {
        "command": command_without_secrets(sys.argv),
        "full_command": command_without_secrets([sys.executable, *sys.orig_argv[1:]]),
        "directory": os.getcwd(),
        "ranks": launched_world(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "versions": {name: _version(name) for name in packages},
        "git": git_commit(Path(sys.argv[0] if sys.argv else "").resolve().parent),
    }


def git_commit(directory: Path) -> dict[str, Any] | None:
    """Return the commit that a directory is checked out at, and whether its files differ from it.

    None outside a repository, without git, and where git takes longer than two seconds. Files that git does not know
    are not looked at.
    """

    def ask(*command: str) -> str:
        command = ("git", "--no-optional-locks", *command)
        asked = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=2, check=True)
        return asked.stdout.strip()

    try:
        changed = ask("status", "--porcelain", "--untracked-files=no")
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
