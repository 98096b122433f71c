"""A chunk store and a peer transport in memory: the same ports, for tests of what is above them.

Both run the contract suites of `modelfs.testing.contract_chunks`, so that they cannot drift from
the real ones. Beyond the ports they can be hurt: `damage` and `lose` chunks, and take nodes `down`
or make them `silent`.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import blake3
import trio

from modelfs.chunk import (
    FOOTER,
    Buffer,
    ChunkRef,
    block_table,
    covering_blocks,
    is_range_valid,
    is_table_valid,
)
from modelfs.errors import ChunkMissing, CorruptChunk, OutOfSpace, PeerUnavailable
from modelfs.ids import ChunkId, NodeId
from modelfs.limits import GIB
from modelfs.ports import ChunkStore, HeldChunk, Holding, OpenChunk, StoreUsage


@dataclass(frozen=True, slots=True)
class _Copy:
    data: bytes
    table: bytes
    holding: Holding
    put_at: float  # Unix seconds

    @property
    def file_bytes(self) -> int:
        """What the copy would take on a disk."""
        return len(self.data) + len(self.table) + FOOTER.size


class MemoryChunkStore:
    """Implements `modelfs.ports.ChunkStore`. Put and sync make nothing durable, of course."""

    def __init__(
        self,
        capacity_bytes: int = GIB,
        cache_bytes_max: int = GIB,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.where = "the memory store"
        self.syncs = 0  # how often `sync` was called
        self._capacity_bytes, self._cache_bytes_max = capacity_bytes, cache_bytes_max
        self._clock = clock
        self._copies: OrderedDict[ChunkId, _Copy] = OrderedDict()  # least recently used first
        self._lock = threading.RLock()

    # ------------------------------------------------------------ the port

    def read(self, ref: ChunkRef, offset: int, size: int) -> memoryview:
        """See `ChunkStore.read`."""
        copy = self._find(ref.id)
        start, end = covering_blocks(ref.length, offset, size)
        data = memoryview(copy.data)[start:end]
        if (
            len(copy.data) != ref.length
            or not is_table_valid(ref, copy.table)
            or not is_range_valid(copy.table, start, data)
        ):
            raise CorruptChunk(ref.id, self.where)
        return data[offset - start : offset - start + size]

    def put(self, ref: ChunkRef, table: Buffer, data: Buffer, holding: Holding) -> None:
        """See `ChunkStore.put`."""
        assert len(data) == ref.length
        new = _Copy(bytes(data), bytes(table), holding, self._clock())
        with self._lock:
            old = self._copies.get(ref.id)
            if (
                old is not None
                and is_table_valid(ref, old.table)
                and (old.holding is Holding.OWNED or holding is Holding.CACHED)
            ):
                self._copies[ref.id] = replace(old, put_at=new.put_at)
                self._copies.move_to_end(ref.id)
                return
            self._copies.pop(ref.id, None)  # torn, or cached and now to be owned
            if self._has_room(new):
                self._copies[ref.id] = new

    def adopt(self, path: Path, ref: ChunkRef, table: Buffer, holding: Holding) -> None:
        """See `ChunkStore.adopt`."""
        with path.open("rb") as file:
            data = file.read(ref.length)
        if len(data) < ref.length:
            raise CorruptChunk(ref.id, str(path))
        self.put(ref, table, data, holding)
        path.unlink()

    def sync(self) -> None:
        """See `ChunkStore.sync`."""
        with self._lock:
            self.syncs += 1

    def is_absent(self, chunk: ChunkId) -> bool:
        """See `ChunkStore.is_absent`."""
        return chunk not in self._copies

    def open(self, chunk: ChunkId) -> OpenChunk:
        """See `ChunkStore.open`. The descriptor is an anonymous file's."""
        copy = self._find(chunk)
        fd = os.memfd_create("chunk")
        view = memoryview(copy.data)
        while view:
            view = view[os.write(fd, view) :]
        return OpenChunk(fd, len(copy.data), copy.table)

    def has(self, chunks: Sequence[ChunkId], renew: bool) -> list[bool]:
        """See `ChunkStore.has`."""
        with self._lock:
            found = [
                chunk in self._copies and self._copies[chunk].holding is Holding.OWNED
                for chunk in chunks
            ]
            for chunk, is_here in zip(chunks, found, strict=True):
                if renew and is_here:
                    self._copies[chunk] = replace(self._copies[chunk], put_at=self._clock())
            return found

    def verify(self, chunk: ChunkId) -> bool:
        """See `ChunkStore.verify`."""
        copy = self._find(chunk, is_use=False)
        if blake3.blake3(copy.data).digest() == chunk and block_table(copy.data) == copy.table:
            return True
        with self._lock:
            if self._copies.get(chunk) is copy:
                del self._copies[chunk]
        return False

    def tidy_damaged(self, unneeded: Collection[ChunkId]) -> None:
        """See `ChunkStore.tidy_damaged`. Nothing is put aside."""

    def delete(self, chunk: ChunkId, if_put_at: float | None = None) -> bool:
        """See `ChunkStore.delete`."""
        with self._lock:
            copy = self._copies.get(chunk)
            if (
                copy is not None
                and copy.holding is Holding.OWNED
                and if_put_at is not None
                and copy.put_at != if_put_at
            ):
                return False
            self._copies.pop(chunk, None)
            return True

    def owned(self) -> Iterator[tuple[ChunkId, float]]:
        """See `ChunkStore.owned`."""
        with self._lock:
            copies = list(self._copies.items())
        return ((chunk, copy.put_at) for chunk, copy in copies if copy.holding is Holding.OWNED)

    def shelf(self, first: int) -> list[HeldChunk]:
        """See `ChunkStore.shelf`."""
        with self._lock:
            copies = [(chunk, self._copies[chunk]) for chunk in sorted(self._copies)]
        return [
            HeldChunk(chunk, copy.holding, copy.file_bytes)
            for chunk, copy in copies
            if chunk[0] == first
        ]

    def usage(self) -> StoreUsage:
        """See `ChunkStore.usage`."""
        with self._lock:
            copies = list(self._copies.values())
        owned = [copy.file_bytes for copy in copies if copy.holding is Holding.OWNED]
        cached = [copy.file_bytes for copy in copies if copy.holding is Holding.CACHED]
        return StoreUsage(
            owned_bytes=sum(owned),
            cached_bytes=sum(cached),
            owned_chunks=len(owned),
            cached_chunks=len(cached),
            capacity_bytes=self._capacity_bytes,
            free_bytes=max(0, self._capacity_bytes - sum(owned) - sum(cached)),
        )

    # ------------------------------------------------------------ for tests

    def damage(self, chunk: ChunkId, offset: int = 0) -> None:
        """Flip a bit of the copy."""
        with self._lock:
            copy = self._find(chunk)
            data = bytearray(copy.data)
            data[offset] ^= 1
            self._copies[chunk] = replace(copy, data=bytes(data))

    def lose(self, chunk: ChunkId) -> None:
        """Forget the copy, as a disk that lost a file."""
        with self._lock:
            del self._copies[chunk]

    # ------------------------------------------------------------ inside

    def _find(self, chunk: ChunkId, is_use: bool = True) -> _Copy:
        with self._lock:
            copy = self._copies.get(chunk)
            if copy is None:
                raise ChunkMissing(chunk, self.where)
            if is_use:
                self._copies.move_to_end(chunk)
            return copy

    def _has_room(self, new: _Copy) -> bool:
        """Evict what is needed. False: a CACHED chunk for which there is no room."""
        growth = new.file_bytes
        is_cached = new.holding is Holding.CACHED
        if is_cached and new.file_bytes > self._cache_bytes_max:
            return False
        while True:
            usage = self.usage()
            is_cache_full = is_cached and usage.cached_bytes + growth > self._cache_bytes_max
            if growth <= usage.free_bytes and not is_cache_full:
                return True
            victims = (
                chunk for chunk, copy in self._copies.items() if copy.holding is Holding.CACHED
            )
            victim = next(victims, None)
            if victim is None:
                break
            del self._copies[victim]
        if is_cached:
            return False
        raise OutOfSpace(f"{self.where} is full")


class MemoryPeers:
    """Implements `modelfs.ports.PeerTransport` over stores in this process.

    A node in `down` refuses at once; one in `silent` lets every caller wait out its patience.
    `restart` gives a node a new incarnation.
    """

    def __init__(self, stores: Mapping[NodeId, ChunkStore], patience: float = 10.0) -> None:
        """`patience` (seconds) is that of the calls that have no argument for it."""
        self.stores = dict(stores)
        self.down: set[NodeId] = set()
        self.silent: set[NodeId] = set()
        self.loads: dict[NodeId, float] = {}  # seconds, as `load` is to say
        self.damage_reports: list[tuple[NodeId, ChunkRef]] = []
        self._patience = patience
        self._incarnations = dict.fromkeys(self.stores, 1)

    async def fetch(
        self, node: NodeId, ref: ChunkRef, offset: int, size: int, patience: float
    ) -> memoryview:
        """See `PeerTransport.fetch`."""
        store = await self._reach(node, patience)
        try:
            return store.read(ref, offset, size)
        except ChunkMissing:
            raise ChunkMissing(ref.id, f"node {node}") from None
        except CorruptChunk:
            raise CorruptChunk(ref.id, f"node {node}") from None

    async def put(
        self,
        node: NodeId,
        ref: ChunkRef,
        table: Buffer,
        data: Buffer,
        offer: bool = False,
    ) -> bool:
        """See `PeerTransport.put`."""
        store = await self._reach(node)
        if offer and store.has([ref.id], renew=True)[0]:
            return False
        store.put(ref, table, data, Holding.OWNED)
        return True

    async def sync(self, node: NodeId, incarnation: str | None = None) -> None:
        """See `PeerTransport.sync`."""
        store = await self._reach(node)
        if incarnation not in (None, str(self._incarnations[node])):
            raise PeerUnavailable(node, "it has restarted since the chunks were put")
        store.sync()

    async def incarnation(self, node: NodeId) -> str:
        """See `PeerTransport.incarnation`."""
        await self._reach(node)
        return str(self._incarnations[node])

    async def has(self, node: NodeId, chunks: Sequence[ChunkId], renew: bool) -> list[bool]:
        """See `PeerTransport.has`."""
        return (await self._reach(node)).has(chunks, renew)

    async def report_damage(self, node: NodeId, ref: ChunkRef) -> None:
        """See `PeerTransport.report_damage`."""
        store = await self._reach(node)
        self.damage_reports.append((node, ref))
        store.verify(ref.id)

    def load(self, node: NodeId) -> float:
        """See `PeerTransport.load`. What the test has put in `loads`."""
        return self.loads.get(node, 0.0)

    def restart(self, node: NodeId) -> None:
        """Let a node's process end and begin again; its store stays."""
        self._incarnations[node] += 1

    async def _reach(self, node: NodeId, patience: float | None = None) -> ChunkStore:
        await trio.lowlevel.checkpoint()
        if node in self.silent:
            await trio.sleep(self._patience if patience is None else patience)
            raise PeerUnavailable(node, "silent")
        if node in self.down or node not in self.stores:
            raise PeerUnavailable(node, "connection refused")
        return self.stores[node]
