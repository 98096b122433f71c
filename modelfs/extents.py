"""Extents: which bytes of a staged chunk have been written.

A sorted list of disjoint, non-touching half-open intervals. A chunk that is written front to back
has one; a chunk that is written at random has few, so a list and bisection are enough.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class Extents:
    """A set of byte offsets, kept as intervals [start, end)."""

    __slots__ = ("_ends", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        """Add [start, end); joins what it overlaps or touches."""
        assert 0 <= start < end
        left = bisect_left(self._ends, start)
        right = bisect_right(self._starts, end)
        if left < right:
            start = min(start, self._starts[left])
            end = max(end, self._ends[right - 1])
        self._starts[left:right] = [start]
        self._ends[left:right] = [end]

    def clip(self, end: int) -> None:
        """Forget everything from `end` on."""
        keep = bisect_left(self._starts, end)
        del self._starts[keep:], self._ends[keep:]
        if self._ends and self._ends[-1] > end:
            self._ends[-1] = end

    def covers(self, start: int, end: int) -> bool:
        """Whether all of [start, end) is in the set. The empty range always is."""
        return not any(True for _ in self.gaps(start, end))

    def gaps(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The maximal intervals of [start, end) that are not in the set, in order."""
        at = bisect_right(self._ends, start)
        while start < end:
            if at == len(self._starts) or self._starts[at] >= end:
                yield start, end
                return
            if start < self._starts[at]:
                yield start, self._starts[at]
            start = self._ends[at]
            at += 1

    @property
    def end(self) -> int:
        """One past the last byte of the set; 0 if it is empty."""
        return self._ends[-1] if self._ends else 0

    @property
    def size(self) -> int:
        """How many bytes are in the set."""
        return sum(self._ends) - sum(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._starts, self._ends, strict=True))
