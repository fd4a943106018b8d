"""Rows of numbers as tensors: what a checkpoint holds of a history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

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
        if len(rows) < self._num_rows or any(row.keys() - self._columns for row in rows[self._num_rows :]):
            self._columns = list(dict.fromkeys(name for row in rows for name in row))
            self._num_rows = 0
        self._make_room(len(rows))
        for number, row in enumerate(rows[self._num_rows :], start=self._num_rows):
            self._present[number] = torch.tensor([name in row for name in self._columns])
            self._values[number] = torch.tensor([row.get(name, 0.0) for name in self._columns], dtype=torch.float64)
        self._num_rows = len(rows)
        return {
            "columns": list(self._columns),
            "values": self._values[: self._num_rows].clone(),
            "present": self._present[: self._num_rows].clone(),
        }

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
    columns, rows = packed["columns"], []
    for values, present in zip(packed["values"].tolist(), packed["present"].tolist(), strict=True):
        row = {name: value for name, value, is_there in zip(columns, values, present, strict=True) if is_there}
        rows.append({name: int(value) if name in COUNTS else value for name, value in row.items()})
    return rows
