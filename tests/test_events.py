"""The events: what each carries, what its filters count, and how an event of one's own joins them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
from helpers import class_batches, documented_events, make_trainer

import camshaft.engine
from camshaft.callbacks import Log
from camshaft.engine import Callback, Engine, EpochEnd, Event, FitEnd, Logged, StepEnd, ValidationEnd, at
from camshaft.engine.events import hook_name, known_events


@dataclass(frozen=True, slots=True)
class Surge(Event):
    loss: float


BUILT_IN: list[type[Event]] = [getattr(camshaft.engine, name) for name in documented_events()]


@pytest.mark.parametrize("event", BUILT_IN)
def test_an_event_is_a_frozen_dataclass_without_room_for_anything_else(event: type[Event]) -> None:
    assert dataclasses.is_dataclass(event)
    assert event.__dataclass_params__.frozen  # type: ignore[attr-defined]  # typeshed does not know it
    assert "__slots__" in vars(event)
    assert dataclasses.fields(event)[0].name == "engine"


@pytest.mark.parametrize("event", BUILT_IN)
def test_a_filter_counts_what_the_event_says_from_one_on(event: type[Event]) -> None:
    """In two runs, of which the second fails, every event comes with each number of its own counter."""
    trainer = make_trainer(Log(every=1))
    trainer.subscribe(Logged, lambda event: None)  # a log that nobody hears is refused
    heard: list[int] = []
    trainer.subscribe(event, lambda event: heard.append(getattr(trainer, event.counter)), when=at(2))

    def fail(event: EpochEnd) -> None:
        if trainer.num_fits == 2:
            raise ArithmeticError

    trainer.subscribe(EpochEnd, fail)
    trainer.fit(class_batches(4, 4), class_batches(4, 4), epochs=1)
    with pytest.raises(ArithmeticError):
        trainer.fit(class_batches(4, 4), class_batches(4, 4), epochs=1)
    assert set(heard) == {2}


def test_a_fact_can_not_be_changed() -> None:
    engine = Engine(lambda engine, batch: None)

    def change(event: EpochEnd) -> None:
        event.metrics = {}  # type: ignore[misc]  # the point

    engine.subscribe(EpochEnd, change)
    with pytest.raises(AttributeError):
        engine.fit([1], epochs=1)


def test_an_event_of_ones_own_reaches_functions_and_hooks() -> None:
    heard: list[float] = []

    class Alarm(Callback):
        def on_surge(self, event: Surge) -> None:
            heard.append(event.loss)

    engine = Engine(lambda engine, batch: engine.emit(Surge(engine, batch)), callbacks=[Alarm()])
    engine.subscribe(Surge, lambda event: heard.append(-event.loss))
    assert engine.listeners.hears(Surge)
    engine.fit([1.5], epochs=1)
    assert heard == [1.5, -1.5]


def test_hook_names_are_the_class_names_in_snake_case() -> None:
    assert hook_name(ValidationEnd) == "on_validation_end"
    assert known_events()["on_surge"] is Surge


@pytest.mark.parametrize("event", BUILT_IN)
def test_a_built_in_event_is_found_by_its_hook(event: type[Event]) -> None:
    assert known_events()[hook_name(event)] is event


def make_event() -> type[Event]:
    """Define the event again, as a notebook's cell does that runs twice."""

    @dataclass(frozen=True, slots=True)
    class Redefined(Event):
        pass

    return Redefined


def test_of_an_event_that_is_defined_twice_the_newest_counts() -> None:
    class Listening(Callback):
        def on_redefined(self, event: Event) -> None:
            heard.append(event)

    heard: list[Event] = []
    earlier, newest = make_event(), make_event()
    engine = Engine(lambda engine, batch: None, callbacks=[Listening()])
    engine.emit(earlier(engine))
    engine.emit(newest(engine))
    assert [type(event) for event in heard] == [newest]


def test_an_event_of_ones_own_counts_steps_unless_it_says_otherwise() -> None:
    assert Surge.counter == "step"
    heard: list[Any] = []
    engine = Engine(lambda engine, batch: engine.emit(Surge(engine, batch)))
    engine.subscribe(Surge, lambda event: heard.append(event.loss), when=at(2))
    engine.fit([0.5, 1.5, 2.5], epochs=1)
    assert heard == [1.5]


def test_the_end_of_a_run_carries_the_reason_of_its_history() -> None:
    reasons: list[str] = []
    engine = Engine(lambda engine, batch: None)
    engine.subscribe(FitEnd, lambda event: reasons.append(event.reason))
    engine.subscribe(StepEnd, lambda event: engine.stop("enough"), when=at(2))
    engine.fit([1, 2, 3], epochs=1)
    assert reasons == [engine.history.reason] == ["enough"]
