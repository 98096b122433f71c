"""Chunks across the cluster: where they are, reading one from wherever it is good.

A chunk is looked for here first, then on the nodes that the map of its epoch names (the least
loaded first), then down the rendezvous order, where hand-offs are, then on nodes that joined
later. A node that does not answer is passed over within `PEER_SILENCE_SECONDS` and asked last for
a while; only when nobody else has the chunk is it given `PEER_PATIENCE_SECONDS`.

A copy that fails its checksum is never returned. Its holder is told, and repairs it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import trio

from modelfs.chunk import ChunkRef, block_table
from modelfs.errors import (
    ChunkMissing,
    ChunkUnavailable,
    CorruptChunk,
    ModelfsError,
    PeerRefused,
    PeerUnavailable,
)
from modelfs.ids import ChunkId, Epoch, NodeId
from modelfs.limits import PEER_PATIENCE_SECONDS, PEER_SILENCE_SECONDS
from modelfs.manifest import PlacedChunk
from modelfs.mirror import Mirror
from modelfs.placement import PlacementMap
from modelfs.ports import ChunkStore, Holding, PeerTransport
from modelfsd.stages import stopwatch
from modelfsd.uses import current_use

log = logging.getLogger(__name__)

SUSPICION_SECONDS = 5.0  # for how long a node that did not answer is asked last
FETCHES_REMEMBERED = 65_536  # chunks fetched once: 256 GiB of files, in 10 MiB of memory
ORDERS_REMEMBERED = 4096  # placements: 0.1 ms each to compute
LOCAL_READS_MAX = 16  # threads that read the local store at once


@dataclass(frozen=True, slots=True)
class ChunkCounters:
    """Where chunk reads were served from, and what went wrong on the way."""

    local_bytes: int
    remote_bytes: int
    failovers: int
    corrupt: int


def _forget(chunk: ChunkId) -> None:
    """Nobody wants to know which chunks are on no node."""


class Chunks:
    """Reads chunks. `damaged` is told of local copies that fail, to repair them.

    `on_unavailable` is told of chunks of which every node has said that it has no good copy.
    """

    def __init__(
        self,
        node_id: NodeId,
        mirror: Mirror,
        store: ChunkStore,
        peers: PeerTransport,
        damaged: Callable[[ChunkRef], None],
        run_in_background: Callable[..., None],
    ) -> None:
        self.node_id, self.mirror, self.store, self.peers = node_id, mirror, store, peers
        self._damaged = damaged
        self._start = run_in_background
        self.on_unavailable: Callable[[ChunkId], object] = _forget
        self._fetched_once: OrderedDict[ChunkId, None] = OrderedDict()
        self._orders: dict[tuple[Epoch, ChunkId, int], tuple[NodeId, ...]] = {}
        self._caching = trio.CapacityLimiter(1)
        self._suspected_until: dict[NodeId, float] = {}
        self._local = trio.CapacityLimiter(LOCAL_READS_MAX)
        self._local_bytes = self._remote_bytes = self._failovers = self._corrupt = 0

    def statistics(self) -> ChunkCounters:
        """A snapshot."""
        return ChunkCounters(self._local_bytes, self._remote_bytes, self._failovers, self._corrupt)

    # ------------------------------------------------------------ who

    def map_of(self, placed: PlacedChunk) -> PlacementMap | None:
        """The map by which a chunk was placed; the latest if that one is unknown."""
        return self.mirror.maps.get(placed.epoch) or self.mirror.latest_map

    def is_up(self, node: NodeId) -> bool:
        """Whether etcd has the node's heartbeat and it answered when last asked."""
        return node in self.mirror.nodes and not self._is_suspected(node)

    def suspect(self, node: NodeId) -> None:
        """The node did not answer: ask it last for a while."""
        self._suspected_until[node] = trio.current_time() + SUSPICION_SECONDS

    def _is_suspected(self, node: NodeId) -> bool:
        return self._suspected_until.get(node, 0.0) > trio.current_time()

    def sources(self, placed: PlacedChunk, replicas: int) -> list[NodeId]:
        """The other nodes that may have a chunk, the best to ask first."""
        order = self._order_of(placed, replicas)
        holders = [node for node in order[:replicas] if node != self.node_id]
        holders.sort(key=self.peers.load)
        rest = [node for node in order[replicas:] if node != self.node_id]
        known = {*order, self.node_id}
        newer = [node for node in self.mirror.nodes if node not in known]
        everyone = [node for node in (*holders, *rest, *newer) if not self._has_left(node)]
        return sorted(everyone, key=lambda node: not self.is_up(node))  # stable: the dead last

    def _has_left(self, node: NodeId) -> bool:
        """Whether an old map has a node that was removed from the cluster."""
        latest = self.mirror.latest_map
        if node in self.mirror.nodes or latest is None:
            return False
        return latest.member(node) is None

    def _order_of(self, placed: PlacedChunk, replicas: int) -> tuple[NodeId, ...]:
        """Who may have a chunk by its map, the replicas first. Remembered for a while."""
        placement = self.map_of(placed)
        if placement is None:
            return ()
        key = (placement.epoch, placed.ref.id, replicas)
        order = self._orders.get(key)
        if order is None:
            if len(self._orders) >= ORDERS_REMEMBERED:
                self._orders.clear()
            order = self._orders[key] = placement.candidates(placed.ref.id, replicas)
        return order

    # ------------------------------------------------------------ reading

    async def read(self, placed: PlacedChunk, replicas: int, start: int, size: int) -> memoryview:
        """`size` verified bytes from `start` of a chunk. Raises `ChunkUnavailable`."""
        try:
            if self.store.is_absent(placed.ref.id):
                raise ChunkMissing(placed.ref.id, "this node")
            data = await self._read_here(placed.ref, start, size)
        except (ChunkMissing, CorruptChunk, OSError):
            data = await self._read_there(placed, replicas, start, size)
            self._remote_bytes += size
            current_use().remote_bytes += size
            if size == placed.ref.length:
                self._consider_caching(placed.ref, data)
        else:
            self._local_bytes += size
            current_use().local_bytes += size
        return data

    async def _read_here(self, ref: ChunkRef, start: int, size: int) -> memoryview:
        try:
            return await trio.to_thread.run_sync(
                self._read_store, stopwatch("disk_queue"), ref, start, size, limiter=self._local
            )
        except CorruptChunk as error:
            log.warning("%s; reading another replica and repairing this one", error)
            self._corrupt += 1
            self._damaged(ref)
            raise
        except OSError as error:
            name = ref.id.hex()[:16]
            log.warning("the disk fails at chunk %s: %s; reading another replica", name, error)
            raise

    def _read_store(
        self, has_waited: stopwatch, ref: ChunkRef, start: int, size: int
    ) -> memoryview:
        has_waited()
        return self.store.read(ref, start, size)

    async def _read_there(
        self, placed: PlacedChunk, replicas: int, start: int, size: int
    ) -> memoryview:
        hopeless: dict[NodeId, str] = {}
        silent: dict[NodeId, str] = {}
        for patience in (PEER_SILENCE_SECONDS, PEER_PATIENCE_SECONDS):
            for node in self.sources(placed, replicas):
                if node in hopeless:
                    continue
                try:
                    data = await self.peers.fetch(node, placed.ref, start, size, patience)
                except ChunkMissing:
                    hopeless[node] = "does not have it"
                except CorruptChunk as error:
                    hopeless[node] = "has a damaged copy"
                    await self._report(node, placed.ref, error)
                except PeerRefused as error:
                    hopeless[node] = error.reason
                except PeerUnavailable as error:
                    silent[node] = str(error.reason)
                    self.suspect(node)
                else:
                    self._suspected_until.pop(node, None)
                    return data
                self._failovers += 1
            if not silent:
                break
        reasons = {**silent, **hopeless}
        if not silent:
            self.on_unavailable(placed.ref.id)
        told = "; ".join(f"{self.name_of(node)}: {why}" for node, why in reasons.items())
        raise ChunkUnavailable(placed.ref.id, told or "no other node is known")

    def _consider_caching(self, ref: ChunkRef, data: memoryview) -> None:
        """Keep a chunk on this node's disk when it is fetched a second time.

        Not the first: what is read once and then comes from the page cache is not worth the
        write. A second fetch means that memory did not hold it.
        """
        if ref.id in self._fetched_once:
            del self._fetched_once[ref.id]
            if self._caching.available_tokens:
                self._start(self._keep_cached, ref, data)
            return
        self._fetched_once[ref.id] = None
        while len(self._fetched_once) > FETCHES_REMEMBERED:
            self._fetched_once.popitem(last=False)

    async def _keep_cached(self, ref: ChunkRef, data: memoryview) -> None:
        try:
            await trio.to_thread.run_sync(
                self.store.put,
                ref,
                block_table(data),
                data,
                Holding.CACHED,
                limiter=self._caching,
            )
        except (ModelfsError, OSError) as error:
            log.info("chunk %s is not cached: %s", ref.id.hex()[:16], error)

    async def _report(self, node: NodeId, ref: ChunkRef, error: CorruptChunk) -> None:
        log.warning("%s; reading another replica", error)
        self._corrupt += 1
        try:
            await self.peers.report_damage(node, ref)
        except (PeerUnavailable, PeerRefused) as failure:
            log.info("%s could not be told of its damaged chunk: %s", node, failure)

    def name_of(self, node: NodeId) -> str:
        """A node's name, for people."""
        record = self.mirror.nodes.get(node)
        if record is not None:
            return record.name
        placement = self.mirror.latest_map
        member = placement.member(node) if placement else None
        return member.name if member else node
