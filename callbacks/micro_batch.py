"""Batches that do not fit into memory."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from camshaft.engine import (
    Callback,
    ConfigurationError,
    Engine,
    Step,
    SupervisedStep,
    cut,
    num_samples,
    tree_map,
    whole_number,
)

logger = logging.getLogger("camshaft")


class MicroBatch(Callback):
    """Halves a batch that runs out of memory and tries again, with the gradients and averages of the whole batch.

    The batch is trained in parts, each of which counts by its samples, and updated once. From then on every batch
    comes in as many parts. Batch normalisation sees the parts, not the whole batch; dropout draws other numbers.

    Args:
        num_parts: how many parts to begin with.

    Raises:
        ConfigurationError: if attached to an engine that no `Trainer` made, or on several ranks.
        torch.OutOfMemoryError: if a single sample does not fit.
    """

    unique = True

    def __init__(self, num_parts: int = 1) -> None:
        self.num_parts = whole_number("MicroBatch's num_parts", num_parts, least=1)

    def attach(self, engine: Engine) -> None:
        """Wrap the trainer's step."""
        if engine.ranks.several:
            raise ConfigurationError(
                f"MicroBatch divides a batch when a rank lacks memory, and the {engine.ranks.world - 1} others would "
                "wait for its gradients. Pass a smaller batch_size with Accumulate(batches=...)."
            )
        super().attach(engine)
        engine.wrap_step(self._wrapped)

    def _wrapped(self, step: Step) -> Step:
        if isinstance(step, SupervisedStep):
            return StepInParts(step, self)
        raise ConfigurationError(
            "MicroBatch divides the step of a Trainer, and this engine has a step of its own. "
            "Call engine.update(loss, num_samples, batch_size=num_samples_of_the_batch) for each part."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the number of parts."""
        return {"num_parts": self.num_parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the number of parts."""
        self.num_parts = whole_number("MicroBatch's num_parts", state["num_parts"], least=1)

    def __repr__(self) -> str:
        return f"MicroBatch({self.num_parts})"


class StepInParts:
    """A trainer's step that takes a batch in parts.

    Attributes:
        step: the step of the trainer.
    """

    def __init__(self, step: SupervisedStep, settings: MicroBatch) -> None:
        self.evaluate, self.inputs = step.evaluate, step.inputs
        self.step = step
        self._settings = settings

    def train(self, engine: Engine, batch: Any, /) -> None:
        """Train on a batch in as many parts as it takes."""
        settings, total = self._settings, num_samples(batch)
        if not total:
            self.step.train(engine, batch)
            return
        window = tree_map(Tensor.clone, engine.update.state_dict())  # holds gradients only if one is open
        while True:
            try:
                self.step.train_in_parts(engine, _split(batch, min(settings.num_parts, total), total))
                return
            except torch.OutOfMemoryError:
                engine.update.reset()
                engine.update.load_state_dict(window)
                if settings.num_parts >= total:
                    raise
            settings.num_parts *= 2  # outside of the handler, whose traceback holds the tensors of the failed try
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            logger.warning("Out of memory at step %d: batches now come in %d parts.", engine.step, settings.num_parts)


def _split(batch: Any, num_parts: int, total: int) -> list[Any]:
    """Split a batch into parts; a value without one item per sample is passed unchanged to each part."""
    size = -(-total // num_parts)
    return [cut(batch, start, start + size, total) for start in range(0, total, size)]
