"""Extents, against a set of integers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelfs.extents import Extents

SPACE = 40
interval = st.tuples(st.integers(0, SPACE - 1), st.integers(1, SPACE)).map(
    lambda pair: (pair[0], max(pair[0] + 1, pair[1]))
)
step = st.one_of(
    st.tuples(st.just("add"), interval), st.tuples(st.just("clip"), st.integers(0, SPACE))
)


def runs(numbers: set[int]) -> list[tuple[int, int]]:
    """The maximal intervals of a set."""
    starts = sorted(n for n in numbers if n - 1 not in numbers)
    ends = sorted(n + 1 for n in numbers if n + 1 not in numbers)
    return list(zip(starts, ends, strict=True))


@given(st.lists(step, max_size=12), st.integers(0, SPACE), st.integers(0, SPACE))
def test_extents_are_a_set_of_integers(
    steps: list[tuple[str, tuple[int, int] | int]], start: int, end: int
) -> None:
    clever, dumb = Extents(), set[int]()
    for _, argument in steps:
        if isinstance(argument, tuple):
            clever.add(*argument)
            dumb |= set(range(*argument))
        else:
            clever.clip(argument)
            dumb = {number for number in dumb if number < argument}
        assert list(clever) == runs(dumb)
        assert clever.end == max(dumb, default=-1) + 1
    window = set(range(start, end))
    assert list(clever.gaps(start, end)) == runs(window - dumb)
    assert clever.covers(start, end) == (window <= dumb)
