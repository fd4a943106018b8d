"""CSV files that grow with a run."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from camshaft.engine import write_durably

from .appending import append, cut

FORMULA = ("=", "+", "-", "@")  # how one begins


class RowsFile:
    """A CSV file to which new rows are appended, so that an epoch costs the same however many came before it.

    The first rows of a run replace the file, because a resumed run may begin before the last rows of the earlier one;
    so do rows with a new column, or after a failure.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: list[str] = []
        self._num_rows: int | None = None  # None: the file is still to be written as a whole

    @property
    def has_rows(self) -> bool:
        """Whether this run has written any."""
        return bool(self._num_rows)

    def update(self, rows: list[dict[str, float]]) -> None:
        """Write those of the rows that are not in the file yet.

        Raises:
            OSError: if that fails; the next call writes the whole file.
        """
        written, self._num_rows = self._num_rows, None
        if written is None or any(row.keys() - self._columns for row in rows[written:]):
            self._columns = list(dict.fromkeys(column for row in rows for column in row))
            text = _as_csv(self._columns, [_head(self._columns), *rows])
            write_durably(self.path, lambda file: file.write(text.encode()))
        else:
            append(self.path, _as_csv(self._columns, rows[written:]).encode())
        self._num_rows = len(rows)


def _is_before(step: int, line: bytes) -> bool:
    number = line.split(b",", 2)[1:2]
    return bool(number) and number[0].isdigit() and int(number[0]) < step


def _head(columns: Iterable[str]) -> dict[str, str]:
    """Return the first line. What a spreadsheet would take for a formula begins with an apostrophe there.

    >>> _head(["loss", "=1+1"])
    {'loss': 'loss', '=1+1': "'=1+1"}
    """
    return {name: f"'{name}" if name.startswith(FORMULA) else name for name in columns}


def _as_name(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA) else cell


def _as_csv(columns: list[str], rows: Sequence[Mapping[str, object]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()


class StepsFile:
    """A CSV file of the values of steps, in the order of the steps; only what it has is kept, not the rows.

    The first row of a run drops what an earlier run, that was killed and is resumed, has written from that step on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: list[str] | None = None  # None: the file has not been looked at since the run began

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row, whose first two columns are ``epoch`` and ``step``.

        Raises:
            OSError: if that fails; the next row looks at the file anew.
        """
        columns, self._columns = self._columns, None
        if columns is None:
            columns = self._columns_before(int(row["step"]))
        if new := [name for name in row if name not in columns]:
            columns = columns + new
            self._write_with(columns)
        append(self.path, _as_csv(columns, [row]).encode())
        self._columns = columns

    def _columns_before(self, step: int) -> list[str]:
        """Cut the file before the first row of ``step`` or a later one, or a broken one; return its columns."""
        if not self.path.exists():
            return []
        with open(self.path, "r+b") as file:
            columns = [_as_name(cell) for cell in next(csv.reader([file.readline().decode()]), [])]
            cut(file, lambda line: _is_before(step, line))
        return columns

    def _write_with(self, columns: list[str]) -> None:
        """Write the file anew, with more columns."""
        rows: list[dict[str, str]] = []
        if self.path.exists():
            with open(self.path, encoding="utf-8", newline="") as file:
                lines = csv.reader(file)
                names = [_as_name(cell) for cell in next(lines, [])]
                rows = [dict(zip(names, line, strict=True)) for line in lines]
        text = _as_csv(columns, [_head(columns), *rows])
        write_durably(self.path, lambda file: file.write(text.encode()))
