"""The chunk format: tables, ranges and footers."""

from __future__ import annotations

import blake3
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from modelfs.chunk import (
    FOOTER,
    HASH_BYTES,
    ChunkRef,
    block_count,
    block_table,
    covering_blocks,
    describe,
    is_range_valid,
    is_table_valid,
    pack_footer,
    unpack_footer,
)
from modelfs.limits import BLOCK_BYTES, CHUNK_BYTES_MAX

LENGTHS = st.integers(1, 4 * BLOCK_BYTES)
DATA = bytes(range(256)) * (4 * BLOCK_BYTES // 256)


@given(LENGTHS)
def test_a_table_has_one_hash_for_each_started_block(length: int) -> None:
    data = DATA[:length]
    blocks = [data[start : start + BLOCK_BYTES] for start in range(0, length, BLOCK_BYTES)]
    expected = b"".join(xxhash.xxh3_64_intdigest(part).to_bytes(8, "little") for part in blocks)
    assert block_table(data) == expected
    assert block_count(length) == len(blocks)


@given(LENGTHS)
def test_a_chunk_is_named_by_blake3_and_described_by_its_table(length: int) -> None:
    data = DATA[:length]
    ref, table = describe(data)
    assert ref.id == blake3.blake3(data).digest()
    assert ref.length == length
    assert is_table_valid(ref, table)
    assert is_range_valid(table, 0, data)
    assert not is_table_valid(ref, table + bytes(HASH_BYTES))
    assert not is_table_valid(ChunkRef(ref.id, ref.checksum ^ 1, length), table)


@given(st.data())
def test_covering_blocks_are_the_smallest_aligned_range(draw: st.DataObject) -> None:
    length = draw.draw(LENGTHS)
    offset = draw.draw(st.integers(0, length - 1))
    size = draw.draw(st.integers(1, length - offset))
    start, end = covering_blocks(length, offset, size)
    wanted = {position // BLOCK_BYTES for position in (offset, offset + size - 1)}
    assert start == min(wanted) * BLOCK_BYTES
    assert end == min(length, (max(wanted) + 1) * BLOCK_BYTES)


@given(st.data())
def test_any_flipped_bit_of_any_range_is_noticed(draw: st.DataObject) -> None:
    length = draw.draw(LENGTHS)
    offset = draw.draw(st.integers(0, length - 1))
    size = draw.draw(st.integers(1, length - offset))
    _, table = describe(DATA[:length])
    start, end = covering_blocks(length, offset, size)
    part = bytearray(DATA[start:end])
    assert is_range_valid(table, start, part)
    part[draw.draw(st.integers(0, len(part) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    assert not is_range_valid(table, start, part)


@given(LENGTHS, st.binary(max_size=64), st.integers(-100, 100))
def test_a_footer_is_good_for_its_own_file_size_only(
    length: int, noise: bytes, surplus: int
) -> None:
    ref, table = describe(DATA[:length])
    footer = pack_footer(length, table)
    size = length + len(table) + FOOTER.size
    assert unpack_footer(footer, size) == (length, ref.checksum)
    if surplus:
        assert unpack_footer(footer, size + surplus) is None
    assert unpack_footer(footer[:-1], size) is None
    assert unpack_footer(noise, size) is None


def test_a_footer_of_an_impossible_length_is_refused() -> None:
    for length in (0, CHUNK_BYTES_MAX + 1):
        size = length + block_count(length) * HASH_BYTES + FOOTER.size
        assert unpack_footer(pack_footer(length, b""), size) is None
