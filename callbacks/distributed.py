"""One model trained by several processes."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from camshaft.engine import (
    Callback,
    ConfigurationError,
    DataError,
    Engine,
    FitEnd,
    FitStart,
    GradientsReady,
    is_sharded,
    launched_world,
    parameters_of,
)

from .fsdp import FullyShard, Initialise, Parallelise, check_held

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.utils.hooks import RemovableHandle

logger = logging.getLogger("camshaft")

_MOST_REPLICAS = 4  # each has room for all gradients


class Distributed(Callback):
    """Trains on as many processes as torchrun has started; with one process it does nothing.

    ``torchrun --nproc-per-node 4 train.py`` runs the same script on four ranks. Each reads its part of every batch:
    ``batch_size`` is that of all ranks together, so that weights, averages and metrics are those of one process, up to
    rounding. The engine needs a ``seed``. Under "replicate", each rank holds the whole model (torch's
    `DistributedDataParallel`).

    Under "fsdp", each rank holds a part of every weight, of its gradient and of its optimizer's state (torch's
    `fully_shard`), and gathers a unit of the model while it computes. That is done when this is attached: the parts
    hold other parameters then, of type `DTensor`, and optimizers are given those in the place of their own. A model on
    the meta device gets its weights then, too, and never is whole on any rank but the first. Files of best weights and
    checkpoints are those of one process, and each of the two kinds continues the other's.

    A rank's gradients count by its number of samples, also in a short last batch and with an accumulation window. A
    signal, a stop or a checkpoint on one rank takes effect on all of them, after the same step.

    Args:
        kind: "replicate" or "fsdp".
        mesh: of "fsdp": ``{"replicate": 2, "shard": 4}`` cuts weights into 4 parts, and holds each on 2 ranks; by
            default they are cut into as many as there are ranks. ``{"shard": 4, "tensor": 2}`` lets 2 neighbouring
            ranks compute each layer together (tensor parallelism), and divides each batch among the 4 pairs.
        parallelize: of "fsdp", for a mesh with "tensor": ``parallelize(model, mesh)`` cuts layers over the mesh of
            those ranks, by torch's `parallelize_module`. It is called on every rank with each part that has
            parameters, before these have values. The model must return whole tensors on each rank, as torch's styles
            do by default at the end of a row. Parameters that are not cut are the same on these ranks.
        units: of "fsdp": names of modules, or patterns such as ``"layers.*"``, which are gathered and freed one by
            one; what is in none of them is gathered as a whole. Of modules within each other, a pattern means the
            outer one.
        policy: of "fsdp": torch's `MixedPrecisionPolicy`.
        init: of "fsdp": ``init(model)`` gives a model of the meta device its first weights. It is called on rank 0,
            with the whole model; by default every layer's ``reset_parameters`` is.
        data: "divided" divides each batch among the ranks; "sharded" says that every rank's data are its own already,
            and adds up their numbers of samples in each step. A rank whose data end before those of the others
            computes the first batch of the pass again, with a weight of zero.
        batch_norm: "sync" refuses batch normalisation over a rank's own samples, which gives other weights than one
            process; "local" allows it.
        find_unused_parameters: as for `DistributedDataParallel`: for models of which a step may leave some out.
        timeout: seconds after which an operation that all ranks take part in fails.

    Raises:
        ConfigurationError: for settings that cannot work; when attached to an engine on several ranks, if it is not
            the first callback, there is no seed, a batch normalisation is not synchronised, or a model cannot be
            sharded or parallelized.
        DataError: in a run, if gradients were not added up because the model was not called as a whole.
    """

    unique = True

    def __init__(
        self,
        kind: Literal["replicate", "fsdp"] = "replicate",
        *,
        mesh: Mapping[str, int] | None = None,
        parallelize: Parallelise | None = None,
        units: Iterable[str] = (),
        policy: MixedPrecisionPolicy | None = None,
        init: Initialise | None = None,
        data: Literal["divided", "sharded"] = "divided",
        batch_norm: Literal["sync", "local"] = "sync",
        find_unused_parameters: bool = False,
        timeout: float = 600.0,
    ) -> None:
        if kind not in ("replicate", "fsdp"):
            raise ConfigurationError(f'Distributed does not know {kind!r}. Write "replicate" or "fsdp".')
        self._shards = FullyShard(
            mesh, units, policy, init, parallelize=parallelize, find_unused_parameters=find_unused_parameters
        )
        if kind == "replicate" and (given := self._shards.given()):
            raise ConfigurationError(
                f'Distributed has {given}, which only "fsdp" takes. Write Distributed("fsdp", ...).'
            )
        if data not in ("divided", "sharded"):
            raise ConfigurationError(f'Distributed has data={data!r}. Write "divided" or "sharded".')
        if data == "sharded" and parallelize is not None:
            raise ConfigurationError(
                'Distributed has data="sharded" and parallelize, whose ranks must read the same samples. '
                'Write data="divided".'
            )
        if batch_norm not in ("sync", "local"):
            raise ConfigurationError(f'Distributed has batch_norm={batch_norm!r}. Write "sync" or "local".')
        self.kind = kind
        self.data = data
        self.batch_norm = batch_norm
        self.find_unused_parameters = find_unused_parameters
        self.timeout = timeout
        self._replicas: list[_Replica] = []
        self._has_one_optimizer = True

    def attach(self, engine: Engine) -> None:
        """Join the other ranks, and synchronise the gradients of every module that is trained."""
        super().attach(engine)
        if launched_world() == 1:
            if self.kind == "fsdp":
                self._shards.make_real(engine)
            return
        if earlier := engine.listeners.callbacks:
            raise ConfigurationError(
                f"Distributed comes after {earlier[0]!r}, which knows nothing of the other ranks then. "
                "Write it first: callbacks=[Distributed(), ...]."
            )
        if engine.seed is None:
            raise ConfigurationError(
                "Several ranks need a seed, which makes all of them read the data in one order. Write seed=0."
            )
        start_group(self.timeout)
        engine.ranks.join(divides=self.data == "divided", tensor_size=self._shards.tensor_size)
        engine.listeners.around("fit", lambda: _together(engine))
        for name, module in engine.parts.modules().items():
            self._check_batch_norm(name, module)
        if self.kind == "fsdp":
            self._shards.shard(engine)
            engine.listeners.around("evaluation", self._shards.freed)
        else:
            for module in engine.parts.modules().values():
                self._replicate(engine, module)
            check_held(engine, {parameter for replica in self._replicas for parameter in replica.parameters})
            self._has_one_optimizer = len(engine.parts.optimizers()) == 1
            engine.ranks.on_stated(self._weigh)
            engine.subscribe(GradientsReady, self._check_reduced)
        engine.listeners.around("evaluation", lambda: _same_buffers(engine))

    def _replicate(self, engine: Engine, module: nn.Module) -> None:
        """Let the gradients of a module be added up; parameters that another module has, too, only once."""
        taken = {parameter for replica in self._replicas for parameter in replica.parameters}
        if parameters := [parameter for parameter in module.parameters() if parameter not in taken]:
            self._replicas.append(_Replica(engine, parameters, self.find_unused_parameters))
            module.register_forward_hook(self._replicas[-1])

    def _weigh(self) -> None:
        """Weigh the gradients of a loss that states what it is the mean of."""
        for replica in self._replicas:
            replica.weigh()

    def _check_reduced(self, event: GradientsReady) -> None:
        """Refuse an update by gradients that were not added up, because the module was not called as a whole."""
        for replica in self._replicas:
            passes = replica.passes
            passes.look()
            if passes.lost_one:
                passes.lost_one = False
                raise DataError(
                    f"The loss of step {event.engine.step} was differentiated more than once after one call of the "
                    "model, and only the first time is added up over the ranks. "
                    "Add the losses up and differentiate their sum, or call the model once for each."
                )
            if not passes.were_reduced and replica.has_gradients_of(event.optimizer):
                raise DataError(
                    f"The gradients of step {event.engine.step} were not added up over the ranks. "
                    "Call each part that is trained as a whole, model(inputs), once before its loss is differentiated."
                )
            if event.optimizer is event.together[-1] and (
                self._has_one_optimizer or any(map(replica.is_held_by, event.together))
            ):
                passes.were_reduced = False  # not of other optimizers, whose window may still be open

    def _check_batch_norm(self, name: str, module: nn.Module) -> None:
        if self.batch_norm == "sync" and any(
            isinstance(layer, _BatchNorm) and not isinstance(layer, nn.SyncBatchNorm) for layer in module.modules()
        ):
            raise ConfigurationError(
                f"The part {name} has batch normalisation, which would see only a rank's own samples. Convert it by "
                'torch.nn.SyncBatchNorm.convert_sync_batchnorm(model), or write Distributed(batch_norm="local").'
            )

    def before_resume(self, state: dict[str, Any]) -> None:
        """Know that gradients in a checkpoint, of a window that was open, were added up before it was written."""
        for replica in self._replicas:
            replica.passes.were_reduced = True

    def on_fit_start(self, event: FitStart) -> None:
        """Begin on every rank with the weights and buffers of rank 0; weights that are sharded began so before."""
        ranks = event.engine.ranks
        for module in event.engine.parts.modules().values():
            tensors = [*module.parameters(), *module.buffers()]
            ranks.copy_from_main([tensor for tensor in tensors if not is_sharded(tensor)])

    def on_fit_end(self, event: FitEnd) -> None:
        """End on every rank with the buffers of rank 0, such as what its batch normalisations have seen."""
        for replica in self._replicas:
            replica.do_not_weigh()
        if not event.engine.ranks.is_broken:
            event.engine.ranks.copy_from_main(_buffers(event.engine))

    def __repr__(self) -> str:
        return f"Distributed({self.kind!r}, data={self.data!r}, batch_norm={self.batch_norm!r})"


class _Replica:
    """A forward hook that lets torch average the gradients of the backward pass that follows.

    `DistributedDataParallel` is given the parameters alone and passes the output through, so that the model stays the
    user's own object under its own name, and an evaluation does not communicate.

    The average is right as it is where all ranks have as many samples of the batch, and costs nothing more then.
    Otherwise each gradient is weighted before it is accumulated.
    """

    def __init__(self, engine: Engine, parameters: list[nn.Parameter], find_unused_parameters: bool) -> None:
        self._engine = engine
        self.parameters = parameters
        self._own = set(parameters)
        self.passes = _Passes()
        self._find_unused_parameters = find_unused_parameters
        self._learns: list[bool] = []  # of each parameter, in the present replica
        self._replica: DistributedDataParallel | None = None  # the present one; None while nothing learns
        # The newest, by what learns: a step of two networks that learn in turn sets them free and freezes them.
        self._kept: dict[tuple[bool, ...], DistributedDataParallel] = {}
        # What weighs the gradients of a parameter, with the node of the graph, which must not be made anew.
        self._weights: dict[nn.Parameter, tuple[Any, RemovableHandle]] = {}

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if not torch.is_grad_enabled() or not self._engine.training:
            return output
        learns = [parameter.requires_grad for parameter in self.parameters]
        if learns != self._learns:  # some were frozen or set free
            self._learns = learns
            self._replica = self._replica_for(tuple(learns))
        if self._replica is None:
            return output
        share = self._engine.current.share
        if share is None or not share.is_even:
            self.weigh()
        elif self._weights:
            self.do_not_weigh()
        self.passes.expect()
        self._replica._pre_forward()  # these two are what torch's own replicate() calls
        return self._replica._post_forward(output)

    def _replica_for(self, learns: tuple[bool, ...]) -> DistributedDataParallel | None:
        """Return what averages the gradients of the parameters that learn now."""
        trained = list(itertools.compress(self.parameters, learns))
        if not trained:
            return None
        self.passes.look()  # before a pass that is none of the step's
        replica = self._kept.pop(learns, None) or self._replicate(trained)
        self.passes.watch(trained, may_leave_out=self._find_unused_parameters)
        self._kept[learns] = replica  # as the newest
        if len(self._kept) > _MOST_REPLICAS:
            del self._kept[next(iter(self._kept))]
        return replica

    def is_held_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether the optimizer holds any of the parameters; the first one tells, if it does."""
        return any(parameter in self._own for parameter in parameters_of(optimizer))

    def has_gradients_of(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether anything that the optimizer holds has a gradient."""
        own = set(parameters_of(optimizer))
        return any(parameter.grad is not None and parameter in own for parameter in self.parameters)

    def weigh(self) -> None:
        """From now on, let gradients count by this rank's share of the batch."""
        own = weakref.proxy(self)
        for parameter in self.parameters:
            if parameter.requires_grad and parameter not in self._weights:
                node = get_gradient_edge(parameter).node  # comes before torch adds up, and not where one only asks
                hook = node.register_prehook(lambda gradients: own._weighted(gradients))
                self._weights[parameter] = node, hook

    def do_not_weigh(self) -> None:
        """From now on, let all gradients count as they are."""
        for _, hook in self._weights.values():
            hook.remove()
        self._weights.clear()

    def _weighted(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Return what counts by the share once torch has averaged it; outside a batch, all of it.

        It is not multiplied by 0, because a stand-in's gradient may be NaN.
        """
        share, world = self._engine.current.share, self._engine.ranks.world
        if share is None:
            return gradients
        factor = share.weight * world
        return tuple(one if one is None else one * factor if factor else torch.zeros_like(one) for one in gradients)

    def _replicate(self, parameters: list[nn.Parameter]) -> DistributedDataParallel:
        replica = DistributedDataParallel(
            _Parameters(parameters), find_unused_parameters=self._find_unused_parameters, init_sync=False
        )
        self._settle(replica, parameters)
        return replica

    def _settle(self, replica: DistributedDataParallel, parameters: list[nn.Parameter]) -> None:
        """Let torch arrange its buckets now: by a backward pass of zeros, and not by the first one of a training step.

        Which rank's gradients are added to which depends on their places. A run that was resumed must add up those of
        its first step as one that was not.
        """
        kept = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        nothing = [parameter.flatten()[:0].sum() for parameter in parameters]
        torch.autograd.backward(replica(nothing), [torch.zeros_like(value) for value in nothing])
        for parameter, grad in zip(parameters, kept, strict=True):
            parameter.grad = grad

    def __deepcopy__(self, memo: object) -> Callable[..., Any]:
        return _unchanged_output  # a copy of the model, such as a weight average, is not trained

    def __reduce__(self) -> str:
        return "_unchanged_output"


class _Passes:
    """Backward passes that have reached parameters, and whether torch has added up what they left there.

    It adds up the gradients of the first pass after a call of the model. That pass reaches the first and the last
    parameter once each, and any other one is seen there, too; where some may be left out, each of them is watched.

    Attributes:
        were_reduced: whether one was added up since this was last made False.
        lost_one: whether one was not.
    """

    def __init__(self) -> None:
        self.were_reduced = False
        self.lost_one = False
        self._is_expected = False  # whether the model was called, so that torch adds up the next one
        self._reached: list[nn.Parameter] = []
        self._least = 1  # how many of the watched ones a pass must reach, so that torch adds it up
        self._handles: list[RemovableHandle] = []

    def watch(self, parameters: list[nn.Parameter], *, may_leave_out: bool) -> None:
        """See only the passes that reach these parameters, each of which may leave out some, or must not."""
        for handle in self._handles:
            handle.remove()
        watched = list(dict.fromkeys(parameters if may_leave_out else (parameters[0], parameters[-1])))
        self._least = 1 if may_leave_out else len(watched)
        # No function of Python's own, which would cost more than all else that is done here in a step.
        self._reached = []
        note: Callable[[Any], None] = self._reached.append
        self._handles = [one.register_post_accumulate_grad_hook(note) for one in watched]

    def expect(self) -> None:
        """Take note that the model was called."""
        self.look()
        self._is_expected = True

    def look(self) -> None:
        """See which passes there were."""
        if reached := self._reached:
            num_different = len(set(map(id, reached)))
            if num_different < len(reached):
                self.lost_one = True
            self.were_reduced |= self._is_expected and num_different >= self._least
            self._is_expected = False
            reached.clear()


class _Parameters(nn.Module):
    """Parameters of another module, under the forward pass of none."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.parameters_of_the_model = nn.ParameterList(parameters)

    def forward(self, output: Any) -> Any:
        return output


def _unchanged_output(module: nn.Module, inputs: Any, output: Any) -> Any:
    return output


@contextmanager
def _together(engine: Engine) -> Iterator[None]:
    """Let no rank leave a run that ended well before all of them have, and let all know of one that did not."""
    hook, run = sys.excepthook, engine.run

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        run.fail(error)
        hook(kind, error, trace)

    sys.excepthook = tell  # stays when the run fails: a script's loop is left before Python says by which error
    yield
    if sys.excepthook is tell:
        sys.excepthook = hook
    engine.ranks.total(0)


@contextmanager
def _same_buffers(engine: Engine) -> Iterator[None]:
    """Evaluate on every rank with the buffers of rank 0, such as what its batch normalisations have seen."""
    engine.ranks.copy_from_main(_buffers(engine))
    yield


def _buffers(engine: Engine) -> list[Tensor]:
    return [buffer for module in engine.parts.modules().values() for buffer in module.buffers()]


def start_group(timeout: float) -> None:
    """Make torch.distributed's default group, unless there is one; it ends with the process."""
    if dist.is_initialized():
        return
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    limit = timedelta(seconds=timeout)
    if _shares_a_store():
        server = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=limit)
        store = PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", server)
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(store=store, rank=rank, world_size=world, timeout=limit)
    else:
        dist.init_process_group(timeout=limit)
    atexit.register(_end_group)


def _shares_a_store() -> bool:
    """Return whether all of torchrun's attempts on this one host use one store: it has the keys of a failed one."""
    is_restartable = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return is_restartable and os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")


def _end_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    _let_threads_finish()


def _let_threads_finish(limit: float = 1.0) -> None:
    """Wait until no other thread of this process wants to run, or for ``limit`` seconds.

    A thread of the group lets go of a tensor after its ranks have gone on. If the system lets it run only when Python
    is ending, it cannot get Python's lock any more, and the process aborts. Where a system does not say what its
    threads do, nothing is waited for.
    """
    own, until = str(threading.get_native_id()), time.monotonic() + limit
    while time.monotonic() < until:
        time.sleep(0.001)  # the others may have Python's lock meanwhile
        others = [path for path in Path("/proc/self/task").glob("*/stat") if path.parent.name != own]
        if not any(_wants_to_run(path) for path in others):
            return


def _wants_to_run(thread: Path) -> bool:
    with contextlib.suppress(OSError):  # it has ended
        return thread.read_text().rpartition(")")[2].split()[0] == "R"
    return False
