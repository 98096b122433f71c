"""Scrubbing: reads every copy that this node's disk holds, before somebody needs it.

A *look* at a copy reads it past the page cache and checks it against its block table, its checksum
and its BLAKE3 name. What is bad goes out of service in the same step (`ChunkStore.verify`): a
cached copy is dropped, an owned one is put aside and given to the `Restorer`. Files appear in the
store only whole and never change there, so nothing that is being written, renewed or fetched
meanwhile can look bad; what is deleted before its turn is passed over.

A *tour* is one walk over all copies, in the order of their ids, one copy in memory at a time.
`Scrubber` makes tours on command; `modelfsd.storage.scrub_rounds` makes slow ones in the
background, by the same looks.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

import trio

from modelfs.errors import ChunkMissing
from modelfs.ports import ChunkStore, HeldChunk, Holding
from modelfsd.logs import RateLimited
from modelfsd.stages import timed
from modelfsd.storage.restoring import Restoration, Restorer

log = logging.getLogger(__name__)

SHELVES = 256
LOOKS_AT_ONCE = 2  # a tour's, and the background's


@dataclass(frozen=True, slots=True)
class ScrubCounters:
    """What all looks since the start have found."""

    chunks: int = 0  # copies that were looked at
    bytes: int = 0  # of their files
    bad_chunks: int = 0  # owned copies; each was put aside
    dropped_chunks: int = 0  # bad cached copies
    unreadable_chunks: int = 0  # copies that the disk did not let us read


@dataclass(slots=True)
class Tour:
    """What one tour has found so far. `restorations` are those of the bad owned copies, `earlier`
    new tries for those that could not be restored before it.
    """

    total_bytes: int
    total_chunks: int
    chunks: int = 0
    bytes: int = 0
    dropped_chunks: int = 0
    unreadable_chunks: int = 0
    example: str = ""  # why the first unreadable one was
    restorations: list[Restoration] = field(default_factory=list)
    earlier: list[Restoration] = field(default_factory=list)


class Scrubber:
    """Looks at one node's copies."""

    def __init__(self, store: ChunkStore, restorer: Restorer) -> None:
        self.store, self.restorer = store, restorer
        self._limiter = trio.CapacityLimiter(LOOKS_AT_ONCE)
        self._counters = ScrubCounters()
        self._quiet = RateLimited(log, 60.0)

    def counters(self) -> ScrubCounters:
        """A snapshot."""
        return self._counters

    async def shelf(self, first: int) -> list[HeldChunk]:
        """See `ChunkStore.shelf`."""
        return await trio.to_thread.run_sync(self.store.shelf, first, limiter=self._limiter)

    async def look(self, held: HeldChunk, tour: Tour | None = None) -> None:
        """Verify one copy, and see to it if it is bad."""
        try:
            is_good = await trio.to_thread.run_sync(self._verify, held, limiter=self._limiter)
        except ChunkMissing:
            return  # reclaimed, evicted or handed back since it was listed
        except OSError as error:
            self._note_unreadable(held, error, tour)
            return
        # No await from here on: a command that is cancelled has still reported what it found.
        counters, is_owned = self._counters, held.holding is Holding.OWNED
        self._counters = replace(
            counters,
            chunks=counters.chunks + 1,
            bytes=counters.bytes + held.file_bytes,
            bad_chunks=counters.bad_chunks + (not is_good and is_owned),
            dropped_chunks=counters.dropped_chunks + (not is_good and not is_owned),
        )
        restoration = None if is_good or not is_owned else self.restorer.report(held.chunk)
        if not is_good and not is_owned:
            log.warning("a cached copy of chunk %s was bad: dropped", held.chunk.hex()[:16])
        if tour is not None:
            tour.chunks += 1
            tour.bytes += held.file_bytes
            tour.dropped_chunks += not is_good and not is_owned
            if restoration is not None:
                tour.restorations.append(restoration)

    def _verify(self, held: HeldChunk) -> bool:
        with timed("scrub"):
            return self.store.verify(held.chunk)

    async def _shelf_of(self, first: int, tour: Tour) -> list[HeldChunk]:
        """As `shelf`; one that cannot be listed counts in the tour as one chunk, at least."""
        try:
            return await self.shelf(first)
        except OSError as error:
            name = f"{first:02x}"
            self._quiet.error("shelf", "chunks %s... cannot be listed: %s", name, error)
            tour.unreadable_chunks += 1
            tour.example = tour.example or f"chunks {name}...: {error}"
            return []

    def _note_unreadable(self, held: HeldChunk, error: OSError, tour: Tour | None) -> None:
        counters = self._counters
        self._counters = replace(counters, unreadable_chunks=counters.unreadable_chunks + 1)
        name = held.chunk.hex()[:16]
        self._quiet.error("unreadable", "chunk %s cannot be looked at: %s", name, error)
        if tour is not None:
            tour.unreadable_chunks += 1
            tour.example = tour.example or f"chunk {name}: {error}"

    async def start(self) -> Tour:
        """A tour of what there is now."""
        usage = await trio.to_thread.run_sync(self.store.usage)
        return Tour(
            usage.owned_bytes + usage.cached_bytes, usage.owned_chunks + usage.cached_chunks
        )

    async def walk(self, tour: Tour, bytes_a_second: float = float("inf")) -> None:
        """Look at everything, no faster than so; then wait until what was bad has been tried."""
        started = trio.current_time()
        for first in range(SHELVES):
            for held in await self._shelf_of(first, tour):
                await self.look(held, tour)
                await trio.sleep_until(started + tour.bytes / bytes_a_second)
        known = {one.chunk for one in tour.restorations}
        failing = [one.chunk for one in self.restorer.failing() if one.chunk not in known]
        tour.earlier = [self.restorer.report(chunk) for chunk in failing]
        for restoration in (*tour.restorations, *tour.earlier):
            await restoration.done.wait()
