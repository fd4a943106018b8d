"""Rows as tensors: what comes out of a checkpoint is what went in, and each row is packed once."""

from __future__ import annotations

import math
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from camshaft.engine.table import Table, unpack

ROWS: list[dict[str, float]] = [
    {"epoch": 1, "step": 2**40, "train_loss": 0.1},
    {"epoch": 2, "step": 4, "train_loss": math.inf, "val_loss": -0.0},
    {"epoch": 3, "step": 6, "val_loss": 1e-300},
]


@pytest.mark.parametrize("sizes", [[0], [3], [1, 2, 3], [2, 2, 3], [3, 1], [1, 0, 3]])
def test_whatever_was_packed_before_the_rows_come_out_as_they_went_in(sizes: list[int]) -> None:
    """With their whole numbers, missing values and columns that come later; also if there are fewer than before."""
    table = Table()
    for size in sizes:
        assert unpack(table.pack(ROWS[:size])) == ROWS[:size]


def test_nan_is_a_value_and_not_a_missing_one() -> None:
    (row,) = unpack(Table().pack([{"epoch": 1, "loss": math.nan}]))
    assert list(row) == ["epoch", "loss"]
    assert math.isnan(row["loss"])


def test_a_row_is_packed_once() -> None:
    """So a save looks only at the rows that are new."""

    class Counted(dict[str, float]):
        looks = 0

        def get(self, *key: Any) -> Any:
            Counted.looks += 1
            return super().get(*key)

    table, rows = Table(), [Counted(epoch=number, loss=0.5) for number in range(100)]
    table.pack(rows)
    looks = Counted.looks
    for _ in range(10):
        table.pack(rows)
    assert Counted.looks == looks
    table.pack([*rows, Counted(epoch=100, loss=0.5)])
    assert Counted.looks == looks + 2


def test_what_was_packed_does_not_change_with_later_rows() -> None:
    """As a checkpoint that is written in the background needs it."""
    table = Table()
    first = table.pack(ROWS[:1])
    table.pack(ROWS)
    assert unpack(first) == ROWS[:1]


def test_packing_many_rows_makes_no_tensor_for_each() -> None:
    """Ten times as many rows need the same number of tensor operations, both to pack and to unpack."""

    class Operations(TorchDispatchMode):
        num = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.num += 1
            return func(*args, **(kwargs or {}))

    nums: list[int] = []
    for num_rows in (50, 500):
        rows: list[dict[str, float]] = [{"epoch": number, "loss": 0.5} for number in range(num_rows)]
        with Operations() as operations:  # type: ignore[no-untyped-call]  # not in torch's types
            assert unpack(Table().pack(rows)) == rows
        nums.append(operations.num)
    assert nums[0] == nums[1]
