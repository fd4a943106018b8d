"""Every event of a run, in order and with the counters, is what the files tests/data/timeline_*.txt say.

``python tests/test_timeline.py`` updates the files.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from helpers import Batch, check_golden, class_batches, documented_events, linear, write_golden
from torch import Tensor, nn

import camshaft.engine
from camshaft.callbacks import Accumulate, Log
from camshaft.engine import Engine, Event, FitEnd, StepEnd, Trainer, ValidationStepEnd, at


@dataclass(frozen=True)
class Case:
    """What happens in a run of 2 epochs, each of 5 batches for training and 2 for validation.

    Args:
        validate_every: how many steps there are between validations; None validates at the end of each epoch.
        window: batches per update.
        log_every: how many steps there are between the rows of a `Log`; None for no such.
        signal_at: the event in which a SIGTERM comes, and at which count of that event's counter.
        bad_batch: the training batch for which the step raises.
    """

    validate_every: int | None = None
    window: int = 1
    log_every: int | None = None
    signal_at: tuple[type[Event], int] | None = None
    bad_batch: int | None = None


CASES = {
    "validation_by_epochs": Case(),
    "validation_by_steps": Case(validate_every=2),
    "accumulation": Case(window=2),
    "log": Case(log_every=2),
    "signal_in_training": Case(window=2, signal_at=(StepEnd, 8)),
    "signal_in_validation": Case(validate_every=2, signal_at=(ValidationStepEnd, 1)),
    "failure": Case(bad_batch=3),
}
STYLES = ("script", "function", "class")
# In a script a validation within a step is finished after a signal, and the engine does not see what the loop raises.
OTHERWISE_IN_A_SCRIPT = {"signal_in_validation", "failure"}
COUNTERS = {
    "epoch": 1, "step": 2, "epoch_step": 1, "stage": 5, "validation_step": 1, "num_updates": 2, "num_validations": 1,
}  # fmt: skip

RUNS = [(style, name) for style in STYLES for name in CASES]
every_run = pytest.mark.parametrize(("style", "name"), RUNS)


@every_run
def test_a_run_announces_the_events_that_its_file_holds(style: str, name: str) -> None:
    """The styles share a file: one that departs from the others is at fault, which no update of the file mends."""
    check_golden(file_name(style, name), text(style, name), update="python tests/test_timeline.py")


@every_run
def test_up_to_each_settled_moment_the_events_come_in_the_documented_order(style: str, name: str) -> None:
    order = documented_events()
    for events in up_to_each_settled(timeline(style, name)):
        assert events == sorted(events, key=order.index)


def test_the_runs_have_every_documented_event_between_them() -> None:
    heard = {line.split()[0] for style, name in RUNS for line in timeline(style, name)}
    assert heard == set(documented_events())


def up_to_each_settled(lines: tuple[str, ...]) -> Iterator[list[str]]:
    """The different events up to each Settled, and those after the last.

    The BatchReady of a validation is left out, because it comes after ValidationStart and the table has it only once.
    """
    events: dict[str, None] = {}
    for line in lines:
        event = line.split()[0]
        if not (event == "BatchReady" and "stage=val" in line):
            events[event] = None
        if event == "Settled":
            yield list(events)
            events.clear()
    yield list(events)


def file_name(style: str, name: str) -> str:
    own = style == "script" and name in OTHERWISE_IN_A_SCRIPT
    return f"timeline_{name}_in_a_script.txt" if own else f"timeline_{name}.txt"


def text(style: str, name: str) -> str:
    return "\n".join(timeline(style, name)) + "\n"


@cache
def timeline(style: str, name: str) -> tuple[str, ...]:
    """Make the run in this style, and return a line for each event."""
    case = CASES[name]
    lines: list[str] = []
    engine = make_engine(style, case)
    for event_name in documented_events():
        engine.subscribe(getattr(camshaft.engine, event_name), lambda event: lines.append(line_of(event)))
    if case.log_every is not None:  # after those that listen: what it announces comes within a StepEnd
        engine.attach(Log(every=case.log_every))
    if case.signal_at is not None:
        event_type, count = case.signal_at
        engine.subscribe(event_type, lambda event: os.kill(os.getpid(), signal.SIGTERM), at(count))
    with contextlib.suppress(ArithmeticError):
        run(style, engine, case)
    return tuple(lines)


def line_of(event: Event) -> str:
    """The event with the counters at that moment; ``stage=-`` is between the stages."""
    engine = event.engine
    values = {name: str(engine.current.name or "-" if name == "stage" else getattr(engine, name)) for name in COUNTERS}
    counters = [f"{name}={values[name]:<{width}}" for name, width in COUNTERS.items()]
    reason = f"reason: {event.reason}" if isinstance(event, FitEnd) else ""
    return " ".join([f"{type(event).__name__:<17}", *counters, reason]).rstrip()


class Picky(nn.Module):
    """A linear model that raises for a batch with NaN in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.isnan().any():
            raise ArithmeticError("NaN in the inputs")
        output: Tensor = self.layer(inputs)
        return output


def make_engine(style: str, case: Case) -> Engine:
    model, loss_fn = Picky(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callbacks = [Accumulate(batches=case.window)] if case.window > 1 else []
    if style == "class":
        return Trainer(model, optimizer, loss_fn, callbacks=callbacks)
    own_step = step if style == "function" else None
    return Engine(own_step, callbacks=callbacks, model=model, optimizer=optimizer, loss_fn=loss_fn)


def step(engine: Engine, batch: Batch) -> dict[str, Tensor]:
    inputs, target = batch
    loss: Tensor = engine.parts["loss_fn"](engine.parts["model"](inputs), target)
    if engine.training:
        engine.update(loss)
    return {"loss": loss}


def run(style: str, engine: Engine, case: Case) -> None:
    train, val = class_batches(4, 4, 4, 4, 2), class_batches(4, 2, seed=1)
    if case.bad_batch is not None:
        train[case.bad_batch - 1][0].fill_(torch.nan)
    if style == "script":
        run_script_style(engine, case, train, val)
    else:
        engine.fit(train, val, epochs=2, validate_every=case.validate_every and f"{case.validate_every} steps")


def run_script_style(engine: Engine, case: Case, train: list[Batch], val: list[Batch]) -> None:
    for _ in engine.epochs(2):
        for batch in engine.train(train):
            engine.record(loss=step(engine, batch)["loss"])
            if case.validate_every is not None and engine.step % case.validate_every == 0:
                validate(engine, val)
        if case.validate_every is None:
            validate(engine, val)


def validate(engine: Engine, val: list[Batch]) -> None:
    for batch in engine.validate(val):
        engine.record(loss=step(engine, batch)["loss"])


def write_files() -> None:
    texts: dict[str, str] = {}
    for style, name in RUNS:
        file, now = file_name(style, name), text(style, name)
        if texts.setdefault(file, now) != now:
            raise SystemExit(
                f"tests/data/{file} is for several styles, and the {style} style departs from the others."
            )
    for file, now in texts.items():
        write_golden(file, now)


if __name__ == "__main__":
    write_files()
