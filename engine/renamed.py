"""Names from earlier versions, and where to find them now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NoReturn, TypeVar

OF_ENGINE = {
    "around": "engine.listeners.around(scope, manager)",
    "callbacks": "engine.listeners.callbacks",
    "checkpoints": "run_checkpoint.checkpoints, with the RunCheckpoint that you attached",
    "data_state": "engine.run.feed.state_dict(step)",
    "device": "engine.parts.device",
    "directory_for": "directory_for(owner, wanted, engine.directory)",
    "dispatch": "engine.listeners",
    "divide": "engine.wrap_step(wrapper)",
    "epoch_is_open": "engine.run.phase",
    "epoch_length": "engine.run.epoch_length",
    "evaluation_step": "engine.stepper.evaluate(engine, batch)",
    "first_epoch": "engine.run.first_epoch",
    "first_step": "engine.run.first_step",
    "hears": "engine.listeners.hears(event)",
    "in_mid_epoch": "engine.run.data_exhausted, which is the opposite",
    "interrupt": "engine.run.interrupt(signal)",
    "interrupted": "engine.run.interrupted",
    "is_over": "engine.run.is_over",
    "last_epoch": "engine.run.last_epoch",
    "last_step": "engine.run.last_step",
    "model": 'engine.parts["model"]',
    "modules": "engine.parts.modules()",
    "named_parameters": "engine.parts.named_parameters()",
    "newest": "engine.run.last_validation",
    "num_samples": "engine.current.num_samples()",
    "optimizers": "engine.parts.optimizers()",
    "peek": "engine.current.peek()",
    "plan": "engine.run.plan",
    "planned": "engine.run.num_planned(unit) or engine.update.num_planned(run)",
    "prepare_batch": "engine.stepper.inputs(batch)",
    "resumes": "engine.run.is_resuming",
    "stage": "engine.current.name",
    "step_before_epoch": "engine.run.step_before_epoch",
    "stop_reason": "engine.run.stop_reason",
    "train_in_parts": "train_in_parts(engine, step, parts)",
    "training_step": "engine.stepper.train(engine, batch)",
    "validates": "engine.run.has_validation",
    "validation_length": "engine.current.length",
}


OF_UPDATE = {
    "skip": "engine.run.skip_update()",
    "window_batches": "engine.update.window_size.batches, or engine.update.accumulate(batches=...) to set it",
    "window_samples": "engine.update.window_size.samples, or engine.update.accumulate(samples=...) to set it",
}

T = TypeVar("T")


class _Renamed:
    """Raises, when it is looked up or set, what says the new name."""

    def __init__(self, old: str, new: str) -> None:
        self._message = f"{old} was renamed. Write {new}."

    def __get__(self, instance: object, owner: type) -> NoReturn:
        raise AttributeError(self._message)

    def __set__(self, instance: object, value: object) -> NoReturn:
        raise AttributeError(self._message)


def refuse_old_names(owner: str, names: Mapping[str, str]) -> Callable[[type[T]], type[T]]:
    """Let a class raise for each old name, and leave those names out of ``dir()``.

    A ``__getattr__`` would do that, too, but with one Python reads every other attribute of the class more slowly.

    Args:
        owner: how people write an object of the class.
        names: the new name of each old one.
    """

    def decorate(cls: type[T]) -> type[T]:
        for old, new in names.items():
            setattr(cls, old, _Renamed(f"{owner}.{old}", new))
        cls.__dir__ = lambda self: sorted(set(object.__dir__(self)) - names.keys())  # type: ignore[method-assign]  # on purpose
        return cls

    return decorate
