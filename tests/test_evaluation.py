"""Evaluations outside the loop: streamed predictions, what is kept of them, and eval mode as a block."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import class_batches, make_trainer, refused
from ranks import on_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from camshaft.callbacks import Distributed, WeightAverage
from camshaft.engine import ConfigurationError, DataError, Engine, EngineStateError, EpochEnd, StepEnd, Trainer


class Rich(nn.Module):
    """Returns an object, as many a library's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.drop = nn.Dropout()

    def forward(self, inputs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.drop(self.layer(inputs)), hidden=[inputs])


def rich_engine() -> Engine:
    torch.manual_seed(0)
    return Engine(lambda engine, batch: None, model=Rich())


def logits(output: Any) -> Any:
    return output.logits


def test_predictions_come_one_at_a_time_with_their_batches_whatever_a_model_returns() -> None:
    engine, data = rich_engine(), class_batches(4, 4, 2)
    pairs = list(engine.predictions(data))
    assert [batch is one for (batch, _), one in zip(pairs, data, strict=True)] == [True] * 3
    for (inputs, _), output in pairs:
        assert torch.equal(output.logits, engine.parts["model"].layer(inputs))
        assert not output.logits.requires_grad


def test_what_is_kept_of_an_output_is_joined_or_not() -> None:
    engine, data = rich_engine(), class_batches(4, 4, 2)
    apart = engine.predict(data, output=logits, join=False)
    assert [len(one) for one in apart] == [4, 4, 2]
    assert torch.equal(engine.predict(data, output=logits), torch.cat(apart))
    (first, *_) = engine.predict(data, join=False)
    assert isinstance(first, SimpleNamespace)
    with refused(DataError, "which cannot be joined over batches"):
        engine.predict(data)


def test_memory_does_not_grow_with_the_data() -> None:
    """An output is gone when the loop has let go of it."""
    engine, alive = rich_engine(), []
    for _, output in engine.predictions(class_batches(*[4] * 6)):
        alive.append(weakref.ref(output.logits))
        del output
        assert sum(one() is not None for one in alive) <= 1


def test_the_body_of_the_loop_is_in_eval_mode_and_what_was_before_comes_back() -> None:
    """Also where the loop is left early, or the body raises."""
    engine = rich_engine()
    model = engine.parts["model"]

    def leave() -> None:
        for _ in engine.predictions(class_batches(4, 4)):
            assert not model.training
            assert not torch.is_grad_enabled()
            assert engine.current.name == "predict"
            break

    def fail() -> None:
        for _ in engine.predictions(class_batches(4, 4)):
            raise KeyError

    leave()
    assert (model.training, torch.is_grad_enabled(), engine.current.name) == (True, True, "")
    with pytest.raises(KeyError):
        fail()
    gc.collect()
    assert (model.training, torch.is_grad_enabled(), engine.current.name) == (True, True, "")


@pytest.mark.parametrize("call", [Engine.predict, Engine.predictions])
def test_an_output_that_is_no_function_is_refused_before_the_first_batch(call: Callable[..., Any]) -> None:
    with refused(ConfigurationError, "output is 'logits', not a function. Write output=lambda output: ..."):
        call(rich_engine(), class_batches(4), output="logits")


def test_predictions_without_a_model_or_without_data_are_refused() -> None:
    with refused(ConfigurationError, "predict needs the part named model"):
        Engine(lambda engine, batch: None).predictions([])
    with refused(DataError, "data"):
        list(rich_engine().predictions([]))


def predict_on_ranks() -> tuple[Tensor, list[Tensor], list[int]]:
    model = nn.Linear(2, 1)
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    engine = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), nn.MSELoss(), callbacks=[Distributed()], seed=0)
    numbers = torch.arange(7.0)
    data = DataLoader(TensorDataset(torch.stack([numbers, numbers], 1), numbers[:, None]), 3)
    streamed = [len(output) for _, output in engine.predictions(data)]
    return engine.predict(data), engine.predict(data, output=lambda out: out / 2, join=False), streamed


def test_on_several_ranks_a_list_of_outputs_is_whole_and_a_stream_is_each_ranks_own() -> None:
    """The last batch has one sample, which one of the two ranks reads."""
    results = on_ranks(2, predict_on_ranks)
    for joined, apart, _ in results:
        assert joined.flatten().tolist() == [0, 2, 4, 6, 8, 10, 12]
        assert [one.flatten().tolist() for one in apart] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [sum(streamed) for *_, streamed in results] == [2, 5]


def noisy_trainer(*callbacks: Any) -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 3))
    return Trainer(model, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss(), callbacks=callbacks, seed=3)


@pytest.mark.parametrize("moment", [StepEnd, EpochEnd])
def test_a_handler_that_draws_samples_within_evaluating_changes_nothing(moment: Any) -> None:
    alone, watched = noisy_trainer(), noisy_trainer()
    outputs = []

    def draw(event: StepEnd | EpochEnd) -> None:
        model = event.engine.parts["model"]
        stage = event.engine.current.name
        with event.engine.evaluating():
            outputs.append(model(torch.randn(2, 4)))
            assert not model.training
            assert not torch.is_grad_enabled()
            assert not event.engine.training
        assert model.training
        assert event.engine.current.name == stage

    watched.subscribe(moment, draw)
    for engine in (alone, watched):
        engine.fit(class_batches(4, 4), epochs=3)
    assert outputs
    for ours, theirs in zip(watched.parts["model"].parameters(), alone.parts["model"].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert watched.history.rows == alone.history.rows


def test_evaluating_uses_the_weights_that_evaluations_use() -> None:
    trainer = make_trainer(WeightAverage(decay=0.9))
    trainer.fit(class_batches(4, 4), epochs=2)
    weight = trainer.parts["model"].weight
    raw = weight.detach().clone()
    with trainer.evaluating():
        within = trainer.parts["model"].weight.detach().clone()
        made = trainer.parts["model"](class_batches(5)[0][0])
    assert torch.equal(made, trainer.predict(class_batches(5)))
    assert not torch.equal(raw, within)
    assert torch.equal(trainer.parts["model"].weight, raw)


def test_all_comes_back_after_an_error_and_nothing_is_recorded_within() -> None:
    trainer = noisy_trainer()
    with pytest.raises(KeyError), trainer.evaluating():
        raise KeyError
    assert trainer.parts["model"].training
    assert torch.is_grad_enabled()

    def record(event: StepEnd) -> None:
        with event.engine.evaluating(), refused(EngineStateError, "Values were recorded outside a stage."):
            event.engine.record(loss=1.0, weight=1)

    trainer.subscribe(StepEnd, record)
    trainer.fit(class_batches(4), epochs=1)


def test_a_validation_within_a_block_of_evaluating_is_as_one_outside() -> None:
    trainer = noisy_trainer()
    data = class_batches(4, 4)
    with trainer.evaluating():
        inside = trainer.evaluate(data)
    assert inside == trainer.evaluate(data)
