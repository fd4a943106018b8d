"""Whether the values of a saved state can be those of a run: asked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from .parameters import parameters_of
from .rng import preserve_rng, set_rng_state
from .run import Phase
from .table import unpack
from .window import MAIN, TOGETHER

if TYPE_CHECKING:
    from .callback import Callback
    from .engine import Engine

_POSITION = {"epoch", "consumed", "rng", "own", "has_ended"}


def impossible_values(engine: Engine, state: dict[str, Any], callbacks: Mapping[str, Callback]) -> list[str]:
    """Return, in words, which values of a state no run of this engine has saved.

    Args:
        engine: the engine that resumes.
        state: its entries are of the right types.
        callbacks: the engine's, by the names in the state.
    """
    return [
        *_in_run(state["run"], state["counters"]),
        *(problem for rank in state["ranks"] for problem in _in_data(rank["data"], state["counters"]["step"])),
        *(f"update: {problem}" for problem in _in_update(engine, state["update"])),
        *(f"train: {problem}" for rank in state["ranks"] for problem in _in_record(engine, rank["train"])),
        *(f"history: {name} cannot be read" for name in state["history"] if not _is_readable(state["history"][name])),
        *_in_callbacks(callbacks, state["callbacks"]),
        *_in_schedulers(engine, state["parts"]),
        *("rng: its generators cannot be set" for rank in state["ranks"] if not _can_be_set(rank["rng"])),
    ]


def _in_run(run: dict[str, Any], counters: dict[str, int]) -> Iterator[str]:
    numbers = counters | {
        name: run[name] for name in ("num_passes", "num_validated", "num_skipped_batches", "first_epoch", "first_step")
    }
    yield from (f"{name} is {number:.6g}" for name, number in numbers.items() if not 0 <= number < 2**63)
    if not run["first_epoch"] <= counters["epoch"]:
        yield f"first_epoch is {run['first_epoch']:.6g}, in epoch {counters['epoch']:.6g}"
    if not run["first_step"] <= run["step_before_epoch"] <= counters["step"]:
        yield f"step_before_epoch is {run['step_before_epoch']:.6g}, at step {counters['step']:.6g}"
    if run["epoch_length"] is not None and not 0 < run["epoch_length"] < 2**63:
        yield f"epoch_length is {run['epoch_length']:.6g}"
    if run["phase"] not in list(Phase):
        yield f"phase is {run['phase']:.6g}"
    if not all(isinstance(name, str) and _is_value(value) for name, value in run["last_validation"].items()):
        yield "last_validation holds what is not a value"
    yield from (f"{name} is {limit:.6g}" for name, limit in run["plan"].items() if limit is not None and limit < 0)


def _is_value(value: object) -> bool:
    return isinstance(value, Tensor) or _is_number(value)


def _is_number(value: Any) -> bool:
    """Return whether a value is a float, which may be NaN, or an integer that fits into one of the hardware's."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _in_data(data: Any, step: int) -> Iterator[str]:
    if data is None:
        return
    if data.keys() != {"loader", "pass"} or not _is_loader(data["loader"]):
        yield "data: it is not a position"
        return
    position = data["pass"]
    if position is None:
        return
    if not isinstance(position, dict) or position.keys() != _POSITION:
        yield "data: pass is not a position"
    elif type(position["epoch"]) is not int or type(position["consumed"]) is not int:
        yield "data: its counters are not whole numbers"
    elif type(position["has_ended"]) not in (bool, NoneType):
        yield "data: whether they have ended is not known"
    elif not 0 <= position["consumed"] <= step or not 0 <= position["epoch"] < 2**63:
        yield f"data: {position['consumed']:.6g} batches of epoch {position['epoch']:.6g} at step {step:.6g}"
    elif not _can_be_set(position["rng"]) or not _is_loader(position["rng"].get("loader")):
        yield "data: its generators cannot be set"


def _is_loader(state: Any) -> bool:
    if (
        not isinstance(state, dict)
        or state.keys() != {"generators", "epochs"}
        or not isinstance(state["epochs"], list)
    ):
        return False
    return _are_generators(state["generators"]) and all(one is None or type(one) is int for one in state["epochs"])


def _are_generators(states: object) -> bool:
    if not isinstance(states, list):
        return False
    try:
        for state in states:
            torch.Generator().set_state(state)
    except (RuntimeError, TypeError):
        return False
    return True


def _can_be_set(rng: Any) -> bool:
    with preserve_rng():
        try:
            set_rng_state(rng)
        except Exception:  # each of the libraries has kinds of its own
            return False
    return True


def _in_update(engine: Engine, update: dict[Any, Any]) -> Iterator[str]:
    for name, saved in update.items():
        if not isinstance(saved, dict) or saved.keys() != {"window", "grads", "scaler"}:
            yield f"{name!r:.50} has no window"
        elif not _is_window(saved["window"], is_open=saved["grads"] is not None):
            yield f"the window of {name} is {saved['window']!r:.50}"
        elif saved["grads"] is not None and not _fit(saved["grads"], _optimizers(engine, name)):
            yield f"the gradients of {name} are not those of its parameters"
        elif name != MAIN and not _optimizers(engine, name):
            yield f"{name!r:.50} is not an optimizer of this run"
    own = engine.update.scaler
    saved = update.get(MAIN)
    scaler = saved.get("scaler") if isinstance(saved, dict) else None
    if own is not None and scaler is not None and not _is_alike(scaler, own.state_dict()):
        yield "the loss scaler's state is not one"


def _is_window(window: object, *, is_open: bool) -> bool:
    if not isinstance(window, list) or len(window) != 3 or not all(map(_is_number, window)):
        return False
    batches, *samples = window
    are_counts = type(batches) is int and all(0 <= one < math.inf for one in window)
    return are_counts and bool(batches) == is_open and (not is_open or samples[1] > 0)


def _optimizers(engine: Engine, key: object) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a window; none if one of them is not there."""
    known = engine.parts.optimizers()
    names = key.split(TOGETHER) if isinstance(key, str) else []
    return [known[name] for name in names] if known.keys() >= set(names) else []


def _fit(grads: Any, optimizers: list[torch.optim.Optimizer]) -> bool:
    parameters = [parameter for optimizer in optimizers for parameter in parameters_of(optimizer)]
    return isinstance(grads, list) and len(grads) == len(parameters) and all(
        grad is None or (isinstance(grad, Tensor) and (grad.shape, grad.dtype) == (parameter.shape, parameter.dtype))
        for grad, parameter in zip(grads, parameters, strict=True)
    )  # fmt: skip


def _in_record(engine: Engine, record: dict[str, Any]) -> Iterator[str]:
    for name, meter in record["meters"].items():
        if not isinstance(name, str) or not _are_totals(meter, 3):
            yield f"{name!r:.50} is not an average"
    for name, totals in record["earlier"].items():
        if name not in record["meters"] or not _are_totals(totals, 2):
            yield f"{name!r:.50} is not the earlier part of an average"
    for name, metric in engine.stages["train"].computed.items():
        saved = record["metrics"].get(name)
        if saved is not None and not (_is_metric(saved) and _is_alike(saved, metric.state_dict() | {"updated": True})):
            yield f"the metric {name} has another state"


def _are_totals(values: object, num: int) -> bool:
    return isinstance(values, list | tuple) and len(values) == num and all(map(_is_total, values))


def _is_total(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.is_floating_point()
    return _is_number(value)


def _is_metric(saved: Any) -> bool:
    return isinstance(saved, dict) and saved.keys() == {"updated", "states"} and isinstance(saved["states"], list)


def _is_readable(value: dict[str, Any] | list[Any]) -> bool:
    """Return whether this is a table, or a list of names or remarks."""
    return _is_table(value) if isinstance(value, dict) else all(_is_name(one) or _is_remark(one) for one in value)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_remark(value: object) -> bool:
    kinds = {"epoch": int, "step": int, "text": str}
    return isinstance(value, dict) and {name: type(one) for name, one in value.items()} == kinds


def _is_table(table: dict[str, Any]) -> bool:
    columns, values, present = table["columns"], table["values"], table["present"]
    shape = (len(values) if values.ndim else 0, len(columns))
    are_named = all(isinstance(name, str) for name in columns) and len(set(columns)) == len(columns)
    if not are_named or (tuple(values.shape), tuple(present.shape)) != (shape, shape):
        return False
    if (values.dtype, present.dtype) != (torch.float64, torch.bool):
        return False
    try:
        return all({"epoch", "step"} <= row.keys() for row in unpack(table))
    except (OverflowError, ValueError):  # a NaN in a column of whole numbers
        return False


def _in_callbacks(callbacks: Mapping[str, Callback], saved: dict[Any, Any]) -> Iterator[str]:
    for name in saved:
        if not isinstance(name, str):
            yield f"{name!r:.50} is not the name of a handler"
    for name, callback in callbacks.items():
        is_ours = type(callback).__module__.startswith("camshaft.")  # others may keep what they like
        if is_ours and name in saved and not _is_alike(saved[name], callback.state_dict(), lists_grow=True):
            yield f"the state of {name} is not one"


def _in_schedulers(engine: Engine, parts: dict[str, Any]) -> Iterator[str]:
    for name, part in engine.parts.items():
        if not isinstance(part, LRScheduler):
            continue
        saved = parts[name]
        if not isinstance(saved, dict) or not _is_alike(saved, part.state_dict()):
            yield f"the state of {name} is not one"
        elif hidden := [key for key in saved if callable(getattr(type(part), str(key), None))]:
            yield f"the state of {name} has an unknown {hidden[0]}"  # it would take the place of the method


def _is_alike(saved: Any, own: Any, *, lists_grow: bool = False) -> bool:
    """Return whether a value is of the kind of our own, which may be None where nothing is known yet.

    Args:
        saved: the value.
        own: our own.
        lists_grow: whether lists may be of another length than ours, which are those of another moment.
    """
    if own is None or (saved is None and isinstance(own, dict)):
        return True
    if isinstance(own, dict):
        return isinstance(saved, dict) and all(
            key in saved and _is_alike(saved[key], own[key], lists_grow=lists_grow) for key in own
        )
    if isinstance(own, Tensor):
        return isinstance(saved, Tensor) and own.dtype == saved.dtype and (own.numel() < 2 or own.shape == saved.shape)
    if isinstance(own, list | tuple):
        fits = isinstance(saved, list | tuple) and (not own or lists_grow or len(saved) == len(own))
        return fits and all(_is_alike(one, ours, lists_grow=lists_grow) for one, ours in zip(saved, own, strict=False))
    if isinstance(own, float):
        return _is_number(saved)
    if type(own) is int:
        return type(saved) is int and _is_number(saved)
    return type(saved) is type(own)
