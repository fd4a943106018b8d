"""Several validation sets by name: each with its own averages and metrics, in one validation."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import class_batches, make_trainer, refused
from ranks import on_ranks
from test_ranks import assert_alike, outcome
from test_ranks import data as rank_data
from test_ranks import model as rank_model
from test_tensorboard import read
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from camshaft.callbacks import (
    BestCheckpoint,
    Distributed,
    EarlyStopping,
    ProgressBar,
    Report,
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
    Trainer,
    ValidationEnd,
    ValidationStart,
    ValidationStepEnd,
    at,
)

TRAIN, CLEAN, NOISY = class_batches(8, 8, 8), class_batches(8, 3, seed=1), class_batches(5, 5, 5, seed=2)
SETS = {"clean": CLEAN, "noisy": NOISY}


def trainer(*callbacks: Callback, seed: int | None = None) -> Engine:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    metrics = {"acc": MulticlassAccuracy(3, average="micro")}
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics=metrics, callbacks=callbacks, seed=seed)


def test_each_set_has_the_values_of_a_validation_of_its_own() -> None:
    both, clean, noisy = trainer(), trainer(), trainer()
    history = both.fit(TRAIN, SETS, epochs=3)
    for name, other, data in (("clean", clean, CLEAN), ("noisy", noisy, NOISY)):
        expected = other.fit(TRAIN, data, epochs=3)
        assert history["train_loss"] == expected["train_loss"]
        for value in ("loss", "acc"):
            assert history[f"val_{name}_{value}"] == expected[f"val_{value}"]
    assert both.num_validations == 3
    assert len(history.validations) == 3


def test_evaluate_gives_the_values_of_each_set() -> None:
    engine = trainer()
    engine.fit(TRAIN, epochs=1)
    clean, noisy = engine.evaluate(CLEAN), engine.evaluate(NOISY)
    expected = {f"clean_{name}": value for name, value in clean.items()}
    expected |= {f"noisy_{name}": value for name, value in noisy.items()}
    assert engine.evaluate(SETS) == expected


def test_events_carry_the_name_of_the_set() -> None:
    engine = trainer()
    seen: list[tuple[str, str, int]] = []
    engine.subscribe(
        ValidationStepEnd,
        lambda event: seen.append((event.dataset, event.engine.current.dataset, event.engine.validation_step)),
    )
    starts: list[tuple[str, int | None]] = []
    engine.subscribe(ValidationStart, lambda event: starts.append((engine.current.name, engine.current.length)))
    ends: list[list[str]] = []
    engine.subscribe(ValidationEnd, lambda event: ends.append(list(event.metrics)))
    engine.fit(TRAIN, SETS, epochs=1)
    names = ["clean", "clean", "noisy", "noisy", "noisy"]
    assert seen == [(name, name, number) for number, name in enumerate(names, start=1)]
    assert starts == [("val", 5)]
    assert ends == [["val_clean_loss", "val_clean_acc", "val_noisy_loss", "val_noisy_acc"]]


def test_a_loop_of_ones_own_validates_on_several_sets() -> None:
    engine = Engine(model=(model := nn.Linear(4, 3)))
    for _ in engine.epochs(1):
        for x, y in engine.train(TRAIN):
            engine.record(loss=nn.functional.cross_entropy(model(x), y))
        for x, y in engine.validate(SETS):
            engine.record(loss=nn.functional.cross_entropy(model(x), y))
    assert engine.history.rows[0]["val_clean_loss"] == pytest.approx(loss_of(model, CLEAN), rel=1e-6)
    assert engine.history.rows[0]["val_noisy_loss"] == pytest.approx(loss_of(model, NOISY), rel=1e-6)


@torch.no_grad()
def loss_of(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    x, y = (torch.cat(one) for one in zip(*data, strict=True))
    return float(nn.functional.cross_entropy(model(x), y))


@pytest.mark.parametrize("validate_every", [None, "2 steps"])
@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_a_run_that_is_cut_in_any_set_is_resumed_to_the_bit(
    batch: int, validate_every: str | None, tmp_path: Path
) -> None:
    def run(*callbacks: Callback, resume: bool = True) -> Engine:
        engine = trainer(WeightAverage(decay=0.5), *callbacks, seed=0)
        engine.fit(TRAIN, SETS, epochs=2, validate_every=validate_every, resume="auto" if resume else None)
        return engine

    class Cut(Callback):
        def attach(self, engine: Engine) -> None:
            engine.subscribe(ValidationStepEnd, lambda event: engine.run.interrupt(signal.SIGTERM), when=at(batch))

    whole = run(resume=False)
    run(RunCheckpoint(tmp_path), Cut())
    resumed = run(RunCheckpoint(tmp_path))
    assert resumed.history.rows == whole.history.rows
    assert resumed.history.validations == whole.history.validations
    assert resumed.num_validations == whole.num_validations
    for ours, theirs in zip(resumed.parts["model"].parameters(), whole.parts["model"].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_handlers_watch_the_value_of_a_set(tmp_path: Path) -> None:
    stop = EarlyStopping("val_noisy_acc", mode="max", patience=50)
    best = BestCheckpoint("val_clean_loss", directory=tmp_path)  # the loss of a trainer is minimised in every set
    plateau = Schedule(
        lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), monitor="val_noisy_loss"
    )
    engine = trainer(stop, best, plateau)
    history = engine.fit(TRAIN, SETS, epochs=3)
    assert best.best is not None
    assert best.best.value == min(history["val_clean_loss"])
    assert stop.best == max(history["val_noisy_acc"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("val_loss", 'Did you mean "val_noisy_loss"?'),
        ("val_clen_loss", 'Did you mean "val_clean_loss"?'),
        ("val_noisy_zebra", "but the values are: val_clean_loss, val_clean_acc, val_noisy_loss, val_noisy_acc."),
    ],
)
def test_the_value_of_a_set_that_will_not_exist_is_refused_before_step_1(name: str, said: str) -> None:
    engine = trainer(EarlyStopping(name, mode="min"))
    with pytest.raises(ConfigurationError) as info:
        engine.fit(TRAIN, SETS, epochs=1)
    assert said in str(info.value)
    assert engine.step == 0


def test_a_loop_of_ones_own_may_have_any_set() -> None:
    engine = trainer(EarlyStopping("val_clean_loss"))
    for _ in engine.epochs(1):
        for batch in engine.train(TRAIN):
            engine.stepper.train(engine, batch)  # type: ignore[union-attr]
        for batch in engine.validate(SETS):
            engine.stepper.evaluate(engine, batch)  # type: ignore[union-attr]
    assert engine.history.rows[0]["val_clean_loss"] > 0


@pytest.mark.parametrize(
    ("sets", "kind", "said"),
    [
        ({}, ConfigurationError, "val has the names []."),
        ({"": CLEAN}, ConfigurationError, "val has the names ['']."),
        ({1: CLEAN}, ConfigurationError, "val has the names [1]."),
        ({"a\nb": CLEAN}, ConfigurationError, "at most 100 printable characters"),
        ({"clean": CLEAN, "noisy": []}, DataError, "val['noisy'] is a list without a single batch."),
        ({"clean": CLEAN, "noisy": 3}, ConfigurationError, "val['noisy'] is a int"),
    ],
)
def test_sets_that_are_none_are_refused_before_step_1(sets: Any, kind: type[Exception], said: str) -> None:
    engine = trainer()
    with pytest.raises(kind) as info:
        engine.fit(TRAIN, sets, epochs=1)
    assert said in str(info.value)
    assert engine.step == 0


def test_a_set_that_turns_out_to_be_empty_is_told_by_its_name() -> None:
    engine = trainer()
    with refused(DataError, "val['noisy'] is a"):
        engine.fit(TRAIN, {"clean": CLEAN, "noisy": lambda: iter(())}, epochs=1)


def test_each_set_is_drawn_in_one_picture_with_the_training(tmp_path: Path) -> None:
    metrics = {"acc": MulticlassAccuracy(3), "confusion": MulticlassConfusionMatrix(3)}
    engine = make_trainer(RunDirectory(tmp_path, terminal=False), Report(), TensorBoard(), metrics=metrics)
    history = engine.fit(TRAIN, SETS, epochs=2)
    assert history.curves() == ["loss", "acc"]
    (axes,) = history.plot("loss").axes
    assert [line.get_label() for line in axes.lines] == ["training", "validation, clean", "validation, noisy"]
    assert engine.directory is not None
    pictures = {path.name for path in engine.directory.glob("*.png")}
    assert {"loss.png", "acc.png", "clean_confusion.png", "noisy_confusion.png"} <= pictures
    assert len(read(engine.directory / "tensorboard")["val_noisy_loss"]) == 2


def test_names_of_sets_are_saved_with_the_history(tmp_path: Path) -> None:
    trainer(RunCheckpoint(tmp_path)).fit(TRAIN, SETS, epochs=1)
    resumed = trainer(RunCheckpoint(tmp_path))
    resumed.fit(TRAIN, SETS, epochs=1, resume="auto")
    assert resumed.history.validation_sets == ["clean", "noisy"]
    assert resumed.history.curves() == ["loss", "acc"]


def test_a_bar_goes_over_the_batches_of_all_sets() -> None:
    totals: set[tuple[int, int | None]] = set()
    engine = trainer(ProgressBar())
    engine.subscribe(ValidationStepEnd, lambda event: totals.add((engine.validation_step, engine.current.length)))
    engine.fit(TRAIN, SETS, epochs=1)
    assert totals == {(number, 5) for number in range(1, 6)}


def on_one_or_two() -> dict[str, Any]:
    net = rank_model()
    metrics = {"acc": MulticlassAccuracy(2, average="micro")}
    optimizer = torch.optim.SGD(net.parameters(), 0.3)
    engine = Trainer(net, optimizer, nn.CrossEntropyLoss(), metrics=metrics, callbacks=[Distributed()], seed=7)
    sets = {"a": rank_data(37, shuffle=False, seed=1), "b": rank_data(9, batch_size=4, shuffle=False, seed=2)}
    engine.fit(rank_data(), sets, epochs=2)
    return outcome(engine, net)


def test_on_two_ranks_each_set_has_the_values_of_one_process() -> None:
    alone = on_one_or_two()
    first, second = on_ranks(2, on_one_or_two)
    assert first["rows"] == second["rows"]
    assert_alike(first, alone)
    assert "val_b_acc" in alone["rows"][0]
