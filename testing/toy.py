"""A run that takes a moment, and in which whatever goes wrong shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from camshaft.engine import Callback, Engine, Trainer

Batches = list[tuple[Tensor, Tensor]]


def toy_data() -> tuple[Batches, Batches]:
    """Return batches for training and validation: inputs [B, 4] and one of 3 classes, the same at each call.

    Batches are of several sizes, and five in an epoch, so that windows of two do not go into it.

    >>> train, val = toy_data()
    >>> [len(target) for _, target in train], [len(target) for _, target in val]
    ([4, 3, 4, 2, 4], [3, 2])
    """
    generator = torch.Generator().manual_seed(0)
    rule = torch.randn(4, 3, generator=generator)

    def batches(*sizes: int) -> Batches:
        inputs = [torch.randn(size, 4, generator=generator) for size in sizes]
        return [(one, (one @ rule).argmax(dim=1)) for one in inputs]

    return batches(4, 3, 4, 2, 4), batches(3, 2)


def toy_engine(*callbacks: Callback, seed: int = 0) -> Engine:
    """Return a trainer of a small model with dropout and momentum.

    So the weights depend on the order of the updates, and on the random numbers, which begin with ``seed``.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), callbacks=callbacks)


def toy_run(*callbacks: Callback, seed: int = 0, epochs: int = 2, **settings: Any) -> Engine:
    """Train the `toy_engine` on the `toy_data`, with validation, and return it.

    Args:
        callbacks: what to attach.
        seed: where the random numbers begin.
        epochs: of five steps each.
        settings: what else ``fit`` takes.

    >>> engine = toy_run()
    >>> engine.step, engine.history["epoch"]
    (10, [1, 2])
    """
    engine = toy_engine(*callbacks, seed=seed)
    engine.fit(*toy_data(), epochs=epochs, **settings)
    return engine
