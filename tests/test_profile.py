"""Where the time goes: phases and handlers, in a table, a trace and in `explain`."""

from __future__ import annotations

import csv
import json
import logging
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import class_batches, make_trainer, refused
from torch import Tensor, nn

from camshaft.callbacks import Accumulate, Profile
from camshaft.engine import (
    Callback,
    ConfigurationError,
    Engine,
    EpochEnd,
    Event,
    LossReady,
    StepEnd,
    Trainer,
    ValidationEnd,
    at,
)

PAUSE = 0.02


class Slow(nn.Linear):
    """Takes a known time in its forward and in its backward, and in training alone."""

    def forward(self, inputs: Tensor) -> Tensor:
        time.sleep(PAUSE)
        output = super().forward(inputs)
        if self.training:
            output.register_hook(lambda gradient: time.sleep(2 * PAUSE))
        return output


class SlowSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        time.sleep(3 * PAUSE)
        super().step(closure)


class SlowData:
    def __init__(self, num: int) -> None:
        self.batches = class_batches(*[4] * num)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            time.sleep(4 * PAUSE)
            yield batch


def on_step_end(event: StepEnd) -> None:
    time.sleep(5 * PAUSE)


def slow_trainer(*callbacks: Callback) -> Engine:
    model = Slow(4, 3)
    return Trainer(model, SlowSGD(model.parameters(), 0.1), nn.CrossEntropyLoss(), callbacks=callbacks)


def table(directory: Path) -> dict[str, dict[str, float]]:
    with open(directory / "profile.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["name"]: {key: float(row[key]) for key in ("calls", "seconds", "ms_each", "share")} for row in rows}


def test_each_phase_and_each_handler_has_the_time_that_it_took(tmp_path: Path) -> None:
    trainer = slow_trainer(Profile(tmp_path))
    trainer.subscribe(StepEnd, on_step_end)
    trainer.fit(SlowData(4), SlowData(2), epochs=2)
    rows = table(tmp_path)
    pauses = {"forward": 1, "backward": 2, "update": 3, "data": 4, "on_step_end (StepEnd)": 5, "validation": 2 * 5}
    for name, times in pauses.items():
        row = rows[name]
        assert row["calls"] == (2 if name == "validation" else 8), name
        assert times * PAUSE <= row["seconds"] / row["calls"] < (times + 0.9) * PAUSE, (name, row)
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1, abs=0.02)
    assert rows["rest of the step"]["seconds"] < PAUSE, "the handlers of its end are not a part of it"


def test_with_accumulation_a_backward_is_a_backward_also_where_no_update_follows(tmp_path: Path) -> None:
    trainer = slow_trainer(Profile(tmp_path), Accumulate(batches=2))
    trainer.fit(class_batches(4, 4, 4, 4), epochs=1)
    rows = table(tmp_path)
    assert rows["backward"]["calls"] == 4
    assert rows["update"]["calls"] == 2
    assert 2 * PAUSE <= rows["backward"]["ms_each"] / 1e3 < 3 * PAUSE


class Mine(Event):
    """An event that a handler announces."""


def test_the_time_of_a_handler_within_another_counts_once(tmp_path: Path) -> None:
    trainer = make_trainer(Profile(tmp_path))

    def outer(event: StepEnd) -> None:
        time.sleep(PAUSE)
        event.engine.emit(Mine(event.engine))

    def inner(event: Mine) -> None:
        time.sleep(3 * PAUSE)

    trainer.subscribe(StepEnd, outer)
    trainer.subscribe(Mine, inner)
    trainer.fit(class_batches(4, 4, 4), epochs=1)
    rows = {re.sub(r".*\.", "", name): row for name, row in table(tmp_path).items()}
    assert PAUSE <= rows["outer (StepEnd)"]["ms_each"] / 1e3 < 2 * PAUSE
    assert 3 * PAUSE <= rows["inner (Mine)"]["ms_each"] / 1e3 < 4 * PAUSE
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1, abs=0.02)


def test_the_trace_has_the_spans_of_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    trainer = make_trainer(Profile(tmp_path, skip_steps=3, num_steps=2))
    seen: list[float] = []
    trainer.subscribe(StepEnd, lambda event: seen.append(time.perf_counter()))
    trainer.fit(class_batches(*[4] * 8), epochs=1)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [one for one in events if one["ph"] == "X"]
    assert [one["name"] for one in spans if one["tid"] == 1].count("forward") == 2
    assert [one["name"] for one in spans if "(StepEnd)" in one["name"]] != []
    assert all(one["dur"] >= 0 and one["ts"] >= 0 for one in spans)
    assert {one["args"]["name"] for one in events if one["ph"] == "M"} == {"loop", "handlers"}
    loop = sorted((one["ts"], one["ts"] + one["dur"]) for one in spans if one["tid"] == 1)
    assert all(end <= begin + 1e-3 for (_, end), (begin, _) in pairwise(loop)), "none overlap"


def test_torchs_profiler_runs_for_these_steps(tmp_path: Path) -> None:
    trainer = make_trainer(Profile(tmp_path, skip_steps=1, num_steps=2, torch_profiler=True))
    trainer.fit(class_batches(4, 4, 4, 4), epochs=1)
    names = [one.get("name") for one in json.loads((tmp_path / "trace_torch.json").read_text())["traceEvents"]]
    assert names.count("aten::cross_entropy_loss") == 2


def test_torchs_profiler_is_stopped_where_the_run_ends_or_fails_before(tmp_path: Path) -> None:
    trainer = make_trainer(Profile(tmp_path, skip_steps=0, torch_profiler=True))

    def fail(event: StepEnd) -> None:
        raise RuntimeError("no")

    trainer.subscribe(StepEnd, fail, when=at(2))
    with pytest.raises(RuntimeError, match="no"):
        trainer.fit(class_batches(4, 4, 4), epochs=1)
    assert (tmp_path / "trace_torch.json").exists()
    assert table(tmp_path)["forward"]["calls"] == 2
    with torch.profiler.profile():  # another one can run
        pass


def test_explain_shows_the_times_in_the_order_of_the_handlers(tmp_path: Path) -> None:
    trainer = slow_trainer(Profile(tmp_path))
    trainer.subscribe(StepEnd, on_step_end)
    trainer.subscribe(EpochEnd, print, when=at(100))
    trainer.fit(class_batches(4, 4), epochs=1)
    line = next(line for line in trainer.explain(times=True).splitlines() if "on_step_end" in line)
    assert re.search(r"2 calls, 10\d(\.\d+)? ms each, 0\.2\d* s$", line), line
    assert "print" in trainer.explain(times=True)
    assert "calls" not in trainer.explain()
    with refused(ConfigurationError, "The handlers are not timed", "Attach Profile()"):
        make_trainer().explain(times=True)


def test_a_handler_that_is_attached_during_the_run_or_cancelled_is_timed_or_not(tmp_path: Path) -> None:
    trainer = make_trainer(Profile(tmp_path))
    calls: list[str] = []

    def late(event: ValidationEnd) -> None:
        calls.append("late")

    early = trainer.subscribe(LossReady, lambda event: calls.append("early"))
    early.cancel()
    trainer.subscribe(StepEnd, lambda event: trainer.subscribe(ValidationEnd, late), when=at(1))
    trainer.fit(class_batches(4, 4), class_batches(4), epochs=2)
    assert calls == ["late", "late"]
    assert table(tmp_path)[f"{late.__qualname__.replace('<locals>.', '')} (ValidationEnd)"]["calls"] == 2


def test_what_a_handler_returns_still_counts(tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [Profile(tmp_path)]):
        trainer = make_trainer(*callbacks)
        trainer.subscribe(LossReady, lambda event: event.loss * 2)
        trainer.fit(class_batches(4, 4), epochs=2)
        weights.append(trainer.parts["model"].weight.detach().clone())
    assert torch.equal(*weights)


def test_the_table_is_logged_with_the_most_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        slow_trainer(Profile(tmp_path)).fit(class_batches(4, 4), epochs=1)
    (said,) = [record.getMessage() for record in caplog.records if "of the run went" in record.getMessage()]
    lines = said.splitlines()
    assert lines[2].startswith("update ")
    assert lines[3].startswith("backward ")


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with refused(ConfigurationError, "num_steps is 0"):
        Profile(num_steps=0)
    with refused(ConfigurationError, "skip_steps is -1"):
        Profile(skip_steps=-1)
    trainer = make_trainer(Profile())
    with pytest.raises(ConfigurationError, match="Profile has nowhere to write"):
        trainer.fit(class_batches(4), epochs=1)
    assert trainer.step == 0
    with refused(ConfigurationError, "The engine has a Profile already"):
        make_trainer(Profile(tmp_path), Profile(tmp_path))
