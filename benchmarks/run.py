"""Measures, and writes docs/performance.md and docs/performance.png.

``run.py`` does all of it; ``run.py a g`` only those sections, printed and not written.
"""

from __future__ import annotations

import sys
import time
from datetime import date
from pathlib import Path

import torch
from measure import Row, installed, machine

DOCS = Path(__file__).resolve().parent.parent / "docs"
PACKAGES = ("camshaft", "torch", "pytorch-ignite", "torchmetrics", "lightning", "accelerate", "torchkeras", "keras",
            "fastai", "poutyne", "torchtnt", "skorch")  # fmt: skip


def main(wanted: list[str]) -> None:
    torch.set_num_threads(1)  # the work is too small to share
    import rest
    import speed
    import together

    begin = time.monotonic()
    sections = {
        "a": [speed.empty_step], "b": [speed.everything, speed.peers], "d": [speed.digits], "e": [rest.imports],
        "f": [rest.memory], "g": [rest.saves, rest.resuming], "h": [speed.accelerator], "i": [together.two_ranks],
    }  # fmt: skip
    rows: list[Row] = []
    for section, parts in sections.items():
        for part in parts:
            if wanted and section not in wanted and part.__name__ not in wanted:
                continue
            for row in part():
                print(
                    f"({row.section}) {row.what}: {row.value}; {row.ratio}; {row.target} {_verdict(row)}".rstrip("; "),
                    flush=True,
                )
                rows.append(row)
    minutes = (time.monotonic() - begin) / 60
    print(f"{minutes:.1f} minutes")
    if not wanted:
        rows.sort(key=lambda row: row.section)
        (DOCS / "performance.md").write_text(page(rows, minutes))
        draw(rows)


def page(rows: list[Row], minutes: float) -> str:
    """Return the page that docs/ holds."""
    packages = ", ".join(f"{name} {installed(name)}" for name in PACKAGES if installed(name))
    python = ".".join(map(str, sys.version_info[:3]))
    head = f"""# Performance

Measured on {date.today().isoformat()} on a shared machine: {machine()}; one torch thread. Python {python}, {packages}.

To repeat: `make bench` ({minutes:.0f} minutes). The peers come with `pip install -e ".[bench]"`; those that are not
installed are skipped.

Contestants run in turn within one process (A B A B ...), so that what else the machine does falls on all of them.
Times are medians; a ratio is the median over the rounds of the quotient within a round, with the quartiles in
parentheses. "Everything on" is mean loss, accuracy, progress bar, history, early stopping, best checkpoint and a log
on disk, for an MLP 16-32-4 with batches of 32. The loop written by hand computes the same loss and accuracy, sums
them on the device and reads them once an epoch; it draws, logs and saves nothing. It calls `optimizer.zero_grad()`,
as people do, where ours sets the same gradients to None without the profiler's record around that: some 2 % of this
step, which is what pays for most of the handlers. A peer runs in a process of its own, in turn with the loop written
by hand and with ours.

Rows i are two ranks on this machine, started by torchrun, with gloo: an MLP 64-256-256-4 (83,460 parameters) and
batches of 64, 32 for each rank. The loop written by hand is one over `DistributedDataParallel` that adds up the loss
of both ranks once an epoch; with a `DataLoader` it has a `DistributedSampler`. Ours has `Distributed()` and no other
handler.

![Cost of a step](performance.png)

| | what | measured | ratio | target | met |
|---|---|---|---|---|---|
"""
    lines = [
        f"| {row.section} | {row.what} | {row.value} | {row.ratio} | {row.target} | {_verdict(row)} |" for row in rows
    ]
    return head + "\n".join(lines) + "\n"


def draw(rows: list[Row]) -> None:
    """Draw the empty step against ignite, and everything on against the loop written by hand."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.4])
    empty = [row for row in rows if row.section == "a" and row.number]
    bars = left.bar([row.what.removeprefix("empty step, ").replace(" on", "\non") for row in empty],
                    [1 / (row.number or 1) for row in empty], color="tab:blue")  # fmt: skip
    left.bar_label(bars, fmt="%.0f")
    left.set(title="Empty step: times cheaper than ignite")
    left.tick_params(axis="x", labelsize=8)
    for offset, kind, color in ((-0.2, "ready batches", "tab:blue"), (0.2, "DataLoader", "tab:orange")):
        found = [row for row in rows if row.what.startswith(f"everything on, {kind}") and row.number]
        names = [(row.what.partition(": ")[2] or "camshaft").split(" ")[0] for row in found]
        places = [position + offset for position in range(len(found))]
        bars = right.barh(places, [row.number or 0 for row in found], 0.4, label=kind, color=color)
        right.bar_label(bars, fmt="%.2f", fontsize=8)
        right.set_yticks(range(len(found)), names)
    right.margins(x=0.08)
    right.axvline(1, color="black", linewidth=0.8)
    right.invert_yaxis()
    right.legend()
    right.set(title="Everything on: time over the hand-written loop's")
    figure.savefig(DOCS / "performance.png", dpi=110)


def _verdict(row: Row) -> str:
    return "" if row.met is None else "yes" if row.met else "no"


if __name__ == "__main__":
    if "--peer" in sys.argv:
        from speed import one_peer

        one_peer(sys.argv[-1])
    else:
        main(sys.argv[1:])
