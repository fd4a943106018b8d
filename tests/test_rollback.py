"""A run that goes back when a step has spoiled it ends, to the bit, as one whose data never held that batch."""

from __future__ import annotations

import logging
import math
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers import class_batches, refused, run_python
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from camshaft.callbacks import (
    Accumulate,
    BestCheckpoint,
    EarlyStopping,
    Log,
    ProgressBar,
    Rollback,
    RunCheckpoint,
    RunDirectory,
    Schedule,
    TensorBoard,
    WeightAverage,
)
from camshaft.engine import (
    Callback,
    ConfigurationError,
    DataError,
    Engine,
    GradientsReady,
    LossReady,
    Settled,
    StepEnd,
    Trainer,
    ValidationEnd,
    at,
)
from camshaft.viewer import Run
from camshaft.viewer.command import app
from camshaft.viewer.page import run_page

VAL = class_batches(8, 8, seed=1)
Batches = list[tuple[Tensor, Tensor]]


def batches(num: int = 24, *poisoned: int, by: float = math.nan, seed: int = 4) -> Batches:
    """Return training batches, of which some are spoiled: their inputs are multiplied by a number."""
    own = torch.Generator().manual_seed(seed)
    made = [(torch.randn(8, 4, generator=own), torch.randint(3, (8,), generator=own)) for _ in range(num)]
    return [(x * by if at in poisoned else x, y) for at, (x, y) in enumerate(made, start=1)]


def without(data: Batches, *left_out: int) -> Batches:
    return [batch for at, batch in enumerate(data, start=1) if at not in left_out]


def engine_of(style: str, *callbacks: Callback, normalized: bool = True) -> Engine:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(8) if normalized else nn.Identity()
    model = nn.Sequential(nn.Linear(4, 8), norm, nn.Dropout(0.3), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loss_of = nn.CrossEntropyLoss()
    if style == "trainer":
        return Trainer(model, optimizer, loss_of, callbacks=callbacks)

    def step(engine: Engine, batch: Any) -> Any:
        loss = loss_of(model(batch[0]), batch[1])
        if engine.training:
            engine.update(loss)
        return {"loss": loss}

    return Engine(None if style == "script" else step, callbacks=callbacks, model=model, optimizer=optimizer)


def run(engine: Engine, train: Any, *, style: str = "trainer", epochs: int = 1, **arguments: Any) -> Engine:
    torch.manual_seed(7)
    if style != "script":
        engine.fit(train, VAL, epochs=epochs, **arguments)
        return engine
    loss_of = nn.CrossEntropyLoss()
    for _ in engine.epochs(epochs, **arguments):
        for inputs, target in engine.train(train):
            loss = loss_of(engine.parts["model"](inputs), target)
            engine.record(loss=loss)
            engine.update(loss)
        for inputs, target in engine.validate(VAL):
            engine.record(loss=loss_of(engine.parts["model"](inputs), target))
    return engine


def assert_same(one: Engine, other: Engine) -> None:
    """The weights, the optimizer's state, the number of updates and the values of the validations."""
    for name in ("model", "optimizer", "weight_average", "scheduler"):
        if name in other.parts:
            mine, theirs = leaves(one.parts[name].state_dict()), leaves(other.parts[name].state_dict())
            for value, wanted in zip(mine, theirs, strict=True):
                assert torch.equal(value, wanted) if isinstance(value, Tensor) else value == wanted, name
    assert one.num_updates == other.num_updates
    assert [row["val_loss"] for row in one.history.validations] == [
        row["val_loss"] for row in other.history.validations
    ]
    assert one.history["train_loss"] == other.history["train_loss"]


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


STYLES = ["trainer", "step", "script"]
PLACES = random.Random(0).sample(range(2, 48), 3)  # of two epochs


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("place", [1, 24, *PLACES])
@pytest.mark.parametrize("every", [1, 7, 100])
def test_a_batch_with_nan_leaves_no_trace(style: str, place: int, every: int) -> None:
    data = batches(24, place if place <= 24 else place - 24)
    spoiled = {place} if place > 24 else {place, place + 24}

    def train() -> Iterator[Any]:  # the batch is spoiled in one of the epochs only, if it is one of the second
        yield from batches(24) if place > 24 and engine.epoch == 1 else data

    rollback = Rollback("nonfinite", every=every, keep=1)
    engine = engine_of(style, rollback)
    run(engine, train, style=style, epochs=2)
    clean = engine_of(style)

    def never() -> Iterator[Any]:
        first = 24 * (clean.epoch - 1)
        yield from without(batches(24), *(step - first for step in spoiled))

    run(clean, never, style=style, epochs=2)
    assert_same(engine, clean)
    assert engine.step == 48
    assert len(engine.history.remarks) == len(spoiled)


@pytest.mark.parametrize("place", [22, 23, 24, *random.Random(1).sample(range(25, 48), 3)])
def test_a_spike_leaves_no_trace(place: int) -> None:
    """A loss a thousand times the others'; steps after it were made before it was seen."""
    engine = run(engine_of("trainer", Rollback(every=5), normalized=False), batches(48, place, by=3000.0))
    assert_same(engine, run(engine_of("trainer", normalized=False), without(batches(48), place)))
    (remark,) = engine.history.remarks
    assert remark["step"] == place
    assert f"at step {place} (batch {place} of epoch 1) the loss was" in remark["text"]


def test_it_is_the_spike_that_would_have_changed_the_weights() -> None:
    """Or the test above would pass without a rollback."""
    spoiled = run(engine_of("trainer", normalized=False), batches(48, 30, by=3000.0))
    clean = run(engine_of("trainer", normalized=False), without(batches(48), 30))
    assert not torch.equal(spoiled.parts["model"][0].weight, clean.parts["model"][0].weight)


def test_several_batches_in_a_row_and_apart() -> None:
    rollback = Rollback("nonfinite", every=4)
    engine = run(engine_of("trainer", rollback), batches(24, 6, 7, 19))
    assert_same(engine, run(engine_of("trainer"), without(batches(24), 6, 7, 19)))
    assert [remark["step"] for remark in engine.history.remarks] == [6, 7, 19]


def test_a_function_decides() -> None:
    seen: list[int] = []

    def judge(loss: float, earlier: Any) -> bool:
        seen.append(len(earlier))
        return loss > 20

    engine = run(engine_of("trainer", Rollback(judge, every=5), normalized=False), batches(24, 3, by=500.0))
    assert_same(engine, run(engine_of("trainer", normalized=False), without(batches(24), 3)))
    assert max(seen) == 22


@pytest.mark.parametrize("batches_of_window", [2, 3, 5])
def test_within_a_window_of_accumulation(batches_of_window: int) -> None:
    callbacks = [Rollback("nonfinite", every=4), Accumulate(batches=batches_of_window)]
    engine = run(engine_of("trainer", *callbacks), batches(24, 11))
    clean = run(engine_of("trainer", Accumulate(batches=batches_of_window)), without(batches(24), 11))
    assert_same(engine, clean)


class Unbounded(torch.autograd.Function):
    """The same numbers, and infinite gradients where they are large."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (values,) = ctx.saved_tensors
        return torch.where(values.abs() > 50, math.inf, gradient)


@pytest.mark.parametrize(("window", "left_out"), [(1, [10]), (3, [10, 11, 12])])
def test_gradients_that_are_not_finite_leave_no_trace_either(window: int, left_out: list[int]) -> None:
    """Though the loss is finite; of a window of accumulation, it cannot be known whose they are."""

    def make(*callbacks: Callback) -> Engine:
        engine = engine_of("trainer", *callbacks)
        engine.parts["model"][0].register_forward_hook(lambda module, inputs, output: Unbounded.apply(output))
        return engine

    def accumulate() -> list[Callback]:
        return [Accumulate(batches=window)] if window > 1 else []

    engine = run(make(Rollback("nonfinite", every=3, keep=3), *accumulate()), batches(24, 10, by=500.0))
    assert_same(engine, run(make(*accumulate()), without(batches(24), *left_out)))
    assert "the gradients were not finite" in engine.history.remarks[0]["text"]


def test_with_everything_on(tmp_path: Path) -> None:
    def everything(place: Path) -> list[Callback]:
        return [
            RunDirectory(place, terminal=False),
            RunCheckpoint(place / "run", every_steps=3),
            Schedule(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97), per="update"),
            WeightAverage(decay=0.9),
            EarlyStopping("val_loss", mode="min", patience=50),
            BestCheckpoint("val_loss", mode="min"),
            Log(4, gradients=True),
            TensorBoard(),
            ProgressBar(),
        ]

    first, second = tmp_path / "first", tmp_path / "second"
    engine = engine_of("trainer", *everything(first), Rollback("nonfinite", every=6))
    run(engine, batches(24, 10), epochs=2)
    clean = run(engine_of("trainer", *everything(second)), without(batches(24), 10), epochs=2)
    assert_same(engine, clean)
    best = [torch.load(place, weights_only=True) for place in sorted(tmp_path.glob("*/*/checkpoints/best.pt"))]
    assert all(torch.equal(one, other) for one, other in zip(best[0].values(), best[1].values(), strict=True))
    (table,) = first.glob("*/history.csv")
    assert len(table.read_text().splitlines()) == 3
    (steps,) = first.glob("*/steps.csv")
    numbers = [int(line.split(",")[1]) for line in steps.read_text().splitlines()[1:]]
    assert numbers == sorted(set(numbers))
    (log,) = first.glob("*/log.log")
    assert "back to step 6, without the data of step 10" in log.read_text()


def test_no_checkpoint_holds_what_was_gone_back_from(tmp_path: Path) -> None:
    """Though the loss comes to the host steps later: a save looks at all of them before."""
    checkpoint = RunCheckpoint(tmp_path, every_steps=1, keep=100)
    run(engine_of("trainer", checkpoint, Rollback("nonfinite", every=8)), batches(24, 13))
    files = checkpoint.checkpoints.files()
    assert {file.step for file in files} == set(range(1, 25))
    for file in files:
        model = torch.load(file.path, weights_only=True)["parts"]["model"]
        assert all(torch.isfinite(value).all() for value in model.values()), file.step


@pytest.mark.parametrize("cut_at", [*range(8, 20)])
def test_interrupted_and_resumed_in_between(cut_at: int, tmp_path: Path) -> None:
    """Before the batch, within the steps after it that are made twice, and later."""
    data = batches(24, 13, by=math.nan)
    first = engine_of("trainer", RunCheckpoint(tmp_path), Rollback("nonfinite", every=5))
    stop = first.subscribe(StepEnd, lambda event: event.engine.run.interrupt(signal.SIGTERM), when=at(cut_at))
    run(first, data)
    stop.cancel()
    second = engine_of("trainer", RunCheckpoint(tmp_path), Rollback("nonfinite", every=5))
    run(second, data, resume="auto")
    assert_same(second, run(engine_of("trainer"), without(data, 13)))
    assert [remark["step"] for remark in second.history.remarks] == [13]


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_rollback import *
kill_at, directory = int(sys.argv[2]), sys.argv[3]
engine = engine_of("trainer", RunCheckpoint(directory, every_steps=2), Rollback("nonfinite", every=5))
def kill(event):
    if event.engine.step == kill_at and not os.path.exists(directory + "/killed"):
        open(directory + "/killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
engine.subscribe(Settled, kill)
run(engine, batches(24, 13), resume="auto")
torch.save(engine.parts["model"].state_dict(), directory + "/weights")
"""


@pytest.mark.parametrize("kill_at", [14, *(pytest.param(step, marks=pytest.mark.slow) for step in (12, 13, 17))])
def test_killed_and_resumed_in_between(kill_at: int, tmp_path: Path) -> None:
    tests = Path(__file__).parent
    assert run_python(KILLED, tests, kill_at, tmp_path).returncode == -signal.SIGKILL
    done = run_python(KILLED, tests, kill_at, tmp_path)
    assert done.returncode == 0, done.stderr
    clean = run(engine_of("trainer"), without(batches(24), 13)).parts["model"].state_dict()
    weights = torch.load(tmp_path / "weights", weights_only=True)
    assert all(torch.equal(weights[name], value) for name, value in clean.items())


class Numbered(Dataset[Any]):
    """Samples that are a function of their index; those of one batch of a fixed order are spoiled."""

    def __init__(self, spoiled: range = range(0)) -> None:
        self.spoiled = spoiled

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> Any:
        numbers = torch.randn(4, generator=torch.Generator().manual_seed(index))
        return numbers * (math.nan if index in self.spoiled else 1.0), index % 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_from_a_loader(num_workers: int) -> None:
    def loader(data: Numbered, indices: list[list[int]]) -> DataLoader[Any]:
        return DataLoader(data, batch_sampler=indices, num_workers=num_workers)

    order = torch.randperm(48, generator=torch.Generator().manual_seed(0)).tolist()
    lists = [order[begin : begin + 6] for begin in range(0, 48, 6)]
    spoiled = Numbered()
    spoiled.spoiled = lists[4]  # type: ignore[assignment]
    engine = run(engine_of("trainer", Rollback("nonfinite", every=3)), loader(spoiled, lists), epochs=2)
    clean = run(engine_of("trainer"), loader(Numbered(), lists[:4] + lists[5:]), epochs=2)
    assert_same(engine, clean)
    assert [remark["step"] for remark in engine.history.remarks] == [5, 13]


def test_the_memory_is_bounded_by_the_number_that_is_kept() -> None:
    rollback = Rollback("nonfinite", every=1, keep=3)
    engine = engine_of("trainer", rollback)
    numbers: list[int] = []
    engine.subscribe(Settled, lambda event: numbers.append(len(rollback._snapshots)))
    run(engine, batches(24, 13))
    assert max(numbers) == 3


def test_a_snapshot_shares_no_memory_with_the_run() -> None:
    rollback = Rollback("nonfinite", every=100)
    engine = engine_of("trainer", rollback)
    weights: list[Tensor] = []
    engine.subscribe(
        StepEnd, lambda event: weights.append(rollback._snapshots[0].state["parts"]["model"]["0.weight"].clone())
    )
    run(engine, batches(24, 13, 20))
    assert all(torch.equal(one, weights[0]) for one in weights)


def test_the_rates_are_lowered_each_time() -> None:
    rates: dict[int, float] = {}
    engine = engine_of("trainer", Rollback("nonfinite", every=4, lr_factor=0.5))
    engine.subscribe(
        GradientsReady, lambda event: rates.__setitem__(event.engine.step, event.optimizer.param_groups[0]["lr"])
    )
    run(engine, batches(24, 10, 11, 20))
    kept = {step: rate for step, rate in rates.items() if step not in (10, 11, 20)}
    assert kept == pytest.approx({step: 0.01 if step <= 8 else 0.0025 if step <= 16 else 0.00125 for step in kept})


def test_lowered_rates_are_the_resumed_runs_too(tmp_path: Path) -> None:
    def make() -> Engine:
        return engine_of(
            "trainer",
            RunCheckpoint(tmp_path, every_steps=1),
            Schedule(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97), per="update"),
            Rollback("nonfinite", every=4, lr_factor=0.5),
        )

    first = make()
    first.subscribe(StepEnd, lambda event: event.engine.run.interrupt(signal.SIGTERM), when=at(18))
    run(first, batches(24, 10))
    second = run(make(), batches(24, 10), resume="auto")
    assert second.parts["optimizer"].param_groups[0]["lr"] == pytest.approx(0.01 * 0.5 * 0.97**23)


def test_there_is_a_limit() -> None:
    engine = engine_of("trainer", Rollback("nonfinite", every=4, limit=2))
    with refused(DataError, "has gone back 2 times, and at step 9", "steps 3, 6", "Look at"):
        run(engine, batches(24, 3, 6, 9))


def test_a_second_fit_goes_on_as_the_first() -> None:
    engine, clean = engine_of("trainer", Rollback("nonfinite", every=4)), engine_of("trainer")
    for one in (engine, clean):
        run(one, batches(24, 10) if one is engine else without(batches(24), 10))
        run(one, batches(24, 5, seed=9) if one is engine else without(batches(24, seed=9), 5))
    assert_same(engine, clean)
    assert [remark["step"] for remark in engine.history.remarks] == [10, 29]


def test_weights_that_are_gone_back_from_are_not_validated() -> None:
    engine = engine_of("trainer", Rollback("nonfinite", every=4))
    losses: list[float] = []
    engine.subscribe(ValidationEnd, lambda event: losses.append(float(event.metrics["val_loss"])))
    run(engine, batches(24, 22, 23), validate_every="6 steps")
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))


def test_what_it_says(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        engine = run(engine_of("trainer", Rollback("nonfinite", every=4)), batches(24, 10))
    text = "Rollback: at step 10 (batch 10 of epoch 1) the loss was nan; back to step 8, without the data of step 10"
    assert engine.history.remarks == [{"epoch": 1, "step": 10, "text": text}]
    assert [record.message for record in caplog.records] == [f"{text}."]


def test_a_run_in_which_nothing_happens_has_no_other_numbers() -> None:
    """A noisy loss is not a spike, and neither is one that grows slowly."""
    noisy = [(x * (1 + 3 * (at % 7 == 0)), y) for at, (x, y) in enumerate(batches(200))]
    engine = run(engine_of("trainer", Rollback(every=10)), noisy)
    assert not engine.history.remarks
    assert_same(engine, run(engine_of("trainer"), noisy))


def test_with_several_losses_in_a_step() -> None:
    """What is looked at is their sum."""
    losses: list[float] = []

    def step(engine: Engine, batch: Any) -> None:
        for optimizer in ("one", "two"):
            engine.update(engine.parts["model"](batch[0]).square().mean(), optimizer=optimizer)

    def judge(loss: float, earlier: Any) -> bool:
        losses.append(loss)
        return False

    model = nn.Linear(4, 1)
    engine = Engine(
        step,
        callbacks=[Rollback(judge, every=5)],
        model=model,
        one=torch.optim.SGD([model.weight], lr=0.0),
        two=torch.optim.SGD([model.bias], lr=0.0),
    )
    seen: list[float] = []
    engine.subscribe(LossReady, lambda event: seen.append(float(event.loss.detach())))
    engine.fit(batches(10), epochs=1)
    assert losses == pytest.approx([sum(seen[at : at + 2]) for at in range(0, 20, 2)])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Rollback("nan"), "on='nan'"),  # type: ignore[arg-type]
        (lambda: Rollback(every=0), "every"),
        (lambda: Rollback(keep=0), "keep"),
        (lambda: Rollback(limit=0), "limit"),
        (lambda: Rollback(window=5), "window"),
        (lambda: Rollback(threshold=0), "threshold=0"),
        (lambda: Rollback(lr_factor=-1.0), "lr_factor=-1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(make: Callable[[], Rollback], said: str) -> None:
    with refused(ConfigurationError, said):
        make()


def test_the_page_of_the_run_and_the_command_say_it(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path, terminal=False)
    engine = run(engine_of("trainer", directory, Rollback("nonfinite", every=4)), batches(24, 10))
    seen = Run(directory.path)
    assert seen.remarks == engine.history.remarks
    text = "at step 10 (batch 10 of epoch 1) the loss was nan; back to step 8, without the data of step 10"
    assert text in run_page(seen, None)
    shown = CliRunner().invoke(app, ["show", str(directory.path)])
    assert text in " ".join(shown.output.split())
