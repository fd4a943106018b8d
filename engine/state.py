"""What a run's state is: everything that decides the rest of the run, as tensors and plain values."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .checkpoint import CheckpointDirectory, bare, check_plain, load_verified, weight_differences
from .errors import CheckpointError, ConfigurationError
from .rng import SEED_VERSION, rng_state, set_rng_state

if TYPE_CHECKING:
    from .callback import Callback
    from .engine import Engine

logger = logging.getLogger("camshaft")

FORMAT = 2
COUNTERS = (
    "epoch", "step", "num_validations", "num_updates", "num_skipped_updates", "first_epoch", "first_step",
    "step_before_epoch", "validated_step", "epoch_is_open", "stop_reason",
)  # fmt: skip


def run_state(engine: Engine) -> dict[str, Any]:
    """Return the engine's state at this moment, which must be Settled.

    Raises:
        CheckpointError: naming the key, if a part or handler keeps what is not safe to load.
    """
    plan = engine.plan
    state = {
        "format": FORMAT,
        "seed": engine.seed,
        "seed_version": SEED_VERSION,
        "torch": str(torch.__version__),
        "plan": {"epochs": plan.epochs, "max_steps": plan.max_steps} if plan else {},
        "counters": {name: getattr(engine, name) for name in COUNTERS},
        "parts": {name: _bare_part(part).state_dict() for name, part in _stateful_parts(engine).items()},
        "update": engine.update.state_dict(),
        "train": engine.stages["train"].state_dict(),
        "newest": engine.newest,
        "history": engine.history.state_dict(),
        "callbacks": {name: callback.state_dict() for name, callback in named_callbacks(engine).items()},
        "data": engine.data_state(),
        "rng": rng_state(),
    }
    check_plain(state, "state")
    return state


def find(engine: Engine, resume: str | Path) -> tuple[dict[str, Any], Path] | None:
    """Return the state to resume from and its file; None if "auto" found none.

    Raises:
        ConfigurationError: if "auto" has nowhere to look, or a path does not exist.
        CheckpointError: if there are files, and none of them is good.
    """
    if resume == "auto":
        if engine.checkpoints is None:
            raise ConfigurationError(
                'resume="auto" has nowhere to look. Add RunCheckpoint(directory), or pass a path.'
            )
        return engine.checkpoints.load_newest()
    path = Path(resume)
    if path.is_file():
        return load_verified(path), path
    found = CheckpointDirectory(path).load_newest()
    if found is None:
        raise ConfigurationError(
            f'There is no checkpoint at {path}. Write resume="auto" to start afresh if there is none.'
        )
    return found


def load_run_state(engine: Engine, state: dict[str, Any], source: Path) -> None:
    """Put the engine into ``state``; the parts are checked before anything is loaded.

    Raises:
        CheckpointError: if the file is of a newer format, another seed, or another architecture.
    """
    _check(engine, state, source)
    for name, part in _stateful_parts(engine).items():
        _bare_part(part).load_state_dict(state["parts"][name])
    for name, value in state["counters"].items():
        setattr(engine, name, value)
    engine.update.load_state_dict(state["update"])
    engine.stages["train"].load_state_dict(state["train"], engine.device)
    engine.newest = dict(state["newest"])
    engine.history.load_state_dict(state["history"])
    callbacks = named_callbacks(engine)
    saved = state["callbacks"]
    for name in callbacks.keys() & saved.keys():
        callbacks[name].load_state_dict(saved[name])
    set_rng_state(state["rng"])
    _tell(
        engine, source, missing=sorted(callbacks.keys() - saved.keys()), extra=sorted(saved.keys() - callbacks.keys())
    )


def named_callbacks(engine: Engine) -> dict[str, Callback]:
    """Return the callbacks by class name, numbered from the second of a class on."""
    named: dict[str, Callback] = {}
    for callback in engine.callbacks:
        name, number = type(callback).__name__, 1
        while (key := name if number == 1 else f"{name}-{number}") in named:
            number += 1
        named[key] = callback
    return named


def _tell(engine: Engine, source: Path, missing: list[str], extra: list[str]) -> None:
    logger.info("Resumed from %s: epoch %d, step %d.", source, engine.epoch, engine.step)
    if missing:
        logger.warning("No state was saved for: %s. They begin anew.", ", ".join(missing))
    if extra:
        logger.warning("State was saved for handlers that are not attached now: %s.", ", ".join(extra))


def _check(engine: Engine, state: dict[str, Any], source: Path) -> None:
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"{source} has format {state['format']}, and this camshaft reads {FORMAT}. "
            "Use the version of camshaft that wrote it."
        )
    if state["seed"] != engine.seed or state["seed_version"] != SEED_VERSION:
        raise CheckpointError(
            f"{source} was written with seed={state['seed']} (version {state['seed_version']}), and this run has "
            f"seed={engine.seed} (version {SEED_VERSION}): its data would come in another order. Pass the same seed."
        )
    problems: list[str] = []
    parts = _stateful_parts(engine)
    problems += [f"part {name} is missing in the file" for name in parts.keys() - state["parts"].keys()]
    problems += [f"part {name} is unknown to this run" for name in state["parts"].keys() - parts.keys()]
    for name in parts.keys() & state["parts"].keys():
        problems += [f"{name}: {problem}" for problem in _part_differences(parts[name], state["parts"][name])]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{source} does not fit this run: {'; '.join(sorted(problems)[:5])}{more}. "
            "Build the parts as they were when it was written; nothing was loaded."
        )


def _part_differences(part: Any, saved: dict[str, Any]) -> list[str]:
    if isinstance(part, nn.Module):
        return weight_differences(_bare_part(part), saved)
    if isinstance(part, torch.optim.Optimizer):
        ours = [len(group["params"]) for group in part.param_groups]
        theirs = [len(group["params"]) for group in saved["param_groups"]]
        return [] if ours == theirs else [f"groups of {theirs} parameters, this run's have {ours}"]
    return []


def _stateful_parts(engine: Engine) -> dict[str, Any]:
    """Return the parts that have a state; a loss without parameters and buffers has none worth keeping."""
    stateful = {
        name: part
        for name, part in engine.parts.items()
        if callable(getattr(part, "state_dict", None)) and callable(getattr(part, "load_state_dict", None))
    }
    return {name: part for name, part in stateful.items() if not isinstance(part, nn.Module) or part.state_dict()}


def _bare_part(part: Any) -> Any:
    return bare(part) if isinstance(part, nn.Module) else part
