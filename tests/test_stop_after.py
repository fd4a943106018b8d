"""A run ends after the step with which its time is over, also one that was resumed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from helpers import refused, run_python
from ranks import on_ranks

from camshaft.callbacks import Distributed, RunCheckpoint, StopAfter
from camshaft.engine import Callback, ConfigurationError, Engine

PAUSE = 0.02


def engine_of(*callbacks: Callback, **options: Any) -> Engine:
    """Each of its steps takes a known time at least."""
    return Engine(lambda engine, batch: time.sleep(PAUSE), callbacks=callbacks, **options)


def test_a_run_ends_after_the_step_with_which_its_time_is_over() -> None:
    engine = engine_of(StopAfter(seconds=5 * PAUSE))
    began = time.monotonic()
    history = engine.fit([0] * 1000, epochs=10)
    assert time.monotonic() - began >= 5 * PAUSE
    assert 1 <= engine.step <= 5
    assert history.reason == f"StopAfter: {5 * PAUSE:g} s are over"
    assert len(history.rows) == 1, "the epoch was ended"


def test_units_are_added_up_and_a_longer_time_than_the_run_needs_changes_nothing() -> None:
    stop = StopAfter(hours=0.5, minutes=1, seconds=2)
    assert stop.limit == 1862
    engine = engine_of(stop)
    assert engine.fit([0] * 3, epochs=1).reason == "1 epoch done"


def test_a_resumed_run_has_what_the_earlier_one_has_left(tmp_path: Path) -> None:
    """The time between them does not count."""
    first = engine_of(StopAfter(seconds=60), RunCheckpoint(tmp_path, every_steps=1))
    first.fit([0] * 10, epochs=1)
    time.sleep(10 * PAUSE)
    second = engine_of(stop := StopAfter(seconds=14 * PAUSE), RunCheckpoint(tmp_path, every_steps=1))
    second.fit([0] * 1000, epochs=5, resume="auto")
    assert "are over" in second.history.reason
    assert 10 < second.step <= 14
    assert stop.state_dict()["spent"] >= 14 * PAUSE


def test_each_fit_has_the_whole_time() -> None:
    engine = engine_of(StopAfter(seconds=4 * PAUSE))
    steps = []
    for _ in range(2):
        engine.fit([0] * 1000, epochs=1)
        steps.append(engine.step)
    assert steps[1] > steps[0]


def test_min_epochs_come_first_and_are_said_once_in_an_epoch(caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of(StopAfter(seconds=PAUSE))
    with caplog.at_level("INFO"):
        engine.fit([0] * 4, epochs=9, min_epochs=3)
    assert engine.epoch == 3
    assert caplog.text.count("Training continues until min_epochs=3") <= 4


@pytest.mark.parametrize(
    "setting", [{}, {"hours": -1}, {"seconds": "60"}, {"minutes": float("inf")}, {"seconds": float("nan")}]
)
def test_what_is_no_time_is_refused(setting: dict[str, Any]) -> None:
    with refused(ConfigurationError, "StopAfter"):
        StopAfter(**setting)


def stop_on_ranks() -> int:
    engine = engine_of(Distributed(), StopAfter(seconds=4 * PAUSE), seed=0)
    import torch

    engine.fit([torch.zeros(2)] * 1000, epochs=1)
    return engine.step


def test_on_several_ranks_all_end_after_one_step() -> None:
    first, second = on_ranks(2, stop_on_ranks)
    assert first == second < 1000


def test_it_works_in_a_script(tmp_path: Path) -> None:
    script = """
import time
from camshaft.callbacks import StopAfter
from camshaft.engine import Engine
engine = Engine(callbacks=[StopAfter(seconds=0.1)])
for epoch in engine.epochs(1000):
    for batch in engine.train([0] * 4):
        time.sleep(0.02)
assert epoch < 4, epoch
"""
    run = run_python(script)
    assert run.returncode == 0, run.stderr
