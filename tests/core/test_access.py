"""Access patterns: streams are read ahead of, jumps are not."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from modelfs.access import SLACK_BYTES, STREAMS_MAX, WINDOW_BYTES_MIN, AccessPattern
from modelfs.limits import GIB, KIB, MIB


def test_a_sequential_reader_gets_a_window_that_doubles_up_to_the_maximum() -> None:
    pattern = AccessPattern(64 * MIB)
    windows = []
    for offset in range(0, 16 * MIB, MIB):
        end = pattern.observe(offset, MIB)
        assert end is not None
        windows.append((end - offset - MIB) // MIB)
    assert windows[:6] == [4, 8, 16, 32, 64, 64]
    assert windows[-1] == 64


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=60, unique=True))
def test_jumps_about_are_not_read_ahead_of(places: list[int]) -> None:
    pattern = AccessPattern(64 * MIB)
    for place in places:  # 3 slacks apart from each other and from the start of the file
        assert pattern.observe((1 + place) * 3 * SLACK_BYTES, 64 * KIB) is None


def test_requests_out_of_order_are_one_stream(rng: Random) -> None:
    pattern = AccessPattern(64 * MIB)
    pattern.observe(0, 128 * KIB)
    for start in range(128 * KIB, 64 * MIB, MIB):
        offsets = [start + step * 128 * KIB for step in range(8)]
        rng.shuffle(offsets)
        assert all(pattern.observe(offset, 128 * KIB) for offset in offsets)


def test_several_ranks_are_each_followed() -> None:
    pattern = AccessPattern(64 * MIB)
    requests = [rank * GIB + step * MIB for step in range(4) for rank in range(STREAMS_MAX)]
    ends = [pattern.observe(offset, MIB) for offset in requests]
    assert all(end is not None for end in ends[STREAMS_MAX:])


@given(st.lists(st.tuples(st.integers(0, 200 * MIB), st.integers(1, MIB)), max_size=80))
def test_the_window_is_bounded_and_never_behind_the_reader(
    requests: list[tuple[int, int]],
) -> None:
    pattern = AccessPattern(16 * MIB)
    furthest = 0
    for offset, size in requests:
        furthest = max(furthest, offset + size)
        end = pattern.observe(offset, size)
        assert end is None or offset + size <= end <= furthest + max(16 * MIB, WINDOW_BYTES_MIN)
