"""Pictures of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from camshaft.engine import STAGES, Callback, EpochEnd, FitEnd, FitStart, directory_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("camshaft")


class Report(Callback):
    """Draws a curve for each value (``loss.png``, ``acc.png`` ...) and each confusion matrix, when a run ends.

    A metric whose value is a square matrix, such as torchmetrics' ``MulticlassConfusionMatrix``, is drawn with
    the true class down and the predicted class across, as of the last epoch. Pictures are drawn also for a run
    that failed after its first epoch.

    Args:
        directory: where to write; by default the run directory.
        class_names: what to write at the confusion matrix; the class numbers by default.

    Raises:
        ConfigurationError: before the first step, if there is nowhere to write.
    """

    main_only = True

    def __init__(self, directory: str | Path | None = None, *, class_names: Sequence[str] | None = None) -> None:
        self._wanted_directory = None if directory is None else Path(directory)
        self.class_names = class_names
        self._directory = Path()
        self._matrices: dict[str, tuple[str, Tensor]] = {}  # title and matrix

    def on_fit_start(self, event: FitStart) -> None:
        """Find out where to write."""
        self._directory = directory_for("Report", self._wanted_directory, event.engine.directory)

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Keep the newest matrices; a validation's take the place of the training's."""
        for name, value in event.metrics.items():  # training values come first
            if isinstance(value, Tensor) and value.ndim == 2 and value.shape[0] == value.shape[1]:
                stage, _, short = name.partition("_")
                self._matrices[short] = (f"{short}, {STAGES[stage]}, epoch {event.engine.epoch}", value)

    def on_fit_end(self, event: FitEnd) -> None:
        """Draw everything."""
        history = event.engine.history
        figures = {name: history.plot(name) for name in history.curves()}
        for name, (title, matrix) in self._matrices.items():
            figures[name] = draw_confusion(matrix, title=title, class_names=self._names(len(matrix)))
        for name, figure in figures.items():
            path = self._directory / f"{_as_file_name(name)}.png"
            try:
                figure.savefig(path, dpi=120)
            except OSError as error:
                logger.warning("Report could not draw %s: %s.", path, error)

    def _names(self, num_classes: int) -> Sequence[str] | None:
        if self.class_names is not None and len(self.class_names) != num_classes:
            logger.warning("Report has %d class_names for %d classes; it draws their numbers.",
                           len(self.class_names), num_classes)  # fmt: skip
            return None
        return self.class_names

    def __repr__(self) -> str:
        return f"Report({str(self._wanted_directory) if self._wanted_directory else ''})"


def _as_file_name(name: str) -> str:
    """Return a value's name without what a file's name cannot have; long ones are cut."""
    return "".join(letter if letter.isprintable() and letter not in "/\\" else "-" for letter in name)[:100]


def draw_confusion(matrix: Tensor, *, title: str = "", class_names: Sequence[str] | None = None) -> Figure:
    """Draw a confusion matrix.

    Args:
        matrix: [C, C] counts or shares, the true class down and the predicted class across.
        title: written above.
        class_names: C names; the class numbers by default.

    Returns:
        A matplotlib figure; colours are shares of the true class, so that rare classes show.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_classes = len(matrix)
    names = list(class_names) if class_names is not None else [str(number) for number in range(num_classes)]
    shares = (matrix.double() / matrix.sum(dim=1, keepdim=True).clamp(min=1e-12)).tolist()
    side = min(max(4.0, 0.5 * num_classes + 1.5), 14.0)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    if num_classes <= 20:
        for row, counts in enumerate(matrix.tolist()):
            for column, count in enumerate(counts):
                if count:
                    colour = "white" if shares[row][column] > 0.5 else "black"
                    axes.text(column, row, _cell(count), ha="center", va="center", color=colour, fontsize=8)
    shown = range(0, num_classes, -(-num_classes // 40))  # 40 names at most
    labels = [names[number] for number in shown]
    axes.set_xticks(shown, labels, rotation=90 if max(map(len, labels)) > 3 else 0)
    axes.set_yticks(shown, labels)
    axes.set(title=title, xlabel="predicted", ylabel="true")
    return figure


def _cell(count: float) -> str:
    """Counts in full, shares with two decimals."""
    return f"{count:.0f}" if float(count).is_integer() else f"{count:.2f}"
