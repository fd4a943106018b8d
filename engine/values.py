"""Values by name: under the name of their stage, those that are single numbers, and as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def label(stage: str, dataset: str = "") -> str:
    """Return what the values of a stage's data set begin with.

    >>> label("val"), label("val", "clean")
    ('val', 'val_clean')
    """
    return f"{stage}_{dataset}" if dataset else stage


def prefixed(stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values under ``<stage>_<name>``.

    >>> prefixed("val", {"loss": 0.5})
    {'val_loss': 0.5}
    """
    return {f"{stage}_{name}": value for name, value in values.items()}


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Return those values that are single numbers: what a history and a log hold."""
    return {name: value for name, value in values.items() if isinstance(value, float)}


def format_values(values: Mapping[str, Any], names: Iterable[str] | None = None) -> str:
    """Return the scalars as one line for people.

    >>> format_values({"train_loss": 0.12345, "val_acc": 0.5})
    'train_loss 0.1235  val_acc 0.5000'
    """
    chosen = scalars(values) if names is None else {name: values[name] for name in names}
    return "  ".join(f"{_on_one_line(name)} {_short(value)}" for name, value in chosen.items())


def _on_one_line(name: str) -> str:
    """Return a name with what cannot be printed, such as a line break, written as in a Python string."""
    return name if name.isprintable() else repr(name)[1:-1]


def _short(value: float) -> str:
    """Four decimals, or four significant digits where those would say nothing."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"
