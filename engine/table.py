"""Rows of numbers as tensors: what a checkpoint holds of a history."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

COUNTS = ("epoch", "step")  # whole numbers; all other values are floats


class Table:
    """Rows that are only appended to, packed once each, so that a save costs the same however many came before.

    A row need not have every column.
    """

    def __init__(self) -> None:
        self._columns: list[str] = []
        self._num_rows = 0
        self._values = torch.empty(0, 0, dtype=torch.float64)  # [rows that fit, columns]
        self._present = torch.empty(0, 0, dtype=torch.bool)  # [rows that fit, columns]

    def pack(self, rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """Return the rows as tensors: those of the last call, which are the same, and the new ones.

        >>> packed = Table().pack([{"epoch": 1, "loss": 0.5}, {"epoch": 2}])
        >>> packed["columns"], packed["values"].shape
        (['epoch', 'loss'], torch.Size([2, 2]))
        """
        if len(rows) < self._num_rows or not self._has_columns_of(rows[self._num_rows :]):
            self._columns = list(dict.fromkeys(name for row in rows for name in row))
            self._num_rows = 0
        self._make_room(len(rows))
        new, place = rows[self._num_rows :], slice(self._num_rows, len(rows))
        for number, name in enumerate(self._columns):
            self._present[place, number] = torch.tensor([name in row for row in new], dtype=torch.bool)
            self._values[place, number] = torch.tensor([row.get(name, 0.0) for row in new], dtype=torch.float64)
        self._num_rows = len(rows)
        return {
            "columns": list(self._columns),
            "values": self._values[: self._num_rows].clone(),
            "present": self._present[: self._num_rows].clone(),
        }

    def _has_columns_of(self, rows: Sequence[Mapping[str, float]]) -> bool:
        columns = set(self._columns)
        return all(row.keys() <= columns for row in rows)

    def _make_room(self, num_rows: int) -> None:
        if num_rows <= len(self._values) and len(self._columns) == self._values.shape[1]:
            return
        shape = (2 * num_rows, len(self._columns))
        values, present = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.bool)
        if self._num_rows:  # of the same columns
            values[: self._num_rows] = self._values[: self._num_rows]
            present[: self._num_rows] = self._present[: self._num_rows]
        self._values, self._present = values, present


def unpack(packed: Mapping[str, Any]) -> list[dict[str, float]]:
    """Return the rows that `Table.pack` was given.

    >>> unpack(Table().pack([{"epoch": 1, "loss": 0.5}, {"epoch": 2}]))
    [{'epoch': 1, 'loss': 0.5}, {'epoch': 2}]
    """
    columns: list[str] = packed["columns"]
    by_column = [_as_numbers(name, packed["values"][:, number]) for number, name in enumerate(columns)]
    rows: list[dict[str, float]] = []
    for values, is_there in zip(zip(*by_column, strict=True), packed["present"].tolist(), strict=True):
        row = zip(columns, values, strict=True)
        rows.append(dict(row if all(is_there) else itertools.compress(row, is_there)))
    return rows


def _as_numbers(column: str, values: Tensor) -> list[float]:
    numbers: list[float] = (values.long() if column in COUNTS else values).tolist()
    return numbers
