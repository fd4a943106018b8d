"""What ends one of several ranks ends all of them, soon, and all of them say which one it was.

Real processes: forked for most, started by torchrun where it matters.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import struck
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.utils.data import DataLoader, Dataset

from camshaft.callbacks import Distributed, RunCheckpoint
from camshaft.engine import (
    Callback,
    CheckpointDirectory,
    Engine,
    EpochEnd,
    Event,
    FitEnd,
    StepEnd,
    Trainer,
    ValidationStepEnd,
    at,
)

SOON = 5.0  # seconds
LIMIT = 40.0  # after which a process that has not ended is killed


class Ended:
    """How a process ended: its exit code, what it printed, and when, by the clock that all processes share."""

    def __init__(self, exit_code: int | None, printed: str, seconds: float) -> None:
        self.exit_code, self.printed, self.seconds = exit_code, printed, seconds


def ends_of_ranks(world: int, function: Callable[..., Any], *args: Any, lingers: int | None = None) -> list[Ended]:
    """Return how each rank ends that calls ``function(*args)``, as a script would; one that lingers is killed."""
    with tempfile.TemporaryDirectory() as name:
        directory, context = Path(name), multiprocessing.get_context("fork")
        processes = [
            context.Process(target=_as_a_script, args=(directory, rank, world, function, args))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        ends = _ends(processes, lingers)
        return [
            Ended(process.exitcode, (directory / f"printed-{rank}").read_text(), ends[rank])
            for rank, process in enumerate(processes)
        ]


def _ends(processes: list[Any], lingers: int | None) -> list[float]:
    """Return when each process ended; infinite for those that had to be killed."""
    last, ends = time.monotonic() + LIMIT, [float("inf")] * len(processes)
    while (now := time.monotonic()) < last and float("inf") in ends[:lingers]:
        for number, process in enumerate(processes):
            if not process.is_alive():
                ends[number] = min(ends[number], now)
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()
    return ends


def _as_a_script(directory: Path, rank: int, world: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    sys.stdout = sys.stderr = open(directory / f"printed-{rank}", "w", buffering=1)  # noqa: SIM115  # for as long as this process
    os.dup2(sys.stdout.fileno(), 2)
    code = 0
    try:
        store = FileStore(str(directory / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        function(*args)
        dist.destroy_process_group()
    except BaseException:
        sys.excepthook(*sys.exc_info())  # as the interpreter does
        sys.stderr.flush()
        code = 1
    os._exit(code)


# One rank fails ---------------------------------------------------------------------------------------------


class FaultError(ValueError):
    """What goes wrong in these tests."""


def rank() -> int:
    return int(os.environ["RANK"])


class Samples(Dataset[Any]):
    """Numbers to learn a sum from; ``fault`` is called with each index that is read on rank 1."""

    def __init__(self, num: int, fault: Callable[[int], None] = lambda index: None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(num, 4, generator=generator)
        self.fault = fault

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        if rank() == 1:
            self.fault(index)
        return self.inputs[index], self.inputs[index].sum().reshape(1)


def regression(*callbacks: Callback) -> Engine:
    torch.manual_seed(0)
    net = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    return Trainer(net, optimizer, nn.MSELoss(), callbacks=[Distributed(), *callbacks], seed=1)


def note_the_time() -> None:
    """Print when the fault happened."""
    os.write(2, f"fault at {time.monotonic()}\n".encode())


def fail(*_: object) -> None:
    note_the_time()
    raise FaultError("the fault of this test")


def kill() -> None:
    note_the_time()
    os.kill(os.getpid(), signal.SIGKILL)


def at_event(event: type[Event], count: int, action: Callable[[], None], where: int = 1) -> Engine:
    """An engine that does something at one event of one rank."""
    engine = regression()
    if rank() == where:
        engine.subscribe(event, lambda _: action(), when=at(count))
    return engine


def train(engine: Engine, *, num_workers: int = 0, fault: Callable[[int], None] = lambda index: None) -> None:
    data = DataLoader(Samples(96, fault), 8, shuffle=True, num_workers=num_workers)
    engine.fit(data, DataLoader(Samples(40), 8), epochs=3)


def fail_in_a_handler() -> None:
    train(at_event(StepEnd, 3, fail))


def fail_with_a_runtime_error() -> None:
    def fail_like_torch() -> None:
        note_the_time()
        raise RuntimeError("the fault of this test")

    train(at_event(StepEnd, 3, fail_like_torch))


def fail_in_the_dataset() -> None:
    train(regression(), fault=lambda index: fail() if index == 50 else None)


def fail_in_a_worker() -> None:
    train(regression(), num_workers=1, fault=lambda index: fail() if index == 50 else None)


def fail_in_a_validation() -> None:
    train(at_event(ValidationStepEnd, 2, fail))


def fail_at_the_end() -> None:
    train(at_event(FitEnd, 1, fail))


def fail_in_a_step() -> None:
    def step(engine: Engine, batch: Any) -> None:
        if rank() == 1 and engine.step == 3:
            fail()
        engine.update(engine.parts["model"](batch[0]).mean())

    net = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    Engine(step, model=net, optimizer=optimizer, callbacks=[Distributed()], seed=1).fit(
        DataLoader(Samples(96), 8), epochs=3
    )


def fail_in_a_script() -> None:
    engine = regression()
    net = engine.parts["model"]
    for _ in engine.epochs(3):
        for inputs, _ in engine.train(DataLoader(Samples(96), 8)):
            if rank() == 1 and engine.step == 3:
                fail()
            engine.update(net(inputs).mean())


def fail_and_linger() -> None:
    try:
        train(at_event(StepEnd, 3, fail))
    except FaultError:
        time.sleep(60)


def fail_in_a_validation_and_linger() -> None:
    try:
        train(at_event(ValidationStepEnd, 2, fail))
    except FaultError:
        time.sleep(60)


def be_killed() -> None:
    train(at_event(StepEnd, 3, kill))


def be_killed_in_a_validation() -> None:
    train(at_event(ValidationStepEnd, 2, kill))


class OnlyOnMain(Callback):
    main_only = True

    def on_epoch_end(self, event: EpochEnd) -> None:
        fail()


def fail_in_a_handler_of_rank_0() -> None:
    train(regression(OnlyOnMain()))


def fail_to_save(directory: Path) -> None:
    checkpoint = RunCheckpoint(directory, every_steps=2, on_error="raise")

    def save(state: object, step: int) -> None:
        raise OSError(28, "no space for this test")

    checkpoint.checkpoints.save = save  # type: ignore[method-assign, assignment]
    train(regression(checkpoint))


def be_signalled_twice() -> None:
    """The first signal lets the step be finished; the second has its usual effect."""

    def send_twice() -> None:
        note_the_time()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    train(at_event(StepEnd, 3, send_twice))


def test_a_second_signal_to_one_rank_ends_all_of_them() -> None:
    ends = ends_of_ranks(2, be_signalled_twice)
    assert ends[1].exit_code == -signal.SIGTERM
    assert_all_have_ended(ends, 1, "is gone")


def be_signalled_in_a_save(directory: Path) -> None:
    """Rank 0 gets a signal while it writes, when the others wait for it."""
    checkpoint = RunCheckpoint(directory, every_steps=3)
    save = checkpoint.checkpoints.save

    def send_and_save(state: dict[str, Any], step: int) -> Any:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return save(state, step)

    checkpoint.checkpoints.save = send_and_save  # type: ignore[method-assign]
    engine = regression(checkpoint)
    train(engine)
    print(f"ended with {engine.history.exit_code} after step {engine.step}", flush=True)


def test_a_signal_in_a_save_ends_all_ranks_after_one_step_with_a_checkpoint_of_it(tmp_path: Path) -> None:
    ends = ends_of_ranks(2, be_signalled_in_a_save, tmp_path)
    newest = CheckpointDirectory(tmp_path).files()[0]
    assert newest.step in (4, 5)  # the other rank was told before it had made many more
    for end in ends:
        assert end.exit_code == 0
        assert f"ended with 143 after step {newest.step}" in end.printed


def save_each_step(directory: Path, fatal: int) -> None:
    """Resume, and save after each step; rank 0 is killed before its ``fatal``-th call that touches the disk.

    A write counts as a twentieth of one, because a save has so many of them.
    """
    calls = 0.0

    def strike(name: str) -> None:
        nonlocal calls
        calls += 0.05 if name == "write" else 1
        if calls >= fatal and rank() == 0:
            kill()

    with struck(strike):
        engine = regression(RunCheckpoint(directory, every_steps=1, keep=2))
        data = DataLoader(Samples(96), 8, shuffle=True)
        engine.fit(data, epochs=100, resume="auto")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_rank_that_is_killed_in_a_save_leaves_a_good_checkpoint(seed: int, tmp_path: Path) -> None:
    """Ten kills each, and a resume after each of them; at last a byte of the newest file is another one."""
    draw, steps = random.Random(seed), []
    for _ in range(10):
        ends = ends_of_ranks(2, save_each_step, tmp_path, draw.randint(15, 80))
        assert ends[0].exit_code == -signal.SIGKILL, ends[0].printed
        assert ends[1].exit_code == 1, ends[1].printed
        steps.append(good_step(tmp_path))
    assert steps == sorted(steps)
    assert steps[-1] > 10
    newest = CheckpointDirectory(tmp_path).files()[0].path
    flip_a_byte(newest, draw)
    ends_of_ranks(2, save_each_step, tmp_path, 60)
    assert newest.with_suffix(".damaged").exists()
    assert good_step(tmp_path) >= steps[-1] - 1


def good_step(directory: Path) -> int:
    """Return the step of the newest checkpoint, which loads; 0 if the first one was not written."""
    newest = CheckpointDirectory(directory).load_newest()
    return 0 if newest is None else int(newest[0]["counters"]["step"])


def flip_a_byte(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def slow(function: Callable[[], None]) -> Any:
    return pytest.param(function, marks=pytest.mark.slow)


def assert_all_have_ended(ends: list[Ended], failed: int, says: str, *, lingers: bool = False) -> None:
    """All ranks ended soon after the first; each of the others names the one that failed."""
    others = [end for number, end in enumerate(ends) if number != failed]
    for end in others:
        assert end.exit_code == 1, end.printed + ends[failed].printed
        assert f"Rank {failed} " in end.printed, end.printed
        assert says in end.printed, end.printed
    fault = float(ends[failed].printed.split("fault at ")[1].split()[0])
    assert max(end.seconds for end in (others if lingers else ends)) - fault < SOON


@pytest.mark.parametrize(
    "function",
    [
        fail_in_a_script,
        fail_in_a_validation,
        slow(fail_with_a_runtime_error),
        slow(fail_in_a_handler),
        slow(fail_in_the_dataset),
        slow(fail_in_a_worker),
        slow(fail_at_the_end),
        slow(fail_in_a_step),
    ],
)
def test_an_error_on_one_rank_ends_all_of_them_and_is_named_on_each(function: Callable[[], None]) -> None:
    ends = ends_of_ranks(2, function)
    assert_all_have_ended(ends, 1, "the fault of this test")
    assert "the fault of this test" in ends[1].printed
    assert "cannot continue alone" not in ends[1].printed


@pytest.mark.parametrize("function", [fail_in_a_validation_and_linger, slow(fail_and_linger)])
def test_nobody_waits_for_a_rank_that_has_failed_and_does_not_end(function: Callable[[], None]) -> None:
    ends = ends_of_ranks(2, function, lingers=1)
    assert_all_have_ended(ends, 1, "the fault of this test", lingers=True)


@pytest.mark.parametrize("function", [be_killed_in_a_validation, slow(be_killed)])
def test_a_rank_that_is_killed_ends_all_of_them_and_is_named_on_each(function: Callable[[], None]) -> None:
    ends = ends_of_ranks(3, function)
    assert ends[1].exit_code == -signal.SIGKILL
    assert_all_have_ended(ends, 1, "is gone")


@pytest.mark.slow
def test_an_error_on_rank_0_alone_ends_all_ranks() -> None:
    assert_all_have_ended(ends_of_ranks(2, fail_in_a_handler_of_rank_0), 0, "the fault of this test")


def test_a_failed_save_is_raised_on_every_rank(tmp_path: Path) -> None:
    for end in ends_of_ranks(2, fail_to_save, tmp_path):
        assert end.exit_code == 1
        assert "no space for this test" in end.printed
        assert "cannot continue alone" not in end.printed
