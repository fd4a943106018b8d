"""How often the host reads a value of a tensor, for which it would wait on an accelerator."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim import swa_utils
from torch.utils._python_dispatch import TorchDispatchMode

from camshaft.engine import arriving

_FREE = {arriving.__file__, swa_utils.__file__}
_WAITS = ("aten._local_scalar_dense", "aten.equal", "aten.nonzero", "aten.is_nonzero")


@dataclass
class HostReads:
    """What was read, by the name of the operation, in order."""

    names: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many reads there were."""
        return len(self.names)


@contextmanager
def count_host_reads() -> Iterator[HostReads]:
    """Count the reads of tensors' values in the body: ``item``, ``float``, ``bool``, ``tolist``, ``numpy`` ...

    The CPU stands in for an accelerator: there, each of these would make the host wait. What ``engine.current.peek()``
    and a `Log` read does not count, because they read what has arrived; nor does the number of a weight average, which
    is on the host.

    >>> with count_host_reads() as reads:
    ...     loss = torch.ones(3).mean()
    ...     assert loss > 0
    ...     numbers = torch.ones(3).tolist()
    >>> reads.count
    2
    """
    reads = HostReads()
    with ExitStack() as stack:
        for name in ("tolist", "numpy"):  # which read without an operation
            stack.enter_context(patch.object(Tensor, name, _counted(getattr(Tensor, name), name, reads)))
        stack.enter_context(_Watch(reads))
        yield reads


def _counted(method: Callable[..., Any], name: str, reads: HostReads) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _is_free():
            reads.names.append(name)
        return method(*args, **kwargs)

    return call


class _Watch(TorchDispatchMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not in torch's types
        self._reads = reads

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, kwargs = str(func), kwargs or {}
        to_host = name.startswith("aten._to_copy") and kwargs.get("device") == torch.device("cpu")
        if (name.startswith(_WAITS) or (to_host and args[0].device.type != "cpu")) and not _is_free():
            self._reads.names.append(name)
        return func(*args, **kwargs)


def _is_free() -> bool:
    """Return whether this is a read in code that waits for no device."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename not in _FREE:
        frame = frame.f_back
    return frame is not None
