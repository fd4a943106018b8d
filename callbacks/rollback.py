"""A run that goes back when a step has spoiled it, and goes on without that batch."""

from __future__ import annotations

import copy
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from camshaft.engine import (
    ArrivingTensor,
    BatchReady,
    Callback,
    ConfigurationError,
    DataError,
    Engine,
    FitStart,
    GradientsReady,
    LossReady,
    Phase,
    Settled,
    StepEnd,
    ValidationStart,
    named_callbacks,
    parameters_of,
    run_state,
    tree_map,
    whole_number,
)

from .at_steps import AtSteps
from .log_updates import total_norm
from .rates import scale_rates

logger = logging.getLogger("camshaft")

Judge = Callable[[float, Sequence[float]], object]

_SENT_TOGETHER = 16  # steps whose losses are brought to the host in one copy
_LEAST_FOR_SPIKE = 20  # losses


class Rollback(Callback):
    """Goes back to a snapshot in memory when a loss is not finite, or a spike, and leaves out the batch that did it.

    All of the run goes back: weights, optimizers, random numbers, the position in the data, handlers, the history. It
    then makes the steps since the snapshot again, without the batch. Where reading a batch draws no random numbers,
    the weights at the end are, to the bit, those of a run whose data never held it. The other handlers hear the same
    as in a run that is interrupted and resumed; a `RunCheckpoint` saves nothing that is gone back from.

    A batch is left out if its loss is NaN or infinite, or the gradients are (then the whole window of `Accumulate`),
    or ``on`` says so. The losses of up to 16 steps come to the host together, so that no step waits for the device;
    what is seen late is put right all the same. Before a snapshot, a checkpoint or a validation, all are looked at.

    What was done is logged, and is in ``engine.history.remarks``.

    Args:
        on: "nonfinite" for only that; "spike" for losses far above those before, too; or a function
            ``(loss, earlier) -> bool`` of a loss and of the good ones before it, oldest first.
        every: steps from snapshot to snapshot. Each copies the state to the host, as a checkpoint does.
        keep: how many snapshots are kept; each needs as much memory as a checkpoint.
        threshold: a loss is a spike if it is above the median of the earlier ones by more than this many standard
            deviations, which are estimated robustly, from the median distance. There must be 20 of them.
        window: how many earlier losses are compared with.
        lr_factor: by how much the learning rates are multiplied each time; None leaves them.
        limit: how often a run may go back.

    Raises:
        ConfigurationError: for settings that cannot work; when attached on several ranks.
        DataError: in a run, naming the steps that were left out, if it had to go back more often than ``limit``.
    """

    needs_update = True
    unique = True

    def __init__(
        self,
        on: Literal["nonfinite", "spike"] | Judge = "spike",
        *,
        every: int = 100,
        keep: int = 2,
        threshold: float = 10.0,
        window: int = 100,
        lr_factor: float | None = None,
        limit: int = 10,
    ) -> None:
        if not callable(on) and on not in ("nonfinite", "spike"):
            raise ConfigurationError(
                f'Rollback does not know on={on!r}. Write "nonfinite", "spike", or a function (loss, earlier) -> bool.'
            )
        if not 0 < threshold < math.inf:
            raise ConfigurationError(f"Rollback has threshold={threshold}. Pass a number above 0.")
        if lr_factor is not None and not 0 < lr_factor < math.inf:
            raise ConfigurationError(f"Rollback has lr_factor={lr_factor}. Pass a number above 0, such as 0.5.")
        self.on = on
        self.every = whole_number("Rollback's every", every, least=1)
        self.keep = whole_number("Rollback's keep", keep, least=1)
        self.threshold = threshold
        self.window = whole_number("Rollback's window", window, least=_LEAST_FOR_SPIKE)
        self.lr_factor = lr_factor
        self.limit = whole_number("Rollback's limit", limit, least=1)
        self._snapshots: deque[_Snapshot] = deque()  # oldest first
        self._begin_run()

    def _begin_run(self) -> None:
        self._snapshots.clear()
        self._left_out: list[int] = []  # steps
        self._num_times = 0
        self._remarks: list[dict[str, Any]] = []
        self._earlier: deque[float] = deque(maxlen=self.window)
        self._updated_at = 0  # the step of the newest update
        self._factor = 1.0  # what the learning rates are still to be multiplied by
        self._forget_steps()

    def _forget_steps(self) -> None:
        self._losses: list[Tensor] = []  # of the present step
        self._norms: list[Tensor] = []
        self._steps: list[_Step] = []  # that are not on their way yet
        self._sent: deque[tuple[list[_Step], ArrivingTensor]] = deque()

    def attach(self, engine: Engine) -> None:
        """Hear of the batches that are left out, and of no other."""
        if engine.ranks.several:
            raise ConfigurationError("Rollback works in one process only. Leave it out on several ranks.")
        super().attach(engine)
        self._engine = engine
        engine.subscribe(BatchReady, self._leave_out, when=AtSteps(lambda: self._left_out, "steps that are left out"))
        engine.listeners.around("epoch", self._ready)

    def on_fit_start(self, event: FitStart) -> None:
        """Begin anew, unless this is the run that has gone back."""
        if not event.engine.run.goes_on:
            self._begin_run()
            self._updated_at = event.engine.step
        self._forget_steps()

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Take a first snapshot when the run has begun or was resumed; lower the rates of one that has gone back."""
        if self._factor != 1.0:
            scale_rates(self._engine, self._factor)
            self._factor = 1.0
        if not self._snapshots:
            self._take_snapshot()
        yield

    # What a step shows --------------------------------------------------------------------------------------

    def on_loss_ready(self, event: LossReady) -> None:
        """Keep the loss."""
        self._losses.append(event.loss.detach())

    def on_gradients_ready(self, event: GradientsReady) -> None:
        """Keep the norm of the gradients; those of a loss scaler are sometimes infinite, and it sees to that."""
        if self._engine.update.scaler is not None:
            return
        gradients = [one.grad for one in parameters_of(event.optimizer) if one.grad is not None]
        if gradients:
            self._norms.append(total_norm(gradients))

    def on_step_end(self, event: StepEnd) -> None:
        """Send the numbers of some steps to the host, and look at those that have arrived."""
        engine = self._engine
        if self._losses:
            first = min(self._updated_at + 1, engine.step)
            loss = _sum(self._losses)
            norm = _sum(self._norms) if self._norms else torch.zeros_like(loss)  # the window is still open
            self._steps.append(_Step(engine.epoch, engine.step, engine.epoch_step, first, loss, norm))
        if self._norms:
            self._updated_at = engine.step
        self._losses, self._norms = [], []
        if len(self._steps) >= _SENT_TOGETHER:
            self._send()
        self._look(waits=False)

    def _send(self) -> None:
        """Begin to bring the numbers to the host."""
        steps, self._steps = self._steps, []
        if steps:
            numbers = torch.stack([number for step in steps for number in (step.loss, step.norm)])
            self._sent.append((steps, ArrivingTensor(numbers)))

    def _look(self, *, waits: bool) -> None:
        """Judge the steps whose numbers have arrived; or with ``waits``, all steps so far."""
        if waits:
            self._send()
        while self._sent and (waits or self._sent[0][1].is_done()):
            steps, numbers = self._sent.popleft()
            values = numbers.tolist()
            for step, loss, norm in zip(steps, values[::2], values[1::2], strict=True):
                if self._is_bad(loss, norm):
                    self._go_back(step, loss, norm)
                    return
                self._earlier.append(loss)

    def _is_bad(self, loss: float, norm: float) -> bool:
        if not math.isfinite(loss) or not math.isfinite(norm):
            return True
        if callable(self.on):
            return bool(self.on(loss, tuple(self._earlier)))
        return self.on == "spike" and self._is_spike(loss)

    def _is_spike(self, loss: float) -> bool:
        earlier = self._earlier
        if len(earlier) < _LEAST_FOR_SPIKE or loss <= max(earlier):  # which most losses are
            return False
        median = statistics.median(earlier)
        distance = statistics.median(abs(one - median) for one in earlier)
        deviation = max(1.4826 * distance, 1e-3 * abs(median))  # as of a normal distribution; losses may all be alike
        return loss > median + self.threshold * deviation

    # Snapshots ----------------------------------------------------------------------------------------------

    def on_settled(self, event: Settled) -> None:
        """Take a snapshot if it is time; look at everything before an epoch is closed."""
        if event.engine.run.phase is Phase.BETWEEN:
            self._look(waits=True)
        elif event.engine.step % self.every == 0:
            self._take_snapshot()

    def on_validation_start(self, event: ValidationStart) -> None:
        """Look at everything: weights that are gone back from are not to be validated."""
        self._look(waits=True)

    def _take_snapshot(self) -> None:
        engine = self._engine
        self._look(waits=True)
        if engine.run.breaks_off or any(one.step == engine.step for one in self._snapshots):
            return
        while len(self._snapshots) >= self.keep:  # before the new one, so that there are never more
            self._snapshots.popleft()
        self._snapshots.append(_Snapshot(engine.step, _on_host(run_state(engine))))

    def _go_back(self, step: _Step, loss: float, norm: float) -> None:
        """Ask for the newest snapshot from before a step, with what has to be known there."""
        engine = self._engine
        is_loss = math.isfinite(norm) or not math.isfinite(loss)
        what = f"the loss was {loss:.6g}" if is_loss else f"the loss was {loss:.6g} and the gradients were not finite"
        place = f"at step {step.step} (batch {step.epoch_step} of epoch {step.epoch}) {what}"
        self._forget_steps()
        if self._num_times >= self.limit:
            raise DataError(
                f"Rollback has gone back {self.limit} times, and {place}. Left out were the steps "
                f"{', '.join(map(str, self._left_out))}. Look at their data, and at the learning rate."
            )
        guilty = [step.step] if is_loss else list(range(step.first, step.step + 1))
        while self._snapshots and self._snapshots[-1].step >= guilty[0]:
            self._snapshots.pop()
        if not self._snapshots:
            raise DataError(
                f"Rollback cannot go back: {place}, and no snapshot is older than the window of that update. "
                "Pass a larger keep, or an every that is a multiple of the window."
            )
        self._num_times += 1
        self._left_out = sorted({*self._left_out, *guilty})
        snapshot = self._snapshots[-1]
        left_out = f"step {guilty[0]}" if len(guilty) == 1 else f"steps {guilty[0]} to {guilty[-1]}"
        text = f"Rollback: {place}; back to step {snapshot.step}, without the data of {left_out}"
        logger.warning("%s.", text)
        state = copy.deepcopy(snapshot.state)  # an optimizer goes on in the tensors that it is given
        name = next(name for name, one in named_callbacks(engine.listeners.callbacks).items() if one is self)
        own = state["callbacks"][name]
        if self.lr_factor is not None:
            self._factor = self.lr_factor ** (self._num_times - own["num_times"])
        others = [remark for remark in state["history"]["remarks"] if remark not in self._remarks]
        self._remarks.append({"epoch": step.epoch, "step": step.step, "text": text})
        state["history"]["remarks"] = [*others, *self._remarks]
        state["callbacks"][name] = own | self._told()
        engine.run.go_back(state, Path("memory"))

    def _leave_out(self, event: BatchReady) -> None:
        if event.engine.training and event.engine.step in self._left_out:
            event.engine.run.skip_batch()

    def state_dict(self) -> dict[str, Any]:
        """Look at everything, as this state is to be kept; return what was left out, and the earlier losses."""
        if self._steps or self._sent:
            self._look(waits=True)
        return {"earlier": list(self._earlier), "updated_at": self._updated_at, **self._told()}

    def _told(self) -> dict[str, Any]:
        """Return what is kept when the run goes back."""
        remarks = [dict(remark) for remark in self._remarks]
        return {"left_out": list(self._left_out), "num_times": self._num_times, "remarks": remarks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._left_out, self._num_times = list(state["left_out"]), state["num_times"]
        self._earlier = deque(state["earlier"], maxlen=self.window)
        self._updated_at = state["updated_at"]
        self._remarks = [dict(remark) for remark in state["remarks"]]

    def __repr__(self) -> str:
        on = self.on if isinstance(self.on, str) else getattr(self.on, "__name__", "function")
        return f"Rollback({on!r}, every={self.every}, keep={self.keep})"


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """The state of the run after a step, on the host."""

    step: int
    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Step:
    """What a step has shown; ``first`` is the first step of its window. Loss and norm are numbers on their device."""

    epoch: int
    step: int
    epoch_step: int
    first: int
    loss: Tensor
    norm: Tensor


def _sum(numbers: list[Tensor]) -> Tensor:
    """Return the sum of numbers of one element, as one without a dimension."""
    first, *others = [number.reshape(()).float() for number in numbers]
    return sum(others, start=first)


def _on_host(state: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a state in the host's memory; of a GPU, in memory that it can be copied to directly."""
    devices: set[torch.device] = set()

    def copied(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if not tensor.is_cuda:
            return tensor.to("cpu", copy=True)
        devices.add(tensor.device)
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)

    on_host: dict[str, Any] = tree_map(copied, state)
    for device in devices:
        torch.cuda.synchronize(device)
    return on_host
