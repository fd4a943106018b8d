"""Models whose weights, gradients and optimizer states are divided among ranks, by torch's `fully_shard`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.device_mesh import init_device_mesh

from camshaft.engine import (
    ConfigurationError,
    Engine,
    can_take,
    did_you_mean,
    has_shards,
    is_sharded,
    local_part,
    parameters_of,
    state_like,
    tree_map,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

Initialise = Callable[[nn.Module], object]
Parallelise = Callable[[nn.Module, "DeviceMesh"], object]
_DIMENSIONS = ("replicate", "shard", "tensor")  # of a mesh, in torch's order: neighbouring ranks are in the last one


class FullyShard:
    """Shards the modules of an engine over all ranks.

    Args:
        mesh: how many ranks hold the same part ("replicate"), into how many parts a weight is cut ("shard"), and how
            many ranks compute each layer together ("tensor").
        parallelize: cuts a module's layers over the ranks of "tensor".
        units: patterns over names of modules, each of which is gathered and freed by itself.
        policy: torch's mixed precision of weights and gradients.
        init: gives a model of the meta device its first weights.
        find_unused_parameters: whether a step may leave out some parameters.

    Raises:
        ConfigurationError: for settings that cannot work.
    """

    def __init__(
        self,
        mesh: Mapping[str, int] | None,
        units: Iterable[str],
        policy: MixedPrecisionPolicy | None,
        init: Initialise | None,
        *,
        parallelize: Parallelise | None,
        find_unused_parameters: bool,
    ) -> None:
        self.mesh = check_mesh(mesh)
        self.tensor_size = (self.mesh or {}).get("tensor", 1)
        self.parallelize = check_parallelize(parallelize, self.mesh)
        self.units = check_units(units)
        self.policy = policy
        self.init = init
        self.find_unused_parameters = find_unused_parameters
        self._sharded: list[Any] = []

    def given(self) -> str:
        """Return which of the settings were given, in words."""
        settings = {
            "mesh": self.mesh,
            "parallelize": self.parallelize,
            "units": self.units,
            "policy": self.policy,
            "init": self.init,
        }
        return " and ".join(name for name, value in settings.items() if value)

    def make_real(self, engine: Engine) -> None:
        """Give the models of one process their first weights, where they have none yet."""
        for name, module in engine.parts.modules().items():
            if is_meta(module):
                earlier = dict(module.named_parameters(remove_duplicate=False))
                made_real(name, module, self.init)
                let_optimizers_hold(engine, earlier, module)

    def shard(self, engine: Engine) -> None:
        """Shard every module that has parameters, with the weights of rank 0; optimizers hold the parts then."""
        modules = {name: part for name, part in engine.parts.modules().items() if any(True for _ in part.parameters())}
        _check_torch()
        _check_parts(engine, modules)
        units = self._units(modules)
        mesh = self._make_mesh(engine.ranks.world)
        of_data = tuple(name for name in mesh.mesh_dim_names or () if name != "tensor")
        num_cut = 0
        for name, module in modules.items():
            earlier = dict(module.named_parameters(remove_duplicate=False))
            weights = self._weights_of_main(engine, name, module)
            if self.parallelize is not None:
                _forget_weights(module)  # so that nothing is sent while it is cut: they come later
                self.parallelize(module, mesh["tensor"])
                num_cut += _num_parallelized(name, module, earlier, mesh)
            self._shard_module(engine, module, units[name], mesh[of_data])
            _fill(engine, module, weights, mesh)
            let_optimizers_hold(engine, earlier, module)
            engine.ranks.gathered.update(gathered(module))
        if self.parallelize is not None and not num_cut:
            raise ConfigurationError(
                f"parallelize has cut no parameter of the part{'s' * (len(modules) > 1)} {', '.join(modules)}. "
                f"Look at the names in its plan: the parameters are {', '.join([*earlier][:8])}."
            )
        for optimizer in engine.parts.optimizers().values():
            optimizer.register_step_post_hook(partial(_count_step, engine.ranks.gathered))

    @contextmanager
    def freed(self) -> Iterator[None]:
        """Let the models hold their parts alone, as after a backward pass; their parameters are those then."""
        for module in self._sharded:
            module.reshard()
        yield

    def _make_mesh(self, world: int) -> DeviceMesh:
        names, sizes = tuple(self.mesh or {"shard": world}), tuple((self.mesh or {"shard": world}).values())
        if math.prod(sizes) != world:
            raise ConfigurationError(
                f"Distributed has mesh={self.mesh}, which is for {math.prod(sizes)} ranks, and there are {world}. "
                "Pass sizes whose product is the number of ranks."
            )
        return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", sizes, mesh_dim_names=names)

    def _units(self, modules: Mapping[str, nn.Module]) -> dict[str, list[nn.Module]]:
        """Return each part's units, the inner ones first."""
        chosen: dict[str, dict[str, nn.Module]] = {part: {} for part in modules}
        for pattern in self.units:
            found = {part: matching_modules(module, pattern) for part, module in modules.items()}
            if not any(found.values()):
                _refuse_pattern(pattern, modules)
            for part, matching in found.items():
                chosen[part] |= matching
        return {part: _inner_first(module, chosen[part]) for part, module in modules.items()}

    def _weights_of_main(self, engine: Engine, name: str, module: nn.Module) -> dict[str, Tensor]:
        """Return, on rank 0, what the whole module is to begin with; nothing on other ranks."""

        def get() -> None:
            real = made_real(name, copy.deepcopy(module), self.init) if is_meta(module) else module
            weights.update({key: tensor.detach() for key, tensor in tensors_of(real).items()})

        weights: dict[str, Tensor] = {}
        engine.ranks.on_main(get)
        return weights

    def _shard_module(self, engine: Engine, module: nn.Module, units: list[nn.Module], mesh: DeviceMesh) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        settings: dict[str, Any] = {"mesh": mesh} | ({} if self.policy is None else {"mp_policy": self.policy})
        for one in [*units, module]:
            try:
                fully_shard(one, **settings)
            except (ValueError, NotImplementedError) as error:
                reason = str(error).partition("\n")[0].rstrip("(.: ")
                raise ConfigurationError(
                    f"A {type(one).__name__} cannot be sharded ({reason}). Pass other units to Distributed."
                ) from error
        weigh: Any = _WeightedReduceScatter(engine)
        for one in module.modules():
            if isinstance(one, FSDPModule):
                one.set_custom_reduce_scatter(weigh)
                one.set_gradient_divide_factor(1.0)
                one.set_force_sum_reduction_for_comms(True)
                if self.find_unused_parameters:
                    one.set_reduce_scatter_unused_params(True)
        self._sharded.append(module)
        module.register_forward_hook(_free_after_evaluation)
        if self.parallelize is not None:
            module.register_forward_hook(_wait_in_evaluation)


def check_mesh(mesh: Mapping[str, int] | None) -> dict[str, int] | None:
    """Return the mesh with its dimensions in torch's order.

    Raises:
        ConfigurationError: for other names, or sizes that cannot be.
    """
    if mesh is None:
        return None
    example = 'Write mesh={"replicate": 2, "shard": 4}.'
    if not isinstance(mesh, Mapping) or "shard" not in mesh or mesh.keys() - set(_DIMENSIONS):
        raise ConfigurationError(f"Distributed has mesh={mesh!r}, which does not say how weights are cut. {example}")
    least = {"replicate": 1, "shard": 2, "tensor": 2}
    if not all(type(size) is int and size >= least[name] for name, size in mesh.items()):
        raise ConfigurationError(f"Distributed has mesh={mesh!r}, with a size that cuts nothing. {example}")
    return {name: mesh[name] for name in _DIMENSIONS if name in mesh}


def check_parallelize(parallelize: Parallelise | None, mesh: Mapping[str, int] | None) -> Parallelise | None:
    """Return what cuts the layers.

    Raises:
        ConfigurationError: if it cannot be called with a module and a mesh, or the mesh has no dimension for it; or if
            only the mesh has one.
    """
    example = "Pass parallelize=lambda model, mesh: parallelize_module(model, mesh, {...})."
    if parallelize is None and "tensor" in (mesh or {}):
        raise ConfigurationError(
            f'Distributed has mesh={mesh!r}, and nothing says which layers the ranks of "tensor" cut. {example}'
        )
    if parallelize is not None and not (callable(parallelize) and can_take(parallelize, 2)):
        raise ConfigurationError(
            f"Distributed has parallelize={parallelize!r}, which cannot be called with a model and a mesh. {example}"
        )
    if parallelize is not None and "tensor" not in (mesh or {}):
        raise ConfigurationError(
            f'Distributed has parallelize and mesh={mesh!r}, which has no dimension "tensor" for it. '
            'Write mesh={"shard": 2, "tensor": 2}.'
        )
    return parallelize


def _num_parallelized(name: str, module: nn.Module, earlier: Mapping[str, nn.Parameter], mesh: DeviceMesh) -> int:
    """Return how many parameters of a module were cut; refuse one that could not be trained as they were."""
    present: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
    cut = {key: parameter for key, parameter in present.items() if is_sharded(parameter)}
    if any(parameter.device_mesh != mesh["tensor"] for parameter in cut.values()):
        raise ConfigurationError(
            f"parallelize has cut parameters of the part {name} over another mesh than it was given. "
            "Pass that one on to parallelize_module."
        )
    if changed := sorted(present.keys() ^ earlier.keys()):
        raise ConfigurationError(
            f"parallelize has renamed parameters of the part {name}: {', '.join(changed[:5])}. "
            "Let it change modules in place, as parallelize_module does."
        )
    of_both = mesh["shard"].size() * mesh["tensor"].size()
    for key, parameter in cut.items():
        if parameter.placements[0].is_shard(0) and parameter.shape[0] % of_both:
            raise ConfigurationError(
                f"The parameter {key} has shape {list(parameter.shape)}, whose first dimension is cut by both "
                f'"shard" and "tensor", into {of_both} parts that cannot be of one size. '
                f"Make it a multiple of {of_both}, or leave its module out of parallelize's plan."
            )
    first: dict[nn.Parameter, str] = {}
    for key, parameter in earlier.items():
        other = first.setdefault(parameter, key)
        if present[other] is not present[key]:
            raise ConfigurationError(
                f"The parameters {other} and {key} of the part {name} are one, and parallelize has made two of them. "
                "Let its plan leave out both modules."
            )
    return len(cut)


def check_units(units: Iterable[str]) -> list[str]:
    """Return the patterns as a list.

    Raises:
        ConfigurationError: for a single string, or what is not a pattern.
    """
    if isinstance(units, str) or not isinstance(units, Iterable):
        raise ConfigurationError(f"Distributed has units={units!r}, which is not a list. Pass a list: [{units!r}].")
    patterns = list(units)
    if wrong := [pattern for pattern in patterns if not isinstance(pattern, str)]:
        raise ConfigurationError(
            f"Distributed has {wrong[0]!r:.50} among its units. Pass names, as in model.named_modules()."
        )
    return patterns


def matching_modules(module: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """Return the modules whose names match, but not those within another one that matches.

    >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])})
    >>> list(matching_modules(model, "layers.*"))
    ['layers.0']
    """
    found: dict[str, nn.Module] = {}
    for name, one in module.named_modules():  # those within a module come after it
        if name and fnmatchcase(name, pattern) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = one
    return found


def _refuse_pattern(pattern: str, modules: Mapping[str, nn.Module]) -> None:
    names = [name for module in modules.values() for name, _ in module.named_modules() if name]
    raise ConfigurationError(
        f'No module matches "{pattern}". {did_you_mean(pattern, names)}'
        f"Give one of these: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}."
    )


def _inner_first(module: nn.Module, chosen: Mapping[str, nn.Module]) -> list[nn.Module]:
    names = [name for name, one in module.named_modules() if name in chosen and any(True for _ in one.parameters())]
    return [chosen[name] for name in reversed(names)]


def _check_torch() -> None:
    import torch.distributed.fsdp as fsdp

    if not hasattr(getattr(fsdp, "FSDPModule", None), "set_custom_reduce_scatter"):
        raise ConfigurationError(
            f'Distributed("fsdp") needs a newer torch than {torch.__version__}. Write Distributed(), or upgrade torch.'
        )


def _check_parts(engine: Engine, modules: Mapping[str, nn.Module]) -> None:
    """Refuse parts that torch cannot shard, or whose gradients would be wrong."""
    owner: dict[nn.Parameter, str] = {}
    for name, module in modules.items():
        if has_shards(module.parameters()):
            raise ConfigurationError(
                f"The part {name} is sharded already, perhaps for tensor parallelism, and Distributed divides each "
                "batch among all ranks. Pass the model as it was made."
            )
        for parameter in module.parameters():
            if owner.setdefault(parameter, name) != name:
                raise ConfigurationError(
                    f"The parts {owner[parameter]} and {name} share parameters, which cannot be sharded twice. "
                    "Pass the outer one alone, or write Distributed()."
                )
    check_held(engine, owner.keys())


def check_held(engine: Engine, parameters: Collection[nn.Parameter]) -> None:
    """Refuse an optimizer that holds other parameters than these, those of all parts.

    Raises:
        ConfigurationError: if there is one.
    """
    held = [parameter for one in engine.parts.optimizers().values() for parameter in parameters_of(one)]
    if any(parameter not in parameters for parameter in held):
        raise ConfigurationError(
            "The optimizer holds parameters of no part, whose gradients would not be added up. "
            "Pass the modules that they belong to as parts, too."
        )


def let_optimizers_hold(engine: Engine, earlier: Mapping[str, nn.Parameter], module: nn.Module) -> None:
    """Let every optimizer that holds a module's earlier parameters hold the present ones, and their state."""
    present = dict(module.named_parameters(remove_duplicate=False))
    new = {parameter: present[name] for name, parameter in earlier.items()}
    for optimizer in engine.parts.optimizers().values():
        for group in optimizer.param_groups:
            group["params"] = [new.get(parameter, parameter) for parameter in group["params"]]
        for parameter in new.keys() & optimizer.state.keys():
            state, parts = optimizer.state.pop(parameter), new[parameter]
            optimizer.state[parts] = state_like(state, parts)


def gathered(module: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """Return, of each parameter that ranks hold in parts, the whole one with which a module computes.

    torch makes it when a unit is gathered for the first time, which is done here, and keeps it.
    """
    from torch.distributed.fsdp import FSDPModule

    whole: dict[nn.Parameter, nn.Parameter] = {}
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            parts = list(unit.parameters())
            unit.unshard()
            whole |= {part: one for part, one in zip(parts, unit.parameters(), strict=True) if one is not part}
            unit.reshard()
    return whole


def _count_step(whole: Mapping[nn.Parameter, nn.Parameter], optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Let torch refuse to differentiate what was computed before a step, as it does where weights are not in parts.

    Otherwise it would gather the new weights in the backward pass.
    """
    increment_version([whole[one] for one in parameters_of(optimizer) if one.grad is not None and one in whole])


def is_meta(module: nn.Module) -> bool:
    """Return whether any parameter or buffer of a module has no content yet."""
    return any(tensor.is_meta for tensor in tensors_of(module).values())


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def made_real(name: str, module: nn.Module, init: Initialise | None) -> nn.Module:
    """Give a module of the meta device its first weights, on the CPU.

    Raises:
        ConfigurationError: if nothing says what they are.
    """
    layers = [layer for layer in module.modules() if [*layer.parameters(False), *layer.buffers(False)]]
    if init is None and (unknown := [one for one in layers if not callable(getattr(one, "reset_parameters", None))]):
        raise ConfigurationError(
            f"The part {name} has no weights yet, and {type(unknown[0]).__name__} has no reset_parameters to make "
            'some. Pass a function of the model: Distributed("fsdp", init=...).'
        )
    module.to_empty(device="cpu")
    with torch.no_grad():
        if init is not None:
            init(module)
        else:
            for layer in layers:
                layer.reset_parameters()  # type: ignore[operator]  # looked for above
    return module


def _forget_weights(module: nn.Module) -> None:
    """Put parameters of the meta device in the place of a module's own; those that are one stay one."""
    empty = {
        own: nn.Parameter(own.detach().to("meta"), requires_grad=own.requires_grad) for own in module.parameters()
    }
    for one in module.modules():
        one._parameters.update({name: empty[own] for name, own in one._parameters.items() if own is not None})


def _fill(engine: Engine, module: nn.Module, weights: Mapping[str, Tensor], mesh: DeviceMesh) -> None:
    """Give every rank its part of rank 0's weights, one by one, and all of its buffers."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    if is_meta(module):
        module.to_empty(device=mesh.device_type)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            own: Any = parameter
            full = weights[name] if weights else torch.empty(parameter.shape, dtype=parameter.dtype)
            placements = [*own.placements, *[Replicate()] * (mesh.ndim - len(own.placements))]
            local_part(own).copy_(local_part(distribute_tensor(full, mesh, placements)))
        buffers = dict(module.named_buffers())
        for name, buffer in buffers.items():
            if weights:
                buffer.copy_(weights[name])
    engine.ranks.copy_from_main(list(buffers.values()))


def _free_after_evaluation(module: Any, inputs: Any, output: Any) -> None:
    """Let the outermost weights be in parts again, as they are after a backward pass."""
    if not torch.is_grad_enabled():
        module.reshard()


def _wait_in_evaluation(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Return outputs that have arrived: those of a layer that is cut may still be on their way, as no loss asks."""
    if torch.is_grad_enabled():
        return output
    return tree_map(lambda tensor: tensor.wait() if hasattr(tensor, "wait") else tensor, output)


class _WeightedReduceScatter:
    """Adds up the ranks' gradients, each weighted by its share of the batch, and gives each rank its part of the sum.

    Shares add up to 1. What is in an open window already has been added up, and stays what it is.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._send: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> Any:
        self._engine.current.weigh(input_tensor)
        return self._send(output_tensor, input_tensor, op=dist.ReduceOp.SUM, group=group, async_op=async_op)
