"""Averages of the weights along the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

from camshaft.engine import Callback, ConfigurationError, Engine, FitEnd, FitStart, UpdateEnd
from camshaft.engine.checkpoint import bare
from camshaft.engine.errors import whole_number
from camshaft.engine.order import Data, one_pass
from camshaft.engine.rng import own_rng


class WeightAverage(Callback):
    """Keeps an average of the weights, and evaluates with it, over ``torch.optim.swa_utils``.

    Validations, ``evaluate`` and ``predict`` use the average once it has been updated, and the raw weights before;
    training always goes on with the raw ones. A `BestCheckpoint` therefore holds the weights that were measured. The
    average is the part ``weight_average`` of the run.

    Args:
        kind: "ema" (exponential moving average) or "swa" (equal weights).
        decay: of the EMA, in (0, 1): each update keeps this share of the average.
        every: updates between two contributions.
        start: the update after which contributions begin.
        buffers: average buffers, too; batch-norm statistics then belong to the averaged weights roughly.
        batch_norm_data: batches with which batch-norm statistics are computed anew for the average when the run
            ends: exact, where ``buffers`` is rough.
        load_at_end: put the average into the model when the run ends.

    Raises:
        ConfigurationError: for settings that cannot work.
    """

    def __init__(
        self,
        kind: Literal["ema", "swa"] = "ema",
        *,
        decay: float = 0.999,
        every: int = 1,
        start: int = 0,
        buffers: bool = True,
        batch_norm_data: Data | None = None,
        load_at_end: bool = False,
    ) -> None:
        if kind not in ("ema", "swa"):
            raise ConfigurationError(f'WeightAverage does not know {kind!r}. Write "ema" or "swa".')
        if not 0 < decay < 1:
            raise ConfigurationError(f"WeightAverage has decay={decay}. Pass a number between 0 and 1, such as 0.999.")
        self.kind = kind
        self.decay = decay
        self.every = whole_number("WeightAverage's every", every, least=1)
        self.start = whole_number("WeightAverage's start", start, least=0)
        self.buffers = buffers
        self.batch_norm_data = batch_norm_data
        self.load_at_end = load_at_end

    def attach(self, engine: Engine) -> None:
        """Use the average in every evaluation."""
        if "model" not in engine.modules():
            raise ConfigurationError("WeightAverage needs the model. Write Engine(step, model=model, ...).")
        super().attach(engine)
        engine.around("evaluation", lambda: self._swapped(engine))

    def on_fit_start(self, event: FitStart) -> None:
        """Make the average, a copy of the model where it is by now; a resumed run loads it afterwards."""
        parts = event.engine.parts
        if "weight_average" not in parts:
            rule = get_ema_multi_avg_fn(self.decay) if self.kind == "ema" else get_swa_multi_avg_fn()
            average = AveragedModel(bare(parts["model"]), multi_avg_fn=rule, use_buffers=self.buffers)
            parts["weight_average"] = average.requires_grad_(False)

    def on_update_end(self, event: UpdateEnd) -> None:
        """Take in the weights of this update."""
        number = event.engine.num_updates
        if number > self.start and (number - self.start) % self.every == 0:
            event.engine.parts["weight_average"].update_parameters(bare(event.engine.parts["model"]))

    def on_fit_end(self, event: FitEnd) -> None:
        """Compute the batch-norm statistics and load the average, if asked to."""
        engine = event.engine
        average = engine.parts.get("weight_average")
        if average is None or not average.n_averaged:
            return
        if self.batch_norm_data is not None:
            inputs = (_inputs(engine, batch) for batch in one_pass(self.batch_norm_data))
            with own_rng():
                update_bn(inputs, average.module, device=engine.device)
        if self.load_at_end:
            bare(engine.parts["model"]).load_state_dict(average.module.state_dict())

    @contextmanager
    def _swapped(self, engine: Engine) -> Iterator[None]:
        average = engine.parts.get("weight_average")
        if average is None or not average.n_averaged:
            yield
            return
        model = bare(engine.parts["model"])
        _swap(model, average.module)
        try:
            yield
        finally:
            _swap(model, average.module)

    def __repr__(self) -> str:
        return f"WeightAverage({self.kind!r}, decay={self.decay}, every={self.every}, start={self.start})"


def _swap(model: nn.Module, average: nn.Module) -> None:
    """Exchange the storage of all weights and buffers: nothing is copied, nothing is rounded."""
    ours = [*model.parameters(), *model.buffers()]
    theirs = [*average.parameters(), *average.buffers()]
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            a.data, b.data = b.data, a.data


def _inputs(engine: Engine, batch: Any) -> Any:
    prepare = getattr(engine, "prepare_batch", None)  # a Trainer has one
    return batch if prepare is None else prepare(batch)[0]
