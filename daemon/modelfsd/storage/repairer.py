"""Repairs this node's own damaged chunks from other replicas.

Damage is found by a local read, or reported by a peer that was sent bad bytes. The store judges its
copy itself; a bad one is put aside and fetched anew. What fails is told to `on_failure`, which
tries again (`Restorer.report`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from modelfs.chunk import ChunkRef, describe
from modelfs.errors import ChunkMissing, CorruptChunk, ModelfsError
from modelfs.ids import ChunkId, Epoch
from modelfs.manifest import PlacedChunk
from modelfs.ports import Holding
from modelfsd.storage.chunks import Chunks

log = logging.getLogger(__name__)

QUEUE_MAX = 256  # reports that wait; a report that finds no room comes again with the next read


class Repairer:
    """One task that repairs, one chunk after the other."""

    def __init__(self) -> None:
        self._send, self._reports = trio.open_memory_channel[ChunkRef](QUEUE_MAX)
        self._token = trio.lowlevel.current_trio_token()
        self._queued: set[bytes] = set()
        self.repaired = 0
        self.on_failure: Callable[[ChunkId], object] = _forget

    def report(self, ref: ChunkRef) -> None:
        """A local copy failed its check. From trio's thread."""
        if ref.id in self._queued:
            return
        try:
            self._send.send_nowait(ref)
        except trio.WouldBlock:
            return
        self._queued.add(ref.id)

    def report_from_thread(self, ref: ChunkRef) -> None:
        """As `report`, from any thread."""
        self._token.run_sync_soon(self.report, ref)

    async def run(self, chunks: Chunks) -> None:
        """Repair what is reported, for ever."""
        async for ref in self._reports:
            self._queued.discard(ref.id)
            try:
                await self._repair(chunks, ref)
            except (ModelfsError, OSError) as error:
                log.error("chunk %s could not be repaired: %s", ref.id.hex()[:16], error)
                self.on_failure(ref.id)

    async def _repair(self, chunks: Chunks, ref: ChunkRef) -> None:
        try:
            if await trio.to_thread.run_sync(chunks.store.verify, ref.id):
                return
        except ChunkMissing:
            log.debug("chunk %s is gone already", ref.id.hex()[:16])
        placement = chunks.mirror.latest_map
        epoch = placement.epoch if placement else Epoch(0)
        await fetch_again(chunks, PlacedChunk(ref, epoch), 1)
        self.repaired += 1
        log.info("chunk %s is repaired", ref.id.hex()[:16])


def _forget(chunk: ChunkId) -> None:
    """Nobody tries again; a report comes again with the next read."""


async def fetch_again(chunks: Chunks, placed: PlacedChunk, replicas: int) -> None:
    """Have a good copy of a chunk on this node's disk again. Raises `ModelfsError`, OSError."""
    ref = placed.ref
    data = await chunks.read(placed, replicas, 0, ref.length)
    found, table = await trio.to_thread.run_sync(describe, data)
    if found != ref:
        raise CorruptChunk(ref.id, "another node")
    await trio.to_thread.run_sync(chunks.store.put, ref, table, data, Holding.OWNED)
    await trio.to_thread.run_sync(chunks.store.sync)
