"""The named objects of a run."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from helpers import CountingModel, loader_of, mean_error, pairs, refused, regression
from torch import nn

from camshaft.callbacks import EarlyStopping
from camshaft.engine import ConfigurationError, Engine, StepEnd
from camshaft.engine.parts import Parts


def make_parts() -> Parts:
    model, head = nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.Linear(2, 1)
    return Parts(model=model, note="a run", optimizer=torch.optim.SGD(model.parameters(), 0.1), head=head)


def test_modules_and_optimizers_are_found_by_name_in_their_order() -> None:
    parts = make_parts()
    assert parts.modules() == {"model": parts["model"], "head": parts["head"]}
    assert parts.optimizers() == {"optimizer": parts["optimizer"]}


def test_parameters_are_those_of_every_module_under_their_names_in_it() -> None:
    assert [name for name, _ in make_parts().named_parameters()] == ["0.weight", "0.bias", "weight", "bias"]


def test_the_device_is_that_of_the_first_parameter() -> None:
    assert Parts(model=nn.Linear(2, 1, device="meta")).device == torch.device("meta")
    assert Parts(model=nn.ReLU()).device == Parts().device == torch.device("cpu")


@pytest.mark.parametrize("fails", [False, True])
def test_modes_are_given_back_layer_by_layer_also_after_an_error(fails: bool) -> None:
    parts = make_parts()
    parts["model"][1].eval()  # a layer that its owner keeps in eval mode
    before = {layer: layer.training for module in parts.modules().values() for layer in module.modules()}
    try:
        with parts.preserve_modes():
            parts["model"].train()
            parts["head"].eval()
            if fails:
                raise ArithmeticError
    except ArithmeticError:
        assert fails
    assert {layer: layer.training for layer in before} == before
    assert set(before.values()) == {True, False}


def test_a_part_may_be_added_after_the_engine_was_made() -> None:
    engine = Engine(model=nn.Linear(2, 1))
    engine.parts["ema"] = nn.Linear(2, 1)
    assert list(engine.parts.modules()) == ["model", "ema"]


def test_a_model_left_in_eval_mode_trains_and_is_given_back_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "camshaft")
    trainer = regression(CountingModel().eval())
    modes: list[bool] = []
    trainer.subscribe(StepEnd, lambda event: modes.append(trainer.parts["model"].training))
    trainer.fit(pairs(2), pairs(), epochs=2)
    assert (modes, trainer.parts["model"].training) == ([True] * 4, False)
    assert "The model was in eval mode" in caplog.text


def test_a_model_in_eval_mode_is_given_back_as_it_was_also_after_an_error() -> None:
    def explode(event: StepEnd) -> None:
        raise ZeroDivisionError

    trainer = regression(CountingModel().eval())
    trainer.subscribe(StepEnd, explode)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(pairs(), epochs=1)
    assert not trainer.parts["model"].training


MISSPELT: list[tuple[str, Any, str]] = [
    ("callback", [EarlyStopping("val_loss")], 'Did you mean "callbacks"?'),
    ("call_backs", [], 'Did you mean "callbacks"?'),
    ("Seed", 0, 'Did you mean "seed"?'),
    ("stopping", EarlyStopping("val_loss"), "callbacks=[EarlyStopping("),
    ("handlers", (EarlyStopping("val_loss"),), "callbacks=[EarlyStopping("),
    ("train", loader_of(4), "Pass it to engine.fit"),
]


@pytest.mark.parametrize(("name", "part", "phrase"), MISSPELT)
@pytest.mark.parametrize("make", [regression, Engine])
def test_what_is_no_part_is_not_taken_for_one(make: Any, name: str, part: Any, phrase: str) -> None:
    """A misspelt keyword would be kept as a part in silence, and have no effect."""
    with refused(ConfigurationError, f'"{name}"', phrase):
        make(**{name: part})


@pytest.mark.parametrize(
    ("name", "part", "phrase"),
    [
        ("metric", {"acc": mean_error}, 'Did you mean "metrics"?'),
        ("prepare_batches", lambda batch: batch, 'Did you mean "prepare_batch"?'),
    ],
)
def test_a_trainer_knows_its_own_parameters_too(name: str, part: Any, phrase: str) -> None:
    with refused(ConfigurationError, f'"{name}"', phrase):
        regression(**{name: part})


def test_other_names_are_names_of_parts() -> None:
    parts: dict[str, Any] = {
        "model2": nn.Linear(2, 1),
        "ema": None,
        "discriminator": nn.Linear(2, 1),
        "names": ["a"],
        "ema_model": [],
    }
    assert regression(**parts).parts.keys() > parts.keys()
    assert Engine(**parts, models=[], optimizer2=None).parts.keys() > parts.keys()
