"""Kill runs at random moments by SIGKILL, resume them, and compare with the run that was left alone.

    make soak                                # at least 100 kills over three configurations
    python tests/soak.py --kills 10

Each run is a forked child that trains two epochs with a checkpoint after every step or two; the parent kills it after
a random time, again and again, until it gets through. What it leaves (weights, optimizer, averages, history) must be
bit-identical to the uninterrupted run's. Prints kills, resumes and mismatches; exits 1 if there is a mismatch.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from camshaft.callbacks import (
    Accumulate,
    EarlyStopping,
    MixedPrecision,
    RunCheckpoint,
    Schedule,
    WeightAverage,
    warmup_cosine,
)
from camshaft.engine import Callback, Engine, Trainer
from camshaft.engine.files import save
from camshaft.engine.rng import seed_everything


class Samples(Dataset[Any]):
    """120 samples, read with random augmentation or without."""

    def __init__(self, *, augmented: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(120, 16, generator=generator)
        self.target = torch.randint(0, 3, (120,), generator=generator)
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.rand(16) + random.random() + float(np.random.rand()) if self.augmented else 0.0
        return self.inputs[index] + 0.1 * noise, self.target[index]


def configuration(name: str, directory: Path | None) -> tuple[Engine, DataLoader[Any], DataLoader[Any]]:
    """Return a fresh trainer with its data: "plain", "seeded" (2 workers, augmentation) or "full"."""
    seed_everything(5)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    callbacks: list[Callback] = [EarlyStopping("val_loss", patience=90)]
    if name == "full":
        callbacks += [
            Accumulate(batches=3),
            MixedPrecision("bf16"),
            WeightAverage(decay=0.9),
            Schedule(warmup_cosine(optimizer, warmup=3, total=20), per="update"),
        ]
    if directory is not None:
        callbacks.append(RunCheckpoint(directory, every_steps=2 if name == "full" else 1, background=name == "plain"))
    trainer = Trainer(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        metrics={"acc": lambda output, target: (output.argmax(1) == target).float().mean()},
        callbacks=callbacks,
        seed=9 if name == "seeded" else None,
    )
    samples = Samples(augmented=name != "full")
    train = DataLoader(samples, batch_size=4, shuffle=True, num_workers=2 if name == "seeded" else 0)
    return trainer, train, DataLoader(Samples(augmented=False), batch_size=8)


def train(name: str, directory: Path | None) -> dict[str, Any]:
    """Run to the end, resuming if there is something to resume, and return all that must be equal."""
    trainer, data, val = configuration(name, directory)
    trainer.fit(data, val, epochs=2, validate_every="5 steps", resume="auto" if directory else None)
    return {
        "parts": {part: value.state_dict() for part, value in trainer.parts.items() if hasattr(value, "state_dict")},
        "rows": trainer.history.rows,
        "validations": trainer.history.validations,
        "counters": [trainer.step, trainer.num_updates, trainer.num_validations],
        "best": trainer.callbacks[0].state_dict(),
    }


def equal(ours: Any, theirs: Any) -> bool:
    """Return whether two nests of plain values and tensors are the same to the bit."""
    if isinstance(ours, Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return bool(ours == theirs)


def in_child(work: Callable[[], object]) -> int:
    """Fork, do the work in the child, silently, in a process group of its own; return its process id."""
    child = os.fork()
    if child == 0:
        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 2)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def run_once(name: str, scratch: Path, seconds: float, draw: random.Random) -> tuple[int, dict[str, Any]]:
    """Kill a run at random moments until it gets through; return the number of kills and what it ends with."""
    result = scratch / "result.pt"
    kills = 0
    while not result.exists():
        child = in_child(lambda: save(result, train(name, scratch / "checkpoints")))
        # The first three tries are cut; the last one may run for as long as it needs.
        deadline = time.monotonic() + (draw.uniform(0.02, seconds) if kills < 3 else 600)
        while (finished := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.002)
        if finished == (0, 0):
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
        elif finished[1] != 0:
            raise SystemExit(f"a child of {name} failed with status {finished[1]} in {scratch}")
    return kills, torch.load(result, weights_only=True)


def main(args: argparse.Namespace) -> int:
    """Soak until there were enough kills; return the number of mismatches."""
    torch.set_num_threads(1)  # a forked child must find no thread pool half there
    draw = random.Random(args.seed)
    kills = resumes = mismatches = runs = 0
    names = ("plain", "seeded", "full")
    through: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            began = time.monotonic()
            through[name] = run_once_through(name, Path(scratch) / f"{name}-through")
            seconds[name] = time.monotonic() - began
        while kills < args.kills:
            name = names[runs % 3]
            directory = Path(scratch) / f"{name}-{runs}"
            directory.mkdir()
            cut, ended = run_once(name, directory, seconds[name], draw)
            kills, resumes, runs = kills + cut, resumes + cut, runs + 1
            if not equal(ended, through[name]):
                mismatches += 1
                print(f"MISMATCH: {name}, run {runs}", flush=True)
            if runs % 6 == 0:
                print(f"{runs} runs, {kills} kills, {mismatches} mismatches", flush=True)
    print(f"kills {kills}, resumes {resumes}, runs {runs}, mismatches {mismatches}")
    return mismatches


def run_once_through(name: str, scratch: Path) -> dict[str, Any]:
    """Return what the uninterrupted run ends with, in a child like the others."""
    scratch.mkdir()
    child = in_child(lambda: save(scratch / "result.pt", train(name, None)))
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"the uninterrupted run of {name} failed")
    result: dict[str, Any] = torch.load(scratch / "result.pt", weights_only=True)
    return result


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of every setting."""
    parser = argparse.ArgumentParser(description="Kill runs and compare.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main(get_args_parser().parse_args()) > 0)
