"""Replicas: puts every chunk on as many nodes as its policy says.

The targets of a chunk are the first live nodes of its rendezvous order. When one fails, the next
in order takes its copy (a hand-off), so there are `replicas` copies while that many nodes live.
A copy counts when its bytes are fsynced; its name survives a crash after `sync`, which a commit
calls once for all its chunks (`Placements` keeps the account).

If fewer copies could be made than nodes are said to live, we wait until etcd has declared the
silent ones dead, and try again: G1 is kept to the letter, at the price of a pause of at most
`limits.NODE_LEASE_SECONDS` plus a heartbeat in the smallest clusters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from modelfs.chunk import Buffer, ChunkRef, describe
from modelfs.errors import (
    MetadataUnavailable,
    ModelfsError,
    OutOfSpace,
    PeerUnavailable,
    ReplicationFailed,
)
from modelfs.ids import ChunkId, Epoch, NodeId
from modelfs.limits import KIB, NODE_LEASE_SECONDS
from modelfs.manifest import PlacedChunk
from modelfs.placement import PlacementMap
from modelfs.ports import Holding
from modelfsd.stages import timed
from modelfsd.storage.chunks import Chunks

log = logging.getLogger(__name__)

ASK_FIRST_BYTES = 256 * KIB  # chunks from this size on are offered before they are sent
GIVE_UP_SECONDS = NODE_LEASE_SECONDS + 8.0
RETRY_SECONDS = 0.5
LOCAL_PUTS_MAX = 8


@dataclass(slots=True)
class Placements:
    """Which nodes took which chunks since the last `sync`: the account of one commit.

    Nodes are `unsure` that heard no renewal, or have lost something: they may not have it any more.
    """

    by_node: dict[NodeId, dict[bytes, PlacedChunk]] = field(default_factory=dict)
    incarnations: dict[NodeId, str] = field(default_factory=dict)
    unsure: set[NodeId] = field(default_factory=set)

    def add(self, placed: PlacedChunk, nodes: Iterable[NodeId]) -> None:
        """Note that these nodes have the chunk, its name not yet synced."""
        for node in nodes:
            self.by_node.setdefault(node, {})[placed.ref.id] = placed


def name_chunk(data: Buffer) -> tuple[ChunkRef, bytes]:
    """`describe`, with the time that it takes on record. For a worker thread."""
    with timed("hash"):
        return describe(data)


class Replicator:
    """Stores chunks on their nodes, this one included."""

    def __init__(self, chunks: Chunks) -> None:
        self.chunks = chunks
        self._limiter = trio.CapacityLimiter(LOCAL_PUTS_MAX)
        self.sent_bytes = 0
        self.spared_bytes = 0  # not sent, because the node had the chunk already

    async def put(
        self,
        ref: ChunkRef,
        table: Buffer,
        data: Buffer,
        replicas: int,
        placements: Placements,
        staged: Path | None = None,
    ) -> PlacedChunk:
        """Make `replicas` copies of a chunk. A `staged` file that holds it may be consumed, and is
        if a copy is made here, unless the disk has failed at it.

        Raises `OutOfSpace` if that is what kept nodes from taking it, else `ReplicationFailed`.
        """
        give_up_at = trio.current_time() + GIVE_UP_SECONDS
        copies: set[NodeId] = set()
        while True:
            placement = self._latest_map()
            attempt = _Attempt(self, ref, table, data, staged, placements)
            await attempt.run(placement, replicas, copies)
            copies |= attempt.copies
            staged = attempt.staged
            living = len({*self.chunks.mirror.nodes, self.chunks.node_id})
            if len(copies) >= min(replicas, living):
                placed = PlacedChunk(ref, placement.epoch)
                placements.add(placed, copies)
                return placed
            if trio.current_time() >= give_up_at or attempt.is_out_of_space:
                reasons = "; ".join(attempt.failures)
                if attempt.is_out_of_space:
                    raise OutOfSpace(f"too few nodes have room: {reasons}")
                raise ReplicationFailed(ref.id, len(copies), min(replicas, living), reasons)
            await trio.sleep(RETRY_SECONDS)

    async def sync(self, placements: Placements, replicas: int) -> None:
        """Make every name in the account survive a crash; the account is empty afterwards.

        Where a node died since its copy was made, the copies are made again elsewhere. Raises
        `ReplicationFailed` if nodes go on to take copies and to fail at this.
        """
        await self._make_sure(placements, replicas)
        give_up_at = trio.current_time() + GIVE_UP_SECONDS
        pause_seconds = 0.0  # none before the copies are made again for the first time
        while placements.by_node:
            waiting, placements.by_node = placements.by_node, {}
            incarnations, placements.incarnations = placements.incarnations, {}
            failed: list[NodeId] = []
            async with trio.open_nursery() as nursery:
                for node in waiting:
                    incarnation = incarnations.get(node)
                    nursery.start_soon(self._sync_node, node, incarnation, failed)
            if failed and trio.current_time() >= give_up_at:
                placed = next(iter(waiting[failed[0]].values()))
                names = ", ".join(self.chunks.name_of(node) for node in failed)
                reason = f"{names} could not make it safe"
                raise ReplicationFailed(placed.ref.id, replicas - 1, replicas, reason)
            if failed:
                await trio.sleep(pause_seconds)
                pause_seconds = RETRY_SECONDS
            for node in failed:
                for placed in waiting[node].values():
                    await self.put_again(placed, replicas, placements)

    async def _make_sure(self, placements: Placements, replicas: int) -> None:
        """Put again what nodes do not have any more that are unsure."""
        unsure, placements.unsure = placements.unsure, set()
        for node in unsure & placements.by_node.keys():
            taken = placements.by_node.pop(node)
            chunks = [placed.ref.id for placed in taken.values()]
            try:
                answers = await self.renew(node, chunks)
            except (ModelfsError, OSError) as error:
                log.warning("%s cannot say what it has: %s", self.chunks.name_of(node), error)
                answers = [False] * len(chunks)
            for placed, is_there in zip(taken.values(), answers, strict=True):
                if is_there:
                    placements.add(placed, [node])
                else:
                    await self.put_again(placed, replicas, placements)

    async def renew(self, node: NodeId, chunks: Sequence[ChunkId]) -> list[bool]:
        """Which chunks a node has; they count as just put. Raises `ModelfsError`, OSError."""
        if node == self.chunks.node_id:
            return await trio.to_thread.run_sync(self.chunks.store.has, chunks, True)
        return await self.chunks.peers.has(node, chunks, True)

    async def _sync_node(self, node: NodeId, incarnation: str | None, failed: list[NodeId]) -> None:
        try:
            with timed("sync"):
                if node == self.chunks.node_id:
                    await trio.to_thread.run_sync(self.chunks.store.sync)
                else:
                    await self.chunks.peers.sync(node, incarnation)
        except (ModelfsError, OSError) as error:
            log.warning("%s could not make its copies safe: %s", node, error)
            self.chunks.suspect(node)
            failed.append(node)

    async def put_again(self, placed: PlacedChunk, replicas: int, placements: Placements) -> None:
        """Make the copies of a chunk complete again, from one that is left."""
        data = await self.chunks.read(placed, replicas, 0, placed.ref.length)
        ref, table = await trio.to_thread.run_sync(name_chunk, data)
        assert ref == placed.ref
        await self.put(ref, table, data, replicas, placements)

    def is_here(self, placed: PlacedChunk, placements: Placements) -> bool:
        """Whether this node took a copy; then a staged file that held it is gone."""
        return placed.ref.id in placements.by_node.get(self.chunks.node_id, ())

    @property
    def epoch(self) -> Epoch:
        """The one in which a chunk would be put now; 0 before there is one."""
        placement = self.chunks.mirror.latest_map
        return placement.epoch if placement else Epoch(0)

    def _latest_map(self) -> PlacementMap:
        placement = self.chunks.mirror.latest_map
        if placement is None:
            raise MetadataUnavailable("the cluster has no placement map yet")
        return placement

    async def put_on(
        self,
        node: NodeId,
        ref: ChunkRef,
        table: Buffer,
        data: Buffer,
        staged: Path | None,
        offer: bool,
    ) -> None:
        """One copy on one node; if the chunk is to be offered first, only where it lacks."""
        chunks = self.chunks
        if node == chunks.node_id:
            await trio.to_thread.run_sync(
                self._put_here, ref, table, data, staged, limiter=self._limiter
            )
            return
        if await chunks.peers.put(node, ref, table, data, offer):
            self.sent_bytes += ref.length
        else:
            self.spared_bytes += ref.length

    def _put_here(self, ref: ChunkRef, table: Buffer, data: Buffer, staged: Path | None) -> None:
        store = self.chunks.store
        if staged is not None:
            store.adopt(staged, ref, table, Holding.OWNED)
        else:
            store.put(ref, table, data, Holding.OWNED)


class _Attempt:
    """One walk down a chunk's rendezvous order, until enough nodes have a copy."""

    def __init__(
        self,
        replicator: Replicator,
        ref: ChunkRef,
        table: Buffer,
        data: Buffer,
        staged: Path | None,
        placements: Placements,
    ) -> None:
        self._placements = placements
        self._replicator, self._ref, self._table, self._data = replicator, ref, table, data
        self.staged = staged  # None also after the disk has failed at it
        self._offers = False  # before chunks are sent
        self.copies: set[NodeId] = set()
        self.failures: list[str] = []
        self.is_out_of_space = False

    async def run(self, placement: PlacementMap, replicas: int, done: set[NodeId]) -> None:
        """Put copies on live nodes first, then on those that seem dead."""
        chunks = self._replicator.chunks
        candidates = placement.candidates(self._ref.id, replicas)
        if self._ref.length >= ASK_FIRST_BYTES:
            self._offers = await self._may_be_there(candidates[:replicas])
        order = [node for node in candidates if node not in done]
        live = [node for node in order if node == chunks.node_id or chunks.is_up(node)]
        rest = iter([*live, *(node for node in order if node not in live)])
        async with trio.open_nursery() as nursery:
            for _ in range(replicas - len(done)):
                nursery.start_soon(self._fill_one, rest)

    async def _may_be_there(self, holders: Sequence[NodeId]) -> bool:
        """Whether it is likely enough that others have the chunk, to ask before it is sent.

        Whoever wrote it before has put it on all who are to have it, this node perhaps among them.
        """
        chunks = self._replicator.chunks
        if chunks.node_id not in holders:
            return True
        look = partial(chunks.store.has, [self._ref.id], renew=False)
        try:
            return (await trio.to_thread.run_sync(look))[0]
        except OSError:
            return True  # the copy that is to be made here will say so

    async def _fill_one(self, rest: Iterator[NodeId]) -> None:
        """Make one copy on the first node of `rest` that takes it."""
        chunks = self._replicator.chunks
        for node in rest:
            try:
                await self._note_incarnation(node)
                what = self._ref, self._table, self._data, self.staged
                await self._replicator.put_on(node, *what, self._offers)
            except PeerUnavailable as error:
                chunks.suspect(node)
                self.failures.append(str(error))
            except OutOfSpace as error:
                self.is_out_of_space = True
                self.failures.append(f"{chunks.name_of(node)}: {error}")
            except (ModelfsError, OSError) as error:
                log.warning("%s did not take a chunk: %s", chunks.name_of(node), error)
                if isinstance(error, OSError):  # this node's: a second fsync would prove nothing
                    self.staged = None
                self.failures.append(f"{chunks.name_of(node)}: {error}")
            else:
                self.copies.add(node)
                return

    async def _note_incarnation(self, node: NodeId) -> None:
        """Ask, before the first copy of a commit, which run of the peer will hold it.

        A peer that restarts before `sync` may have lost the names of what it took.
        """
        chunks, incarnations = self._replicator.chunks, self._placements.incarnations
        if node != chunks.node_id and node not in incarnations:
            incarnation = await chunks.peers.incarnation(node)
            incarnations.setdefault(node, incarnation)
