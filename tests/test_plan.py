from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from helpers import num_calls, pairs, refused, regression

from camshaft.engine import ConfigurationError, Engine, EpochEnd, EpochStart, Event, FitEnd, FitStart, StepEnd
from camshaft.engine.plan import Plan


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"epochs": -5}, {"epochs": 1.5}, {"epochs": "2"}, {"epochs": True}, {"max_steps": -1},
        {"epochs": 2, "min_epochs": 3}, {"epochs": 1, "epoch_length": 0}, {"epochs": 1, "validate_every": 0},
        {"epochs": 1, "validate_every": "often"}, {"epochs": 1, "validate_every": "0 steps"},
    ],
)  # fmt: skip
def test_a_plan_that_cannot_work_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"\. \w+"):
        Plan(**settings)


@pytest.mark.parametrize(
    ("settings", "interval"),
    [
        ({"epochs": 3}, (1, "epochs")),
        ({"epochs": 3, "validate_every": 2}, (2, "epochs")),
        ({"max_steps": 9, "validate_every": 3}, (3, "steps")),
        ({"epochs": 3, "validate_every": "1 step"}, (1, "steps")),
        ({"max_steps": 9, "validate_every": "2 epochs"}, (2, "epochs")),
    ],
)
def test_the_interval_is_in_the_runs_own_unit_unless_it_says_its_own(
    settings: dict[str, Any], interval: tuple[int, str]
) -> None:
    assert Plan(**settings).validation_interval() == interval


def test_a_limit_of_zero_is_a_limit() -> None:
    """Not the absence of one: a plan of no epochs does not reach further than one of two."""
    assert not Plan(epochs=0).reaches_further(epochs=2)
    assert Plan(epochs=2).reaches_further(epochs=0)
    assert not Plan(max_steps=0).reaches_further(max_steps=5)
    assert Plan(max_steps=None, epochs=1).reaches_further(epochs=1, max_steps=5)


PLANS: list[tuple[dict[str, Any], str]] = [
    ({"epochs": None}, "Neither epochs nor max_steps was given"),
    ({"epochs": -5}, "epochs is -5"),
    ({"epochs": 1.5}, "epochs is 1.5"),
    ({"epochs": "2"}, "epochs is '2'"),
    ({"epochs": True}, "epochs is True"),
    ({"epochs": math.inf}, "epochs is inf"),
    ({"max_steps": -1}, "max_steps is -1"),
    ({"max_steps": 10.0}, "max_steps is 10.0"),
    ({"min_epochs": -1}, "min_epochs is -1"),
    ({"min_epochs": 3}, "min_epochs=3 is more than epochs=2"),
    ({"min_epochs": None}, "min_epochs is None"),
    ({"epoch_length": 0}, "epoch_length is 0"),
    ({"epoch_length": 2.0}, "epoch_length is 2.0"),
    ({"validate_every": 0}, "validate_every is 0"),
    ({"validate_every": -1}, "validate_every is -1"),
    ({"validate_every": 0.5}, "validate_every is 0.5"),
    ({"validate_every": "0 steps"}, "validate_every is 0"),
    ({"validate_every": "5 minutes"}, "validate_every='5 minutes' is not an interval"),
    ({"validate_every": "often"}, "validate_every='often' is not an interval"),
    ({"validate_every": "1.5 epochs"}, "validate_every='1.5 epochs' is not an interval"),
]


@pytest.mark.parametrize(("plan", "phrase"), PLANS)
def test_a_plan_that_cannot_work_is_refused_before_the_run(plan: dict[str, Any], phrase: str) -> None:
    trainer = regression()
    with refused(ConfigurationError, phrase):
        trainer.fit(pairs(), pairs(), **({"epochs": 2} | plan))
    assert num_calls(trainer) == 0


@pytest.mark.parametrize("epochs", [-5, 1.5, "2", None])
def test_the_script_style_refuses_a_plan_before_the_first_epoch(epochs: Any) -> None:
    with refused(ConfigurationError, "epochs"):
        Engine().epochs(epochs)  # refused by the call, not by the first turn of a loop


def test_an_epoch_count_from_numpy_is_a_whole_number() -> None:
    trainer = regression()
    trainer.fit(pairs(), epochs=np.int64(2))  # type: ignore[arg-type]  # what a sweep over an array passes
    assert trainer.epoch == 2


@pytest.mark.parametrize("plan", [{"epochs": 0}, {"max_steps": 0}])
def test_no_epochs_fire_start_and_end_and_nothing_else(plan: dict[str, Any]) -> None:
    trainer = regression()
    fired: list[type[Event]] = []
    for event in (FitStart, EpochStart, StepEnd, EpochEnd, FitEnd):
        trainer.subscribe(event, lambda event: fired.append(type(event)))
    trainer.fit(pairs(), **plan)
    assert (fired, num_calls(trainer)) == ([FitStart, FitEnd], 0)


def test_an_interval_of_validations_needs_validation_data() -> None:
    trainer = regression()
    with refused(ConfigurationError, "validate_every='2 steps'", "without validation data"):
        trainer.fit(pairs(), epochs=1, validate_every="2 steps")
    assert num_calls(trainer) == 0
