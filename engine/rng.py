"""Random numbers: kept apart, so that watching a run does not change it, and saved, so that it can resume."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

SEED_VERSION = 1  # of `mix`: a checkpoint of another version would resume with other numbers


def rng_state() -> dict[str, Any]:
    """Return the state of every global generator in use: python, numpy (if loaded), torch and its devices.

    It holds tensors and plain values only.
    """
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (str(name), torch.from_numpy(keys.astype("int64")), *rest)
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every generator back to what `rng_state` returned."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        import numpy as np

        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    if "mps" in state:
        torch.mps.set_rng_state(state["mps"])


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Run a block whose random numbers leave no trace: the generators are afterwards as they were.

    >>> before = torch.get_rng_state()
    >>> with preserve_rng():
    ...     _ = torch.rand(3)
    >>> bool((torch.get_rng_state() == before).all())
    True
    """
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (every device)."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def mix(seed: int, epoch: int, position: int) -> int:
    """Return 64 well-mixed bits for a place in a run: the finaliser of splitmix64, applied to each number in turn.

    Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014.

    >>> mix(0, 1, 0) != mix(0, 0, 1)
    True
    """
    bits = 0
    for number in (seed, epoch, position):
        bits = (bits + number + 0x9E3779B97F4A7C15) & (2**64 - 1)
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        bits ^= bits >> 31
    return bits


def generator_states(data: object) -> list[torch.Tensor]:
    """Return the states of the generators that a loader and its samplers hold themselves."""
    return [generator.get_state() for generator in _generators(data)]


def set_generator_states(data: object, states: list[torch.Tensor]) -> None:
    """Put them back to what `generator_states` returned."""
    for generator, state in zip(_generators(data), states, strict=False):
        generator.set_state(state)


def _generators(data: object) -> list[torch.Generator]:
    batch_sampler = getattr(data, "batch_sampler", None)
    holders = (data, getattr(data, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(holder, "generator", None) for holder in holders)
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())
