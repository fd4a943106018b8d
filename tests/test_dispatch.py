from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
from helpers import pairs, refused, regression

from camshaft.engine import Callback, Engine, Event, FitStart, HandlerError, Settled, StepEnd, after, at, every, until


def idle(engine: Engine, batch: Any) -> None:
    """Do nothing with a batch."""


def test_handlers_run_in_the_order_they_were_attached() -> None:
    order: list[str] = []
    engine = Engine(idle)
    for name in "cab":

        def note(event: FitStart, name: str = name) -> None:
            order.append(name)

        engine.subscribe(FitStart, note)
    engine.fit([1], epochs=1)
    assert order == ["c", "a", "b"]


def test_a_handler_added_during_a_dispatch_waits_for_the_next() -> None:
    seen: list[int] = []

    def add(event: StepEnd) -> None:
        event.engine.subscribe(StepEnd, lambda event: seen.append(event.engine.step))

    engine = Engine(idle)
    engine.subscribe(StepEnd, add, when=until(1))
    engine.fit([1, 2, 3], epochs=1)
    assert seen == [2, 3]


def test_a_cancelled_handler_never_runs_again_not_even_in_this_dispatch() -> None:
    seen: list[int] = []
    engine = Engine(idle)

    def cancel(event: StepEnd) -> None:
        if event.engine.step == 2:
            later.cancel()

    def note(event: StepEnd) -> None:
        seen.append(event.engine.step)

    engine.subscribe(StepEnd, cancel)
    later = engine.subscribe(StepEnd, note)
    engine.fit([1, 2, 3], epochs=1)
    later.cancel()
    assert seen == [1]


def test_a_handler_that_cancels_itself_and_raises_is_named() -> None:
    engine = Engine(idle)

    def last_words(event: StepEnd) -> None:
        subscription.cancel()
        raise ValueError("enough")

    subscription = engine.subscribe(StepEnd, last_words)
    with pytest.raises(ValueError, match="enough") as caught:
        engine.fit([1], epochs=1)
    assert "last_words, a handler of StepEnd, at step 1" in caught.value.__notes__[0]


def test_cancelling_one_filtered_handler_leaves_the_other() -> None:
    seen: list[int] = []

    def note(event: StepEnd) -> None:
        seen.append(event.engine.step)

    engine = Engine(idle)
    first = engine.subscribe(StepEnd, note, when=every(2))
    engine.subscribe(StepEnd, note, when=every(3))
    first.cancel()
    engine.fit(range(6), epochs=1)
    assert seen == [3, 6]


def test_an_event_that_nobody_is_due_to_hear_is_not_even_built() -> None:
    built: list[int] = []
    engine = Engine(idle)
    engine.subscribe(StepEnd, lambda event: None, when=every(4))

    def profile(frame: FrameType, kind: str, argument: object) -> None:
        if kind == "call" and frame.f_code is StepEnd.__init__.__code__:
            built.append(engine.step)

    sys.setprofile(profile)
    try:
        engine.fit(range(9), epochs=1)
    finally:
        sys.setprofile(None)
    # The first step finds out when the filter is due, and so does each step after one at which it was.
    assert built == [1, 4, 5, 8, 9]


@pytest.mark.parametrize("when", [None, every(1), after(0), until(99), lambda count: True])
def test_a_filter_that_is_due_hears_every_event_at_that_count(when: object) -> None:
    """The last step of an epoch settles, and then the epoch does, at the same step."""
    heard: list[int] = []
    engine = Engine(idle)
    engine.subscribe(Settled, lambda event: heard.append(event.engine.step), when=when)
    engine.fit(range(2), epochs=2)
    assert heard == [1, 2, 2, 3, 4, 4]


def test_on_is_subscribe_as_a_decorator() -> None:
    engine = Engine(idle)
    seen: list[int] = []

    @engine.on(StepEnd, when=every(2))
    def note(event: StepEnd) -> None:
        seen.append(event.engine.step)

    engine.fit(range(4), epochs=1)
    assert seen == [2, 4]
    assert callable(note)


def no_argument() -> None:
    """Take nothing."""


def event_and_extra(event: Event, extra: int) -> None:
    """Take too much."""


async def awaited(event: Event) -> None:
    """Would never be awaited."""


@pytest.mark.parametrize("handler", [no_argument, event_and_extra, awaited, Callback, "text", 3])
def test_a_handler_that_could_not_be_called_is_refused_when_subscribed(handler: Any) -> None:
    with pytest.raises(HandlerError, match=r"Write \"def \w+\(event: StepEnd\)\"\."):
        Engine().subscribe(StepEnd, handler)


@pytest.mark.parametrize("handler", [functools.partial(event_and_extra, extra=1), lambda *events: None, [].append])
def test_anything_that_takes_one_event_is_a_handler(handler: Any) -> None:
    Engine().subscribe(StepEnd, handler)


@pytest.mark.parametrize("event", [Event, "StepEnd", int, None])
def test_what_is_no_event_is_refused(event: Any) -> None:
    with pytest.raises(HandlerError, match="is not an event class"):
        Engine().subscribe(event, lambda event: None)


def test_stop_iteration_in_a_handler_is_an_error_like_any_other() -> None:
    def fail(event: StepEnd) -> None:
        next(iter(()))

    engine = Engine(idle)
    engine.subscribe(StepEnd, fail)
    with pytest.raises((StopIteration, RuntimeError)):
        engine.fit([1, 2], epochs=1)
    assert engine.step == 1


def no_arguments() -> None: ...


def two_arguments(event: StepEnd, step: int) -> None: ...


def only_by_keyword(*, event: StepEnd) -> None: ...


async def asynchronous(event: StepEnd) -> None: ...


async def asynchronous_generator(event: StepEnd) -> Any:
    yield event


def generator(event: StepEnd) -> Iterator[StepEnd]:
    yield event


class AsynchronousObject:
    async def __call__(self, event: StepEnd) -> None: ...


@pytest.mark.parametrize(
    ("handler", "phrase"),
    [
        (no_arguments, "no_arguments() takes no arguments, but a StepEnd handler receives the event"),
        (two_arguments, "two_arguments() takes event, step, but"),
        (only_by_keyword, "only_by_keyword() takes event, but"),
        (asynchronous, "asynchronous() is async or a generator, so a call would not run it"),
        (asynchronous_generator, "asynchronous_generator() is async or a generator"),
        (AsynchronousObject(), "async"),
        (generator, "generator() is async or a generator"),
        (AsynchronousObject, "AsynchronousObject is not a function"),
        ("print", "'print' is not a function"),
        (None, "None is not a function"),
    ],
)
def test_a_handler_that_cannot_take_one_event_is_refused_at_subscription(handler: Any, phrase: str) -> None:
    with refused(HandlerError, phrase, "(event: StepEnd)"):
        Engine().subscribe(StepEnd, handler)


@pytest.mark.parametrize(
    ("event", "phrase"),
    [
        ("step_end", "'step_end' is not an event class"),
        (Event, "is not an event class"),
        (int, "is not an event class"),
        (None, "None is not an event class"),
        (FitStart(Engine()), "is one event, not a class of them. Write FitStart."),
    ],
)
def test_what_is_no_event_class_is_refused_at_subscription(event: Any, phrase: str) -> None:
    with refused(HandlerError, phrase):
        Engine().subscribe(event, print)


def test_on_without_its_event_is_refused() -> None:
    on: Any = Engine().on
    with refused(HandlerError, "is not an event class"):

        @on  # type: ignore[untyped-decorator]  # the mistake under test: @engine.on for @engine.on(StepEnd)
        def handler(event: StepEnd) -> None: ...


def test_an_error_in_a_handler_comes_out_with_handler_event_and_step() -> None:
    def explode(event: StepEnd) -> None:
        raise KeyError("my own mistake")

    trainer = regression()
    trainer.subscribe(StepEnd, explode, when=at(2))
    with pytest.raises(KeyError, match="my own mistake") as caught:
        trainer.fit(pairs(), epochs=1)
    notes = " ".join(caught.value.__notes__)
    assert re.search(r"explode, a handler of StepEnd, at step 2\.", notes)
    assert "At step 2, batch 2 of epoch 1." in notes


def num_calls_of(work: Callable[[], object]) -> int:
    """Return how many Python functions the work calls; resuming a generator is one, too."""
    num = 0

    def look(frame: FrameType, event: str, argument: object) -> None:
        nonlocal num
        num += event == "call"

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return num


@pytest.mark.parametrize("when", [None, every(3)])
def test_the_cost_of_subscriptions_grows_as_their_number(when: object) -> None:
    """A subscription and its end cost the same however many there are."""

    def subscribe_and_cancel(num: int) -> None:
        engine = Engine(idle)
        subscriptions = [engine.subscribe(StepEnd, print, when=when) for _ in range(num)]
        for subscription in subscriptions:
            subscription.cancel()

    costs = [num_calls_of(lambda num=num: subscribe_and_cancel(num)) for num in (0, 100, 400)]  # type: ignore[misc]
    assert costs[2] - costs[0] <= 4 * (costs[1] - costs[0])
