"""The feed: keeps the mirror at etcd's heels, and says how fresh it is.

One task loads the namespace (from the replica file, or whole from etcd), then watches. Every batch
is applied to the mirror and announced to the listeners in one step, without an await between, so
whoever looks at the mirror sees what the listeners have been told.

`fresh` is what makes `open` linearizable (G2): it reads `seq`, which every transaction puts, and
waits until the mirror has reached that revision. All callers that wait at the same time share one
read; a caller never shares a read that began before it called.

When etcd has been out of reach for longer than a request may take (an election included), because
the watch is broken or because a read or a commit found no quorum, the feed is *detached*: who waits
in `fresh` is told so, and who comes later is told at once, until a new watch has proved that the
quorum is back. A shorter break is waited out, since another node may commit meanwhile.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from modelfs import keys
from modelfs.errors import (
    HistoryCompacted,
    MetadataOutOfReach,
    MetadataUnavailable,
    RecordUnreadable,
    UserError,
)
from modelfs.ids import Revision
from modelfs.limits import ETCD_REQUEST_SECONDS
from modelfs.mirror import BecameUnreadable, Change, Mirror
from modelfs.ports import MetadataStore, WatchBatch
from modelfsd.logs import RateLimited
from modelfsd.metadata.replica_file import ReplicaFile
from modelfsd.stages import timed

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.2  # between attempts to watch: etcd's own reconnect is about as fast
FILE_BATCHES_MAX = 4096  # watch batches that wait for the replica file
FILE_PAUSE_SECONDS = 0.25  # what comes meanwhile is written with it, in one transaction
WAIT_SECONDS = 10.0  # for a revision that etcd has and the watch has not brought yet

Listener = Callable[[list[Change]], None]


class Feed:
    """Feeds one mirror from one store. `run` is its only task besides the callers."""

    def __init__(self, store: MetadataStore, replica: ReplicaFile) -> None:
        self.mirror = Mirror()
        self.is_attached = False
        self._store, self._replica = store, replica
        self._listeners: list[Listener] = []
        self._waiters: list[tuple[Revision, int, trio.Event]] = []
        self._waiter_count = 0
        self._followed: dict[str, Revision | None] = {}  # our operations that are under way
        self._broken_since: float | None = None  # trio's clock; None while the watch holds
        self._watching = trio.CancelScope()
        self._waiting_for_fresh: set[trio.CancelScope] = set()
        self._reading = trio.Lock()
        self._round: _Round | None = None
        self._to_file, self._file_batches = trio.open_memory_channel[WatchBatch | None](
            FILE_BATCHES_MAX
        )
        self.resyncs = 0
        self._quiet = RateLimited(log)

    def listen(self, listener: Listener) -> None:
        """Call `listener` with every list of changes, right after they have been applied."""
        self._listeners.append(listener)

    # ------------------------------------------------------------ starting and running

    async def start(self) -> None:
        """Load the namespace: from the replica file, else from etcd. Raises if both fail."""
        revision, rows = await trio.to_thread.run_sync(self._replica.load)
        if revision:
            self._announce(self.mirror.reload(revision, rows))
        else:
            await self._reload()

    async def run(self) -> None:
        """Watch for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_file)
            while True:
                try:
                    with trio.CancelScope() as self._watching:
                        await self._watch()
                except HistoryCompacted:
                    log.info("the watch fell behind etcd's history: loading the namespace anew")
                    await self._reload_until_done()
                except MetadataUnavailable as error:
                    self._note_break(error)
                await trio.sleep(RETRY_SECONDS)

    def _note_break(self, error: MetadataUnavailable) -> None:
        now = trio.current_time()
        if self._broken_since is None:
            self._broken_since = now
            if self.is_attached:
                log.warning("the watch of the namespace broke (%s); reconnecting", error)
        if now - self._broken_since >= ETCD_REQUEST_SECONDS:
            self.detach()

    def detach(self) -> None:
        """etcd is out of reach: a request to it has failed for as long as one may take."""
        if not self.is_attached:
            return
        log.warning("etcd is out of reach: serving what this node knew last")
        self.is_attached = False
        self._watching.cancel()  # it may still hold, on a member without a leader
        for waiting in self._waiting_for_fresh:
            waiting.cancel()

    async def _watch(self) -> None:
        start = Revision(self.mirror.revision + 1)
        async with self._store.watch(b"", start) as batches:
            # To have begun a watch proves nothing; this read needs the quorum.
            await self._store.get(keys.SEQ)
            if not self.is_attached or self._broken_since is not None:
                log.info("watching the namespace from revision %d", start)
            self.is_attached, self._broken_since = True, None
            async for batch in batches:
                if batch.events:
                    await self._to_the_file(batch)
                    self._take(batch)

    async def _to_the_file(self, batch: WatchBatch) -> None:
        """Before the mirror has it: if this is cancelled, the next watch brings the batch again.

        Else the file would lack it for ever. What it gets twice it leaves out.
        """
        try:
            self._to_file.send_nowait(batch)
        except trio.WouldBlock:
            await self._to_file.send(batch)

    def _take(self, batch: WatchBatch) -> None:
        for event in batch.events:
            if event.key == keys.SEQ and event.value is not None:
                for operation in event.value.decode("ascii", "replace").split():
                    if operation in self._followed:
                        self._followed[operation] = event.mod_revision
        self._announce(self.mirror.apply(batch.events))

    async def _reload_until_done(self) -> None:
        while True:
            try:
                return await self._reload()
            except MetadataUnavailable:
                await trio.sleep(RETRY_SECONDS)

    async def _reload(self) -> None:
        revision, rows = await self._store.load(b"", bare=keys.HISTORY_PREFIX)
        self.resyncs += 1
        self._announce(self.mirror.reload(revision, rows))
        await trio.to_thread.run_sync(self._replica.replace, revision, rows)

    def _announce(self, changes: list[Change]) -> None:
        for change in changes:
            if isinstance(change, BecameUnreadable):
                family = change.key.partition(b"/")[0]
                error = RecordUnreadable(change.key, change.reason)
                self._quiet.error(family, "%s; all else is served as before", error)
        if changes:
            for listener in self._listeners:
                listener(changes)
        while self._waiters and self._waiters[0][0] <= self.mirror.revision:
            heapq.heappop(self._waiters)[2].set()

    async def _keep_file(self) -> None:
        """Write what has been applied to the replica file, many batches at a time."""
        async for batch in self._file_batches:
            await trio.sleep(FILE_PAUSE_SECONDS)
            waiting = [batch]
            while len(waiting) < FILE_BATCHES_MAX:
                try:
                    waiting.append(self._file_batches.receive_nowait())
                except trio.WouldBlock:
                    break
            await trio.to_thread.run_sync(self._extend_file, waiting)

    def _extend_file(self, batches: list[WatchBatch | None]) -> None:
        self._replica.extend(batch for batch in batches if batch is not None)

    # ------------------------------------------------------------ freshness

    async def reached(self, revision: Revision) -> None:
        """Wait until the mirror has applied `revision`. Raises `MetadataUnavailable` after 10 s."""
        if self.mirror.revision >= revision:
            return
        event = trio.Event()
        self._waiter_count += 1
        heapq.heappush(self._waiters, (revision, self._waiter_count, event))
        with trio.move_on_after(WAIT_SECONDS):
            await event.wait()
            return
        raise MetadataUnavailable(f"revision {revision} did not arrive in {WAIT_SECONDS:.0f} s")

    async def fresh(self) -> None:
        """Wait until the mirror has all that was committed before this call.

        Raises `MetadataUnavailable`; at once while detached.
        """
        if self.is_attached:
            with trio.CancelScope() as scope:
                self._waiting_for_fresh.add(scope)
                try:
                    return await self._freshen()
                finally:
                    self._waiting_for_fresh.discard(scope)
        raise MetadataUnavailable("no connection to etcd")

    async def _freshen(self) -> None:
        while True:
            waiting = self._round
            if waiting is None:
                waiting = self._round = _Round()
                await self._read(waiting)
            else:
                await waiting.done.wait()
            if not waiting.is_abandoned:
                break
        if waiting.error is not None:
            raise MetadataUnavailable(str(waiting.error)) from waiting.error
        await self.reached(waiting.revision)

    async def _read(self, round_: _Round) -> None:
        """Carry out a round: callers may join it until its read begins."""
        try:
            async with self._reading:
                self._round = None
                with timed("etcd_read"):
                    row = await self._store.get(keys.SEQ)
                round_.revision = row.mod_revision if row else Revision(0)
        except MetadataUnavailable as error:
            round_.error = error
            if isinstance(error, MetadataOutOfReach):
                self.detach()
        except BaseException:
            round_.is_abandoned = True  # its other callers begin another one
            raise
        finally:
            if self._round is round_:
                self._round = None
            round_.done.set()

    @contextmanager
    def following(self, operation: str) -> Iterator[None]:
        """Around an operation that may have to be settled: notice when it takes effect."""
        self._followed[operation] = None
        try:
            yield
        finally:
            del self._followed[operation]

    def revision_of(self, operation: str) -> Revision | None:
        """The revision at which a followed operation took effect, if the mirror has it."""
        return self._followed[operation]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """`start`, then `run` for as long as the body runs."""
        await self.start()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.run)
            yield
            nursery.cancel_scope.cancel()


async def load_namespace(feed: Feed) -> None:
    """`Feed.start` for a node that starts. Raises `UserError`."""
    try:
        await feed.start()
    except MetadataUnavailable as error:
        raise UserError(
            f"etcd does not answer ({error}), and this node has no copy of the namespace yet: "
            "start the other nodes of the cluster first"
        ) from error


class _Round:
    """One linearizable read and those who wait for it."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.revision = Revision(0)
        self.error: Exception | None = None
        self.is_abandoned = False
