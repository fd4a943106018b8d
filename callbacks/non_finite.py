"""Losses that are NaN or infinite."""

from __future__ import annotations

import contextlib
import logging
import math
import shlex
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from camshaft.engine import (
    Callback,
    ConfigurationError,
    DataError,
    Engine,
    EpochEnd,
    FitStart,
    GradientsReady,
    LossReady,
    StepEnd,
    asked_trial,
    call_model,
    checkpoint_files,
    checkpoints_of,
    every,
    is_finite,
    keep_checkpoint,
    non_finite_outputs,
    prepare_batch,
    unwrap,
    whole_number,
)

logger = logging.getLogger("camshaft")

_MOST_KEPT = 1000  # losses
_KEPT = "replay"  # where a checkpoint is kept, within the run directory; `camshaft replay` looks there, too


class StopOnNonFinite(Callback):
    """Notices a loss that is NaN or infinite.

    The losses are kept on the device. "raise" and "stop" look at all of them together, every ``every_steps`` and at
    the end of the epoch, so that no step waits for the device. They then say the first step at which it was so, which
    parameters and inputs are not finite, and which module is the first to return such values, by a forward pass of the
    present batch in eval mode, if there is a part ``model``. With a run directory, the command that makes that step
    again is logged, and the last checkpoint before it is kept there, in ``replay``. "skip" has to know before each
    update, and looks there: one wait per update; the update, with `Accumulate` that of the whole window, is left out.
    The averages of the epoch keep the loss that was seen.

    Args:
        policy: "raise" ends the run with an error, "stop" ends it with a reason, "skip" leaves updates out.
        every_steps: how often they are looked at.

    Raises:
        DataError: in a run, under "raise", naming the steps between which it happened.
        ConfigurationError: for settings that cannot work.
    """

    needs_update = True

    def __init__(self, policy: Literal["raise", "stop", "skip"] = "raise", *, every_steps: int = 50) -> None:
        if policy not in ("raise", "stop", "skip"):
            raise ConfigurationError(f'StopOnNonFinite does not know {policy!r}. Write "raise", "stop" or "skip".')
        self.policy = policy
        self.every_steps = whole_number("StopOnNonFinite's every_steps", every_steps, least=1)
        self._first: dict[Optimizer, Tensor] = {}  # the first step with such a loss; infinite if there is none
        self._losses: dict[Optimizer, list[tuple[int, Tensor]]] = {}  # with their steps: those not yet looked at
        self._read_at = 0

    def attach(self, engine: Engine) -> None:
        """Look at each loss; read what was seen at its time."""
        super().attach(engine)
        self._engine = engine
        if self.policy == "skip":
            engine.subscribe(GradientsReady, self._skip)
        else:
            engine.subscribe(StepEnd, self._read, when=every(self.every_steps))
            engine.subscribe(EpochEnd, self._read)

    def on_fit_start(self, event: FitStart) -> None:
        """Forget what an earlier run left unread."""
        self._first, self._losses = {}, {}

    def on_loss_ready(self, event: LossReady) -> None:
        """Keep the loss."""
        losses = self._losses.setdefault(event.optimizer, [])
        losses.append((event.engine.step, event.loss.detach()))
        if len(losses) >= _MOST_KEPT:
            self._look()

    def _look(self) -> dict[Optimizer, Tensor]:
        """Return, by optimizer, the first step with such a loss, on the device; nothing waits for it."""
        for optimizer, losses in self._losses.items():
            values = torch.stack([loss.reshape(()) for _, loss in losses])
            numbers = torch.tensor([float(step) for step, _ in losses], pin_memory=values.is_cuda)
            steps = numbers.to(values.device, non_blocking=True)
            seen = torch.where(torch.isfinite(values), math.inf, steps).min()
            before = self._first.get(optimizer)
            self._first[optimizer] = seen if before is None else torch.minimum(before, seen)
        self._losses = {}
        return self._first

    def _read(self, event: StepEnd | EpochEnd) -> None:
        engine = event.engine
        since, self._read_at = self._read_at + 1, engine.step
        numbers, self._first = self._look(), {}
        first = min((float(number.min()) for number in numbers.values()), default=math.inf)
        if not engine.ranks.total(float(first < math.inf)):  # on several ranks, all see it at the same step
            return
        first = min(engine.ranks.gather(first))
        place = f"between steps {since} and {engine.step}, first at step {first:.0f}"
        findings = find_non_finite(engine)
        engine.ranks.on_main(lambda: self._prepare_replay(int(first)))
        if self.policy == "stop":
            engine.stop(f"StopOnNonFinite: the loss was NaN or infinite {place}; {findings}")
            return
        raise DataError(
            f"The loss was NaN or infinite {place}; {findings}. "
            "Lower the learning rate, clip the gradients, or look at the data; "
            'StopOnNonFinite("skip") leaves such updates out.'
        )

    def _keep_checkpoint(self, first: float) -> int | None:
        """Keep the newest checkpoint before a step, which may be removed soon, and return its own step."""
        directory, checkpoints = self._engine.directory, checkpoints_of(self._engine.listeners.callbacks)
        if directory is None or checkpoints is None or asked_trial() is not None:
            return None
        kept = directory / _KEPT
        for _ in range(5):
            files = checkpoint_files([*checkpoints.path.glob("run-*.pt"), *kept.glob("run-*.pt")])
            newest = next((file for file in files if file.step < first), None)
            if newest is None:
                break
            with contextlib.suppress(FileNotFoundError):  # a thread that has written a newer one has removed it
                keep_checkpoint(newest, kept)
                return newest.step
        return None

    def _prepare_replay(self, first: int) -> None:
        """Say how to make the first step with such a loss again, and keep what that needs."""
        directory = self._engine.directory
        if directory is None or asked_trial() is not None:  # of a run that is tried, nothing is left
            return
        try:
            step = self._keep_checkpoint(first)
        except OSError as error:
            logger.warning("No checkpoint could be kept in %s: %s.", directory / _KEPT, error.strerror or error)
            step = None
        command = f"camshaft replay {shlex.quote(str(directory))} --step {first}"
        if self._engine.ranks.several:
            command += " -- torchrun ..."
        begin = "the beginning: no checkpoint is earlier" if step is None else f"the checkpoint at step {step}"
        logger.warning("To make step %d again, from %s, and see where it begins: %s", first, begin, command)

    def _skip(self, event: GradientsReady) -> None:
        number = self._look().pop(event.optimizer, None)
        seen = float(number is not None and float(number.min()) < math.inf)
        if event.engine.ranks.total(seen):  # on several ranks, all leave it out
            event.engine.run.skip_update()

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers that are still to be read, by optimizer, and the step at which they were read last.

        This is called before a checkpoint is saved, and older ones are removed: the last one before such a loss is
        kept.
        """
        optimizers, seen = self._engine.parts.optimizers(), self._look()
        first = {name: seen[part] for name, part in optimizers.items() if part in seen}
        if (ranks := self._engine.ranks).several:  # a checkpoint holds what rank 0 returns
            first = _least(ranks.gather(first))
        if self.policy != "skip" and ranks.is_main:
            bad = min((float(number.min()) for number in first.values()), default=math.inf)
            if bad < math.inf:
                with contextlib.suppress(OSError):  # said when the run ends
                    self._keep_checkpoint(bad)
        return {"read_at": self._read_at, "first": first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._read_at = state["read_at"]
        optimizers, device = self._engine.parts.optimizers(), self._engine.parts.device
        self._first = {optimizers[name]: number.to(device) for name, number in state["first"].items()}
        self._losses = {}

    def __repr__(self) -> str:
        return f"StopOnNonFinite({self.policy!r}, every_steps={self.every_steps})"


def _least(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the first step of all ranks, by optimizer."""
    names = dict.fromkeys(name for one in found for name in one)
    return {name: torch.stack([one[name] for one in found if name in one]).min() for name in names}


def find_non_finite(engine: Engine) -> str:
    """Return, in words, what of the model and of the present batch is NaN or infinite; nothing is changed."""
    names = [name for name, parameter in engine.parts.named_parameters() if not is_finite(parameter)]
    found = [f"not finite are the parameters {_first_of(names)}"] if names else []
    model, batch = engine.parts.modules().get("model"), engine.batch
    if model is not None and batch is not None:
        try:
            inputs = prepare_batch(batch)[0] if engine.stepper is None else engine.stepper.inputs(batch)
            if not is_finite(inputs):
                found.append("the inputs of the present batch are not finite")
            if module := _first_module(engine, model, inputs):
                found.append(f"on the present batch, the first module to return such values is {module}")
        except Exception as error:  # a model that cannot be called like that must not hide the loss
            found.append(f"the model could not be looked at ({type(error).__name__})")
    return ", and ".join(found) or "the parameters, and the outputs for the present batch, are finite"


def _first_module(engine: Engine, model: nn.Module, inputs: Any) -> str:
    """Return the first module whose output is not finite, in the order in which they return; "" for none."""
    bare = unwrap(model)
    with non_finite_outputs({"": bare}) as found, engine.evaluating():
        call_model(bare, inputs)
    return found[0] if found else ""


def _first_of(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
