"""Runs that come out the same each time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from camshaft.engine import Callback, Engine

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


class Deterministic(Callback):
    """Lets torch use only operations that give the same result each time, for the length of a fit.

    An operation that has no such form raises torch's error, which names it; with ``warn_only`` it warns. All settings
    are put back when the fit ends. Random numbers are another matter: pass ``seed=`` to the engine.

    On CUDA, cuBLAS reads its setting when it is first used: attach this before, or set
    ``CUBLAS_WORKSPACE_CONFIG=:4096:8`` in the environment.

    Args:
        warn_only: warn instead of raising.

    >>> engine = Engine(lambda engine, batch: None, callbacks=[Deterministic()])
    >>> _ = engine.fit([torch.zeros(1)], epochs=1)
    >>> torch.are_deterministic_algorithms_enabled()
    False
    """

    unique = True

    def __init__(self, *, warn_only: bool = False) -> None:
        self.warn_only = warn_only

    def attach(self, engine: Engine) -> None:
        """Change the settings in each fit."""
        super().attach(engine)
        os.environ.setdefault(CUBLAS, ":4096:8")
        engine.listeners.around("fit", self._set)

    @contextmanager
    def _set(self) -> Iterator[None]:
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        benchmark = torch.backends.cudnn.benchmark
        torch.use_deterministic_algorithms(True, warn_only=self.warn_only)
        torch.backends.cudnn.benchmark = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.backends.cudnn.benchmark = benchmark

    def __repr__(self) -> str:
        return f"Deterministic(warn_only={self.warn_only})"
