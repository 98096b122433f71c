"""The cut of a file into chunks: the arithmetic, against a walk over the borders."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from modelfs import stripe
from modelfs.limits import CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, FILE_BYTES_MAX, MIB, TIB

chunk_sizes = st.sampled_from(
    [CHUNK_BYTES_MIN << shift for shift in range(9) if CHUNK_BYTES_MIN << shift <= CHUNK_BYTES_MAX]
)
offsets = st.one_of(
    st.integers(0, 64 * MIB), st.integers(0, FILE_BYTES_MAX - 1), st.just(FILE_BYTES_MAX - 1)
)


def walk(chunk_bytes: int, count: int) -> list[tuple[int, int]]:
    """(offset, size) of the first chunks, one after the other, as the docstring tells it."""
    made: list[tuple[int, int]] = []
    at = 0
    for _ in range(count):
        if at < 2 * chunk_bytes:
            size = chunk_bytes // 4
        elif at < chunk_bytes << 12:
            size = chunk_bytes
        elif at < chunk_bytes << 16:
            size = 4 * chunk_bytes
        else:
            size = 16 * chunk_bytes
        made.append((at, min(size, CHUNK_BYTES_MAX)))
        at += made[-1][1]
    return made


@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES_MIN, 4 * MIB, CHUNK_BYTES_MAX])
def test_the_arithmetic_agrees_with_a_walk(chunk_bytes: int) -> None:
    walked = walk(chunk_bytes, 25_000)  # through the second tier and into the third
    for index in [*range(12), *range(4000, 4200), *range(20_000, 20_010), 24_999]:
        start, size = walked[index]
        assert stripe.span(chunk_bytes, index) == (start, size)
        assert stripe.locate(chunk_bytes, start) == (index, 0)
        assert stripe.locate(chunk_bytes, start + size - 1) == (index, size - 1)
        assert stripe.chunk_count(chunk_bytes, start + size) == index + 1
        assert stripe.chunk_count(chunk_bytes, start + size + 1) == index + 2


@given(chunk_sizes, offsets)
@example(4 * MIB, (4 * MIB << 16) - 1)
@example(4 * MIB, 4 * MIB << 16)
def test_locate_and_span_are_inverse(chunk_bytes: int, offset: int) -> None:
    index, within = stripe.locate(chunk_bytes, offset)
    start, size = stripe.span(chunk_bytes, index)
    assert 0 <= within < size
    assert start + within == offset
    assert stripe.locate(chunk_bytes, start + size)[0] == index + 1


@given(chunk_sizes, offsets, st.integers(0, 600 * MIB))
def test_a_cut_is_gapless_and_stays_within_chunks(chunk_bytes: int, offset: int, size: int) -> None:
    at = offset
    last_index = -1
    for piece in stripe.cut(chunk_bytes, offset, size):
        start, span = stripe.span(chunk_bytes, piece.index)
        assert start + piece.start == at
        assert piece.size > 0 and piece.start + piece.size <= span
        assert last_index in (-1, piece.index - 1)
        at, last_index = at + piece.size, piece.index
    assert at == offset + size


def test_the_largest_file_has_about_a_million_chunks() -> None:
    assert stripe.chunk_count(4 * MIB, FILE_BYTES_MAX) < 1.2e6
    assert stripe.chunk_count(4 * MIB, TIB) < 40_000
    assert stripe.chunk_count(4 * MIB, 0) == 0


@given(chunk_sizes, offsets, st.integers(0, 200 * MIB))
def test_spans_are_those_of_the_chunks_that_begin_there(
    chunk_bytes: int, start: int, size: int
) -> None:
    size = min(size, 100 * chunk_bytes)
    found = list(stripe.spans(chunk_bytes, start, start + size))
    pieces = list(stripe.cut(chunk_bytes, start, size))
    assert found == [stripe.span(chunk_bytes, one.index) for one in pieces if one.start == 0]
