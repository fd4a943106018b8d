"""Values, images and histograms for an experiment tracker."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from camshaft.engine import (
    Callback,
    Engine,
    EpochEnd,
    EpochStart,
    FitEnd,
    FitStart,
    Logged,
    RunFailed,
    Selection,
    ValidationEnd,
    scalars,
    select_parameters,
    unwrap,
    values_of,
    write_durably,
)

from .event_writer import figure_pixels, finite_values
from .run_directory import RunDirectory
from .secrets import without_secrets
from .tensorboard import only_of_epoch
from .track_json_lines import JsonLines

logger = logging.getLogger("camshaft")

Outcome = Literal["finished", "interrupted", "failed"]


class Service(Protocol):
    """What an experiment tracker must be able to do; `WandB`, `MLflow`, `JsonLines` ... are such.

    Args:
        name: how it is called in messages and file names.
        rewinds: whether `open` drops what is not in ``sent``; without that, what was sent later is not sent again.
    """

    name: str
    rewinds: bool

    def open(
        self, run_id: str | None, settings: Mapping[str, Any], directory: Path | None, sent: Mapping[str, int]
    ) -> str:
        """Begin a run, or go on with the one of this id; return its id.

        Args:
            run_id: None for a new run.
            settings: what the run was started with.
            directory: the run directory, if there is one.
            sent: up to which step each kind of values was sent when the run that goes on was saved.
        """

    def log(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Send values of a step; the kind is "step", "validation" or "epoch"."""

    def add_image(self, name: str, pixels: Tensor, step: int) -> None:
        """Send an image [H, W, 3] of bytes."""

    def add_histogram(self, name: str, values: Tensor, step: int) -> None:
        """Send the distribution of finite values [N]."""

    def close(self, outcome: Outcome) -> None:
        """End the run."""


class Tracker(Callback):
    """Sends what a run reaches to a tracker: `WandB`, `MLflow`, `Comet`, `ClearML`, `Neptune` or `JsonLines`.

    Each epoch's ``train_*`` values, each validation's ``val_*`` values and, under ``step/``, what a `Log` announces
    are sent with their steps; the settings are those of the `RunDirectory`. A resumed run goes on in the same run
    there, and with a `RunDirectory` no step is there twice: what an earlier process has sent is not sent again.

    A failure of the service warns once and ends the sending, not the training.

    Args:
        service: where to send, such as ``WandB(project="digits")``, or a `Service` of yours.
        histograms: the parameters of the part ``model`` whose values are sent as histograms at the end of each epoch:
            names, patterns such as ``"*.weight"``, or a function ``(name, parameter) -> bool``.

    Raises:
        MissingPackageError: at attachment, naming the service's package, if it is not installed.
    """

    main_only = True

    def __init__(self, service: Service, *, histograms: Selection | None = None) -> None:
        self.service = service
        self._histograms = histograms
        self._chosen: dict[str, nn.Parameter] = {}
        self._engine: Engine | None = None
        self.run_id: str | None = None
        self._is_running = self._is_open = self._has_failed = False
        self._outcome: Outcome = "finished"
        self._sent: dict[str, int] = {}  # the newest step of each kind of values
        self._marks: Path | None = None  # the file that holds them

    def attach(self, engine: Engine) -> None:
        """Look for the service's package, and for the parameters."""
        super().attach(engine)
        self._engine = engine
        check = getattr(self.service, "check", None)
        if check is not None:
            check()
        if self._histograms is not None:
            self._chosen = select_parameters(unwrap(engine.parts.module("model", "Tracker")), self._histograms)

    def write_into(self, directory: Path) -> None:
        """Send nothing to the service; write it down there."""
        self.service = JsonLines(directory / "values.jsonl")

    def on_fit_start(self, event: FitStart) -> None:
        """Begin anew; a run that is resumed then takes back which run it was there."""
        self.run_id, self._sent = None, {}
        self._is_running, self._is_open, self._has_failed = True, False, False
        self._outcome = "finished"

    def on_epoch_start(self, event: EpochStart) -> None:
        """Open the run; before, the step that a resumed one goes on from is not known."""
        self._guarded(lambda: None)

    def on_logged(self, event: Logged) -> None:
        """Send the values of a training step."""
        self._send("step", {f"step/{name}": value for name, value in event.values.items()}, event.at)

    def on_validation_end(self, event: ValidationEnd) -> None:
        """Send the values of a validation, and in mid-epoch those of the training before it, see `History`."""
        self._send("validation", values_of(event.engine.history.validations[-1]), event.engine.step)

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Send the training values that no validation has sent, the epoch's number, and the histograms."""
        engine = event.engine
        values = only_of_epoch(engine.history.rows[-1], engine.history.validations)
        is_new = self._send("epoch", {"epoch": float(engine.epoch), **values}, engine.step)
        for name, parameter in self._chosen.items() if is_new else ():
            self.add_histogram(name, parameter, engine.step)

    def on_run_failed(self, event: RunFailed) -> None:
        """Remember it."""
        self._outcome = "failed"

    def on_fit_end(self, event: FitEnd) -> None:
        """End the run there."""
        interrupted = self._outcome == "finished" and event.engine.run.breaks_off
        self._guarded(lambda: self.service.close("interrupted" if interrupted else self._outcome))
        self._is_running = False

    def add_image(self, name: str, image: Tensor, step: int) -> None:
        """Send an image [C, H, W] or [H, W], of bytes, or of floats from 0 to 1; for handlers of yours."""
        pixels = image.detach().cpu()
        pixels = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels
        pixels = pixels if pixels.dtype == torch.uint8 else (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
        self._guarded(
            lambda: self.service.add_image(name, pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous(), step)
        )

    def add_figure(self, name: str, figure: Any, step: int) -> None:
        """Send a matplotlib figure as an image; for handlers of yours."""
        self.add_image(name, figure_pixels(figure), step)

    def add_histogram(self, name: str, values: Tensor, step: int) -> None:
        """Send the distribution of a tensor's finite values; for handlers of yours."""
        finite = finite_values(values)
        if len(finite):
            self._guarded(lambda: self.service.add_histogram(name, finite, step))

    def state_dict(self) -> dict[str, Any]:
        """Return which run it is there, and what was sent."""
        return {"run_id": self.run_id, "sent": dict(self._sent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.run_id, self._sent = state["run_id"], dict(state["sent"])

    def _open(self, engine: Engine) -> None:
        directory, before = engine.directory, self.run_id
        settings = next((one.settings for one in engine.listeners.callbacks if isinstance(one, RunDirectory)), {})
        self.run_id = self.service.open(before, without_secrets(settings), directory, self._sent)
        self._marks = directory and directory / f"tracked.{self.service.name}.json"
        if before is not None and not self.service.rewinds and self._marks is not None:
            self._sent |= _sent_before(self._marks, self.run_id)

    def _send(self, kind: str, values: Mapping[str, Any], step: int) -> bool:
        """Send values, unless this kind of values of this step was sent before the run was resumed; return whether."""
        self._guarded(lambda: None)  # when it is open, it is known what was sent
        if step <= self._sent.get(kind, -1):
            return False

        def send() -> None:
            self.service.log(kind, scalars(values), step)
            self._sent[kind] = step
            if self._marks is not None and not self.service.rewinds:
                marks = json.dumps({"run_id": self.run_id, "sent": self._sent}).encode()
                write_durably(self._marks, lambda file: file.write(marks))

        self._guarded(send)
        return True

    def _guarded(self, call: Callable[[], None]) -> None:
        if not self._is_running or self._has_failed or self._engine is None:
            return
        try:
            if not self._is_open:
                self._is_open = True
                self._open(self._engine)
            call()
        except Exception as error:  # each service has kinds of its own
            logger.warning("Tracker stops sending to %s: %r. Training continues.", self.service.name, error)
            self._has_failed = True

    def __repr__(self) -> str:
        return f"Tracker({self.service!r})"


def _sent_before(marks: Path, run_id: str) -> dict[str, int]:
    """Return what the file says was sent to this run."""
    try:
        found = json.loads(marks.read_bytes())
        return {str(kind): int(step) for kind, step in found["sent"].items()} if found["run_id"] == run_id else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
