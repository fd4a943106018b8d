"""What a run computes, to the bit, in a few numbers."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camshaft.engine import (
    ArrivingTensor,
    BatchReady,
    Callback,
    ConfigurationError,
    Engine,
    EpochEnd,
    FitEnd,
    FitStart,
    GradientsReady,
    LossReady,
    StepEnd,
    directory_for,
    every,
    has_shards,
    parameters_of,
    tree_map,
    whole_number,
)

from .appending import append, cut
from .log_updates import JustBefore
from .rates import name_after

logger = logging.getLogger("camshaft")

Taken = tuple[str, Sequence[str], Tensor]  # "data", "loss", "gradients" or "weights"; which; and their digests, [N]

_CHUNK = 2**22  # elements of a large tensor that are looked at together
_SMALL = 2**12  # elements of a tensor that is looked at together with others
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Fingerprint(Callback):
    """Writes digests of batch, loss, gradients and weights every few steps, to compare two runs to the bit.

    ``camshaft diff RUN RUN`` names the first step in which two runs differ, and the tensors. A digest is a number of
    64 bits, computed where the tensor is and from its bits alone: that of one flipped bit is always another. No step
    waits for the device: digests are written with a later row, or at the end of the epoch. The file is
    ``fingerprints.jsonl``, with a line of JSON for each row.

    Args:
        every: steps from row to row; with 1, the step and the tensor in which a difference begins are found.
        directory: where to write; by default the run directory.

    Raises:
        ConfigurationError: for a number that is no count; before the first step, if there is nowhere to write, or if
            ranks hold the weights in parts.
    """

    main_only = True
    unique = True

    def __init__(self, every: int = 100, directory: str | Path | None = None) -> None:
        self.every = whole_number("Fingerprint's every", every, least=1)
        self._wanted_directory = None if directory is None else Path(directory)
        self._path = Path()
        self._taken: list[Taken] = []  # in the present step
        self._sent: deque[_Row] = deque()  # rows that have not arrived on the host
        self._names: dict[int, str] = {}
        self._is_new_file: bool | None = None  # None: it has been begun
        self._has_failed = False

    def attach(self, engine: Engine) -> None:
        """Look at the steps that have a row, and at no other."""
        super().attach(engine)
        due = JustBefore(engine, self.every)
        engine.subscribe(BatchReady, self._take_batch, when=due)
        engine.subscribe(LossReady, self._take_loss, when=due)
        engine.subscribe(GradientsReady, self._take_gradients, when=due)
        engine.subscribe(StepEnd, self._send, when=every(self.every))

    def write_into(self, directory: Path) -> None:
        """Write there, if this would not be the run directory."""
        self._wanted_directory = self._wanted_directory and directory

    def on_fit_start(self, event: FitStart) -> None:
        """Find out where to write."""
        engine = event.engine
        parameters = dict(engine.parts.named_parameters())
        if has_shards(parameters.values()):
            raise ConfigurationError(
                "Fingerprint cannot take digests of weights that ranks hold in parts. "
                'Attach it to a run with Distributed("replicate").'
            )
        self._path = directory_for("Fingerprint", self._wanted_directory, engine.directory) / "fingerprints.jsonl"
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._taken.clear()
        self._sent.clear()
        self._is_new_file = not engine.run.is_resuming and engine.step == 0  # a second fit goes on after the first
        self._has_failed = False

    def _take_batch(self, event: BatchReady) -> None:
        engine = event.engine
        if engine.training and engine.step % self.every == 0:
            tensors: list[Tensor] = []
            tree_map(tensors.append, event.batch)
            self._taken = []
            self._take("data", [str(number) for number in range(len(tensors))], tensors)

    def _take_loss(self, event: LossReady) -> None:
        if event.engine.step % self.every == 0:
            self._take("loss", [self._loss_name(event)], [event.loss])

    def _take_gradients(self, event: GradientsReady) -> None:
        if event.engine.step % self.every == 0:
            gradients = [(one, one.grad) for one in parameters_of(event.optimizer) if one.grad is not None]
            self._take("gradients", [self._name(one) for one, _ in gradients], [gradient for _, gradient in gradients])

    def _take(self, kind: str, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        if tensors:
            self._taken.append((kind, names, digests(tensors)))

    def _loss_name(self, event: LossReady) -> str:
        """Return the name of the loss's optimizer where there are several."""
        return name_after("loss", event.engine, event.optimizer)

    def _name(self, parameter: Tensor) -> str:
        return self._names.get(id(parameter), f"parameter {len(self._names)}")

    def _send(self, event: StepEnd) -> None:
        """Take the weights, and begin to bring the digests to the host; write those that have arrived."""
        engine = event.engine
        parameters = dict(engine.parts.named_parameters())
        self._take("weights", list(parameters), list(parameters.values()))
        self._sent.append(_Row(engine.epoch, engine.step, self._taken))
        self._taken = []
        self._write(waits=False)

    def on_epoch_end(self, event: EpochEnd) -> None:
        """Write the rows that are left."""
        self._write(waits=True)

    def on_fit_end(self, event: FitEnd) -> None:
        """Write the rows that are left, also after an interruption or an error."""
        self._write(waits=True)

    def state_dict(self) -> dict[str, Any]:
        """Write the rows that are left, because a resumed run goes on after them; there is nothing else to keep."""
        self._write(waits=True)
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing was kept."""

    def _write(self, *, waits: bool) -> None:
        while self._sent and (waits or self._sent[0].digests.is_done()):
            row = self._sent.popleft()
            if self._has_failed:
                continue
            try:
                self._begin_with(row.step)
                append(self._path, f"{json.dumps(row.as_json())}\n".encode())
            except OSError as error:
                logger.warning("Fingerprint stops writing %s: %s. Training continues.", self._path, error.strerror)
                self._has_failed = True

    def _begin_with(self, step: int) -> None:
        """Begin a new file; or drop what a resumed run writes again, once."""
        if self._is_new_file is None:
            return
        is_new, self._is_new_file = self._is_new_file, None
        with open(self._path, "a+b") as file:
            file.seek(0)
            cut(file, lambda line: not is_new and json.loads(line)["step"] < step)

    def __repr__(self) -> str:
        return f"Fingerprint(every={self.every})"


class _Row:
    """The digests of a step, on their way to the host."""

    def __init__(self, epoch: int, step: int, taken: list[Taken]) -> None:
        self.epoch, self.step = epoch, step
        self._kinds = [(kind, name) for kind, names, _ in taken for name in names]
        values = [value for _, _, value in taken]
        # A batch may be on the host yet, if this handler comes before the one that places it.
        device = next((value.device for value in values if value.device.type != "cpu"), torch.device("cpu"))
        together = [value.to(device, non_blocking=True) for value in values]
        self.digests = ArrivingTensor(torch.cat(together) if together else torch.zeros(0))

    def as_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"epoch": self.epoch, "step": self.step}
        for (kind, name), value in zip(self._kinds, self.digests.tolist(), strict=True):
            row.setdefault(kind, {})[name] = f"{value & 0xFFFFFFFFFFFFFFFF:016x}"
        return row


def digest(tensor: Tensor) -> Tensor:
    """Return a digest of a tensor's bits: a 64-bit whole number on its device.

    Each element's bits are multiplied by an odd number of its own, and the products are added up, modulo 2**64. If one
    bit flips, the sum is another.

    >>> one = torch.zeros(1000)
    >>> other = one.clone()
    >>> other[7] = -0.0  # equal to 0.0, and another number
    >>> bool(digest(one) == digest(one.clone())), bool(digest(one) == digest(other))
    (True, False)
    """
    bits = _bits(tensor.detach())
    if len(bits) <= _CHUNK:
        return (bits.to(torch.int64) * _factors(len(bits), bits.device)).sum() + len(bits)
    parts = [bits[begin : begin + _CHUNK] for begin in range(0, len(bits), _CHUNK)]
    # Each part's factors are those of the first, plus an even number.
    digests = [
        (part.to(torch.int64) * (_factors(len(part), bits.device) + 2 * _CHUNK * number)).sum()
        for number, part in enumerate(parts)
    ]
    return torch.stack(digests).sum() + len(bits)


@torch.no_grad()
def digests(tensors: Sequence[Tensor]) -> Tensor:
    """Return the `digest` of each tensor, [N], in few calls, however many small ones there are.

    >>> one, other = torch.ones(3), torch.zeros(2, 2)
    >>> digests([one, other]).tolist() == [int(digest(one)), int(digest(other))]
    True
    """
    found: dict[int, Tensor] = {}
    for device in {one.device for one in tensors}:
        small = [at for at, one in enumerate(tensors) if one.device == device and _is_small(one)]
        if small:
            together = _digests_of_small([tensors[at] for at in small])
            if len(small) == len(tensors):
                return together
            found |= zip(small, together.unbind(), strict=True)
    home = next((one.device for one in tensors if one.device.type != "cpu"), torch.device("cpu"))
    each = [found[at] if at in found else digest(one) for at, one in enumerate(tensors)]
    return torch.stack([one.to(home, non_blocking=True) for one in each])


def _is_small(tensor: Tensor) -> bool:
    return tensor.numel() <= _SMALL and tensor.layout is torch.strided


def _digests_of_small(tensors: Sequence[Tensor]) -> Tensor:
    """Return the digests of tensors on one device, whose elements are multiplied and added up together."""
    if tensors[0].is_floating_point() and len({one.dtype for one in tensors}) == 1:
        bits = _bits(torch.cat([one.reshape(-1) for one in tensors]))
    else:
        bits = torch.cat([_bits(one) for one in tensors])
    lengths, factors, places = _layout(tuple(one.numel() * (1 + one.is_complex()) for one in tensors), bits.device)
    return lengths.index_add(0, places, bits * factors)


@lru_cache(maxsize=16)
def _layout(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for tensors that lie one after the other: their lengths, and each element's factor and tensor."""
    factors = torch.cat([_factors(length, torch.device("cpu")) for length in lengths])
    each = torch.tensor(lengths)
    places = torch.repeat_interleave(torch.arange(len(lengths)), each)
    return each.to(device), factors.to(device), places.to(device)


def _bits(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as whole numbers, [N]."""
    tensor = tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    tensor = tensor.to(torch.uint8) if tensor.dtype is torch.bool else tensor
    return tensor.contiguous().view(_BITS[tensor.element_size()]).reshape(-1)


def _factors(length: int, device: torch.device) -> Tensor:
    """Return the first odd numbers."""
    kept = _odd_numbers(device)
    return kept[:length] if length <= len(kept) else torch.arange(length, device=device) * 2 + 1


@lru_cache
def _odd_numbers(device: torch.device) -> Tensor:
    """Return as many odd numbers as small tensors need; half a MiB."""
    return torch.arange(2**16, device=device) * 2 + 1
