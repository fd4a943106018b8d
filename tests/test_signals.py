"""Signals to real processes: the step is finished, the run saved, the exit code tells."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from camshaft.callbacks import RunCheckpoint
from camshaft.engine import Data, Engine, StepEnd, one_pass
from camshaft.engine.workers import HANDLED

SCRIPT = """
import sys, time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from camshaft.callbacks import RunCheckpoint
from camshaft.engine import FitEnd, StepEnd, Trainer, ValidationStepEnd

directory, where, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Linear(2, 1)
trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), nn.MSELoss(), callbacks=[RunCheckpoint(directory)])
slow = {"train": StepEnd, "validation": ValidationStepEnd}[where]

def wait(event):
    print(where, trainer.step, flush=True)
    time.sleep(0.05)

trainer.subscribe(slow, wait)
trainer.subscribe(FitEnd, lambda event: print("FitEnd", event.reason, flush=True))
data = DataLoader(TensorDataset(torch.ones(400, 2), torch.ones(400, 1)), batch_size=4, num_workers=workers)
history = trainer.fit(data, data, epochs=3, validate_every="2 steps", resume="auto")
print("step", trainer.step, "validations", trainer.num_validations, flush=True)
sys.exit(history.exit_code)
"""


def not_ignored() -> None:
    """Undo what a shell does to the Ctrl-C of a command in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(directory: Path, where: str = "train", workers: int = 0) -> subprocess.Popen[str]:
    """Start the script in a process group of its own, and wait until it is in the middle of what ``where`` says."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(directory), where, str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=not_ignored,
    )
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline().startswith(where)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "where", "workers"),
    [
        (signal.SIGTERM, "train", 2),
        (signal.SIGTERM, "validation", 2),
        (signal.SIGINT, "train", 2),
        (signal.SIGUSR1, "validation", 0),
    ],
)
def test_the_first_signal_saves_and_ends_the_run_with_its_code(
    tmp_path: Path, number: signal.Signals, where: str, workers: int
) -> None:
    """The signal goes to the whole process group, loader workers included."""
    process = start(tmp_path, where, workers)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert out.count("FitEnd") == 1
    assert f"interrupted by {number.name}" in out
    assert f"{number.name}: finishing the step; send it again to stop now." in err
    step = int(out.split("step ")[-1].split()[0])
    assert [file.step for file in RunCheckpoint(tmp_path).checkpoints.files()] == [step]
    if where == "train":  # it continues, and can be interrupted again
        again = start(tmp_path, where, workers)
        os.killpg(again.pid, number)
        out, _ = again.communicate(timeout=60)
        assert int(out.split("step ")[-1].split()[0]) > step


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_stops_at_once(tmp_path: Path, number: signal.Signals) -> None:
    """A step that never ends can still be left."""
    script = SCRIPT.replace("time.sleep(0.05)", "time.sleep(0.05 if trainer.step < 3 else 600)")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), "train", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=not_ignored,
    )
    assert process.stdout is not None
    while process.stdout.readline() != "train 3\n":
        pass
    time.sleep(0.3)
    process.send_signal(number)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in err
    else:
        assert process.returncode == -number


def test_the_handlers_from_before_are_put_back() -> None:
    seen: list[object] = []

    def mine(*_: object) -> None:
        """Stand for a handler of the user's."""

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        engine = Engine(lambda engine, batch: None)
        engine.subscribe(StepEnd, lambda event: seen.append(signal.getsignal(signal.SIGUSR1)))
        engine.fit([1], epochs=1)
        assert signal.getsignal(signal.SIGUSR1) is mine
        assert seen != [mine]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_run_outside_the_main_thread_installs_nothing() -> None:
    from threading import Thread

    engine = Engine(lambda engine, batch: None)
    thread = Thread(target=lambda: engine.fit([1, 2], epochs=1))
    thread.start()
    thread.join()
    assert engine.step == 2


def test_a_real_signal_in_process_ends_the_run_after_the_step_and_a_second_run_is_free_of_it() -> None:
    engine = Engine(lambda engine, batch: os.kill(os.getpid(), signal.SIGUSR1) if engine.step == 2 else None)
    history = engine.fit([1, 2, 3, 4], epochs=1)
    assert (engine.step, history.exit_code) == (2, 128 + signal.SIGUSR1)
    assert engine.fit([1, 2], epochs=1).exit_code == 0


@pytest.mark.slow
def test_runs_killed_at_random_moments_and_resumed_end_bit_identical() -> None:
    """Ten kills; `make soak` makes a hundred."""
    soak = Path(__file__).with_name("soak.py")
    done = subprocess.run([sys.executable, soak, "--kills", "10"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mismatches 0" in done.stdout


_reaches_new_workers = False  # nothing that is registered for a fork can be removed again


def loader_with_workers() -> DataLoader[Any]:
    """Three batches of one number each."""
    return DataLoader([1, 2, 3], num_workers=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [loader_with_workers(), loader_with_workers], ids=["loader", "function"])
def test_a_signal_to_a_worker_that_is_only_starting_does_not_kill_it(data: Data) -> None:
    """As when the first signal goes to the process group while a pass begins."""

    def strike() -> None:
        if _reaches_new_workers:
            os.kill(os.getpid(), signal.SIGTERM)

    global _reaches_new_workers
    os.register_at_fork(after_in_child=strike)
    _reaches_new_workers = True
    try:
        batches = [batch.tolist() for batch in one_pass(data)]
    finally:
        _reaches_new_workers = False
    assert batches == [[1], [2], [3]]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(HANDLED)


def test_runs_that_overlap_leave_the_handlers_from_before() -> None:
    """The first run ends first, while the handlers of the second one are installed."""
    before = {name: signal.getsignal(name) for name in HANDLED}
    first, second = Engine().epochs(1), Engine().epochs(1)
    next(first), next(second)
    first.close()  # type: ignore[attr-defined]  # a generator
    assert signal.getsignal(signal.SIGTERM) is not before[signal.SIGTERM]
    second.close()  # type: ignore[attr-defined]  # a generator
    assert {name: signal.getsignal(name) for name in HANDLED} == before


def test_a_signal_after_the_first_of_two_overlapping_runs_interrupts_the_second() -> None:
    engines = [Engine(lambda engine, batch: None) for _ in range(2)]
    first, second = (engine.epochs(3) for engine in engines)
    next(first), next(second)
    first.close()  # type: ignore[attr-defined]  # a generator
    os.kill(os.getpid(), signal.SIGTERM)
    assert list(second) == []
    assert [engine.history.exit_code for engine in engines] == [0, 143]


def test_a_signal_during_a_run_within_a_step_of_another_run_interrupts_both() -> None:
    """As when a handler runs the learning-rate finder."""
    inner = Engine(lambda engine, batch: os.kill(os.getpid(), signal.SIGTERM))

    def step(engine: Engine, batch: object) -> None:
        inner.fit([1, 2], epochs=1)

    outer = Engine(step)
    outer.fit([1, 2], epochs=1)
    assert [engine.step for engine in (inner, outer)] == [1, 1]
    assert [engine.history.exit_code for engine in (inner, outer)] == [143, 143]


def test_after_a_second_signal_nothing_of_the_run_is_left_installed() -> None:
    before = {name: signal.getsignal(name) for name in HANDLED}

    def step(engine: Engine, batch: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # os.kill could have both seen as one

    with pytest.raises(KeyboardInterrupt):
        Engine(step).fit([1, 2], epochs=1)
    assert {name: signal.getsignal(name) for name in HANDLED} == before
