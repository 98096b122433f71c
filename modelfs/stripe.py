"""How a file is cut into chunks: by position alone, so that a writer need not know the final size.

A file with chunk size C (default 4 MiB) is cut in tiers:

    from offset     chunks of     why
    0               C/4           several chunks even for a few MiB: every peer shares the load
    2 C             C
    2^12 C          4 C           (16 GiB on) fewer chunks for very large files
    2^16 C          16 C          (256 GiB on) a 64 TiB file has about a million chunks

No chunk is larger than `CHUNK_BYTES_MAX`, whatever C is. Because the cut depends on nothing but C
and the offset, a file that grows keeps its chunks, and a changed file shares what did not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from modelfs.limits import BLOCK_BYTES, CHUNK_BYTES_MAX, CHUNK_BYTES_MIN


@dataclass(frozen=True, slots=True)
class Tier:
    """A run of equally large chunks, from `start` up to the next tier."""

    start: int  # file offset of its first chunk
    first_index: int  # index of its first chunk
    chunk_bytes: int


@dataclass(frozen=True, slots=True)
class ChunkRange:
    """A part of one chunk."""

    index: int  # of the chunk in its file
    start: int  # offset within the chunk
    size: int


@lru_cache(maxsize=64)
def tiers(chunk_bytes: int) -> tuple[Tier, ...]:
    """The tiers of a file with this chunk size, in order of offset."""
    assert CHUNK_BYTES_MIN <= chunk_bytes <= CHUNK_BYTES_MAX
    assert chunk_bytes & (chunk_bytes - 1) == 0, "a power of two keeps every border page-aligned"
    plan = (
        (0, chunk_bytes // 4),
        (2, chunk_bytes),
        (1 << 12, 4 * chunk_bytes),
        (1 << 16, 16 * chunk_bytes),
    )
    made: list[Tier] = []
    for start_in_chunks, size in plan:
        start, index = start_in_chunks * chunk_bytes, 0
        if made:
            last = made[-1]
            index = last.first_index + (start - last.start) // last.chunk_bytes
        made.append(Tier(start, index, min(size, CHUNK_BYTES_MAX)))
    assert made[0].chunk_bytes >= BLOCK_BYTES
    return tuple(made)


def _tier_at(chunk_bytes: int, offset: int) -> Tier:
    return next(tier for tier in reversed(tiers(chunk_bytes)) if tier.start <= offset)


def locate(chunk_bytes: int, offset: int) -> tuple[int, int]:
    """(index of the chunk that holds file offset `offset`, offset within that chunk)."""
    tier = _tier_at(chunk_bytes, offset)
    steps, within = divmod(offset - tier.start, tier.chunk_bytes)
    return tier.first_index + steps, within


def span(chunk_bytes: int, index: int) -> tuple[int, int]:
    """(file offset, size in bytes) of the chunk with this index, in a file that does not end."""
    tier = next(tier for tier in reversed(tiers(chunk_bytes)) if tier.first_index <= index)
    return tier.start + (index - tier.first_index) * tier.chunk_bytes, tier.chunk_bytes


def chunk_count(chunk_bytes: int, file_bytes: int) -> int:
    """How many chunks a file of this size has."""
    return locate(chunk_bytes, file_bytes - 1)[0] + 1 if file_bytes else 0


def spans(chunk_bytes: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """(file offset, size) of the chunks that begin in [start, end)."""
    index, within = locate(chunk_bytes, start)
    index += within > 0
    while (found := span(chunk_bytes, index))[0] < end:
        yield found
        index += 1


def cut(chunk_bytes: int, offset: int, size: int) -> Iterator[ChunkRange]:
    """Cut a file range at chunk borders, in order."""
    end = offset + size
    while offset < end:
        index, start = locate(chunk_bytes, offset)
        take = min(span(chunk_bytes, index)[1] - start, end - offset)
        yield ChunkRange(index, start, take)
        offset += take
