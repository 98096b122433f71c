"""The right to write a file: one node at a time (G5).

A lease is a key in etcd bound to this node's etcd lease, so it lapses with the node. Its create
revision is the fencing token, which every commit compares. Whoever holds a lease learns of its
loss from the mirror, at the same moment as the rest of the cluster.

A lease can be left over that nobody here holds: etcd did not answer whether it was taken, or could
not be reached to give it back. As long as this node lives it would keep all writers away, so such
leases are looked for and given back.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import trio

from modelfs import changes
from modelfs.errors import (
    EntryExists,
    MetadataUnavailable,
    MetadataUncertain,
    OutOfSpace,
    WriterElsewhere,
)
from modelfs.ids import InodeNumber, Revision
from modelfs.mirror import Change, LeaseChanged
from modelfsd.metadata.namespace import Namespace

log = logging.getLogger(__name__)

RESERVED_SECONDS = 2.0  # for the kernel to come back with the OPEN that it was sent away with
LINGER_SECONDS = 0.02  # after the last close: `echo >> log` in a loop takes one lease, not many
RIDE_SECONDS = 0.03  # then, for another transaction to go with
DROPPED_MAX = 100  # leases that one transaction gives back
SWEEP_SECONDS = 5.0  # a lease that nobody holds in two looks in a row is left over
WAITERS_MAX = 64  # opens that wait for other nodes; far below the requests FUSE has in hand

Loser = Callable[[str], None]


@dataclass(frozen=True, slots=True, eq=False)
class _Reservation:
    """A lease that nobody uses now, and that one open may still take up."""

    token: Revision


class Leases:
    """The leases of this node. `etcd_lease` is the id of the node's own lease in etcd."""

    def __init__(
        self,
        namespace: Namespace,
        wait_seconds: float,
        run_in_background: Callable[..., None],
    ) -> None:
        self.etcd_lease = 0
        self._start = run_in_background
        self._reserved: dict[InodeNumber, _Reservation] = {}
        self._namespace, self._wait_seconds = namespace, wait_seconds
        self._holders: dict[InodeNumber, tuple[Revision, Loser]] = {}
        self._waiting: dict[InodeNumber, trio.Event] = {}
        self._waiter_count = 0
        self._lingering: deque[tuple[float, InodeNumber, _Reservation]] = deque()
        self._is_giving_back = False
        run_in_background(self._sweep)

    def on_changes(self, announced: list[Change]) -> None:
        """Take what the feed announces."""
        for change in announced:
            if not isinstance(change, LeaseChanged):
                continue
            waiting = self._waiting.pop(change.ino, None)
            if waiting is not None:
                waiting.set()
            held = self._holders.get(change.ino)
            now = self._namespace.mirror.lease(change.ino)
            if held is not None and (now is None or now[1] != held[0]):
                del self._holders[change.ino]
                held[1]("its lease has lapsed")

    async def take(
        self, ino: InodeNumber, on_loss: Loser, wait_seconds: float | None = None
    ) -> Revision:
        """Become the writer of a file; returns the fencing token.

        Waits for another writer, unless told otherwise for as long as `lock_wait` says, then raises
        `WriterElsewhere`. Raises `MetadataUnavailable`: what could not be committed is refused now.
        """
        reserved = self._reserved.get(ino)
        if reserved is not None and self._namespace.is_attached:
            del self._reserved[ino]
            if self._is_held(ino, reserved.token):
                return self.hold(ino, on_loss)
        patience = self._wait_seconds if wait_seconds is None else wait_seconds
        deadline = trio.current_time() + patience
        while True:
            try:
                await self._namespace.change(
                    lambda mirror: changes.take_lease(
                        mirror, ino, self._namespace.node_id, self.etcd_lease
                    )
                )
            except EntryExists:
                if self.is_ours(ino):  # it is going back
                    self._namespace.hurry()
                # Only this wait is cut short: a lease taken by a cancelled change would have
                # nobody to give it back.
                with trio.move_on_at(deadline):
                    await self._wait_for_release(ino)
                if trio.current_time() >= deadline:
                    break
            else:
                if self.is_ours(ino):  # else it has lapsed while we heard of it: once more
                    return self.hold(ino, on_loss)
        held = self._namespace.mirror.lease(ino)
        path = self._namespace.mirror.path_of(ino)
        log.info("/%s is being written by node %s", path.decode(errors="replace"), held and held[0])
        raise WriterElsewhere(ino)

    def hold(self, ino: InodeNumber, on_loss: Loser) -> Revision:
        """Watch over a lease that the mirror shows as just taken by us."""
        assert self.is_ours(ino)
        lease = self._namespace.mirror.lease(ino)
        assert lease is not None
        self._holders[ino] = (lease[1], on_loss)
        return lease[1]

    def is_ours(self, ino: InodeNumber) -> bool:
        """Whether the mirror shows this node as the writer of a file."""
        lease = self._namespace.mirror.lease(ino)
        return lease is not None and lease[0] == self._namespace.node_id

    def _is_held(self, ino: InodeNumber, token: Revision) -> bool:
        held = self._namespace.mirror.lease(ino)
        return held is not None and held[1] == token

    def reserve(self, ino: InodeNumber, token: Revision, seconds: float) -> None:
        """Keep a lease for the next open for writing on this node, then give it back.

        For the OPEN of a newer kernel inode that the kernel will send next: else writers on other
        nodes could slip in between for ever, and the kernel looks again only once.
        """
        self._holders.pop(ino, None)
        reserved = self._reserved[ino] = _Reservation(token)
        self._start(self._end_reservation, ino, reserved, seconds)

    async def _end_reservation(
        self, ino: InodeNumber, reserved: _Reservation, seconds: float
    ) -> None:
        await trio.sleep(seconds)
        if self._reserved.get(ino) is reserved:  # not a later one of the same lease
            del self._reserved[ino]
            await self.drop(ino, reserved.token)

    def linger(self, ino: InodeNumber, token: Revision) -> None:
        """Keep a lease for a moment after the last close, for the open that often follows.

        Writers on other nodes wait those milliseconds longer. What was closed in the meantime is
        given back in one transaction, which goes with another if one comes: a thousand small files
        cost no thousand of them.
        """
        self._holders.pop(ino, None)
        reserved = self._reserved[ino] = _Reservation(token)
        self._lingering.append((trio.current_time() + LINGER_SECONDS, ino, reserved))
        if not self._is_giving_back:
            self._is_giving_back = True
            self._start(self._give_back)

    async def _give_back(self) -> None:
        """Give back what has lingered long enough, until nothing lingers."""
        try:
            while self._lingering:
                await trio.sleep(LINGER_SECONDS)
                now = trio.current_time()
                due: dict[InodeNumber, Revision] = {}
                while self._lingering and self._lingering[0][0] <= now and len(due) < DROPPED_MAX:
                    _, ino, reserved = self._lingering.popleft()
                    if self._reserved.get(ino) is reserved:
                        del self._reserved[ino]
                        due[ino] = reserved.token
                if due:
                    await self._drop_all(due, RIDE_SECONDS)
        finally:
            self._is_giving_back = False

    async def _wait_for_release(self, ino: InodeNumber) -> None:
        if self._waiter_count >= WAITERS_MAX:
            raise WriterElsewhere(ino)
        if self._namespace.mirror.lease(ino) is None:
            return  # released while we asked
        self._waiter_count += 1
        try:
            await self._waiting.setdefault(ino, trio.Event()).wait()
        finally:
            self._waiter_count -= 1

    async def drop(self, ino: InodeNumber, token: Revision) -> None:
        """Give a lease back. If etcd cannot be reached, or is full, that is tried again later."""
        if ino in self._holders and self._holders[ino][0] == token:
            del self._holders[ino]
        if self._is_held(ino, token):
            await self._drop_all({ino: token})

    async def _drop_all(
        self, tokens: dict[InodeNumber, Revision], patience_seconds: float = 0.0
    ) -> None:
        try:
            await self._namespace.change(
                lambda mirror: changes.drop_leases(mirror, tokens),
                patience_seconds=patience_seconds,
            )
        except (MetadataUnavailable, MetadataUncertain, OutOfSpace) as error:
            inodes = ", ".join(map(str, tokens))
            log.warning("the leases of inodes %s could not be given back: %s", inodes, error)

    async def _sweep(self) -> None:
        """Give back what is left over, for ever."""
        suspects: dict[InodeNumber, Revision] = {}
        while True:
            await trio.sleep(SWEEP_SECONDS)
            idle = self._idle_leases()
            if idle and not await self._namespace.fresh():
                continue
            still_idle = self._idle_leases()
            for ino, token in idle.items() & suspects.items() & still_idle.items():
                log.info("giving back the lease of inode %d, which nobody here holds", ino)
                await self.drop(ino, token)
            suspects = idle

    def _idle_leases(self) -> dict[InodeNumber, Revision]:
        """The leases that the mirror says are ours and that nobody here holds or reserves."""
        namespace = self._namespace
        return {
            ino: token
            for ino, token in namespace.mirror.leases_of(namespace.node_id)
            if ino not in self._holders and ino not in self._reserved
        }

    def lose_all(self, reason: str) -> None:
        """The node's own lease in etcd is gone, and every file's with it."""
        holders, self._holders = self._holders, {}
        for _, on_loss in holders.values():
            on_loss(reason)
