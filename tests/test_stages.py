"""What is measured in each stage, what is known of it beforehand, and the stage that is running now."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Batch, class_batches, make_trainer, refused
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision

from camshaft.engine import (
    NOTHING,
    BatchReady,
    ConfigurationError,
    CurrentStage,
    Engine,
    EngineStateError,
    EpochEnd,
    EpochStart,
    Event,
    StepEnd,
    ValidationEnd,
    ValidationStepEnd,
)
from camshaft.engine.ranks import Ranks
from camshaft.engine.record import Record
from camshaft.engine.stages import Stages


def error(output: Tensor, target: Tensor) -> Tensor:
    """A metric that does not say whether more of it is better."""
    return (output.argmax(dim=1) != target).float().mean()


def test_each_stage_has_a_record_of_its_own_that_stays_the_same() -> None:
    stages = Stages(Ranks())
    stages["train"].add({"loss": 1.0}, 4)
    assert stages["train"].compute() == {"loss": 1.0}
    assert stages["val"].compute() == {}
    assert stages["train"] is stages["train"]


@pytest.mark.parametrize("taken", [{"acc": error}, {("acc", "precision"): MetricCollection([MulticlassAccuracy(3)])}])
def test_a_metrics_name_is_given_once(taken: dict[Any, Any]) -> None:
    stages = Stages(Ranks())
    stages.add_metrics({"acc": error})
    with refused(ConfigurationError, 'Two metrics are named "acc"'):
        stages.add_metrics(taken)


def test_a_metric_does_not_take_the_name_of_what_is_declared() -> None:
    stages = Stages(Ranks())
    stages.declare("loss", higher_is_better=False)
    with refused(ConfigurationError, 'Two metrics are named "loss"'):
        stages.add_metrics({"loss": error})


def test_a_metric_that_training_leaves_out_is_measured_in_validations_and_tests() -> None:
    stages = Stages(Ranks())
    stages.add_metrics({"slow": MulticlassAccuracy(3)}, train=False)
    assert {name: list(stages[name].computed) for name in ("train", "val", "test")} == {
        "train": [],
        "val": ["slow"],
        "test": ["slow"],
    }


@pytest.mark.parametrize(
    ("sets", "names"),
    [
        (("",), ["train_loss", "train_acc", "val_loss", "val_acc", "val_slow"]),
        (None, ["train_loss", "train_acc", "val_loss", "val_acc", "val_slow"]),
        ((), ["train_loss", "train_acc"]),
    ],
)
def test_the_values_of_a_run_are_known_beforehand(sets: tuple[str, ...] | None, names: list[str]) -> None:
    trainer = make_trainer(metrics={"acc": error})
    trainer.stages.add_metrics({"slow": error}, train=False)
    assert trainer.stages.expected(sets) == names
    history = trainer.fit(class_batches(4), None if sets == () else class_batches(4), epochs=1)
    assert set(history) == {"epoch", "step", *names}


def test_where_nothing_is_declared_any_value_may_come() -> None:
    stages = Stages(Ranks())
    stages.add_metrics({"acc": error})
    assert stages.expected([""]) == []
    assert stages.may_have("val_zebra", [""])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("val_loss", True), ("val_both_MulticlassPrecision", True), ("val_both", True), ("val_zebra", False)],
)
def test_a_collections_values_may_come_under_its_name(name: str, expected: bool) -> None:
    stages = Stages(Ranks())
    stages.declare("loss")
    stages.add_metrics({"both": MetricCollection([MulticlassAccuracy(3), MulticlassPrecision(3)])})
    assert stages.may_have(name, [""]) is expected


def test_a_direction_is_stated_by_the_metric_or_by_whoever_declares_the_value() -> None:
    stages = Stages(Ranks())
    stages.declare("loss", higher_is_better=False)
    stages.declare("gain", higher_is_better=True)
    stages.add_metrics({"acc": MulticlassAccuracy(3), "error": error})
    directions = {name: stages.higher_is_better(f"val_{name}") for name in ("loss", "gain", "acc", "error", "zebra")}
    assert directions == {"loss": False, "gain": True, "acc": True, "error": None, "zebra": None}


MOMENTS: list[tuple[type[Event], str, int | None]] = [
    (EpochStart, "", None),
    (BatchReady, "train", None),
    (StepEnd, "train", None),
    (ValidationStepEnd, "val", 2),
    (ValidationEnd, "val", 2),
    (EpochEnd, "", None),
]


@pytest.mark.parametrize(("moment", "name", "length"), MOMENTS)
def test_the_present_stage_is_known_at_every_event(moment: type[Event], name: str, length: int | None) -> None:
    trainer = make_trainer()
    seen: list[tuple[str, int | None, bool]] = []

    def look(event: Event) -> None:
        current = trainer.current
        if not (moment is BatchReady and current.name == "val"):
            seen.append((current.name, current.length, current.record is None))

    trainer.subscribe(moment, look)
    trainer.fit(class_batches(4, 4, 4), class_batches(4, 4), epochs=1)
    assert set(seen) == {(name, length, name == "")}


def test_the_present_stage_holds_its_batch_and_what_the_step_made_of_it() -> None:
    seen: list[tuple[Any, Any, Any]] = []
    trainer = make_trainer()

    @trainer.on(ValidationStepEnd)
    def look(event: ValidationStepEnd) -> None:
        seen.append((event.engine.current.batch, event.engine.current.output, event.engine.current.target))

    (batch,) = class_batches(4)
    trainer.fit([batch], [batch], epochs=1)
    ((shown, output, target),) = seen
    assert shown is batch
    assert torch.equal(output, trainer.parts["model"](batch[0]))
    assert target is batch[1]


def measuring(engine: Engine, batch: Batch) -> None:
    engine.measure(batch[0], None, weight=4)


def returning(engine: Engine, batch: Batch) -> dict[str, float]:
    return {"score": 0.5}


@pytest.mark.parametrize(("step", "target"), [(measuring, None), (returning, NOTHING)])
def test_no_target_is_another_thing_than_nothing_measured(step: Any, target: Any) -> None:
    seen: list[Any] = []
    engine = Engine(step)
    engine.subscribe(StepEnd, lambda event: seen.append(engine.current.target))
    engine.fit(class_batches(4), epochs=1)
    assert seen == [target]


def test_looking_at_the_averages_names_their_stage() -> None:
    seen: list[dict[str, float]] = []
    engine = Engine(lambda engine, batch: {"score": batch.mean()})
    for event in (StepEnd, ValidationStepEnd):
        engine.subscribe(event, lambda event: seen.append(engine.current.peek()))
    engine.fit([torch.ones(4), torch.zeros(4)], [torch.full((4,), 0.25)], epochs=1)
    assert seen == [{"train_score": 1.0}, {"train_score": 0.5}, {"val_score": 0.25}]


def test_between_stages_there_is_nothing_to_see() -> None:
    assert Engine().current.peek() == {}
    assert CurrentStage().name == ""


def test_a_batch_tells_its_number_of_samples_to_its_stage() -> None:
    current = CurrentStage("train", Record())
    current.batch = class_batches(7)[0]
    assert current.num_samples() == 7


@pytest.mark.parametrize("name", ["record", "measure"])
def test_nothing_is_recorded_between_stages_of_a_run(name: str) -> None:
    engine = Engine()
    call: Any = {
        "record": lambda: engine.record(score=0.5, weight=1),
        "measure": lambda: engine.measure(torch.ones(1), torch.ones(1), weight=1),
    }[name]
    for _ in engine.epochs(1):
        with refused(EngineStateError, "recorded outside a stage"):
            call()
        list(engine.train([1]))
