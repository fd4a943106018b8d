"""Losses that are NaN or infinite."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
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
    every,
    whole_number,
)


class StopOnNonFinite(Callback):
    """Notices a loss that is NaN or infinite.

    Each loss is checked on the device, into a flag there. "raise" and "stop" read the flag every ``every_steps``
    and at the end of the epoch, so that no step waits for the device. "skip" has to know before each update, and
    reads it there: one wait per update; the update, with `Accumulate` that of the whole window, is left out. The
    averages of the epoch keep the loss that was seen.

    Args:
        policy: "raise" ends the run with an error, "stop" ends it with a reason, "skip" leaves updates out.
        every_steps: how often the flag is read.

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
        self._flags: dict[Optimizer, Tensor] = {}
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
        self._flags = {}

    def on_loss_ready(self, event: LossReady) -> None:
        """Raise the flag on the device if the loss is not finite."""
        seen = ~torch.isfinite(event.loss.detach())
        flag = self._flags.get(event.optimizer)
        self._flags[event.optimizer] = seen if flag is None else flag | seen

    def _read(self, event: StepEnd | EpochEnd) -> None:
        since, self._read_at = self._read_at + 1, event.engine.step
        flags, self._flags = self._flags, {}
        seen = any(bool(flag.any()) for flag in flags.values())
        if not event.engine.ranks.total(float(seen)):  # on several ranks, all see it at the same step
            return
        place = f"between steps {since} and {event.engine.step}"
        if self.policy == "stop":
            event.engine.stop(f"StopOnNonFinite: the loss was NaN or infinite {place}")
            return
        raise DataError(
            f"The loss was NaN or infinite {place}. Lower the learning rate, clip the gradients, or look at the data; "
            'StopOnNonFinite("skip") leaves such updates out.'
        )

    def _skip(self, event: GradientsReady) -> None:
        flag = self._flags.pop(event.optimizer, None)
        seen = float(flag is not None and bool(flag.any()))
        if event.engine.ranks.total(seen):  # on several ranks, all leave it out
            event.engine.run.skip_update()

    def state_dict(self) -> dict[str, Any]:
        """Return the flags that are still to be read, by optimizer, and the step at which they were read last."""
        flags = {
            name: self._flags[part] for name, part in self._engine.parts.optimizers().items() if part in self._flags
        }
        return {"read_at": self._read_at, "flags": flags}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._read_at = state["read_at"]
        optimizers, device = self._engine.parts.optimizers(), self._engine.parts.device
        self._flags = {optimizers[name]: flag.to(device) for name, flag in state["flags"].items()}

    def __repr__(self) -> str:
        return f"StopOnNonFinite({self.policy!r}, every_steps={self.every_steps})"
