"""What a run has reached: one row per epoch, one column per value."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from .errors import ConfigurationError, did_you_mean
from .optional import import_optional
from .table import Table, unpack
from .values import label

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


STAGES = {"train": "training", "val": "validation"}  # as people say


def values_of(row: Mapping[str, float]) -> dict[str, float]:
    """Return the values of a row, without its epoch and its step."""
    return {name: value for name, value in row.items() if name not in ("epoch", "step")}


class History(Mapping[str, list[float]]):
    """The values of a run, by column: ``history["val_acc"]`` is a list with one plain float per epoch.

    Columns are ``epoch``, ``step`` and every recorded value under its stage's name. An epoch without a
    validation has NaN in the ``val_*`` columns; one with several has the last. All of them, each with its
    step, are in ``validations``; one in mid-epoch has the averages of the training steps, too, since the
    one before it or the epoch's start, whichever is later.
    ``reason`` says why the run ended; ``validation_sets`` has the names of validation sets, whose values are
    ``val_clean_loss`` and the like. ``remarks`` says what handlers did to the run on the way, such as a rollback:
    ``{"epoch": 2, "step": 137, "text": "..."}``.

    >>> history = History()
    >>> history.add_epoch(1, 12, {"train_loss": 0.5})
    >>> history["train_loss"]
    [0.5]
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.validations: list[dict[str, float]] = []
        self.validation_sets: list[str] = []
        self.remarks: list[dict[str, Any]] = []
        self._tables = Table(), Table()
        self.reason = ""
        self.interrupted: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """What a command should exit with: 0, or 128 + the signal that interrupted the run (143, 130 ...)."""
        return 128 + self.interrupted if self.interrupted else 0

    def add_epoch(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Append a row."""
        self.rows.append({"epoch": epoch, "step": step, **values})

    def add_validation(self, epoch: int, step: int, values: Mapping[str, float], sets: Iterable[str] = ()) -> None:
        """Append the values of one validation; ``sets`` are the names of the data sets that have one."""
        self.validation_sets += [name for name in sets if name and name not in self.validation_sets]
        self.validations.append({"epoch": epoch, "step": step, **values})

    def remark(self, epoch: int, step: int, text: str) -> None:
        """Append what was done to the run at a step, for whoever looks at its values later."""
        self.remarks.append({"epoch": epoch, "step": step, "text": text})

    def __getitem__(self, name: str) -> list[float]:
        names = list(self)
        if name not in names:
            raise KeyError(
                f'The history has no column "{name}". {did_you_mean(name, names)}Columns: {", ".join(names)}.'
            )
        return [row.get(name, math.nan) for row in self.rows]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for row in self.rows for name in row))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __repr__(self) -> str:
        return f"History({len(self.rows)} epochs: {', '.join(self)})"

    def best(self, name: str, mode: Literal["min", "max"]) -> dict[str, float]:
        """Return the row in which a value was best: ``{"epoch": 3, "step": 300, "val_loss": 0.25, ...}``.

        Args:
            name: such as ``"val_loss"``, of which every validation counts, or ``"train_loss"``, of which every epoch.
            mode: "min" or "max". Of equal values the earlier is better; NaN is never best.

        Raises:
            KeyError: if there is no such value, or none of them is a number.

        >>> history = History()
        >>> for step, loss in ((10, 0.5), (20, 0.3), (30, 0.4)):
        ...     history.add_validation(1, step, {"val_loss": loss})
        >>> history.best("val_loss", mode="min")["step"]
        20
        """
        if mode not in ("min", "max"):
            raise ConfigurationError(f'best has mode={mode!r}. {did_you_mean(str(mode), ["min", "max"])}'
                                     'Write "min" or "max".')  # fmt: skip
        rows = self.validations if name.startswith("val_") else self.rows
        known = list(dict.fromkeys(key for row in rows for key in row))
        if name not in known:
            raise KeyError(
                f'The history has no value "{name}" yet. {did_you_mean(name, known)}'
                f"Values: {', '.join(known) or 'none'}."
            )
        candidates = [row for row in rows if not math.isnan(row.get(name, math.nan))]
        if not candidates:
            raise KeyError(f'"{name}" has never been a number. Look at the data and the learning rate.')
        return (min if mode == "min" else max)(candidates, key=lambda row: row[name])

    def to_frame(self) -> pandas.DataFrame:
        """Return the history as a pandas DataFrame, one row per epoch.

        Raises:
            MissingPackageError: if pandas is not installed.
        """
        module = import_optional("pandas", used_by="history.to_frame()")
        frame: pandas.DataFrame = module.DataFrame({name: self[name] for name in self})
        return frame

    def curves(self) -> list[str]:
        """Return the names that can be drawn, without their stage: ``["loss", "acc"]``."""
        staged = [self._place(name) for name in self if name.startswith(("train_", "val_"))]
        return list(dict.fromkeys(name for _, _, name in staged))

    def _place(self, name: str) -> tuple[str, str, str]:
        """Return the stage of a value, the name of its validation set or "", and its own name.

        >>> history = History()
        >>> history.add_validation(1, 1, {"val_clean_loss": 0.5}, sets=["clean"])
        >>> history._place("val_clean_loss"), history._place("train_loss")
        (('val', 'clean', 'loss'), ('train', '', 'loss'))
        """
        stage, _, short = name.partition("_")
        sets = sorted(self.validation_sets, key=len, reverse=True) if stage == "val" else []
        found = next((one for one in sets if short.startswith(f"{one}_")), "")
        return stage, found, short[len(found) + 1 :] if found else short

    def plot(self, *names: str) -> Figure:
        """Draw training and validation curves and return the matplotlib figure.

        Args:
            names: which values, without ``train_`` or ``val_``; all of them by default.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        chosen = names or tuple(self.curves())
        for name in chosen:
            if name not in self.curves():
                raise KeyError(
                    f'The history has no curve "{name}". {did_you_mean(name, self.curves())}'
                    f"Curves: {', '.join(self.curves())}."
                )
        figure = Figure(figsize=(6.4 * max(len(chosen), 1), 4.4), layout="constrained")
        FigureCanvasAgg(figure)  # draws without a window and without pyplot's global state
        panels = figure.subplots(1, max(len(chosen), 1), squeeze=False)[0]
        for axes, name in zip(panels, chosen, strict=False):
            self._draw(axes, name)
        return figure

    def _draw(self, axes: Axes, name: str) -> None:
        from matplotlib.ticker import MaxNLocator

        # Validations between epochs have no place on an axis of epochs: then both are drawn over steps.
        ends = {row["step"] for row in self.rows}
        unit = "epoch" if all(row["step"] in ends for row in self.validations) else "step"
        between = [row for row in self.validations if f"train_{name}" in row]
        drawn = {row["epoch"] for row in between}
        train = sorted(
            [*between, *(row for row in self.rows if row["epoch"] not in drawn)], key=lambda row: row["step"]
        )
        lines = [("train", "training", train)]
        lines += [(label("val", one), _in_words(one), self.validations) for one in ("", *self.validation_sets)]
        for number, (prefix, words, rows) in enumerate(lines):
            points = [(row[unit], row[f"{prefix}_{name}"]) for row in rows if f"{prefix}_{name}" in row]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=f"C{number}", label=words)
        axes.set(title=name, xlabel=unit, ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()

    def state_dict(self) -> dict[str, Any]:
        """Return rows and validations as tensors, see `Table`."""
        return {
            "rows": self._tables[0].pack(self.rows),
            "validations": self._tables[1].pack(self.validations),
            "validation_sets": list(self.validation_sets),
            "remarks": [dict(remark) for remark in self.remarks],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.rows, self.validations = unpack(state["rows"]), unpack(state["validations"])
        self.validation_sets = list(state["validation_sets"])
        self.remarks = [dict(remark) for remark in state["remarks"]]
        self._tables = Table(), Table()


def _in_words(validation_set: str) -> str:
    return f"validation, {validation_set}" if validation_set else "validation"
