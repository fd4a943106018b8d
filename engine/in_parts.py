"""A batch in parts: where it does not fit into memory as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .stages import record_output

if TYPE_CHECKING:
    from .engine import Engine
    from .step import Step, StepOutput


def train_in_parts(engine: Engine, step: Step, parts: Sequence[Any]) -> None:
    """Train on one batch that comes in parts, with the gradients and the averages of the whole batch.

    If a part fails, nothing of the batch is recorded; its gradients are left in the window. Of a batch in several
    parts, handlers see no output. Waits for the device if the engine's ``num_samples`` returns tensors.

    Raises:
        EngineStateError: if the step does not call ``engine.update`` once for each part.
    """
    current = engine.current
    with current.part(current.batch) as record:
        weights = [record.num_samples(part) for part in parts]
        counted = [weight.item() if isinstance(weight, Tensor) else weight for weight in weights]
        if not any(counted):
            parts, counted = parts[:1], counted[:1]
        with engine.update.in_parts(counted) as whole:
            for part in parts:
                _take(engine, part, step.train)
                whole.end_part()
    if len(parts) > 1:
        current.forget_output()


def evaluate_part(engine: Engine, step: Step, part: Any) -> None:
    """Evaluate a batch, or a part of one; if that fails, nothing is recorded."""
    _take(engine, part, step.evaluate)


def _take(engine: Engine, part: Any, act: Callable[[Engine, Any], StepOutput]) -> None:
    """Train on a part, or evaluate it, and record what that returns."""
    current = engine.current
    with current.part(part):
        current.forget_output()
        record_output(current, act(engine, part))
