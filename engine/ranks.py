"""The processes that train one model together, each of which is a rank.

One process is alone: each method returns what it was given, and nothing is sent. `Ranks.join` makes it one of several.
torch.distributed is imported only then.
"""

from __future__ import annotations

import functools
import itertools
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .batch import tree_map
from .errors import ConfigurationError, EngineStateError
from .rng import mix

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")

_numbers = itertools.count()  # of the engines of this process that have joined, the same on every rank


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank has of a batch that several ranks divide.

    Attributes:
        here: its samples; 0 for a stand-in, which is there so that the rank takes part in the communication.
        whole: the samples of all ranks.
        is_even: whether all ranks are known to have as many.
    """

    here: float
    whole: float
    is_even: bool = False

    @property
    def weight(self) -> float:
        """The share, from 0 to 1."""
        return self.here / self.whole if self.whole else 0.0


class Ranks:
    """All ranks of a run, as one of them sees them.

    Every method that communicates must be called by all ranks, in the same order. It uses torch.distributed's default
    group, which nothing here holds: the threads of a group end when nobody holds it any more.

    Under tensor parallelism, neighbouring ranks compute each layer together and read the same samples. They are one
    data rank: whatever is divided or added up (`part`, `share`, `sum`, `total`, `gather`) counts them once.

    Attributes:
        rank: the number of this process, from 0.
        world: the number of processes.
        tensor_size: how many ranks are one data rank; 1 without tensor parallelism.
        data_rank: the number of the data rank that this process belongs to, from 0.
        data_world: the number of data ranks.
        divides: whether data are divided among the ranks; otherwise each rank's data are its own already.
        is_broken: whether a rank has failed, so that nothing can be asked of all of them any more.
        gathered: of each parameter that ranks hold in parts, the whole one with which the model computes.
    """

    def __init__(self) -> None:
        self.rank = 0
        self.world = 1
        self.tensor_size = 1
        self.data_rank = 0
        self.data_world = 1
        self.divides = True
        self.is_broken = False
        self.gathered: dict[nn.Parameter, nn.Parameter] = {}
        self._store: Store | None = None
        self._num_stores = 0
        self._is_on_main = False
        self._on_stated: list[Callable[[], object]] = []

    def join(self, *, divides: bool = True, tensor_size: int = 1) -> None:
        """Become one of several ranks: those of torch.distributed's default group.

        Args:
            divides: whether data are divided among the ranks; False if each rank reads data of its own.
            tensor_size: how many neighbouring ranks compute each layer together, and read the same samples.
        """
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        self.rank, self.world, self.divides = dist.get_rank(), dist.get_world_size(), divides
        self.tensor_size = tensor_size
        self.data_rank, self.data_world = self.rank // tensor_size, self.world // tensor_size
        self._store = PrefixStore(f"camshaft/{next(_numbers)}", _get_default_store())

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes and prints."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return self.world > 1

    def part(self, size: int) -> tuple[int, int]:
        """Return where this rank's part of ``size`` samples begins and ends; both may be equal."""
        return size * self.data_rank // self.data_world, size * (self.data_rank + 1) // self.data_world

    def share(self, size: int) -> Share:
        """Return what this rank has of ``size`` samples that are divided."""
        begin, end = self.part(size)
        return Share(end - begin, size, is_even=size % self.data_world == 0)

    def leaves_of(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Return where a backward pass leaves the gradients of these parameters: also in those that are gathered."""
        if not self.gathered:
            return parameters
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        return learning + [self.gathered[parameter] for parameter in learning if parameter in self.gathered]

    def seed(self, seed: int, step: int = 0) -> int:
        """Return the seed of this rank's global generators; the first data rank has the one of a single process."""
        return seed if self.data_rank == 0 and not step else mix(seed, step, self.data_rank)

    def on_stated(self, function: Callable[[], object]) -> None:
        """Call a function before gradients are computed whose share is not that of the batch that was read."""
        self._on_stated.append(function)

    def stated_share(self, here: float) -> Share:
        """Return the share of a loss that is the mean of ``here`` samples, or other things, on this rank."""
        for function in self._on_stated:
            function()
        return Share(here, self.total(here))

    def sum(self, values: Tensor) -> Tensor:
        """Return the sums over all data ranks, element by element; every rank gets the same, to the last bit."""
        if self.several:
            import torch.distributed as dist

            self._refuse_on_main()
            values = values.clone() if self._counts else torch.zeros_like(values)
            dist.all_reduce(values)
        return values

    def total(self, number: float) -> float:
        """Return the sum of a number over all data ranks."""
        return float(self.sum(torch.tensor(float(number), dtype=torch.float64))) if self.several else number

    def gather(self, value: T) -> list[T]:
        """Return the value of each data rank, that of its first rank, in their order; tensors come on the CPU."""
        values: list[Any] = self.gather_all(value if self._counts else None)
        return values[:: self.tensor_size]

    def gather_all(self, value: T) -> list[T]:
        """Return every rank's value, in the order of the ranks; tensors come on the CPU."""
        if not self.several:
            return [value]
        import torch.distributed as dist

        self._refuse_on_main()
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, tree_map(Tensor.cpu, value))
        return values

    @property
    def _counts(self) -> bool:
        """Whether this is the first of the ranks that read the same samples: what it has seen counts for them all."""
        return self.rank % self.tensor_size == 0

    def shared(self, value: T) -> T:
        """Return rank 0's value."""
        if not self.several:
            return value
        import torch.distributed as dist

        self._refuse_on_main()
        values: list[Any] = [value if self.is_main else None]
        dist.broadcast_object_list(values, src=0)
        return cast("T", values[0])

    def on_main(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0 alone; every rank gets what it returned, or raises what it raised.

        When a rank has failed, nobody waits for rank 0 any more, and the others get None.
        """
        if not self.several:
            return function()
        if self.is_broken:
            return function() if self.is_main else cast("T", None)
        result: Any = None
        error: Exception | None = None
        if self.is_main:
            try:
                with self.not_asking():
                    result = function()
            except Exception as raised:
                error = raised
        result, sent = self.shared((result, None if error is None else _sendable(error)))
        if sent is not None:
            raise sent if error is None else error
        return cast("T", result)

    def guarded(self, handler: Callable[[Any], T]) -> Callable[[Any], T]:
        """Return a handler; one that is subscribed on rank 0 alone raises where it asks all ranks for something."""
        if not self._is_on_main:
            return handler

        @functools.wraps(handler)
        def handle(event: Any) -> T:
            with self.not_asking():
                return handler(event)

        return handle

    @contextmanager
    def not_asking(self) -> Iterator[None]:
        """Refuse what asks all ranks for something, within the block: it runs on rank 0 alone."""
        outer, self._is_on_main = self._is_on_main, True
        try:
            yield
        finally:
            self._is_on_main = outer

    def copy_from_main(self, tensors: list[Tensor]) -> None:
        """Overwrite the tensors with those of rank 0: all of one kind in one transfer."""
        if not self.several:
            return
        import torch.distributed as dist

        self._refuse_on_main()
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        for same in kinds.values():
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in same])
            dist.broadcast(flat, src=0)
            for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
                with torch.no_grad():
                    tensor.copy_(part.view_as(tensor))

    def store(self) -> Store:
        """Return a part of the store that all ranks see, a new one with each call.

        Raises:
            EngineStateError: if there is one rank.
        """
        from torch.distributed.distributed_c10d import PrefixStore

        if self._store is None:
            raise EngineStateError("There is no store, because there is one rank. Ask ranks.several first.")
        self._num_stores += 1
        has_clones = hasattr(self._store, "clone")  # a client of its own, because one that waits is locked
        return PrefixStore(str(self._num_stores), self._store.clone() if has_clones else self._store)

    def _refuse_on_main(self) -> None:
        if self.is_broken:
            raise EngineStateError("A rank has failed, so the others cannot be asked any more. Start the run again.")
        if self._is_on_main:
            raise EngineStateError(
                "Something that runs on rank 0 alone asked all ranks for something, which would wait for ever. "
                "Do it in a handler that runs on every rank."
            )


def _sendable(error: Exception) -> Exception:
    """Return an error that other ranks can raise: the same if it can be pickled, which some kinds cannot."""
    try:
        sent: Exception = pickle.loads(pickle.dumps(error))
    except Exception:
        sent = EngineStateError(f"Rank 0 failed with {type(error).__name__}: {error}. Look for the cause there.")
    sent.add_note("Raised on rank 0, which did this for all ranks.")
    return sent


def check_joined(ranks: Ranks) -> None:
    """Refuse a run that knows nothing of the other processes that were started with this one.

    Raises:
        ConfigurationError: if there are any.
    """
    world = launched_world()
    if world > 1 and not ranks.several:
        raise ConfigurationError(
            f"This is one of {world} processes, and each would train a model of its own. "
            "Pass callbacks=[Distributed(), ...], or start one process."
        )


def launched_rank() -> int:
    """Return which of the processes that were started together this is; 0 if it is alone."""
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def launched_world() -> int:
    """Return how many processes were started together, as torchrun says in the environment; 1 if it says nothing."""
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
