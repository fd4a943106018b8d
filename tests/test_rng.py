from __future__ import annotations

import random

import numpy as np
import torch

from camshaft.engine.rng import preserve_rng, seed_everything


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def test_a_block_with_its_own_numbers_leaves_every_generator_as_it_was() -> None:
    seed_everything(3)
    expected = [draw(), draw()]
    seed_everything(3)
    first = draw()
    with preserve_rng():
        draw(), draw()
    assert [first, draw()] == expected


def test_the_generators_are_put_back_after_an_error_too() -> None:
    seed_everything(3)
    expected = draw()
    seed_everything(3)
    try:
        with preserve_rng():
            draw()
            raise KeyError
    except KeyError:
        pass
    assert draw() == expected
