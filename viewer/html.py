"""The pieces that pages are made of. Whatever comes from a run is shown as text."""

from __future__ import annotations

import html
import importlib.resources
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from string import Template
from typing import Any

_CONTROLS = """<form class="controls" id="controls" autocomplete="off">
<label>over <select id="axis"><option value="step">steps</option><option value="epoch">epochs</option>
<option value="seconds">time</option></select></label>
<label>smoothing <input id="smoothing" type="range" min="0" max="0.98" step="0.02" value="0"></label>
<label><input id="logarithmic" type="checkbox"> logarithmic</label>
</form>
<p class="note" id="no-plotly" hidden>The curves need plotly, whose script belongs beside the runs. \
Write: pip install "camshaft[report]", and train or compare again.</p>
<div class="panels" id="panels"></div>"""


def page(title: str, body: str, curves: Mapping[str, Any], plotly: str) -> str:
    """Return a page.

    Args:
        title: of the window.
        body: its content, in which `curves_place` is where the curves go.
        curves: what ``page.js`` draws: ``panels``, and the ``best`` place, which is marked in each.
        plotly: where plotly's script is, seen from the page.
    """
    folder = importlib.resources.files(__package__)
    # In a script element, only "<" could end it.
    data = json.dumps(curves, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return Template((folder / "page.html").read_text(encoding="utf-8")).substitute(
        title=text(title),
        style=(folder / "page.css").read_text(encoding="utf-8"),
        body=body,
        data=f'<script type="application/json" id="data">{data}</script>',
        plotly=text(plotly),
        script=(folder / "page.js").read_text(encoding="utf-8"),
    )


def curves_place() -> str:
    """Return the place of the curves."""
    return _CONTROLS


def text(value: object) -> str:
    """Return a value as text of a page."""
    return html.escape(str(value))


def section(title: str, content: str, *, is_open: bool = True) -> str:
    """Return a part of a page that can be folded; nothing where there is no content."""
    if not content:
        return ""
    return f"<details{' open' if is_open else ''}><summary>{text(title)}</summary>\n{content}\n</details>"


def preformatted(content: str) -> str:
    """Return text with its line breaks."""
    return f"<pre>{text(content)}</pre>" if content.strip() else ""


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, best: Iterable[int] = (), numbers: bool = False
) -> str:
    """Return a table.

    Args:
        columns: their heads.
        rows: their cells.
        best: the numbers of the rows that are marked as best.
        numbers: whether the cells are numbers, which are not broken into lines.
    """
    marked = set(best)
    lines = [
        f"<tr{' class=best' if number in marked else ''}>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>"
        for number, row in enumerate(rows)
    ]
    head = "".join(f"<th>{text(name)}</th>" for name in columns)
    if not lines:
        return ""
    opened = f'<div class="scroll"><table{" class=numbers" if numbers else ""}>'
    return f"{opened}<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def pairs(values: Mapping[str, Any]) -> str:
    """Return names and values, those within others under ``outer.inner``."""
    return table(("name", "value"), [(name, shown(value)) for name, value in flat(values)])


def flat(values: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """Return the values of a nested dict by their full names.

    >>> flat({"lr": 0.1, "model": {"width": 64}})
    [('lr', 0.1), ('model.width', 64)]
    """
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        full = f"{above}{name}"
        found += flat(value, f"{full}.") if isinstance(value, Mapping) and value else [(full, value)]
    return found


def shown(value: object) -> str:
    """Return a value as people read it: numbers with six digits at most.

    >>> shown(0.123456789), shown(3.0), shown([1, 2]), shown(None), shown("a")
    ('0.123457', '3', '[1, 2]', '', 'a')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def duration(seconds: float) -> str:
    """Return a length of time in its two largest units.

    >>> duration(5.25), duration(75), duration(7265), duration(200_000)
    ('5.2 s', '1 min 15 s', '2 h 1 min', '2 d 7 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if minutes < 60:
        return f"{minutes} min {int(seconds % 60)} s"
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
