"""What a checkpoint of a run holds, and that one which holds anything else is refused before it is loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import class_batches, make_trainer, refused
from torch import nn

from camshaft.callbacks import RunCheckpoint
from camshaft.engine import Callback, CheckpointError, Engine, EngineStateError, Settled, run_state
from camshaft.engine.state import SHAPE, named_callbacks
from camshaft.engine.table import unpack

Keys = tuple[str, ...]


def trainer_in(directory: Path) -> Engine:
    return make_trainer(RunCheckpoint(directory))


def saved_state(directory: Path) -> dict[str, Any]:
    """The state of a run of one epoch, and a file of it in the directory."""
    trainer_in(directory).fit(class_batches(4, 4), epochs=1)
    found = RunCheckpoint(directory).checkpoints.load_newest()
    assert found is not None
    return found[0]


def entries(shape: Any = SHAPE, keys: Keys = ()) -> Iterator[Keys]:
    """The place of each entry that a state has, those that hold entries included."""
    if isinstance(shape, dict):
        for key, inner in shape.items():
            yield (*keys, key)
            yield from entries(inner, (*keys, key))


def holders(shape: Any = SHAPE, keys: Keys = ()) -> Iterator[Keys]:
    """The place of each dict whose keys are known."""
    if isinstance(shape, dict):
        yield keys
        for key, inner in shape.items():
            yield from holders(inner, (*keys, key))


def without(*keys: str) -> Callable[[dict[str, Any]], None]:
    def forge(state: dict[str, Any]) -> None:
        del at(state, keys[:-1])[keys[-1]]

    return forge


def with_value(value: Any, *keys: str) -> Callable[[dict[str, Any]], None]:
    def forge(state: dict[str, Any]) -> None:
        at(state, keys[:-1])[keys[-1]] = value

    return forge


def at(state: Any, keys: Keys) -> Any:
    for key in keys:
        state = state[key]
    return state


def assert_refused(directory: Path, forge: Callable[[dict[str, Any]], None], *phrases: str) -> None:
    """Save what was forged, resume from it, and find that nothing was loaded, called or renamed."""
    state = copy.deepcopy(saved_state(directory))
    forge(state)
    RunCheckpoint(directory).checkpoints.save(state, 2)
    files = sorted(directory.iterdir())
    trainer = trainer_in(directory)
    weights, fit = trainer.parts["model"].weight.detach().clone(), trainer.fit
    with refused(CheckpointError, files[-1].name, *phrases):
        trainer.fit(class_batches(4, 4), epochs=2, resume="auto")
    assert torch.equal(trainer.parts["model"].weight, weights)
    assert trainer.fit == fit
    assert (trainer.epoch, trainer.step, trainer.num_updates, trainer.history.rows) == (0, 0, 0, [])
    assert not trainer.parts["optimizer"].state
    assert sorted(directory.iterdir()) == files


def named(keys: Keys) -> str:
    """As a message names the place."""
    return "state" + "".join(f"[{key!r}]" for key in keys)


@pytest.mark.parametrize("keys", list(entries()), ids=".".join)
def test_an_entry_that_is_missing_is_told_by_its_place(keys: Keys, tmp_path: Path) -> None:
    phrase = f"{named(keys[:-1])} has no {keys[-1]}"
    assert_refused(tmp_path, without(*keys), phrase, "nothing was loaded")


@pytest.mark.parametrize("keys", [keys for keys in entries() if keys != ("format",)], ids=".".join)
def test_an_entry_of_another_type_is_told_by_its_place(keys: Keys, tmp_path: Path) -> None:
    assert_refused(tmp_path, with_value(0.5, *keys), f"{named(keys)} is 0.5", "nothing was loaded")


@pytest.mark.parametrize("keys", list(holders()), ids=lambda keys: ".".join(keys) or "state")
def test_an_unknown_entry_is_told_by_its_place(keys: Keys, tmp_path: Path) -> None:
    """A counter named "fit" would otherwise take the place of the method."""
    phrase = f"{named(keys)} has an unknown fit"
    assert_refused(tmp_path, with_value(1, *keys, "fit"), phrase, "nothing was loaded")


@pytest.mark.parametrize("value", [True, "1", None, [1]])
def test_a_counter_is_a_whole_number_and_nothing_that_passes_for_one(value: object, tmp_path: Path) -> None:
    phrase = f"state['counters']['step'] is {value!r}"
    assert_refused(tmp_path, with_value(value, "counters", "step"), phrase)


@pytest.mark.parametrize("value", [99, 0, -1, "3", 0.5, True, None, [1]])
def test_a_file_of_another_format_is_told_to_be_one(value: object, tmp_path: Path) -> None:
    assert_refused_as_format(tmp_path, value)


@pytest.mark.parametrize("value", [1, 2, 3])
def test_a_file_that_only_says_it_is_of_an_older_format_is_refused(value: int, tmp_path: Path) -> None:
    assert_refused(tmp_path, with_value(value, "format"), f"as one of format {value}", "nothing was loaded")


def assert_refused_as_format(directory: Path, value: object) -> None:
    state = saved_state(directory) | {"format": value}
    RunCheckpoint(directory).checkpoints.save(state, 2)
    trainer = trainer_in(directory)
    with refused(CheckpointError, f"has format {value!r}, and this camshaft reads formats up to 7."):
        trainer.fit(class_batches(4, 4), epochs=2, resume="auto")
    assert trainer.step == 0


@pytest.mark.parametrize("state", [[], "state", 3, None])
def test_a_file_that_holds_no_dict_is_refused(state: Any, tmp_path: Path) -> None:
    RunCheckpoint(tmp_path).checkpoints.save(state, 2)
    trainer = trainer_in(tmp_path)
    with refused(CheckpointError, f"state is {state!r}"):
        trainer.fit(class_batches(4, 4), epochs=2, resume="auto")
    assert trainer.step == 0


@pytest.mark.parametrize("garbage", ["garbage", None, [], {}, {"param_groups": {}}, 3])
def test_what_is_no_state_of_an_optimizer_is_refused(garbage: Any, tmp_path: Path) -> None:
    phrase = "optimizer: it is not the state of an optimizer"
    assert_refused(tmp_path, with_value(garbage, "parts", "optimizer"), phrase, "nothing was loaded")


@pytest.mark.parametrize("garbage", [None, "garbage", 3, [], {"weight": 3}])
def test_what_are_no_weights_is_refused(garbage: Any, tmp_path: Path) -> None:
    assert_refused(tmp_path, with_value(garbage, "parts", "model"), "model: ", "nothing was loaded")


@pytest.mark.parametrize("garbage", [None, "garbage", {"params": []}, {"lr": 0.1}])
def test_groups_of_an_optimizer_that_are_none_are_refused(garbage: Any, tmp_path: Path) -> None:
    assert_refused(tmp_path, with_value([garbage], "parts", "optimizer", "param_groups"), "optimizer: ")


def test_no_more_than_five_differences_are_told(tmp_path: Path) -> None:
    def forge(state: dict[str, Any]) -> None:
        state["counters"] = {str(number): number for number in range(3)}

    assert_refused(tmp_path, forge, "; and 3 more. ")


def test_a_state_has_the_shape_that_is_checked(tmp_path: Path) -> None:
    state = saved_state(tmp_path)
    for keys in holders():
        assert at(state, keys).keys() == at(SHAPE, keys).keys()


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = saved_state(tmp_path)
    trainer = trainer_in(tmp_path)
    states: list[dict[str, Any]] = []
    trainer.subscribe(Settled, lambda event: states.append(run_state(trainer)))
    trainer.fit(class_batches(4, 4), epochs=1, resume="auto")  # the run is finished: nothing is left to do
    assert (trainer.epoch, trainer.step, trainer.num_updates) == (1, 2, 2)
    assert trainer.history.rows == unpack(saved["history"]["rows"])
    assert torch.equal(trainer.parts["model"].weight, saved["parts"]["model"]["weight"])
    assert states == []


def test_a_part_without_a_state_is_left_out() -> None:
    states: list[dict[str, Any]] = []
    trainer = make_trainer()
    trainer.parts |= {"note": "a run", "activation": nn.ReLU(), "scale": nn.Linear(1, 1)}
    trainer.subscribe(Settled, lambda event: states.append(run_state(trainer)))
    trainer.fit(class_batches(4), epochs=1)
    assert list(states[0]["parts"]) == ["model", "optimizer", "scale"]


def test_a_state_can_be_taken_only_within_a_run() -> None:
    with refused(EngineStateError, "outside a run"):
        run_state(make_trainer())


class First(Callback): ...


class Second(Callback): ...


def test_callbacks_of_one_class_are_told_apart_by_a_number() -> None:
    callbacks = [First(), Second(), First(), First()]
    assert named_callbacks(callbacks) == dict(zip(["First", "Second", "First-2", "First-3"], callbacks, strict=True))
