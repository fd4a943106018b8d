from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from camshaft.engine import ConfigurationError, Engine, History


def history() -> History:
    made = History()
    made.add_epoch(1, 4, {"train_loss": 0.5})
    made.add_validation(2, 8, {"val_loss": 0.6})
    made.add_epoch(2, 8, {"train_loss": 0.4, "val_loss": 0.6})
    return made


def test_a_column_has_one_float_per_epoch_and_nan_where_nothing_was_measured() -> None:
    assert history()["train_loss"] == [0.5, 0.4]
    assert math.isnan(history()["val_loss"][0])
    assert list(history()) == ["epoch", "step", "train_loss", "val_loss"]


def test_an_unknown_column_is_refused_with_a_guess() -> None:
    with pytest.raises(KeyError, match=r'no column "val_los".*Did you mean "val_loss"'):
        history()["val_los"]
    with pytest.raises(KeyError, match='no curve "los"'):
        history().plot("los")


def test_the_frame_has_a_row_per_epoch() -> None:
    frame = history().to_frame()
    assert list(frame.columns) == list(history())
    assert frame["train_loss"].tolist() == [0.5, 0.4]
    assert frame["val_loss"].isna().tolist() == [True, False]


def test_the_plot_has_one_panel_per_value_with_the_history_in_it() -> None:
    figure = history().plot()
    (axes,) = figure.axes
    train, val = axes.lines
    assert axes.get_title() == "loss"
    assert np.asarray(train.get_ydata()).tolist() == [0.5, 0.4]
    assert np.asarray(val.get_xdata()).tolist() == [2]


def by_steps(values: dict[int, float], *, steps: int, every: int, epoch_length: int | None = None) -> Engine:
    """A run whose loss in step n is ``values[n]``, or n itself, with batches of n samples; each validation gives 9."""

    def step(engine: Engine, batch: int) -> None:
        loss = values.get(engine.step, float(engine.step)) if engine.training else 9.0
        engine.record(loss=loss, weight=engine.step)

    engine = Engine(step)
    engine.fit(range(100), [0], max_steps=steps, epoch_length=epoch_length, validate_every=f"{every} steps")
    return engine


def test_a_validation_in_mid_epoch_has_the_training_averages_since_the_one_before() -> None:
    """Weighted by samples: after steps 1 and 2, then 3 and 4, though all are of one epoch with one row."""
    history = by_steps({}, steps=4, every=2).history
    expected = [(2, (1 * 1 + 2 * 2) / 3), (4, (3 * 3 + 4 * 4) / 7)]
    assert [(row["step"], row["train_loss"]) for row in history.validations] == expected
    assert [row["val_loss"] for row in history.validations] == [9.0, 9.0]
    assert history["train_loss"] == [30 / 10]


def test_training_averages_of_a_validation_begin_anew_with_the_epoch() -> None:
    history = by_steps({}, steps=6, every=2, epoch_length=3).history
    assert [row["train_loss"] for row in history.validations] == [5 / 3, 4.0, (25 + 36) / 11]


def test_a_nan_is_told_of_its_own_stretch_and_of_the_epoch() -> None:
    history = by_steps({2: math.nan}, steps=6, every=2).history
    assert [row["train_loss"] for row in history.validations] == [
        pytest.approx(math.nan, nan_ok=True),
        25 / 7,
        61 / 11,
    ]
    assert math.isnan(history["train_loss"][0])


def test_the_bar_sees_the_whole_epoch_however_often_it_is_validated() -> None:
    seen: list[float] = []

    def step(engine: Engine, batch: float) -> None:
        engine.record(loss=batch, weight=1)
        if engine.training:
            seen.append(engine.current.peek()["train_loss"])

    Engine(step).fit([1.0, 3.0, 8.0], [0.0], epochs=1, validate_every="1 steps")
    assert seen == [1.0, 2.0, 4.0]


def test_epochs_without_validations_between_keep_their_points_beside_those_that_have() -> None:
    engine = Engine(lambda engine, batch: engine.record(loss=1.0, weight=1))
    engine.fit([1, 2], [0], epochs=2)
    engine.fit([1, 2, 3, 4], [0], epochs=1, validate_every="2 steps")
    (axes,) = engine.history.plot("loss").axes
    assert np.asarray(axes.lines[0].get_xdata()).tolist() == [2, 4, 6, 8]


def test_values_recorded_once_in_a_while_are_left_out_where_there_are_none() -> None:
    def step(engine: Engine, batch: int) -> None:
        engine.record(weight=1, **({"rare": 1.0} if engine.step == 1 else {}))

    engine = Engine(step)
    engine.fit(range(4), [0], epochs=1, validate_every="2 steps")
    assert ["train_rare" in row for row in engine.history.validations] == [True, False]


def test_validations_in_mid_epoch_are_drawn_over_steps() -> None:
    (axes,) = by_steps({}, steps=4, every=2).history.plot("loss").axes
    assert axes.get_xlabel() == "step"
    assert [np.asarray(line.get_xdata()).tolist() for line in axes.lines] == [[2, 4], [2, 4]]


def test_the_best_row_is_that_of_the_best_number() -> None:
    made = history()
    for step, loss in ((10, math.nan), (12, 0.3), (14, 0.3), (16, 0.7)):
        made.add_validation(3, step, {"val_loss": loss})
    assert made.best("val_loss", mode="min") == {"epoch": 3, "step": 12, "val_loss": 0.3}
    assert made.best("val_loss", mode="max")["step"] == 16
    assert made.best("train_loss", mode="min") == {"epoch": 2, "step": 8, "train_loss": 0.4, "val_loss": 0.6}


def test_what_has_no_best_is_refused_with_the_reason() -> None:
    with pytest.raises(KeyError, match=r'no value "val_los".*Did you mean "val_loss"'):
        history().best("val_los", mode="min")
    with pytest.raises(ConfigurationError, match=r'mode=\'minimum\'\. Did you mean "min"\?'):
        history().best("val_loss", mode="minimum")  # type: ignore[arg-type]  # the mistake
    made = History()
    made.add_validation(1, 1, {"val_loss": math.nan, "train_loss": 0.5})
    with pytest.raises(KeyError, match=r'no value "train_loss" yet\. Values: none'):
        made.best("train_loss", mode="min")
    with pytest.raises(KeyError, match="has never been a number"):
        made.best("val_loss", mode="min")


def test_a_history_round_trips_through_its_state() -> None:
    copy = History()
    copy.load_state_dict(history().state_dict())
    assert copy.rows == history().rows


def test_training_averages_of_a_validation_begin_anew_with_each_epoch() -> None:
    """They are since the validation before it or the epoch's start, whichever is later."""
    engine = Engine(lambda engine, batch: {"value": engine.step} if engine.training else None)
    engine.fit([torch.zeros(1)] * 3, [torch.zeros(1)], epochs=2, validate_every="2 steps")
    assert [(row["step"], row["train_value"]) for row in engine.history.validations] == [(2, 1.5), (4, 4.0), (6, 5.5)]
