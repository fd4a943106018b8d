"""Where two runs part, by their fingerprints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .run import Run

Rows = dict[int, dict[str, Any]]
KINDS = ("data", "loss", "gradients", "weights")  # in the order in which a step computes them

_CAUSES = {
    "data": "The batch is another one: look at the order of the data, the augmentation and the seed.",
    "loss": "The batch is the same and the loss is not: look at the forward pass, its random numbers, and at the "
    "weights before it.",
    "gradients": "Batch and loss are the same and the gradients are not: look at the backward pass, and at algorithms "
    "that are not deterministic.",
    "weights": "Batch, loss and gradients are the same and the weights are not: look at the optimizer, the learning "
    "rate, and at handlers that change weights.",
}


@dataclass(frozen=True, slots=True)
class Difference:
    """The first step with a row in both runs in which they differ.

    Args:
        step: its number; None if no row differs.
        kind: what differs first in it: "data", "loss", "gradients" or "weights".
        names: which tensors of that kind.
        num_tensors: how many there are.
        before: the last step up to which all rows are the same; None if there is none.
        num_same: how many rows are the same.
        only: the numbers of rows that only one of the runs has.
    """

    step: int | None
    kind: str
    names: tuple[str, ...]
    num_tensors: int
    before: int | None
    num_same: int
    only: tuple[int, int]

    def in_words(self) -> str:
        """Return what was found, as text."""
        if self.step is None:
            text = f"The runs are the same in all {self.num_same} rows that both have."
            if any(self.only):
                text += f" {self.only[0]} rows are in the first only, and {self.only[1]} in the second only."
            return (
                text
                if self.num_same
                else "The runs have no step in common. Give Fingerprint the same every=... in both."
            )
        tensors = ", ".join(self.names[:5]) + (f" and {len(self.names) - 5} more" if len(self.names) > 5 else "")
        text = f"The runs differ first at step {self.step}, in {self.kind}: {tensors} "
        text += f"({len(self.names)} of {self.num_tensors} tensors).\n{_CAUSES[self.kind]}"
        if self.before is None:
            return f"{text}\nThere is no earlier row: they may differ from the start."
        if self.before < self.step - 1:
            text += (
                f"\nThey were the same at step {self.before}; write Fingerprint(every=1) to find the step in between."
            )
        return text

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "step": self.step, "kind": self.kind or None, "tensors": list(self.names), "same_until": self.before,
            "rows_that_are_the_same": self.num_same, "rows_of_one_only": list(self.only),
        }  # fmt: skip


def first_difference(one: Run, other: Run) -> Difference:
    """Return where two runs part."""
    return difference(*(rows_of(run.text("fingerprints.jsonl")) for run in (one, other)))


def difference(ours: Rows, theirs: Rows) -> Difference:
    """Return where two runs part, by the rows of their digests."""
    both = sorted(ours.keys() & theirs.keys())
    only = len(ours.keys() - theirs.keys()), len(theirs.keys() - ours.keys())
    for number, step in enumerate(both):
        for kind in KINDS:
            mine, yours = ours[step].get(kind, {}), theirs[step].get(kind, {})
            names = tuple(name for name in {**mine, **yours} if mine.get(name) != yours.get(name))
            if names:
                before = both[number - 1] if number else None
                return Difference(step, kind, names, len({**mine, **yours}), before, number, only)
    return Difference(None, "", (), 0, both[-1] if both else None, len(both), only)


def rows_of(text: str) -> Rows:
    """Return what is in a file of digests, by step."""
    rows: Rows = {}
    for line in text.splitlines():
        try:
            row = json.loads(line)
            rows[int(row["step"])] = row
        except (ValueError, TypeError, KeyError):  # a line that was cut off by a kill
            continue
    return rows
