"""Mixed precision."""

from __future__ import annotations

from typing import Literal

import torch

from camshaft.engine import Callback, ConfigurationError, Engine, FitEnd, FitStart, StepEnd, has_shards

Precision = Literal["fp16", "bf16"]


class MixedPrecision(Callback):
    """Runs model and loss under autocast; fp16 with a gradient scaler.

    In a step of your own, put model and loss under ``with engine.scope("forward"):``. Weights and optimizer stay in
    float32. bf16 needs no scaler and works on the CPU, too. With fp16, each update waits for the device, because
    torch's scaler has to know whether there was an overflow.

    Args:
        precision: "fp16" (CUDA only) or "bf16".

    Raises:
        ConfigurationError: before the first step, where the model's device cannot do it; numerics are never
            changed silently.
    """

    def __init__(self, precision: Precision) -> None:
        if precision not in ("fp16", "bf16"):
            raise ConfigurationError(f'MixedPrecision does not know {precision!r}. Write "fp16" or "bf16".')
        self.precision = precision
        self._entered = False
        self._device_type: str | None = None  # known within a fit; looked up at each forward otherwise

    def attach(self, engine: Engine) -> None:
        """Put autocast around every forward pass, in training and evaluation."""
        super().attach(engine)
        self.engine = engine
        engine.listeners.around("forward", self._autocast)
        self._first_step = engine.subscribe(StepEnd, self._check_first_step)

    def on_fit_start(self, event: FitStart) -> None:
        """Refuse what the device cannot do; give fp16 its scaler."""
        device = event.engine.parts.device
        self._device_type = device.type
        if self.precision == "fp16":
            if device.type == "cpu":
                raise ConfigurationError(
                    "The model is on the CPU, which has no fp16 training. "
                    'Write MixedPrecision("bf16"), or leave it out.'
                )
            if has_shards(parameter for _, parameter in event.engine.parts.named_parameters()):
                raise ConfigurationError(
                    'MixedPrecision("fp16") scales losses, and each rank would skip other updates of sharded weights. '
                    'Write MixedPrecision("bf16"), or Distributed("fsdp", policy=...).'
                )
            if event.engine.update.scaler is None:
                event.engine.update.use_scaler(torch.amp.GradScaler(device.type))
        elif device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ConfigurationError(
                f'{torch.cuda.get_device_name(device)} has no bf16. Write MixedPrecision("fp16"), or leave it out.'
            )

    def on_fit_end(self, event: FitEnd) -> None:
        """Look the device up again: the model may be moved between two fits."""
        self._device_type = None

    def _check_first_step(self, event: StepEnd) -> None:
        """Refuse a step that does not enter the scope; checked once."""
        self._first_step.cancel()
        if not self._entered:
            raise ConfigurationError(
                "MixedPrecision had no effect in the first step, which did not enter its scope. "
                'Write: with engine.scope("forward"): around model and loss.'
            )

    def _autocast(self) -> torch.autocast:
        self._entered = True
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self._device_type or self.engine.parts.device.type, dtype=dtype)

    def __repr__(self) -> str:
        return f"MixedPrecision({self.precision!r})"
