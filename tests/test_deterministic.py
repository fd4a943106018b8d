"""Deterministic operations for the length of a fit, and the settings put back after it."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import class_batches, make_trainer, run_python
from torch import Tensor

from camshaft.callbacks import Deterministic
from camshaft.engine import Engine, StepEnd

TRAIN = class_batches(8, 8)


@pytest.mark.parametrize("before", [(False, False), (True, True)])
@pytest.mark.parametrize("fails", [False, True])
def test_the_settings_hold_for_the_fit_and_are_put_back(before: tuple[bool, bool], fails: bool) -> None:
    seen: list[bool] = []
    trainer = make_trainer(Deterministic())

    def look(event: StepEnd) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        if fails:
            raise ArithmeticError

    trainer.subscribe(StepEnd, look)
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        if fails:
            with pytest.raises(ArithmeticError):
                trainer.fit(TRAIN, epochs=1)
        else:
            trainer.fit(TRAIN, epochs=1)
        after = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        assert after == before
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(seen) == {True}


def undecided(engine: Engine, batch: Tensor) -> None:
    """Scatters into a tensor in an order that torch does not fix."""
    torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)


@pytest.mark.parametrize("warn_only", [False, True])
def test_an_operation_that_is_not_is_named(warn_only: bool) -> None:
    engine = Engine(undecided, callbacks=[Deterministic(warn_only=warn_only)])
    if warn_only:
        with pytest.warns(UserWarning, match=r"put_"):
            engine.fit([torch.zeros(1)], epochs=1)
    else:
        with pytest.raises(RuntimeError, match=r"put_"):
            engine.fit([torch.zeros(1)], epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Engine(undecided).fit([torch.zeros(1)], epochs=1)


CUBLAS = """
import os
os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
from camshaft.callbacks import Deterministic
from camshaft.engine import Engine
Engine(lambda engine, batch: None, callbacks=[Deterministic()])
print(os.environ["CUBLAS_WORKSPACE_CONFIG"])
"""


def test_cublas_is_told_before_it_is_used() -> None:
    run = run_python(CUBLAS)
    assert run.stdout.strip() == ":4096:8", run.stderr
