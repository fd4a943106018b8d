from __future__ import annotations

from typing import Any

import pytest

from camshaft.engine import ConfigurationError
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
