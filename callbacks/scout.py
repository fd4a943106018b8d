"""What a short training needs that tries something out for another engine: its step, and some of its handlers."""

from __future__ import annotations

from camshaft.engine import Callback, Engine, Step

from .micro_batch import StepInParts
from .placement import Placement
from .precision import MixedPrecision


def whole_step(engine: Engine) -> Step | None:
    """Return the engine's step as it is for a batch that is not divided."""
    return engine.stepper.step if isinstance(engine.stepper, StepInParts) else engine.stepper


def handlers_of_scout(engine: Engine) -> list[Callback]:
    """Return new handlers that put batches where the engine has its parts, and compute in its precision."""
    attached = engine.listeners.callbacks
    precisions = [MixedPrecision(one.precision) for one in attached if isinstance(one, MixedPrecision)]
    return [Placement(engine.parts.device), *precisions]
