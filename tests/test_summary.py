"""The table of a model's layers: as torchinfo makes it, and with nothing changed by it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import class_batches, make_trainer, refused
from torch import Tensor, nn

from camshaft.callbacks import RunDirectory, Summary
from camshaft.engine import ConfigurationError, Trainer

TRAIN = class_batches(8, 8, 8)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


def test_it_is_in_the_run_directory_with_shapes_and_counts(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, terminal=False)
    make_trainer(run, Summary(), model=net()).fit(TRAIN, epochs=1)
    text = (run.path / "summary.txt").read_text()
    assert "Linear: 1-1" in text
    assert "[8, 6]" in text
    assert "Trainable params: 63" in text
    assert "Trainable params: 63" in (run.path / "log.log").read_text()


def test_nothing_is_changed_by_it() -> None:
    """Neither random numbers nor the statistics of batch normalisation nor modes."""
    torch.manual_seed(1)
    watched = make_trainer(Summary(), model=net())
    watched.fit(TRAIN, epochs=2)
    torch.manual_seed(1)
    plain = make_trainer(model=net())
    plain.fit(TRAIN, epochs=2)
    ours, theirs = watched.parts["model"].state_dict(), plain.parts["model"].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not any(module._forward_hooks for module in watched.parts["model"].modules())


def test_it_is_made_once(caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(Summary())
    with caplog.at_level(logging.INFO, logger="camshaft"):
        trainer.fit(TRAIN, epochs=2)
        trainer.fit(TRAIN, epochs=1)
    assert caplog.text.count("The part model:") == 1


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        out: Tensor = self.layer(left + right)
        return out


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_several_inputs_have_shapes_too(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Two()
    target = torch.zeros(5, dtype=torch.long)
    left, right = torch.ones(5, 4), torch.ones(5, 4)
    batch: Any = ((left, right), target) if kind == "tuple" else ({"left": left, "right": right}, target)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=[Summary()])
    with caplog.at_level(logging.INFO, logger="camshaft"):
        trainer.fit([batch], epochs=1)
    assert "[5, 3]" in caplog.text


class Picky(nn.Module):
    """Takes what torchinfo cannot hand on: an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("not twice")
        out: Tensor = self.layer(inputs)
        return out


def test_where_torchinfo_cannot_run_the_model_it_is_without_shapes(caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(Summary(), model=Picky())
    with caplog.at_level(logging.INFO, logger="camshaft"):
        trainer.fit(TRAIN[:1], epochs=1)
    assert "The summary is without shapes" in caplog.text
    assert "Trainable params: 15" in caplog.text


def test_a_part_that_is_none_is_refused() -> None:
    with refused(ConfigurationError, "Summary needs the part named modle", 'Did you mean "model"?'):
        make_trainer(Summary(part="modle"))
