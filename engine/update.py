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

import copy
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from .errors import DataError, EngineStateError, did_you_mean
from .events import GradientsReady, LossReady, UpdateEnd
from .parameters import held_by

if TYPE_CHECKING:
    from .engine import Engine

MAIN = "optimizer"  # the part that is meant where no optimizer is named


class Update:
    """``engine.update(loss)``: what a step does with its loss.

    Without accumulation this is ``loss.backward(); optimizer.step(); optimizer.zero_grad()`` to the bit.

    With a window, the gradients of K micro-batches are those of one batch that holds all their samples: each
    loss (a mean over its samples) counts by its number of samples, also in a window that the end of an epoch
    cuts short. Windows never reach over an epoch's end.

    A step with several optimizers names the one that a loss is for. Each has a window and a loss scaler of its own,
    and a loss leaves gradients in nothing but what its optimizer holds. An update of nothing that learns is left out.

    Attributes:
        window_batches: micro-batches per update.
        window_samples: samples per update instead, or None.
        scaler: a ``torch.amp.GradScaler`` for float16, or None; optimizers that are named have copies of it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loss_ready = engine.dispatch.channel(LossReady)
        self._gradients_ready = engine.dispatch.channel(GradientsReady)
        self._update_end = engine.dispatch.channel(UpdateEnd)
        self.window_batches = 1
        self.window_samples: int | None = None
        self._skips = False
        self._several = False  # whether one was named
        self._windows = {MAIN: _Window(MAIN)}

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler."""
        return self._windows[MAIN].scaler

    @scaler.setter
    def scaler(self, scaler: torch.amp.GradScaler | None) -> None:
        for window in self._windows.values():
            window.scaler = scaler if window.name == MAIN else copy.deepcopy(scaler)

    def __call__(
        self,
        loss: Tensor,
        num_samples: float | None = None,
        *,
        optimizer: str | None = None,
        whole: float | None = None,
    ) -> None:
        """Differentiate ``loss`` and, when the window is full, update the weights.

        Args:
            loss: one element, the mean over the batch.
            num_samples: how many samples it is the mean of; taken from the batch by default.
            optimizer: the name of the part that steps; by default the part ``optimizer``.
            whole: for a part of a batch, how many samples the batch has; the last part completes it.

        Raises:
            DataError: if the loss is not one number, or nothing in it can be trained.
            EngineStateError: if there is no such optimizer, or this is no training.
        """
        engine = self._engine
        if engine.stage not in ("train", ""):
            raise EngineStateError(
                f'engine.update was called in the stage "{engine.stage}", where nothing is trained. '
                "Write: if engine.training: engine.update(loss)."
            )
        check_loss(loss, engine)
        window = self._windows.get(optimizer or MAIN) or self._open(optimizer or MAIN)
        if engine.step >= self._loss_ready.due:
            stepping = self._optimizer(window)
            loss = self._loss_ready.transform(lambda value: LossReady(engine, value, stepping), loss, engine.step)
            check_loss(loss, engine)
        complete = True
        if self.window_batches > 1 or self.window_samples is not None or whole is not None:
            num_samples = engine.num_samples() if num_samples is None else num_samples
            loss = loss * self._share(window, num_samples, whole or num_samples)
            window.part += num_samples
            complete = whole is None or window.part >= whole
        if num_samples != 0:  # else it is the mean of nothing, which is NaN, and so would its gradients be
            scaled = loss if window.scaler is None else window.scaler.scale(loss)
            if self._several:
                self._differentiate(window, scaled)
            else:
                window.has_gradients = True
                scaled.backward()
        if complete:
            window.part = 0.0
            window.batches += 1
            if self._is_full(window):
                self._apply(window)

    def reset(self) -> None:
        """Forget what an earlier run, or try, has left in the windows, with its gradients."""
        for window in self._windows.values():
            if window.has_gradients:
                self._optimizer(window).zero_grad()
                window.has_gradients = False
            window.clear()

    def flush(self) -> None:
        """Make the update of each window that the end of the epoch cut short."""
        for window in self._windows.values():
            if window.batches:
                self._apply(window)

    def num_made(self, optimizer: str) -> int:
        """Return how often an optimizer was due to step, since it was first named."""
        return self._windows[optimizer].num_made if optimizer in self._windows else 0

    def skip(self) -> None:
        """Leave out the update that is about to be made; for handlers of GradientsReady."""
        self._skips = True

    def state_dict(self) -> dict[str, Any]:
        """Return the open windows with their gradients, and the scalers' states, by optimizer."""
        state: dict[str, Any] = {}
        for name, window in self._windows.items():
            state[name] = {
                "window": [window.batches, window.samples, window.nominal],
                "grads": [p.grad for p in held_by(self._optimizer(window))] if window.batches else None,
                "scaler": None if window.scaler is None else window.scaler.state_dict(),
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        for name, saved in state.items():
            window = self._windows.get(name) or self._open(name)
            window.batches, window.samples, window.nominal = saved["window"]
            window.has_gradients = any(grad is not None for grad in saved["grads"] or ())
            if saved["grads"] is not None:  # a step that updates by itself has no window, and perhaps no such part
                for parameter, grad in zip(held_by(self._optimizer(window)), saved["grads"], strict=True):
                    parameter.grad = None if grad is None else grad.to(parameter.device, copy=True)
            if window.scaler is not None and saved["scaler"] is not None:
                window.scaler.load_state_dict(saved["scaler"])
                if window.batches:  # torch makes the scale at the first loss, and the epoch's end may come before
                    window.scaler.scale(torch.zeros((), device=held_by(self._optimizer(window))[0].device))

    def _differentiate(self, window: _Window, loss: Tensor) -> None:
        """Leave gradients in what this optimizer holds, and learns, alone."""
        inputs = [parameter for parameter in held_by(self._optimizer(window)) if parameter.requires_grad]
        if not inputs:
            return
        window.has_gradients = True
        try:
            loss.backward(inputs=inputs)
        except RuntimeError as error:
            if "graph a second time" not in str(error):
                raise
            raise DataError(
                f'The loss of step {self._engine.step}, for "{window.name}", was differentiated before. '
                "Compute it anew for each optimizer, or step all of them in your own step, without engine.update."
            ) from error

    def _share(self, window: _Window, num_samples: float, whole: float) -> float:
        if not num_samples:
            return 0.0
        if not window.samples:
            window.nominal = self.window_samples or whole * self.window_batches
        window.samples += num_samples
        return num_samples / window.nominal

    def _is_full(self, window: _Window) -> bool:
        if self.window_samples is not None:
            return window.samples >= self.window_samples
        return window.batches >= self.window_batches

    def _apply(self, window: _Window) -> None:
        engine, scaler, optimizer = self._engine, window.scaler, self._optimizer(window)
        if not window.has_gradients:
            self._leave_out(window)
            return
        if self._several and all(parameter.grad is None for parameter in held_by(optimizer)):
            raise DataError(
                f'The loss of step {engine.step} gave no gradient to anything that "{window.name}" holds. '
                "Name the optimizer that the loss is for: engine.update(loss, optimizer=...)."
            )
        if scaler is not None:
            scaler.unscale_(optimizer)
        if window.samples != window.nominal:
            grads = [parameter.grad for parameter in held_by(optimizer) if parameter.grad is not None]
            torch._foreach_mul_(grads, window.nominal / window.samples)
        window.clear()
        window.num_made += 1
        engine.num_updates += 1
        if engine.num_updates >= self._gradients_ready.due:
            self._gradients_ready.emit(GradientsReady(engine, optimizer), engine.num_updates)
        if not self._step(optimizer, scaler):
            engine.num_updates -= 1
            engine.num_skipped_updates += 1
        elif engine.num_updates >= self._update_end.due:
            self._update_end.emit(UpdateEnd(engine, optimizer), engine.num_updates)
        _clear_gradients(optimizer)
        window.has_gradients = False

    def _leave_out(self, window: _Window) -> None:
        """Count an update of a window in which there was nothing to learn, or nothing that learns."""
        window.clear()
        window.num_made += 1
        self._engine.num_skipped_updates += 1

    def _step(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> bool:
        """Step, and return whether that was done."""
        skips, self._skips = self._skips, False
        if scaler is None:
            if not skips:
                optimizer.step()
            return not skips
        stepped: list[bool] = []
        hook = optimizer.register_step_post_hook(lambda *_: stepped.append(True))
        scale = scaler.get_scale() if _decides_on_device(optimizer) else None
        if not skips:
            scaler.step(optimizer)
        scaler.update()
        hook.remove()
        return bool(stepped) and (scale is None or scaler.get_scale() >= scale)

    def _open(self, name: str) -> _Window:
        """Return the first window of an optimizer, which must be there."""
        window = _Window(name)
        window.scaler = copy.deepcopy(self.scaler)
        self._optimizer(window).zero_grad()  # a loss without a name may have left gradients there
        self._windows[name] = window
        self._several = True
        return window

    def _optimizer(self, window: _Window) -> torch.optim.Optimizer:
        optimizer = self._engine.parts.get(window.name)
        if isinstance(optimizer, torch.optim.Optimizer):
            return optimizer
        raise self._no_optimizer(window.name)

    def _no_optimizer(self, name: object) -> EngineStateError:
        optimizers = self._engine.optimizers()
        parts = ", ".join(self._engine.parts)
        if not isinstance(name, str):
            meant = next((other for other, part in optimizers.items() if part is name), "its_name")
            return EngineStateError(
                f"engine.update was given an object of type {type(name).__name__}, but it takes the name of a part; "
                f'the parts are: {parts}. Write optimizer="{meant}".'
            )
        instead = "Write Engine(step, model=model, optimizer=optimizer)."
        if optimizers:
            guess = did_you_mean(name, optimizers)
            instead = (
                f'{guess}Write engine.update(loss, optimizer="{next(iter(optimizers))}"), or name the part optimizer.'
            )
        return EngineStateError(
            f"engine.update needs an optimizer as the part named {name}, but the parts are: {parts}. {instead}"
        )


class _Window:
    """What has come together for one optimizer since its last update."""

    __slots__ = ("batches", "has_gradients", "name", "nominal", "num_made", "part", "samples", "scaler")

    def __init__(self, name: str) -> None:
        self.name = name
        self.scaler: torch.amp.GradScaler | None = None
        self.num_made = 0
        self.has_gradients = False
        self.clear()

    def clear(self) -> None:
        self.batches = 0
        self.part = 0.0  # samples of a batch that comes in parts
        self.samples = 0.0
        self.nominal = 0.0  # samples a full window would have, judged by its first batch


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
