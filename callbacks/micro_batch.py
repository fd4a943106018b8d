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
    cut,
    evaluate_part,
    num_samples,
    ran_out_of_memory,
    train_in_parts,
    tree_map,
    whole_number,
)

logger = logging.getLogger("camshaft")


class MicroBatch(Callback):
    """Halves a batch that runs out of memory and tries again, with the gradients and averages of the whole batch.

    The batch is trained in parts, each of which counts by its samples, and updated once. From then on every batch
    comes in as many parts. Batch normalisation sees the parts, not the whole batch; dropout draws other numbers; and
    of a batch in several parts, handlers see no ``event.output``.

    A step of your own is called with each part, and calls ``engine.update(loss)`` once, without ``batch_size``. An
    evaluation that runs out of memory goes on in parts, too; how many is found anew after a resume.

    Args:
        num_parts: how many parts a training batch has to begin with.

    Raises:
        ConfigurationError: if attached to an engine without a step, or on several ranks.
        EngineStateError: in the first step, if that does not call ``engine.update`` once.
        torch.OutOfMemoryError: if a single sample does not fit; on the CPU, torch's RuntimeError.
    """

    unique = True
    needs_update = True

    def __init__(self, num_parts: int = 1) -> None:
        self.num_parts = whole_number("MicroBatch's num_parts", num_parts, least=1)

    def attach(self, engine: Engine) -> None:
        """Wrap the engine's step."""
        if engine.ranks.several:
            raise ConfigurationError(
                f"MicroBatch divides a batch when a rank lacks memory, and the {engine.ranks.world - 1} others would "
                "wait for its gradients. Pass a smaller batch_size with Accumulate(batches=...)."
            )
        super().attach(engine)
        engine.wrap_step(lambda step: StepInParts(step, self))

    def state_dict(self) -> dict[str, Any]:
        """Return the number of parts."""
        return {"num_parts": self.num_parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the number of parts."""
        self.num_parts = whole_number("MicroBatch's num_parts", state["num_parts"], least=1)

    def __repr__(self) -> str:
        return f"MicroBatch({self.num_parts})"


class StepInParts:
    """A step that takes a batch in parts.

    Attributes:
        step: the step that takes each part.
    """

    def __init__(self, step: Step, settings: MicroBatch) -> None:
        self.inputs = step.inputs
        self.step = step
        self._settings = settings
        self._num_evaluated_parts = 1

    def train(self, engine: Engine, batch: Any, /) -> None:
        """Train on a batch in as many parts as it takes."""
        settings, total = self._settings, num_samples(batch)
        window = tree_map(Tensor.clone, engine.update.state_dict())  # holds gradients only if one is open
        while True:
            try:
                train_in_parts(engine, self.step, _split(batch, settings.num_parts, total))
                return
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
                engine.update.reset()
                engine.update.load_state_dict(window)
                if settings.num_parts >= total:
                    raise
            settings.num_parts *= 2  # outside of the handler, whose traceback holds the tensors of the failed try
            _announce("Out of memory at step %d: batches now come in %d parts.", engine.step, settings.num_parts)

    def evaluate(self, engine: Engine, batch: Any, /) -> None:
        """Evaluate a batch; from where it runs out of memory, in smaller parts."""
        rest = total = num_samples(batch)
        while True:
            size = -(-total // self._num_evaluated_parts)
            try:
                start = total - rest
                part = batch if size == total else cut(batch, start, start + size, total)
                evaluate_part(engine, self.step, part)
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error) or size <= 1:
                    raise
            else:
                rest -= size
                if rest > 0:
                    continue
                if size < total:  # handlers see none, where it would be that of the last part
                    engine.current.forget_output()
                return
            self._num_evaluated_parts *= 2  # outside of the handler, as above
            _announce("Out of memory in an evaluation: its batches now come in %d parts.", self._num_evaluated_parts)


def _announce(message: str, *values: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    logger.warning(message, *values)


def _split(batch: Any, num_parts: int, total: int) -> list[Any]:
    """Split a batch into parts; a value without one item per sample is passed unchanged to each part."""
    size = -(-total // min(num_parts, total)) if total else 1
    return [cut(batch, start, start + size, total) for start in range(0, total, size)] or [batch]
