"""Sweeping: deletes this node's chunks that nobody needs any more (see `modelfs.reclaim`).

To watch a chunk for a grace period is to look often enough. If half of one has passed since the
last complete look (etcd was away, a manifest could not be read, the machine was paused), everything
waits anew: whoever relies on chunks that no manifest names renews them thrice in a grace, and may
have had no way to do so meanwhile.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import trio

from modelfs import reclaim
from modelfs.errors import ChunkMissing, CorruptChunk, MetadataUnavailable
from modelfs.holdings import Holdings, Indexes
from modelfs.ids import ChunkId
from modelfs.ports import ChunkStore
from modelfs.reclaim import Waiting
from modelfsd.metadata.feed import Feed
from modelfsd.storage.chunk_file import file_bytes
from modelfsd.storage.survey import Surveyor

UNWATCHED_SECONDS_MIN = 5.0  # a busy machine may be as late as that, however short the grace is
BATCH_CHUNKS = 256  # deleted between two looks at whether etcd is still there


@dataclass(frozen=True, slots=True)
class Sweep:
    """What one sweep found and freed."""

    seconds: float
    held_chunks: int
    waiting_chunks: int  # unneeded, but not for long enough yet
    freed_chunks: int
    freed_bytes: int


class Sweeper:
    """Sweeps one node's store."""

    def __init__(
        self, store: ChunkStore, feed: Feed, surveyor: Surveyor, grace_seconds: float
    ) -> None:
        self._store, self._feed, self._surveyor = store, feed, surveyor
        self._grace_seconds = grace_seconds
        self._waiting, self._looked_at = Waiting.nothing(), 0.0

    async def sweep(self) -> Sweep | None:
        """Delete what has been unneeded for long enough. None if that could not be known.

        Raises `MetadataUnavailable`, OSError.
        """
        started = trio.current_time()
        if started - self._looked_at > max(self._grace_seconds / 2, UNWATCHED_SECONDS_MIN):
            self._waiting = Waiting.nothing()
        survey = await self._surveyor.survey()
        if not survey.is_complete:
            return None
        holdings = survey.holdings
        self._waiting, ripe = reclaim.watch(
            self._waiting, holdings, ~holdings.is_needed, trio.current_time(), self._grace_seconds
        )
        self._looked_at = trio.current_time()
        freed_chunks = freed_bytes = 0
        for start in range(0, len(ripe), BATCH_CHUNKS):
            if not self._feed.is_attached:
                raise MetadataUnavailable("etcd was lost during a sweep")
            rows = ripe[start : start + BATCH_CHUNKS]
            count, size = await trio.to_thread.run_sync(delete_rows, self._store, holdings, rows)
            freed_chunks += count
            freed_bytes += size
        return Sweep(
            trio.current_time() - started,
            len(holdings),
            len(self._waiting) - freed_chunks,
            freed_chunks,
            freed_bytes,
        )


def delete_rows(store: ChunkStore, holdings: Holdings, rows: Indexes) -> tuple[int, int]:
    """Delete these chunks, but for those put or renewed since. Returns their number and bytes.

    Blocks.
    """
    count = freed_bytes = 0
    for row in rows.tolist():
        chunk = holdings.chunk(row)
        size = _bytes_of(store, chunk)
        if size and store.delete(chunk, float(holdings.put_at[row])):
            count += 1
            freed_bytes += size
    return count, freed_bytes


def _bytes_of(store: ChunkStore, chunk: ChunkId) -> int:
    """The size of a chunk's file; 0 if it is gone, 1 if it is too damaged to tell."""
    try:
        opened = store.open(chunk)
    except ChunkMissing:
        return 0
    except CorruptChunk:
        return 1
    os.close(opened.fd)
    return file_bytes(opened.length)
