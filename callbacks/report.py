"""Pictures of a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from camshaft.engine import STAGES, Callback, EpochEnd, FitEnd, FitStart, ValidationEnd, directory_for

from .best_checkpoint import watched_value
from .page_writer import PageWriter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("camshaft")


class Report(Callback):
    """Writes a page about the run, ``report.html``, and pictures: a curve for each value, and confusion matrices.

    The page is in the run directory. It is written anew after each epoch, so that it can be looked at while the run
    goes on, and when the run ends, also by an error; less often where that would take more than a fiftieth of the
    time. It works without a network. There is none without a `RunDirectory`, or without the package plotly, which
    draws its curves: ``pip install camshaft[report]``.

    The pictures (``loss.png``, ``acc.png`` ...) are drawn when the run ends.

    A metric whose value is a square matrix, such as torchmetrics' ``MulticlassConfusionMatrix``, is drawn with the
    true class down and the predicted class across, as of the best validation: that of a `BestCheckpoint`, or else that
    of another handler that watches a value. Where none does, it is that of the last epoch.

    Args:
        directory: where to write the pictures; by default the run directory.
        class_names: what to write at the confusion matrix; the class numbers by default.
        page: whether to write the page; False leaves the pictures.

    Raises:
        ConfigurationError: before the first step, if there is nowhere to write.
    """

    main_only = True

    def __init__(
        self, directory: str | Path | None = None, *, class_names: Sequence[str] | None = None, page: bool = True
    ) -> None:
        self._wanted_directory = None if directory is None else Path(directory)
        self.class_names = class_names
        self.page = page
        self._directory = Path()
        self._matrices: dict[str, tuple[str, Tensor]] = {}  # title and matrix
        self._best = math.nan
        self._best_epoch = 0
        self._writer: PageWriter | None = None

    def write_into(self, directory: Path) -> None:
        """Write there, if this would not be the run directory."""
        self._wanted_directory = self._wanted_directory and directory

    def on_fit_start(self, event: FitStart) -> None:
        """Find out where to write."""
        engine = event.engine
        self._directory = directory_for("Report", self._wanted_directory, engine.directory)
        self._matrices, self._best, self._best_epoch = {}, math.nan, 0
        self._watched = watched_value(engine.listeners.callbacks)
        self._writer = PageWriter(engine.directory, self.class_names) if self.page and engine.directory else None

    def on_validation_end(self, event: ValidationEnd) -> None:
        """Keep the matrices of the best validation."""
        self._keep(event, "val_")

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Keep the newest or the best matrices; a validation's take the place of the training's. Write the page."""
        found = _matrices_of(event)
        if self._watched is None:
            self._matrices |= found
        elif not self._keep(event, "train_") and self._best_epoch == event.engine.epoch:
            self._matrices = found | self._matrices  # those of the training, which were not known yet
        if self._writer is not None:
            self._writer.write_soon(self._matrices)

    def _keep(self, event: ValidationEnd | EpochEnd, stage: str) -> bool:
        """Keep the matrices if the watched value is one of this stage, and better than before; return whether."""
        watched = self._watched
        if watched is None or not watched.name.startswith(stage):
            return False
        value = event.metrics.get(watched.name)
        if not isinstance(value, float) or not watched.better(value, self._best):
            return False
        self._best, self._best_epoch = value, event.engine.epoch
        self._matrices = _matrices_of(event)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the matrices that are kept."""
        return {
            "best": self._best,
            "best_epoch": self._best_epoch,
            "matrices": {name: [title, matrix] for name, (title, matrix) in self._matrices.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._best, self._best_epoch = state["best"], state["best_epoch"]
        self._matrices = {name: (title, matrix) for name, (title, matrix) in state["matrices"].items()}

    def on_fit_end(self, event: FitEnd) -> None:
        """Draw everything, and write the last page."""
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
        if self._writer is not None:
            self._writer.write_last(self._matrices)

    def _names(self, num_classes: int) -> Sequence[str] | None:
        if self.class_names is not None and len(self.class_names) != num_classes:
            logger.warning("Report has %d class_names for %d classes; it draws their numbers.",
                           len(self.class_names), num_classes)  # fmt: skip
            return None
        return self.class_names

    def __repr__(self) -> str:
        return f"Report({str(self._wanted_directory) if self._wanted_directory else ''})"


def _matrices_of(event: ValidationEnd | EpochEnd) -> dict[str, tuple[str, Tensor]]:
    """Return the square matrices among the values, with their titles."""
    found = {}
    for name, value in event.metrics.items():  # training values come first
        if isinstance(value, Tensor) and value.ndim == 2 and value.shape[0] == value.shape[1]:
            stage, _, short = name.partition("_")
            found[short] = (f"{short}, {STAGES[stage]}, epoch {event.engine.epoch}", value)
    return found


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
