"""Metrics of three houses: over a stage with an uneven last batch they are what a computation by hand gives."""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Any

import ignite.metrics
import pytest
import torch
from helpers import Batch, DictOutput, class_batches, linear, make_trainer, mean_error, pairs, refused, regression
from torch import Tensor, nn
from torchmetrics import MeanMetric, MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)
from torchmetrics.wrappers import LambdaInputTransformer

from camshaft.callbacks import Accumulate, EarlyStopping, Metrics
from camshaft.engine import (
    CamshaftError,
    ConfigurationError,
    DataError,
    Engine,
    EpochEnd,
    StepEnd,
    Trainer,
    ValidationEnd,
)

TRAIN, VAL = class_batches(8, 8, 8, 3, seed=1), class_batches(16, 16, 5, seed=2)


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(dim=1) == target).float().mean()


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - one_hot(target)).square().mean()


def one_hot(target: Tensor) -> Tensor:
    return nn.functional.one_hot(target, 3).float()


class Counting(Metric):
    """Counts samples, and how it was used."""

    higher_is_better = True
    calls: list[str] = []  # noqa: RUF012  # shared by all clones on purpose

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        self.calls.append(f"update {'grad' if output.requires_grad else 'no grad'}")
        self.count += len(target)

    def compute(self) -> Tensor:
        self.calls.append("compute")
        return self.count

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append("forward")
        return super().forward(*args, **kwargs)


def outputs(data: list[Batch]) -> tuple[Tensor, Tensor]:
    """The untrained model's output over all samples, and their target, in double precision."""
    model = linear().double()
    inputs = torch.cat([inputs for inputs, _ in data]).double()
    return model(inputs).detach(), torch.cat([target for _, target in data])


def by_hand(data: list[Batch]) -> dict[str, float]:
    """Accuracy, squared error, cross entropy and macro F1 over all samples, in double precision."""
    output, target = outputs(data)
    predicted = output.argmax(dim=1)
    scores = []
    for number in range(3):
        hits = ((predicted == number) & (target == number)).sum().item()
        scores.append(2 * hits / ((predicted == number).sum().item() + (target == number).sum().item()))
    return {
        "acc": (predicted == target).double().mean().item(),
        "squared": (output - nn.functional.one_hot(target, 3)).square().mean().item(),
        "loss": nn.functional.cross_entropy(output, target).item(),
        "f1": sum(scores) / 3,
    }


HOUSES: dict[str, dict[str, Any]] = {
    "functions": {"acc": accuracy, "squared": squared},
    "torchmetrics": {"acc": MulticlassAccuracy(3, average="micro"), "f1": MulticlassF1Score(3, average="macro")},
    "ignite": {
        "acc": ignite.metrics.Accuracy(),
        "loss_again": ignite.metrics.Loss(nn.CrossEntropyLoss()),
        "f1": ignite.metrics.Fbeta(beta=1),
    },
}


@pytest.mark.parametrize("window", [None, 3], ids=["plain", "accumulating"])
@pytest.mark.parametrize("house", HOUSES)
def test_the_values_are_those_of_a_double_precision_computation_by_hand(house: str, window: int | None) -> None:
    """Over training and validation, each with an uneven last batch, to 1e-6; the same under accumulation."""
    metrics = HOUSES[house]
    callbacks = [] if window is None else [Accumulate(window)]
    history = make_trainer(*callbacks, metrics=metrics, lr=0.0).fit(TRAIN, VAL, epochs=2)
    for stage, data in (("train", TRAIN), ("val", VAL)):
        expected = by_hand(data)
        for name in (*metrics, "loss"):
            known = expected[name.removesuffix("_again")]
            assert history[f"{stage}_{name}"] == pytest.approx([known, known], abs=1e-6), name


def test_the_mean_of_the_batches_means_would_have_been_another_number() -> None:
    """The data of these tests can tell the two apart: weights matter in them."""
    means = [by_hand([batch])["acc"] for batch in VAL]
    assert abs(sum(means) / len(means) - by_hand(VAL)["acc"]) > 1e-3


def test_evaluate_gives_the_same_values_and_leaves_the_run_alone() -> None:
    """Under their own names, for metrics of every house at once."""
    metrics = {"acc": accuracy, "tm": MulticlassAccuracy(3, average="micro"), "ig": ignite.metrics.Accuracy()}
    trainer = make_trainer(metrics=metrics, lr=0.0)
    trainer.fit(TRAIN, VAL, epochs=1)
    values, expected = trainer.evaluate(VAL), by_hand(VAL)
    assert values == {
        "loss": pytest.approx(expected["loss"], abs=1e-6),
        **dict.fromkeys(metrics, pytest.approx(expected["acc"], abs=1e-6)),
    }
    assert len(trainer.history["train_acc"]) == len(trainer.history.validations) == 1


def test_each_stage_starts_anew_in_each_epoch() -> None:
    """Nothing of an earlier epoch, of the other stage or of an evaluation in between is left in a metric."""
    trainer = make_trainer(metrics={"count": Counting()})
    trainer.subscribe(EpochEnd, lambda event: trainer.evaluate(VAL))
    history = trainer.fit(TRAIN, VAL, epochs=3, validate_every="2 steps")
    assert history["train_count"] == [27.0] * 3
    assert [row["val_count"] for row in history.validations] == [37.0] * 6


def test_a_torchmetrics_metric_is_updated_once_per_batch_and_never_called() -> None:
    """The loop calls update without gradients, the end of the stage compute; nobody forward, which costs twice."""
    Counting.calls.clear()
    make_trainer(metrics={"count": Counting()}).fit(TRAIN, VAL, epochs=1)
    assert Counting.calls == ["update no grad"] * 4 + ["update no grad"] * 3 + ["compute"] + ["compute"]


def test_the_metric_that_was_passed_is_cloned_for_each_stage() -> None:
    """The object itself stays empty, and serves two trainers at once."""
    metric = Counting()
    first, second = make_trainer(metrics={"count": metric}), make_trainer(metrics={"count": metric})
    for trainer in (first, second):
        assert trainer.fit(TRAIN, VAL, epochs=1)["val_count"] == [37.0]
    assert metric.count == 0
    assert not metric.update_called


def test_a_metric_collection_records_each_of_its_values() -> None:
    """In a dict under name_key, and by itself under its own keys."""
    collection = MetricCollection({"acc": MulticlassAccuracy(3, average="micro"), "f1": MulticlassF1Score(3)})
    named = make_trainer(metrics={"m": collection}, lr=0.0).fit(TRAIN, VAL, epochs=1)
    itself: Any = collection  # it has the items of a mapping without being one
    bare = make_trainer(metrics=itself, lr=0.0).fit(TRAIN, VAL, epochs=1)
    expected = by_hand(VAL)
    assert [named["val_m_acc"], named["val_m_f1"]] == [bare["val_acc"], bare["val_f1"]]
    assert bare["val_acc"] == [pytest.approx(expected["acc"], abs=1e-6)]
    assert bare["val_f1"] == [pytest.approx(expected["f1"], abs=1e-6)]


def test_a_metric_that_is_no_scalar_is_in_the_event_and_not_in_the_history() -> None:
    """A confusion matrix travels in ValidationEnd.metrics as a tensor on the CPU; rows are the true classes."""
    seen: list[Any] = []
    trainer = make_trainer(metrics={"matrix": MulticlassConfusionMatrix(3)}, lr=0.0)
    trainer.subscribe(ValidationEnd, lambda event: seen.append(event.metrics["val_matrix"]))
    history = trainer.fit(TRAIN, VAL, epochs=1)
    output, target = outputs(VAL)
    expected = torch.zeros(3, 3, dtype=torch.long)
    for true, predicted in zip(target, output.argmax(dim=1), strict=True):
        expected[true, predicted] += 1
    assert torch.equal(seen[0], expected)
    assert "val_matrix" not in history
    assert list(history) == ["epoch", "step", "train_loss", "val_loss"]
    assert torch.equal(trainer.evaluate(VAL)["matrix"], expected)


def test_a_metric_over_the_whole_stage_is_not_an_average_over_batches() -> None:
    """AUROC needs all samples at once, and gets them."""
    history = make_trainer(metrics={"auroc": MulticlassAUROC(3, average="macro")}, lr=0.0).fit(TRAIN, VAL, epochs=1)
    output, target = outputs(VAL)
    scores = []
    for number in range(3):
        share = output.softmax(dim=1)[:, number]
        positive, negative = share[target == number], share[target != number]
        above = (positive[:, None] > negative[None]).double() + 0.5 * (positive[:, None] == negative[None]).double()
        scores.append(above.mean().item())
    assert history["val_auroc"] == [pytest.approx(sum(scores) / 3, abs=1e-6)]


def test_an_ignite_metric_applies_its_output_transform() -> None:
    """output_transform= is part of the metric: it is handed (output, target), as ignite's evaluator hands it."""
    always_zero = ignite.metrics.Accuracy(output_transform=lambda pair: (one_hot(pair[1] * 0), pair[1]))
    history = make_trainer(metrics={"zeros": always_zero}, lr=0.0).fit(TRAIN, VAL, epochs=1)
    share_of_zeros = (outputs(VAL)[1] == 0).double().mean().item()
    assert share_of_zeros != pytest.approx(by_hand(VAL)["acc"])
    assert history["val_zeros"] == [pytest.approx(share_of_zeros, abs=1e-6)]


def step(engine: Engine, batch: Batch) -> None:
    """A step of one's own: it says itself what is measured."""
    engine.measure(engine.parts["model"](batch[0]), batch[1])


@pytest.mark.parametrize("house", HOUSES)
def test_a_step_of_ones_own_measures_through_engine_measure(house: str) -> None:
    """The Metrics callback gives an Engine the same numbers that Trainer(metrics=...) has."""
    metrics = HOUSES[house]
    history = Engine(step, model=linear(), callbacks=[Metrics(metrics)]).fit(TRAIN, VAL, epochs=1)
    for stage, data in (("train", TRAIN), ("val", VAL)):
        expected = by_hand(data)
        for name in metrics:
            assert history[f"{stage}_{name}"] == [pytest.approx(expected[name.removesuffix("_again")], abs=1e-6)]


def test_a_loop_of_ones_own_measures_too() -> None:
    """Script style: engine.measure in the body of engine.train and engine.validate."""
    model = linear()
    engine = Engine(model=model, callbacks=[Metrics({"acc": accuracy})])
    for _ in engine.epochs(1):
        for inputs, target in engine.train(TRAIN):
            engine.measure(model(inputs), target)
        for inputs, target in engine.validate(VAL):
            engine.measure(model(inputs), target)
    assert engine.history["train_acc"] == [pytest.approx(by_hand(TRAIN)["acc"], abs=1e-6)]
    assert engine.history["val_acc"] == [pytest.approx(by_hand(VAL)["acc"], abs=1e-6)]


def test_a_stated_weight_takes_the_place_of_the_number_of_samples() -> None:
    """Where only some of a batch counts (unpadded tokens, say), the step says how many."""

    def weighted(engine: Engine, batch: Batch) -> None:
        engine.measure(batch[0].mean(), batch[1], weight=float(batch[1].sum()))

    data = [(torch.full((2,), 1.0), torch.tensor([1, 2])), (torch.full((2,), 5.0), torch.tensor([1, 0]))]
    engine = Engine(weighted, callbacks=[Metrics({"value": lambda output, target: output})])
    assert engine.fit(data, epochs=1)["train_value"] == [2.0]


def test_metrics_beside_the_trainers_own_add_to_them() -> None:
    """Metrics as a callback of a Trainer is the same as its metrics= argument."""
    trainer = make_trainer(Metrics({"acc": accuracy}), metrics={"squared": squared}, lr=0.0)
    history = trainer.fit(TRAIN, VAL, epochs=1)
    expected = by_hand(VAL)
    assert history["val_acc"] == [pytest.approx(expected["acc"], abs=1e-6)]
    assert history["val_squared"] == [pytest.approx(expected["squared"], abs=1e-6)]


def test_a_metric_that_is_nan_in_one_batch_is_nan_in_the_history() -> None:
    """NaN is shown, not skipped: the epoch's mean is not a number either."""
    data = class_batches(8, 8)
    data[1][0][0, 0] = math.nan
    history = make_trainer(metrics={"squared": squared}, lr=0.0).fit(TRAIN, data, epochs=1)
    assert math.isnan(history["val_squared"][0])
    assert math.isnan(history["val_loss"][0])


def test_a_metric_without_a_batch_has_no_value() -> None:
    """A validation that never measured records nothing for it, and torchmetrics has no reason to warn."""

    def only_training(engine: Engine, batch: Batch) -> dict[str, float]:
        if engine.training:
            step(engine, batch)
        return {"seen": 1.0}

    metrics = {"f1": MulticlassF1Score(3), "mean": MulticlassAccuracy(3), "acc": accuracy}
    history = Engine(only_training, model=linear(), callbacks=[Metrics(metrics)]).fit(TRAIN, VAL, epochs=1)
    assert {name for name in history if name.startswith("val_")} == {"val_seen"}


def test_measuring_does_not_change_the_weights() -> None:
    """A run with every kind of metric is the run without one, to the bit."""
    metrics = {"acc": accuracy, "f1": MulticlassF1Score(3), "ig": ignite.metrics.Accuracy()}
    measured, plain = make_trainer(metrics=metrics), make_trainer()
    for trainer in (measured, plain):
        trainer.fit(TRAIN, VAL, epochs=2)
    for mine, other in zip(measured.parts["model"].parameters(), plain.parts["model"].parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_function_metric_records_no_gradients() -> None:
    """What a metric computes cannot be differentiated, and holds no graph in memory."""
    tracked: list[bool] = []

    def tracking(output: Tensor, target: Tensor) -> Tensor:
        value = output.sum()
        tracked.append(value.requires_grad)
        return value

    make_trainer(metrics={"sum": tracking}).fit(TRAIN, epochs=1)
    assert tracked == [False] * 4


def test_an_error_in_a_metric_goes_on_to_the_caller() -> None:
    """A metric that cannot read the output is no reason to train on without it."""
    trainer = make_trainer(metrics={"shape": lambda output, target: output + torch.zeros(99)})
    with pytest.raises(RuntimeError, match="size") as caught:
        trainer.fit(TRAIN, epochs=1)
    assert any("step 1" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("value", [torch.zeros(3), "0.5", None])
def test_a_function_that_returns_no_single_number_is_named(value: Any) -> None:
    """The message says which metric it was and what it gave."""
    with pytest.raises(DataError, match=r"^wrong "):
        make_trainer(metrics={"wrong": lambda output, target: value}).fit(TRAIN, epochs=1)


def test_a_dict_output_is_refused_with_what_to_write() -> None:
    """A metric that does not say which part of it it takes: the message lists the keys, and the ways to say so."""
    with pytest.raises(DataError, match=r"'f1' was given the model's output, a dict with keys logits, features"):
        split_trainer({"f1": MulticlassF1Score(3)}).fit(TRAIN, epochs=1)


@pytest.mark.parametrize(
    "metric",
    [
        lambda output, target: accuracy(output["logits"], target),
        LambdaInputTransformer(MulticlassAccuracy(3, average="micro"), transform_pred=itemgetter("logits")),
        ignite.metrics.Accuracy(output_transform=lambda pair: (pair[0]["logits"], pair[1])),
    ],
    ids=HOUSES,
)
def test_a_metric_of_each_house_takes_its_part_of_a_dict_output(metric: Any) -> None:
    """Each in the way of its house."""
    history = split_trainer({"acc": metric}).fit(TRAIN, VAL, epochs=1)
    assert history["val_acc"] == [pytest.approx(by_hand(VAL)["acc"], abs=1e-6)]


def split_trainer(metrics: dict[str, Any]) -> Engine:
    """A trainer of a model with two heads, which does not learn."""

    class Split(nn.Linear):
        def forward(self, inputs: Tensor) -> dict[str, Tensor]:  # type: ignore[override]  # a model with two heads
            return {"logits": super().forward(inputs), "features": inputs}

    def loss(output: dict[str, Tensor], target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output["logits"], target)

    torch.manual_seed(0)
    model = Split(4, 3)
    return Trainer(model, torch.optim.SGD(model.parameters(), lr=0.0), loss, metrics=metrics)


def test_a_metric_may_be_left_to_evaluations() -> None:
    """It is neither updated in training nor has a column there; who watches it in training is told so."""
    Counting.calls.clear()
    trainer = make_trainer(Metrics({"count": Counting()}, train=False), EarlyStopping("val_count"))
    history = trainer.fit(TRAIN, VAL, epochs=1)
    assert Counting.calls == ["update no grad"] * len(VAL) + ["compute"]
    assert list(history) == ["epoch", "step", "train_loss", "val_loss", "val_count"]
    assert trainer.evaluate(VAL)["count"] == 37
    watching = make_trainer(Metrics({"count": Counting()}, train=False), EarlyStopping("train_count"))
    with pytest.raises(ConfigurationError, match=r'"train_count", but the values are: train_loss\.'):
        watching.fit(TRAIN, VAL, epochs=1)


def several() -> MetricCollection:
    """A metric that computes three values."""
    kinds = {average: MulticlassAccuracy(3, average=average) for average in ("micro", "macro", "weighted")}
    return MetricCollection(dict(kinds))


def test_a_tuple_of_names_takes_these_of_many_values() -> None:
    """Under their own names, which handlers may watch; the others are in no column."""
    trainer = make_trainer(EarlyStopping("val_macro", mode="max"), metrics={("macro", "micro"): several()}, lr=0.0)
    history = trainer.fit(TRAIN, VAL, epochs=1)
    assert [name for name in history if name.startswith("val_")] == ["val_loss", "val_macro", "val_micro"]
    assert history["val_micro"] == [pytest.approx(by_hand(VAL)["acc"], abs=1e-6)]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({("makro",): several()}, r'"makro" is not among .*: macro, micro, weighted\. Did you mean "macro"\?'),
        ({("acc",): MulticlassAccuracy(3)}, r'"acc" was wanted has a single value\. Name it by a string'),
        ({("acc",): accuracy}, "is a function, which has one value. Name it by a string"),
        ({1: accuracy}, "A metric is named 1. Name it by a string"),
        ({("micro", "loss"): several()}, 'Two metrics are named "loss"'),
        ({"micro": accuracy, ("micro",): several()}, 'Two metrics are named "micro"'),
    ],
)
def test_a_name_of_a_tuple_that_cannot_be_is_refused(metrics: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(metrics=metrics).fit(TRAIN, epochs=1)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ([accuracy], "each needs a name"),
        (accuracy, "each needs a name"),
        ({"acc": MulticlassAccuracy}, "is the class MulticlassAccuracy. Did you forget"),
        ({"acc": "accuracy"}, "cannot be computed"),
        ({"acc": None}, "cannot be computed"),
        ({"loss": accuracy}, 'Two metrics are named "loss"'),
    ],
)
def test_what_is_no_metric_is_refused_at_construction(metrics: Any, message: str) -> None:
    """With its name and what to write instead."""
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(metrics=metrics)


def test_a_name_that_is_taken_is_refused() -> None:
    """Two metrics of one name would share a column."""
    with pytest.raises(ConfigurationError, match='Two metrics are named "acc"'):
        make_trainer(Metrics({"acc": MeanMetric()}), metrics={"acc": accuracy})


@pytest.mark.parametrize("metric", [accuracy, MulticlassAccuracy(3)], ids=["function", "torchmetrics"])
def test_a_recorded_value_cannot_share_its_name_with_a_metric(metric: Any) -> None:
    """Two numbers in one column would give a third that neither of them is."""

    def both(engine: Engine, batch: Batch) -> dict[str, float]:
        step(engine, batch)
        return {"acc": 0.0}

    engine = Engine(both, model=linear(), callbacks=[Metrics({"acc": metric})])
    with pytest.raises((ConfigurationError, DataError), match="acc"):
        engine.fit(TRAIN, epochs=1)


def test_a_collections_value_cannot_share_its_name_with_a_metric() -> None:
    """The collection m with the key acc records m_acc, and so does a metric of that name."""
    metrics = {"m": MetricCollection({"acc": MulticlassAccuracy(3)}), "m_acc": accuracy}
    with pytest.raises((ConfigurationError, DataError), match="m_acc"):
        make_trainer(metrics=metrics).fit(TRAIN, epochs=1)


def test_measuring_outside_a_stage_is_refused() -> None:
    """A value that belongs to no stage would be lost."""
    engine = Engine(model=linear(), callbacks=[Metrics({"mse": MeanSquaredError()})])
    with pytest.raises(RuntimeError, match="outside a stage"):
        engine.measure(torch.zeros(1), torch.zeros(1))


def test_the_bar_and_the_log_can_look_at_function_metrics_within_the_epoch() -> None:
    """peek() holds the running averages; a computed metric has no value before its stage ends."""
    seen: list[set[str]] = []
    trainer = make_trainer(metrics={"acc": accuracy, "f1": MulticlassF1Score(3)})
    trainer.subscribe(StepEnd, lambda event: seen.append(set(event.engine.current.peek())))
    trainer.fit(TRAIN, epochs=1)
    assert seen == [{"train_loss", "train_acc"}] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("house", HOUSES)
def test_metrics_on_cuda_are_those_of_the_cpu(house: str) -> None:
    """Metrics follow the outputs to their device, and all values come back in the history."""
    from camshaft.callbacks import Placement

    metrics = HOUSES[house]
    history = make_trainer(Placement("cuda"), metrics=metrics, lr=0.0).fit(TRAIN, VAL, epochs=1)
    expected = by_hand(VAL)
    for name in metrics:
        assert history[f"val_{name}"] == [pytest.approx(expected[name.removesuffix("_again")], abs=1e-5)]


def test_an_error_in_a_metric_that_takes_its_part_is_its_own() -> None:
    """It is not blamed on the dict: here the metric knows too few classes."""
    metric = LambdaInputTransformer(MulticlassAccuracy(2), transform_pred=itemgetter("logits"))
    with pytest.raises((ValueError, RuntimeError)) as caught:
        split_trainer({"acc": metric}).fit(TRAIN, epochs=1)
    assert not isinstance(caught.value, DataError)


def test_a_name_beside_those_of_a_tuple_is_refused_before_the_first_step() -> None:
    """What a metric of such names gives is known; only a collection under one name may give more."""
    trainer = make_trainer(EarlyStopping("val_macro_2", mode="max"), metrics={("macro", "micro"): several()})
    with pytest.raises(ConfigurationError, match=r'"val_macro_2", but the values are: .*Did you mean "val_macro"\?'):
        trainer.fit(TRAIN, VAL, epochs=1)
    assert trainer.step == 0
    make_trainer(EarlyStopping("val_m_macro", mode="max"), metrics={"m": several()}).fit(TRAIN, VAL, epochs=1)


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"metrics": [BinaryAccuracy()]}, "each needs a name"),
        ({"metrics": {"acc": BinaryAccuracy}}, "the class BinaryAccuracy. Did you forget ()?"),
        ({"metrics": {"acc": "accuracy"}}, "'acc' is 'accuracy', which cannot be computed"),
        ({"metrics": {"acc": lambda output: output}}, "'acc'"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_where_it_is_written(settings: dict[str, Any], phrase: str) -> None:
    with refused(ConfigurationError, phrase):
        Metrics(**settings)


def test_one_metric_name_in_two_places_is_refused_at_attachment() -> None:
    trainer = regression(metrics={"acc": mean_error})
    with refused(ConfigurationError, 'Two metrics are named "acc"'):
        trainer.attach(Metrics({"acc": BinaryAccuracy()}))


@pytest.mark.parametrize("metric", [BinaryAccuracy(), mean_error])
def test_a_value_recorded_under_the_name_of_a_metric_is_refused(metric: Any) -> None:
    def step(engine: Engine, batch: Tensor) -> dict[str, Tensor]:
        engine.measure(torch.ones(4), torch.ones(4, dtype=torch.int64), weight=4)
        return {"acc": torch.tensor(0.5)}

    engine = Engine(step, callbacks=[Metrics({"acc": metric})])
    with pytest.raises(CamshaftError, match="acc"):
        engine.fit([torch.ones(4)], epochs=1)


def test_a_metric_cannot_read_an_output_of_several_parts() -> None:
    trainer = regression(
        DictOutput(),
        loss_fn=lambda output, target: nn.functional.mse_loss(output["logits"], target),
        metrics={"acc": BinaryAccuracy()},
    )
    with refused(DataError, "The metric 'acc' was given the model's output, a dict with keys logits, hidden"):
        trainer.fit(pairs(), epochs=1)
