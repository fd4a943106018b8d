"""Averages of the weights along the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from camshaft.engine import (
    Callback,
    ConfigurationError,
    Data,
    Engine,
    FitEnd,
    FitStart,
    RunFailed,
    UpdateEnd,
    average_name,
    call_model,
    check_data,
    has_shards,
    is_number,
    is_sharded,
    local_part,
    move,
    one_pass,
    parameters_of,
    prepare_batch,
    preserve_rng,
    shell_of,
    tree_map,
    unwrap,
    whole_number,
)

Rule = Callable[[Sequence[Tensor], Sequence[Tensor], Any], None]


class WeightAverage(Callback):
    """Keeps an average of a model's weights, and evaluates with it, over ``torch.optim.swa_utils``.

    Validations, ``evaluate`` and ``predict`` use the average once it has been updated, and the raw weights before;
    training always continues with the raw ones. A `BestCheckpoint` therefore holds the weights that were measured. The
    average is the part ``weight_average`` of the run; that of another part is ``weight_average_<part>``.

    Args:
        kind: "ema" (exponential moving average) or "swa" (equal weights).
        decay: of the EMA, in (0, 1): each update keeps this share of the average.
        every: updates of the model between two contributions.
        start: the update of the model after which contributions begin.
        buffers: average buffers, too; batch-norm statistics then belong to the averaged weights roughly.
        batch_norm_data: batches with which batch-norm statistics are computed again for the average when the run
            ends: exact, where ``buffers`` is rough.
        load_at_end: put the average into the model when the run ends.
        part: the part whose weights are averaged, such as "generator".

    Raises:
        ConfigurationError: for settings that cannot work; at attachment for a part that is missing or has an average.
    """

    needs_update = True

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
        part: str = "model",
    ) -> None:
        if kind not in ("ema", "swa"):
            raise ConfigurationError(f'WeightAverage does not know {kind!r}. Write "ema" or "swa".')
        if not (is_number(decay) and 0 < decay < 1):
            raise ConfigurationError(
                f"WeightAverage has decay={decay!r}. Pass a number between 0 and 1, such as 0.999."
            )
        self.kind = kind
        self.decay = decay
        self.every = whole_number("WeightAverage's every", every, least=1)
        self.start = whole_number("WeightAverage's start", start, least=0)
        self.buffers = buffers
        if batch_norm_data is not None:
            check_data("WeightAverage's batch_norm_data", batch_norm_data)
        self.batch_norm_data = batch_norm_data
        self.load_at_end = load_at_end
        self.part = part
        self._name = average_name(part)
        self._num_updates = 0  # of the model: a run may update other modules, too
        self._failed = False
        self._of_model: set[torch.optim.Optimizer] = set()

    def attach(self, engine: Engine) -> None:
        """Use the average in every evaluation."""
        engine.parts.module(self.part, "WeightAverage")
        others = [one for one in engine.listeners.callbacks if isinstance(one, WeightAverage) and one is not self]
        if any(one.part == self.part for one in others):
            raise ConfigurationError(f"The part {self.part} has a WeightAverage already. Attach one for each part.")
        super().attach(engine)
        engine.listeners.around("evaluation", lambda: self._swapped(engine))

    def on_fit_start(self, event: FitStart) -> None:
        """Create the average as a copy of the model on its present device; a resumed run then loads its values."""
        self._failed = False
        parts = event.engine.parts
        own = {id(parameter) for parameter in parts[self.part].parameters()}
        optimizers = event.engine.parts.optimizers().values()
        self._of_model = {one for one in optimizers if any(id(parameter) in own for parameter in parameters_of(one))}
        if self._name not in parts:
            rule = get_ema_multi_avg_fn(self.decay) if self.kind == "ema" else get_swa_multi_avg_fn()
            model = unwrap(parts[self.part])
            if has_shards(model.parameters()):
                model, rule = shell_of(model), _on_parts(rule)
            average = AveragedModel(model, multi_avg_fn=_on_floats(rule), use_buffers=self.buffers)
            parts[self._name] = average.requires_grad_(False)

    def on_update_end(self, event: UpdateEnd) -> None:
        """Take in the weights, if this was an update of the model."""
        of_model = [one for one in event.together or (event.optimizer,) if one in self._of_model]
        if not of_model or event.optimizer is not of_model[-1]:  # several may have stepped in one update
            return
        self._num_updates += 1
        number = self._num_updates - self.start
        if number > 0 and number % self.every == 0:
            event.engine.parts[self._name].update_parameters(unwrap(event.engine.parts[self.part]))

    def on_run_failed(self, event: RunFailed) -> None:
        """Remember that the statistics of a failed run are of no use."""
        self._failed = True

    def on_fit_end(self, event: FitEnd) -> None:
        """Compute the batch-norm statistics and load the average, if asked to."""
        engine = event.engine
        average = engine.parts.get(self._name)
        if average is None or not average.n_averaged:
            return
        if self.batch_norm_data is not None and not self._failed and not engine.run.breaks_off:
            with preserve_rng(), torch.no_grad(), self._swapped(engine):
                _compute_statistics(engine, unwrap(engine.parts[self.part]), self.batch_norm_data)
            engine.ranks.copy_from_main(list(average.buffers()))  # ranks may read the data in orders of their own
        if self.load_at_end:
            unwrap(engine.parts[self.part]).load_state_dict(average.module.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the model's updates; the average is a part of the run."""
        return {"num_updates": self._num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._num_updates = state["num_updates"]

    @contextmanager
    def _swapped(self, engine: Engine) -> Iterator[None]:
        average = engine.parts.get(self._name)
        if average is None or not average.n_averaged:
            yield
            return
        model = unwrap(engine.parts[self.part])
        _swap(model, average.module)
        try:
            yield
        finally:
            _swap(model, average.module)

    def __repr__(self) -> str:
        of_part = "" if self.part == "model" else f", part={self.part!r}"
        return f"WeightAverage({self.kind!r}, decay={self.decay}, every={self.every}, start={self.start}{of_part})"


def _swap(model: nn.Module, average: nn.Module) -> None:
    """Exchange the storage of all weights and buffers: nothing is copied, nothing is rounded.

    Of a weight that ranks hold in parts, the part's content is exchanged, because other views of it are used.
    """
    ours = [*model.parameters(), *model.buffers()]
    theirs = [*average.parameters(), *average.buffers()]
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            if is_sharded(a):
                a, b = local_part(a), local_part(b)
                b.copy_(_replaced(a, b))
            else:
                a.data, b.data = b.data, a.data


def _replaced(tensor: Tensor, new: Tensor) -> Tensor:
    """Overwrite a tensor with a new content, and return the earlier one."""
    earlier = tensor.clone()
    tensor.copy_(new)
    return earlier


def _on_parts(rule: Rule) -> Rule:
    """Return a rule for this rank's parts: it goes element by element, and buffers beside them are whole."""

    def average(averaged: Sequence[Tensor], newest: Sequence[Tensor], num_averaged: Any) -> None:
        rule(list(map(local_part, averaged)), list(map(local_part, newest)), num_averaged)

    return average


def _on_floats(rule: Rule) -> Rule:
    """Return torch's rule for floating tensors; counters, such as a batch norm's, take the newest value."""

    def average(averaged: Sequence[Tensor], newest: Sequence[Tensor], num_averaged: Any) -> None:
        pairs = list(zip(averaged, newest, strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        if floats:
            rule([a for a, _ in floats], [b for _, b in floats], num_averaged)
        for counter, value in pairs:
            if not counter.is_floating_point():
                counter.copy_(value)

    return average


def _compute_statistics(engine: Engine, module: nn.Module, data: Data) -> None:
    """Compute batch-norm statistics again, as torch's update_bn does, for models of any number of inputs."""
    norms = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    training = module.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over all batches
    module.train()
    to_device = partial(move, device=engine.parts.device)
    try:
        for batch in one_pass(data) if norms else ():
            inputs = prepare_batch(batch)[0] if engine.stepper is None else engine.stepper.inputs(batch)
            call_model(module, tree_map(to_device, inputs, for_objects=to_device))
    finally:
        module.train(training)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
