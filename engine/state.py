"""What a checkpoint of a run holds: the states of everything that decides the rest of the run."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .callback import Callback
from .checkpoint import CheckpointDirectory, check_plain, load_verified
from .errors import CheckpointError, ConfigurationError
from .migration import FORMAT, migrated
from .ranks import Ranks
from .record import Record
from .rng import SEED_VERSION, rng_state, seed_everything, set_rng_state
from .sharded import has_shards, like_module, like_optimizer, made_whole, read_whole
from .state_check import impossible_values
from .trial_step import trial_step
from .weights import unwrap, weight_differences

if TYPE_CHECKING:
    from .engine import Engine

logger = logging.getLogger("camshaft")

Found = tuple[dict[str, Any], Path]
# The types in a state, by key: what is loaded into our own objects is checked for them before anything is loaded.
_COUNTERS = {"epoch": int, "step": int, "num_validations": int, "num_updates": int, "num_skipped_updates": int}
_RUN = {
    "plan": {"epochs": (int, NoneType), "max_steps": (int, NoneType)},
    "first_epoch": int,
    "first_step": int,
    "step_before_epoch": int,
    "epoch_length": (int, NoneType),
    "phase": int,
    "stop_reason": (str, NoneType),
    "ends_epoch_early": bool,
    "validation_was_asked": bool,
    "num_skipped_batches": int,
    "num_passes": int,
    "num_validated": int,
    "validation_was_cut": bool,
    "last_validation": dict,
}
_TABLE = {"columns": list, "values": torch.Tensor, "present": torch.Tensor}
SHAPE = {
    "format": int,
    "seed": (int, NoneType),
    "seed_version": int,
    "torch": str,
    "counters": _COUNTERS,
    "run": _RUN,
    "parts": dict,
    "update": dict,
    "ranks": list,  # of what each data rank has of its own
    "history": {"rows": _TABLE, "validations": _TABLE, "validation_sets": list, "remarks": list},
    "callbacks": dict,
}
_RANK = {"rng": dict, "data": (dict, NoneType), "train": {"earlier": dict, "meters": dict, "metrics": dict}}


def run_state(engine: Engine, *, gathers: bool = True) -> dict[str, Any]:
    """Return the engine's state at this moment; the present step must have settled.

    Args:
        engine: the engine.
        gathers: whether rank 0 gets whole tensors of what ranks hold in parts; otherwise each rank gets its parts.

    Raises:
        CheckpointError: naming the key, if a part or handler keeps what is not safe to load.
        EngineStateError: outside a run.
    """
    state = {
        "format": FORMAT,
        "seed": engine.seed,
        "seed_version": SEED_VERSION,
        "torch": str(torch.__version__),
        "counters": {name: getattr(engine, name) for name in _COUNTERS},
        "run": engine.run.state_dict(),
        "parts": {name: _unwrapped(part).state_dict() for name, part in _stateful_parts(engine).items()},
        "update": engine.update.state_dict(),
        "ranks": engine.ranks.gather(
            {
                "rng": rng_state(),
                "data": engine.run.feed.state_dict(engine.step),
                "train": engine.stages["train"].state_dict(),
            }
        ),
        "history": engine.history.state_dict(),
        "callbacks": {
            name: callback.state_dict() if _is_here(engine, callback) else {}
            for name, callback in named_callbacks(engine.listeners.callbacks).items()
        },
    }
    if gathers and engine.ranks.several:
        state = made_whole(state, is_kept=engine.ranks.is_main)
    check_plain(state, "state")
    return state


def find_state(engine: Engine, resume: str | Path) -> Found | None:
    """Return the state to resume from and its file; None if "auto" found no file.

    Raises:
        ConfigurationError: if "auto" has nowhere to look, or a path does not exist.
        CheckpointError: if there are files and none of them is good, or the file is of another format, or does not fit
            the parts that the engine has.
    """
    if not isinstance(resume, str | os.PathLike):
        raise ConfigurationError(f'resume is {resume!r}, which is not a path. Pass "auto" or a path of a checkpoint.')
    reads = not _is_sharded(engine)
    return fitting_state(
        engine,
        lambda: _find_newest(engine.listeners.callbacks, reads) if resume == "auto" else _find_at(Path(resume), reads),
    )


def fitting_state(engine: Engine, find: Callable[[], Found | None]) -> Found | None:
    """Return the state that ``find()`` returns on rank 0, in the present format; handlers are told of it.

    Raises:
        CheckpointError: if it is of another format, or does not fit the parts that the engine has.
    """
    found = _found_by_main(engine, find)
    if found is not None:
        state, source = found
        state = _in_present_format(state, source)
        _check_shape(state, source)
        if _is_sharded(engine):
            state = state | {"callbacks": read_whole(state["callbacks"])}  # they may keep what they like
        _check_fit(engine, state, source, is_complete=False)
        saved = state["callbacks"]
        for name, callback in named_callbacks(engine.listeners.callbacks).items():
            if name in saved and _is_here(engine, callback):
                callback.before_resume(saved[name])
        found = state, source
    return found


def checkpoints_of(callbacks: Iterable[Callback]) -> CheckpointDirectory | None:
    """Return where a run with these callbacks has its checkpoints; None if it has none."""
    return next((callback.checkpoints for callback in callbacks if callback.checkpoints is not None), None)


def _is_here(engine: Engine, callback: Callback) -> bool:
    """Return whether a callback is attached on this rank."""
    return engine.ranks.is_main or not callback.main_only


def _found_by_main(engine: Engine, find: Callable[[], Found | None]) -> Found | None:
    """Let rank 0 decide which file is meant; the other ranks read that file."""
    found: list[Found | None] = []

    def find_path() -> Path | None:
        found.append(find())
        return None if found[0] is None else found[0][1]

    path = engine.ranks.on_main(find_path)
    if found or path is None:
        return found[0] if found else None
    return load_verified(path, reads=not _is_sharded(engine), looks_at_parts=False), path


def _is_sharded(engine: Engine) -> bool:
    """Return whether ranks hold weights in parts; then what was saved in parts is read when it is needed."""
    return has_shards(parameter for _, parameter in engine.parts.named_parameters())


def _find_newest(callbacks: Iterable[Callback], reads: bool) -> Found | None:
    directory = checkpoints_of(callbacks)
    if directory is None:
        raise ConfigurationError('resume="auto" has nowhere to look. Add RunCheckpoint(directory), or pass a path.')
    return directory.load_newest(reads=reads)


def _find_at(path: Path, reads: bool) -> Found:
    if path.is_file():
        return load_verified(path, reads=reads), path
    found = CheckpointDirectory(path).load_newest(reads=reads)
    if found is None:
        raise ConfigurationError(
            f'There is no checkpoint at {path}. Write resume="auto" to start from the beginning if there is none.'
        )
    return found


def load_state(engine: Engine, state: dict[str, Any], source: Path) -> dict[str, int]:
    """Load ``state`` into what the engine is made of; return its counters, which the engine sets itself.

    Raises:
        CheckpointError: if the file is of another seed or another architecture, or does not hold what it should;
            then all is as it was before.
    """
    _check_fit(engine, state, source, is_complete=True)
    if problems := impossible_values(engine, state, named_callbacks(engine.listeners.callbacks)):
        raise _not_a_checkpoint(source, _first_of(problems))
    try:
        with ExitStack() as undo:
            _load(engine, state, undo)
            undo.pop_all()
    except (CheckpointError, ConfigurationError, MemoryError):
        raise
    except Exception as error:  # of a part or a handler: each has kinds of its own
        raise _not_a_checkpoint(source, repr(error)) from error
    counters: dict[str, int] = state["counters"]
    return counters


def _load(engine: Engine, state: dict[str, Any], undo: ExitStack) -> None:
    """Load everything, the modules last: they were compared, so that no copy of their weights need be kept.

    Args:
        engine: the engine.
        state: the state.
        undo: is given what puts back all that was loaded.
    """
    parts = _stateful_parts(engine)
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    for name in parts.keys() - modules.keys():
        _load_part(name, parts[name], state["parts"][name], undo)
    callbacks, saved = named_callbacks(engine.listeners.callbacks), state["callbacks"]
    is_here = {name: _is_here(engine, callback) for name, callback in callbacks.items()}
    for name in [name for name in callbacks if name in saved and is_here[name]]:
        undo.callback(callbacks[name].load_state_dict, callbacks[name].state_dict())
        callbacks[name].load_state_dict(saved[name])
    record = engine.stages["train"]
    undo.callback(record.reset)
    _load_record(engine, [rank["train"] for rank in state["ranks"]], record)
    undo.callback(engine.update.reset)
    engine.update.load_state_dict(state["update"])
    undo.callback(engine.history.load_state_dict, engine.history.state_dict())
    engine.history.load_state_dict(state["history"])
    engine.run.load_state_dict(state["run"], record, state["counters"]["step"])
    _load_position(engine, state["ranks"])
    undo.callback(set_rng_state, rng_state())
    _load_rng(engine, state["ranks"], state["counters"]["step"])
    for name, module in modules.items():
        bare = unwrap(module)
        bare.load_state_dict(like_module(state["parts"][name], bare))
    if missing := sorted(callbacks.keys() - saved.keys()):
        logger.warning("There is no state of: %s. They start from the beginning.", ", ".join(missing))
    if extra := sorted(saved.keys() - callbacks.keys()):
        logger.warning("There is state of handlers that are not attached now: %s.", ", ".join(extra))


def _load_record(engine: Engine, states: list[dict[str, Any]], record: Record) -> None:
    """Load this rank's open averages and metrics; of another number of ranks, all are put together on the first."""
    if engine.ranks.data_world == len(states):
        record.load_state_dict(states[engine.ranks.data_rank], engine.parts.device)
    elif engine.ranks.data_rank == 0:
        record.load_state_dict(record.merged(states), engine.parts.device)
    else:
        record.reset()
        record.expect(states[0]["meters"])


def _load_position(engine: Engine, states: list[dict[str, Any]]) -> None:
    """Load this rank's position in the data; in data that are divided, it is the same on all."""
    ranks = engine.ranks
    rank = ranks.data_rank if ranks.data_world == len(states) or not ranks.divides else 0
    engine.run.feed.load_state_dict(states[rank]["data"] if rank < len(states) else None)


def _load_rng(engine: Engine, states: list[dict[str, Any]], step: int) -> None:
    """Load this rank's random numbers; those of a rank that the saved run did not have begin at what the seed says."""
    if engine.ranks.data_rank < len(states):
        set_rng_state(states[engine.ranks.data_rank]["rng"])
    else:
        seed_everything(engine.ranks.seed(engine.seed or 0, step))


def _load_part(name: str, part: Any, saved: Any, undo: ExitStack) -> None:
    """Load a part that is not a module."""
    earlier = part.state_dict()
    if not isinstance(part, torch.optim.Optimizer):
        earlier = copy.deepcopy(earlier)
    undo.callback(part.load_state_dict, earlier)  # an optimizer takes the same tensors back
    part.load_state_dict(like_optimizer(saved, part) if isinstance(part, torch.optim.Optimizer) else saved)
    if isinstance(part, torch.optim.Optimizer) and (error := trial_step(part, earlier["param_groups"])):
        raise TypeError(f"{name} could not step: {error!r}") from error


def _not_a_checkpoint(source: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{source} does not hold what a checkpoint holds: {why}. Use another checkpoint; nothing was loaded."
    )


def named_callbacks(callbacks: Iterable[Callback]) -> dict[str, Callback]:
    """Return the callbacks by class name, numbered from the second of a class on."""
    named: dict[str, Callback] = {}
    for callback in callbacks:
        name, number = type(callback).__name__, 1
        while (key := name if number == 1 else f"{name}-{number}") in named:
            number += 1
        named[key] = callback
    return named


def _in_present_format(state: dict[str, Any], source: Path) -> dict[str, Any]:
    try:
        present: dict[str, Any] = migrated(state)
    except CheckpointError as error:
        raise CheckpointError(f"{source} cannot be resumed. {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _not_a_checkpoint(source, f"as one of format {state['format']} it has an error, {error!r}") from error
    return present


def _check_shape(state: object, source: Path) -> None:
    """Refuse a file that does not hold what a checkpoint holds."""
    problems = _differences(state, SHAPE, "state")
    if not problems and isinstance(state, dict):
        for name in ("callbacks", "ranks"):
            problems += _differences_within(state[name], name)
    if problems:
        raise _not_a_checkpoint(source, _first_of(problems))


def _differences_within(states: dict[str, Any] | list[Any], name: str) -> list[str]:
    """Return, in words, which of the states of callbacks, or of ranks, are not of their shape."""
    if not states and isinstance(states, list):
        return [f"state['{name}'] is empty"]
    numbered = dict(enumerate(states)) if isinstance(states, list) else states
    shapes = dict.fromkeys(numbered, _RANK if isinstance(states, list) else dict)
    return _differences(numbered, shapes, f"state['{name}']")


def _differences(value: object, shape: Any, name: str) -> list[str]:
    """Return, in words, where a value has other keys or types than it should."""
    if not isinstance(shape, dict):
        return [] if type(value) in (shape if isinstance(shape, tuple) else (shape,)) else [f"{name} is {value!r:.50}"]
    if not isinstance(value, dict):
        return [f"{name} is {value!r:.50}"]
    wrong = [f"{name} has no {key}" for key in shape.keys() - value.keys()]
    wrong += [f"{name} has an unknown {key}" for key in value.keys() - shape.keys()]
    for key in shape.keys() & value.keys():
        wrong += _differences(value[key], shape[key], f"{name}[{key!r}]")
    return wrong


def _check_fit(engine: Engine, state: dict[str, Any], source: Path, *, is_complete: bool) -> None:
    """Refuse a checkpoint of another seed, of other parts or of other architectures.

    Before a run begins, its parts may not be complete: a schedule or an average are made when it begins.
    """
    if state["seed"] != engine.seed or state["seed_version"] != SEED_VERSION:
        raise CheckpointError(
            f"{source} was written with seed={state['seed']} (version {state['seed_version']}), and this run has "
            f"seed={engine.seed} (version {SEED_VERSION}): its data would come in another order. Pass the same seed."
        )
    _check_position(engine.ranks, state["ranks"], source)
    parts, saved = _stateful_parts(engine), state["parts"]
    problems = [f"part {name} is missing in the file" for name in parts.keys() - saved.keys()]
    if is_complete:
        problems += [f"part {name} is unknown to this run" for name in saved.keys() - parts.keys()]
    for name in parts.keys() & saved.keys():
        problems += [f"{name}: {problem}" for problem in _part_differences(parts[name], saved[name])]
    if problems:
        raise CheckpointError(
            f"{source} does not fit this run: {_first_of(problems)}. "
            "Build the parts as they were when it was written; nothing was loaded."
        )


def _check_position(ranks: Ranks, states: list[dict[str, Any]], source: Path) -> None:
    """Refuse a checkpoint within a pass over data of the ranks' own, if this run has other ranks or other data.

    Of a file of format 6, which does not say whose the data were, they are taken for divided ones.
    """
    passes = [one for rank in states if isinstance(one := (rank["data"] or {}).get("pass"), dict)]
    was_own, is_own = any(one.get("has_ended") is not None for one in passes), not ranks.divides
    if passes and (was_own != is_own or (is_own and ranks.data_world != len(states))):
        raise CheckpointError(
            f"{source} lies within a pass over the data of {_in_words(len(states), was_own)}, and this run has "
            f"{_in_words(ranks.data_world, is_own)}. "
            "Use as many ranks with their data, or a checkpoint between two passes, as at the end of an epoch."
        )


def _in_words(num_ranks: int, have_own_data: bool) -> str:
    return f"{num_ranks} rank{'s' * (num_ranks > 1)}{', each with its own' * have_own_data}"


def _first_of(problems: list[str]) -> str:
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    return "; ".join(sorted(problems)[:5]) + more


def _part_differences(part: Any, saved: Any) -> list[str]:
    if isinstance(part, nn.Module):
        if not isinstance(saved, Mapping):
            return ["it is not the state of a module"]
        return weight_differences(_unwrapped(part), saved)
    if isinstance(part, torch.optim.Optimizer):
        if not _has_groups(saved):
            return ["it is not the state of an optimizer"]
        ours = [len(group["params"]) for group in part.param_groups]
        theirs = [len(group["params"]) for group in saved["param_groups"]]
        return [] if ours == theirs else [f"groups of {theirs} parameters, and this run's are {ours}"]
    return []


def _has_groups(saved: Any) -> bool:
    groups = saved.get("param_groups") if isinstance(saved, Mapping) else None
    return isinstance(groups, list) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups
    )


def _stateful_parts(engine: Engine) -> dict[str, Any]:
    """Return the parts that have a state; a loss without parameters and buffers has none worth keeping."""
    stateful = engine.parts.stateful().items()
    return {name: part for name, part in stateful if not isinstance(part, nn.Module) or part.state_dict()}


def _unwrapped(part: Any) -> Any:
    return unwrap(part) if isinstance(part, nn.Module) else part
