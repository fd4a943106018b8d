from __future__ import annotations

import math

import numpy as np
import pytest

from camshaft.engine import Engine, History


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


def test_validations_in_mid_epoch_are_all_kept_with_their_steps_and_drawn_over_steps() -> None:
    values = iter([9.0, 3.0, 9.0, 9.0, 1.0, 9.0])

    def step(engine: Engine, batch: int) -> None:
        engine.record(loss=next(values), weight=1)

    engine = Engine(step)
    engine.fit([1, 2, 3, 4], [0], epochs=1, validate_every="2 steps")
    assert [(row["step"], row["val_loss"]) for row in engine.history.validations] == [(2, 9.0), (4, 9.0)]
    (axes,) = engine.history.plot("loss").axes
    assert axes.get_xlabel() == "step"


def test_a_history_round_trips_through_its_state() -> None:
    copy = History()
    copy.load_state_dict(history().state_dict())
    assert copy.rows == history().rows
