"""Access patterns: streams are read ahead of, jumps are not."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfs import stripe
from modelfs.access import (
    SKIP_BYTES,
    SLACK_BYTES,
    STEPS_MIN,
    STREAMS_MAX,
    AccessPattern,
    Stream,
    is_mark,
)
from modelfs.limits import GIB, KIB, MIB


def test_the_window_is_twice_what_was_read_up_to_the_maximum() -> None:
    pattern = AccessPattern(64 * MIB)
    windows = []
    for offset in range(0, 40 * MIB, MIB):
        stream = pattern.observe(offset, MIB)
        assert isinstance(stream, Stream)
        assert stream.end == offset + MIB
        windows.append(stream.window // MIB)
    assert windows[:6] == [4, 4, 6, 8, 10, 12]
    assert windows[31] == 64
    assert windows[-1] == 64


def test_elsewhere_a_stream_must_go_on_before_it_is_believed() -> None:
    pattern = AccessPattern(64 * MIB)
    found = [pattern.observe(GIB + step * MIB, MIB) for step in range(4)]
    assert found[:STEPS_MIN] == [None] * STEPS_MIN
    assert all(isinstance(stream, Stream) and stream.window for stream in found[STEPS_MIN:])


def test_a_stream_goes_on_wherever_it_is_next_heard_of_within_what_was_ordered() -> None:
    pattern = AccessPattern(64 * MIB)
    stream = pattern.observe(0, MIB)
    assert isinstance(stream, Stream)
    stream.ordered_end = 32 * MIB
    assert pattern.observe(31 * MIB, MIB) is stream
    assert stream.goal == (32 + 64) * MIB
    assert pattern.observe(32 * MIB + 2 * SKIP_BYTES, MIB) is None


def test_who_jumps_over_a_mark_is_another_stream() -> None:
    pattern = AccessPattern(64 * MIB)
    stream = pattern.observe(0, MIB)
    assert isinstance(stream, Stream)
    stream.ordered_end = 32 * MIB
    stream.marks.extend([4 * MIB, 16 * MIB])
    assert pattern.observe(4 * MIB + SKIP_BYTES + KIB, MIB) is None
    assert pattern.observe(4 * MIB, 128 * KIB) is stream
    assert pattern.observe(16 * MIB, 128 * KIB) is stream
    assert not stream.marks
    assert pattern.observe(31 * MIB, MIB) is stream


@pytest.mark.parametrize("first", [0, 4 * MIB, 16 * GIB - 8 * MIB, 256 * GIB - 8 * MIB])
def test_who_reads_on_and_is_heard_of_at_marks_alone_is_one_stream(first: int) -> None:
    """Also over the borders of tiers, where chunks become larger than marks are apart."""
    pattern, chunk_bytes, spacing = AccessPattern(64 * MIB), 4 * MIB, 4 * MIB
    stream, pushed_end, offset = None, 0, first
    while offset < first + 512 * MIB:
        begin = offset - stripe.locate(chunk_bytes, offset)[1]
        is_asked = offset >= pushed_end
        if offset == begin and is_mark(chunk_bytes, begin, spacing):
            is_asked = True
        if is_asked:
            found = pattern.observe(offset, 128 * KIB)
            if isinstance(found, Stream):
                assert found is (stream or found)
                stream = found
                start = max(found.ordered_end, offset)
                if start < found.goal:
                    index = stripe.locate(chunk_bytes, found.goal - 1)[0]
                    end = sum(stripe.span(chunk_bytes, index))
                    found.order(chunk_bytes, start, end, spacing)
                    pushed_end = end
        offset += 128 * KIB
    assert stream is not None and stream.window == 64 * MIB


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
    requests = [rank * GIB + step * MIB for step in range(8) for rank in range(STREAMS_MAX)]
    streams = [pattern.observe(offset, MIB) for offset in requests]
    # Where ranks begin at equal distances they look like one reader's stride at first.
    believed = streams[(STEPS_MIN + 3) * STREAMS_MAX :]
    assert all(isinstance(stream, Stream) for stream in believed)
    assert len(set(believed)) == STREAMS_MAX


@given(st.lists(st.tuples(st.integers(0, 200 * MIB), st.integers(1, MIB)), max_size=80))
def test_the_window_is_bounded_and_never_behind_the_reader(
    requests: list[tuple[int, int]],
) -> None:
    pattern = AccessPattern(16 * MIB)
    for offset, size in requests:
        stream = pattern.observe(offset, size)
        if isinstance(stream, Stream):
            assert offset + size <= stream.end
            assert stream.end < stream.goal <= stream.end + 16 * MIB
