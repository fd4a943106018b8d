"""A filter over steps that are known only in the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from camshaft.engine import NEVER


class AtSteps:
    """A filter: some steps, which may be others when a run begins, or goes on from another step.

    Args:
        steps: returns them.
        words: which they are, for `explain`.

    >>> some = AtSteps(lambda: [3, 5], "some steps")
    >>> some(3), some(4), some.next_due(3)
    (True, False, 5)
    """

    def __init__(self, steps: Callable[[], Iterable[int]], words: str) -> None:
        self._steps = steps
        self._words = words

    def __call__(self, count: int, /) -> bool:
        """Return whether the count is one of them."""
        return count in self._steps()

    def next_due(self, count: int, /) -> int:
        """Return the next of them."""
        return min((step for step in self._steps() if step > count), default=NEVER)

    def __repr__(self) -> str:
        return f"at {self._words}"
