"""How much of a file lies where no chunk is, against a count of the positions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfs.chunk import ChunkRef
from modelfs.ids import ChunkId, Epoch
from modelfs.limits import CHUNK_BYTES_MIN
from modelfs.manifest import PAGE_ENTRIES, Manifest, PlacedChunk
from modelfs.stripe import chunk_count, span

CHUNK = PlacedChunk(ChunkRef(ChunkId(b"x" * 32), 1, 100), Epoch(1))


@given(st.lists(st.booleans(), max_size=40), st.integers(0, CHUNK_BYTES_MIN // 4 - 1))
def test_holes_are_what_has_no_chunk(has_chunk: list[bool], less: int) -> None:
    count = len(has_chunk)
    size = sum(span(CHUNK_BYTES_MIN, count - 1)) - less if count else 0
    changes = {index: CHUNK for index, is_there in enumerate(has_chunk) if is_there}
    manifest, _ = Manifest.empty(CHUNK_BYTES_MIN).changed(size, changes)
    wanted = 0
    for index in range(count):
        start, length = span(CHUNK_BYTES_MIN, index)
        wanted += 0 if has_chunk[index] else min(length, size - start)
    assert manifest.hole_bytes() == wanted


@pytest.mark.parametrize("index", [0, PAGE_ENTRIES - 1, PAGE_ENTRIES, 2 * PAGE_ENTRIES + 7])
def test_a_page_that_is_not_loaded_counts_as_full(index: int) -> None:
    size = sum(span(CHUNK_BYTES_MIN, 3 * PAGE_ENTRIES - 1))
    assert chunk_count(CHUNK_BYTES_MIN, size) == 3 * PAGE_ENTRIES
    manifest, pages = Manifest.empty(CHUNK_BYTES_MIN).changed(size, {index: CHUNK})
    manifest = manifest.with_pages_stored(dict.fromkeys(pages, CHUNK))
    assert manifest.hole_bytes() == size - span(CHUNK_BYTES_MIN, index)[1]
    manifest.pages.clear()
    page = index // PAGE_ENTRIES
    start, _ = span(CHUNK_BYTES_MIN, page * PAGE_ENTRIES)
    end = sum(span(CHUNK_BYTES_MIN, (page + 1) * PAGE_ENTRIES - 1))
    assert manifest.hole_bytes() == size - (end - start)
