"""A signal at every event: whatever the run was doing when it came, the resumed run ends as if it had never come.

Each case cuts a small training by a real SIGTERM at one occurrence of one event and resumes it with a fresh engine, in
some cases cutting it once more, until it ends by itself. The weights, the optimizer, the history and the counters must
then be those of the run that was left alone, to the bit, and all the runs of the case together must have announced
every epoch, step, update and validation once, in the same order.

The fast suite takes a sample of the cases; the slow tests take all of them. ``pytest -rP`` shows how many there are.
"""

from __future__ import annotations

import itertools
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import Batch, class_batches
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from camshaft.callbacks import Accumulate, RunCheckpoint
from camshaft.engine import (
    BatchReady,
    Callback,
    Engine,
    EpochEnd,
    EpochStart,
    Event,
    FitEnd,
    FitStart,
    GradientsReady,
    LossReady,
    Settled,
    StepEnd,
    Trainer,
    UpdateEnd,
    ValidationEnd,
    ValidationStart,
    ValidationStepEnd,
    repeat,
)

EVENTS: tuple[type[Event], ...] = (
    FitStart, EpochStart, BatchReady, LossReady, GradientsReady, UpdateEnd, StepEnd, ValidationStart,
    ValidationStepEnd, ValidationEnd, EpochEnd, Settled, FitEnd,
)  # fmt: skip
NEVER_AGAIN = {
    "EpochStart", "BatchReady", "LossReady", "GradientsReady", "UpdateEnd", "StepEnd", "ValidationEnd", "EpochEnd",
}  # fmt: skip
OF_A_VALIDATION = {"ValidationStart", "ValidationStepEnd"}
MOST_RUNS = 6  # that a case may take: two of them are cut
SAMPLE = 19  # the fast suite takes every 19th case; it has no divisor in common with what alternates between them


# What is trained --------------------------------------------------------------------------------------------


def loader() -> DataLoader[Any]:
    """13 samples in 5 batches, the last of one sample."""
    inputs, targets = (torch.cat(tensors) for tensors in zip(*class_batches(6, 7), strict=True))
    return DataLoader(TensorDataset(inputs, targets), batch_size=3, shuffle=True)


def small_loader() -> DataLoader[Any]:
    """11 samples in 4 batches."""
    inputs, targets = (torch.cat(tensors) for tensors in zip(*class_batches(6, 5), strict=True))
    return DataLoader(TensorDataset(inputs, targets), batch_size=3, shuffle=True)


DATA: dict[str, Callable[[], Any]] = {
    "list": lambda: class_batches(3, 2, 3, 2, 3),
    "small list": lambda: class_batches(3, 2, 3, 2),
    "long list": lambda: class_batches(3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3),  # longer than the run
    "repeated list": lambda: repeat(class_batches(3, 2, 3)),
    "function": lambda: lambda: iter(class_batches(3, 2, 3, 2)),
    "loader": loader,
    "small loader": small_loader,
}


@dataclass(frozen=True)
class Configuration:
    """One way to train.

    ``style`` is "script", "function" or "class". A script validates in its training loop's body, ``within`` every n-th
    step of an epoch, and ``after`` the loop in every n-th epoch; the others have ``validate_every``.
    """

    style: str
    data: str = "list"
    seed: int | None = None
    epochs: int | None = 2
    max_steps: int | None = None
    epoch_length: int | None = None
    validates: bool = True
    validate_every: int | str | None = None
    within: int = 0
    after: int = 1
    window: int = 1
    every_steps: int | None = None
    every_epochs: int | None = None

    def __str__(self) -> str:
        special = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        return ", ".join([self.style, *(f"{name}={getattr(self, name)}" for name in special if name != "style")])

    @property
    def only_within(self) -> bool:
        """Whether every validation is part of a step, so that none is ever cut short."""
        return self.style == "script" and self.within > 0 and not self.after


def fitted(style: str) -> list[Configuration]:
    """What ``fit`` can be asked for, with a step function or with a trainer."""
    settings: list[dict[str, Any]] = [
        {},
        {"data": "loader", "validate_every": "2 steps", "every_steps": 2},
        {"data": "loader", "seed": 11, "validate_every": "3 steps", "every_steps": 2},
        {"data": "loader", "seed": 11},
        {"data": "small loader", "validate_every": "2 steps", "every_steps": 5},
        {"data": "small loader", "validate_every": "3 steps"},
        {"data": "small list", "epochs": 3, "validate_every": "2 epochs", "every_epochs": 2},
        {"data": "function", "validate_every": "3 steps", "every_steps": 5},
        {"validates": False},
        {"data": "loader", "validates": False, "every_steps": 2},
        {"data": "long list", "epoch_length": 5, "validate_every": "2 steps"},
        {"data": "long list", "epoch_length": 4, "every_steps": 5},
        {"data": "repeated list", "epoch_length": 4},
        {"data": "repeated list", "epoch_length": 5, "validate_every": "3 steps", "every_steps": 2},
        {"data": "small loader", "epochs": None, "max_steps": 7},
        {"data": "small loader", "epochs": None, "max_steps": 7, "validate_every": 3, "every_steps": 2},
        {"data": "small list", "epochs": 3, "max_steps": 7, "validate_every": "2 steps"},
        {"data": "repeated list", "epochs": None, "max_steps": 8, "epoch_length": 4, "every_steps": 5},
        {"window": 2},
        {"window": 2, "validates": False, "every_steps": 2},
        {"data": "loader", "window": 2, "validate_every": "2 steps", "every_steps": 2},
        {"data": "loader", "seed": 11, "window": 2, "validate_every": "3 steps"},
        {"data": "small list", "epochs": 3, "max_steps": 7, "window": 2, "every_steps": 5},
        {"data": "repeated list", "epoch_length": 5, "window": 2, "validate_every": "2 steps"},
        {"data": "loader", "epochs": 3, "window": 2, "validate_every": "2 epochs", "every_epochs": 2},
    ]
    return [Configuration(style, **setting) for setting in settings]


def scripted() -> list[Configuration]:
    """What loops of one's own can be like."""
    settings: list[dict[str, Any]] = [
        {},
        {"data": "loader", "every_steps": 2},
        {"data": "loader", "seed": 11},
        {"data": "small loader", "max_steps": 7},
        {"data": "small list", "epochs": None, "max_steps": 7, "every_steps": 5},
        {"data": "small list", "epochs": 3, "after": 2, "every_epochs": 2},
        {"data": "function"},
        {"after": 0},
        {"data": "loader", "after": 0, "every_steps": 2},
        {"within": 2, "after": 0},
        {"data": "small list", "within": 2, "after": 0},
        {"data": "small loader", "within": 2, "after": 0, "every_steps": 5},
        {"data": "loader", "seed": 11, "within": 2, "after": 0, "every_steps": 2},
        {"data": "small loader", "max_steps": 7, "within": 2, "after": 0},
        {"data": "loader", "within": 2},
        {"within": 2, "every_steps": 2},
        {"window": 2},
        {"window": 2, "after": 0, "every_steps": 2},
        {"data": "loader", "window": 2, "every_steps": 2},
        {"data": "loader", "window": 2, "within": 2, "after": 0},
        {"data": "loader", "seed": 11, "window": 2, "within": 2, "every_steps": 2},
        {"data": "small loader", "epochs": None, "max_steps": 7, "window": 2},
    ]
    return [Configuration("script", **setting) for setting in settings]


CONFIGURATIONS = [*scripted(), *fitted("function"), *fitted("class")]


def build(configuration: Configuration) -> Engine:
    """A model in which the order of the batches and the random numbers show: it has dropout and momentum."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 3))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    callbacks: list[Callback] = []
    if configuration.window > 1:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        callbacks = [Accumulate(batches=configuration.window)]
    settings: dict[str, Any] = {"callbacks": callbacks, "seed": configuration.seed}
    if configuration.style == "class":
        return Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics={"hits": hits}, **settings)
    step = one_step if configuration.style == "function" else None
    return Engine(step, model=model, optimizer=optimizer, **settings)


def hits(output: Tensor, target: Tensor) -> Tensor:
    """The share of right answers: a metric, which has a state of its own."""
    return (output.argmax(dim=1) == target).float().mean()


def loss_of(engine: Engine, batch: Batch) -> Tensor:
    """The loss on one batch."""
    inputs, target = batch
    return nn.functional.cross_entropy(engine.parts["model"](inputs), target)


def one_step(engine: Engine, batch: Batch) -> dict[str, Tensor]:
    """The step of the function style."""
    loss = loss_of(engine, batch)
    if engine.training:
        engine.update(loss)
    return {"loss": loss}


def train(engine: Engine, configuration: Configuration, resume: str | None) -> None:
    """Run the training, or the rest of it."""
    data, val = DATA[configuration.data](), class_batches(2, 3, 2, seed=2)
    if configuration.style == "script":
        script(engine, configuration, resume, data, val)
        return
    engine.fit(
        data,
        val if configuration.validates else None,
        epochs=configuration.epochs,
        max_steps=configuration.max_steps,
        epoch_length=configuration.epoch_length,
        validate_every=configuration.validate_every,
        resume=resume,
    )


def script(engine: Engine, configuration: Configuration, resume: str | None, data: Any, val: list[Batch]) -> None:
    """The script style: two loops of one's own."""
    for epoch in engine.epochs(configuration.epochs, max_steps=configuration.max_steps, resume=resume):
        for batch in engine.train(data):
            loss = loss_of(engine, batch)
            engine.update(loss)
            engine.record(loss=loss)
            if configuration.within and engine.epoch_step % configuration.within == 0:
                validate(engine, val)
        if configuration.after and epoch % configuration.after == 0:
            validate(engine, val)


def validate(engine: Engine, val: list[Batch]) -> None:
    """The script's validation."""
    for batch in engine.validate(val):
        engine.record(loss=loss_of(engine, batch))


# What happens -----------------------------------------------------------------------------------------------


class Moment(NamedTuple):
    """An event that was heard, and where the run stood."""

    event: str
    epoch: int
    step: int
    stage: str


class Attempt:
    """An engine that runs once, as a process would: to the end, or until a signal cuts it.

    ``heard`` is all that it announced; of these moments, ``num_before_signal`` came before the signal was sent.
    """

    def __init__(self, configuration: Configuration, torch_seed: int) -> None:
        torch.manual_seed(torch_seed)
        self.configuration = configuration
        self.engine = build(configuration)
        self.heard: list[Moment] = []
        self.num_before_signal: int | None = None
        for event in EVENTS:
            self.engine.subscribe(event, self._hear)

    def run(self, resume: str | None = None) -> None:
        """Run, or resume."""
        train(self.engine, self.configuration, resume)

    def send_signal_at(self, event: type[Event], count: int) -> None:
        """Have a real SIGTERM sent at the ``count``-th such event."""
        occurrences = itertools.count(1)

        def send(event: Event) -> None:
            if next(occurrences) == count:
                self.num_before_signal = len(self.heard)
                os.kill(os.getpid(), signal.SIGTERM)

        self.engine.subscribe(event, send)

    def refuse_to_pass(self, goal: Engine) -> None:
        """Make a run fail that continues long after its end, and might continue for ever."""

        def check(event: Event) -> None:
            for counter in ("epoch", "step", "num_validations"):
                if getattr(self.engine, counter) > getattr(goal, counter) + 3:
                    raise RuntimeError(f"the run went on past its end: {counter} {getattr(self.engine, counter)}")

        for event in (EpochStart, BatchReady):
            self.engine.subscribe(event, check)

    def outcome(self) -> dict[str, Any]:
        """Return all that a resumed run must have in common with one that was left alone."""
        engine, history = self.engine, self.engine.history
        counters = {name: getattr(engine, name) for name in ("epoch", "step", "num_updates", "num_validations")}
        states = {name: engine.parts[name].state_dict() for name in ("model", "optimizer")}
        return {
            **states, **counters, "rows": history.rows, "validations": history.validations, "reason": history.reason,
        }  # fmt: skip

    def _hear(self, event: Event) -> None:
        self.heard.append(Moment(type(event).__name__, self.engine.epoch, self.engine.step, self.engine.current.name))


@cache
def left_alone(configuration: Configuration) -> Attempt:
    """The run that nothing cuts."""
    attempt = Attempt(configuration, torch_seed=3)
    attempt.run()
    return attempt


# The cases --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Where a signal is sent.

    ``again`` is the event at whose first occurrence a second one is sent, to the first resumed run. ``first`` tells
    whether the handler that sends them runs before those of `RunCheckpoint`, or after them.
    """

    configuration: Configuration
    event: type[Event]
    count: int
    again: type[Event] | None
    first: bool

    def __str__(self) -> str:
        again = "" if self.again is None else f", again at the resumed run's first {self.again.__name__}"
        where = "before" if self.first else "after"
        return f"SIGTERM at {self.event.__name__} {self.count}{again}, {where} RunCheckpoint's handlers"


@cache
def all_cases() -> list[Case]:
    """Return every case; a second signal, and which handler is first, alternate from case to case."""
    cases: list[Case] = []
    for configuration in CONFIGURATIONS:
        for event in EVENTS:
            for count in counts(left_alone(configuration).heard, event):
                again = (None, event, FitStart)[len(cases) % 3]
                cases.append(Case(configuration, event, count, again, first=len(cases) // 3 % 2 == 0))
    return cases


def counts(heard: list[Moment], event: type[Event]) -> list[int]:
    """Return which occurrences to try: the first, a middle one, the last ones of the first epoch, and the last."""
    moments = [moment for moment in heard if moment.event == event.__name__]
    if not moments:
        return []
    in_first_epoch = [count for count, moment in enumerate(moments, start=1) if moment.epoch <= 1]
    in_training = [count for count in in_first_epoch if moments[count - 1].stage != "val"]
    return sorted({1, (len(moments) + 1) // 2, *in_training[-1:], *in_first_epoch[-1:], len(moments)})


def mismatches(cases: Iterable[Case], directory: Path) -> list[str]:
    """Run the cases, and return what is wrong with which."""
    found: list[str] = []
    for case in cases:
        with tempfile.TemporaryDirectory(dir=directory) as checkpoints:
            problems = problems_of(case, Path(checkpoints))
        found += [f"{case}: {'; '.join(problems)}"] if problems else []
    return found


def problems_of(case: Case, checkpoints: Path) -> list[str]:
    """Cut the run and resume it until it ends by itself; return how that differs from the run left alone."""
    goal = left_alone(case.configuration)
    heard: list[Moment] = []
    problems: list[str] = []
    for number in range(MOST_RUNS):
        attempt = prepare(case, number, checkpoints)
        try:
            attempt.run(resume="auto" if number else None)
        except Exception as error:  # whatever it is, it is this case's mismatch, and the others are still to be seen
            return [*problems, f"run {number + 1} raised {type(error).__name__}: {error}"]
        heard += attempt.heard
        problems += after_the_signal(attempt)
        if number == 0 and attempt.num_before_signal is None:
            return ["the event did not come, so no signal was sent"]
        if attempt.engine.history.exit_code == 0:
            return problems + differences(attempt, goal) + heard_otherwise(heard, goal)
    return [*problems, f"interrupted still in run {MOST_RUNS}, though no signal came"]


def prepare(case: Case, number: int, checkpoints: Path) -> Attempt:
    """Return what is to run; other weights and random numbers than the first run's, until a checkpoint is loaded."""
    attempt = Attempt(case.configuration, torch_seed=3 + number)
    attempt.refuse_to_pass(left_alone(case.configuration).engine)
    event, count = ((case.event, case.count), (case.again, 1), (None, 0))[min(number, 2)]
    checkpoint = RunCheckpoint(
        checkpoints, every_steps=case.configuration.every_steps, every_epochs=case.configuration.every_epochs
    )
    if not case.first:
        attempt.engine.attach(checkpoint)
    if event is not None:
        attempt.send_signal_at(event, count)
    if case.first:
        attempt.engine.attach(checkpoint)
    return attempt


def after_the_signal(attempt: Attempt) -> list[str]:
    """Return what a run went on with though a signal had come: the step is finished, and no more than that.

    A signal before an epoch's first batch may let one step be made. A validation that is part of the step is finished
    with it; any other one ends with the batch that it is at.
    """
    if attempt.num_before_signal is None:
        return []
    at, later = attempt.heard[attempt.num_before_signal - 1], attempt.heard[attempt.num_before_signal :]
    steps = sum(moment.event == "StepEnd" and moment.step != at.step for moment in later)
    validated = sum(moment.event == "ValidationStepEnd" for moment in later)
    problems = []
    if steps > (at.event in ("FitStart", "EpochStart")):
        problems.append(f"made {steps} more steps after the signal")
    if validated > 1 and not attempt.configuration.within:
        problems.append(f"validated on {validated} more batches after the signal")
    if at.event == "FitEnd" and attempt.engine.history.exit_code:
        problems.append("was interrupted, though it was over")
    return problems


def differences(attempt: Attempt, goal: Attempt) -> list[str]:
    """Return which of a run's results are not those of the run left alone."""
    ours, theirs = attempt.outcome(), goal.outcome()
    return [difference(name, ours[name], theirs[name]) for name in theirs if not equal(ours[name], theirs[name])]


def difference(name: str, ours: Any, theirs: Any) -> str:
    """Return, in words, how two results differ."""
    if name in ("model", "optimizer"):
        return f"{name} differs"
    if name in ("rows", "validations"):
        ours, theirs = ([f"{row['epoch']}/{row['step']}" for row in rows] for rows in (ours, theirs))
        if ours == theirs:
            return f"{name} have other values"
    return f"{name}: {ours}, not {theirs}"


def equal(ours: Any, theirs: Any) -> bool:
    """Return whether two nests of plain values and tensors are the same to the bit."""
    if isinstance(ours, Tensor):
        return isinstance(theirs, Tensor) and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return bool(ours == theirs)


def heard_otherwise(heard: list[Moment], goal: Attempt) -> list[str]:
    """Return what all the runs together announced more or less often, or in another order, than the one left alone."""
    ours, theirs = (list(facts(moments, goal.configuration)) for moments in (heard, goal.heard))
    more, less = Counter(ours) - Counter(theirs), Counter(theirs) - Counter(ours)
    problems = [f"heard too often: {in_short(more)}"] if more else []
    problems += [f"not heard: {in_short(less)}"] if less else []
    return problems or (["the same events were heard in another order"] if ours != theirs else [])


def in_short(moments: Iterable[Moment]) -> str:
    """Return some moments in words, or the first of many."""
    words = [f"{moment.event} {moment.epoch}/{moment.step}" for moment in moments]
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")


def facts(heard: Iterable[Moment], configuration: Configuration) -> Iterator[Moment]:
    """Yield what may happen only once; the parts of a validation are made again where it was cut short."""
    for moment in heard:
        if moment.event in OF_A_VALIDATION or (moment.event == "BatchReady" and moment.stage == "val"):
            is_fact = configuration.only_within
        else:
            is_fact = moment.event in NEVER_AGAIN
        if is_fact:
            yield moment


# The tests --------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _process_is_safe() -> Iterator[None]:
    """Turn a signal that the engine lets through, which would end the tests, into an error."""

    def refuse(number: int, frame: object) -> None:
        raise RuntimeError("the signal went past the engine")

    before = signal.signal(signal.SIGTERM, refuse)
    yield
    signal.signal(signal.SIGTERM, before)


def check(cases: list[Case], directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Fail with all that is wrong with any of the cases, which are of one configuration."""
    found = mismatches(cases, directory)
    capfd.readouterr()  # what the engine says at each signal
    if found:
        pytest.fail(
            "\n".join([f"{len(found)} of {len(cases)} cases fail ({cases[0].configuration}):", *found]), pytrace=False
        )
    assert cases


def test_there_are_a_thousand_cases_with_every_event_in_each_style() -> None:
    tried = {style: Counter[str]() for style in ("script", "function", "class")}
    for case in all_cases():
        tried[case.configuration.style][case.event.__name__] += 1
    print(len(all_cases()), "cases:", {style: events.total() for style, events in tried.items()})
    assert all(events.keys() == {event.__name__ for event in EVENTS} for events in tried.values())
    assert len(all_cases()) >= 1000


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_a_run_cut_by_a_signal_and_resumed_ends_as_the_run_left_alone(
    configuration: Configuration, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A sample of the cases."""
    check([case for case in all_cases()[::SAMPLE] if case.configuration == configuration], tmp_path, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_a_run_cut_by_a_signal_at_any_event_and_resumed_ends_as_the_run_left_alone(
    configuration: Configuration, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All of them."""
    check([case for case in all_cases() if case.configuration == configuration], tmp_path, capfd)
