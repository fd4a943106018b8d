"""What a step costs: the empty step, everything on, and the peers."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measure import Prepare, Row, installed, interleave, micro, ratios, spread
from torch.utils.data import ConcatDataset, DataLoader
from workloads import Moved, batches, build_model, conv_net, digits_loader, everything_on, hand_loop

from camshaft.callbacks import Placement
from camshaft.engine import Engine, StepEnd, every

# Name of the package, and where it differs the name of the module.
PACKAGES = {
    "pytorch-ignite": "ignite", "lightning": "lightning", "accelerate": "accelerate", "torchkeras": "torchkeras",
    "keras": "keras", "fastai": "fastai", "poutyne": "poutyne", "torchtnt": "torchtnt", "skorch": "skorch",
}  # fmt: skip


def empty_step(*, rounds: int = 7) -> list[Row]:
    """(a) The loop's own cost, against ignite's and a bare loop."""
    from ignite.engine import Engine as IgniteEngine
    from ignite.engine import Events

    def ours(data: list[None], handlers: int, when: Any) -> Callable[[], object]:
        engine = Engine(lambda engine, batch: None)
        for _ in range(handlers):
            engine.subscribe(StepEnd, lambda event: None, when=when and every(when))
        return lambda: engine.fit(data, epochs=1)

    def ignites(data: list[None], handlers: int, when: Any) -> Callable[[], object]:
        engine = IgniteEngine(lambda engine, batch: None)
        event: Any = Events.ITERATION_COMPLETED(every=when) if when else Events.ITERATION_COMPLETED
        for _ in range(handlers):
            engine.add_event_handler(event, lambda engine: None)
        return lambda: engine.run(data, max_epochs=1)

    def bare(data: list[None]) -> Callable[[], object]:
        step = lambda engine, batch: None  # noqa: E731 - the same step as in the others

        def run() -> None:
            for batch in data:
                step(None, batch)

        return run

    rows = []
    # The number of steps is such that beginning and ending a run does not count.
    for handlers, when, target, num in ((0, None, 25, 100_000), (10, None, 5, 30_000), (50, None, None, 20_000),
                                        (10, 100, 60, 50_000)):  # fmt: skip
        what = ([None] * num, handlers, when)
        contestants: dict[str, Prepare] = {
            "ours": partial(ours, *what),
            "ignite": partial(ignites, *what),
            "bare": partial(bare, what[0]),
        }
        times = interleave(contestants, rounds)
        factors = ratios(times["ignite"].wall, times["ours"].wall)
        name = f"empty step, {handlers} handlers" + (f" on every({when})" if when else "")
        cost = ", ".join(f"{who} {micro(one.median(num))}" for who, one in times.items())
        factor = sorted(factors)[len(factors) // 2]
        goal = f"at most 1/{target} of ignite" if target else ""
        met = factor >= target if target else None
        rows.append(Row("a", name, cost, f"1/{spread(factors, 1)}", goal, met, 1 / factor))
    return rows


def against_hand_loop(
    section: str, what: str, steps: int, contestants: dict[str, Prepare], rounds: int, target: float | None = 1.05
) -> Row:
    times = interleave(contestants, rounds)
    walls = ratios(times["ours"].wall, times["hand"].wall)
    cpus = ratios(times["ours"].cpu, times["hand"].cpu)
    middle = sorted(walls)[len(walls) // 2]
    cost = f"ours {micro(times['ours'].median(steps))}, hand loop {micro(times['hand'].median(steps))} a step"
    said = f"{spread(walls)}; CPU time {spread(cpus)}"
    goal = f"at most {target}" if target else ""
    return Row(section, what, cost, said, goal, middle <= target if target else None, middle)


def everything(*, rounds: int = 9, steps: int = 2500) -> list[Row]:
    """(b), (c) A tiny model, everything on, against the loop written by hand."""
    from torchmetrics.classification import MulticlassAccuracy

    def metric() -> Any:
        return MulticlassAccuracy(4, average="micro", validate_args=False)

    rows = []
    for kind, name in (("list", "ready batches"), ("loader", "DataLoader")):
        train, val = batches(steps, kind=kind), batches(20, kind=kind)
        contestants: dict[str, Prepare] = {
            "hand": partial(hand_loop, train, val),
            "ours": partial(everything_on, train, val),
        }
        rows.append(against_hand_loop("b", f"everything on, {name}", steps, contestants, rounds))
    train, val = batches(steps), batches(20)
    contestants = {
        "hand": lambda: hand_loop(train, val, metric=metric()),
        "ours": lambda: everything_on(train, val, metric=metric()),
    }
    rows.append(against_hand_loop("c", "the same with torchmetrics, ready batches", steps, contestants, rounds))
    return rows


def peers() -> list[Row]:
    """(b) Each peer, in a process of its own, in turn with ours and the loop written by hand."""
    rows = []
    for package, module in PACKAGES.items():
        if find_spec(module) is None:
            rows.append(_skipped("b", f"{package}", "not installed"))
            continue
        command = [sys.executable, str(Path(__file__).with_name("run.py")), "--peer", module]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            rows.append(_skipped("b", package, (done.stderr.strip().splitlines() or ["no message"])[-1]))
            continue
        for kind, (cost, factors, wins) in json.loads(done.stdout.splitlines()[-1]).items():
            what = f"everything on, {kind}: {package} {installed(package)}"
            middle = sorted(factors["peer/hand"])[len(factors["peer/hand"]) // 2]
            said = f"{spread(factors['peer/hand'])} of the hand loop, {spread(factors['peer/ours'])} of ours"
            rows.append(Row("b", what, cost, said, "slower than ours", wins, middle))
    return rows


def one_peer(module: str, *, rounds: int = 3, steps: int = 800) -> None:
    """Time one peer, and print what came out as JSON."""
    torch.set_num_threads(1)
    caught, results = io.StringIO(), {}
    with contextlib.redirect_stdout(caught), contextlib.redirect_stderr(caught):
        from peers import PEERS

        for kind, name in (("list", "ready batches"), ("loader", "DataLoader")):
            train, val = batches(steps, kind=kind), batches(20, kind=kind)
            contestants: dict[str, Prepare] = {
                "hand": partial(hand_loop, train, val),
                "ours": partial(everything_on, train, val),
                "peer": partial(PEERS[module], train, val),
            }
            times = interleave(contestants, rounds, warmup=False)  # the median leaves out a slow first round
            factors = {f"peer/{other}": ratios(times["peer"].wall, times[other].wall) for other in ("hand", "ours")}
            cost = ", ".join(f"{one} {micro(times[one].median(steps))}" for one in ("peer", "ours", "hand"))
            results[name] = (cost + " a step", factors, sorted(factors["peer/ours"])[rounds // 2] > 1)
    print(json.dumps(results))


def digits(*, rounds: int = 5) -> list[Row]:
    """(d) A CNN on handwritten digits, read by two workers."""
    train, val = digits_loader()
    many: Any = ConcatDataset([train.dataset] * 8)
    train = DataLoader(many, batch_size=32, shuffle=True, num_workers=2, persistent_workers=True)
    times = interleave(
        {
            "ours": lambda: everything_on(train, val, model=conv_net()),
            "hand": lambda: hand_loop(train, val, model=conv_net()),
        },
        rounds,
    )
    factors = ratios(times["ours"].wall, times["hand"].wall)
    cost = ", ".join(f"{name} {len(many) / one.median():,.0f} samples/s" for name, one in times.items())
    return [Row("d", "CNN on digits, 2 workers", cost, spread(factors), number=sorted(factors)[rounds // 2])]


def accelerator(*, rounds: int = 7, steps: int = 4000) -> list[Row]:
    """(h) The same on a GPU."""
    if not torch.cuda.is_available():
        return [_skipped("h", "everything on, on a GPU", "no CUDA device")]
    train, val = ([(x.pin_memory(), y.pin_memory()) for x, y in batches(num)] for num in (steps, 20))
    contestants: dict[str, Prepare] = {
        "hand": lambda: hand_loop(Moved(train, "cuda"), Moved(val, "cuda"), model=build_model().cuda()),
        "ours": lambda: everything_on(train, val, more=[Placement("cuda")]),
    }
    return [against_hand_loop("h", "everything on, on a GPU", steps, contestants, rounds)]


def _skipped(section: str, what: str, reason: str) -> Row:
    return Row(section, what, f"skipped: {reason}")
