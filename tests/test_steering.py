"""Orders to a run that goes on: sent by another process, recorded with their step, and repeated to the bit."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers import class_batches, make_trainer, refused
from torch import nn

from camshaft.callbacks import (
    ClipGradients,
    EarlyStopping,
    Ramp,
    RunCheckpoint,
    RunDirectory,
    Schedule,
    Steering,
    StopAfter,
    warmup_cosine,
)
from camshaft.callbacks.orders import in_words
from camshaft.engine import (
    Callback,
    ConfigurationError,
    Engine,
    Event,
    Settled,
    StepEnd,
    Trainer,
    ValidationStart,
    at,
    run_state,
)
from camshaft.testing.checks import equal
from camshaft.viewer import Run
from camshaft.viewer.steering import NotTakenError, parsed
from camshaft.viewer.steering import send as send_and_wait

COMMAND = Path(sys.executable).with_name("camshaft")
TRAIN, VAL = class_batches(*[4] * 5), class_batches(4, 4, seed=1)
AT_ONCE = 1e-9  # seconds from look to look

# Training ---------------------------------------------------------------------------------------------------


def trainer_of(root: Path, *more: Callback, repeat: Path | None = None, every_steps: int = 1000) -> Engine:
    """A trainer with dropout, momentum, a schedule, clipping, checkpoints and steering."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    callbacks = [
        RunDirectory(root / "runs", terminal=False),
        Steering(AT_ONCE, repeat=repeat),
        ClipGradients(norm=1.0),
        Schedule(lambda optimizer: warmup_cosine(optimizer, warmup=4, total=4000), per="update"),
        EarlyStopping("val_loss", patience=10_000),
        RunCheckpoint(root / "checkpoints", every_steps=every_steps, keep=100),
        *more,
    ]
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks, seed=0)


def came_to(engine: Engine) -> dict[str, Any]:
    """Return all that a run and its repetition have in common."""
    parts = {name: engine.parts[name].state_dict() for name in ("model", "optimizer", "scheduler")}
    history = engine.history
    stopping = next(one for one in engine.listeners.callbacks if isinstance(one, EarlyStopping))
    return {
        **parts, "rows": history.rows, "validations": history.validations, "remarks": history.remarks,
        "reason": history.reason, "step": engine.step, "patience": stopping.patience,
    }  # fmt: skip


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [key for key in one if not equal(one[key], other[key])]


def trained(root: Path, *, epochs: int = 3, resume: str | None = None, **options: Any) -> Engine:
    engine = trainer_of(root, **options)
    engine.fit(TRAIN, VAL, epochs=epochs, resume=resume)
    return engine


def directory_of(engine: Engine) -> Path:
    assert engine.directory is not None
    return engine.directory


# Another process --------------------------------------------------------------------------------------------


def slow_run(root: Path) -> None:
    """What the other process does: some hundred steps a second, until it is told to stop."""
    torch.set_num_threads(1)
    engine = trainer_of(root, every_steps=10**6)
    engine.subscribe(StepEnd, lambda event: time.sleep(0.005))
    engine.fit(TRAIN, VAL, epochs=100_000)
    torch.save(came_to(engine), root / "result")


@contextmanager
def going_on(root: Path) -> Iterator[tuple[Path, Any]]:
    """Start a run in another process, and give its directory and the process."""
    process = multiprocessing.get_context("fork").Process(target=slow_run, args=(root,))
    process.start()
    try:
        wait_until(lambda: list(root.glob("runs/*/timeline.jsonl")))
        (timeline,) = root.glob("runs/*/timeline.jsonl")
        yield timeline.parent, process
    finally:
        process.kill()
        process.join()


def wait_until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steer(run: Path, *order: str, code: int = 0) -> str:
    """Send an order by the command, and return what it printed."""
    ran = subprocess.run([COMMAND, "steer", run, *order], text=True, capture_output=True, timeout=120)
    assert ran.returncode == code, (ran.stdout, ran.stderr)
    assert "Traceback" not in ran.stderr
    return (ran.stdout or ran.stderr).strip()


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "steering.jsonl").read_text().splitlines()]


def moments(run: Path) -> list[tuple[str, int, str]]:
    return [(one["order"]["what"], one["step"], one["at"]) for one in records(run)]


def test_a_second_process_steers_a_run_and_its_repetition_is_bit_identical(tmp_path: Path) -> None:
    with going_on(tmp_path / "steered") as (run, process):
        answers = [
            steer(run, *order)
            for order in (
                ["validate"], ["checkpoint"], ["lr", "x0.5"], ["set", "ClipGradients.norm=0.01"],
                ["set", "EarlyStopping.patience=9000"], ["stop", "--after", "epoch"],
            )
        ]  # fmt: skip
        process.join(60)
        assert process.exitcode == 0
    result = torch.load(tmp_path / "steered" / "result", weights_only=False)
    taken = records(run)
    assert [one["order"]["what"] for one in taken] == ["validate", "checkpoint", "lr", "set", "set", "stop"]
    for one, answer, remark in zip(taken, answers, result["remarks"], strict=True):
        end = " (the epoch's end)" if one["at"] == "epoch" else ""
        assert answer.endswith(f"; taken at step {one['step']}, epoch {one['epoch']}{end}")
        assert (remark["step"], remark["epoch"]) == (one["step"], one["epoch"])
        assert f"Steering: {answer}" in (run / "log.log").read_text()
    assert answers[2].startswith("lr x0.5: the learning rates are multiplied by 0.5; ")
    assert answers[3].startswith("set ClipGradients.norm=0.01: ClipGradients.norm is 0.01 now, and was 1.0; ")

    validate, checkpoint, *_, stop = taken
    ends_epoch = validate["at"] == "step" and validate["step"] % 5 == 0  # then that validation is the one
    assert validate["step"] + (not ends_epoch) in [row["step"] for row in result["validations"]]
    saved = [file.step for file in RunCheckpoint(tmp_path / "steered" / "checkpoints").checkpoints.files()]
    assert {checkpoint["step"], checkpoint["step"] + 1} & set(saved)
    assert result["reason"] == "Steering: it was ordered to stop"
    assert result["step"] == 5 * stop["epoch"]
    assert result["patience"] == 9000

    repeated = trained(tmp_path / "repeated", epochs=100_000, repeat=run)
    assert differing(result, came_to(repeated)) == []
    assert (directory_of(repeated) / "steering.jsonl").read_bytes() == (run / "steering.jsonl").read_bytes()
    plain = trained(tmp_path / "plain", epochs=stop["epoch"])  # or nothing above would say much
    assert {"model", "optimizer", "validations"} <= set(differing(result, came_to(plain)))


def checkpoints(root: Path) -> list[Path]:
    return [file.path for file in RunCheckpoint(root / "checkpoints").checkpoints.files()]


def test_a_run_that_is_killed_repeats_the_orders_after_its_checkpoint(tmp_path: Path) -> None:
    with going_on(tmp_path / "killed") as (run, process):
        steer(run, "lr", "x0.5")
        steer(run, "set", "ClipGradients.norm=0.05")
        steer(run, "checkpoint")
        wait_until(lambda: list((tmp_path / "killed" / "checkpoints").glob("*.pt")))
        steer(run, "lr", "x0.25")
        steer(run, "set", "ClipGradients.norm=0.5")
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    steps = [step for _, step, _ in moments(run)]
    epochs = steps[-1] // 5 + 4
    resumed = trainer_of(tmp_path / "killed")
    resumed.fit(TRAIN, VAL, epochs=epochs, resume="auto")
    assert directory_of(resumed) == run
    assert [one["step"] for one in resumed.history.remarks] == steps
    log = (run / "log.log").read_text()
    assert [log.count(f"{text}: ") for text in ("lr x0.5", "checkpoint", "lr x0.25")] == [1, 1, 2]
    alone = trained(tmp_path / "alone", epochs=epochs, repeat=run)
    assert differing(came_to(resumed), came_to(alone)) == []


# Orders within one process ------------------------------------------------------------------------------------


def send(engine: Engine, number: int, what: str, **rest: Any) -> None:
    """Write an order as the command does."""
    write(engine, number, json.dumps({"what": what, **rest}))


def write(engine: Engine, number: int, text: str) -> None:
    (directory_of(engine) / "steering" / f"{number:03}.order").write_text(text)


def answer(engine: Engine, number: int) -> tuple[bool, str]:
    told = json.loads((directory_of(engine) / "steering" / f"{number:03}.answer").read_text())
    return told["taken"], told["text"]


class Sends(Callback):
    """Sends orders at given steps: ``{step: [order, ...]}``; a step below 0 means the validation that follows it."""

    def __init__(self, orders: dict[int, list[dict[str, Any]]]) -> None:
        self.orders, self.number = orders, 0

    def attach(self, engine: Engine) -> None:
        super().attach(engine)
        engine.subscribe(StepEnd, lambda event: self._send(event, event.engine.step))
        engine.subscribe(ValidationStart, lambda event: self._send(event, -event.engine.step))

    def _send(self, event: Event, at: int) -> None:
        for order in self.orders.get(at, []):
            self.number += 1
            send(event.engine, self.number, **order)


LR: dict[str, Any] = {"what": "lr", "factor": 0.5}
HALVE_CLIP: dict[str, Any] = {"what": "set", "handler": "ClipGradients", "setting": "norm", "value": 0.5}
CLIP_MORE = HALVE_CLIP | {"value": 0.02}
ORDERS = {2: [LR], 3: [HALVE_CLIP, LR], -5: [CLIP_MORE, LR], 6: [{"what": "validate"}], 8: [LR, HALVE_CLIP], 12: [LR]}


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with orders after steps and at an epoch's end, and what it came to."""
    root = tmp_path_factory.mktemp("steered")
    engine = trainer_of(root, Sends(ORDERS))
    engine.fit(TRAIN, VAL, epochs=3)
    run = directory_of(engine)
    assert moments(run) == [
        ("lr", 2, "step"), ("set", 3, "step"), ("lr", 3, "step"), ("set", 5, "epoch"), ("lr", 5, "epoch"),
        ("validate", 6, "step"), ("lr", 8, "step"), ("set", 8, "step"), ("lr", 12, "step"),
    ]  # fmt: skip
    assert [row["step"] for row in engine.history.validations] == [5, 7, 10, 15]
    return run, came_to(engine)


def test_it_is_repeated_to_the_bit(steered: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, result = steered
    assert differing(result, came_to(trained(tmp_path / "repeated", repeat=run))) == []
    assert "model" in differing(result, came_to(trained(tmp_path / "plain")))


def test_it_is_repeated_to_the_bit_by_a_run_that_is_cut_after_any_step(
    steered: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run, result = steered
    for step in range(1, 15):
        root = tmp_path / str(step)
        engine = trainer_of(root, repeat=run)
        engine.subscribe(StepEnd, lambda event: event.engine.run.interrupt(signal.SIGTERM), when=at(step))
        engine.fit(TRAIN, VAL, epochs=3)
        assert engine.step == step
        assert differing(result, came_to(trained(root, resume="auto"))) == [], step


def test_it_is_repeated_to_the_bit_from_any_checkpoint_in_another_directory(
    steered: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """As a replay does: the orders that come are read from the earlier run, those that were come from its state."""
    run, result = steered
    trained(tmp_path / "first", repeat=run, every_steps=1)
    files = checkpoints(tmp_path / "first")
    assert len(files) >= 15
    for number, path in enumerate(files):
        engine = trained(tmp_path / str(number), resume=str(path), repeat=run)
        assert differing(result, came_to(engine)) == [], path.name


def test_a_run_that_goes_back_takes_settings_back_and_repeats_its_orders(
    steered: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run, result = steered
    engine = trainer_of(tmp_path, repeat=run)
    states: list[dict[str, Any]] = []

    def back(event: StepEnd) -> None:
        if states:
            event.engine.run.go_back(states.pop(), Path("memory"))

    engine.subscribe(Settled, lambda event: states.append(copy.deepcopy(run_state(event.engine))), when=at(6))
    engine.subscribe(StepEnd, back, when=at(9))
    engine.fit(TRAIN, VAL, epochs=3)
    assert differing(result, came_to(engine)) == []


def test_an_order_that_a_resumed_run_gets_comes_beside_those_that_it_repeats(tmp_path: Path) -> None:
    engine = trainer_of(tmp_path / "run", Sends({7: [LR]}), every_steps=4)
    engine.subscribe(StepEnd, lambda event: 1 / 0, when=at(8))
    with pytest.raises(ZeroDivisionError):
        engine.fit(TRAIN, VAL, epochs=3)
    resumed = trainer_of(tmp_path / "run", Sends({6: [CLIP_MORE]}), every_steps=4)
    resumed.fit(TRAIN, VAL, epochs=3, resume="auto")
    run = directory_of(resumed)
    assert moments(run) == [("lr", 7, "step"), ("set", 6, "step")]
    assert [(one["step"], one["text"][:13]) for one in resumed.history.remarks] == [
        (6, "Steering: set"), (7, "Steering: lr "),
    ]  # fmt: skip
    assert differing(came_to(resumed), came_to(trained(tmp_path / "again", repeat=run))) == []


def test_stop_ends_the_run_after_the_step_and_the_run_can_go_further(tmp_path: Path) -> None:
    engine = trainer_of(tmp_path, Sends({7: [{"what": "stop", "after": "step"}]}))
    engine.fit(TRAIN, VAL, epochs=3)
    assert (engine.step, engine.epoch, engine.history.reason) == (7, 2, "Steering: it was ordered to stop")
    assert trained(tmp_path, resume="auto").step == 7
    assert trained(tmp_path, resume="auto", epochs=4).epoch == 4


@pytest.mark.parametrize("place", [7, -10])
def test_stop_after_the_epoch_ends_the_run_with_the_epoch(place: int, tmp_path: Path) -> None:
    """Also where it comes in the validation at the epoch's end; and where the run is cut in between."""
    engine = trainer_of(tmp_path, Sends({place: [{"what": "stop", "after": "epoch"}]}))
    engine.subscribe(StepEnd, lambda event: event.engine.run.interrupt(signal.SIGTERM), when=at(8))
    engine.fit(TRAIN, VAL, epochs=3)
    resumed = trainer_of(tmp_path, Sends({-10: [{"what": "stop", "after": "epoch"}]} if place < 0 else {}))
    resumed.fit(TRAIN, VAL, epochs=3, resume="auto")
    assert (resumed.step, resumed.epoch, resumed.history.reason) == (10, 2, "Steering: it was ordered to stop")


def test_orders_when_the_run_is_over_are_refused(tmp_path: Path) -> None:
    engine = trainer_of(tmp_path, Sends({-15: [LR]}))
    engine.fit(TRAIN, VAL, epochs=3)
    assert answer(engine, 1) == (False, "The run has just ended. Send it again if it goes on.")
    assert records(directory_of(engine)) == []


# What is refused ------------------------------------------------------------------------------------------------


def first_answer(engine: Engine, order: dict[str, Any], val: Any = VAL, **options: Any) -> tuple[bool, str]:
    """What a run of two epochs answers to an order that it gets after its first step."""
    engine.attach(Sends({1: [order]}))
    engine.fit(TRAIN, val, epochs=2, **options)
    return answer(engine, 1)


@pytest.mark.parametrize(
    ("order", "phrases"),
    [
        ({"what": "dance"}, ["is not an order. Send one of: validate, checkpoint, stop, lr, set."]),
        ({"what": "lr"}, ["is not an order. "]),
        ({"what": "lr", "factor": 0.5, "more": 1}, ["is not an order. "]),
        ({"what": "lr", "factor": -1}, ["lr has the factor -1. Write a number above 0"]),
        ({"what": "lr", "factor": float("nan")}, ["lr has the factor nan. "]),
        ({"what": "lr", "factor": 10**400}, ["OverflowError", "Send another value."]),
        ({"what": "stop", "after": "lunch"}, ["'lunch' is not a place to stop after. Write"]),
        ({"what": "set", "handler": "EarlyStoping", "setting": "patience", "value": 3},
         ["No handler named 'EarlyStoping'", 'Did you mean "EarlyStopping"? Select one of: ClipGradients, ']),
        ({"what": "set", "handler": "../..", "setting": "patience", "value": 3}, ["No handler named '../..'"]),
        ({"what": "set", "handler": "EarlyStopping", "setting": "patiense", "value": 3},
         ["no setting 'patiense'", 'Did you mean "patience"? Select one of: patience, min_delta, ']),
        ({"what": "set", "handler": "EarlyStopping", "setting": "__class__", "value": 3}, ["no setting '__class__'"]),
        ({"what": "set", "handler": "EarlyStopping", "setting": "patience", "value": -3},
         ["EarlyStopping's patience is -3, which is not a count. Pass a whole number of at least 1."]),
        ({"what": "set", "handler": "EarlyStopping", "setting": "patience", "value": "3"}, ["patience is '3'"]),
        ({"what": "set", "handler": "EarlyStopping", "setting": "min_delta", "value": True}, ["min_delta=True"]),
        ({"what": "set", "handler": "ClipGradients", "setting": "value", "value": 0.5},
         ["ClipGradients does not use value in this run. "]),
        ({"what": "set", "handler": "ClipGradients", "setting": "norm", "value": None}, ["a limit of None. "]),
        ({"what": "set", "handler": "RunCheckpoint", "setting": "every_steps", "value": 0}, ["every_steps is 0"]),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_what_is_no_order_or_no_value_is_answered_and_changes_nothing(
    order: dict[str, Any], phrases: list[str], tmp_path: Path
) -> None:
    engine = trainer_of(tmp_path / "a")
    is_taken, text = first_answer(engine, order)
    assert not is_taken
    assert all(phrase in text for phrase in phrases), text
    assert records(directory_of(engine)) == []
    assert differing(came_to(engine), came_to(trained(tmp_path / "plain", epochs=2))) == []


def test_what_the_run_cannot_do_is_refused(tmp_path: Path) -> None:
    run, steering = RunDirectory(tmp_path, terminal=False), Steering(AT_ONCE)
    bare = Engine(lambda engine, batch: None, callbacks=[run, steering])
    assert first_answer(bare, {"what": "validate"}, None)[1].endswith("Pass them to it: fit(train, val, ...).")
    for order, phrase in (
        ({"what": "checkpoint"}, "nobody who saves it. Attach a RunCheckpoint."),
        ({"what": "lr", "factor": 0.5}, "no part that is an optimizer. Write"),
    ):
        bare = Engine(lambda engine, batch: None,
                      callbacks=[RunDirectory(tmp_path, terminal=False), Steering(AT_ONCE)])  # fmt: skip
        assert phrase in first_answer(bare, order, None)[1]
    ramp = Ramp("optimizer.lr", lambda done: 0.1)
    assert (
        "Ramp('optimizer.lr', per='step') sets the learning rate anew before each step. Use a Schedule"
        in (first_answer(trainer_of(tmp_path / "ramp", ramp), LR)[1])
    )
    engine = trainer_of(tmp_path / "min")
    refusal = first_answer(engine, {"what": "stop", "after": "step"}, min_epochs=2)
    assert refusal == (False, "The run makes at least min_epochs=2 epochs. Send the order after them.")
    assert engine.epoch == 2


@pytest.mark.parametrize(
    ("handler", "setting", "value", "others"),
    [
        (lambda: EarlyStopping("val_loss"), "threshold", 0.5, [None]),
        (lambda: EarlyStopping("val_loss"), "divergence", None, [3]),
        (lambda: EarlyStopping("val_loss"), "min_delta", 0.25, [0]),
        (lambda: ClipGradients(value=1.0), "value", 0.5, [3]),
        (lambda: StopAfter(hours=1), "limit", 7200, [0.5]),
        (lambda: RunCheckpoint("unused"), "every_epochs", 2, [None]),
    ],
)
def test_each_setting_is_checked_as_by_the_constructor(
    handler: Callable[[], Callback], setting: str, value: Any, others: list[Any]
) -> None:
    one = handler()
    for good in (value, *others):
        assert one.steerable[setting](good) == good
    for bad in ("text", True, [1]):
        with pytest.raises(ConfigurationError):
            one.steerable[setting](bad)


def test_every_setting_that_can_be_changed_is_an_attribute_of_the_handler() -> None:
    made = [EarlyStopping("val_loss"), ClipGradients(norm=1.0), StopAfter(hours=1), RunCheckpoint("unused")]
    for one in made:
        assert all(hasattr(one, setting) for setting in one.steerable)


def test_a_changed_setting_has_its_effect(tmp_path: Path) -> None:
    patience = {"what": "set", "handler": "EarlyStopping", "setting": "patience", "value": 1}
    delta = patience | {"setting": "min_delta", "value": 100.0}
    stopped = trainer_of(tmp_path / "stopping", Sends({6: [patience, delta]}))
    stopped.fit(TRAIN, VAL, epochs=9)
    assert stopped.history.reason.startswith("EarlyStopping: val_loss has not improved for 1 checks")
    assert stopped.epoch == 2
    limit = {"what": "set", "handler": "StopAfter", "setting": "limit", "value": 1e-9}
    late = trainer_of(tmp_path / "late", Sends({3: [limit]}), StopAfter(hours=1))
    late.fit(TRAIN, VAL, epochs=9)
    assert late.step == 4
    saves = {"what": "set", "handler": "RunCheckpoint", "setting": "every_steps", "value": 2}
    trained_more = trainer_of(tmp_path / "saves", Sends({5: [saves]}))
    trained_more.fit(TRAIN, VAL, epochs=2)
    assert len(checkpoints(tmp_path / "saves")) == 4  # after the steps 6, 8 and 10, and at the run's end


class Limit(Callback):
    """A handler of the user's own, whose check may raise anything."""

    steerable: ClassVar = {"limit": float, "forgotten": float}

    def __init__(self) -> None:
        self.limit = 1.0


def test_a_handler_of_the_user_can_be_steered(tmp_path: Path) -> None:
    limit: dict[str, Any] = {"what": "set", "handler": "Limit", "setting": "limit"}
    orders = [limit | {"value": "2.5"}, limit | {"value": "much"}, limit | {"setting": "forgotten", "value": 1}]
    engine = trainer_of(tmp_path, handler := Limit(), Sends({3: orders}))
    engine.fit(TRAIN, VAL, epochs=1)
    assert answer(engine, 1)[0]
    assert "could not convert string to float" in answer(engine, 2)[1]
    assert "has no attribute 'forgotten'" in answer(engine, 3)[1]
    assert handler.limit == 2.5


def test_the_second_handler_of_a_class_has_a_number(tmp_path: Path) -> None:
    second = ClipGradients(norm=7.0)
    engine = trainer_of(tmp_path, Sends({3: [CLIP_MORE | {"handler": "ClipGradients-2"}]}), second)
    engine.fit(TRAIN, VAL, epochs=1)
    assert second.norm == 0.02


def test_a_run_that_cannot_be_steered_is_refused_before_its_first_step(tmp_path: Path) -> None:
    for wrong in (0, -1, "1", float("nan"), True):
        with refused(ConfigurationError, "Steering has every_seconds"):
            Steering(wrong)  # type: ignore[arg-type]
    with refused(ConfigurationError, "has no steering.jsonl"):
        Steering(repeat=tmp_path)
    no_directory = make_trainer(Steering())
    with refused(ConfigurationError, "Steering keeps its orders in a run directory", "Attach RunDirectory()"):
        no_directory.fit(TRAIN, epochs=1)
    checkpoint = RunCheckpoint(tmp_path / "checkpoints")
    late = make_trainer(RunDirectory(tmp_path / "late", terminal=False), checkpoint, Steering())
    with refused(ConfigurationError, "Steering comes after RunCheckpoint.on_settled", "Attach Steering before it."):
        late.fit(TRAIN, epochs=1)
    assert (no_directory.step, late.step) == (0, 0)


def test_a_directory_in_which_others_can_write_is_refused(tmp_path: Path) -> None:
    for number in range(3):
        run = RunDirectory(tmp_path / str(number), terminal=False)
        path = run.path / "steering"
        if number == 0:
            path.mkdir()
            path.chmod(0o777)
        elif number == 1:
            path.symlink_to(tmp_path)
        else:
            path.write_text("")
        engine = make_trainer(run, Steering())
        with refused(ConfigurationError, str(path)):
            engine.fit(TRAIN, epochs=1)
        assert engine.step == 0


def test_a_record_that_is_damaged_is_refused_and_one_that_was_cut_by_a_kill_is_not(tmp_path: Path) -> None:
    good = json.dumps({"name": "1", "time": 1.0, "epoch": 1, "step": 2, "at": "step", "order": LR})
    for text in ("{}\n", "[]\n", "what\n", good.replace("2", '"2"') + "\n", good.replace('"what"', '"that"') + "\n"):
        run = RunDirectory(tmp_path, terminal=False)
        (run.path / "steering.jsonl").write_text(f"{good}\n{text}")
        with refused(ConfigurationError, f"Line 2 of {run.path / 'steering.jsonl'} is no order of a run"):
            make_trainer(run, Steering()).fit(TRAIN, epochs=1)
    run = RunDirectory(tmp_path, terminal=False)
    (run.path / "steering.jsonl").write_text(f"{good}\n{good[:20]}")
    engine = make_trainer(run, Steering())
    engine.fit(TRAIN, epochs=1)
    assert [one["step"] for one in engine.history.remarks] == [2]
    assert (run.path / "steering.jsonl").read_text() == f"{good}\n"


# Hostile files --------------------------------------------------------------------------------------------------


def spoil(directory: Path, secret: Path) -> dict[str, str]:
    """Put into a directory what is no order; return a word of each warning by name."""
    (directory / "1-broken.order").write_text('{"what": ')
    (directory / "2-binary.order").write_bytes(bytes(range(256)))
    (directory / "3-deep.order").write_text("[" * 4000)
    (directory / "4-huge.order").write_text(" " * 10_000_000)
    (directory / "5-link.order").symlink_to(secret)
    os.mkfifo(directory / "6-pipe.order")
    (directory / "7-directory.order").mkdir()
    (directory / "8-\x1b[31m\n.order").write_text("no")
    return {
        "1-broken": "line 1", "2-binary": "line 1", "3-deep": "", "4-huge": "10000000 bytes", "5-link": "a link",
        "6-pipe": "no plain file", "7-directory": "no plain file", "8-": "line 1",
    }  # fmt: skip


def test_hostile_files_are_warned_of_and_removed_and_never_break_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = tmp_path / "secret"
    secret.write_text(json.dumps(LR))
    engine = trainer_of(tmp_path / "run")
    words: dict[str, str] = {}

    def disturb(event: StepEnd) -> None:
        words.update(spoil(directory_of(event.engine) / "steering", secret))

    engine.subscribe(StepEnd, disturb, when=at(2))
    engine.fit(TRAIN, VAL, epochs=2)
    assert engine.step == 10
    said = [record.getMessage() for record in caplog.records if "Steering does not take" in record.getMessage()]
    assert len(said) == len(words)
    for message, (name, word) in zip(said, words.items(), strict=True):
        assert name in message
        assert word in message
        assert "\x1b" not in message
        assert "\n" not in message
    left = {path.name for path in (directory_of(engine) / "steering").iterdir()}
    assert left == {"7-directory.order"}
    assert secret.exists()
    assert records(directory_of(engine)) == []
    assert differing(came_to(engine), came_to(trained(tmp_path / "plain", epochs=2))) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_an_order_of_another_user_is_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = trainer_of(tmp_path)

    def disturb(event: StepEnd) -> None:
        send(event.engine, 1, **LR)
        os.chown(directory_of(event.engine) / "steering" / "001.order", 12345, -1)

    engine.subscribe(StepEnd, disturb, when=at(2))
    engine.fit(TRAIN, VAL, epochs=2)
    assert "001.order': it belongs to user 12345, and the run to user 0" in caplog.text
    assert list((directory_of(engine) / "steering").iterdir()) == []
    assert engine.history.remarks == []


def test_an_order_from_before_the_run_or_its_resumption_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def leave(event: StepEnd) -> None:
        event.engine.run.interrupt(signal.SIGTERM)

    engine = trainer_of(tmp_path)
    engine.subscribe(StepEnd, leave, when=at(3))
    engine.fit(TRAIN, VAL, epochs=2)
    send(engine, 1, **LR)
    (directory_of(engine) / "steering" / "000.answer").write_text("of a sender that was killed")
    resumed = trained(tmp_path, epochs=2, resume="auto")
    assert answer(resumed, 1) == (False, "It was sent before this run began, or before it was resumed. Send it again.")
    assert "Steering refuses '001': It was sent before" in caplog.text
    assert not (directory_of(resumed) / "steering" / "000.answer").exists()
    assert resumed.history.remarks == []


def test_an_order_that_cannot_be_recorded_is_not_done(tmp_path: Path) -> None:
    engine = trainer_of(tmp_path / "a")

    def disturb(event: StepEnd) -> None:
        path = directory_of(event.engine) / "steering.jsonl"
        path.unlink()
        path.mkdir()

    engine.subscribe(StepEnd, disturb, when=at(1))
    is_taken, text = first_answer(engine, LR)
    assert not is_taken
    assert text.startswith("Nothing was done: ")
    assert differing(came_to(engine), came_to(trained(tmp_path / "plain", epochs=2))) == []


def test_a_directory_that_goes_away_does_not_end_the_run(tmp_path: Path) -> None:
    engine = trainer_of(tmp_path)
    engine.subscribe(StepEnd, lambda event: shutil.rmtree(directory_of(event.engine) / "steering"), when=at(2))
    engine.fit(TRAIN, VAL, epochs=2)
    assert engine.step == 10


def test_an_order_that_cannot_be_repeated_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = make_trainer(
        RunDirectory(tmp_path / "a", terminal=False),
        Steering(AT_ONCE),
        ClipGradients(norm=1.0),
        Sends({1: [CLIP_MORE]}),
    )
    first.fit(TRAIN, epochs=1)
    second = make_trainer(RunDirectory(tmp_path / "b", terminal=False), Steering(repeat=directory_of(first)))
    second.fit(TRAIN, epochs=1)
    assert "Steering cannot repeat an order of step 1: No handler named 'ClipGradients'" in caplog.text


# The command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stopp"], "No such order 'stopp'. Did you mean 'stop'?"),
        (["zebra"], "No such order 'zebra'. Orders: validate, checkpoint, stop, lr, set."),
        (["lr"], "The order 'lr' takes a factor, as in lr x0.5, not ''."),
        (["lr", "0.5"], "The order 'lr' takes a factor above 0, as in lr x0.5, not '0.5'."),
        (["lr", "xinf"], "The order 'lr' takes a factor above 0, as in lr x0.5, not 'xinf'."),
        (["validate", "now"], "The order 'validate' takes nothing more, not 'now'."),
        (["validate", "--after", "epoch"], "The order 'validate' has no --after."),
        (["set", "patience=3"], "The order 'set' takes a setting, as in set EarlyStopping.patience=10, "
         "not 'patience=3'."),
    ],
)  # fmt: skip
def test_what_is_written_wrong_is_said_at_once(words: list[str], message: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, terminal=False)
    make_trainer(run)
    assert steer(run.path, *words, code=2) == f"{message} Write: camshaft steer --help."


def test_a_run_that_takes_no_orders_is_said_at_once(tmp_path: Path) -> None:
    ended = RunDirectory(tmp_path / "a", terminal=False)
    make_trainer(ended, Steering()).fit(TRAIN, epochs=1)
    assert steer(ended.path, "validate", code=1) == (
        f"{ended.path} does not go on: its status is ended. Resume it, and send the order then."
    )
    others: list[str] = []
    without = make_trainer(run := RunDirectory(tmp_path / "b", terminal=False))
    without.subscribe(StepEnd, lambda event: others.append(steer(run.path, "validate", code=1)), when=at(1))
    without.fit(TRAIN, epochs=1)
    assert others == [f"{run.path} takes no orders. Attach Steering() to a run before it begins."]


def test_a_run_that_is_resumed_within_an_epoch_takes_orders_at_once(tmp_path: Path) -> None:
    """Its directory says that it goes on, before an epoch has begun or ended."""
    first = trainer_of(tmp_path)
    first.subscribe(StepEnd, lambda event: event.engine.run.interrupt(signal.SIGTERM), when=at(3))
    first.fit(TRAIN, VAL, epochs=1)
    resumed, seen = trainer_of(tmp_path), []

    def look(event: StepEnd) -> None:
        run = Run(directory_of(event.engine))
        seen.append((run.status, [(one["what"], one["step"]) for one in run.moments]))

    resumed.subscribe(StepEnd, look, when=at(4))
    resumed.fit(TRAIN, VAL, epochs=1, resume="auto")
    assert seen == [("running", [("started", 0), ("ended", 3), ("resumed", 3)])]


def test_a_run_that_begins_to_take_an_order_and_does_not_answer_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("camshaft.viewer.steering._GRACE", 0.2)
    engine, said = trainer_of(tmp_path), []

    def remove_unanswered(orders: Path) -> None:
        wait_until(lambda: list(orders.glob("*.order")))
        next(orders.glob("*.order")).unlink()

    def order(event: StepEnd) -> None:
        run = directory_of(event.engine)
        thread = threading.Thread(target=remove_unanswered, args=(run / "steering",))
        thread.start()
        with pytest.raises(NotTakenError) as refusal:
            send_and_wait(Run(run), {"what": "validate"}, timeout=0.2)
        said.append(str(refusal.value))
        thread.join()

    engine.subscribe(StepEnd, order, when=at(2))
    engine.fit(TRAIN, VAL, epochs=1)
    assert "has begun to take the order and has not answered. Look whether it is the last line of" in said[0]


@pytest.mark.parametrize(
    "words", ["validate", "checkpoint", "stop", "stop --after epoch", "lr x0.5", "set EarlyStopping.min_delta=0.25"]
)
def test_what_the_command_understands_the_run_understands(words: str, tmp_path: Path) -> None:
    before, _, after = words.partition(" --after ")
    order = parsed(before.split(), after or None)
    assert in_words(order) == words
    assert first_answer(trainer_of(tmp_path), order)[0]


def test_an_order_that_is_not_answered_in_time_is_taken_back(tmp_path: Path) -> None:
    engine, said = trainer_of(tmp_path), []

    def wait(event: StepEnd) -> None:
        said.append(steer(directory_of(event.engine), "lr", "x0.5", "--timeout", "0.2", code=1))
        assert list((directory_of(event.engine) / "steering").iterdir()) == []

    engine.subscribe(StepEnd, wait, when=at(2))
    engine.fit(TRAIN, VAL, epochs=1)
    assert said == [
        f"{directory_of(engine)} has not answered for 0.2 s, and the order was taken back. "
        "Pass a longer --timeout if a step, or a validation, takes longer than that."
    ]
    assert engine.history.remarks == []


def test_a_run_that_is_killed_while_an_order_waits_is_said(tmp_path: Path) -> None:
    with going_on(tmp_path) as (run, process):
        os.kill(process.pid, signal.SIGSTOP)
        waiting = subprocess.Popen([COMMAND, "steer", run, "validate"], stderr=subprocess.PIPE, text=True)
        wait_until(lambda: list((run / "steering").glob("*.order")))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        _, error = waiting.communicate(timeout=60)
    assert waiting.returncode == 1
    assert error.strip() == f"{run} does not go on: its status is killed. Resume it, and send the order then."
    assert list((run / "steering").iterdir()) == []


def test_a_sender_that_is_interrupted_takes_its_order_back(tmp_path: Path) -> None:
    with going_on(tmp_path) as (run, process):
        os.kill(process.pid, signal.SIGSTOP)
        waiting = subprocess.Popen([COMMAND, "steer", run, "validate"], stderr=subprocess.PIPE, text=True)
        wait_until(lambda: list((run / "steering").glob("*.order")))
        waiting.send_signal(signal.SIGINT)
        waiting.communicate(timeout=60)
        assert waiting.returncode == 130
        assert list((run / "steering").iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_run_of_another_user_is_refused(tmp_path: Path) -> None:
    engine, said = trainer_of(tmp_path), []

    def give_away(event: StepEnd) -> None:
        run = directory_of(event.engine)
        os.chown(run, 12345, -1)
        said.append(steer(run, "validate", code=1))

    engine.subscribe(StepEnd, give_away, when=at(2))
    engine.fit(TRAIN, VAL, epochs=1)
    assert "belongs to user 12345, who alone may steer it. Let that user send the order." in said[0]


# What it costs --------------------------------------------------------------------------------------------------


def test_an_engine_without_it_has_no_handler_of_a_settled_step(tmp_path: Path) -> None:
    assert not make_trainer(RunDirectory(tmp_path, terminal=False)).listeners.hears(Settled)
