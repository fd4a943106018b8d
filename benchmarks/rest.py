"""Importing, memory, and run checkpoints."""

from __future__ import annotations

import gc
import logging
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from measure import Row, ratios, resident, spread
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from workloads import batches, build_model, build_optimizer, new_folder

from camshaft.callbacks import RunCheckpoint
from camshaft.engine import Engine, Settled, StepEnd, Trainer, at

MB = 2**20


def imports(*, rounds: int = 5) -> list[Row]:
    """(e) Import time, in fresh processes."""
    code = "import time; begin = time.perf_counter(); import {}; print(time.perf_counter() - begin)"
    plain, ours = "torch", "torch, camshaft.engine, camshaft.callbacks"

    def seconds(modules: str) -> float:
        command = [sys.executable, "-c", code.format(modules)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    seconds(ours)
    pairs = [(seconds(ours), seconds(plain)) for _ in range(rounds)]
    mine, theirs = [list(one) for one in zip(*pairs, strict=True)]
    factors = ratios(mine, theirs)
    middle = statistics.median(factors)
    cost = f"ours {statistics.median(mine):.2f} s, torch alone {statistics.median(theirs):.2f} s"
    return [Row("e", "import", cost, spread(factors), "at most 1.10", middle <= 1.10, middle)]


def memory(*, first: int = 10_000, last: int = 100_000) -> list[Row]:
    """(f) Resident memory of a plain run, looked at twice."""
    model, seen = build_model(), {}
    data = batches(1000)
    trainer = Trainer(model, build_optimizer(model), nn.CrossEntropyLoss())

    def look(event: StepEnd) -> None:
        gc.collect()
        seen[event.engine.step] = resident()

    marks = (first, (first + last) // 2, last)
    for step in marks:
        trainer.subscribe(StepEnd, look, when=at(step))
    trainer.fit(data, max_steps=last)
    growth = seen[last] - seen[first]
    if not resident():
        return [Row("f", "resident memory", "skipped: this system does not tell")]
    cost = ", ".join(f"{seen[step] / MB:.1f} MiB at step {step:,}" for step in marks)
    return [Row("f", "resident memory", cost, f"{growth / MB:+.2f} MiB", "no more than 1 MiB", growth <= MB)]


def saves(*, num: int = 6, megabytes: int = 200) -> list[Row]:
    """(g) How long a save keeps the training waiting, in the background and otherwise."""

    def blocked(*, background: bool, pause: float) -> list[float]:
        model = nn.Module()
        model.register_buffer("weights", torch.rand(megabytes * 1_000_000 // 4))
        began: list[float] = []
        times: list[float] = []
        engine = Engine(lambda engine, batch: time.sleep(pause), model=model)
        engine.subscribe(Settled, lambda event: began.append(time.perf_counter()))
        engine.attach(RunCheckpoint(new_folder(), every_steps=1, keep=1, background=background))
        engine.subscribe(Settled, lambda event: times.append(time.perf_counter() - began[-1]))
        engine.fit([None] * num, epochs=1)
        return times[1:num]  # from the second save on

    plain = blocked(background=False, pause=0)
    # As in training, the steps between two saves take longer than a write.
    behind = blocked(background=True, pause=2 * max(plain))
    factor = statistics.median(behind) / statistics.median(plain)
    cost = f"background {statistics.median(behind) * 1e3:.0f} ms, synchronous {statistics.median(plain) * 1e3:.0f} ms"
    what = f"training blocked by a save of {megabytes} MB"
    return [Row("g", what, cost, f"{factor:.2f}", "at most 0.25", factor <= 0.25, factor)]


def resuming(*, near: int = 20, far: int = 20_000, rounds: int = 9) -> list[Row]:
    """(g) Time until the first step of a run resumed after few batches, and after many."""
    logging.getLogger("camshaft").setLevel(logging.ERROR)
    loader = DataLoader(TensorDataset(torch.arange(4.0 * (far + 100))), batch_size=4, shuffle=True)
    folder = new_folder()

    class FirstStepError(Exception):
        pass

    def step(engine: Engine, batch: Any) -> None:
        if engine.run.is_resuming:
            raise FirstStepError

    def engine(**kwargs: Any) -> Engine:
        model = build_model()
        return Engine(step, seed=1, model=model, optimizer=build_optimizer(model), **kwargs)

    files = {}
    for steps in (near, far):
        checkpoint = RunCheckpoint(folder / str(steps), every_steps=far)
        engine(callbacks=[checkpoint]).fit(loader, max_steps=steps)
        files[steps] = next(iter(checkpoint.checkpoints.files())).path

    def seconds(steps: int) -> float:
        resumed = engine()
        begin = time.perf_counter()
        try:
            resumed.fit(loader, max_steps=far + 50, resume=files[steps])
        except FirstStepError:
            return time.perf_counter() - begin
        raise AssertionError("the resumed run made no step")

    seconds(far)
    pairs = [(seconds(far), seconds(near)) for _ in range(rounds)]
    mine, theirs = [list(one) for one in zip(*pairs, strict=True)]
    factors = ratios(mine, theirs)
    middle = statistics.median(factors)
    cost = (
        f"after {far:,} batches {statistics.median(mine) * 1e3:.1f} ms, "
        f"after {near} {statistics.median(theirs) * 1e3:.1f} ms"
    )
    return [Row("g", "resuming in mid-epoch", cost, spread(factors), "at most 1.5", middle <= 1.5, middle)]
