"""What this machine has for training, and what is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "missing", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Args:
        name: what it is.
        state: "missing" is what some handlers need; a "problem" hinders training.
        found: a version, a number, or what is wrong.
        advice: what to do about it; "" where that is nothing.
    """

    name: str
    state: State
    found: str
    advice: str = ""


def findings() -> Iterator[Finding]:
    """Look at Python, packages, devices, compilers and the disk, one after the other."""
    yield Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")
    yield Finding("platform", "ok", f"{platform.platform()}, {os.cpu_count()} cores")
    required, extras = _requirements()
    yield from (_package(name, "") for name in required)
    yield from _torch()
    yield from _compilers()
    yield from _disk()
    for extra, names in extras.items():
        yield from (_package(name, extra) for name in names)


def _requirements() -> tuple[list[str], dict[str, list[str]]]:
    """Return the packages that camshaft needs, and those of its extras; without those for its own developers."""
    required: list[str] = []
    extras: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("camshaft") or ():
        name = re.split(r"[ \[<>=!~;(]", requirement, maxsplit=1)[0]
        extra = re.search(r"""extra == ['"](\w+)['"]""", requirement)
        if extra is None:
            required.append(name)
        elif extra[1] not in ("dev", "bench", "docs", "examples", "moving") and name != "camshaft":
            extras.setdefault(extra[1], []).append(name)
    return required, extras


def _package(name: str, extra: str) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if extra:
            return Finding(name, "missing", "not installed", f'pip install "camshaft[{extra}]"')
        return Finding(name, "problem", "not installed, and camshaft needs it", f"pip install {name}")
    return Finding(name, "ok", version)


def _torch() -> Iterator[Finding]:
    try:
        torch: Any = importlib.import_module("torch")
    except Exception as error:
        yield Finding("import torch", "problem", _first_line(error), "Install torch as pytorch.org says.")
        return
    yield Finding("torch", "ok", f"built for {_builds(torch)}; {torch.get_num_threads()} threads")
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        yield Finding(
            "import torchvision", "problem", _first_line(error), "pip install --force-reinstall torch torchvision"
        )
    yield from _devices(torch)
    distributed = torch.distributed
    backends = [name for name in ("gloo", "nccl", "mpi") if _has_backend(distributed, name)]
    yield Finding("several ranks", "ok" if backends else "missing", ", ".join(backends) or "no backend of this torch")


def _builds(torch: Any) -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    hip = getattr(torch.version, "hip", None)
    return f"ROCm {hip}" if hip else "the CPU"


def _has_backend(distributed: Any, name: str) -> bool:
    return bool(distributed.is_available() and getattr(distributed, f"is_{name}_available")())


def _devices(torch: Any) -> Iterator[Finding]:
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
        try:
            ones = torch.ones(8, 8, device=f"cuda:{number}")
            works = float((ones @ ones).sum()) == 512
        except Exception as error:
            yield Finding(f"cuda:{number}", "problem", f"{found}: {_first_line(error)}", "Look at nvidia-smi.")
        else:
            state: State = "ok" if works else "problem"
            yield Finding(f"cuda:{number}", state, found if works else f"{found}: it computes wrong results")
    if not torch.cuda.device_count():
        driver = shutil.which("nvidia-smi")
        if driver and torch.version.cuda:
            advice = "Run nvidia-smi; its driver may be older than this torch needs."
            yield Finding("cuda", "problem", "torch sees no GPU, though there is a driver", advice)
        elif driver:
            yield Finding("cuda", "problem", "there is a driver, but torch is built for the CPU",
                          "Install torch as pytorch.org says.")  # fmt: skip
        else:
            yield Finding("cuda", "missing", "no GPU")
    mps = getattr(torch.backends, "mps", None)
    if mps is not None and mps.is_available():
        yield Finding("mps", "ok", "available")


def _compilers() -> Iterator[Finding]:
    found = [name for name in ("g++", "clang++", "c++", "cl") if shutil.which(name)]
    advice = "" if found else "Install a C++ compiler: torch.compile needs one on the CPU."
    yield Finding("C++ compiler", "ok" if found else "missing", ", ".join(found) or "none on the PATH", advice)
    try:
        yield Finding("triton", "ok", importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        yield Finding("triton", "missing", "not installed; torch.compile needs it on a GPU")


def _disk() -> Iterator[Finding]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    advice = "" if free > 2**30 else "Make room, or choose another directory: RunDirectory('/another/disk/runs')."
    yield Finding("disk", "ok" if not advice else "problem", f"{free / 2**30:.1f} GiB free in {here}", advice)
    if not os.access(here, os.W_OK):
        yield Finding("writing", "problem", f"{here} cannot be written", "Choose another: RunDirectory('/a/path').")
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        advice = (
            "" if size >= 2**29 else "DataLoader workers may run out of it; in Docker: --ipc=host or --shm-size=8g."
        )
        yield Finding(
            "shared memory", "ok" if not advice else "problem", f"{size / 2**30:.1f} GiB in {shared}", advice
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
