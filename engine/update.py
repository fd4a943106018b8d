"""One optimizer update, in the only right order.

LossReady
backward (of the loss, scaled for mixed precision and for its share of the window)
-- when the window is full, or the epoch is over --
unscale, once
GradientsReady        the true gradients: look at them, clip them
optimizer.step
UpdateEnd             only if the step was taken: schedules and weight averages go here
zero_grad(set_to_none=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from .errors import DataError, EngineStateError
from .events import GradientsReady, LossReady, UpdateEnd

if TYPE_CHECKING:
    from .engine import Engine


class Update:
    """``engine.update(loss)``: what a step does with its loss.

    Without accumulation this is ``loss.backward(); optimizer.step(); optimizer.zero_grad()`` to the bit.

    With a window, the gradients of K micro-batches are those of one batch that holds all their samples: each
    loss (a mean over its samples) counts by its number of samples, also in a window that the end of an epoch
    cuts short. Windows never reach over an epoch's end.

    Attributes:
        window_batches: micro-batches per update.
        window_samples: samples per update instead, or None.
        scaler: a ``torch.amp.GradScaler`` for float16, or None.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loss_ready = engine.dispatch.channel(LossReady)
        self._gradients_ready = engine.dispatch.channel(GradientsReady)
        self._update_end = engine.dispatch.channel(UpdateEnd)
        self.window_batches = 1
        self.window_samples: int | None = None
        self.scaler: torch.amp.GradScaler | None = None
        self._skips = False
        self._batches = 0  # in the open window
        self._part = 0.0  # samples of a batch that comes in parts
        self._samples = 0.0
        self._nominal = 0.0  # samples a full window would have, judged by its first batch

    def __call__(self, loss: Tensor, num_samples: float | None = None, *, whole: float | None = None) -> None:
        """Differentiate ``loss`` and, when the window is full, update the weights.

        Args:
            loss: one element, the mean over the batch.
            num_samples: how many samples it is the mean of; taken from the batch by default.
            whole: for a part of a batch, how many samples the batch has; the last part completes it.

        Raises:
            DataError: if the loss is not one number, or nothing in it can be trained.
        """
        engine = self._engine
        if engine.stage not in ("train", ""):
            raise EngineStateError(
                f'engine.update was called in the stage "{engine.stage}", where nothing is trained. '
                "Write: if engine.training: engine.update(loss)."
            )
        check_loss(loss, engine)
        if engine.step >= self._loss_ready.due:
            loss = self._loss_ready.transform(lambda value: LossReady(engine, value), loss, engine.step)
            check_loss(loss, engine)
        complete = True
        if self.window_batches > 1 or self.window_samples is not None or whole is not None:
            num_samples = engine.num_samples() if num_samples is None else num_samples
            loss = loss * self._share(num_samples, whole or num_samples)
            self._part += num_samples
            complete = whole is None or self._part >= whole
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if complete:
            self._part = 0.0
            self._batches += 1
            if self._window_is_full():
                self._apply()

    def reset(self) -> None:
        """Forget a window that an earlier run left open, with its gradients."""
        if self._batches or self._part:
            self._optimizer().zero_grad()
        self._batches, self._part, self._samples, self._nominal = 0, 0.0, 0.0, 0.0

    def flush(self) -> None:
        """Make the update of a window that the end of the epoch cut short, if one is open."""
        if self._batches:
            self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Return the open window with its gradients, and the scaler's state."""
        grads = [p.grad for p in self._parameters()] if self._batches else None
        return {
            "window": [self._batches, self._samples, self._nominal],
            "grads": grads,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._batches, self._samples, self._nominal = state["window"]
        if state["grads"] is not None:  # a step that updates by itself has no window, and perhaps no such part
            for parameter, grad in zip(self._parameters(), state["grads"], strict=True):
                parameter.grad = None if grad is None else grad.to(parameter.device)
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self._optimizer().param_groups for parameter in group["params"]]

    def skip(self) -> None:
        """Leave out the update that is about to be made; for handlers of GradientsReady."""
        self._skips = True

    def _share(self, num_samples: float, whole: float) -> float:
        if not self._samples:
            self._nominal = self.window_samples or whole * self.window_batches
        self._samples += num_samples
        return num_samples / self._nominal

    def _window_is_full(self) -> bool:
        if self.window_samples is not None:
            return self._samples >= self.window_samples
        return self._batches >= self.window_batches

    def _apply(self) -> None:
        engine, scaler = self._engine, self.scaler
        optimizer = self._optimizer()
        if scaler is not None:
            scaler.unscale_(optimizer)
        if self._samples != self._nominal:
            grads = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
            torch._foreach_mul_(grads, self._nominal / self._samples)
        self._batches, self._samples, self._nominal = 0, 0.0, 0.0
        engine.num_updates += 1
        if engine.num_updates >= self._gradients_ready.due:
            self._gradients_ready.emit(GradientsReady(engine), engine.num_updates)
        if not self._step(optimizer):
            engine.num_updates -= 1
            engine.num_skipped_updates += 1
        elif engine.num_updates >= self._update_end.due:
            self._update_end.emit(UpdateEnd(engine), engine.num_updates)
        _clear_gradients(optimizer)

    def _step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Step, and return whether that was done."""
        skips, self._skips = self._skips, False
        if self.scaler is None:
            if not skips:
                optimizer.step()
            return not skips
        stepped: list[bool] = []
        hook = optimizer.register_step_post_hook(lambda *_: stepped.append(True))
        scale = self.scaler.get_scale() if _decides_on_device(optimizer) else None
        if not skips:
            self.scaler.step(optimizer)
        self.scaler.update()
        hook.remove()
        return bool(stepped) and (scale is None or self.scaler.get_scale() >= scale)

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._engine.parts.get("optimizer")
        if isinstance(optimizer, torch.optim.Optimizer):
            return optimizer
        raise EngineStateError(
            f"engine.update needs a part named optimizer, but the parts are: {', '.join(self._engine.parts)}. "
            "Write Engine(step, model=model, optimizer=optimizer)."
        )


def _clear_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Do what ``zero_grad`` does; torch's own spends more on its profiler's record than on the gradients."""
    if getattr(optimizer.zero_grad, "__func__", None) is not torch.optim.Optimizer.zero_grad:
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _decides_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a fused optimizer skips by itself, so that only the scale, which then shrinks, can tell."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def check_loss(loss: object, engine: Engine) -> None:
    """Refuse a loss that is not one number, or cannot be differentiated, with the reason."""
    if not isinstance(loss, Tensor):
        raise DataError(
            f"The loss is {loss!r}, of type {type(loss).__name__}, which has no gradient. "
            "Return the tensor itself, without .item() or float()."
        )
    if loss.numel() != 1:
        raise DataError(f"The loss has shape {list(loss.shape)}, but it must be one number. Reduce it: loss.mean().")
    if not loss.requires_grad and torch.is_grad_enabled():
        _refuse_without_grad(engine)


def _refuse_without_grad(engine: Engine) -> NoReturn:
    trainable = [name for name, p in engine.named_parameters() if p.requires_grad]
    if not trainable:
        frozen = ", ".join(name for name, _ in list(engine.named_parameters())[:5])
        raise DataError(
            f"No parameter of the model is trainable (frozen: {frozen} ...). "
            "Set requires_grad = True on those that should learn."
        )
    raise DataError(
        f"The loss does not depend on any trainable parameter ({', '.join(trainable[:5])} ...). "
        "Look for .detach(), .item(), argmax or torch.no_grad() between the model and the loss."
    )
