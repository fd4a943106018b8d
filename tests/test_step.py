"""What is done with a batch, and what may take its place."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import (
    Batch,
    DictOutput,
    class_batches,
    linear,
    loader_of,
    make_trainer,
    pairs,
    refused,
    regression,
)
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from camshaft.callbacks import EarlyStopping, MicroBatch, StopOnNonFinite
from camshaft.engine import (
    NOTHING,
    Callback,
    ConfigurationError,
    DataError,
    Engine,
    FunctionStep,
    Step,
    StepEnd,
    SupervisedStep,
    Trainer,
    prepare_batch,
    train_in_parts,
)


class Doubled:
    """Another step, of which nothing is one of ours: it counts, and lets the inner one do the work on each batch."""

    def __init__(self, inner: Step) -> None:
        self.inner = inner
        self.calls: list[str] = []

    def train(self, engine: Engine, batch: Any, /) -> Any:
        self.calls.append("train")
        return self.inner.train(engine, batch)

    def evaluate(self, engine: Engine, batch: Any, /) -> Any:
        self.calls.append("evaluate")
        return self.inner.evaluate(engine, batch)

    def inputs(self, batch: Any, /) -> Any:
        self.calls.append("inputs")
        return self.inner.inputs(batch)


def test_steps_of_ours_and_of_ones_own_are_steps_and_a_function_is_none() -> None:
    function = FunctionStep(lambda engine, batch: None)
    for step in (function, SupervisedStep(nn.MSELoss()), Doubled(function)):
        assert isinstance(step, Step)
    assert not isinstance(lambda engine, batch: None, Step)


def test_a_function_serves_training_and_evaluation_and_can_tell_them_apart() -> None:
    stages: list[tuple[bool, str]] = []
    engine = Engine(lambda engine, batch: stages.append((engine.training, engine.current.name)))
    engine.fit([1], [2], epochs=1)
    engine.evaluate([3])
    assert stages == [(True, "train"), (False, "val"), (False, "test")]


def test_a_function_step_calls_the_model_with_the_inputs_of_a_pair() -> None:
    inputs, target = torch.ones(4, 2), torch.ones(4, 1)
    assert FunctionStep(lambda engine, batch: None).inputs((inputs, target)) is inputs
    assert FunctionStep(lambda engine, batch: None).inputs(inputs) is inputs


@pytest.mark.parametrize("step", ["train", 3])
def test_what_is_no_step_is_refused_where_the_engine_is_made(step: Any) -> None:
    with refused(ConfigurationError, f"step is {step!r}, not a function.", "def step(engine, batch)"):
        Engine(step)


def test_a_step_of_ones_own_is_used_as_it_is() -> None:
    step = Doubled(SupervisedStep(nn.CrossEntropyLoss()))
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine = Engine(step, model=model, optimizer=optimizer, loss_fn=nn.CrossEntropyLoss())
    assert engine.stepper is step
    engine.fit(class_batches(4, 4), class_batches(4), epochs=1)
    engine.predict(class_batches(4))
    assert step.calls == ["train", "train", "evaluate", "inputs"]


def test_a_wrapper_takes_the_place_of_the_step_and_changes_no_weight() -> None:
    plain, wrapped = make_trainer(), make_trainer()
    wrapped.wrap_step(Doubled)
    wrapped.wrap_step(Doubled)
    for trainer in (plain, wrapped):
        trainer.fit(class_batches(4, 4), epochs=2)
    assert isinstance(wrapped.stepper, Doubled)
    assert isinstance(wrapped.stepper.inner, Doubled)
    assert wrapped.stepper.calls == wrapped.stepper.inner.calls == ["train"] * 4
    assert torch.equal(plain.parts["model"].weight, wrapped.parts["model"].weight)


def test_in_the_script_style_there_is_no_step_to_wrap() -> None:
    with refused(ConfigurationError, "This engine has no step to wrap."):
        Engine().wrap_step(Doubled)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda output: output.mean(),
        lambda output, target: output.mean() + 0 * target.sum(),
        lambda output, target, scale=2.0: scale * output.mean() + 0 * target.sum(),
        lambda *values: values[0].mean() + 0 * values[1].sum(),
    ],
)
def test_a_loss_gets_as_many_arguments_as_it_needs(loss_fn: Any) -> None:
    """With more or fewer of them, or in another order, it would fail."""
    model = nn.Linear(4, 3)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), loss_fn)
    assert trainer.fit(class_batches(4), epochs=1)["step"] == [1]


def test_a_batch_in_parts_trains_and_records_as_the_whole_batch() -> None:
    whole, parted = make_trainer(), make_trainer()
    data = class_batches(8, 8)

    class Parted(Doubled):
        def train(self, engine: Engine, batch: Batch, /) -> None:
            parts = [(batch[0][:5], batch[1][:5]), (batch[0][5:], batch[1][5:])]
            train_in_parts(engine, self.inner, parts)

    parted.wrap_step(Parted)
    assert parted.fit(data, epochs=2)["train_loss"] == pytest.approx(whole.fit(data, epochs=2)["train_loss"])
    assert parted.num_updates == whole.num_updates == 4
    torch.testing.assert_close(parted.parts["model"].weight, whole.parts["model"].weight)


def test_the_trainers_step_uses_the_parts_that_the_engine_has_now() -> None:
    trainer = make_trainer()
    trainer.parts["loss_fn"] = lambda output, target: output.pow(2).mean() + 7
    assert trainer.fit(class_batches(4), epochs=1)["train_loss"][0] > 7


def test_a_fit_without_a_step_is_refused() -> None:
    with refused(ConfigurationError, "This engine has no step"):
        Engine().fit([torch.ones(2)], epochs=1)


def test_a_last_batch_of_one_with_batch_normalisation_is_answered_with_drop_last() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    trainer = regression(model)
    with refused(DataError, "a batch of one sample at step 3", "drop_last=True"):
        trainer.fit(loader_of(9, batch_size=4), epochs=1)
    trainer.fit(loader_of(9, batch_size=4, drop_last=True), epochs=1)


def test_an_output_that_the_loss_cannot_take_is_described() -> None:
    with refused(DataError, "The loss MSELoss could not take the output, dict with keys logits, hidden", "loss_fn="):
        regression(DictOutput()).fit(pairs(), epochs=1)


X, Y = torch.ones(4, 2), torch.ones(4, 1)


def test_shapes_that_the_loss_cannot_take_are_described() -> None:
    with refused(DataError, "NLLLoss could not take the output, Tensor [4, 1], and the target, Tensor [3]"):
        regression(loss_fn=nn.NLLLoss()).fit([(X, torch.zeros(3, dtype=torch.int64))], epochs=1)


def test_a_step_that_returns_nothing_records_nothing() -> None:
    seen: list[int] = []

    def step(engine: Engine, batch: int) -> None:
        seen.append(batch)

    history = Engine(step).fit([1, 2, 3], epochs=1)
    assert (seen, list(history)) == ([1, 2, 3], ["epoch", "step"])


@pytest.mark.parametrize(
    ("output", "phrase"),
    [
        (0.5, "The step returned 0.5, of type float. Return None, a tensor, or a dict"),
        ((X, Y), "of type tuple"),
        (torch.ones(8), "loss has shape [8], but a recorded value is one number"),
        ({"acc": torch.ones(8)}, "acc has shape [8], but a recorded value is one number. Reduce it: acc.mean()."),
        ({"acc": "good"}, "acc is 'good', which is not a number"),
        ({"acc": None}, "acc is None, which is not a number"),
        (
            {"loss": 1.0, "weight": 4},
            "named weight, which is how the number of samples is stated. Write engine.record(",
        ),
        ({5: 1.0}, "A value is named 5"),
    ],
)
def test_a_step_that_returns_what_cannot_be_recorded_is_refused(output: Any, phrase: str) -> None:
    with refused(DataError, phrase):
        Engine(lambda engine, batch: output).fit([X], epochs=1)


def test_the_class_of_a_step_is_refused_with_the_parentheses_that_are_missing() -> None:
    class Mine:
        def train(self, engine: Engine, batch: Any, /) -> None: ...

        def evaluate(self, engine: Engine, batch: Any, /) -> None: ...

        def inputs(self, batch: Any, /) -> Any: ...

    with refused(ConfigurationError, "step is the class Mine"):
        Engine(Mine)  # type: ignore[arg-type]  # the mistake
    Engine(Mine()).fit([1], epochs=1)


def test_a_target_is_of_the_present_batch_or_nothing() -> None:
    """A step that measures only its first batch leaves no target to the second."""
    seen: list[Any] = []

    def step(engine: Engine, batch: int) -> None:
        if batch == 0:
            engine.measure("output", "target", weight=1)

    engine = Engine(step)
    engine.subscribe(StepEnd, lambda event: seen.append(engine.current.target))
    engine.fit(range(2), epochs=1)
    assert seen == ["target", NOTHING]


def test_an_empty_batch_counts_for_nothing() -> None:
    """Its loss is the mean of nothing, which is NaN: averages, metrics, weights and watchers of the loss ignore it."""
    empty = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    metrics = {"error": mean_of_squares, "acc": MulticlassAccuracy(3)}
    plain, with_empty = (make_trainer(StopOnNonFinite("raise"), metrics=metrics) for _ in range(2))
    plain.fit(class_batches(4, 4), class_batches(4), epochs=2)
    with_empty.fit([empty, *class_batches(4, 4), empty], [*class_batches(4), empty], epochs=2)
    for name in ("train_loss", "train_error", "train_acc", "val_loss", "val_error", "val_acc"):
        assert with_empty.history[name] == plain.history[name], name
    assert with_empty.num_updates == plain.num_updates
    assert torch.equal(with_empty.parts["model"].weight, plain.parts["model"].weight)


def mean_of_squares(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def test_an_empty_batch_cannot_be_divided_and_counts_for_nothing_either() -> None:
    trainer = make_trainer(MicroBatch(2))
    trainer.fit([*class_batches(4), (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))], epochs=1)
    assert (trainer.step, trainer.num_updates, trainer.num_skipped_updates) == (2, 1, 1)
    assert math.isfinite(trainer.history["train_loss"][0])


@pytest.mark.parametrize("step", [lambda batch: None, lambda: None, lambda engine, batch, more: None])
def test_a_step_that_cannot_take_engine_and_batch_is_refused_where_the_engine_is_made(step: Any) -> None:
    with refused(ConfigurationError, "takes", "a step is called with the engine and the batch"):
        Engine(step)


class OwnLoss(nn.Linear):
    """A model that computes its loss itself, but only when it is given the labels."""

    def forward(self, inputs: Any, labels: Any = None) -> Any:
        output = super().forward(inputs)
        return SimpleNamespace(loss=None if labels is None else (output - labels).square().mean(), logits=output)


@pytest.mark.parametrize(
    ("loss_fn", "prepare", "phrases"),
    [
        (lambda out: out.loss, prepare_batch, ["The loss is None", "must be among its inputs"]),
        (lambda out: out, lambda batch: (batch, None), ["of type SimpleNamespace", "output.loss"]),
        (
            lambda out: out.los,
            prepare_batch,
            ["could not take the output, of type SimpleNamespace", "lambda output: ..."],
        ),
    ],
)
def test_a_model_that_computes_its_loss_itself_is_told_how(loss_fn: Any, prepare: Any, phrases: list[str]) -> None:
    with refused(DataError, *phrases):
        regression(OwnLoss(2, 1), loss_fn=loss_fn, prepare_batch=prepare).fit(pairs(), epochs=1)
    good = regression(OwnLoss(2, 1), loss_fn=lambda out: out.loss, prepare_batch=lambda batch: (batch, None))
    assert good.fit(pairs(), epochs=1)["train_loss"][0] > 0


class Terms(nn.Module):
    """A loss of two terms."""

    def forward(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        ce, penalty = nn.functional.cross_entropy(output, target), output.square().mean()
        return {"loss": ce + 0.1 * penalty, "ce": ce, "penalty": penalty}


def with_terms(*callbacks: Callback, **options: Any) -> Engine:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    return Trainer(model, torch.optim.SGD(model.parameters(), 0.1), Terms(), callbacks=callbacks, **options)


@pytest.mark.parametrize("callbacks", [[], [MicroBatch(num_parts=2)]], ids=["whole", "in parts"])
def test_the_named_terms_of_a_loss_are_recorded_and_the_loss_is_differentiated(callbacks: list[Callback]) -> None:
    data = class_batches(8, 4)
    engine = with_terms(*callbacks)
    engine.fit(data, data, epochs=2)
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for epoch in range(2):
        sums: dict[str, float] = {}
        for inputs, target in data:
            values = Terms()(model(inputs), target)
            sums = {name: sums.get(name, 0.0) + float(value.detach()) * len(inputs) for name, value in values.items()}
            optimizer.zero_grad()
            values["loss"].backward()
            optimizer.step()
        row = engine.history.rows[epoch]
        assert {name: row[f"train_{name}"] * 12 for name in sums} == pytest.approx(sums, rel=1e-6)
        assert {"val_loss", "val_ce", "val_penalty"} < row.keys()
    torch.testing.assert_close(engine.parts["model"].weight, model.weight)
    assert engine.evaluate(data).keys() == {"loss", "ce", "penalty"}


def test_terms_without_the_loss_are_refused_by_their_names() -> None:
    model = nn.Linear(4, 3)
    trainer = Trainer(
        model, torch.optim.SGD(model.parameters(), 0.1), lambda output, target: {"ce": output.mean(), "kl": 0.0}
    )
    with refused(DataError, "returned the values ce, kl, and none is named loss.", "Return the one"):
        trainer.fit(class_batches(4), epochs=1)


def test_a_term_with_the_name_of_a_metric_is_refused() -> None:
    trainer = with_terms(metrics={"ce": nn.functional.cross_entropy})
    with refused(DataError, 'A value named "ce" was recorded, which is a metric\'s.'):
        trainer.fit(class_batches(4), epochs=1)


def test_a_term_can_be_watched_when_it_is_declared_and_the_refusal_says_so() -> None:
    with refused(
        ConfigurationError, 'EarlyStopping watches "val_penalty"', "declare it: engine.stages.declare('penalty')."
    ):
        with_terms(EarlyStopping("val_penalty")).fit(class_batches(4), class_batches(4), epochs=1)
    trainer = with_terms(EarlyStopping("val_ce", threshold=10.0))
    trainer.stages.declare("ce", higher_is_better=False)
    assert "val_ce is" in trainer.fit(class_batches(4), class_batches(4), epochs=3).reason
