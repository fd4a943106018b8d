"""The watched value: where it is read, what better means for it, and which mistakes are seen before step 1."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import class_batches, linear, make_trainer, mean_error, num_calls, pairs, refused, regression, run_script
from ignite.metrics import Accuracy as IgniteAccuracy
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import (
    BinaryConfusionMatrix,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassRecall,
)

from camshaft.callbacks import BestCheckpoint, EarlyStopping, Metrics
from camshaft.callbacks.monitor import Mode, Monitor
from camshaft.engine import (
    Callback,
    ConfigurationError,
    Data,
    Engine,
    EpochEnd,
    FitStart,
    StepEnd,
    ValidationEnd,
    at,
    repeat,
)


class Watch(Callback):
    """The smallest owner of a monitor: notes each value, with the step and the moment at which it came."""

    def __init__(self, name: str, mode: Mode | None = None) -> None:
        self.monitor = Monitor("Watch", name, mode)
        self.seen: list[float] = []
        self.steps: list[int] = []

    def attach(self, engine: Engine) -> None:
        super().attach(engine)
        self.monitor.attach(engine, self._note)

    def _note(self, engine: Engine, value: float) -> None:
        self.seen.append(value)
        self.steps.append(engine.step)


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(dim=1) == target).float().mean()


def refusal(watch: Watch, *, metrics: dict[str, object] | None = None, validates: bool = True) -> str:
    """Return the message with which a fit is refused, having seen that no step was made."""
    trainer = make_trainer(watch, metrics=metrics)
    val = class_batches(8) if validates else None
    with pytest.raises(ConfigurationError) as caught:
        trainer.fit(class_batches(8, 8), val, epochs=1)
    assert trainer.step == 0
    return str(caught.value)


@pytest.mark.parametrize(
    ("mode", "value", "than", "expected"),
    [
        ("min", 1.0, 2.0, True), ("min", 2.0, 1.0, False), ("min", 1.0, 1.0, False), ("max", 2.0, 1.0, True),
        ("max", 1.0, 2.0, False), ("max", 1.0, 1.0, False), ("max", 0.0, -1.0, True), ("min", -math.inf, 0.0, True),
        ("max", 0.0, math.nan, True), ("min", math.inf, math.nan, True), ("max", math.nan, 0.0, False),
        ("min", math.nan, math.nan, False), ("max", math.nan, math.nan, False),
    ],
)  # fmt: skip
def test_nan_beats_nothing_and_every_number_beats_nan(mode: Mode, value: float, than: float, expected: bool) -> None:
    """Better is strictly less or strictly more; NaN is never better, also not than NaN."""
    assert Monitor("Watch", "val_score", mode).better(value, than=than) is expected


def test_val_values_are_read_at_each_validation_also_in_mid_epoch() -> None:
    """A val_* value comes with every ValidationEnd, on exactly the steps of the validations."""
    watch = Watch("val_loss")
    trainer = make_trainer(watch)
    history = trainer.fit(class_batches(8, 8, 8, 8, 5), class_batches(8), epochs=2, validate_every="2 steps")
    assert watch.steps == [2, 4, 6, 8, 10]
    assert watch.seen == [row["val_loss"] for row in history.validations]


def test_train_values_are_read_once_at_the_end_of_each_epoch() -> None:
    """A train_* value comes with EpochEnd, however often the run validates."""
    watch = Watch("train_loss")
    history = make_trainer(watch).fit(class_batches(8, 8, 5), class_batches(8), epochs=3, validate_every="1 steps")
    assert watch.steps == [3, 6, 9]
    assert watch.seen == history["train_loss"]


def test_less_of_a_trainers_loss_is_better() -> None:
    """The trainer minimises its loss, so the direction is known without a mode."""
    for name in ("train_loss", "val_loss"):
        watch = Watch(name)
        make_trainer(watch).fit(class_batches(8), class_batches(8), epochs=1)
        assert watch.monitor.mode == "min"


def test_the_direction_is_what_the_metric_says_of_itself() -> None:
    """The metrics of torchmetrics know whether more is better; the name they are given plays no part."""
    acc, error = Watch("val_loss_like"), Watch("val_acc_like")
    metrics = {"loss_like": MulticlassAccuracy(3), "acc_like": MeanSquaredError()}
    engine = Engine(
        lambda engine, batch: engine.measure(*batch), model=linear(), callbacks=[Metrics(metrics), acc, error]
    )
    data = [(torch.tensor([0.0, 1.0]), torch.tensor([0, 1]))]
    engine.fit(data, data, epochs=1)
    assert (acc.monitor.mode, error.monitor.mode) == ("max", "min")


def test_a_stated_mode_wins_over_what_the_metric_says() -> None:
    """Whoever writes mode= means it."""
    watch = Watch("val_acc", "min")
    make_trainer(watch, metrics={"acc": MulticlassAccuracy(3)}).fit(class_batches(8), class_batches(8), epochs=1)
    assert watch.monitor.mode == "min"


@pytest.mark.parametrize("metric", [accuracy, IgniteAccuracy()])
def test_a_direction_that_nothing_states_is_refused_and_never_guessed(metric: object) -> None:
    """A metric called acc may be an error rate: without mode= the run does not begin."""
    assert refusal(Watch("val_acc"), metrics={"acc": metric}) == (
        'Watch cannot know whether a higher or a lower "val_acc" is better. Write mode="max" or mode="min".'
    )


def test_a_misspelt_name_is_refused_before_step_1_with_the_nearest_one() -> None:
    """The message names the owner, what it watches, what there is, and what was probably meant."""
    message = refusal(Watch("val_accuracy", "max"), metrics={"acc": accuracy})
    assert message.startswith('Watch watches "val_accuracy", but the values are: val_loss, val_acc.')
    assert message.endswith('Did you mean "val_acc"?')


def test_a_val_value_without_validation_data_is_refused_before_step_1() -> None:
    """fit(train) alone never has a val_loss."""
    message = refusal(Watch("val_loss"), validates=False)
    assert message.startswith('Watch watches "val_loss", but fit was given no validation data.')
    assert '"train_loss"' in message


@pytest.mark.parametrize("name", ["loss", "acc", "", "validation_loss", 3])
def test_a_name_without_its_stage_is_refused_at_construction(name: str) -> None:
    """Is it the training's or the validation's? The name has to say so."""
    with pytest.raises(ConfigurationError, match=r"does not name a stage. Write \"val_"):
        Watch(name)


@pytest.mark.parametrize("mode", ["maximum", "MAX", True, 1])
def test_an_unknown_mode_is_refused_at_construction(mode: Mode) -> None:
    """There are two directions."""
    with pytest.raises(ConfigurationError, match=r'Write "min" or "max"\.'):
        Watch("val_loss", mode)


def test_a_metric_that_is_no_single_number_cannot_be_watched() -> None:
    """A confusion matrix has no better or worse: the message says its shape."""
    trainer = make_trainer(Watch("val_matrix", "max"), metrics={"matrix": MulticlassConfusionMatrix(3)})
    with pytest.raises(ConfigurationError, match=r'watches "val_matrix", which has shape \[3, 3\]'):
        trainer.fit(class_batches(8), class_batches(8), epochs=1)


def test_a_value_of_a_metric_collection_can_be_watched() -> None:
    """A collection named m with a MulticlassRecall records val_m_MulticlassRecall, and that name is accepted."""
    watch = Watch("val_m_MulticlassRecall", "max")
    collection = MetricCollection([MulticlassAccuracy(3), MulticlassRecall(3)])
    history = make_trainer(watch, metrics={"m": collection}).fit(class_batches(8), class_batches(8), epochs=2)
    assert watch.seen == history["val_m_MulticlassRecall"]


def test_a_value_that_a_handler_records_can_be_watched() -> None:
    """What a handler declares and records is a value of the stage like the trainer's own."""
    watch = Watch("train_norm", "min")
    trainer = make_trainer(watch)
    trainer.stages.declare("norm")
    trainer.subscribe(StepEnd, lambda event: event.engine.record(norm=linear().weight.norm()))
    history = trainer.fit(class_batches(8, 4), class_batches(8), epochs=1)
    assert watch.seen == history["train_norm"]


def test_an_engine_with_its_own_step_learns_of_a_missing_value_at_the_first_check() -> None:
    """What a step function records is unknown beforehand; the first validation tells, with the names there are."""
    with pytest.raises(ConfigurationError, match=r'"val_scor", but the values are: val_score. Did you mean') as caught:
        run_script([1.0, 2.0], Watch("val_scor", "max"))
    assert any("ValidationEnd" in note and "at num_validations 1" in note for note in caught.value.__notes__)


def test_a_value_of_exactly_zero_is_a_value() -> None:
    """0.0 is not mistaken for a missing metric."""
    watch = Watch("val_score", "min")
    run_script([0.0, -0.0, 1.0], watch)
    assert watch.seen == [0.0, -0.0, 1.0]


def test_what_watches_is_named_in_the_list_of_handlers() -> None:
    """explain() says which callback watches which value, at which event."""
    trainer = make_trainer(Watch("val_loss"), Watch("train_loss"))
    lines = trainer.explain().splitlines()
    assert [line.split("  ")[1] for line in lines if "Watch on" in line] == [
        "1. Watch on val_loss", "1. Watch on train_loss",
    ]  # fmt: skip
    assert lines.index(ValidationEnd.__name__) < lines.index(EpochEnd.__name__)
    assert FitStart.__name__ in lines


Watcher = Callable[..., Callback]


WATCHERS = [EarlyStopping, BestCheckpoint]


@pytest.mark.parametrize("watcher", WATCHERS)
@pytest.mark.parametrize(
    ("monitor", "nearest"), [("val_accuracy", "val_acc"), ("val_los", "val_loss"), ("train_ac", "train_acc")]
)
def test_a_watched_value_that_will_not_exist_is_told_before_the_run(
    watcher: Watcher, monitor: str, nearest: str
) -> None:
    trainer = regression(metrics={"acc": mean_error}, callbacks=[watcher(monitor, mode="max")])
    with refused(ConfigurationError, f'watches "{monitor}", but', f'Did you mean "{nearest}"?'):
        trainer.fit(pairs(), pairs(), epochs=1)
    assert num_calls(trainer) == 0


@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_watched_value_unlike_any_other_is_answered_with_those_there_are(watcher: Watcher) -> None:
    trainer = regression(callbacks=[watcher("val_f1", mode="max")])
    with refused(ConfigurationError, 'watches "val_f1", but the values are: val_loss.'):
        trainer.fit(pairs(), pairs(), epochs=1)
    assert num_calls(trainer) == 0


@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_validation_value_without_validation_data_is_told_before_the_run(watcher: Watcher) -> None:
    trainer = regression(callbacks=[watcher("val_loss")])
    with refused(ConfigurationError, 'watches "val_loss", but fit was given no validation data', '"train_loss"'):
        trainer.fit(pairs(), epochs=1)
    assert num_calls(trainer) == 0


@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_direction_that_nobody_stated_is_asked_for_before_the_run(watcher: Watcher) -> None:
    trainer = regression(metrics={"error": mean_error}, callbacks=[watcher("val_error")])
    with refused(ConfigurationError, 'cannot know whether a higher or a lower "val_error" is better', 'mode="max"'):
        trainer.fit(pairs(), pairs(), epochs=1)
    assert num_calls(trainer) == 0


@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_value_that_a_step_of_ones_own_does_not_record_is_told_at_the_first_validation(watcher: Watcher) -> None:
    engine = Engine(
        lambda engine, batch: {"loss": 0.5, "acc": 0.5},
        callbacks=[watcher("val_accuracy", mode="max")],
        model=nn.Linear(2, 1),
    )
    with refused(ConfigurationError, "the values are: val_loss, val_acc.", 'Did you mean "val_acc"?'):
        engine.fit([torch.ones(4, 2)], [torch.ones(4, 2)], epochs=5)
    assert (engine.epoch, engine.num_validations) == (1, 1)


def test_a_value_that_a_loop_of_ones_own_does_not_record_is_told_at_the_first_epochs_end() -> None:
    engine = Engine(callbacks=[EarlyStopping("train_acc", mode="max")])
    with refused(ConfigurationError, 'EarlyStopping watches "train_acc", but the values are: train_loss'):
        for _ in engine.epochs(5):
            for _ in engine.train([torch.ones(4, 2)]):
                engine.record(loss=0.5)
    assert engine.epoch == 1


def test_a_watched_value_must_be_a_single_number() -> None:
    trainer = regression(
        loss_fn=nn.BCEWithLogitsLoss(),
        metrics={"confusion": BinaryConfusionMatrix()},
        callbacks=[EarlyStopping("val_confusion", mode="max")],
    )
    with refused(ConfigurationError, 'watches "val_confusion", which has shape [2, 2]'):
        trainer.fit(pairs(), pairs(), epochs=1)


@pytest.mark.parametrize(
    ("data", "plan", "warns"),
    [
        (repeat(pairs()), {"max_steps": 5}, True),
        (repeat(pairs()), {"epochs": 3, "max_steps": 5}, True),
        (pairs(5), {"max_steps": 5}, True),
        (pairs(3), {"max_steps": 5}, False),
        (repeat(pairs()), {"max_steps": 5, "epoch_length": 2}, False),
        (pairs(5), {"epochs": 1}, False),
    ],
)
def test_a_training_value_that_comes_only_when_the_run_is_over_is_told_before_step_1(
    data: Data, plan: dict[str, int], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A run by steps may be one epoch, at the end of which nothing is left to stop."""
    trainer = regression(callbacks=[EarlyStopping("train_loss")])
    told: list[str] = []
    trainer.subscribe(StepEnd, lambda event: told.extend(record.getMessage() for record in caplog.records), when=at(1))
    trainer.fit(data, **plan)  # type: ignore[arg-type]  # whole numbers
    assert any('EarlyStopping watches "train_loss"' in line and "epoch_length" in line for line in told) is warns
