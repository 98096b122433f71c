"""Group commit: transactions that wait at the same time share one.

An etcd transaction costs a round of Raft and a synced log write, whatever it holds. So while some
are under way, what arrives next is merged: the comparisons of all, the operations of all, and one
`seq` with the operation ids of all. If the merged comparisons hold, every member has succeeded. If
not, at least one member has lost a race, and each is sent again on its own, as after a refusal by
etcd, which may be about one of them: merging never changes what a transaction means, only what it
costs.

When etcd has been out of reach for as long as a request may take, those who wait for their turn are
told so too: one after the other they would wait for minutes.

Who shared a transaction comes back soon with the next: eight processes that make files are in
step then. A batch that is smaller than the last waits for them, no longer than the last transaction
took, and 10 ms at most. Who is alone never waits, and who is left alone waits less each time.

What can wait (a lease that goes back) names its patience, and rides along with the next batch: a
process that makes small files one after another pays for two transactions each, not for three.

Two transactions may be merged if neither writes a key that the other compares or writes. The
*blind* keys (a directory's times) are excepted: the last writer wins, as it would one after the
other. A transaction that compares a range goes alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import trio

from modelfs import keys
from modelfs.errors import (
    MetadataOutOfReach,
    MetadataUnavailable,
    MetadataUncertain,
    ModelfsError,
    ProtocolError,
)
from modelfs.limits import MIB, TRANSACTION_OPS_MAX
from modelfs.ports import MetadataStore, Put, Txn, TxnResult
from modelfsd.stages import timed

IN_FLIGHT_MAX = 2  # one on its way while one is being written; a third gained nothing
MERGED_MAX = 24  # a create has 2 comparisons and 4 operations
MERGED_BYTES_MAX = 1 * MIB  # of keys and values: etcd takes requests of 1.5 MiB
WAITING_MIN = MERGED_MAX // 2  # fewer wait for the one in flight, and then share one
COMPANY_MIN = 3  # fewer are not waited for: two fall into step by themselves or not at all
COMPANY_SECONDS_MAX = 0.01  # to wait for those who shared the last one


@dataclass(slots=True, eq=False)
class _Ticket:
    """One caller's transaction."""

    txn: Txn
    operation: str
    ride: trio.CancelScope | None = None  # until which it waits for another to go with
    done: trio.Event = field(default_factory=trio.Event)
    result: TxnResult | None = None
    error: ModelfsError | None = None


class GroupCommit:
    """Sends transactions to one store. `run_in_background` starts a task in the node's nursery."""

    def __init__(self, store: MetadataStore, run_in_background: Callable[..., None]) -> None:
        self._store, self._start = store, run_in_background
        self._waiting: deque[_Ticket] = deque()
        self._riders: deque[_Ticket] = deque()  # not in a hurry
        self._in_flight = 0
        self._expected = 1  # how many will want to share the next one
        self._last_seconds = 0.0  # that the last one took
        self._arrival = trio.Event()
        self.requests = 0

    async def commit(self, txn: Txn, operation: str, patience_seconds: float = 0.0) -> TxnResult:
        """Carry out a transaction, and put `seq` with the operation's id. Raises as the store.

        With patience it waits so long for another one that it can go with.
        """
        ticket = _Ticket(txn, operation)
        if not patience_seconds or not await self._ride(ticket, patience_seconds):
            self._queue(ticket)
            await ticket.done.wait()
        if ticket.error is not None:
            raise ticket.error
        assert ticket.result is not None
        return ticket.result

    async def _ride(self, ticket: _Ticket, patience_seconds: float) -> bool:
        """Wait for a batch to go with. False if none came."""
        self._riders.append(ticket)
        try:
            with trio.move_on_after(patience_seconds) as ticket.ride:
                await ticket.done.wait()
        finally:
            is_left = ticket in self._riders
            if is_left:
                self._riders.remove(ticket)
        if not is_left:
            await ticket.done.wait()
        return not is_left

    def hurry(self) -> None:
        """Somebody waits for what has patience: have it sent now."""
        for ticket in self._riders:
            assert ticket.ride is not None
            ticket.ride.cancel()

    def _queue(self, ticket: _Ticket) -> None:
        """Have it sent with the next batch."""
        self._waiting.append(ticket)
        self._arrival.set()
        is_due = not self._in_flight or len(self._waiting) >= WAITING_MIN
        if is_due and self._in_flight < IN_FLIGHT_MAX:
            self._in_flight += 1
            self._start(self._send_all)

    async def _send_all(self) -> None:
        """Send batches until nobody waits."""
        try:
            while self._waiting:
                await self._wait_for_company()
                if self._waiting:  # else another took them along
                    batch = self._next_batch()
                    company = sum(ticket.ride is None for ticket in batch)
                    self._expected = max(company, self._expected * 3 // 4)
                    await self._send(batch)
        finally:
            self._in_flight -= 1

    async def _wait_for_company(self) -> None:
        """Return when as many wait as are expected, or when that has lasted long enough."""
        if self._expected < COMPANY_MIN:
            return
        with trio.move_on_after(min(self._last_seconds, COMPANY_SECONDS_MAX)):
            while len(self._waiting) < self._expected:
                if self._arrival.is_set():
                    self._arrival = trio.Event()
                await self._arrival.wait()

    def _next_batch(self) -> list[_Ticket]:
        """The first in the queue, those behind it that can be merged with it, and riders."""
        batch = [self._waiting.popleft()]
        merged = _Footprint.of(batch[0].txn)
        run = _run_of(batch[0].operation)
        for queue in (self._waiting, self._riders):
            kept: deque[_Ticket] = deque()
            while queue and len(batch) < MERGED_MAX:
                ticket = queue.popleft()
                footprint = _Footprint.of(ticket.txn)
                if _run_of(ticket.operation) == run and merged.admits(footprint):
                    merged.add(footprint)
                    batch.append(ticket)
                else:
                    kept.append(ticket)
            queue.extendleft(reversed(kept))
        return batch

    async def _send(self, batch: list[_Ticket]) -> None:
        try:
            result = await (self._commit(batch) if len(batch) == 1 else self._commit_merged(batch))
            if result is None:
                await self._send_each(batch)
                return
            for ticket in batch:
                ticket.result = result
        except ModelfsError as error:
            self._fail(batch, error)
            if isinstance(error, MetadataOutOfReach):
                waiting, self._waiting = self._waiting, deque()
                self._fail(waiting, error)
        finally:
            self._fail(batch, MetadataUncertain("the node is stopping"))

    async def _send_each(self, batch: list[_Ticket]) -> None:
        """Raises `MetadataOutOfReach`, for those that have not been sent by then."""
        for ticket in batch:
            await self._send([ticket])
            if isinstance(ticket.error, MetadataOutOfReach):
                raise ticket.error

    @staticmethod
    def _fail(tickets: Iterable[_Ticket], error: ModelfsError) -> None:
        """End the transactions, with this error if they have no outcome yet."""
        for ticket in tickets:
            if ticket.result is None and ticket.error is None:
                ticket.error = error
            ticket.done.set()

    async def _commit_merged(self, batch: list[_Ticket]) -> TxnResult | None:
        """None if each is to be sent on its own: nothing has happened then."""
        try:
            result = await self._commit(batch)
        except MetadataOutOfReach:
            raise
        except (MetadataUnavailable, ProtocolError):
            return None  # etcd's refusal of one of them
        return result if result.succeeded else None

    async def _commit(self, batch: list[_Ticket]) -> TxnResult:
        self.requests += 1
        compares = [compare for ticket in batch for compare in ticket.txn.compares]
        ops = {op.key: op for ticket in batch for op in ticket.txn.ops}
        ids = " ".join(ticket.operation for ticket in batch)
        ops[keys.SEQ] = Put(keys.SEQ, ids.encode("ascii"))
        txn = Txn(tuple(dict.fromkeys(compares)), tuple(ops.values()))
        started = trio.current_time()
        with timed("etcd_txn"):
            result = await self._store.commit(txn)
        self._last_seconds = trio.current_time() - started
        return result


def _run_of(operation: str) -> str:
    """The part of an operation id that tells on whose behalf it is: never mixed in one `seq`."""
    return operation.rpartition(":")[0]


@dataclass(slots=True)
class _Footprint:
    """Which keys a transaction, or several, compares and writes."""

    compared: set[bytes]
    written: set[bytes]
    compare_count: int
    size_bytes: int
    is_alone: bool

    @classmethod
    def of(cls, txn: Txn) -> _Footprint:
        compared = {compare.key for compare in txn.compares}
        written = {op.key for op in txn.ops if not op.key.startswith(keys.DIRTIME_PREFIX)}
        # A directory's times are blind only where they are put: a removal goes with its inode.
        ranged = any(compare.range_end is not None for compare in txn.compares)
        size_bytes = sum(len(compare.key) for compare in txn.compares)
        size_bytes += sum(
            len(op.key) + (len(op.value) if isinstance(op, Put) else 0) for op in txn.ops
        )
        return cls(compared, written, len(txn.compares), size_bytes, ranged)

    def admits(self, other: _Footprint) -> bool:
        if self.is_alone or other.is_alone:
            return False
        if self.compare_count + other.compare_count > TRANSACTION_OPS_MAX:
            return False
        if self.size_bytes + other.size_bytes > MERGED_BYTES_MAX:
            return False
        if len(self.written) + len(other.written) > TRANSACTION_OPS_MAX // 2:
            return False
        clashes = self.written & (other.compared | other.written) or other.written & self.compared
        return not clashes

    def add(self, other: _Footprint) -> None:
        self.compared |= other.compared
        self.written |= other.written
        self.compare_count += other.compare_count
        self.size_bytes += other.size_bytes
