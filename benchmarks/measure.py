"""How a benchmark measures: contestants in turn, round after round, and what is told of their times."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

Prepare = Callable[[], Callable[[], object]]  # builds everything untimed, and returns what is timed


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    section: str
    what: str
    value: str  # in words, such as "0.21 us"
    ratio: str = ""
    target: str = ""
    met: bool | None = None
    number: float | None = None  # the ratio, for the plot


@dataclass(frozen=True, slots=True)
class Times:
    """What one contestant took: a wall-clock and a CPU time for each round, in seconds."""

    wall: list[float]
    cpu: list[float]

    def median(self, units: int = 1) -> float:
        return statistics.median(self.wall) / units


def interleave(contestants: Mapping[str, Prepare], rounds: int, *, warmup: bool = True) -> dict[str, Times]:
    """Time each contestant once a round: A B A B ..., in turned order every other round."""
    times = {name: Times([], []) for name in contestants}
    for number in range(-warmup, rounds):
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            run = contestants[name]()
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if number >= 0:
                times[name].wall.append(wall)
                times[name].cpu.append(cpu)
    return times


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def spread(values: list[float], digits: int = 2) -> str:
    """Return the median and the quartiles, in words."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def micro(seconds: float) -> str:
    return f"{seconds * 1e6:.2f} us" if seconds < 1e-5 else f"{seconds * 1e6:.0f} us"


def resident() -> int:
    """Return the bytes of this process that are in memory; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> str:
    """Return the machine in words, without its name."""
    model = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{model}, {os.cpu_count()} logical cores{gpu}, {platform.system()}"
