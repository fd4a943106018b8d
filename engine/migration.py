"""Checkpoints of older formats, brought into the present one.

Each function takes the state of a format and returns that of the next. A file of each format so far is kept with the
tests, and is resumed there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .errors import CheckpointError
from .table import Table

FORMAT = 7


def migrated(state: Any) -> Any:
    """Return a state in the present format; what is not one at all is returned as it is.

    Raises:
        CheckpointError: if the format is newer, or is none.
        KeyError, TypeError, AttributeError, ValueError: if a state of an older format does not hold what it should.
    """
    if not isinstance(state, dict) or "format" not in state:
        return state
    if type(state["format"]) is not int or not 1 <= state["format"] <= FORMAT:
        raise CheckpointError(
            f"It has format {state['format']!r}, and this camshaft reads formats up to {FORMAT}. "
            "Use the version of camshaft that wrote it."
        )
    while state["format"] != FORMAT:
        number = state["format"]
        state = _STEPS[number](dict(state)) | {"format": number + 1}
    return state


def _from_1(state: dict[str, Any]) -> dict[str, Any]:
    """One window became one for each optimizer; the averages up to a mark came in; two handlers got a state."""
    state["update"] = {"optimizer": state["update"]}
    state["train"] = {"earlier": {}, **state["train"]}
    state["callbacks"] = _changed(
        state["callbacks"],
        {
            "Schedule": lambda _: {"total": 0, "updates": [0, 0]},
            "WeightAverage": lambda _: {"num_updates": state["counters"]["num_updates"]},
        },
    )
    return state


def _from_2(state: dict[str, Any]) -> dict[str, Any]:
    """A run got a state of its own, with its phase and its position in the data; a history is tables."""
    counters, data = dict(state["counters"]), state.pop("data")
    own = {name: counters.pop(name) for name in ("first_epoch", "first_step", "step_before_epoch", "stop_reason")}
    counters.pop("validated_step")
    is_open = counters.pop("epoch_is_open")
    generators = None
    if data is not None:
        data = dict(data)
        generators = data.pop("loader_now")
    run = {
        "plan": state.pop("plan"),
        **own,
        "phase": 1 if is_open else 0,
        "num_passes": 0,
        "num_validated": 0,
        "validation_was_cut": False,
        "last_validation": state.pop("newest"),
        "data": None if data is None else {"generators": generators, "pass": data if is_open else None},
    }
    history = {name: Table().pack(rows) for name, rows in state["history"].items()}
    return state | {"counters": counters, "run": run, "history": history}


def _from_3(state: dict[str, Any]) -> dict[str, Any]:
    """What each rank has of its own became a list; a loader's state has the epochs of its samplers, too."""
    run = state["run"] | {"epoch_length": None}
    if (data := run["data"]) is not None:
        position = data["pass"]
        if position is not None:
            rng = position["rng"]
            position = position | {"rng": rng | {"loader": {"generators": rng["loader"], "epochs": []}}}
        run["data"] = {"loader": {"generators": data["generators"], "epochs": []}, "pass": position}
    update = {
        name: one | {"window": [one["window"][0], *map(float, one["window"][1:])]}
        for name, one in state["update"].items()
    }
    return state | {"run": run, "update": update, "ranks": [{"rng": state.pop("rng"), "train": state.pop("train")}]}


def _from_4(state: dict[str, Any]) -> dict[str, Any]:
    """Batches can be left out, epochs ended early, sets have names; two handlers know more."""
    epoch = state["counters"]["epoch"]
    return state | {
        "run": state["run"] | {"ends_epoch_early": False, "num_skipped_batches": 0},
        "history": state["history"] | {"validation_sets": []},
        "callbacks": _changed(
            state["callbacks"],
            {
                "FreezeUntil": lambda one: {"learning": epoch if one["learns"] else 0},
                "StopOnNonFinite": lambda one: {
                    "read_at": one["read_at"],
                    "first": {
                        name: torch.where(flag, float(one["read_at"] + 1), math.inf)
                        for name, flag in one["flags"].items()
                    },
                },
            },
        ),
    }


def _from_5(state: dict[str, Any]) -> dict[str, Any]:
    """A handler can ask for a validation; a history has remarks."""
    return state | {
        "run": state["run"] | {"validation_was_asked": False},
        "history": state["history"] | {"remarks": []},
    }


def _from_6(state: dict[str, Any]) -> dict[str, Any]:
    """Each rank has a position in the data, which was the same on all: of data of their own, it was rank 0's alone."""
    run = dict(state["run"])
    if (data := run.pop("data")) is not None and data["pass"] is not None:
        data = data | {"pass": data["pass"] | {"has_ended": None}}
    return state | {"run": run, "ranks": [rank | {"data": data} for rank in state["ranks"]]}


_STEPS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: _from_1,
    2: _from_2,
    3: _from_3,
    4: _from_4,
    5: _from_5,
    6: _from_6,
}


def _changed(states: Mapping[str, Any], changes: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """Return the states of callbacks, those of some classes changed; a second of a class is named ``Class-2``."""
    return {
        name: changes[kind](one) if (kind := name.partition("-")[0]) in changes else one
        for name, one in states.items()
    }
