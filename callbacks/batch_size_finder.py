"""Find the largest batch that fits into memory, before the run."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from camshaft.engine import (
    ConfigurationError,
    Data,
    DataError,
    Engine,
    can_take,
    generator_states,
    has_shards,
    num_samples,
    one_pass,
    preserve_rng,
    ran_out_of_memory,
    repeat,
    set_generator_states,
    tree_map,
    whole_number,
)

from .scout import handlers_of_scout, whole_step

logger = logging.getLogger("camshaft")


class BatchSizeFinder:
    """Trains a few steps with batches of 1, 2, 4 ... samples until memory does not suffice.

    The steps are made with the engine's own model and optimizer, so that all that takes memory is there: weights,
    gradients, the optimizer's states. Afterwards the parts and the random numbers are as they were; the engine's
    counters, history and handlers have seen nothing.

    On an accelerator, leave some memory for what comes later: longer samples, or an evaluation. On the CPU the system
    may end the process before torch is told that memory is short: pass ``max_batch_size``.

    Args:
        max_batch_size: the largest size to try.
        num_steps: how many steps to make with each size.
        halve: also try sizes between the largest power of two that fits and twice that, halving the interval until it
            is an eighth of that power.

    Attributes:
        tried: whether each size that was tried fits.
        suggestion: the largest that does.

    Raises:
        ConfigurationError: for numbers that are no counts.

    >>> model = nn.Linear(2, 1)
    >>> engine = Engine(lambda engine, batch: engine.update(model(batch).mean()), model=model,
    ...                 optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    >>> BatchSizeFinder(max_batch_size=16).run(engine, lambda size: [torch.ones(size, 2)])
    16
    """

    def __init__(self, max_batch_size: int = 2**16, *, num_steps: int = 3, halve: bool = False) -> None:
        self.max_batch_size = whole_number("BatchSizeFinder's max_batch_size", max_batch_size, least=1)
        self.num_steps = whole_number("BatchSizeFinder's num_steps", num_steps, least=1)
        self.halve = halve
        self.tried: dict[int, bool] = {}
        self.suggestion = 0

    def run(self, engine: Engine, data_of: Callable[[int], Data]) -> int:
        """Try sizes and return the largest that fits.

        Args:
            engine: what will train: a `Trainer`, or an engine with a step of its own.
            data_of: returns the data in batches of a size:
                ``lambda batch_size: DataLoader(dataset, batch_size, shuffle=True)``. A size for which the first batch
                is smaller than asked ends the search: there is no more data.

        Raises:
            ConfigurationError: if the engine has no step, trains on several ranks, or holds parts of its weights.
            DataError: if not a single sample fits.
        """
        _check(engine, data_of)
        self.tried, self.suggestion = {}, 0
        size = 1
        while size <= self.max_batch_size and self._fits(engine, data_of, size):
            size *= 2
        low, high = self.suggestion, min(size, self.max_batch_size + 1)
        while self.halve and high - low > max(1, self.suggestion // 8) and not self.tried.get(high, True):
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(engine, data_of, middle) else (low, middle)
        if not self.suggestion:
            raise DataError(
                "Not a single sample fits into memory, or there is none. "
                "Train a smaller model, or attach Recompute(...) or MixedPrecision(...)."
            )
        return self.suggestion

    def _fits(self, engine: Engine, data_of: Callable[[int], Data], size: int) -> bool:
        """Try a size; False also where there are not so many samples."""
        data = data_of(size)
        states = generator_states(data)
        kept = _kept(engine)
        try:
            with preserve_rng(), engine.parts.preserve_modes():
                first = next(one_pass(data), None)
                if first is None or num_samples(first) < size:
                    return False
                history = _scout(engine).fit(repeat(data), epochs=1, epoch_length=self.num_steps)
            if history.interrupted:
                raise KeyboardInterrupt
            fits = True
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            fits = False
        finally:
            for put_back in kept:
                put_back()
            set_generator_states(data, states)
        gc.collect()  # the scout and its handlers hold each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.tried[size] = fits
        self.suggestion = max(self.suggestion, size if fits else 0)
        logger.info("Batches of %d samples %s.", size, "fit" if fits else "do not fit")
        return fits


def _scout(engine: Engine) -> Engine:
    """Return an engine that makes the steps of another one, and none of its handlers hears."""
    num_samples = engine.stages["train"].num_samples
    return Engine(whole_step(engine), callbacks=handlers_of_scout(engine), num_samples=num_samples, **engine.parts)


def _kept(engine: Engine) -> list[Callable[[], object]]:
    """Copy the states of the parts to the host, and return what puts them back."""
    parts = engine.parts.stateful().values()
    return [_kept_tensors(part) if isinstance(part, nn.Module) else _kept_state(part) for part in parts]


def _kept_tensors(module: nn.Module) -> Callable[[], object]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    values = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = None

    @torch.no_grad()
    def put_back() -> None:
        for name, tensor in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
            tensor.copy_(values[name])
        for name, parameter in module.named_parameters():
            parameter.grad = gradients[name]

    return put_back


def _kept_state(part: Any) -> Callable[[], object]:
    state = copy.deepcopy(tree_map(lambda tensor: tensor.detach().to("cpu", copy=True), part.state_dict()))
    return lambda: part.load_state_dict(state)


def _check(engine: Engine, data_of: Callable[[int], Data]) -> None:
    if not isinstance(engine, Engine) or engine.stepper is None:
        raise ConfigurationError(
            f"BatchSizeFinder makes the steps of an engine, and got {engine!r:.80}, which has none. "
            "Pass what Trainer(...) or Engine(step, ...) returns."
        )
    if engine.ranks.several or has_shards(parameter for _, parameter in engine.parts.named_parameters()):
        raise ConfigurationError(
            "BatchSizeFinder looks at the memory of one process, and this engine trains on several ranks. "
            "Use it in one process, and pass its suggestion times the number of ranks as batch_size."
        )
    if not callable(data_of) or not can_take(data_of, 1):
        raise ConfigurationError(
            f"The data are {data_of!r:.80}, which is not a function of a batch size. "
            "Write lambda batch_size: DataLoader(dataset, batch_size, shuffle=True)."
        )
