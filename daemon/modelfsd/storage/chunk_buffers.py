"""Whole chunks in memory, for those who read on and for all who want the same at one time."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import trio

from modelfs.errors import ModelfsError
from modelfs.ids import ChunkId
from modelfs.limits import MIB
from modelfs.manifest import PlacedChunk
from modelfsd.budget import ByteBudget
from modelfsd.stages import timed
from modelfsd.storage.chunks import Chunks

SPENT_BYTES_MAX = 16 * MIB


class ChunkBuffers:
    """Whole chunks in memory; one fetch at a time for each.

    A chunk whose bytes have all been read is *spent*: the kernel has them, and data should be in
    memory once. A few spent ones are kept for who comes a moment later; their memory is the next
    to be used again, while the processor's caches still have it. Of the others the least recently
    used goes first.
    """

    def __init__(self, chunks: Chunks, total_bytes: int) -> None:
        self._chunks = chunks
        self._budget = ByteBudget(total_bytes)
        self._held: OrderedDict[ChunkId, _Held] = OrderedDict()  # spent ones are not in here
        self._spent: OrderedDict[ChunkId, _Held] = OrderedDict()
        self._held_bytes = self._spent_bytes = 0  # of both; of the spent ones among them
        self._fetching: dict[ChunkId, _Fetch] = {}

    @property
    def used_bytes(self) -> int:
        """Bytes held, and on their way."""
        return self._budget.used_bytes

    def get(self, chunk: ChunkId) -> memoryview | None:
        """A chunk that is here."""
        found = self._held.get(chunk)
        if found is not None:
            self._held.move_to_end(chunk)
            return found.data
        found = self._spent.get(chunk)
        return found.data if found is not None else None

    def note_read(self, chunk: ChunkId, size: int) -> None:
        """So many bytes of a chunk were handed out; if that was the last of it, it is spent."""
        held = self._held.get(chunk)
        if held is None:
            return
        held.unread_bytes -= size
        if held.unread_bytes <= 0:
            self._spent[chunk] = self._held.pop(chunk)
            self._spent_bytes += len(held.data)
            while self._spent_bytes > SPENT_BYTES_MAX:
                self._let_go_of_one()

    def is_known(self, chunk: ChunkId) -> bool:
        """Whether the chunk is here or on its way."""
        return chunk in self._held or chunk in self._fetching or chunk in self._spent

    def is_spent(self, chunk: ChunkId) -> bool:
        """Whether all of the chunk has been read."""
        return chunk in self._spent

    def has_room(self, size: int) -> bool:
        """Whether a fetch can begin without waiting for another to end."""
        fetching_bytes = self._budget.used_bytes - self._held_bytes
        return fetching_bytes + size <= self._budget.total_bytes

    def drop(self) -> int:
        """Let go of every buffer that is held; returns how many bytes they had."""
        freed = self._held_bytes
        self._make_room(self._budget.total_bytes)
        return freed

    async def fetch(self, placed: PlacedChunk, replicas: int) -> memoryview:
        """A whole chunk: from here, from a fetch under way, or by a new one."""
        chunk = placed.ref.id
        found = self.get(chunk)
        if found is not None:
            return found
        fetch = self._fetching.get(chunk)
        if fetch is None:
            fetch = self._fetching[chunk] = _Fetch()
            await self._carry_out(fetch, placed, replicas)
        else:
            await fetch.done.wait()
        if fetch.error is not None:
            raise fetch.error
        assert fetch.data is not None
        return fetch.data

    async def _carry_out(self, fetch: _Fetch, placed: PlacedChunk, replicas: int) -> None:
        size = placed.ref.length
        is_taken = False
        try:
            self._make_room(size)
            with timed("memory_queue"):
                await self._budget.take(size)
            is_taken = True
            fetch.data = await self._chunks.read(placed, replicas, 0, size)
            self._held[placed.ref.id] = _Held(fetch.data, size)
            self._held_bytes += size
        except ModelfsError as error:
            fetch.error = error
        except BaseException:
            fetch.error = ModelfsError("the read was cancelled")
            raise
        finally:
            if is_taken and fetch.data is None:
                self._budget.give(size)
            del self._fetching[placed.ref.id]
            fetch.done.set()
            self._make_room(self._budget.wanted_bytes)

    def _make_room(self, size: int) -> None:
        """Let go of buffers until `size` bytes are free, or none is held."""
        while self._held_bytes and self._budget.used_bytes + size > self._budget.total_bytes:
            self._let_go_of_one()

    def _let_go_of_one(self) -> None:
        if self._spent:
            size = len(self._spent.popitem(last=False)[1].data)
            self._spent_bytes -= size
        else:
            size = len(self._held.popitem(last=False)[1].data)
        self._held_bytes -= size
        self._budget.give(size)


@dataclass(slots=True)
class _Held:
    """A chunk that is here."""

    data: memoryview
    unread_bytes: int


class _Fetch:
    """A fetch under way, and those who wait for it."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.data: memoryview | None = None
        self.error: ModelfsError | None = None
