from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refused
from torch import Tensor

from camshaft.engine import ConfigurationError, FocalLoss, SymmetricCrossEntropy, Trainer


@pytest.mark.parametrize(
    ("predictions", "focal", "entropy"), [([0.9, 0.1], 0.0005, 0.1054), ([0.5, 0.5], 0.0866, 0.6931)]
)
def test_focal_loss_counts_the_confident_little(predictions: list[float], focal: float, entropy: float) -> None:
    output, target = torch.tensor(predictions), torch.tensor([1.0, 0.0])
    assert round(FocalLoss(alpha=0.75, gamma=2.0)(output, target).item(), 4) == focal
    assert round(torch.nn.BCELoss()(output, target).item(), 4) == entropy


def test_focal_loss_without_focus_is_cross_entropy() -> None:
    output, target = torch.rand(7), torch.randint(0, 2, (7,))
    plain = torch.nn.functional.binary_cross_entropy(output, target.float())
    assert torch.allclose(FocalLoss(alpha=None, gamma=0)(output, target), plain)


def test_focal_loss_on_logits_is_that_on_probabilities() -> None:
    logits, target = torch.randn(9), torch.randint(0, 2, (9,))
    assert torch.allclose(
        FocalLoss(from_logits=True)(logits, target), FocalLoss()(logits.sigmoid(), target), atol=1e-6
    )


def test_focal_loss_on_logits_equals_torchvisions() -> None:
    from torchvision.ops import sigmoid_focal_loss

    logits, target = torch.randn(9, 3), torch.randint(0, 2, (9, 3)).float()
    theirs = sigmoid_focal_loss(logits, target, alpha=0.75, gamma=2.0, reduction="mean")
    assert torch.allclose(FocalLoss(0.75, 2.0, from_logits=True)(logits, target), theirs, atol=1e-7)


def test_symmetric_cross_entropy_is_the_formula() -> None:
    logits, target = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 4, (6,))
    values = logits.numpy()
    p = np.exp(values) / np.exp(values).sum(1, keepdims=True)
    q = np.clip(np.eye(4)[target.numpy()], 1e-4, 1.0)
    forward = -np.log(p[np.arange(6), target.numpy()]).mean()
    reverse = -(np.clip(p, 1e-4, 1.0) * np.log(q)).sum(1).mean()
    ours = SymmetricCrossEntropy(alpha=0.3, beta=2.0)(logits, target).item()
    assert ours == pytest.approx(0.3 * forward + 2.0 * reverse, abs=1e-9)


@pytest.mark.parametrize(("loss", "settings"), [(FocalLoss, {"alpha": 1.5}), (FocalLoss, {"gamma": -1}),
                                                (SymmetricCrossEntropy, {"beta": -1})])  # fmt: skip
def test_a_setting_that_cannot_work_is_refused(loss: Any, settings: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=r"Pass a number"):
        loss(**settings)


@pytest.mark.parametrize("loss_fn", [FocalLoss(from_logits=True), SymmetricCrossEntropy()])
def test_the_losses_train(loss_fn: Any) -> None:
    inputs = torch.randn(64, 4)
    target: Tensor = (inputs.sum(1) > 0).long()
    model: torch.nn.Module = torch.nn.Linear(4, 2)
    if isinstance(loss_fn, FocalLoss):
        model = torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Flatten(0))
    trainer = Trainer(model, torch.optim.Adam(model.parameters(), lr=0.05), loss_fn)
    losses = trainer.fit([(inputs, target)] * 30, epochs=2)["train_loss"]
    assert losses[1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("make", "settings", "phrase"),
    [
        (FocalLoss, {"alpha": 1.5}, "alpha is 1.5"),
        (FocalLoss, {"gamma": -1.0}, "gamma is -1.0"),
        (SymmetricCrossEntropy, {"beta": -1.0}, "beta is -1.0"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_where_it_is_written(
    make: Callable[..., object], settings: dict[str, Any], phrase: str
) -> None:
    with refused(ConfigurationError, phrase):
        make(**settings)
