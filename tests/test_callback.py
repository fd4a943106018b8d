"""A class whose ``on_*`` methods are subscriptions: when they are called, with what, and for which engine.

That a hook takes the event of its name is also checked by mypy, on the lines below that say `assert_type`.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, assert_type

import pytest
import torch
from helpers import class_batches, documented_events, make_trainer, refused
from torch import Tensor

import camshaft.engine
from camshaft.callbacks import BestCheckpoint, EarlyStopping, Log, RunCheckpoint
from camshaft.engine import (
    BatchReady,
    Callback,
    ConfigurationError,
    Engine,
    EpochEnd,
    EpochStart,
    Event,
    FitEnd,
    FitStart,
    GradientsReady,
    HandlerError,
    Logged,
    LossReady,
    RunFailed,
    Settled,
    StepEnd,
    UpdateEnd,
    ValidationEnd,
    ValidationStart,
    ValidationStepEnd,
)
from camshaft.engine.events import hook_name

BUILT_IN: list[type[Event]] = [getattr(camshaft.engine, name) for name in documented_events()]
HOOKS = [hook_name(event) for event in BUILT_IN]
C = TypeVar("C", bound=Callback)
E = TypeVar("E", bound=Event)

if TYPE_CHECKING:

    def heard(hook: Callable[[C, E], object]) -> E:
        """Return what a hook hears, for the type checker alone."""
        raise NotImplementedError

    class Silent(Callback):
        """A subclass without hooks: those of `Callback` are seen through it."""

    assert_type(heard(Callback.on_fit_start), FitStart)
    assert_type(heard(Callback.on_epoch_start), EpochStart)
    assert_type(heard(Callback.on_batch_ready), BatchReady)
    assert_type(heard(Callback.on_loss_ready), LossReady)
    assert_type(heard(Callback.on_gradients_ready), GradientsReady)
    assert_type(heard(Callback.on_update_end), UpdateEnd)
    assert_type(heard(Callback.on_step_end), StepEnd)
    assert_type(heard(Callback.on_logged), Logged)
    assert_type(heard(Callback.on_validation_start), ValidationStart)
    assert_type(heard(Callback.on_validation_step_end), ValidationStepEnd)
    assert_type(heard(Callback.on_validation_end), ValidationEnd)
    assert_type(heard(Callback.on_epoch_end), EpochEnd)
    assert_type(heard(Callback.on_settled), Settled)
    assert_type(heard(Callback.on_run_failed), RunFailed)
    assert_type(heard(Callback.on_fit_end), FitEnd)
    assert_type(heard(Silent.on_step_end), StepEnd)

    class Mistaken(Callback):
        """Hooks that hear another event than that of their name, which mypy must refuse: an unused ignore is one."""

        def on_step_end(self, event: EpochEnd) -> None:  # type: ignore[override]
            """Hear the wrong event."""

        def on_loss_ready(self, event: LossReady) -> str:  # type: ignore[override]
            """Return what is not a loss."""


class Diary(Callback):
    """Has every built-in hook, and writes down which was called with what."""

    def __init__(self) -> None:
        self.hooks: list[str] = []
        self.events: list[tuple[type[Event], type[Event]]] = []

    def note(self, hook: str, event: Event, declared: type[Event]) -> None:
        self.hooks.append(hook)
        self.events.append((type(event), declared))

    def on_fit_start(self, event: FitStart) -> None:
        self.note("on_fit_start", event, FitStart)

    def on_epoch_start(self, event: EpochStart) -> None:
        self.note("on_epoch_start", event, EpochStart)

    def on_batch_ready(self, event: BatchReady) -> None:
        self.note("on_batch_ready", event, BatchReady)

    def on_loss_ready(self, event: LossReady) -> None:
        self.note("on_loss_ready", event, LossReady)
        assert_type(event.loss, Tensor)
        assert_type(event.optimizer, torch.optim.Optimizer)

    def on_gradients_ready(self, event: GradientsReady) -> None:
        self.note("on_gradients_ready", event, GradientsReady)

    def on_update_end(self, event: UpdateEnd) -> None:
        self.note("on_update_end", event, UpdateEnd)

    def on_step_end(self, event: StepEnd) -> None:
        self.note("on_step_end", event, StepEnd)
        assert_type(event.engine, Engine)

    def on_logged(self, event: Logged) -> None:
        self.note("on_logged", event, Logged)
        assert_type(event.values, Mapping[str, float])

    def on_validation_start(self, event: ValidationStart) -> None:
        self.note("on_validation_start", event, ValidationStart)

    def on_validation_step_end(self, event: ValidationStepEnd) -> None:
        self.note("on_validation_step_end", event, ValidationStepEnd)

    def on_validation_end(self, event: ValidationEnd) -> None:
        self.note("on_validation_end", event, ValidationEnd)

    def on_epoch_end(self, event: EpochEnd) -> None:
        self.note("on_epoch_end", event, EpochEnd)

    def on_settled(self, event: Settled) -> None:
        self.note("on_settled", event, Settled)

    def on_run_failed(self, event: RunFailed) -> None:
        self.note("on_run_failed", event, RunFailed)
        assert_type(event.error, BaseException)

    def on_fit_end(self, event: FitEnd) -> None:
        self.note("on_fit_end", event, FitEnd)
        assert_type(event.reason, str)


def failed_run() -> Diary:
    """The diary of a run of one step and one validation batch, that fails when all of it is done."""
    diary = Diary()
    trainer = make_trainer(diary, Log(every=1))

    def fail(event: Settled) -> None:
        if "on_epoch_end" in diary.hooks:
            raise ArithmeticError

    trainer.subscribe(Settled, fail)
    with pytest.raises(ArithmeticError):
        trainer.fit(class_batches(4), class_batches(4), epochs=1)
    return diary


# What the documentation says ------------------------------------------------------------------------------


def documented_loop() -> list[str]:
    """The hooks in the loop of the class's docstring, from top to bottom."""
    loop = str(Callback.__doc__).partition("::")[2].partition("Override")[0]
    return re.findall(r"\bon_\w+", loop)


def test_the_documented_loop_names_every_built_in_hook() -> None:
    assert set(documented_loop()) == set(HOOKS)


def test_the_documented_loop_is_the_order_in_which_a_run_calls_the_hooks() -> None:
    assert failed_run().hooks == documented_loop()


def test_every_hook_is_called_with_the_event_of_its_name() -> None:
    events = failed_run().events
    assert all(given is declared for given, declared in events)
    assert {given for given, _ in events} == set(BUILT_IN)


def declared_hooks() -> dict[str, str]:
    """The hooks that only type checkers see, and the annotation of what each takes, as written in the source."""
    (tree,) = ast.parse(inspect.getsource(Callback)).body
    assert isinstance(tree, ast.ClassDef)
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    hooks = [node for node in block.body if isinstance(node, ast.FunctionDef)]
    return {hook.name: ast.unparse(hook.args.args[1].annotation or hook) for hook in hooks}


def test_type_checkers_see_a_hook_for_every_built_in_event() -> None:
    assert declared_hooks() == {hook_name(event): f"events.{event.__name__}" for event in BUILT_IN}


@pytest.mark.parametrize("hook", HOOKS)
def test_at_run_time_a_hook_that_nobody_wrote_does_not_exist(hook: str) -> None:
    assert not hasattr(Callback, hook)


def test_a_callback_without_hooks_hears_nothing() -> None:
    assert Engine(callbacks=[Callback()]).explain() == "No event has a handler."


# To which engine it belongs -------------------------------------------------------------------------------


def test_a_callback_is_refused_by_a_second_engine() -> None:
    callback = Diary()
    make_trainer(callback)
    second = make_trainer()
    before = second.explain()
    with refused(ConfigurationError, "Diary() was attached to another engine before", "for each engine."):
        second.attach(callback)
    assert (second.listeners.callbacks, second.explain()) == ([], before)


@pytest.mark.parametrize(
    "make",
    [lambda: EarlyStopping("val_loss"), lambda: BestCheckpoint("val_loss")],
    ids=["EarlyStopping", "BestCheckpoint"],
)
def test_a_second_fold_cannot_go_on_with_the_callbacks_of_the_first(make: Callable[[], Callback]) -> None:
    """It would judge its own values by the best of the first fold, and restore the first fold's weights."""
    callbacks = [make()]
    first = make_trainer(*callbacks)
    first.fit(class_batches(4, 4), class_batches(4), epochs=2)
    with refused(ConfigurationError, "was attached to another engine before"):
        make_trainer(*callbacks)


def test_a_callback_is_refused_where_its_class_forgot_to_be_made() -> None:
    with refused(ConfigurationError, "callbacks holds the class Diary, not an instance."):
        Engine(callbacks=[Diary])  # type: ignore[list-item]  # the mistake


class Only(Callback):
    unique = True


class OnlyToo(Only):
    """Another class, though it derives from the first."""


def test_of_a_unique_class_an_engine_takes_only_one() -> None:
    engine = Engine(callbacks=[Only(), OnlyToo()])
    with refused(ConfigurationError, "The engine has a Only already.", "Attach only one."):
        engine.attach(Only())
    assert len(engine.listeners.callbacks) == 2


def test_of_another_class_an_engine_takes_several() -> None:
    engine = Engine(callbacks=[Diary(), Diary()])
    assert len(engine.listeners.callbacks) == 2


# Its state ------------------------------------------------------------------------------------------------


class Remembering(Callback):
    """Keeps a number, and writes down in which order it is asked and told."""

    def __init__(self, kept: int = 0) -> None:
        self.kept = kept
        self.moments: list[tuple[str, int]] = []

    def before_resume(self, state: dict[str, Any]) -> None:
        self.moments.append(("before_resume", state["kept"]))

    def on_fit_start(self, event: FitStart) -> None:
        self.moments.append(("on_fit_start", self.kept))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = state["kept"]
        self.moments.append(("load_state_dict", self.kept))

    def on_epoch_start(self, event: EpochStart) -> None:
        self.moments.append(("on_epoch_start", self.kept))

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept}


def remembering_run(directory: Path, callback: Callback, epochs: int) -> None:
    trainer = make_trainer(callback, RunCheckpoint(directory))
    trainer.fit(class_batches(4, 4), epochs=epochs, resume="auto")


def test_what_is_resumed_is_shown_before_the_run_begins_and_loaded_after(tmp_path: Path) -> None:
    first, second = Remembering(7), Remembering()
    remembering_run(tmp_path, first, epochs=1)
    remembering_run(tmp_path, second, epochs=2)
    assert first.moments == [("on_fit_start", 7), ("on_epoch_start", 7)]
    assert second.moments == [
        ("before_resume", 7), ("on_fit_start", 0), ("load_state_dict", 7), ("on_epoch_start", 7)
    ]  # fmt: skip


def test_a_callback_of_which_nothing_was_saved_is_shown_nothing(tmp_path: Path) -> None:
    remembering_run(tmp_path, Callback(), epochs=1)
    new = Remembering(3)
    remembering_run(tmp_path, new, epochs=2)
    assert new.moments == [("on_fit_start", 3), ("on_epoch_start", 3)]


def test_a_callback_without_a_state_of_its_own_saves_an_empty_one() -> None:
    assert Callback().state_dict() == {}


@pytest.mark.parametrize("hook", ["on_step_ended", "on_stepend", "on_steps_end"])
def test_a_misspelt_hook_is_refused_with_the_nearest_name(hook: str) -> None:
    callback = type("Mine", (Callback,), {hook: lambda self, event: None})()
    with refused(HandlerError, f'Mine.{hook} matches no event. Did you mean "on_step_end"? Hooks: on_fit_start'):
        Engine(callbacks=[callback])


@pytest.mark.parametrize(
    ("hook", "phrase"),
    [
        (lambda self: None, "takes no arguments, but a StepEnd handler receives the event"),
        (lambda self, event, step: None, "takes event, step, but a StepEnd handler receives the event"),
    ],
)
def test_a_hook_with_a_wrong_signature_is_refused_at_attachment(hook: Callable[..., Any], phrase: str) -> None:
    callback = type("Mine", (Callback,), {"on_step_end": hook})()
    with refused(HandlerError, phrase):
        Engine(callbacks=[callback])


def test_an_asynchronous_hook_is_refused_at_attachment() -> None:
    class Mine(Callback):
        async def on_step_end(self, event: StepEnd) -> None: ...  # type: ignore[override]  # the mistake

    with refused(HandlerError, "Mine.on_step_end() is async"):
        Engine(callbacks=[Mine()])
