"""Who listens to an engine: handlers, scopes, and callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from helpers import class_batches, make_trainer, refused, regression

from camshaft.callbacks import ClipGradients, EarlyStopping, ProgressBar
from camshaft.engine import (
    Callback,
    ConfigurationError,
    Engine,
    Event,
    FitEnd,
    FitStart,
    HandlerError,
    StepEnd,
    at,
    every,
)


def idle(engine: Engine, batch: Any) -> None:
    """Do nothing with a batch."""


def no_op(event: Event) -> None:
    """Hear nothing."""


def test_explain_prints_events_in_firing_order_with_place_and_filter() -> None:
    engine = Engine(idle)
    engine.subscribe(FitEnd, no_op)
    engine.subscribe(StepEnd, no_op, when=every(100))
    engine.subscribe(StepEnd, print)
    line = no_op.__code__.co_firstlineno
    assert engine.explain().splitlines() == [
        "StepEnd",
        f"  1. no_op  every(n=100)  tests/test_listeners.py:{line}",
        "  2. print",
        "FitEnd",
        f"  1. no_op  tests/test_listeners.py:{line}",
    ]


def test_explain_counts_the_context_managers_of_each_scope() -> None:
    engine = Engine(idle)
    assert engine.explain() == "No event has a handler."
    engine.listeners.around("forward", nullcontext)
    engine.listeners.around("forward", nullcontext)
    assert engine.explain().splitlines()[-1] == "around forward: 2 context managers"


class Marked(Callback):
    """Writes its mark at the start of a run."""

    def __init__(self, mark: str, marks: list[str]) -> None:
        self.mark = mark
        self.marks = marks

    def on_fit_start(self, event: FitStart) -> None:
        self.marks.append(self.mark)


def test_callbacks_hear_in_the_order_in_which_they_were_attached() -> None:
    marks: list[str] = []
    engine = Engine(idle, callbacks=[Marked("c", marks), Marked("a", marks)])
    engine.attach(Marked("b", marks))
    engine.fit([1], epochs=1)
    assert marks == ["c", "a", "b"]
    assert [callback.mark for callback in engine.listeners.callbacks if isinstance(callback, Marked)] == marks


def test_a_callback_that_is_attached_during_a_run_hears_the_rest_of_it() -> None:
    steps: list[int] = []

    class Counting(Callback):
        def on_step_end(self, event: StepEnd) -> None:
            steps.append(event.engine.step)

    engine = Engine(idle)
    engine.subscribe(StepEnd, lambda event: engine.attach(Counting()), when=at(2))
    engine.fit([1, 2, 3, 4], epochs=1)
    assert steps == [3, 4]


def test_a_callback_whose_attachment_fails_is_not_among_those_of_the_engine() -> None:
    class Picky(Callback):
        def attach(self, engine: Engine) -> None:
            raise ConfigurationError("Not this one. Pass another.")

    engine = Engine(idle)
    with refused(ConfigurationError, "Not this one."):
        engine.attach(Picky())
    assert engine.listeners.callbacks == []


def test_one_channel_serves_an_event_however_it_is_asked_for() -> None:
    listeners = Engine(idle).listeners
    channel = listeners.channel(StepEnd)
    listeners.subscribe(StepEnd, no_op)
    assert listeners.channel(StepEnd) is channel
    assert len(channel.subscriptions) == 1


@pytest.mark.parametrize("event", [Event, int, "step_end"])
def test_what_is_no_event_class_has_no_channel(event: Any) -> None:
    with refused(HandlerError, "is not an event class"):
        Engine(idle).listeners.channel(event)


def test_an_event_is_heard_from_its_first_handler_to_the_cancelling_of_its_last() -> None:
    listeners = Engine(idle).listeners
    assert not listeners.hears(StepEnd)
    subscription = listeners.subscribe(StepEnd, no_op, every(1000))
    assert listeners.hears(StepEnd)
    subscription.cancel()
    assert not listeners.hears(StepEnd)


def noted(name: str, notes: list[str]) -> AbstractContextManager[None]:
    @contextmanager
    def manager() -> Iterator[None]:
        notes.append(f"+{name}")
        yield
        notes.append(f"-{name}")

    return manager()


def test_each_scope_is_entered_anew_around_each_of_its_kind() -> None:
    """One "fit" around all, a "forward" for every batch, an "evaluation" for every validation."""
    notes: list[str] = []
    trainer = make_trainer()
    for scope in ("fit", "epoch", "forward", "evaluation"):
        trainer.listeners.around(scope, partial(noted, scope, notes))
    trainer.fit(class_batches(4, 4), class_batches(4), epochs=1)
    forward = ["+forward", "-forward"]
    epoch = ["+epoch", *forward, *forward, "+evaluation", *forward, "-evaluation", "-epoch"]
    assert notes == ["+fit", *epoch, "-fit"]


def test_the_start_and_the_end_of_a_run_happen_inside_the_scope_of_the_fit() -> None:
    notes: list[str] = []
    engine = Engine(idle)
    engine.listeners.around("fit", partial(noted, "fit", notes))
    engine.subscribe(FitStart, lambda event: notes.append("start"))
    engine.subscribe(FitEnd, lambda event: notes.append("end"))
    engine.fit([1], epochs=1)
    assert notes == ["+fit", "start", "end", "-fit"]


def test_a_scope_without_managers_is_an_empty_context() -> None:
    with Engine(idle).scope("forward") as value:
        assert value is None


def test_after_the_counters_were_set_back_every_filter_is_asked_again() -> None:
    steps: list[int] = []
    engine = Engine(idle)
    engine.subscribe(StepEnd, lambda event: steps.append(engine.step), when=at(2))
    engine.fit([1, 2, 3], epochs=1)
    engine.step = 0
    engine.listeners.rewind()
    engine.fit([1, 2, 3], epochs=1)
    assert steps == [2, 2]


@pytest.mark.parametrize("make", [ProgressBar, partial(EarlyStopping, "val_loss"), partial(ClipGradients, 1.0)])
def test_one_callback_attached_twice_is_refused(make: Callable[[], Callback]) -> None:
    callback = make()
    with refused(ConfigurationError, f"{callback!r} is attached twice"):
        regression(callbacks=[callback, callback])


@pytest.mark.parametrize(("scope", "hint"), [("foward", 'Did you mean "forward"?'), ("step", "Write")])
def test_a_scope_that_does_not_exist_is_refused(scope: Any, hint: str) -> None:
    with refused(
        ConfigurationError, f'"{scope}" is not a scope.', hint, "Write one of: lock, fit, epoch, forward, evaluation"
    ):
        Engine().listeners.around(scope, lambda: torch.no_grad())


@pytest.mark.parametrize("manager", [nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)])
def test_a_context_manager_instead_of_a_function_that_makes_one_is_refused(manager: Any) -> None:
    with refused(ConfigurationError, "forward"):
        Engine().listeners.around(
            "forward", manager
        )  # one made beforehand serves once, but a scope is entered on each step
