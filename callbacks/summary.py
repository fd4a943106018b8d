"""What a model is made of."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from camshaft.engine import (
    Callback,
    Engine,
    FitStart,
    StepEnd,
    import_optional,
    prepare_batch,
    tree_map,
    unwrap,
    write_durably,
)

logger = logging.getLogger("camshaft")


class Summary(Callback):
    """Logs a table of the model's layers, with the shapes of their outputs and numbers of parameters, by torchinfo.

    It is made after the first step, by a forward pass of its batch in eval mode that changes nothing, and written as
    ``summary.txt`` into the run directory, if there is one. Without the shapes, if torchinfo cannot run the model on
    the batch, or on several ranks.

    Args:
        depth: how deep nested modules are shown.
        part: the part that is shown.

    Raises:
        MissingPackageError: at attachment, if torchinfo is not installed.
        ConfigurationError: at attachment, if there is no such part.
    """

    main_only = True

    def __init__(self, *, depth: int = 3, part: str = "model") -> None:
        self.depth = depth
        self.part = part

    def attach(self, engine: Engine) -> None:
        """Look whether there is what it needs."""
        super().attach(engine)
        self._torchinfo = import_optional("torchinfo", used_by="Summary")
        engine.parts.module(self.part, "Summary")

    def on_fit_start(self, event: FitStart) -> None:
        """Wait for the first step of an engine's first fit."""
        if event.engine.num_fits == 1:
            self._subscription = event.engine.subscribe(StepEnd, self._show)

    def _show(self, event: StepEnd) -> None:
        self._subscription.cancel()
        engine = event.engine
        text = self._table(engine, unwrap(engine.parts[self.part]))
        logger.info("The part %s:\n%s", self.part, text)
        if engine.directory is not None:
            self._write(engine.directory / "summary.txt", text)

    def _write(self, path: Path, text: str) -> None:
        try:
            write_durably(path, lambda file: file.write(f"{text}\n".encode()))
        except OSError as error:
            logger.warning("%s could not be written: %s. Training continues.", path, error.strerror)

    def _table(self, engine: Engine, module: nn.Module) -> str:
        settings: dict[str, Any] = {"depth": self.depth, "verbose": 0, "cache_forward_pass": False}
        if self.part == "model" and not engine.ranks.several:
            try:
                inputs = self._inputs(engine)
                with engine.evaluating():
                    return str(
                        self._torchinfo.summary(
                            module, input_data=inputs, mode="eval", device=engine.parts.device, **settings
                        )
                    )
            except Exception as error:  # torchinfo raises kinds of its own, and so may the model
                logger.info("The summary is without shapes: %s", str(error).partition("\n")[0])
        return str(self._torchinfo.summary(module, **settings))

    def _inputs(self, engine: Engine) -> Any:
        stepper, batch = engine.stepper, engine.batch
        inputs = prepare_batch(batch)[0] if stepper is None else stepper.inputs(batch)
        inputs = tree_map(Tensor.detach, inputs)
        if isinstance(inputs, Mapping):
            return dict(inputs)
        return list(inputs) if isinstance(inputs, tuple) else [inputs] if torch.is_tensor(inputs) else inputs

    def __repr__(self) -> str:
        return f"Summary(depth={self.depth})"
