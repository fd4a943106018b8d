"""The curves of a run, as its page draws them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from .run import Row, Run
from .thinning import Point, thinned

RATES = {"steps_per_second": "steps per second", "samples_per_second": "samples per second"}
_PLACES = ("epoch", "step")


@dataclass
class Curve:
    """One line: what it is called, and its points, over steps."""

    name: str
    points: list[Point]
    best: Point | None = None
    is_fine: bool = False  # of single steps, to be drawn behind the others


@dataclass
class Panel:
    """The curves that are drawn over one another."""

    title: str
    curves: list[Curve] = field(default_factory=list)


def panels_of(run: Run) -> list[Panel]:
    """Return what is drawn of a run: a panel for each value, then the learning rates and the speed."""
    panels: dict[str, Panel] = {}
    for name in _names([*run.epochs, *run.validations]):
        title, curve = _place(name, run.validation_sets)
        best = run.best(name) if name.startswith("val_") or name == run.watched else None
        panels.setdefault(title, Panel(title)).curves.append(
            Curve(curve, thinned(_points(name, run)), None if best is None else (best["step"], best[name]))
        )
    for panel in panels.values():
        panel.curves.sort(key=lambda curve: curve.name)  # "training" before "validation"
    steps = _columns(run.steps())
    for name, points in steps.items():
        title = _title_of_step(name, panels)
        fine = title == name
        panels.setdefault(title, Panel(title)).curves.append(
            Curve("training, by steps" if fine else name, thinned(points), is_fine=fine)
        )
    if not any(name.startswith("lr") for name in steps):
        panels |= {"learning rate": Panel("learning rate", list(_rates(run)))}
    if not steps.keys() & RATES.keys():
        panels |= {"steps per second": Panel("steps per second", [Curve("training", thinned(_speeds(run)))])}
    return [panel for panel in panels.values() if any(curve.points for curve in panel.curves)]


@dataclass(frozen=True)
class Axes:
    """The epoch and the time that belong to a step."""

    epochs: Sequence[tuple[float, float]]  # step, epoch
    seconds: Sequence[tuple[float, float]]  # step, seconds of running

    def as_json(self, curve: Curve) -> dict[str, Any]:
        """Return a curve with its points on each of the three axes."""
        return {
            "name": curve.name,
            "fine": curve.is_fine,
            "step": [x for x, _ in curve.points],
            "epoch": [_at(x, self.epochs) for x, _ in curve.points],
            "seconds": [_at(x, self.seconds) for x, _ in curve.points],
            "value": [y if math.isfinite(y) else None for _, y in curve.points],
            "best": None if curve.best is None else {**self.place(curve.best[0]), "value": curve.best[1]},
        }

    def place(self, step: float) -> dict[str, float | None]:
        """Return a step's place on each of the axes."""
        return {"step": step, "epoch": _at(step, self.epochs), "seconds": _at(step, self.seconds)}


def axes_of(run: Run) -> Axes:
    """Return what places a run's steps on the other axes."""
    return Axes(
        [(0.0, 0.0), *((row["step"], row["epoch"]) for row in run.epochs)],
        [(float(step), seconds) for step, seconds in run.clock],
    )


def _at(x: float, knots: Sequence[tuple[float, float]]) -> float | None:
    """Return the value at x between the knots, or beyond them in the direction of the two nearest.

    >>> _at(15, [(0, 0), (10, 1), (20, 2)]), _at(30, [(0, 0), (10, 1), (20, 2)]), _at(3, [])
    (1.5, 3.0, None)
    """
    if len(knots) < 2:
        return knots[0][1] if knots else None
    place = min(max(bisect_left(knots, x, key=lambda knot: knot[0]), 1), len(knots) - 1)
    (x0, y0), (x1, y1) = knots[place - 1], knots[place]
    return round(y0 + (y1 - y0) * (x - x0) / (x1 - x0), 6) if x1 > x0 else y1


def _names(rows: Iterable[Row]) -> list[str]:
    """Return the names of the values, those of the training first."""
    names = dict.fromkeys(name for row in rows for name in row if name not in _PLACES)
    return sorted(names, key=lambda name: not name.startswith("train_"))


def _place(name: str, sets: Sequence[str]) -> tuple[str, str]:
    """Return the panel and the curve of a value.

    >>> _place("train_loss", [""]), _place("val_clean_loss", ["clean"]), _place("loss_spikes", [])
    (('loss', 'training'), ('loss', 'validation, clean'), ('loss_spikes', 'loss_spikes'))
    """
    stage, _, short = name.partition("_")
    if stage == "train":
        return short, "training"
    if stage != "val":
        return name, name
    for one in sorted(sets, key=len, reverse=True):
        if one and short.startswith(f"{one}_"):
            return short[len(one) + 1 :], f"validation, {one}"
    return short, "validation"


def _points(name: str, run: Run) -> list[Point]:
    """Return the points of a value: of a training value in mid-epoch, too, where validations have one."""
    if name.startswith("val_"):
        rows = run.validations
    else:
        between = [] if run.validations is run.epochs else [row for row in run.validations if name in row]
        drawn = {row["epoch"] for row in between}
        rows = [*between, *(row for row in run.epochs if row["epoch"] not in drawn)]
        rows.sort(key=lambda row: row["step"])
    return [(row["step"], row[name]) for row in rows if name in row]


def _columns(rows: Iterable[Row]) -> dict[str, list[Point]]:
    columns: dict[str, list[Point]] = {}
    for row in rows:
        step = row["step"]
        for name, value in row.items():
            if name not in _PLACES:
                columns.setdefault(name, []).append((step, value))
    return columns


def _title_of_step(name: str, panels: Mapping[str, Panel]) -> str:
    """Return the panel of a value that a `Log` announces."""
    if name in panels:
        return name
    if name in RATES:
        return RATES[name]
    if name == "lr" or name.startswith("lr_"):
        return "learning rate"
    if name.startswith("grad_norm"):
        return "gradient norm"
    return "update ratio" if name.startswith("update_ratio") else name


def _rates(run: Run) -> Iterable[Curve]:
    """Return the learning rates at the end of each epoch."""
    rates: dict[str, list[Point]] = {}
    for moment in run.moments:
        for name, rate in (moment.get("rates") or {}).items():
            rates.setdefault(str(name), []).append((moment["step"], rate))
    return [Curve(name, thinned(_last_of_each_step(points))) for name, points in rates.items()]


def _last_of_each_step(points: Iterable[Point]) -> list[Point]:
    """Return the points without those that a resumed run made again."""
    kept: list[Point] = []
    for point in points:
        while kept and kept[-1][0] >= point[0]:
            kept.pop()
        kept.append(point)
    return kept


def _speeds(run: Run) -> list[Point]:
    """Return how many steps an epoch made in a second, validation and all."""
    clock = run.clock
    return [
        (step, (step - before) / (seconds - earlier))
        for (before, earlier), (step, seconds) in pairwise(clock)
        if seconds > earlier
    ]
