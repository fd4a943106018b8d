"""Metrics, several optimizers and ragged ends on several ranks: the numbers of one process, and no sample twice."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.metrics import Accuracy, Loss
from ranks import on_ranks
from test_ranks import TOLERANCE, accuracy, assert_alike, data, everything_on, model, outcome
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCohenKappa,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)
from torchmetrics.regression import PearsonCorrCoef

from camshaft.callbacks import (
    Accumulate,
    BestCheckpoint,
    Distributed,
    EarlyStopping,
    Ignite,
    RunCheckpoint,
    RunDirectory,
    StopOnNonFinite,
)
from camshaft.engine import (
    Callback,
    CheckpointError,
    Engine,
    EngineStateError,
    EpochEnd,
    StepEnd,
    Trainer,
    at,
    every,
    repeat,
)

Outcome = dict[str, Any]


def trained(*callbacks: Callback, metrics: dict[str, Any] | None = None) -> tuple[Engine, nn.Module]:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), 0.3, momentum=0.9)
    measured, handlers = metrics or {"acc": accuracy}, [Distributed(), *callbacks]
    return Trainer(net, optimizer, nn.CrossEntropyLoss(), metrics=measured, callbacks=handlers, seed=7), net


# Ragged ends ------------------------------------------------------------------------------------------------


def with_few_samples() -> Outcome:
    """The last batch, and the whole validation, have fewer samples than there are ranks."""
    engine, net = trained(Accumulate(3))
    engine.fit(data(49), data(2, shuffle=False, seed=1), epochs=3)
    return outcome(engine, net)


def with_batches_smaller_than_the_world() -> Outcome:
    engine, net = trained()
    engine.fit(data(11, batch_size=2), data(3, batch_size=1, shuffle=False), epochs=2)
    return outcome(engine, net)


def with_windows_of_samples() -> Outcome:
    engine, net = trained(Accumulate(samples=40))
    engine.fit(data(), data(37, shuffle=False), epochs=2)
    return outcome(engine, net)


def with_passes_longer_than_an_epoch() -> Outcome:
    engine, net = trained()
    engine.fit(repeat(data(50)), data(37, shuffle=False), epochs=3, epoch_length=5, validate_every="2 steps")
    return outcome(engine, net)


def with_a_list() -> Outcome:
    engine, net = trained()
    engine.fit(list(data(50, shuffle=False)), list(data(3, shuffle=False)), epochs=2)
    return outcome(engine, net)


def with_a_weight_of_its_own() -> Outcome:
    """The loss is the mean over some samples of a batch, which are many on one rank and few on another."""
    net = model()

    def step(engine: Engine, batch: tuple[Tensor, Tensor]) -> None:
        kept = batch[0][:, 0] > 0.3
        losses = nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="none")
        loss = (losses * kept).sum() / kept.sum().clamp(min=1)
        if engine.training:
            engine.update(loss, num_samples=float(kept.sum()))
        engine.record(loss=loss, weight=kept.sum())

    optimizer = torch.optim.SGD(net.parameters(), 0.3)
    engine = Engine(step, model=net, optimizer=optimizer, callbacks=[Distributed()], seed=7)
    engine.fit(data(50), data(37, shuffle=False), epochs=2)
    return outcome(engine, net)


RAGGED = [
    with_few_samples,
    with_batches_smaller_than_the_world,
    with_windows_of_samples,
    with_passes_longer_than_an_epoch,
    with_a_list,
    with_a_weight_of_its_own,
]


@pytest.mark.parametrize("run", RAGGED)
def test_ragged_ends_give_the_numbers_of_one_process(run: Callable[[], Outcome]) -> None:
    alone, results = run(), on_ranks(4, run)
    for result in results:
        assert torch.equal(result["weights"], results[0]["weights"])
    assert_alike(results[0], alone)


def that_stops_early() -> Outcome:
    engine, net = trained(EarlyStopping("val_loss", patience=1, min_delta=0.1))
    engine.fit(data(), data(37, shuffle=False, seed=1), epochs=20)
    return outcome(engine, net)


def test_early_stopping_ends_all_ranks_after_the_epoch_of_one_process() -> None:
    alone, results = that_stops_early(), on_ranks(2, that_stops_early)
    assert alone["reason"].startswith("EarlyStopping")
    for result in results:
        assert_alike(result, alone)


# Metrics ----------------------------------------------------------------------------------------------------


def with_torchmetrics(num_val: int) -> list[dict[str, Any]]:
    five = MetricCollection(
        {
            "accuracy": MulticlassAccuracy(2),
            "auroc": MulticlassAUROC(2),
            "f1": MulticlassF1Score(2),
            "matrix": MulticlassConfusionMatrix(2),
            "kappa": MulticlassCohenKappa(2),
        }
    )
    engine, _ = trained(metrics={"five": five, "acc": accuracy})
    engine.fit(data(50), data(num_val, shuffle=False, seed=1), epochs=2)
    return [*engine.history.rows, engine.evaluate(data(37, shuffle=False))]


def with_ignite() -> list[dict[str, Any]]:
    bridge = Ignite()
    engine, _ = trained(bridge, metrics={"accuracy": Accuracy(), "loss_again": Loss(nn.CrossEntropyLoss())})
    Accuracy().attach(bridge.val, "bridged")
    engine.fit(data(50), data(37, shuffle=False, seed=1), epochs=2)
    return [*engine.history.rows, dict(bridge.val.state.metrics)]


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("num_val", [37, 3])
@pytest.mark.parametrize("world", [2, 4])
def test_torchmetrics_are_those_of_one_process(world: int, num_val: int) -> None:
    alone = with_torchmetrics(num_val)
    for result in on_ranks(world, with_torchmetrics, num_val):
        close(result, alone)


@pytest.mark.parametrize("world", [2, 4])
def test_ignite_metrics_are_those_of_one_process(world: int) -> None:
    alone = with_ignite()
    for result in on_ranks(world, with_ignite):
        close(result, alone)


def predicted() -> Tensor:
    engine, _ = trained()
    engine.fit(data(50), epochs=1)
    result: Tensor = engine.predict(data(103, shuffle=False))
    return result


def test_predictions_are_whole_and_in_order_on_every_rank() -> None:
    alone = predicted()
    assert len(alone) == 103
    for result in on_ranks(4, predicted):
        torch.testing.assert_close(result, alone, rtol=0, atol=TOLERANCE)


# Checkpoints ------------------------------------------------------------------------------------------------


def cut_run(directory: Path, last: int | None, metrics: bool) -> Outcome:
    """Train, resume what is in the directory, and let the last rank be told to stop at a step."""
    engine, net = trained(
        RunDirectory(directory / "runs", terminal=False),
        *everything_on()[:4],
        BestCheckpoint("val_loss", restore=True),
        RunCheckpoint(directory / "checkpoints"),
        metrics={"acc": accuracy, "auroc": MulticlassAUROC(2)} if metrics else None,
    )

    def end(event: StepEnd) -> None:
        if engine.ranks.rank == engine.ranks.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    if last is not None:
        engine.subscribe(StepEnd, end, when=at(last))
    engine.fit(data(), data(37, shuffle=False, seed=1), epochs=3, resume="auto")
    return outcome(engine, net)


@pytest.mark.parametrize("metrics", [False, True])
def test_a_run_continues_on_another_number_of_ranks(metrics: bool, tmp_path: Path) -> None:
    alone = cut_run(tmp_path / "alone", None, metrics)
    steps = []
    for world, last in ((4, 4), (2, 10), (1, 13)):
        results = (
            on_ranks(world, cut_run, tmp_path / "cut", last, metrics)
            if world > 1
            else [cut_run(tmp_path / "cut", last, metrics)]
        )
        steps.append({result["counters"][1] for result in results})
    assert all(len(step) == 1 for step in steps)
    assert all(step.pop() % 7 for step in steps), "each was cut in the middle of an epoch"
    for result in on_ranks(4, cut_run, tmp_path / "cut", None, metrics):
        assert_alike(result, alone)


def cut_with(kind: str, directory: Path, last: int | None) -> str:
    """Cut a run in mid-epoch, or resume it; return what is said against that."""
    metric = Accuracy() if kind == "ignite" else PearsonOfClasses()
    engine, _ = trained(RunCheckpoint(directory, every_steps=1), metrics={"metric": metric})
    if last is not None:
        engine.subscribe(StepEnd, lambda event: event.engine.run.interrupt(signal.SIGTERM), when=at(last))
    try:
        engine.fit(data(), epochs=2, resume="auto")
    except CheckpointError as error:
        return str(error)
    return ""


class PearsonOfClasses(PearsonCorrCoef):
    """Of the target, and the class that is predicted: its states are not added up but computed from, all at once."""

    def update(self, output: Tensor, target: Tensor) -> None:
        super().update(output.argmax(1).double(), target.double())


@pytest.mark.parametrize("kind", ["ignite", "torchmetrics"])
def test_metrics_that_cannot_go_on_from_what_several_ranks_have_seen_are_refused(kind: str, tmp_path: Path) -> None:
    """On as many ranks they continue."""
    on_ranks(2, cut_with, kind, tmp_path, 3)
    assert cut_with(kind, tmp_path, None).startswith(
        "The metric 'metric' was saved in the middle of an epoch on 2 ranks, and cannot go on"
    )
    assert on_ranks(2, cut_with, kind, tmp_path, None) == ["", ""]


# One rank alone ---------------------------------------------------------------------------------------------


def with_nan_on_one_rank(policy: Any) -> Outcome:
    net = model()

    def step(engine: Engine, batch: tuple[Tensor, Tensor]) -> None:
        loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
        if engine.step == 3 and engine.ranks.rank == engine.ranks.world - 1:
            loss = loss * float("nan")
        engine.update(loss)
        engine.record(loss=loss)

    optimizer = torch.optim.SGD(net.parameters(), 0.3)
    callbacks = [Distributed(), StopOnNonFinite(policy, every_steps=1)]
    engine = Engine(step, model=net, optimizer=optimizer, callbacks=callbacks, seed=7)
    engine.fit(data(), epochs=1)
    return outcome(engine, net) | {"skipped": engine.num_skipped_updates}


def test_an_update_is_left_out_on_all_ranks_when_the_loss_of_one_is_not_finite() -> None:
    results = on_ranks(2, with_nan_on_one_rank, "skip")
    assert [result["skipped"] for result in results] == [1, 1]
    assert torch.isfinite(results[0]["weights"]).all()
    assert torch.equal(results[0]["weights"], results[1]["weights"])


def test_one_rank_whose_loss_is_not_finite_stops_all_after_one_step() -> None:
    results = on_ranks(2, with_nan_on_one_rank, "stop")
    assert results[0]["counters"] == results[1]["counters"]
    assert all("NaN" in result["reason"] for result in results)
    assert results[0]["counters"][1] < 7


class EvaluatesAlone(Callback):
    """Asks all ranks for something, on one of them."""

    main_only = True

    def on_epoch_end(self, event: EpochEnd) -> None:
        event.engine.evaluate(data(8))


def with_a_handler_that_asks_all() -> str:
    engine, _ = trained(EvaluatesAlone())
    with pytest.raises((EngineStateError, RuntimeError)) as caught:
        engine.fit(data(), epochs=2)
    return str(caught.value)


class EvaluatesAloneLater(Callback):
    """Does so in a handler that it subscribes itself."""

    main_only = True

    def attach(self, engine: Engine) -> None:
        super().attach(engine)
        engine.subscribe(EpochEnd, self.look, when=every(1))

    def look(self, event: EpochEnd) -> None:
        event.engine.ranks.total(1.0)


def with_a_handler_of_its_own_that_asks_all() -> str:
    engine, _ = trained(EvaluatesAloneLater())
    with pytest.raises((EngineStateError, RuntimeError)) as caught:
        engine.fit(data(), epochs=2)
    return str(caught.value)


def test_so_does_one_that_was_subscribed_by_hand() -> None:
    said = on_ranks(2, with_a_handler_of_its_own_that_asks_all)
    assert said[0].startswith("Something that runs on rank 0 alone asked all ranks for something")


def test_a_handler_on_rank_0_alone_that_asks_all_ranks_raises_and_does_not_wait() -> None:
    said = on_ranks(2, with_a_handler_that_asks_all)
    assert said[0].startswith("Something that runs on rank 0 alone asked all ranks for something")
