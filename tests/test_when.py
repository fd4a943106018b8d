from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
from helpers import refused

from camshaft.engine import ConfigurationError, Engine, StepEnd, after, at, every, every_seconds, until
from camshaft.engine.when import NEVER, as_when


@pytest.mark.parametrize(
    ("filter_", "fires"),
    [(every(3), [3, 6, 9]), (at(4), [4]), (after(7), [8, 9, 10]), (until(2), [1, 2]), (every(1), [*range(1, 11)])],
)
def test_a_filter_fires_on_these_counts_and_next_due_never_skips_one(filter_: Any, fires: list[int]) -> None:
    assert [count for count in range(1, 11) if filter_(count)] == fires
    visited, count = [], 0
    while (count := filter_.next_due(count)) <= 10:
        visited.append(count)
    assert [count for count in visited if filter_(count)] == fires


def test_a_filter_that_is_past_is_never_due() -> None:
    assert at(4).next_due(4) == until(4).next_due(4) == NEVER


@pytest.mark.parametrize(("make", "bad"), [(every, 0), (every, -1), (every, 1.5), (every, True), (at, 0), (until, 0),
                                           (after, -1), (every, "3")])  # fmt: skip
def test_a_bad_number_is_refused_with_what_was_written(make: Any, bad: object) -> None:
    with pytest.raises(ConfigurationError, match=r"needs a whole number n >= \d, got " + make.__name__):
        make(bad)


@pytest.mark.parametrize("bad", [0, -1, float("nan"), "1"])
def test_bad_seconds_are_refused(bad: Any) -> None:
    with pytest.raises(ConfigurationError, match="needs s > 0"):
        every_seconds(bad)


def test_every_seconds_goes_by_the_clock() -> None:
    filter_ = as_when(every_seconds(0.05))
    assert not filter_(1)
    time.sleep(0.06)
    assert [filter_(2), filter_(3)] == [True, False]


def test_filters_print_as_they_are_written_and_compare_by_value() -> None:
    assert repr(every(100)) == "every(n=100)"
    assert every(2) != every(3)
    assert every(2) == every(2)


@pytest.mark.parametrize("bad", [5, "every(5)", every])
def test_what_is_no_filter_is_refused(bad: object) -> None:
    with pytest.raises(ConfigurationError, match="not a filter"):
        as_when(bad)


def test_a_function_of_the_count_is_a_filter() -> None:
    filter_ = as_when(lambda count: count % 2 == 1)
    assert [count for count in range(1, 6) if filter_(count)] == [1, 3, 5]


@pytest.mark.parametrize(
    ("make", "settings", "phrase"),
    [
        (every, {"n": 0}, "got every(0)"),
        (every, {"n": -3}, "got every(-3)"),
        (every, {"n": 1.5}, "got every(1.5)"),
        (every, {"n": "2"}, "got every('2')"),
        (every, {"n": True}, "got every(True)"),
        (at, {"n": 0}, "got at(0)"),
        (after, {"n": -1}, "got after(-1)"),
        (until, {"n": 0}, "got until(0)"),
        (every_seconds, {"seconds": 0}, "got every_seconds(0)"),
        (every_seconds, {"seconds": -1.0}, "got every_seconds(-1.0)"),
        (every_seconds, {"seconds": math.nan}, "got every_seconds(nan)"),
        (every_seconds, {"seconds": "1"}, "got every_seconds('1')"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_where_it_is_written(
    make: Callable[..., object], settings: dict[str, Any], phrase: str
) -> None:
    with refused(ConfigurationError, phrase):
        make(**settings)


@pytest.mark.parametrize(
    ("when", "phrase"),
    [
        (100, "when=100 is not a filter. Write every(100), at(100)"),
        (0.5, "when=0.5 is not a filter"),
        ("every 100", "when='every 100' is not a filter"),
        (every, "when=every is a class, not a filter. Write every(...)"),
        (lambda: True, "when="),
    ],
)
def test_a_when_that_is_no_filter_is_refused_at_subscription(when: Any, phrase: str) -> None:
    with refused(ConfigurationError, phrase):
        Engine().subscribe(StepEnd, print, when=when)
