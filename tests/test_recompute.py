"""Activations that are computed again: the same weights to the bit, and less that is kept."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import class_batches, refused
from torch import Tensor, nn

from camshaft.callbacks import BestCheckpoint, MixedPrecision, Recompute, RunCheckpoint, WeightAverage
from camshaft.engine import Callback, ConfigurationError, Engine, StepEnd, Trainer, at

TRAIN, VAL = class_batches(8, 8, 8), class_batches(8, seed=1)


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Dropout(0.3), nn.Linear(64, 4))


def trainer(*callbacks: Callback) -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(block(), block()), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks, seed=0)


def weights(engine: Engine) -> dict[str, Tensor]:
    return dict(engine.parts["model"].state_dict())


def assert_same(ours: Engine, theirs: Engine) -> None:
    assert list(weights(ours)) == list(weights(theirs))
    assert all(torch.equal(value, weights(theirs)[name]) for name, value in weights(ours).items())


@pytest.mark.parametrize("modules", [["0.*"], ["0"], ["0.0", "0.1.*"]])
@pytest.mark.parametrize("others", [list, lambda: [MixedPrecision("bf16")], lambda: [WeightAverage(decay=0.5)]])
def test_the_weights_are_those_of_a_run_without_it(modules: list[str], others: Any) -> None:
    """Also with dropout, autocast, and an average, whose copy of the model must compute for itself."""
    with_it, without = trainer(Recompute(modules), *others()), trainer(*others())
    assert with_it.fit(TRAIN, VAL, epochs=2).rows == without.fit(TRAIN, VAL, epochs=2).rows
    assert_same(with_it, without)


def kept_elements(engine: Engine) -> int:
    """How much the forward pass of a batch keeps for the backward pass."""
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.parts["model"](TRAIN[0][0])
    return sum(kept)


def test_less_is_kept_for_the_backward_pass() -> None:
    assert kept_elements(trainer(Recompute(["0.*"]))) < kept_elements(trainer()) / 3


def test_it_is_resumed_to_the_bit_with_it_or_without(tmp_path: Path) -> None:
    whole, cut = trainer(), trainer(Recompute(["0.*"]), RunCheckpoint(tmp_path))
    whole.fit(TRAIN, VAL, epochs=2)
    cut.subscribe(StepEnd, lambda event: cut.run.interrupt(signal.SIGTERM), when=at(2))
    cut.fit(TRAIN, VAL, epochs=2)
    resumed = trainer(RunCheckpoint(tmp_path))
    resumed.fit(TRAIN, VAL, epochs=2, resume="auto")
    assert_same(resumed, whole)


def test_best_weights_have_the_names_of_the_model(tmp_path: Path) -> None:
    engine = trainer(Recompute(["0.*"]), BestCheckpoint("val_loss", directory=tmp_path, restore=True))
    engine.fit(TRAIN, VAL, epochs=2)
    assert torch.load(tmp_path / "best.pt", weights_only=True).keys() == weights(trainer()).keys()


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ("0.*", "Recompute has modules='0.*'."),
        ([], "Recompute has modules=[]."),
        ([3], "Recompute has modules=[3]."),
        (["blocks.*"], 'No module of model matches "blocks.*".'),
    ],
)
def test_modules_that_are_none_are_refused(modules: Any, said: str) -> None:
    with refused(ConfigurationError, said):
        trainer(Recompute(modules))
