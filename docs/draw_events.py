"""Draws the events of a run, in the order in which they really fire, as ``docs/events.svg``."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import nn

from camshaft.callbacks import Log
from camshaft.engine import Event, Trainer
from camshaft.engine.events import known_events

PICTURE = Path(__file__).with_name("events.svg")
# What is done again and again: the events with which it begins and ends, each counted from 0 among those of its name.
LOOPS = (
    ("for each epoch", ("EpochStart", 0), ("Settled", 1)),
    ("for each batch", ("BatchReady", 0), ("Settled", 0)),
    ("validation", ("ValidationStart", 0), ("ValidationEnd", 0)),
    ("for each batch", ("BatchReady", 1), ("ValidationStepEnd", 0)),
)
WORK = {  # what is done just before an event
    "BatchReady": "read a batch", "LossReady": "forward, loss", "GradientsReady": "backward",
    "UpdateEnd": "optimizer step", "ValidationStepEnd": "forward", "Settled": "save, stop, if asked for",
}  # fmt: skip


def fired() -> list[str]:
    """Return the events of a run of one epoch, one step and one validation, as they fire."""
    model = nn.Linear(1, 1)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), callbacks=[Log(every=1)])
    names: list[str] = []

    def note(event: Event) -> None:
        names.append(type(event).__name__)

    for kind in known_events().values():
        if kind.__module__ == "camshaft.engine.events":
            trainer.subscribe(kind, note)
    batch = torch.zeros(2, 1), torch.zeros(2, 1)
    trainer.fit([batch], [batch], epochs=1)
    return names


def draw(names: list[str]) -> Figure:
    """Draw the events from top to bottom, with a box around each loop."""
    height, width = 0.36 * len(names) + 0.5, 7.2
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    places = [0.45 + 0.36 * number for number in range(len(names))]

    def place(name: str, count: int) -> int:
        return [number for number, other in enumerate(names) if other == name][count]

    boxes = [(loop, place(*begin), place(*end)) for loop, begin, end in LOOPS]
    for loop, first, last in boxes:
        depth = sum(outer < first and last <= end for _, outer, end in boxes)
        left = 0.2 + 0.35 * depth
        axes.add_patch(
            FancyBboxPatch(
                (left, places[first] - 0.17), width - 2 * left, places[last] - places[first] + 0.3,
                boxstyle="round,pad=0.0,rounding_size=0.08", facecolor=f"C{depth}", alpha=0.12, edgecolor="none",
            )
        )  # fmt: skip
        axes.text(width - left - 0.12, places[first] + 0.04, loop, ha="right", va="center", fontsize=9, color="0.35")
    for number, name in enumerate(names):
        depth = sum(first <= number <= last for _, first, last in boxes)
        x = 0.35 + 0.35 * depth
        axes.text(x, places[number], name, va="center", fontsize=11, family="monospace", weight="bold")
        if work := WORK.get(name):
            words = work if name == "Settled" else f"after: {work}"
            axes.text(3.25, places[number], words, va="center", fontsize=9, color="0.4")
    return figure


def main() -> None:
    """Write the picture."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "camshaft"}):
        figure = draw(fired())
        FigureCanvasSVG(figure)
        figure.savefig(PICTURE, metadata={"Date": None})
    print(f"Wrote {PICTURE}.")


if __name__ == "__main__":
    main()
