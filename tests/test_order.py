from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from camshaft.engine import ConfigurationError, DataError, Engine, repeat
from camshaft.engine.order import check_data, num_batches


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield from range(6)


def idle(engine: Engine, batch: Any) -> None:
    """Do nothing with a batch."""


def test_a_loader_of_unknown_length_runs() -> None:
    data = DataLoader(Stream(), batch_size=2)
    assert num_batches(data) is None
    engine = Engine(idle)
    engine.fit(data, epochs=2)
    assert engine.step == 6


def test_a_function_that_returns_batches_is_called_for_each_epoch() -> None:
    engine = Engine(idle)
    engine.fit(lambda: iter([1, 2]), epochs=3)
    assert engine.step == 6


def test_a_used_up_generator_is_refused_at_its_second_epoch() -> None:
    engine = Engine(idle)
    with pytest.raises(DataError, match=r"used up.*a function that returns it"):
        engine.fit(iter([1, 2]), epochs=2)
    assert engine.step == 2


@pytest.mark.parametrize("data", [[], DataLoader(TensorDataset(torch.zeros(3)), batch_size=4, drop_last=True)])
def test_empty_data_are_refused_before_the_run(data: Any) -> None:
    with pytest.raises(DataError, match="without a single batch"):
        Engine(idle).fit(data, epochs=1)
    with pytest.raises(DataError, match=r"^val is"):
        Engine(idle).fit([1], data, epochs=1)


@pytest.mark.parametrize("data", [3, "batches", None, b"x"])
def test_what_is_no_data_is_refused(data: Any) -> None:
    with pytest.raises(ConfigurationError, match="not an iterable of batches"):
        check_data("train", data)


def test_data_that_end_early_say_how_far_they_reach() -> None:
    with pytest.raises(
        DataError, match=r"Data ended after 7 steps of epoch 1, but epoch_length=10. Pass epoch_length=7"
    ):
        Engine(idle).fit(range(7), epochs=1, epoch_length=10)


def test_repeat_begins_a_fresh_pass_each_time() -> None:
    engine = Engine(idle)
    engine.fit(repeat(lambda: iter([1, 2, 3])), epochs=2, epoch_length=5)
    assert engine.step == 10
    with pytest.raises(DataError, match="without a single batch"):
        repeat([])
