"""Early stopping: after which check the run ends, and what it says about it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from helpers import class_batches, make_trainer, refused, run_script
from torch import nn

from camshaft.callbacks import EarlyStopping
from camshaft.engine import CamshaftError, ConfigurationError, Engine, EpochEnd, FitEnd, StepEnd, ValidationEnd

NAN = math.nan
BATCH = torch.zeros(1)


@pytest.mark.parametrize(
    ("values", "patience", "last_epoch"),
    [
        ([3, 2, 1, 1, 1, 1], 2, 5),  # an equal value is no gain
        ([3, 2, 1, 2, 2, 0, 1, 1, 1, 1], 3, 9),  # a gain starts the count again
        ([1, 2, 2], 1, 2),
        ([3, 2, 1], 1, 3),  # better each time: never
        ([1, 2, 3, 4], 5, 4),  # too short to stop
        ([0.0, -1.0, 0.0, 0.0, 0.0], 2, 4),  # zero is a value
        ([NAN, NAN, NAN, 1, 1], 3, 3),  # NaN is never a gain, also not at first
        ([NAN, 5, 4, NAN, NAN, NAN], 3, 6),
        ([3, NAN, 2, NAN, 1, NAN, NAN], 2, 7),  # any number beats NaN before it, by the best number so far
        ([math.inf, 9, 9, 9], 2, 4),
    ],
)
def test_it_stops_after_patience_checks_in_a_row_without_gain(
    values: list[float], patience: int, last_epoch: int
) -> None:
    """The run ends in the epoch of the check that uses up the patience, for min and for max alike."""
    down = run_script(values, EarlyStopping("val_score", "min", patience))
    up = run_script([-value for value in values], EarlyStopping("val_score", "max", patience))
    assert [down.epoch, up.epoch] == [last_epoch, last_epoch]


def test_the_reason_names_the_value_the_checks_and_the_best() -> None:
    """Why a run ended early stands in its history and in FitEnd."""
    engine = run_script([0.5, 0.75, 0.625, 0.75], EarlyStopping("val_score", mode="max", patience=2))
    assert engine.history.reason == ("EarlyStopping: val_score has not improved for 2 checks (best 0.75 at epoch 2)")


def test_a_run_that_was_nan_throughout_says_so() -> None:
    """No best epoch is made up where there never was a number."""
    engine = run_script([NAN, NAN, NAN], EarlyStopping("val_score", mode="max", patience=2))
    assert engine.history.reason == "EarlyStopping: val_score has not improved for 2 checks (NaN so far)"
    assert engine.history["val_score"] == pytest.approx([NAN, NAN], nan_ok=True)


def test_on_nan_stop_ends_the_run_at_the_first_nan() -> None:
    """A run that has diverged need not use up its patience."""
    engine = run_script([3, 2, NAN, 1], EarlyStopping("val_score", "min", patience=5, on_nan="stop"))
    assert engine.epoch == 3
    assert engine.history.reason == "EarlyStopping: val_score is NaN"


@pytest.mark.parametrize(("min_delta", "last_epoch"), [(0.0, 7), (0.125, 7), (0.1875, 4)])
def test_a_gain_of_no_more_than_min_delta_does_not_count(min_delta: float, last_epoch: int) -> None:
    """The gain is measured from the best that counted, so that small ones may add up to one."""
    values = [1.0, 0.9375, 0.875, 0.8125, 0.75, 0.6875, 0.625]
    stopping = EarlyStopping("val_score", "min", patience=3, min_delta=min_delta)
    assert run_script(values, stopping).epoch == last_epoch


@pytest.mark.parametrize(("min_delta", "last_epoch"), [(0.0, 6), (0.2, 6), (0.6, 4)])
def test_a_relative_gain_is_measured_in_the_best_value(min_delta: float, last_epoch: int) -> None:
    """Each value is a quarter less than the one before; the absolute gains get smaller and smaller."""
    values = [0.75**power for power in range(6)]
    stopping = EarlyStopping("val_score", "min", patience=3, min_delta=min_delta, relative=True)
    assert run_script(values, stopping).epoch == last_epoch
    up = EarlyStopping("val_score", "max", patience=3, min_delta=min_delta, relative=True)
    assert run_script([-value for value in values], up).epoch == last_epoch


def test_a_value_as_good_as_the_threshold_ends_the_run() -> None:
    values = [3.0, 2.0, 1.0, 0.5, 0.25]
    down = run_script(values, EarlyStopping("val_score", "min", threshold=1.0))
    up = run_script([-value for value in values], EarlyStopping("val_score", "max", threshold=-1.0))
    assert [down.epoch, up.epoch] == [3, 3]
    assert down.history.reason == "EarlyStopping: val_score is 1, as good as the threshold of 1"


def test_a_value_worse_than_the_divergence_ends_the_run_at_once() -> None:
    values = [3.0, 4.0, 5.0, 5.5, 2.0]
    down = run_script(values, EarlyStopping("val_score", "min", patience=9, divergence=5.0))
    up = run_script([-value for value in values], EarlyStopping("val_score", "max", patience=9, divergence=-5.0))
    assert [down.epoch, up.epoch] == [4, 4]
    assert down.history.reason == "EarlyStopping: val_score is 5.5, worse than 5"


def test_nan_is_neither_as_good_as_a_threshold_nor_worse_than_a_divergence() -> None:
    """What it means is said by on_nan."""
    assert run_script([NAN, NAN, 2.0], EarlyStopping("val_score", "min", threshold=1.0, divergence=5.0)).epoch == 3


def test_nothing_is_checked_before_the_start() -> None:
    """The values of the first epochs count neither as the best nor against the patience, nor for the bounds."""
    values = [0.1, 9.0, 9.0, 3.0, 3.0, 3.0, 3.0]
    stopping = EarlyStopping("val_score", "min", patience=2, start=3, threshold=0.5, divergence=8.0)
    assert run_script(values, stopping).epoch == 6
    assert (stopping.best, stopping.best_epoch) == (3.0, 4)


@pytest.mark.parametrize("setting", [{"threshold": NAN}, {"divergence": "0.5"}, {"start": -1}, {"start": 1.5}])
def test_bounds_and_starts_that_are_none_are_refused(setting: dict[str, Any]) -> None:
    with refused(
        ConfigurationError, f"EarlyStopping has {next(iter(setting))}=" if "start" not in setting else "start"
    ):
        EarlyStopping("val_score", "min", **setting)


def test_each_validation_is_a_check_also_in_mid_epoch() -> None:
    """With validations every 2 steps and patience 2, a value that stays ends the run after the third, at step 6."""
    engine = Engine(lambda engine, batch: {"loss": 1.0}, callbacks=[EarlyStopping("val_loss", "min", patience=2)])
    engine.fit([BATCH] * 10, [BATCH], epochs=5, validate_every="2 steps")
    assert (engine.step, engine.epoch, engine.num_validations) == (6, 1, 3)


def test_a_training_value_is_checked_once_an_epoch() -> None:
    """EarlyStopping works without validation data on a train_* value."""
    engine = Engine(lambda engine, batch: {"loss": 1.0}, callbacks=[EarlyStopping("train_loss", "min", patience=2)])
    engine.fit([BATCH] * 10, epochs=5)
    assert (engine.step, engine.epoch) == (30, 3)


def test_before_min_epochs_it_does_not_stop() -> None:
    """fit(min_epochs=4) runs four epochs, whatever the value does; the next check without gain then stops it."""
    stopping = EarlyStopping("train_loss", mode="min", patience=1)
    engine = Engine(lambda engine, batch: {"loss": 1.0}, callbacks=[stopping])
    engine.fit([BATCH], epochs=9, min_epochs=4)
    assert engine.epoch == 4


def test_the_other_handlers_of_the_last_check_still_run_and_the_epoch_is_completed() -> None:
    """A stop is an intent: who comes after in the list hears the same validation, the epoch's end and the fit's."""
    heard: list[str] = []
    trainer = make_trainer(EarlyStopping("val_loss", patience=1), lr=0.0)
    trainer.subscribe(ValidationEnd, lambda event: heard.append(f"validation {event.engine.epoch}"))
    trainer.subscribe(EpochEnd, lambda event: heard.append(f"epoch {event.engine.epoch}"))
    trainer.subscribe(FitEnd, lambda event: heard.append(event.reason.split(":")[0]))
    history = trainer.fit(class_batches(8), class_batches(8), epochs=5)
    assert heard == ["validation 1", "epoch 1", "validation 2", "epoch 2", "EarlyStopping"]
    assert len(history["val_loss"]) == 2


def test_a_restored_count_goes_on_under_the_settings_of_the_new_run() -> None:
    """State is the best value and the count; the patience is the one that is written now."""
    first = EarlyStopping("val_score", "min", patience=10)
    run_script([1.0, 2.0, 2.0], first)
    state: dict[str, Any] = json.loads(json.dumps(first.state_dict()))
    assert set(state) == {"best", "best_epoch", "num_checks_without_gain"}
    patient, hasty = EarlyStopping("val_score", "min", patience=4), EarlyStopping("val_score", "min", patience=3)
    patient.load_state_dict(state)
    hasty.load_state_dict(state)
    assert run_script([2.0] * 5, patient).epoch == 2
    assert run_script([2.0] * 5, hasty).epoch == 1


def test_state_with_nan_survives_a_checkpoint_file() -> None:
    """Before the first number the best is NaN, and weights_only=True loads it as such."""
    stopping = EarlyStopping("val_score", "min")
    restored = EarlyStopping("val_score", "min")
    restored.load_state_dict(json.loads(json.dumps(stopping.state_dict())))
    assert run_script([5.0, 6.0], restored).epoch == 2
    assert (restored.best, restored.best_epoch, restored.num_checks_without_gain) == (5.0, 1, 1)


def test_two_of_them_watch_independently() -> None:
    """The one whose patience ends first gives the reason."""
    loss, score = EarlyStopping("train_loss", "min", patience=4), EarlyStopping("train_score", "max", patience=2)
    engine = Engine(lambda engine, batch: {"loss": -engine.epoch, "score": 1.0}, callbacks=[loss, score])
    engine.fit([BATCH], epochs=9)
    assert engine.epoch == 3
    assert engine.history.reason.startswith("EarlyStopping: train_score has not improved for 2 checks")
    assert (loss.num_checks_without_gain, loss.best) == (0, -3.0)


def test_a_second_fit_is_not_stopped_by_the_patience_that_the_first_used_up() -> None:
    """Who calls fit again wants to go on: each run has the whole patience, the best value is kept."""
    stopping = EarlyStopping("train_loss", mode="min", patience=2)
    engine = Engine(lambda engine, batch: {"loss": 1.0}, callbacks=[stopping])
    engine.fit([BATCH], epochs=9)
    engine.fit([BATCH], epochs=9)
    assert engine.epoch == 3 + 2


def test_watching_does_not_change_the_weights() -> None:
    """As long as it does not stop, a run with EarlyStopping is the run without it, to the bit."""
    watched, plain = make_trainer(EarlyStopping("val_loss", patience=9)), make_trainer()
    for trainer in (watched, plain):
        trainer.fit(class_batches(8, 8, 3), class_batches(8), epochs=3)
    for mine, other in zip(watched.parts["model"].parameters(), plain.parts["model"].parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    "settings",
    [
        {"patience": 0}, {"patience": -1}, {"patience": 2.5}, {"patience": True}, {"patience": "3"},
        {"min_delta": -0.1}, {"min_delta": NAN}, {"min_delta": math.inf}, {"min_delta": "0.1"}, {"on_nan": "ignore"},
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_at_construction(settings: dict[str, Any]) -> None:
    """With the setting's name in a ConfigurationError."""
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        EarlyStopping("val_loss", "min", **settings)


def test_it_stops_a_loop_of_ones_own() -> None:
    """In the script style the loop over engine.epochs simply ends."""
    engine = Engine(model=nn.Linear(1, 1), callbacks=[EarlyStopping("val_loss", "min", patience=1)])
    epochs = []
    for epoch in engine.epochs(9):
        epochs.append(epoch)
        for _ in engine.train([BATCH] * 3):
            engine.record(loss=1.0)
        for _ in engine.validate([BATCH]):
            engine.record(loss=1.0)
    assert epochs == [1, 2]
    assert engine.history.reason.startswith("EarlyStopping")


def test_a_missing_value_is_an_error_and_not_a_silent_run_to_the_end() -> None:
    """A name that no validation has ends the run at the first one."""
    steps: list[int] = []
    engine = Engine(lambda engine, batch: {"loss": 1.0}, callbacks=[EarlyStopping("val_los", "min")])
    engine.subscribe(StepEnd, lambda event: steps.append(event.engine.step))
    with pytest.raises(CamshaftError, match='Did you mean "val_loss"'):
        engine.fit([BATCH], [BATCH], epochs=9)
    assert steps == [1]


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"monitor": "accuracy"}, "'accuracy', which does not name a stage"),
        ({"monitor": "val_acc", "mode": "minimum"}, "mode='minimum'. Did you mean \"min\"?"),
        ({"monitor": "val_acc", "mode": "auto"}, "mode='auto'"),
        ({"monitor": "val_acc", "patience": -1}, "patience is -1"),
        ({"monitor": "val_acc", "patience": 0}, "patience is 0"),
        ({"monitor": "val_acc", "patience": 1.5}, "patience is 1.5"),
        ({"monitor": "val_acc", "min_delta": -0.1}, "min_delta=-0.1"),
        ({"monitor": "val_acc", "min_delta": math.nan}, "min_delta=nan"),
        ({"monitor": "val_acc", "min_delta": "0.1"}, "min_delta='0.1'"),
        ({"monitor": "val_acc", "on_nan": "ignore"}, "on_nan='ignore'"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_where_it_is_written(settings: dict[str, Any], phrase: str) -> None:
    with refused(ConfigurationError, phrase):
        EarlyStopping(**settings)
