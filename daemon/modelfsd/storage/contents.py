"""The contents of committed files: manifests, chunks and bytes, by inode record.

A record's contents never change, so everything here may be cached by what it names. `read` serves
a range; `Readahead` decides what to have at hand before it is asked for.

Two ways to a chunk: whole (through the cache of chunk buffers, shared by all who want it at the
same time, for streams) and in part (the 64 KiB blocks that a random read touches, not cached).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import trio

from modelfs import manifest as manifests
from modelfs import stripe
from modelfs.errors import ModelfsError
from modelfs.ids import ChunkId
from modelfs.inode import Inode
from modelfs.limits import MIB
from modelfs.manifest import Manifest, PlacedChunk
from modelfsd.storage.chunk_buffers import ChunkBuffers
from modelfsd.storage.chunks import Chunks
from modelfsd.storage.run_fetches import RunFetch, RunFetches
from modelfsd.uses import current_use

log = logging.getLogger(__name__)

MANIFESTS_MAX = 256
MANIFEST_BYTES_MAX = 64 * MIB  # of their roots and loaded pages; all of a 64 TiB file's are 49 MiB
ZEROS = bytes(MIB)

RunArrived = Callable[[int, memoryview], None]  # the offset in the file, the bytes
Arrived = Callable[[ChunkId, int, memoryview], None]  # a chunk, its offset in the file, its bytes


class Contents:
    """Reads committed files. `run_in_background` starts a task in the node's nursery."""

    def __init__(
        self,
        chunks: Chunks,
        memory_bytes: int,
        run_in_background: Callable[..., None],
    ) -> None:
        self._chunks = chunks
        self._manifests: OrderedDict[bytes, Manifest] = OrderedDict()
        self._buffers = ChunkBuffers(chunks, memory_bytes)
        self._start = run_in_background
        self.window_bytes_max = memory_bytes // 8
        self._runs = RunFetches(self.window_bytes_max)

    @property
    def buffered_bytes(self) -> int:
        """How much memory the chunk buffers hold."""
        return self._buffers.used_bytes

    def drop(self) -> int:
        """Forget manifests and chunks that are at hand; returns how many bytes that frees."""
        self._manifests.clear()
        return self._buffers.drop()

    # ------------------------------------------------------------ manifests

    async def manifest(self, record: Inode) -> Manifest:
        """The manifest of a record that has one. Raises `ChunkUnavailable`, `ProtocolError`."""
        assert record.manifest is not None
        found = self._manifests.get(record.manifest.id)
        if found is None:
            placed = record.manifest.placed
            data = await self._chunks.read(placed, record.replicas, 0, placed.ref.length)
            found = self._manifests.setdefault(record.manifest.id, manifests.decode(data))
        self._manifests.move_to_end(record.manifest.id)
        if len(self._manifests) > MANIFESTS_MAX:
            self._manifests.popitem(last=False)
        return found

    @property
    def manifest_bytes(self) -> int:
        """How much memory the manifests take."""
        return sum(manifest.loaded_bytes for manifest in self._manifests.values())

    async def load_page(self, manifest: Manifest, page: int, replicas: int) -> None:
        """Load one page of a manifest, if it is not loaded yet."""
        placed = manifest.page_chunk(page)
        data = await self._chunks.read(placed, replicas, 0, placed.ref.length)
        manifest.add_page(page, data)
        while len(self._manifests) > 1 and self.manifest_bytes > MANIFEST_BYTES_MAX:
            self._manifests.popitem(
                last=False
            )  # who uses it has it, and those to come load it anew

    async def entry(self, manifest: Manifest, index: int, replicas: int) -> PlacedChunk | None:
        """The chunk at a position of a file; None for a hole."""
        page = manifest.page_of(index)
        if page is not None:
            await self.load_page(manifest, page, replicas)
        return manifest.entry(index)

    async def all_entries(self, record: Inode) -> manifests.Entries:
        """All entries of a file; empty for inline contents."""
        if record.manifest is None:
            return Manifest.empty(4 * MIB).table
        manifest = await self.manifest(record)
        for page in manifest.missing_pages():
            await self.load_page(manifest, page, record.replicas)
        return manifest.entries()

    # ------------------------------------------------------------ bytes

    async def read(
        self, record: Inode, offset: int, size: int, whole_chunks: bool = False
    ) -> bytes | memoryview:
        """Up to `size` bytes from `offset`; short only at the end of the file."""
        size = min(size, record.size - offset)
        if size <= 0:
            return b""
        if record.manifest is None:
            return (record.inline or b"").ljust(record.size, b"\0")[offset : offset + size]
        fetch = self._runs.find(record.manifest.id, offset, offset + size)
        if fetch is not None:
            part = await fetch.part(offset, offset + size)
            if part is not None:
                return part
        return await self._read_pieces(record, offset, size, whole_chunks)

    async def _read_pieces(
        self, record: Inode, offset: int, size: int, whole_chunks: bool
    ) -> bytes | memoryview:
        manifest = await self.manifest(record)
        pieces = list(stripe.cut(manifest.chunk_bytes, offset, size))
        if len(pieces) == 1:
            return await self._piece(record, manifest, pieces[0], whole_chunks)
        results: list[bytes | memoryview] = [b""] * len(pieces)

        async def fill(position: int) -> None:
            results[position] = await self._piece(record, manifest, pieces[position], whole_chunks)

        await gather(fill, len(pieces))
        return b"".join(results)

    async def _piece(
        self, record: Inode, manifest: Manifest, piece: stripe.ChunkRange, whole: bool
    ) -> bytes | memoryview:
        placed = await self.entry(manifest, piece.index, record.replicas)
        if placed is None:
            return zeros(piece.size)
        return await self.chunk_range(placed, record.replicas, piece.start, piece.size, whole)

    async def chunk_range(
        self, placed: PlacedChunk, replicas: int, start: int, size: int, whole: bool = False
    ) -> bytes | memoryview:
        """A range of a chunk position: what is stored, then zeros."""
        stored = max(0, min(size, placed.ref.length - start))
        if not stored:
            return zeros(size)
        buffer = self._buffers.get(placed.ref.id)
        if buffer is not None:
            current_use().memory_bytes += stored
        elif whole:
            buffer = await self._buffers.fetch(placed, replicas)
        if buffer is not None:
            data = buffer[start : start + stored]
            self._buffers.note_read(placed.ref.id, stored)
        else:
            data = await self._chunks.read(placed, replicas, start, stored)
        return data if stored == size else b"".join((data, zeros(size - stored)))

    # ------------------------------------------------------------ readahead

    def read_ahead(
        self, record: Inode, start: int, end: int, arrived: Arrived | None = None
    ) -> int:
        """Have the chunks of [start, end) fetched in the background, as far as memory allows.

        `arrived` is told of each that is here. Returns the offset up to which all are ordered.
        """
        end = min(end, record.size)
        if record.manifest is None or start >= end:
            return start
        manifest = self._manifests.get(record.manifest.id)
        if manifest is None:
            return start
        index = stripe.locate(manifest.chunk_bytes, start)[0]
        while start < end:
            if manifest.page_of(index) is not None:
                self._start(self._load_page_quietly, manifest, index, record.replicas)
                return start
            begin, size = stripe.span(manifest.chunk_bytes, index)
            placed = manifest.entry(index)
            if placed is not None and not self._buffers.is_spent(placed.ref.id):
                is_known = self._buffers.is_known(placed.ref.id)
                if not is_known and not self._buffers.has_room(placed.ref.length):
                    return start
                if not is_known or arrived is not None:
                    self._start(self._fetch_quietly, placed, record.replicas, begin, arrived)
            start, index = begin + size, index + 1
        return start

    def read_run_ahead(self, record: Inode, start: int, end: int, arrived: RunArrived) -> None:
        """Have [start, end) fetched in the background, in part where a chunk is larger.

        Nothing happens if too much is under way: then the reader asks for it himself.
        """
        if record.manifest is not None and start < end:
            fetch = self._runs.begin(record.manifest.id, start, end)
            if fetch is not None:
                self._start(self._read_quietly, record, record.manifest.id, fetch, arrived)

    async def _read_quietly(
        self, record: Inode, manifest: bytes, fetch: RunFetch, arrived: RunArrived
    ) -> None:
        start, size = fetch.start, fetch.end - fetch.start
        try:
            fetch.data = memoryview(await self._read_pieces(record, start, size, False))
        except ModelfsError as error:  # as below
            log.debug("readahead: %s", error)
            return
        finally:
            self._runs.end(manifest, fetch)
        await trio.lowlevel.checkpoint()  # as below
        arrived(start, fetch.data)

    async def _fetch_quietly(
        self, placed: PlacedChunk, replicas: int, begin: int, arrived: Arrived | None
    ) -> None:
        try:
            data = await self._buffers.fetch(placed, replicas)
        except ModelfsError as error:  # whoever reads this range will be told
            log.debug("readahead: %s", error)
            return
        if arrived is not None:
            await trio.lowlevel.checkpoint()  # readers who wait for this chunk come first
            arrived(placed.ref.id, begin, data)

    def note_read(self, chunk: ChunkId, size: int) -> None:
        """The kernel has so many more bytes of a chunk."""
        self._buffers.note_read(chunk, size)

    async def _load_page_quietly(self, manifest: Manifest, index: int, replicas: int) -> None:
        try:
            await self.entry(manifest, index, replicas)
        except ModelfsError as error:  # as above
            log.debug("readahead: %s", error)


def zeros(size: int) -> bytes:
    """`size` zero bytes."""
    return ZEROS[:size] if size <= len(ZEROS) else bytes(size)


async def gather(task: Callable[[int], Awaitable[None]], count: int) -> None:
    """Run task(0) … task(count - 1) together.

    A `ModelfsError` or OSError of one is raised as itself, not in a group.
    """
    failures: list[ModelfsError | OSError] = []

    async def guarded(position: int) -> None:
        try:
            await task(position)
        except (ModelfsError, OSError) as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        for position in range(count):
            nursery.start_soon(guarded, position)
    if failures:
        raise failures[0]
