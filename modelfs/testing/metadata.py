"""`MemoryMetadataStore`: etcd's rules in memory, with faults on demand.

Kept faithful by the contract suite, which real etcd runs too, and by a test that sends both the
same random transactions. The rules that matter:

- The store begins at revision 1. A transaction that changes something is one revision; one that
  fails, or deletes only what is absent, is none.
- A comparison over an empty range, or with an absent key, sees revision 0.
- A key belongs to the lease of its last put. A lease that ends deletes its keys in one revision.
- A deletion's event has `create_revision` 0.
- After a compaction at revision C, a watch from below C fails.

Time moves only by `advance`. One trio run at a time; not safe for threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from types import TracebackType
from typing import Self

import trio

from modelfs.errors import (
    HistoryCompacted,
    MetadataOutOfReach,
    MetadataUnavailable,
    MetadataUncertain,
    ProtocolError,
)
from modelfs.ids import Revision
from modelfs.limits import KIB, TRANSACTION_OPS_MAX
from modelfs.ports import Compare, Delete, Event, KeyValue, Put, Target, Txn, TxnResult, WatchBatch

REQUEST_BYTES_MAX = 1536 * KIB  # etcd's --max-request-bytes


class CommitFault(Enum):
    """What happens to a commit whose answer is lost."""

    APPLIED = "applied"
    LOST = "lost"


@dataclass(slots=True)
class _Lease:
    ttl_seconds: int
    expires_at: float  # on the store's own clock
    keys: set[bytes] = field(default_factory=set)


class MemoryMetadataStore:
    """A `MetadataStore` in memory.

    Faults: while `unavailable` is True, every call and every watch raises `MetadataOutOfReach`;
    `next_commit_fault` makes the next commit raise `MetadataUncertain` and is then None again.
    """

    def __init__(self) -> None:
        self.revision = Revision(1)
        self.now_seconds = 0.0
        self.compact_revision = Revision(0)
        self.next_commit_fault: CommitFault | None = None
        self._keys: dict[bytes, KeyValue] = {}
        self._lease_of: dict[bytes, int] = {}
        self._leases: dict[int, _Lease] = {}
        self._last_lease = 0
        self._history: list[Event] = []  # in order; of revisions from compact_revision on
        self._unavailable = False
        self._breaks = 0  # how often watches were broken; a watch remembers the count it began at
        self._waiting = trio.lowlevel.ParkingLot()

    # ---------------------------------------------------------------- faults and time

    @property
    def unavailable(self) -> bool:
        """Whether the store plays dead. Setting it to True breaks all watches."""
        return self._unavailable

    @unavailable.setter
    def unavailable(self, value: bool) -> None:
        self._unavailable = value
        if value:
            self.break_watches()

    def break_watches(self) -> None:
        """Let every watch that is open now raise `MetadataUnavailable`."""
        self._breaks += 1
        self._waiting.unpark_all()

    def advance(self, seconds: float) -> None:
        """Let time pass; leases lapse in the order of their expiry."""
        self.now_seconds += seconds
        lapsed = [
            (lease.expires_at, number)
            for number, lease in self._leases.items()
            if lease.expires_at <= self.now_seconds
        ]
        for _, number in sorted(lapsed):
            self.expire(number)

    def expire(self, lease: int) -> None:
        """Let a lease lapse now. An unknown one is no error."""
        ended = self._leases.pop(lease, None)
        if ended is not None:
            self._apply([Delete(key) for key in sorted(ended.keys)])

    def compact(self, revision: Revision) -> None:
        """Forget the history before `revision`."""
        assert self.compact_revision < revision <= self.revision
        self.compact_revision = revision
        self._history = [event for event in self._history if event.mod_revision >= revision]

    # ---------------------------------------------------------------- the port

    async def commit(self, txn: Txn) -> TxnResult:
        """See the port."""
        assert len(txn.ops) <= TRANSACTION_OPS_MAX and len(txn.compares) <= TRANSACTION_OPS_MAX
        await self._reach()
        _check(txn)
        fault, self.next_commit_fault = self.next_commit_fault, None
        if fault is CommitFault.LOST:
            raise MetadataUncertain("the request was lost, as the test asked")
        succeeded = all(self._holds(compare) for compare in txn.compares)
        if succeeded:
            leases = {op.lease for op in txn.ops if isinstance(op, Put)} - {0}
            if not leases <= self._leases.keys():
                raise MetadataUnavailable("the lease of a key to be put has lapsed")
            self._apply(txn.ops)
        if fault is CommitFault.APPLIED:
            raise MetadataUncertain("the answer was lost, as the test asked")
        return TxnResult(succeeded, self.revision)

    async def get(self, key: bytes) -> KeyValue | None:
        """See the port."""
        await self._reach()
        return self._keys.get(key)

    async def load(
        self, prefix: bytes, bare: bytes | None = None
    ) -> tuple[Revision, list[KeyValue]]:
        """See the port."""
        await self._reach()
        keys = sorted(key for key in self._keys if key.startswith(prefix))
        rows = [self._keys[key] for key in keys]
        if bare is not None:
            rows = [replace(r, value=b"") if r.key.startswith(bare) else r for r in rows]
        return self.revision, rows

    async def page(self, prefix: bytes, after: bytes, limit: int) -> list[KeyValue]:
        """See the port."""
        assert limit > 0
        await self._reach()
        keys = sorted(key for key in self._keys if key.startswith(prefix) and key > after)
        return [self._keys[key] for key in keys[:limit]]

    def watch(self, prefix: bytes, start: Revision) -> MemoryWatch:
        """See the port."""
        assert start > 0
        return MemoryWatch(self, prefix, start)

    async def grant(self, ttl_seconds: int) -> int:
        """See the port."""
        await self._reach()
        self._last_lease += 1
        self._leases[self._last_lease] = _Lease(ttl_seconds, self.now_seconds + ttl_seconds)
        return self._last_lease

    async def keep_alive(self, lease: int) -> bool:
        """See the port."""
        await self._reach()
        kept = self._leases.get(lease)
        if kept is None:
            return False
        kept.expires_at = self.now_seconds + kept.ttl_seconds
        return True

    async def revoke(self, lease: int) -> None:
        """See the port."""
        await self._reach()
        self.expire(lease)

    # ---------------------------------------------------------------- inside

    async def _reach(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._unavailable:
            raise MetadataOutOfReach("the store is unavailable, as the test asked")

    def _holds(self, compare: Compare) -> bool:
        targets = [self._keys[key] for key in self._in_range(compare.key, compare.range_end)]
        if not targets:
            return compare.revision == 0
        is_create = compare.target is Target.CREATE
        revisions = {kv.create_revision if is_create else kv.mod_revision for kv in targets}
        return revisions == {compare.revision}

    def _in_range(self, key: bytes, range_end: bytes | None) -> list[bytes]:
        if range_end is None:
            return [key] if key in self._keys else []
        return sorted(known for known in self._keys if key <= known < range_end)

    def _apply(self, ops: Iterable[Put | Delete]) -> None:
        """Carry out operations in order, as one revision if they change anything."""
        revision = Revision(self.revision + 1)
        events: list[Event] = []
        for op in ops:
            if isinstance(op, Put):
                events.append(self._put(op, revision))
            else:
                events += [
                    self._delete(key, revision) for key in self._in_range(op.key, op.range_end)
                ]
        if events:
            self.revision = revision
            self._history += events
            self._waiting.unpark_all()

    def _put(self, op: Put, revision: Revision) -> Event:
        self._detach(op.key)
        if op.lease:
            self._leases[op.lease].keys.add(op.key)
            self._lease_of[op.key] = op.lease
        known = self._keys.get(op.key)
        created = revision if known is None else known.create_revision
        self._keys[op.key] = KeyValue(op.key, op.value, created, revision)
        return Event(op.key, op.value, created, revision)

    def _delete(self, key: bytes, revision: Revision) -> Event:
        self._detach(key)
        del self._keys[key]
        return Event(key, None, Revision(0), revision)

    def _detach(self, key: bytes) -> None:
        lease = self._leases.get(self._lease_of.pop(key, 0))
        if lease is not None:
            lease.keys.discard(key)


class MemoryWatch:
    """The context manager and iterator behind `MemoryMetadataStore.watch`."""

    def __init__(self, store: MemoryMetadataStore, prefix: bytes, start: Revision) -> None:
        self._store, self._prefix, self._next = store, prefix, start
        self._breaks_at_start = store._breaks

    async def __aenter__(self) -> Self:
        await trio.lowlevel.checkpoint()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> WatchBatch:
        await trio.lowlevel.checkpoint()
        store = self._store
        while True:
            if store._unavailable or store._breaks != self._breaks_at_start:
                raise MetadataUnavailable("the watch is broken, as the test asked")
            if self._next < store.compact_revision:
                raise HistoryCompacted(store.compact_revision)
            events = tuple(
                event
                for event in store._history
                if event.mod_revision >= self._next and event.key.startswith(self._prefix)
            )
            self._next = max(self._next, Revision(store.revision + 1))
            if events:
                return WatchBatch(events[-1].mod_revision, events)
            await store._waiting.park()


def _check(txn: Txn) -> None:
    """Refuse what etcd refuses: a key put twice, or put and deleted; too many bytes."""
    puts = [op.key for op in txn.ops if isinstance(op, Put)]
    if len(set(puts)) < len(puts):
        raise ProtocolError("a key is put twice in one transaction")
    for op in txn.ops:
        if isinstance(op, Delete):
            if op.range_end is None:
                is_put = op.key in puts
            else:
                is_put = any(op.key <= key < op.range_end for key in puts)
            if is_put:
                raise ProtocolError("a key is put and deleted in one transaction")
    size_bytes = sum(len(op.key) + len(op.value) for op in txn.ops if isinstance(op, Put))
    if size_bytes > REQUEST_BYTES_MAX:
        raise ProtocolError(f"a transaction of {size_bytes} bytes is too large")
