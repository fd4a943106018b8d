"""What a step costs, counted instead of timed: calls of ours, reads of the device, tensors that stay."""

from __future__ import annotations

import gc
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from helpers import Batch, class_batches
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

import camshaft.callbacks
import camshaft.engine
from camshaft.callbacks import (
    Accumulate,
    BestCheckpoint,
    ClipGradients,
    EarlyStopping,
    FreezeUntil,
    Ignite,
    Log,
    Metrics,
    MixedPrecision,
    Penalty,
    Placement,
    ProgressBar,
    Report,
    RunCheckpoint,
    RunDirectory,
    Schedule,
    Steering,
    StopOnNonFinite,
    TensorBoard,
    WeightAverage,
    warmup_cosine,
)
from camshaft.engine import Callback, Engine, StepEnd, Trainer, at, every

OURS = tuple(str(Path(str(package.__file__)).parent) for package in (camshaft.engine, camshaft.callbacks))

# Calls of functions of ours per step. Raise a ceiling only for something that is worth its cost to everybody.
IDLE_STEP = 2  # Engine.train and the step function
EVERYTHING_ON_STEP = 23
EVERY_HANDLER_STEP = 85


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Work this small is many times slower when threads share it on a busy machine."""
    num = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num)


class Terminal(io.StringIO):
    """A terminal, on which bars are drawn."""

    def isatty(self) -> bool:
        return True


class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for a value of the device.

    The CPU stands in for a device: there, every read counts but those of torch's averages of weights, whose count of
    updates lives on the host wherever the model is.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not in torch's types
        self.reads: Counter[str] = Counter()
        self.num_operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.num_operations += 1
        name, kwargs = str(func), kwargs or {}
        if name.startswith(("aten._local_scalar_dense", "aten.equal", "aten.nonzero")):
            waits = not _is_called_from(swa_utils.__file__)
        elif name.startswith("aten._to_copy"):
            waits = args[0].device.type != "cpu" and kwargs.get("device") == torch.device("cpu")
        else:
            waits = name.startswith("aten.copy_") and args[0].device.type == "cpu" != args[1].device.type
        self.reads[name] += waits
        return func(*args, **kwargs)


def _is_called_from(file: str) -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != file:
        frame = frame.f_back
    return frame is not None


@contextmanager
def counted_calls(calls: Counter[str]) -> Iterator[None]:
    """Count the calls of functions of this package and of this file, by name; resuming a generator is one, too."""

    def look(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith((*OURS, __file__)):
            calls[frame.f_code.co_qualname] += 1

    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(None)


def between(engine: Engine, first: int, last: int, watch: Callable[[], AbstractContextManager[Any]]) -> None:
    """Enter ``watch()`` for the steps from after the end of ``first`` to the end of ``last``."""
    stack = ExitStack()
    engine.subscribe(StepEnd, lambda event: stack.enter_context(watch()), when=at(first))
    engine.subscribe(StepEnd, lambda event: stack.close(), when=at(last))


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float().mean()


def trainer_of(folder: Path, *more: Callback, model: nn.Module, metrics: Mapping[str, Any] | None = None) -> Engine:
    """A trainer with what most runs have: bar, early stopping, best checkpoint, run directory."""
    callbacks = [
        *more,
        RunDirectory(folder, terminal=False),
        ProgressBar(repaint_seconds=1e6, file=Terminal()),
        EarlyStopping("val_acc", mode="max", patience=3),
        BestCheckpoint("val_acc", mode="max"),
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    metrics = metrics or {"acc": accuracy}
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics=metrics, callbacks=callbacks)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def trainer_with_every_handler(folder: Path, device: str = "cpu") -> Engine:
    """A trainer with all stock handlers that attach, and a metric of each kind; nothing is due within the epoch."""
    return trainer_of(
        folder / "runs",
        Placement(device),
        MixedPrecision("bf16"),
        Metrics({"extra": accuracy}),
        Penalty(l1=1e-5, l2=1e-5),
        FreezeUntil(2, ["0.bias"]),
        StopOnNonFinite("raise", every_steps=50),
        Accumulate(batches=2),
        ClipGradients(norm=1.0),
        Schedule(lambda optimizer: warmup_cosine(optimizer, warmup=10, total=10_000), per="update"),
        WeightAverage("ema", decay=0.9),
        Log(every=1000, gradients=True),
        TensorBoard(folder / "tensorboard"),
        RunCheckpoint(folder / "checkpoints"),
        Ignite(),
        Report(folder),
        model=net(),
        metrics={
            "acc": accuracy,
            "torch_acc": MulticlassAccuracy(3, average="micro", validate_args=False),
            "confusion": MulticlassConfusionMatrix(3, validate_args=False),
        },
    )


def data() -> tuple[list[Batch], list[Batch]]:
    return class_batches(*[8] * 160), class_batches(8, 8, seed=1)


def calls_per_step(engine: Engine, train: object, val: object = None) -> dict[str, float]:
    """Return the calls per step by function, over a hundred steps in mid-epoch."""
    calls: Counter[str] = Counter()
    between(engine, 20, 120, lambda: counted_calls(calls))
    engine.fit(train, val, epochs=1)  # type: ignore[arg-type]  # lists of batches
    return {name: count / 100 for name, count in calls.most_common() if count >= 50}  # without the watching itself


def test_idle_step_calls() -> None:
    def step(engine: Engine, batch: object) -> None: ...

    calls = calls_per_step(Engine(step), [None] * 160)
    assert sum(calls.values()) <= IDLE_STEP, calls


def test_handlers_that_are_not_due_cost_no_call() -> None:
    def step(engine: Engine, batch: object) -> None: ...

    engine = Engine(step)
    for _ in range(10):
        engine.subscribe(StepEnd, lambda event: None, when=every(1000))
    calls = calls_per_step(engine, [None] * 160)
    assert sum(calls.values()) <= IDLE_STEP, calls


def test_steering_costs_no_call_in_a_step_without_an_order(tmp_path: Path) -> None:
    """Nobody is called when a step has settled, but a few times a second; an order that is to come costs nothing."""
    order = {"name": "1", "time": 1.0, "epoch": 1, "step": 150, "at": "step", "order": {"what": "lr", "factor": 0.5}}
    (tmp_path / "steering.jsonl").write_text(f"{json.dumps(order)}\n")
    without = calls_per_step(trainer_of(tmp_path, model=net()), *data())
    engine = trainer_of(tmp_path, Steering(every_seconds=60, repeat=tmp_path), model=net())
    assert calls_per_step(engine, *data()) == without
    assert [one["step"] for one in engine.history.remarks] == [150]


def test_calls_with_everything_on(tmp_path: Path) -> None:
    calls = calls_per_step(trainer_of(tmp_path, model=net()), *data())
    assert sum(calls.values()) <= EVERYTHING_ON_STEP, calls


def test_calls_with_every_handler(tmp_path: Path) -> None:
    calls = calls_per_step(trainer_with_every_handler(tmp_path), *data())
    assert sum(calls.values()) <= EVERY_HANDLER_STEP, calls


def test_the_counter_of_host_reads_sees_them() -> None:
    with HostReads() as watch:
        value = torch.tensor([1.0, 2.0]).sum()
        assert (float(value), value.item(), bool(value > 0)) == (3.0, 3.0, True)
    assert watch.reads.total() == 3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_step_reads_the_device(tmp_path: Path, device: str) -> None:
    trainer = trainer_with_every_handler(tmp_path, device)
    watch = HostReads()
    between(trainer, 100, 149, lambda: watch)  # the flag of StopOnNonFinite is read at 100 and 150
    trainer.fit(*data(), epochs=1)
    assert watch.num_operations > 49 * 50  # it did see the steps
    assert not watch.reads.total(), watch.reads


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_weight_on_the_device_is_read(device: str) -> None:
    def step(engine: Engine, batch: Tensor) -> None:
        engine.record(loss=batch.mean(), weight=batch.sum())
        engine.measure(batch, None, weight=batch.sum())

    engine = Engine(step)
    engine.stages.add_metrics({"share": lambda output, target: output.mean()})
    watch = HostReads()
    between(engine, 2, 4, lambda: watch)
    history = engine.fit([torch.ones(3, device=device)] * 5, epochs=1)
    assert watch.num_operations > 2 * 10
    assert not watch.reads.total(), watch.reads
    assert history["train_loss"] == history["train_share"] == [1.0]


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu(tmp_path: Path) -> None:
    @contextmanager
    def refuse_waiting() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer = trainer_with_every_handler(tmp_path, "cuda")
    between(trainer, 100, 149, refuse_waiting)
    trainer.fit(*data(), epochs=1)


def test_no_tensor_stays_behind(tmp_path: Path) -> None:
    trainer = trainer_with_every_handler(tmp_path)
    alive: dict[int, int] = {}

    def count(event: StepEnd) -> None:
        gc.collect()
        alive[event.engine.step] = sum(issubclass(type(one), Tensor) for one in gc.get_objects())

    for step in (100, 1000):  # both after an update and a reading of the flag
        trainer.subscribe(StepEnd, count, when=at(step))
    train, val = data()
    trainer.fit(train * 7, val, epochs=1)
    assert alive[1000] <= alive[100]
