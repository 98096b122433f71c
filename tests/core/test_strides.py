"""Strides: runs at equal distances are foretold, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfs.access import SLACK_BYTES, AccessPattern, Stream
from modelfs.limits import GIB, KIB, MIB, PAGE_BYTES
from modelfs.strides import AHEAD_MAX, MARK_EVERY, STEPS_MIN, Stride

STEP = 16 * MIB
FIRST = GIB


def read(
    begins: Iterable[int], length: int, file_bytes: int = 1 << 50, budget: int = GIB
) -> tuple[list[tuple[int, int]], list[int]]:
    """Reads runs as a kernel does that has what was pushed.

    Returns (offset, length) of all that was foretold, and the begins of the runs asked for.
    """
    pattern, foretold, asked = AccessPattern(64 * MIB), [], []
    pages: set[int] = set()
    for begin in begins:
        for offset in range(begin - begin % PAGE_BYTES, begin + length, 128 * KIB):
            size = min(128 * KIB, begin + length - offset)
            if all(
                page in pages
                for page in range(offset // PAGE_BYTES, (offset + size - 1) // PAGE_BYTES + 1)
            ):
                continue
            if offset <= begin:
                asked.append(begin)
            found = pattern.observe(offset, size)
            assert not isinstance(found, Stream)
            if found is None:
                continue
            for run, is_mark in found.ahead(file_bytes, budget):
                foretold.append((run.begin, found.length))
                first = run.begin // PAGE_BYTES + is_mark
                pages |= set(range(first, (run.begin + found.length) // PAGE_BYTES + 1))
    return foretold, asked


@pytest.mark.parametrize("begin", [0, FIRST])
def test_a_part_that_is_read_again_and_again_is_no_stride(begin: int) -> None:
    pattern = AccessPattern(64 * MIB)
    for _ in range(5):  # its pages are dropped in between
        for offset in range(begin, begin + 16 * MIB, 128 * KIB):
            found = pattern.observe(offset, 128 * KIB)
            assert not isinstance(found, Stride)


@pytest.mark.parametrize("step", [STEP, -STEP, 9 * MIB, STEP + 12_288])
@pytest.mark.parametrize("length", [PAGE_BYTES, 128 * KIB, 256 * KIB])
def test_runs_at_equal_distances_are_foretold(step: int, length: int) -> None:
    begins = [FIRST + number * step for number in range(60)]
    foretold, asked = read(begins, length)
    told = [begin for begin, _ in foretold]
    assert {*told, *asked} >= set(begins)
    assert all(found == length for _, found in foretold)
    assert set(told) <= {FIRST + number * step for number in range(60 + AHEAD_MAX)}
    assert len(set(told)) == len(told)
    assert len(asked) <= STEPS_MIN + 3 + len(begins) // MARK_EVERY


def test_no_more_is_foretold_than_was_read() -> None:
    for count in range(1, 60):
        foretold, _ = read([FIRST + number * STEP for number in range(count)], 64 * KIB)
        beyond = [begin for begin, _ in foretold if begin >= FIRST + count * STEP]
        assert len(beyond) <= min(count, AHEAD_MAX)
        assert len(beyond) == 0 or count > STEPS_MIN


def test_memory_and_the_file_s_ends_bound_what_is_foretold() -> None:
    begins = [FIRST + number * STEP for number in range(40)]
    foretold, _ = read(begins, 256 * KIB, budget=MIB)
    assert len(foretold) and max(begin for begin, _ in foretold) <= begins[-1] + 4 * STEP
    end = begins[-1] + 5
    foretold, _ = read(begins, 256 * KIB, file_bytes=end)
    assert max(begin for begin, _ in foretold) == begins[-1]
    downwards = list(reversed(range(20 * MIB, 20 * MIB + 20 * STEP, STEP)))
    foretold, _ = read(downwards, 256 * KIB)
    assert min(begin for begin, _ in foretold) >= 0


def test_rows_that_begin_anywhere_in_a_page_are_foretold_nearly() -> None:
    step = 10 * MIB + 1234
    begins = [FIRST + number * step for number in range(100)]
    foretold, asked = read(begins, 64 * KIB)
    near = [
        begin
        for begin in begins
        if any(abs(begin - other) <= 2 * PAGE_BYTES for other, _ in foretold)
    ]
    assert len(near) >= 90
    assert len(asked) <= 100  # those whose first page was missed are asked for, and nothing is lost


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=60, unique=True), st.integers(0, 99))
def test_random_pages_are_foretold_only_by_chance(places: list[int], seed: int) -> None:
    Random(seed).shuffle(places)
    pattern = AccessPattern(64 * MIB)
    ordered = 0
    for place in places:
        found = pattern.observe((1 + place) * 3 * SLACK_BYTES, 4 * KIB)
        if isinstance(found, Stride):
            ordered += sum(1 for _ in found.ahead(1 << 50, GIB))
    assert ordered <= len(places)


def test_two_strides_are_followed_at_once() -> None:
    pattern = AccessPattern(64 * MIB)
    found = []
    for number in range(STEPS_MIN + 1):
        found.append(pattern.observe(FIRST + number * STEP, 4 * KIB))
        found.append(pattern.observe(5 * FIRST + number * (STEP + 8 * MIB), 4 * KIB))
    assert all(isinstance(stride, Stride) for stride in found[-2:])
    assert found[-1] is not found[-2]


def test_a_stream_that_begins_where_a_stride_would_go_on_is_a_stream() -> None:
    pattern = AccessPattern(64 * MIB)
    for number in range(STEPS_MIN + 2):
        pattern.observe(FIRST + number * STEP, 128 * KIB)
    begin = FIRST + (STEPS_MIN + 2) * STEP
    found = [pattern.observe(begin + piece * 128 * KIB, 128 * KIB) for piece in range(6)]
    assert isinstance(found[0], Stride)
    assert isinstance(found[-1], Stream)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from([4 * KIB, 128 * KIB, MIB])), max_size=80)
)
def test_whatever_is_asked_for_what_is_foretold_lies_in_the_file_and_is_told_once(
    requests: list[tuple[int, int]],
) -> None:
    """Few places, so that runs are met again, from both sides and at distance zero."""
    pattern, file_bytes = AccessPattern(64 * MIB), 41 * 4 * MIB
    for place, size in requests:
        found = pattern.observe(place * 4 * MIB, size)
        if isinstance(found, Stride):
            told = [run.begin for run, _ in found.ahead(file_bytes, 64 * MIB)]
            assert all(0 <= begin < file_bytes for begin in told)
            assert len(told) == len(set(told)) <= AHEAD_MAX
            assert not list(found.ahead(file_bytes, 64 * MIB))


def test_who_begins_again_and_again_at_the_same_place_is_no_stride() -> None:
    pattern = AccessPattern(64 * MIB)
    for _ in range(5):
        for begin in range(FIRST, FIRST + 16 * MIB, MIB):
            assert not isinstance(pattern.observe(begin, MIB), Stride)


def test_who_begins_a_stride_anew_is_known_again() -> None:
    pattern = AccessPattern(64 * MIB)
    begins = [FIRST + number * STEP for number in range(20)]
    for begin in begins:
        pattern.observe(begin, 128 * KIB)
    again = pattern.observe(begins[0], 128 * KIB)
    assert isinstance(again, Stride)
    told = [run.begin for run, _ in again.ahead(1 << 50, GIB)]
    assert told[:19] == begins[1:]


def test_a_stride_is_found_among_runs_that_were_read_before_in_another_order() -> None:
    pattern = AccessPattern(64 * MIB)
    begins = [FIRST + number * STEP for number in range(STEPS_MIN + 1)]
    for begin in (begins[2], begins[0], begins[3], begins[1]):
        assert not isinstance(pattern.observe(begin, 4 * KIB), Stride)
    found = [pattern.observe(begin, 4 * KIB) for begin in begins]
    assert isinstance(found[-1], Stride)
