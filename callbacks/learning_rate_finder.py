"""Find a learning rate before the run."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import TYPE_CHECKING

from camshaft.engine import (
    ConfigurationError,
    Data,
    DataError,
    Engine,
    StepEnd,
    SupervisedStep,
    Trainer,
    generator_states,
    has_shards,
    is_number,
    preserve_rng,
    repeat,
    set_generator_states,
    whole_number,
)

from .distributed import Distributed
from .scout import handlers_of_scout, whole_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LearningRateFinder:
    """Trains a copy of the model with a learning rate that rises from step to step, and looks at the loss.

    The trainer's model, optimizer, counters and random numbers are left as they are.

    Args:
        min_lr, max_lr: the range; each step multiplies the rate by the same factor.
        num_steps: how many steps to take at most; the walk ends when the loss is four times its best.
        smoothing: share of the running mean in the smoothed loss, in [0, 1).

    Attributes:
        learning_rates, losses: one value per step taken; the losses are smoothed.
        suggestion: the learning rate at which the loss fell fastest, per factor.

    Raises:
        ConfigurationError: for a range that cannot be walked.

    Source: Smith, Cyclical Learning Rates for Training Neural Networks, 2015, section 3.3.
    """

    def __init__(
        self, min_lr: float = 1e-6, max_lr: float = 10.0, *, num_steps: int = 100, smoothing: float = 0.8
    ) -> None:
        if not (is_number(min_lr) and is_number(max_lr) and 0 < min_lr < max_lr):
            raise ConfigurationError(f"The range is {min_lr!r} to {max_lr!r}. Pass 0 < min_lr < max_lr.")
        if not (is_number(smoothing) and 0 <= smoothing < 1):
            raise ConfigurationError(f"smoothing is {smoothing!r}. Pass a number from 0 to below 1.")
        self.min_lr = min_lr
        self.max_lr = max_lr
        self.num_steps = whole_number("num_steps", num_steps, least=10)
        self.smoothing = smoothing
        self.learning_rates: list[float] = []
        self.losses: list[float] = []
        self.suggestion = math.nan

    def run(self, trainer: Engine, train: Data) -> float:
        """Try the range on ``train`` and return the suggestion.

        Raises:
            DataError: if the loss never fell.
        """
        step = whole_step(trainer) if isinstance(trainer, Engine) else None
        if not isinstance(step, SupervisedStep):
            raise ConfigurationError(
                f"LearningRateFinder needs what Trainer(...) returns, and got {_kind(trainer)}. Pass a trainer."
            )
        if has_shards(trainer.parts["model"].parameters()):
            raise ConfigurationError(
                "LearningRateFinder copies the model, which is sharded. Use it in one process, on a smaller model."
            )
        model, optimizer, loss_fn = copy.deepcopy(
            (trainer.parts["model"], trainer.parts["optimizer"], trainer.parts["loss_fn"])
        )  # copied together, so that the optimizer holds the copy's parameters
        callbacks = [
            *(
                _another(c)
                for c in trainer.listeners.callbacks
                if isinstance(c, Distributed) and trainer.ranks.several
            ),
            *handlers_of_scout(trainer),
        ]
        scout = Trainer(model, optimizer, loss_fn, callbacks=callbacks, prepare_batch=step.prepare_batch,
                        seed=trainer.seed if trainer.ranks.several else None)  # fmt: skip
        self.learning_rates, self.losses = [], []
        scout.subscribe(StepEnd, self._look)
        states = generator_states(train)
        try:
            with preserve_rng():
                self._set_rate(scout, 0)
                scout.fit(repeat(train), epochs=1, epoch_length=self.num_steps)
        finally:
            set_generator_states(train, states)
        self.suggestion = self._steepest()
        return self.suggestion

    def plot(self) -> Figure:
        """Draw the loss over the learning rate, with the suggestion marked."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        if not self.losses:
            raise ConfigurationError("There is nothing to draw yet. Call run(trainer, train) first.")
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.plot(self.learning_rates, self.losses)
        axes.axvline(self.suggestion, color="tab:orange", linestyle="--", label=f"suggestion {self.suggestion:.2g}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="smoothed loss", title="learning rate finder")
        axes.grid(alpha=0.3)
        axes.legend()
        return figure

    def _look(self, event: StepEnd) -> None:
        scout = event.engine
        loss = float(scout.stages["train"].meters["loss"].val)
        if scout.current.share is not None:
            loss = scout.ranks.total(loss * scout.current.share.weight)
        if self.losses:
            loss = self.smoothing * self.losses[-1] + (1 - self.smoothing) * loss
        self.learning_rates.append(self._rate(scout.step - 1))
        self.losses.append(loss)
        best = min(self.losses)
        if not loss <= best + 3 * abs(best):  # four times a positive best; also when it is NaN
            scout.stop("the loss diverged")
        self._set_rate(scout, scout.step)

    def _rate(self, step: int) -> float:
        return self.min_lr * math.pow(self.max_lr / self.min_lr, step / (self.num_steps - 1))

    def _set_rate(self, scout: Engine, step: int) -> None:
        for group in scout.parts["optimizer"].param_groups:
            group["lr"] = self._rate(step)

    def _steepest(self) -> float:
        falls = [before - after for before, after in pairwise(self.losses) if math.isfinite(after)]
        if not falls or max(falls) <= 0:
            raise DataError(
                f"The loss never fell between learning rates {self.min_lr:g} and {self.learning_rates[-1]:g}. "
                "Pass another range, or look at the model and the data."
            )
        return self.learning_rates[falls.index(max(falls))]


def _another(own: Distributed) -> Distributed:
    """Return one with the same settings, for an engine that is not sharded."""
    return Distributed(
        data=own.data,
        batch_norm=own.batch_norm,
        find_unused_parameters=own.find_unused_parameters,
        timeout=own.timeout,
    )


def _kind(trainer: object) -> str:
    if isinstance(trainer, Engine):
        return "an engine with a step of its own"
    return f"an object of type {type(trainer).__name__}"
