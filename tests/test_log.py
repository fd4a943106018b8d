"""The values of every few steps: compared with direct computations, and read back from the files that hold them."""

from __future__ import annotations

import contextlib
import csv
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import class_batches, make_trainer, refused, run_python
from ranks import on_ranks
from test_ranks import data as rank_data
from test_ranks import model as rank_model
from test_tensorboard import read
from torch import Tensor, nn

from camshaft.callbacks import (
    Accumulate,
    ClipGradients,
    Distributed,
    Log,
    MixedPrecision,
    RunCheckpoint,
    RunDirectory,
    Schedule,
    TensorBoard,
)
from camshaft.engine import Arriving, Callback, ConfigurationError, Engine, Logged, StepEnd, Trainer, at

TRAIN, VAL = class_batches(8, 8, 3, 5, 8, 8, 2), class_batches(16, 5)


class Heard(Callback):
    """Keeps what a Log announces."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_logged(self, event: Logged) -> None:
        self.rows.append({"epoch": event.epoch, "step": event.at, **event.values})

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows]


def losses_by_hand(num_epochs: int) -> list[float]:
    """The loss of each step of `make_trainer`, without it."""
    by_hand = make_trainer()
    model, optimizer = by_hand.parts["model"], by_hand.parts["optimizer"]
    losses = []
    for inputs, target in TRAIN * num_epochs:
        loss = nn.functional.cross_entropy(model(inputs), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def average(losses: list[float], first: int, last: int) -> float:
    """Over the samples of steps ``first`` to ``last``, counted from 1."""
    sizes = [len(inputs) for inputs, _ in TRAIN] * (last // len(TRAIN) + 1)
    steps = range(first - 1, last)
    return sum(losses[step] * sizes[step] for step in steps) / sum(sizes[step] for step in steps)


def test_a_row_has_the_averages_of_the_steps_since_the_last_one_or_the_epochs_start() -> None:
    heard = Heard()
    make_trainer(Log(every=3), heard).fit(TRAIN, VAL, epochs=2)
    losses = losses_by_hand(2)
    assert heard.column("step") == [3, 6, 9, 12]
    assert heard.column("epoch") == [1, 1, 2, 2]
    expected = [average(losses, first, last) for first, last in ((1, 3), (4, 6), (8, 9), (10, 12))]
    assert heard.column("loss") == pytest.approx(expected, rel=1e-6)


def test_it_is_the_same_with_validations_in_mid_epoch() -> None:
    plain, validated = Heard(), Heard()
    make_trainer(Log(every=3), plain).fit(TRAIN, epochs=2)
    make_trainer(Log(every=3), validated).fit(TRAIN, VAL, epochs=2, validate_every="2 steps")
    assert validated.column("loss") == pytest.approx(plain.column("loss"), rel=1e-12)


def test_learning_rates_have_the_names_of_their_groups_and_optimizers() -> None:
    heard = Heard()
    scheduler = Schedule(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), per="update")
    make_trainer(Log(every=2), heard, scheduler).fit(TRAIN, epochs=1)
    assert heard.column("lr") == [0.1 * 0.5**step for step in (2, 4, 6)]
    model = nn.Linear(2, 1)
    groups = [{"params": [model.weight], "lr": 0.5}, {"params": [model.bias], "lr": 0.25}]
    engine = Engine(
        lambda engine, batch: None,
        model=model,
        generator=torch.optim.SGD(groups),
        critic=torch.optim.Adam(nn.Linear(1, 1).parameters(), lr=0.125),
        callbacks=[Log(every=1), heard := Heard()],
    )
    engine.fit([torch.zeros(1)], epochs=1)
    (row,) = heard.rows
    names = ("lr_generator_0", "lr_generator_1", "lr_critic")
    assert [row[name] for name in names] == [0.5, 0.25, 0.125]


def gradient_norm(model: nn.Module) -> float:
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))


def test_gradient_norm_and_update_ratio_are_those_of_the_newest_update() -> None:
    heard = Heard()
    make_trainer(Log(every=3, gradients=["weight"]), heard).fit(TRAIN, epochs=1)
    by_hand = make_trainer()
    model, optimizer = by_hand.parts["model"], by_hand.parts["optimizer"]
    expected: list[tuple[float, float, float]] = []
    for inputs, target in TRAIN:
        nn.functional.cross_entropy(model(inputs), target).backward()
        before = [p.detach().clone() for p in model.parameters()]
        norm, of_weight = gradient_norm(model), float(model.weight.grad.norm())
        optimizer.step()
        optimizer.zero_grad()
        changes = [float((p.detach() - b).norm()) for p, b in zip(model.parameters(), before, strict=True)]
        expected.append((norm, of_weight, math.hypot(*changes) / math.hypot(*(float(b.norm()) for b in before))))
    got = [(row["grad_norm"], row["grad_norm/weight"], row["update_ratio"]) for row in heard.rows]
    assert got == [pytest.approx(expected[step - 1], rel=1e-5) for step in (3, 6)]


@pytest.mark.parametrize("every", [1, 2, 3, 5])
@pytest.mark.parametrize("window", [{"batches": 1}, {"batches": 2}, {"batches": 4}, {"samples": 20}])
def test_rows_have_the_newest_update_whatever_the_window(every: int, window: dict[str, int]) -> None:
    """Compared with a log of each step, in which a step without an update has no norm."""
    each, some = Heard(), Heard()
    for log, heard in ((Log(1, gradients=True), each), (Log(every, gradients=True), some)):
        make_trainer(log, heard, Accumulate(**window)).fit(TRAIN * 3, epochs=2)
    for row in some.rows:
        since = [one for one in each.rows if row["step"] - every < one["step"] <= row["step"] and "grad_norm" in one]
        assert row.get("grad_norm") == (since[-1]["grad_norm"] if since else None)
    assert any("grad_norm" in row for row in some.rows)


def test_gradients_are_those_at_its_place_in_the_order() -> None:
    before, after = Heard(), Heard()
    make_trainer(Log(1, gradients=True), ClipGradients(norm=1e-3), before).fit(TRAIN, epochs=1)
    make_trainer(ClipGradients(norm=1e-3), Log(1, gradients=True), after).fit(TRAIN, epochs=1)
    assert min(before.column("grad_norm")) > 0.1
    assert after.column("grad_norm") == pytest.approx([1e-3] * len(TRAIN), rel=1e-4)


def test_each_optimizer_has_its_own_norms() -> None:
    first, second = nn.Linear(2, 1), nn.Linear(2, 1)

    def step(engine: Engine, batch: Tensor) -> None:
        engine.update(first(batch).mean(), optimizer="one")
        engine.update(3 * second(batch).mean(), optimizer="two")

    optimizers: dict[str, Any] = {
        "one": torch.optim.SGD(first.parameters(), 0.1),
        "two": torch.optim.SGD(second.parameters(), 0.1),
    }
    log = Log(2, gradients=True)
    engine = Engine(step, first=first, second=second, **optimizers, callbacks=[log, heard := Heard()])
    engine.fit([torch.ones(4, 2)] * 4, epochs=1)
    assert heard.column("grad_norm_one") == pytest.approx([math.sqrt(3)] * 2)
    assert heard.column("grad_norm_two") == pytest.approx([3 * math.sqrt(3)] * 2)
    assert "update_ratio_two" in heard.rows[0]


def test_sparse_gradients_and_those_in_half_precision_have_norms_too() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    step = lambda engine, batch: engine.update(embedding(batch).sum())  # noqa: E731
    optimizer = torch.optim.SGD(embedding.parameters(), 0.1)
    engine = Engine(step, model=embedding, optimizer=optimizer, callbacks=[Log(1, gradients=True), heard := Heard()])
    engine.fit([torch.tensor([1, 1, 2])], epochs=1)
    assert heard.column("grad_norm") == pytest.approx([math.sqrt(10)])
    half = Heard()
    make_trainer(MixedPrecision("bf16"), Log(1, gradients=True), half, model=nn.Linear(4, 3).bfloat16()).fit(
        TRAIN, epochs=1
    )
    assert all(math.isfinite(one) for one in half.column("grad_norm"))


def test_a_nan_is_in_its_own_row_and_not_in_the_next_epoch() -> None:
    values = iter([1.0, 2.0, math.nan, 4.0, 5.0, 6.0, 7.0, 8.0])
    engine = Engine(lambda engine, batch: {"value": next(values)}, callbacks=[Log(2), heard := Heard()])
    engine.fit([torch.zeros(1)] * 4, epochs=2)
    assert str(heard.column("value")) == "[1.5, 4.0, 5.5, 7.5]"
    log_of_each = Log(1)
    values = iter([1.0, math.nan, 3.0])
    engine = Engine(lambda engine, batch: {"value": next(values)}, callbacks=[log_of_each, heard := Heard()])
    engine.fit([torch.zeros(1)] * 3, epochs=1)
    assert str(heard.column("value")) == "[1.0, nan, 3.0]"


def test_the_time_of_validations_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def step(engine: Engine, batch: Tensor) -> dict[str, float]:
        now[0] += 0.5 if engine.training else 100.0
        return {"loss": 1.0}

    engine = Engine(step, callbacks=[Log(2), heard := Heard()])
    engine.fit([torch.zeros(4)] * 4, [torch.zeros(1)], epochs=2, validate_every="1 steps")
    assert heard.column("steps_per_second") == [2.0] * 4
    assert heard.column("samples_per_second") == [8.0] * 4


def test_samples_count_by_num_samples() -> None:
    heard = Heard()
    model = nn.Linear(4, 3)
    Trainer(
        model, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss(),
        num_samples=lambda batch: torch.tensor(10.0), callbacks=[Log(1), heard],
    ).fit(TRAIN, epochs=1)  # fmt: skip
    rates = [row["samples_per_second"] / row["steps_per_second"] for row in heard.rows]
    assert rates == pytest.approx([10.0] * len(TRAIN))


def test_in_a_loop_of_ones_own_it_has_what_was_recorded() -> None:
    engine = Engine(callbacks=[Log(2), heard := Heard()])
    for _ in engine.epochs(1):
        for batch in engine.train([torch.ones(2), torch.ones(6) * 3, torch.ones(1)]):
            engine.record(value=batch.mean())
    assert heard.column("value") == [2.5]


@pytest.mark.parametrize("settings", [{"every": 0}, {"every": "10"}, {"every": 2.5}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="Log's every"):
        Log(**settings)


def test_names_that_match_no_parameter_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="wieght"):
        make_trainer(Log(gradients=["wieght"]))
    with refused(ConfigurationError, "no part is a module", "Write Engine(step, model=model, ...)."):
        Engine(lambda engine, batch: None, callbacks=[Log(gradients=["weight"])])


def test_a_log_that_nobody_hears_is_refused_before_step_1() -> None:
    trainer = make_trainer(Log())
    with refused(ConfigurationError, "Log(every=50) has nobody to tell its values.", "Attach RunDirectory()"):
        trainer.fit(TRAIN, epochs=1)
    assert trainer.step == 0


# Files ------------------------------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path / "steps.csv", newline="") as file:
        return list(csv.DictReader(file))


def times_left_out(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if "per_second" not in name} for row in rows]


def test_the_run_directory_has_a_row_for_each(tmp_path: Path) -> None:
    run, heard = RunDirectory(tmp_path, terminal=False), Heard()
    make_trainer(run, Log(2, gradients=True), heard).fit(TRAIN, VAL, epochs=2)
    written = [{name: float(value) for name, value in row.items()} for row in rows_of(run.path)]
    assert written == heard.rows
    assert list(written[0])[:2] == ["epoch", "step"]


def test_tensorboard_has_a_curve_for_each_beside_those_of_the_epochs(tmp_path: Path) -> None:
    heard = Heard()
    make_trainer(TensorBoard(tmp_path), Log(2), heard).fit(TRAIN, VAL, epochs=2)
    curves = read(tmp_path)
    assert [step for step, _ in curves["step/loss"]] == heard.column("step")
    assert [value for _, value in curves["step/loss"]] == pytest.approx(heard.column("loss"), rel=1e-6)
    assert [step for step, _ in curves["train_loss"]] == [7, 14]


def test_a_value_that_comes_later_gets_a_column_and_one_that_is_missing_an_empty_field(tmp_path: Path) -> None:
    def step(engine: Engine, batch: Tensor) -> dict[str, float]:
        return {"a": 1.0} if engine.step < 3 else {"b": 2.0, 'c,"=1+1': 3.0}

    run = RunDirectory(tmp_path, terminal=False)
    Engine(step, callbacks=[run, Log(1)]).fit([torch.zeros(1)] * 4, epochs=1)
    rows = rows_of(run.path)
    assert [row["a"] for row in rows] == ["1.0", "1.0", "", ""]
    assert [row["b"] for row in rows] == ["", "", "2.0", "2.0"]
    assert [row['c,"=1+1'] for row in rows] == ["", "", "3.0", "3.0"]


class CutOff(Callback):
    """Ends the run at a step: as a signal does, or with an error that no checkpoint knows of."""

    def __init__(self, step: int, how: str) -> None:
        self.step, self.how = step, how

    def attach(self, engine: Engine) -> None:
        engine.subscribe(StepEnd, self._cut, when=at(self.step))

    def _cut(self, event: StepEnd) -> None:
        if self.how == "error":
            raise KeyError("cut")
        event.engine.run.interrupt(signal.SIGTERM)


def files_of(root: Path, *cut: Callback) -> tuple[Path, list[dict[str, Any]]]:
    run, heard = RunDirectory(root / "runs", terminal=False), Heard()
    checkpoint = RunCheckpoint(root / "checkpoints", every_steps=4)
    trainer = make_trainer(run, TensorBoard(), Log(2, gradients=True), heard, checkpoint, *cut)
    with contextlib.suppress(KeyError):
        trainer.fit(TRAIN, VAL, epochs=3, validate_every="3 steps", resume="auto")
    return run.path, heard.rows


@pytest.mark.parametrize("how", ["signal", "error"])
@pytest.mark.parametrize("step", [1, 4, 5, 6, 7, 8, 11, 14])
def test_a_run_that_was_cut_and_resumed_has_the_rows_of_one_that_was_not(step: int, how: str, tmp_path: Path) -> None:
    """To the bit, each once, in the table and in TensorBoard; but for the times."""
    whole, rows = files_of(tmp_path / "whole")
    files_of(tmp_path / "cut", CutOff(step, how))
    resumed, _ = files_of(tmp_path / "cut")
    assert times_left_out(rows_of(resumed)) == times_left_out(rows_of(whole))
    assert len(rows_of(whole)) == len(rows) == 10
    curves, expected = read(resumed / "tensorboard"), read(whole / "tensorboard")
    assert curves.keys() == expected.keys()
    for name in [name for name in expected if "per_second" not in name]:
        assert curves[name] == expected[name], name


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_log import files_of, CutOff
class Kill(CutOff):
    def _cut(self, event):
        with open(event.engine.directory / "steps.csv", "ab") as file:
            file.write(b"2,8,0.5,0.")  # as if it died within a line
        os.kill(os.getpid(), signal.SIGKILL)
files_of(Path(sys.argv[1]), Kill(9, ""))
"""


def test_a_killed_run_goes_on_without_a_gap_a_row_twice_or_a_broken_one(tmp_path: Path) -> None:
    whole, _ = files_of(tmp_path / "whole")
    run = run_python(KILLED, tmp_path / "cut", Path(__file__).parent)
    assert run.returncode == -9, run.stderr
    resumed, _ = files_of(tmp_path / "cut")
    assert times_left_out(rows_of(resumed)) == times_left_out(rows_of(whole))
    assert read(resumed / "tensorboard")["step/loss"] == read(whole / "tensorboard")["step/loss"]


@pytest.fixture
def _arrives_late(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on an accelerator that is busy: nothing has arrived unless somebody waits for it."""
    monkeypatch.setattr(Arriving, "is_done", lambda self: False)
    return iter(())


@pytest.mark.usefixtures("_arrives_late")
@pytest.mark.parametrize("step", [4, 6, 7, 8])
def test_rows_that_are_on_their_way_when_a_run_is_saved_are_not_lost(step: int, tmp_path: Path) -> None:
    whole, rows = files_of(tmp_path / "whole")
    files_of(tmp_path / "cut", CutOff(step, "error"))
    resumed, _ = files_of(tmp_path / "cut")
    assert len(rows) == 10
    assert times_left_out(rows_of(resumed)) == times_left_out(rows_of(whole))
    assert read(resumed / "tensorboard")["step/loss"] == read(whole / "tensorboard")["step/loss"]


@pytest.mark.usefixtures("_arrives_late")
def test_rows_that_arrive_late_are_announced_at_the_epochs_end_with_their_own_steps() -> None:
    late, losses = Heard(), losses_by_hand(1)
    make_trainer(Log(every=3), late).fit(TRAIN, epochs=1)
    assert late.column("step") == [3, 6]
    assert late.column("loss") == pytest.approx([average(losses, 1, 3), average(losses, 4, 6)], rel=1e-6)


FULL = """
import resource, sys
import torch
from camshaft.callbacks import Log, RunDirectory
from camshaft.engine import Engine, StepEnd, at
engine = Engine(lambda engine, batch: {"loss": batch}, callbacks=[RunDirectory(sys.argv[1]), Log(1)])
engine.subscribe(StepEnd, lambda event: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)), when=at(3))
engine.fit(torch.ones(20, 1), epochs=1)
print(engine.step)
"""


def test_a_full_disk_is_told_once_and_does_not_end_the_training(tmp_path: Path) -> None:
    run = run_python(FULL, tmp_path)
    assert (run.returncode, run.stdout) == (0, "20\n"), run.stderr
    assert run.stderr.count("steps.csv could not be written") == 1


# Several ranks ----------------------------------------------------------------------------------------------


def logged_on_ranks() -> list[dict[str, float]]:
    net, heard = rank_model(), Heard()
    optimizer = torch.optim.SGD(net.parameters(), 0.3, momentum=0.9)
    callbacks = [Distributed(batch_norm="sync"), Log(2, gradients=True), heard]
    engine = Trainer(net, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks, seed=7)
    engine.fit(rank_data(35, batch_size=8), epochs=2)
    return times_left_out(heard.rows)


def test_on_two_ranks_the_rows_are_those_of_one_process() -> None:
    alone = logged_on_ranks()
    first, second = on_ranks(2, logged_on_ranks)
    assert first == second
    assert len(first) == len(alone) == 5
    for row, expected in zip(first, alone, strict=True):
        assert row == pytest.approx(expected, rel=1e-9)
