"""One optimizer update, in the only right order.

LossReady
backward (of the loss, scaled for mixed precision and for its share of the window)
-- when the window is full, or the epoch is over --
unscale, once
GradientsReady        the true gradients: look at them, clip them
optimizer.step        of each optimizer that the update is for
UpdateEnd             only if the step was taken: schedules and weight averages go here
zero_grad(set_to_none=True)

A little longer than other files, because the refusals say what to write for each way to name an optimizer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
from torch import Tensor

from .errors import ConfigurationError, DataError, EngineStateError, did_you_mean
from .events import GradientsReady, LossReady, UpdateEnd
from .loss_check import check_loss
from .parameters import parameters_of
from .ranks import Ranks, Share
from .renamed import OF_UPDATE, refuse_old_names
from .sharded import parts_like
from .window import MAIN, Window, WindowSize, key_of

_ONCE = "Let the step call engine.update(loss) once"
Optimizers = tuple[torch.optim.Optimizer, ...]

if TYPE_CHECKING:
    from .listeners import Listeners
    from .parts import Parts
    from .run import Run
    from .stages import CurrentStage


class Progress(Protocol):
    """What an update looks at, and counts, in the engine that owns it."""

    step: int
    num_updates: int
    num_skipped_updates: int
    current: CurrentStage
    run: Run


class PartsOfBatch:
    """A batch that comes in parts, each of which is to be one loss.

    Args:
        counts: by how much each part counts.
        progress: what the engine is doing now.
    """

    def __init__(self, counts: Sequence[float], progress: Progress) -> None:
        self._counts = counts
        self._progress = progress
        self._part = 0
        self._has_loss = False

    def take(self, num_samples: float | Tensor | None) -> tuple[float, float]:
        """Return by how much the present part counts, of which this is the loss, and the whole batch."""
        counted = self._counts[self._part]
        if self._has_loss:
            raise self._refusal("called engine.update a second time for one", _ONCE)
        if num_samples is not None and float(num_samples) != counted:
            said = f"called engine.update for {float(num_samples):g} samples, where it counts {counted:g}"
            raise self._refusal(said, "State what the loss is a mean of as Engine(step, num_samples=...)")
        self._has_loss = True
        return counted, sum(self._counts)

    def end_part(self) -> None:
        """Expect the loss of the next part; that of this one must have come."""
        if not self._has_loss:
            raise self._refusal("did not call engine.update for one", _ONCE)
        self._part, self._has_loss = self._part + 1, False

    def _refusal(self, fact: str, advice: str) -> EngineStateError:
        return EngineStateError(f"Step {self._progress.step} takes its batch in parts, and {fact}. {advice}.")


@refuse_old_names("engine.update", OF_UPDATE)
class Update:
    """``engine.update(loss)``: what a step does with its loss.

    Without accumulation this is ``loss.backward(); optimizer.step(); optimizer.zero_grad()`` to the bit.

    With a window, the gradients of K micro-batches are those of one batch that holds all their samples: each
    loss (a mean over its samples) counts by its number of samples, also in a window that the end of an epoch
    cuts short. Windows never reach over an epoch's end.

    A step with several optimizers names the one that a loss is for. Each has a window and a loss scaler of its own,
    and a loss leaves gradients only in what its optimizer holds. An update is left out if nothing in it learns.

    Args:
        parts: where the optimizers are found by name.
        listeners: who hears the events.
        progress: the engine's counters and what it is doing now.
        ranks: those that make each update together.
        asks: whether the weight of a batch is something else than its number of samples, and is to be asked for.
    """

    def __init__(
        self, parts: Parts, listeners: Listeners, progress: Progress, ranks: Ranks, *, asks: bool = False
    ) -> None:
        self._asks = asks
        self._ranks = ranks
        self._parts = parts
        self._progress = progress
        self._engine = listeners.engine  # only to be carried by events
        self._listeners = listeners
        self._loss_ready = listeners.channel(LossReady)
        self._gradients_ready = listeners.channel(GradientsReady)
        self._update_end = listeners.channel(UpdateEnd)
        self._size = WindowSize()
        self._accumulates = False  # whether the size is more than a batch: kept, because each step asks
        self._several = False  # whether one was named in this run
        self._num_before = 0  # updates of earlier runs
        self._scaler: torch.amp.GradScaler | None = None
        self._windows = {MAIN: Window(MAIN)}
        self._parts_of: PartsOfBatch | None = None

    @property
    def window_size(self) -> WindowSize:
        """How much goes into one update; `accumulate` sets it."""
        return self._size

    def accumulate(self, *, batches: int | None = None, samples: int | None = None) -> None:
        """Set how many batches, or how many samples, are accumulated for one update."""
        self._size = WindowSize(batches or 1, samples)
        self._accumulates = self._size != WindowSize()

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler for float16, or None; optimizers that are named have copies of it."""
        return self._scaler

    def use_scaler(self, scaler: torch.amp.GradScaler | None) -> None:
        """Scale every loss by ``scaler`` before it is differentiated; None scales none."""
        self._scaler = scaler
        for key, window in self._windows.items():
            window.scaler = scaler if key == MAIN else copy.deepcopy(scaler)

    def __call__(
        self,
        loss: Tensor,
        num_samples: float | Tensor | None = None,
        *,
        optimizer: str | Sequence[str] | None = None,
        batch_size: float | None = None,
    ) -> None:
        """Differentiate ``loss`` and, when the window is full, update the weights.

        Args:
            loss: one element, the mean over the batch.
            num_samples: how many samples it is the mean of, a number or a tensor of one element; taken from the batch
                by default. The mean of none is left out, and `LossReady` not announced for it, if that is the number
                0: a tensor is not looked into.
            optimizer: the name of the part that steps; by default the part ``optimizer``. Several names, such as
                ``("muon", "adamw")``, make one update of all of them: one backward pass, one window, one loss scaler.
            batch_size: for a part of a batch, the number of samples of the whole batch; the last part completes it.

        Raises:
            DataError: if the loss is not one number, or nothing in it can be trained.
            EngineStateError: if there is no such optimizer, or it steps in another update, too; or if this is not a
                training step.
        """
        progress = self._progress
        if self._parts_of is not None:
            num_samples, batch_size = self._parts_of.take(num_samples)
        if progress.current.name != "train":
            _refuse_outside_training(progress.current.name)
        check_loss(loss, self._parts)
        key = optimizer or MAIN if optimizer is None or isinstance(optimizer, str) else self._key(optimizer)
        window = self._windows.get(key) or self._open(key)
        if key != MAIN:
            self._several = True
        if num_samples is None and self._asks and progress.current.share is None:
            num_samples = progress.current.num_samples()
        is_tensor = isinstance(num_samples, Tensor)
        if progress.step >= self._loss_ready.due and (is_tensor or num_samples != 0):
            engine, stepping = self._engine, self._optimizers(window)[0]
            loss = self._loss_ready.transform(lambda value: LossReady(engine, value, stepping), loss, progress.step)
            check_loss(loss, self._parts)
        closes = True
        if (share := progress.current.share) is not None:
            num_samples, batch_size = self._on_all_ranks(progress.current, share, num_samples, batch_size), None
        if self._accumulates or batch_size is not None:
            num_samples = progress.current.num_samples() if num_samples is None else num_samples
            factor, closes = window.add(num_samples, batch_size, self._size)
            loss = loss * factor
        if (
            is_tensor or num_samples is None or num_samples != 0
        ):  # the mean of no samples is NaN, and so would its gradients be
            scaled = loss if window.scaler is None else window.scaler.scale(loss)
            if self._several:
                self._differentiate(window, scaled)
            else:
                window.has_gradients = True
                scaled.backward()
        progress.current.share = share  # what was stated is true of this loss alone
        if closes:
            self._apply(window)

    def _on_all_ranks(
        self, stage: CurrentStage, share: Share, num_samples: float | Tensor | None, batch_size: float | None
    ) -> float:
        """Return the number of samples of all ranks, and let this rank's gradients count by its share of them.

        What a loss is the mean of, if it is stated, is summed over the ranks, which waits for the device.
        """
        if batch_size is not None:
            raise EngineStateError(
                "engine.update was given a part of a batch (batch_size), which several ranks cannot take apart. "
                "Leave batch_size out, and accumulate smaller batches."
            )
        if num_samples is None and self._asks:
            num_samples = stage.num_samples()
        if num_samples is None:
            self._check_share(stage, share)
            return share.whole
        here = 0.0 if stage.is_stand_in else float(num_samples)
        stage.share = self._ranks.stated_share(here)
        return stage.share.whole

    def _check_share(self, stage: CurrentStage, share: Share) -> None:
        """Refuse a batch that does not hold the samples that were read for it: its share would be wrong."""
        try:
            here = stage.num_samples()
        except DataError:  # then nothing else is known than what was read
            return
        if here != share.here:
            raise DataError(
                f"The batch of step {self._progress.step} has {here} samples, but {share.here} were read for it. "
                "State what the loss is the mean of: engine.update(loss, num_samples)."
            )

    @contextmanager
    def in_parts(self, counts: Sequence[float]) -> Iterator[PartsOfBatch]:
        """Take each loss in the block for that of a part of one batch; ``counts`` says by how much each part counts.

        Raises:
            EngineStateError: for a part that is not one loss.
        """
        self._parts_of = PartsOfBatch(counts, self._progress)
        try:
            yield self._parts_of
        finally:
            self._parts_of = None

    def begin_run(self) -> None:
        """Forget what an earlier run has left; loss scalers stay as they are."""
        self.reset()
        self._several = False
        self._num_before = self._progress.num_updates + self._progress.num_skipped_updates
        for window in self._windows.values():
            window.num_made = 0

    def reset(self) -> None:
        """Forget what a run, or a failed try, has left in the windows, with its gradients."""
        for window in self._windows.values():
            if window.has_gradients:
                for optimizer in self._optimizers(window):
                    optimizer.zero_grad()
                window.has_gradients = False
            window.clear()

    def flush(self) -> None:
        """Make the update of each window that the end of the epoch cut short."""
        for window in self._windows.values():
            if window.batches:
                self._apply(window)

    def num_made(self, optimizer: str) -> int:
        """Return how often an optimizer was due to step, since it was first named."""
        return sum(window.num_made for window in self._windows.values() if optimizer in window.names)

    def num_planned(self, run: Run) -> int | None:
        """Return how many updates ``run`` makes if nothing stops it, one for each window; None where unknown."""
        steps, length = run.num_planned("step"), run.epoch_length
        if steps is None or self._size.samples is not None:
            return None
        epochs, rest = divmod(steps, length or steps or 1)  # a window ends with its epoch
        return epochs * -(-(length or steps) // self._size.batches) + -(-rest // self._size.batches)

    def check_heard(self) -> None:
        """Refuse callbacks that hear nothing because the step never calls ``engine.update``.

        Raises:
            ConfigurationError: naming them.
        """
        if self._progress.num_updates + self._progress.num_skipped_updates > self._num_before:
            return
        if deaf := [repr(callback) for callback in self._listeners.callbacks if callback.needs_update]:
            raise ConfigurationError(
                f"{', '.join(deaf)} had no effect in this epoch because the step never called engine.update. "
                "Write engine.update(loss) in place of loss.backward(), optimizer.step() and optimizer.zero_grad()."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the open windows with their gradients, and the scalers' states, by optimizer."""
        state: dict[str, Any] = {}
        for key, window in self._windows.items():
            state[key] = {
                "window": [window.batches, float(window.samples), float(window.nominal)],
                "grads": [p.grad for p in self._parameters(window)] if window.batches else None,
                "scaler": None if window.scaler is None else window.scaler.state_dict(),
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._num_before = -1  # whether a step updates was seen before; the counts are those of another moment
        for key, saved in state.items():
            window = self._windows.get(key) or self._open(key)
            self._several = self._several or key != MAIN
            window.batches, window.samples, window.nominal = saved["window"]
            window.has_gradients = any(grad is not None for grad in saved["grads"] or ())
            if saved["grads"] is not None:  # a step that updates by itself has no window, and perhaps no such part
                for parameter, grad in zip(self._parameters(window), saved["grads"], strict=True):
                    part = parts_like(grad, parameter)
                    parameter.grad = None if part is None else part.to(parameter.device, copy=True)
            if window.scaler is not None and saved["scaler"] is not None:
                window.scaler.load_state_dict(saved["scaler"])
                if window.batches:  # torch makes the scale at the first loss, and the epoch's end may come before
                    window.scaler.scale(torch.zeros((), device=self._parameters(window)[0].device))

    def _differentiate(self, window: Window, loss: Tensor) -> None:
        """Leave gradients in what the window's optimizers hold, and learns, alone."""
        inputs = [leaf for leaf in self._ranks.leaves_of(self._parameters(window)) if leaf.requires_grad]
        if not inputs:
            return
        window.has_gradients = True
        try:
            loss.backward(inputs=inputs)
        except RuntimeError as error:
            if "graph a second time" not in str(error):
                raise
            raise DataError(
                f"The loss of step {self._progress.step}, for {window}, was differentiated before. "
                "Compute it again for each optimizer, or step all of them in your own step, without engine.update."
            ) from error

    def _apply(self, window: Window) -> None:
        engine, progress = self._engine, self._progress
        scaler, optimizers = window.scaler, self._optimizers(window)
        if not window.has_gradients:
            self._leave_out(window)
            return
        if self._several:
            self._check_gradients(window, optimizers)
        if scaler is not None:
            for optimizer in filter(_has_gradients, optimizers):
                scaler.unscale_(optimizer)
        if isinstance(window.samples, Tensor) or window.samples != window.nominal:
            grads = [parameter.grad for parameter in self._parameters(window) if parameter.grad is not None]
            torch._foreach_mul_(grads, window.correction())
        window.clear()
        window.num_made += 1
        progress.num_updates += 1
        skips = False
        if progress.num_updates >= self._gradients_ready.due:
            progress.run.begin_update()
            for optimizer in optimizers:
                self._gradients_ready.emit(GradientsReady(engine, optimizer, optimizers), progress.num_updates)
            skips = progress.run.settle_update()
        stepped = () if skips and scaler is None else self._step(optimizers, scaler, skips=skips)
        if not stepped:
            progress.num_updates -= 1
            progress.num_skipped_updates += 1
        elif progress.num_updates >= self._update_end.due:
            for optimizer in stepped:
                self._update_end.emit(UpdateEnd(engine, optimizer, stepped), progress.num_updates)
        for optimizer in optimizers:
            _clear_gradients(optimizer)
        window.has_gradients = False

    def _check_gradients(self, window: Window, optimizers: Optimizers) -> None:
        """Refuse a loss that gave no gradient to any of the optimizers that it is for."""
        if not any(map(_has_gradients, optimizers)):
            raise DataError(
                f"The loss of step {self._progress.step} gave no gradient to anything that {window} holds. "
                "Pass the name of the optimizer that the loss is for: engine.update(loss, optimizer=...)."
            )

    def _leave_out(self, window: Window) -> None:
        """Count an update of a window in which there was nothing to learn, or nothing that learns."""
        window.clear()
        window.num_made += 1
        self._progress.num_skipped_updates += 1

    def _step(self, optimizers: Optimizers, scaler: torch.amp.GradScaler | None, *, skips: bool) -> Optimizers:
        """Step, unless this update is to be left out, and return the optimizers that did."""
        if scaler is None:
            for optimizer in optimizers:
                optimizer.step()
            return optimizers
        stepped: list[torch.optim.Optimizer] = []
        scale = scaler.get_scale() if any(map(_decides_on_device, optimizers)) else None
        for optimizer in () if skips else filter(_has_gradients, optimizers):
            hook = optimizer.register_step_post_hook(lambda optimizer, *_: stepped.append(optimizer))
            scaler.step(optimizer)
            hook.remove()
        scaler.update()
        if scale is not None and scaler.get_scale() < scale:
            stepped = [one for one in stepped if not _decides_on_device(one)]
        # What holds nothing that learns goes along with the others, as it does without a scaler.
        return tuple(one for one in optimizers if one in stepped or not _has_gradients(one)) if stepped else ()

    def _open(self, key: str) -> Window:
        """Return the first window of an update, whose optimizers must be there, and step in no other."""
        window = Window(key)
        for other in self._windows.values():
            if (both := set(window.names) & set(other.names)) and (other.num_made or other.has_gradients):
                raise EngineStateError(
                    f'"{min(both)}" steps in an update of {window}, and in this run in one of {other}, too. '
                    "Give one of them an optimizer of its own."
                )
        window.scaler = copy.deepcopy(self._scaler)
        for optimizer in self._optimizers(window):  # a loss without a name may have left gradients there
            optimizer.zero_grad()
        if MAIN in window.names:
            self._windows.pop(MAIN, None)
        self._windows[key] = window
        return window

    def _key(self, names: Any) -> str:
        """Return the key of the names of several optimizers."""
        if not isinstance(names, list | tuple) or not names:
            raise self._no_optimizer(names)
        for name in names:
            if not isinstance(name, str):
                raise self._no_optimizer(name)
        return key_of(names)

    def _optimizers(self, window: Window) -> Optimizers:
        optimizers = []
        for name in window.names:
            optimizer = self._parts.get(name)
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise self._no_optimizer(name)
            optimizers.append(optimizer)
        return tuple(optimizers)

    def _parameters(self, window: Window) -> list[torch.nn.Parameter]:
        return [parameter for optimizer in self._optimizers(window) for parameter in parameters_of(optimizer)]

    def _no_optimizer(self, name: object) -> EngineStateError:
        optimizers = self._parts.optimizers()
        parts = ", ".join(self._parts)
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


def _clear_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Do what ``zero_grad`` does; torch's own spends more on its profiler's record than on the gradients."""
    if getattr(optimizer.zero_grad, "__func__", None) is not torch.optim.Optimizer.zero_grad:
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    return any(parameter.grad is not None for parameter in parameters_of(optimizer))


def _decides_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a fused optimizer skips a step by itself; then only a smaller scale shows that it did."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _refuse_outside_training(stage: str) -> NoReturn:
    if stage:
        raise EngineStateError(
            f'engine.update was called in the stage "{stage}", where nothing is trained. '
            "Write: if engine.training: engine.update(loss)."
        )
    raise EngineStateError(
        "engine.update was called outside a training step. Call it in the step, or in the body of engine.train(...)."
    )
