"""The seams: what the drivers need from etcd, from a disk and from a peer.

Each port has a contract suite in `modelfs.testing.contract`, which the memory implementation and
the real one both run. `MetadataStore` and `PeerTransport` are async (trio); `ChunkStore` blocks and
is called on worker threads, since all that it does is move bytes with the GIL released.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from modelfs.chunk import Buffer, ChunkRef
from modelfs.ids import ChunkId, NodeId, Revision

# ---------------------------------------------------------------- metadata


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key of the store, as of `mod_revision`."""

    key: bytes
    value: bytes
    create_revision: Revision
    mod_revision: Revision


class Target(Enum):
    """Which revision of a key a comparison looks at. An absent key has both at 0."""

    CREATE = "create_revision"
    MOD = "mod_revision"


@dataclass(frozen=True, slots=True)
class Compare:
    """True if the key's revision is exactly this one.

    With `range_end`, true if it holds for every key in [key, range_end); with revision 0 that
    says that the range is empty.
    """

    key: bytes
    target: Target
    revision: Revision
    range_end: bytes | None = None


@dataclass(frozen=True, slots=True)
class Put:
    """Set a key; `lease` (0: none) deletes it when that lease lapses."""

    key: bytes
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a key, or with `range_end` all keys in [key, range_end)."""

    key: bytes
    range_end: bytes | None = None


@dataclass(frozen=True, slots=True)
class Txn:
    """If every comparison holds, do all of `ops` in one revision; otherwise do nothing.

    No key is put or deleted twice in one transaction.
    """

    compares: tuple[Compare, ...]
    ops: tuple[Put | Delete, ...]


@dataclass(frozen=True, slots=True)
class TxnResult:
    """What became of a transaction. `revision` is the store's after it, also when it failed."""

    succeeded: bool
    revision: Revision


@dataclass(frozen=True, slots=True)
class Event:
    """One key changed. `value` is None if it was deleted."""

    key: bytes
    value: bytes | None
    create_revision: Revision
    mod_revision: Revision


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """All events of one or more whole revisions, in order; `revision` is the last of them."""

    revision: Revision
    events: tuple[Event, ...]


class MetadataStore(Protocol):
    """A linearizable key-value store with transactions, leases and watches: etcd.

    Keys are relative to the cluster's prefix. Every call has a deadline of its own
    (`limits.ETCD_REQUEST_SECONDS`). Reads raise `MetadataUnavailable`. Writes raise
    `MetadataUnavailable` if they surely had no effect, `MetadataUncertain` if nobody knows.
    """

    async def commit(self, txn: Txn) -> TxnResult:
        """Carry out one transaction."""
        ...

    async def get(self, key: bytes) -> KeyValue | None:
        """A linearizable read of one key: sees every commit that returned before it began."""
        ...

    async def load(
        self, prefix: bytes, bare: bytes | None = None
    ) -> tuple[Revision, list[KeyValue]]:
        """All keys under `prefix` as of one revision, in key order; paged inside.

        Of the keys under `bare` the values are left out (b""), to save memory.
        """
        ...

    async def page(self, prefix: bytes, after: bytes, limit: int) -> list[KeyValue]:
        """The first keys under `prefix` that sort after `after`, as they are now; in key order.

        At most `limit`, and at least one if there is any. For walks through more than fits in
        memory; from page to page the keys may change.
        """
        ...

    def watch(
        self, prefix: bytes, start: Revision
    ) -> AbstractAsyncContextManager[AsyncIterator[WatchBatch]]:
        """All changes under `prefix` from revision `start` on, each once, in order.

        The iterator raises `HistoryCompacted` if `start` is compacted away, and
        `MetadataUnavailable` when the connection or the member's leader is lost; the caller
        then watches again from the last revision that it saw plus one.
        """
        ...

    async def grant(self, ttl_seconds: int) -> int:
        """Make a lease; returns its id."""
        ...

    async def keep_alive(self, lease: int) -> bool:
        """Renew a lease for its full time. False if it has lapsed."""
        ...

    async def revoke(self, lease: int) -> None:
        """End a lease now, and delete its keys. An unknown lease is no error."""
        ...


# ---------------------------------------------------------------- chunks


class Holding(Enum):
    """Why a store holds a chunk."""

    OWNED = "owned"  # a replica, or a hand-off: deleted by reclaim only
    CACHED = "cached"  # a convenience: evicted least-recently-used when room is needed


@dataclass(frozen=True, slots=True)
class HeldChunk:
    """A copy that a store lists."""

    chunk: ChunkId
    holding: Holding
    file_bytes: int  # what its file takes


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """How full a chunk store is; all in bytes but the counts."""

    owned_bytes: int
    cached_bytes: int
    owned_chunks: int
    cached_chunks: int
    capacity_bytes: int  # of the disk
    free_bytes: int  # on the disk, for us


@dataclass(frozen=True, slots=True)
class OpenChunk:
    """A chunk file, opened for sending. The caller closes `fd`. Nothing is verified yet."""

    fd: int
    length: int  # bytes of data, from offset 0
    table: bytes


class ChunkStore(Protocol):
    """The chunks of one node. Blocking; safe to call from many threads at once.

    Every method raises OSError if the disk itself fails.
    """

    def read(self, ref: ChunkRef, offset: int, size: int) -> memoryview:
        """`size` verified bytes from `offset` of a chunk.

        Raises `ChunkMissing`, or `CorruptChunk` if table or data disagree with `ref`.
        """
        ...

    def put(self, ref: ChunkRef, table: Buffer, data: Buffer, holding: Holding) -> None:
        """Store a chunk whose table and data have been verified. Idempotent.

        An OWNED chunk's file is fsynced before this returns, and its name survives a crash once
        `sync` has returned. A CACHED chunk that is put as OWNED becomes owned. Raises
        `OutOfSpace`; a failed put leaves nothing behind.
        """
        ...

    def adopt(self, path: Path, ref: ChunkRef, table: Buffer, holding: Holding) -> None:
        """`put` for bytes that are in a file already: no byte is written twice.

        The first `ref.length` bytes of the file, which is on the store's file system, are the
        chunk's data. The store takes the file away, also where it has the chunk already. After
        an error the file is still there, and its data too. Raises as `put` does, and
        `CorruptChunk` if the file is too short.
        """
        ...

    def sync(self) -> None:
        """Make the names of all chunks put so far survive a crash. Concurrent calls share work."""
        ...

    def open(self, chunk: ChunkId) -> OpenChunk:
        """Open a chunk for sending. Raises `ChunkMissing`; `CorruptChunk` if it is not whole."""
        ...

    def has(self, chunks: Sequence[ChunkId], renew: bool) -> list[bool]:
        """For each id, whether an OWNED copy is here.

        With `renew`, the copies that are here count as just put, so that reclaim leaves them
        alone for another grace period: a live writer relies on them.
        """
        ...

    def is_absent(self, chunk: ChunkId) -> bool:
        """Whether the chunk is known not to be here. Never blocks; False where a look is needed."""
        ...

    def verify(self, chunk: ChunkId) -> bool:
        """Read a chunk whole and check it against its own table, checksum and BLAKE3 name.

        False if it is damaged; the store does not have it any more then, so that a good copy can
        be put in its place. What was OWNED may be put aside, and is kept at least until then: it
        may be all that is left. Raises `ChunkMissing`. Does not count as a use of a CACHED copy.
        """
        ...

    def tidy_damaged(self, unneeded: Collection[ChunkId]) -> None:
        """Remove what `verify` has put aside of these chunks, which nobody needs, and most of what
        has been replaced by good copies since.
        """
        ...

    def delete(self, chunk: ChunkId, if_put_at: float | None = None) -> bool:
        """Remove a chunk, owned or cached. A missing one is no error.

        False, and nothing is removed, if it is owned and `owned` tells another time for it than
        `if_put_at`: it was put, or renewed by `has`, since the caller looked, and somebody has
        come to rely on it. Which of the times is later says nothing: clocks are set back.
        """
        ...

    def owned(self) -> Iterator[tuple[ChunkId, float]]:
        """All owned chunks with the time (Unix seconds) at which each was last put."""
        ...

    def shelf(self, first: int) -> list[HeldChunk]:
        """All chunks, OWNED and CACHED, whose id begins with this byte; in the order of their ids.

        Chunks that come or go meanwhile may be left out.
        """
        ...

    def usage(self) -> StoreUsage:
        """How full the store is."""
        ...


# ---------------------------------------------------------------- peers


class PeerTransport(Protocol):
    """Conversations with the other nodes' chunk stores.

    Every call raises `PeerUnavailable` when the peer cannot be reached, or sends nothing for as
    long as `patience` (seconds) says. A peer that keeps sending is never timed out. Every call
    raises `PeerRefused` when the peer answers that it cannot do it, for example since its disk
    fails.
    """

    async def fetch(
        self, node: NodeId, ref: ChunkRef, offset: int, size: int, patience: float
    ) -> memoryview:
        """`size` verified bytes from `offset` of a peer's chunk.

        Raises `ChunkMissing` or `CorruptChunk` besides.
        """
        ...

    async def put(
        self,
        node: NodeId,
        ref: ChunkRef,
        table: Buffer,
        data: Buffer,
        offer: bool = False,
    ) -> bool:
        """Store a chunk on a peer, as OWNED. Raises `OutOfSpace` besides.

        With `offer`, the peer is asked first whether it has the chunk; then it counts as just put
        there, and no byte is sent. Returns whether it was sent.
        """
        ...

    async def sync(self, node: NodeId, incarnation: str | None = None) -> None:
        """`ChunkStore.sync` on a peer.

        With `incarnation`, raises `PeerUnavailable` if the peer is not in that one any more: its
        machine may have lost the names of chunks put before, so a writer must put them again.
        """
        ...

    async def incarnation(self, node: NodeId) -> str:
        """What a peer's process is called as long as it lives. Ask before the first put."""
        ...

    async def has(self, node: NodeId, chunks: Sequence[ChunkId], renew: bool) -> list[bool]:
        """`ChunkStore.has` on a peer, for any number of ids."""
        ...

    def load(self, node: NodeId) -> float:
        """How long a request to this peer would take about now, in seconds, to compare peers."""
        ...

    async def report_damage(self, node: NodeId, ref: ChunkRef) -> None:
        """Tell a peer that its copy fails verification, so that it checks and repairs it."""
        ...
