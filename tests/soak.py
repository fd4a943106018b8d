"""Kill runs at random moments, resume them, and compare with the run that was left alone.

    make soak                                # at least 100 kills, over 24 configurations that are drawn at random
    python tests/soak.py --kills 10

Each run is a forked child that trains some sixty steps with checkpoints; the parent kills it after a random time by
SIGKILL, SIGTERM or SIGINT, again and again, and then lets it get through. What it leaves (weights, optimizer,
averages, history, random numbers) must be bit-identical to that of the uninterrupted run. A child that is not killed
outright ends as a script does, with its exit code and all that the interpreter does when it exits; it must do so, and
the workers of its loaders with it, within ten seconds. Prints how many kills, resumes, runs, configurations and
mismatches there were; exits 1 if there is a mismatch.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from test_exactness import HANDLERS, KINDS, VALS, WORKERS, Attempt, Timeline, promise, result
from test_signals_everywhere import equal

from camshaft.engine.feed import Feed
from camshaft.engine.files import save

NUM_CONFIGURATIONS = 24
MOST_KILLS = 3  # of one run
EXIT_LIMIT = 10.0  # seconds in which a process must have ended
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STARTED, DONE, ENDED = b"s", b"d", b""
KEPT: list[Attempt] = []  # as the globals of a script: the interpreter still holds the loaders when it exits


# What is run -------------------------------------------------------------------------------------------------


def configurations(draw: random.Random) -> list[Timeline]:
    """Draw different ones, all of which are resumed exactly; each kind of data comes before any comes again."""
    kinds: list[str] = []
    found: list[Timeline] = []
    while len(found) < NUM_CONFIGURATIONS:
        kinds = kinds or draw.sample(sorted(KINDS), len(KINDS))
        drawn = configuration(draw, kinds[-1])
        if drawn not in found and is_exact(drawn):
            found.append(drawn)
            kinds.pop()
        elif not KINDS[kinds[-1]].holds:
            kinds.pop()
    return found


def configuration(draw: random.Random, kind: str) -> Timeline:
    """Draw the settings of a run over such data."""
    return Timeline(
        kind,
        seed=draw.choice([None, 0, 5]),
        workers=draw.choice(sorted(WORKERS)),
        script=draw.random() < 0.4,
        handlers=frozenset(draw.sample(sorted(HANDLERS), draw.randint(0, 4))) - {draw.choice(["stop", ""])},
        val=draw.choice(sorted(VALS)),
        epochs=draw.randint(13, 18),
        epoch_length=draw.randint(4, 7) if kind.startswith("repeated") else None,
        max_steps=draw.choice([None, 50]) if not kind.startswith("repeated") else 60,
        validate_every=draw.choice([None, "3 steps", "7 steps", 2]),
        every_steps=draw.choice([None, 1, 1, 2, 3]),
        background=draw.random() < 0.4,
    )


def is_exact(timeline: Timeline) -> bool:
    """Return whether a resumed run is to be bit-identical."""
    feed = Feed(timeline.seed)
    feed.open(KINDS[timeline.kind].make(WORKERS[timeline.workers]))
    return promise(feed.exactness(), KINDS[timeline.kind].holds) == "all"


def train(timeline: Timeline, directory: Path, told: int) -> int:
    """Run to the end, resuming if there is something to resume; return the exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background commands ignore it
    attempt = Attempt(timeline, 0, directory / "checkpoints")
    KEPT.append(attempt)
    os.write(told, STARTED)
    attempt.run(resumes=True)
    if attempt.engine.history.exit_code == 0:
        save(directory / "result.pt", result(attempt.engine))
        os.write(told, DONE)
    return attempt.engine.history.exit_code


# Children ----------------------------------------------------------------------------------------------------


class InChild(BaseException):
    """Raised in a forked child: it leaves all that the parent was doing, and ``work`` is its script."""

    def __init__(self, work: Callable[[], int]) -> None:
        super().__init__()
        self.work = work


@dataclass
class Child:
    """A process in a group of its own, and a pipe that it and its workers hold open as long as any of them lives."""

    process: int
    told: int

    def hear(self, seconds: float) -> bytes | None:
        """Return what the child tells next (ENDED when all have ended), or None if it is silent for so long."""
        ready, _, _ = select.select([self.told], [], [], max(seconds, 0))
        return os.read(self.told, 1) if ready else None

    def end(self, what: str) -> tuple[int, float]:
        """Wait for the end of the child and its workers; return its status, and how long that took."""
        began = time.monotonic()
        while (heard := self.hear(began + EXIT_LIMIT - time.monotonic())) != ENDED:
            if heard is None:
                os.killpg(self.process, signal.SIGKILL)
                raise SystemExit(f"{what}: the process or its workers had not ended after {EXIT_LIMIT:.0f} s")
        os.close(self.told)
        _, status = os.waitpid(self.process, 0)
        return status, time.monotonic() - began


def start(work: Callable[[int], int], errors: Path) -> Child:
    """Fork a child that does the work, which is given where to tell what it does; its stderr goes to a file."""
    hears, tells = os.pipe()
    process = os.fork()
    if process == 0:
        os.setsid()
        os.close(hears)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        raise InChild(partial(work, tells))
    os.close(tells)
    return Child(process, hears)


# Killing -----------------------------------------------------------------------------------------------------


@dataclass
class Soak:
    """The counts, and the directory for everything."""

    scratch: Path
    draw: random.Random
    kills: int = 0
    runs: int = 0
    children: int = 0
    exits: int = 0
    mismatches: int = 0
    slowest: float = 0.0
    tried: set[Timeline] = field(default_factory=set)

    def through(self, timeline: Timeline) -> tuple[dict[str, Any], float]:
        """Return what the uninterrupted run ends with, and how long it takes."""
        directory = self._directory("through")
        child = self._start(timeline, directory)
        began = time.monotonic()
        child.hear(120)
        seconds = time.monotonic() - began
        self._ended(child, None, timeline, directory)
        return load(directory), seconds

    def run(self, timeline: Timeline, seconds: float) -> dict[str, Any]:
        """Kill a run at random moments of its ``seconds``, then let it get through; return what it ends with."""
        directory = self._directory(f"run-{self.runs}")
        self.runs += 1
        self.tried.add(timeline)
        for _ in range(MOST_KILLS):
            child = self._start(timeline, directory)
            if child.hear(self.draw.uniform(0, seconds)) is None:
                self._kill(child, timeline, directory)
            else:
                self._ended(child, None, timeline, directory)
            if (directory / "result.pt").exists():
                return load(directory)
        child = self._start(timeline, directory)
        child.hear(120)
        self._ended(child, None, timeline, directory)
        return load(directory)

    def _directory(self, name: str) -> Path:
        directory = self.scratch / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        return directory

    def _start(self, timeline: Timeline, directory: Path) -> Child:
        self.children += 1
        child = start(partial(train, timeline, directory), directory / "stderr")
        if child.hear(60) != STARTED:
            raise SystemExit(f"{timeline} did not start: {(directory / 'stderr').read_text()}")
        return child

    def _kill(self, child: Child, timeline: Timeline, directory: Path) -> None:
        """Send a signal, SIGKILL to the workers, too, and the others to them or not; the child must end by it."""
        number = self.draw.choice(SIGNALS)
        send = os.killpg if number == signal.SIGKILL else self.draw.choice([os.kill, os.killpg])
        send(child.process, number)
        self.kills += 1
        self._ended(child, number, timeline, directory)

    def _ended(self, child: Child, number: signal.Signals | None, timeline: Timeline, directory: Path) -> None:
        status, seconds = child.end(str(timeline))
        self.slowest = max(self.slowest, seconds)
        self.exits += os.WIFEXITED(status)
        code = os.waitstatus_to_exitcode(status)
        # After the run, or while the process ends, a signal has its usual effect, or none any more.
        expected = {0} if number is None else {0, -number, 128 + number}
        if code not in expected:
            errors = (directory / "stderr").read_text()
            raise SystemExit(f"{timeline} ended with {code}, not with one of {expected}: {errors}")


def load(directory: Path) -> dict[str, Any]:
    """Load what a run ended with."""
    ended: dict[str, Any] = torch.load(directory / "result.pt", weights_only=True)
    return ended


def main(args: argparse.Namespace) -> int:
    """Soak until there were enough kills; return the number of mismatches."""
    torch.set_num_threads(1)  # a forked child must find no thread pool half there
    draw = random.Random(args.seed)
    soak = Soak(Path(tempfile.mkdtemp()), draw)
    Attempt(Timeline("list"), 0, soak.scratch / "first").run(resumes=False)  # loads what each child would have to load
    goals: dict[Timeline, tuple[dict[str, Any], float]] = {}
    for timeline in endless(configurations(draw)):
        if soak.kills >= args.kills:
            break
        if timeline not in goals:
            goals[timeline] = soak.through(timeline)
        goal, seconds = goals[timeline]
        ended = soak.run(timeline, seconds)
        if different := [name for name in goal if not equal(ended[name], goal[name])]:
            soak.mismatches += 1
            print(f"MISMATCH in {different}: {timeline}", flush=True)
        if soak.runs % 6 == 0:
            print(f"{soak.runs} runs, {soak.kills} kills, {soak.mismatches} mismatches", flush=True)
    shutil.rmtree(soak.scratch)
    print(f"{soak.exits} of {soak.children} children exited as a script does, the slowest in {soak.slowest:.1f} s")
    print(
        f"kills {soak.kills}, resumes {soak.kills}, runs {soak.runs}, configurations {len(soak.tried)}, "
        f"mismatches {soak.mismatches}"
    )
    return soak.mismatches


def endless(timelines: list[Timeline]) -> Iterator[Timeline]:
    """Yield them again and again."""
    while True:
        yield from timelines


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Kill runs and compare.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def script() -> int:
    """Soak; or in a child, do its work, when all that it has of its parent was left."""
    try:
        return main(get_args_parser().parse_args()) > 0
    except InChild as child:
        work = child.work
    return work()


if __name__ == "__main__":
    sys.exit(script())
