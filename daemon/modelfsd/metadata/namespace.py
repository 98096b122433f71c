"""The namespace: carries out the plans of `modelfs.changes` against etcd.

A plan is made from the mirror, committed, and made anew if somebody else was faster. Two rules
make the answers exact though the mirror lags by milliseconds:

- A refusal (`NamespaceError`), or that there is nothing to do, counts only if it still holds after
  `Feed.fresh`: no transaction checks it.
- A change returns only when the mirror has applied it: every node reads its own writes.

Every transaction also puts `seq`, with an *operation id* that is used once. When etcd did not
answer (`MetadataUncertain`), the same transaction is sent again: if it now fails its comparisons,
the operation id tells whether that is because it had gone through the first time. What cannot be
found out is *disowned*: it failed for the kernel, and should it have happened, or happen yet, that
is announced like another node's change.
"""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

import trio

from modelfs import keys
from modelfs.changes import Plan
from modelfs.errors import (
    MetadataOutOfReach,
    MetadataUnavailable,
    MetadataUncertain,
    NamespaceError,
    NoSuchEntry,
    RecordUnreadable,
)
from modelfs.ids import InodeNumber, NodeId, Revision
from modelfs.inode import Inode
from modelfs.limits import INODE_BITS, INODE_BLOCK
from modelfs.mirror import Mirror
from modelfs.policy import Keep, Rules
from modelfs.ports import Compare, Put, Target, Txn
from modelfsd.metadata.feed import Feed
from modelfsd.metadata.group_commit import GroupCommit
from modelfsd.stages import timed

log = logging.getLogger(__name__)

CONFLICTS_MAX = 100  # attempts at one change; each failure means that somebody else succeeded
RETRY_SECONDS = 0.2  # between attempts to get an answer
SETTLE_SECONDS = 15.0  # to find out what became of an unanswered transaction
DISOWNED_MAX = 4096  # operations that got no answer: only the latest can still take effect

_COUNTER = re.compile(rb"[0-9]{1,8}")

Result = TypeVar("Result")


class Namespace:
    """Changes of the namespace by this node, and fresh looks at it."""

    def __init__(
        self, group: GroupCommit, feed: Feed, node_id: NodeId, defaults: Rules | None = None
    ) -> None:
        self.mirror: Mirror = feed.mirror
        self.node_id = node_id
        self.defaults = defaults or Rules()
        self.keep = Keep(node_id, self.defaults)
        self.transactions = 0
        self._group, self._feed = group, feed
        # The clock makes operation ids differ from those of an earlier run of this node.
        # The first part of an id says on whose behalf it is: `is_own` knows the kernel's only.
        self._run = f"{node_id}:{time.time_ns():x}"
        self._run_of_commands = f"{node_id}:command:{time.time_ns():x}"
        self._operations = itertools.count(1)
        self._disowned: dict[str, None] = {}  # a set, in order
        self._free_inodes = iter(range(0))
        self._taking_inodes = trio.Lock()

    def is_own(self, origin: str) -> bool:
        """Whether a change in the mirror was made by this node's kernel, which knows it then."""
        is_ours = origin.startswith(self._run)
        if is_ours and self._disowned:
            return self._disowned.keys().isdisjoint(origin.split())
        return is_ours

    @property
    def is_attached(self) -> bool:
        """Whether etcd was within reach when it was last asked: else no change can be made."""
        return self._feed.is_attached

    async def fresh(self) -> bool:
        """`Feed.fresh`, or False if etcd is out of reach: then the last known state is served."""
        try:
            with timed("freshness"):
                await self._feed.fresh()
        except MetadataUnavailable:
            return False
        return True

    def hurry(self) -> None:
        """Somebody waits for a change that was made with patience."""
        self._group.hurry()

    async def reached(self, revision: Revision) -> None:
        """Wait until the mirror has applied `revision`. Raises `MetadataUnavailable`."""
        await self._feed.reached(revision)

    async def change(
        self,
        make_plan: Callable[[Mirror], Plan[Result]],
        by_kernel: bool = True,
        patience_seconds: float = 0.0,
    ) -> Result:
        """Make a plan, commit it, and wait until the mirror has it.

        Unless it is `by_kernel`, the kernel is told of it like of another node's changes. With
        patience it waits so long for another change that it can go with.
        Raises what the plan raises, `MetadataUnavailable` if it surely did not happen, and
        `MetadataUncertain` if that could not be found out.
        """
        for _ in range(CONFLICTS_MAX):
            try:
                plan = make_plan(self.mirror)
                is_refused = not plan.txn.ops
            except NamespaceError:
                is_refused = True
            if is_refused:
                await self._feed.fresh()
                plan = make_plan(self.mirror)
            if not plan.txn.ops:
                return plan.result
            if await self.attempt(plan.txn, by_kernel, patience_seconds):
                return plan.result
        raise MetadataUnavailable(f"{CONFLICTS_MAX} attempts at one change met a conflict")

    async def attempt(self, txn: Txn, by_kernel: bool, patience_seconds: float = 0.0) -> bool:
        """Commit once. False if somebody else was faster; the mirror is fresh then. Raises as
        `change`.
        """
        run = self._run if by_kernel else self._run_of_commands
        operation = f"{run}:{next(self._operations):x}"
        try:
            return await self._attempt(txn, operation, patience_seconds)
        except MetadataUncertain:
            self._disowned[operation] = None
            if len(self._disowned) > DISOWNED_MAX:
                del self._disowned[next(iter(self._disowned))]
            raise

    async def _attempt(self, txn: Txn, operation: str, patience_seconds: float) -> bool:
        with self._feed.following(operation):
            revision = await self._commit(txn, operation, patience_seconds)
        if revision is None:
            await self._feed.fresh()
            return False
        try:
            with timed("apply"):
                await self._feed.reached(revision)
        except MetadataUnavailable as error:  # which would say that nothing has happened
            raise MetadataUncertain(f"committed, but not seen again: {error}") from error
        return True

    async def _commit(self, txn: Txn, operation: str, patience_seconds: float) -> Revision | None:
        """The revision of the commit, or None if a comparison failed."""
        if not self.is_attached:  # since a moment ago, or since long: do not wait again
            raise MetadataUnavailable("no connection to etcd")
        self.transactions += 1
        deadline = trio.current_time() + SETTLE_SECONDS
        uncertain: MetadataUncertain | None = None
        loads = self._feed.resyncs
        while True:
            try:
                result = await self._group.commit(txn, operation, patience_seconds)
            except MetadataUncertain as error:
                uncertain = error
            except MetadataUnavailable as error:
                if uncertain is None:
                    if isinstance(error, MetadataOutOfReach):
                        self._feed.detach()
                    raise
            else:
                if result.succeeded:
                    return result.revision
                if uncertain is None:
                    return None
                return await self._settle(operation, loads, uncertain)
            if trio.current_time() >= deadline:
                assert uncertain is not None
                log.error("etcd did not say whether a change took effect: %s", uncertain)
                raise uncertain
            await trio.sleep(RETRY_SECONDS)

    async def _settle(
        self, operation: str, loads: int, uncertain: MetadataUncertain
    ) -> Revision | None:
        """The revision at which an unanswered transaction took effect, or None if it did not."""
        try:
            await self._feed.fresh()
        except MetadataUnavailable as error:
            raise uncertain from error
        revision = self._feed.revision_of(operation)
        if revision is None and self._feed.resyncs != loads:
            raise uncertain  # a full load does not tell what happened before it
        return revision

    async def new_inode_number(self) -> InodeNumber:
        """A number that no inode ever had. Taken from etcd in blocks of 65,536."""
        while True:
            number = next(self._free_inodes, None)
            if number is None:
                async with self._taking_inodes:
                    number = next(self._free_inodes, None)
                    if number is None:
                        block: range = await self.change(self._take_block)
                        self._free_inodes = iter(block)
                        number = next(self._free_inodes)
            if self.mirror.inode_row(InodeNumber(number)) is None:
                return InodeNumber(number)
            # Somebody has set the counter back. Then the rest of the block is not ours either.
            self._free_inodes = iter(range(0))

    @staticmethod
    def _take_block(mirror: Mirror) -> Plan[range]:
        row = mirror.other(keys.INODES)
        if row is not None and not _COUNTER.fullmatch(row.value):
            raise RecordUnreadable(keys.INODES, "it is not a number of blocks")
        block = int(row.value) + 1 if row else 1
        if (block + 1) * INODE_BLOCK > 1 << INODE_BITS:
            raise RecordUnreadable(keys.INODES, f"{block} blocks, more than there are")
        guard = Compare(keys.INODES, Target.MOD, row.mod_revision if row else Revision(0))
        txn = Txn((guard,), (Put(keys.INODES, b"%d" % block),))
        return Plan(txn, range(block * INODE_BLOCK, (block + 1) * INODE_BLOCK))

    def require(self, ino: InodeNumber) -> Inode:
        """The record of an inode. Raises `NoSuchEntry`."""
        record = self.mirror.inode(ino)
        if record is None:
            raise NoSuchEntry(ino)
        return record
