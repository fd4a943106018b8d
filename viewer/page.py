"""The page of one run."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from .curves import axes_of, panels_of
from .html import curves_place, duration, page, pairs, preformatted, section, shown, table, text
from .plotly_script import seen_from
from .run import Row, Run

LOG_END = 20_000  # bytes of the log that are shown
MODEL_END = 200_000
ROWS = 200  # of a table; all of them are in the CSV file
CLASSES = 40  # with more, not the matrix is shown but what is confused most


def run_page(run: Run, plotly: Path | None) -> str:
    """Return the page of a run, as HTML.

    Args:
        run: the run, as its directory is now.
        plotly: where plotly's script is; None where it is not installed: then there are no curves.
    """
    axes = axes_of(run)
    drawn = [
        {"title": panel.title, "curves": [axes.as_json(curve) for curve in panel.curves]} for panel in panels_of(run)
    ]
    body = "\n".join([
        _head(run),
        section("Curves", curves_place() if drawn else ""),
        *(_matrix(one, run) for one in _matrices(run)),
        section("Epochs", _values(run.epochs, run, "history.csv")),
        section("Validations", _validations(run), is_open=False),
        section("Settings", pairs(run.settings)),
        section("Remarks", _remarks(run)),
        section("Interruptions", _interruptions(run)),
        section("Where the time went", _times(run), is_open=False),
        section("Handlers", preformatted(run.text("handlers.txt")), is_open=False),
        section("Model", preformatted(_model(run)), is_open=False),
        section("Environment", pairs(run.environment), is_open=False),
        section("End of the log", preformatted(run.text("log.log", LOG_END)), is_open=False),
    ])  # fmt: skip
    best = run.best_row
    curves = {"panels": drawn, "best": None if best is None else axes.place(best["step"])}
    return page(f"{run.name} · camshaft", body, curves, seen_from(run.path, plotly))


def _head(run: Run) -> str:
    status, git = run.status, run.environment.get("git") or {}
    best = run.best_row
    done = int(run.epochs[-1]["epoch"]) if run.epochs else 0
    step = int(run.moments[-1]["step"]) if run.moments else 0
    facts = [
        ("started", "" if run.started is None else f"{run.started:%Y-%m-%d %H:%M:%S}"),
        ("took", duration(run.seconds)),
        ("epochs", str(done)),
        ("steps", f"{step:,}"),
    ]
    if best is not None and run.watched is not None:
        value = f"{best[run.watched]:.6g} (epoch {int(best['epoch'])}, step {int(best['step']):,})"
        facts.append((f"best {run.watched}", value))
    if git.get("commit"):
        facts.append(("commit", f"{str(git['commit'])[:12]}{', files changed' if git.get('changed') else ''}"))
    listed = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts if value)
    return (
        f'<header><h1>{text(run.name)} <span class="status {status}">{status}</span></h1>\n'
        f'<p class="reason">{text(run.reason)}</p>\n<dl class="facts">{listed}</dl>{_traceback(run)}\n'
        f'<p class="note">As of {datetime.now():%Y-%m-%d %H:%M:%S}.</p></header>'
    )


def _traceback(run: Run) -> str:
    found = [str(one.get("traceback", "")) for one in run.moments if one["what"] == "failed"]
    if run.status != "failed" or not found:
        return ""
    return section("Traceback", preformatted(found[-1]), is_open=False)


def _values(rows: Sequence[Row], run: Run, file: str) -> str:
    """Return a table of rows of values; of very many, the first, the last, and the best."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    best = run.best_row
    is_best = [best is not None and _place(row) == _place(best) for row in rows]
    last, first = ROWS - ROWS // 10, ROWS // 10
    kept = [number for number in range(len(rows)) if number < first or number >= len(rows) - last or is_best[number]]
    cells = [[shown(rows[number].get(name)) for name in names] for number in kept]
    shown_rows = table(names, cells, best=[at for at, number in enumerate(kept) if is_best[number]], numbers=True)
    if len(kept) == len(rows):
        return shown_rows
    return f'{shown_rows}<p class="note">{len(kept)} of {len(rows):,} rows; all are in {text(file)}.</p>'


def _place(row: Row) -> tuple[float, float]:
    return row["epoch"], row["step"]


def _validations(run: Run) -> str:
    """Return a table of the validations; nothing where each is in the row of its epoch."""
    ends = {row["step"] for row in run.epochs}
    is_in_epochs = all(row["step"] in ends for row in run.validations)
    return "" if is_in_epochs else _values(run.validations, run, "validations.csv")


def _remarks(run: Run) -> str:
    """Return what handlers did to the run on the way."""
    rows = [(str(one["epoch"]), str(one["step"]), str(one["text"])) for one in run.remarks]
    return table(("epoch", "step", "what was done"), rows) if rows else ""


def _interruptions(run: Run) -> str:
    """Return when the run ended, and went on; nothing for a run that ran through."""
    moments = [one for one in run.moments if one["what"] not in ("epoch", "validation")]
    if not any(one["what"] == "resumed" for one in moments) and run.status in ("ended", "running"):
        return ""
    rows = [
        (
            f"{datetime.fromtimestamp(one['time']):%Y-%m-%d %H:%M:%S}",
            str(one["what"]),
            str(one["epoch"]),
            f"{one['step']:,}",
            str(one.get("error") or one.get("reason") or ""),
        )
        for one in moments
    ]
    return table(("when", "what", "epoch", "step", "why"), rows)


def _times(run: Run) -> str:
    """Return the table of a `Profile`."""
    rows = list(csv.reader(run.text("profile.csv").splitlines()))
    return table(rows[0], rows[1:31]) if rows else ""


def _model(run: Run) -> str:
    model = run.text("summary.txt") or run.text("model.txt")
    return model if len(model) <= MODEL_END else f"{model[:MODEL_END]}\n... (all of it is in model.txt)"


def _matrices(run: Run) -> list[dict[str, Any]]:
    found = run.matrices.get("matrices")
    return list(found.values()) if isinstance(found, dict) else []


def _matrix(one: dict[str, Any], run: Run) -> str:
    """Return a confusion matrix: the true class down, the predicted class across."""
    rows: list[list[float]] = one["values"]
    names = run.matrices.get("class_names")
    if not isinstance(names, list) or len(names) != len(rows):
        names = [str(number) for number in range(len(rows))]
    shares = [[value / max(sum(row), 1e-12) for value in row] for row in rows]
    if len(rows) > CLASSES:
        content = _confused(rows, shares, names)
    else:
        head = "".join(f"<th>{text(name)}</th>" for name in names)
        lines = [
            f"<tr><th>{text(names[at])}</th>"
            + "".join(
                f'<td style="--share:{share:.3f}"{" class=much" if share > 0.5 else ""} '
                f'title="{text(f"{names[at]} taken for {names[other]}: {share:.1%}")}">'
                f"{shown(value) if value else ''}</td>"
                for other, (value, share) in enumerate(zip(rows[at], shares[at], strict=True))
            )
            + "</tr>"
            for at in range(len(rows))
        ]
        content = (
            f'<div class="scroll"><table class="matrix"><thead><tr><th>true ↓ predicted →</th>{head}</tr></thead>'
            f"<tbody>{''.join(lines)}</tbody></table></div>"
        )
    return section(str(one.get("title", "confusion matrix")), content)


def _confused(rows: list[list[float]], shares: list[list[float]], names: list[str]) -> str:
    found = [
        (share, rows[at][other], names[at], names[other])
        for at, row in enumerate(shares)
        for other, share in enumerate(row)
        if at != other and share
    ]
    found.sort(key=lambda one: one[0], reverse=True)
    cells = [(true, other, shown(float(count)), f"{share:.1%}") for share, count, true, other in found[:40]]
    return table(("true class", "predicted", "number", "share of the true class"), cells)
