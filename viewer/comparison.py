"""The page of several runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .curves import axes_of, panels_of
from .html import curves_place, duration, flat, page, section, shown, table
from .plotly_script import seen_from
from .run import Run


def comparison_page(runs: Sequence[Run], directory: Path, plotly: Path | None) -> str:
    """Return a page with the curves of several runs over one another, and what is different about the runs first.

    Args:
        runs: at least one.
        directory: where the page will be.
        plotly: where plotly's script is; None where it is not installed: then there are no curves.
    """
    names = short_names(runs)
    environments = table(*differing([run.environment for run in runs], names))
    body = "\n".join([
        f"<header><h1>{len(runs)} runs</h1></header>",
        section("Settings that differ", table(*differing([run.settings for run in runs], names))),
        section("What they reached", _reached(runs, names)),
        section("Curves", curves_place()),
        section("Environments that differ", environments, is_open=False),
    ])  # fmt: skip
    title = f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''} · camshaft"
    return page(title, body, {"panels": _panels(runs, names), "best": None}, seen_from(directory, plotly))


def short_names(runs: Sequence[Run]) -> list[str]:
    """Return the runs' names; those of runs that have the same with as much of the path as tells them apart."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    paths = [str(run.path.resolve()) for run in runs]
    common = len(os.path.commonpath(paths)) + 1 if len(set(paths)) > 1 else 0
    return [path[common:] for path in paths]


def _reached(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows = []
    for run, name in zip(runs, names, strict=True):
        best, watched = run.best_row, run.watched
        rows.append((
            name, run.status, duration(run.seconds), str(len(run.epochs)),
            "" if best is None or watched is None else f"{watched} {best[watched]:.6g} (epoch {int(best['epoch'])})",
            str((run.environment.get("git") or {}).get("commit") or "")[:12],
        ))  # fmt: skip
    heads = ("run", "status", "took", "epochs", "best", "commit")
    kept = [number for number in range(len(heads)) if any(row[number] for row in rows)]
    return table([heads[at] for at in kept], [[row[at] for at in kept] for row in rows], numbers=True)


def differing(values: Sequence[dict[str, Any]], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return a table of the values that are not the same everywhere, a row for each."""
    known = [dict(flat(one)) for one in values]
    keys = list(dict.fromkeys(key for one in known for key in one))
    rows = [[key, *(shown(one.get(key)) for one in known)] for key in keys]
    return ["name", *names], [row for row in rows if len(set(row[1:])) > 1]


def _panels(runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a panel for each value and kind of curve, with a curve for each run."""
    together: dict[str, list[dict[str, Any]]] = {}
    for run, name in zip(runs, names, strict=True):
        axes = axes_of(run)
        for panel in panels_of(run):
            for curve in panel.curves:
                title = panel.title if curve.name == panel.title else f"{panel.title}, {curve.name}"
                together.setdefault(title, []).append({**axes.as_json(curve), "name": name, "fine": False})
    return [{"title": title, "curves": found} for title, found in together.items()]
