"""The errors: what each is a kind of, and what checks and words its messages are made of."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refused

from camshaft.engine import (
    CamshaftError,
    CheckpointError,
    ConfigurationError,
    DataError,
    Engine,
    EngineStateError,
    HandlerError,
    MissingPackageError,
    can_take,
    did_you_mean,
    is_number,
    whole_number,
)

KINDS = [
    (ConfigurationError, ValueError),
    (HandlerError, ConfigurationError),
    (DataError, ValueError),
    (CheckpointError, RuntimeError),
    (EngineStateError, RuntimeError),
    (MissingPackageError, ImportError),
]


@pytest.mark.parametrize(("error", "kind"), KINDS)
def test_an_error_is_ours_and_of_a_kind_that_python_knows(error: type[Exception], kind: type[Exception]) -> None:
    assert issubclass(error, CamshaftError)
    assert issubclass(error, kind)


def test_every_error_is_in_the_list_above() -> None:
    ours = set(CamshaftError.__subclasses__()) | set(ConfigurationError.__subclasses__())
    assert ours == {error for error, _ in KINDS}


def test_whoever_catches_what_python_would_raise_catches_ours() -> None:
    with pytest.raises(ValueError, match="seed is -1"):
        Engine(seed=-1)


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("val_los", ["val_loss", "val_acc"], 'Did you mean "val_loss"? '),
        ("zebra", ["val_loss"], ""),
        ("val_loss", [], ""),
        ("mod", iter(["mode", "monitor"]), 'Did you mean "mode"? '),
    ],
)
def test_the_nearest_name_is_offered_if_one_is_near(name: str, known: Any, hint: str) -> None:
    assert did_you_mean(name, known) == hint


def one(a: object) -> None: ...
def one_or_two(a: object, b: object = None) -> None: ...
def only_by_name(*, a: object) -> None: ...


@pytest.mark.parametrize(
    ("function", "numbers"),
    [
        (one, {1}),
        (one_or_two, {1, 2}),
        (only_by_name, set()),
        (lambda *values: None, {0, 1, 2}),
        (min, {0, 1, 2}),  # it has no signature, so that anything may be
    ],
)
def test_a_function_takes_as_many_arguments_as_its_signature_says(function: Any, numbers: set[int]) -> None:
    assert {number for number in range(3) if can_take(function, number)} == numbers


@pytest.mark.parametrize("value", [0, -1, 0.5, 1e300])
def test_finite_numbers_are_numbers(value: object) -> None:
    assert is_number(value)


@pytest.mark.parametrize("value", [True, "1", None, math.nan, math.inf, -math.inf, 1j, torch.ones(()), [1]])
def test_what_is_no_finite_number_is_none(value: object) -> None:
    assert not is_number(value)


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3)])
def test_a_whole_number_of_any_library_becomes_an_int(value: object) -> None:
    number = whole_number("patience", value, least=3)
    assert (number, type(number)) == (3, int)


@pytest.mark.parametrize("value", [2, -1, 3.0, "3", True, None, math.nan])
def test_what_does_not_count_is_refused_by_its_name(value: object) -> None:
    with refused(ConfigurationError, f"patience is {value!r}, which is not a count.", "at least 3."):
        whole_number("patience", value, least=3)
