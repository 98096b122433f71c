"""Retention: deletes history entries whose time is over, and tells reclaim of those that are left.

One node at a time does the deleting: the living node with the smallest id. It walks through the
history in pages, so that a large one is never in memory, and compares each entry that it deletes:
should two nodes do it at once, the second deletes nothing. The walks come a tenth of the shortest
retention apart, as far as it is known, and take no more than a tenth of the time.

**No retained version is ever missed by reclaim.** A survey first makes the mirror fresh, then reads
the current versions from it, then the history from etcd (`retained`). Take a manifest M that some
name's contents need during all of that. Either M is still current when its inode is read: it is
seen. Or it has been superseded before: then the transaction that superseded it has put the entry,
the mirror had applied that transaction when the inode was read, and every page is read later: the
entry is seen, since entries never move. An entry that is put meanwhile is of a version that was
current when its inode was read. The one way around is a restore: M was only retained when its inode
was read, became current, and its entry expired before its page was read. Such a miss happens in one
survey only, and a chunk is deleted after it was unneeded for a whole grace period: in the next
survey M is current.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

import trio

from modelfs import keys
from modelfs.errors import ModelfsError, ProtocolError, RecordUnreadable
from modelfs.history import Retained, decode_retained
from modelfs.ids import InodeNumber
from modelfs.inode import Pin, decode_pin, encode
from modelfs.limits import TRANSACTION_OPS_MAX
from modelfs.mirror import Change, InodeChanged
from modelfs.policy import NANOSECONDS, GoneDirectories, expires_ns
from modelfs.ports import Compare, Delete, KeyValue, MetadataStore, Target, Txn
from modelfsd.logs import RateLimited
from modelfsd.metadata.namespace import Namespace
from modelfsd.storage.survey import Survey

log = logging.getLogger(__name__)

PAGE_ENTRIES = 500  # 2.5 MiB if each holds a small file
BATCH_ENTRIES = TRANSACTION_OPS_MAX - 20
WALK_SHARE = 10  # of a retention that an entry may live longer, and of the time that walks take
PAUSE_SECONDS_MIN = 1.0
PAUSE_SECONDS_MAX = 300.0


class Retention:
    """Keeps the history as long as the policies say."""

    def __init__(self, namespace: Namespace, store: MetadataStore) -> None:
        self._namespace, self._store, self._mirror = namespace, store, namespace.mirror
        self._shortest_seconds = namespace.defaults.retain_seconds
        self._news = trio.Event()
        self._quiet = RateLimited(log, 600.0)
        self.expired = 0  # entries that this node deleted

    def on_changes(self, changes: list[Change]) -> None:
        """Take what the feed announces: a policy that was changed may end many retentions."""
        for change in changes:
            if isinstance(change, InodeChanged) and change.new is not None:
                old = change.old.policy if change.old is not None else None
                if change.new.policy is not None and change.new.policy != old:
                    self._note(change.new.policy.retain_seconds)
                    self._news.set()

    def _note(self, retain_seconds: float | None) -> None:
        if retain_seconds is not None:
            self._shortest_seconds = min(self._shortest_seconds, retain_seconds)

    async def run(self) -> None:
        """Delete what has expired, for ever."""
        while True:
            self._news = trio.Event()
            started = trio.current_time()
            if self._is_ours():
                try:
                    await self.expire(time.time_ns())
                except ModelfsError as error:
                    self._quiet.info("expire", "old versions are kept for now: %s", error)
            took_seconds = trio.current_time() - started
            pause_seconds = min(self._shortest_seconds / WALK_SHARE, PAUSE_SECONDS_MAX)
            await trio.sleep(max(PAUSE_SECONDS_MIN, WALK_SHARE * took_seconds))
            with trio.move_on_after(pause_seconds):
                await self._news.wait()

    def _is_ours(self) -> bool:
        nodes = self._mirror.nodes
        return bool(self._mirror.history.count and nodes) and min(nodes) == self._namespace.node_id

    async def expire(self, now_ns: int) -> None:
        """Delete every entry whose time is over. Raises as `MetadataStore.page` and `attempt`."""
        if not await self._namespace.fresh():
            return  # nothing is deleted on old news
        gone = GoneDirectories()
        if any(self._mirror.inode_row(ino) is None for ino in self._mirror.history.parents()):
            page = await self._page_after([])
            while page:
                for row in page:
                    if (found := self._decoded(row)) is not None:
                        gone.add(*found)
                page = await self._page_after(page)
        page = await self._page_after([])
        while page:
            expired = [row for row in page if self._is_expired(row, gone, now_ns)]
            for start in range(0, len(expired), BATCH_ENTRIES):
                await self._delete(expired[start : start + BATCH_ENTRIES])
            page = await self._page_after(page)

    async def _page_after(self, page: list[KeyValue]) -> list[KeyValue]:
        """The next page of the history; the first after []. Empty at the end."""
        after = page[-1].key if page else b""
        return await self._store.page(keys.HISTORY_PREFIX, after, PAGE_ENTRIES)

    def _decoded(self, row: KeyValue) -> tuple[InodeNumber, Retained] | None:
        """An entry and its directory; None, and a complaint, if it is damaged: then it is kept."""
        try:
            return keys.split_history(row.key)[0], decode_retained(row.value)
        except ProtocolError as error:
            self._quiet.error("damaged", "the history entry %r is damaged: %s", row.key, error)
            return None

    def _is_expired(self, row: KeyValue, gone: GoneDirectories, now_ns: int) -> bool:
        found = self._decoded(row)
        if found is None:
            return False
        parent, entry = found
        try:
            ends_ns = expires_ns(self._mirror, parent, entry, gone, self._namespace.defaults)
        except RecordUnreadable:
            return False  # which policy holds is not known
        self._note((ends_ns - entry.superseded_ns) / NANOSECONDS)
        return ends_ns <= now_ns and not self._leads_to_others(entry)

    def _leads_to_others(self, entry: Retained) -> bool:
        """Whether this is a directory that is gone, and below which something is retained."""
        ino = InodeNumber(entry.ino)
        is_gone = entry.record.is_directory and self._mirror.inode_row(ino) is None
        return is_gone and bool(self._mirror.history.names(ino))

    async def _delete(self, rows: list[KeyValue]) -> None:
        compares = tuple(Compare(row.key, Target.CREATE, row.create_revision) for row in rows)
        txn = Txn(compares, tuple(Delete(row.key) for row in rows))
        if await self._namespace.attempt(txn, by_kernel=False):
            self.expired += len(rows)

    async def retained(self, survey: Survey) -> Iterable[Pin]:
        """The manifests of all retained versions, for reclaim. Raises what kept it from being sure.

        An entry that cannot be read is what the survey must miss: it may name a manifest. To be
        called after the current versions have been read from a mirror that was made fresh.
        """
        packed: set[bytes] = set()  # some 200 bytes for each manifest
        page = await self._page_after([])
        while page:
            for row in page:
                try:
                    record = decode_retained(row.value).record
                except ProtocolError as error:
                    survey.miss(str(RecordUnreadable(row.key, str(error))))
                    continue
                if record.manifest is not None:
                    packed.add(encode(Pin(record.manifest, record.replicas)))
            page = await self._page_after(page)
        return (decode_pin(value) for value in packed)
