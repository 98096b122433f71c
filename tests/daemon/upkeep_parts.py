"""A cluster with upkeep on every node, whose steps the test calls by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import trio.testing

from modelfs import keys
from modelfs.ids import ChunkId, NodeId
from modelfs.inode import Pin
from modelfs.ports import Put, Txn
from modelfsd.storage.survey import Survey
from modelfsd.storage.upkeep import SWEEPS_A_GRACE, Upkeep, UpkeepParts
from tests.daemon.node_parts import Cluster, Node, cluster_of

GRACE, DOWN_OUT = 3600.0, 600.0


class Kept:
    """A cluster with upkeep on every node."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.nodes = cluster, cluster.nodes
        self.retained: list[Pin] = []
        self.upkeep = {node.id: self.keep(node) for node in self.nodes}

    def keep(self, node: Node) -> Upkeep:
        parts = UpkeepParts(
            node.feed,
            node.namespace,
            node.chunks,
            node.replicator,
            node.inodes,
            node.leases,
            lambda: [session.copy for session in node.writer.open_sessions],
            node.state_dir / "lost",
        )
        upkeep = Upkeep(parts, GRACE, DOWN_OUT, (self._retained,))
        node.feed.listen(upkeep.on_changes)
        return upkeep

    async def _retained(self, survey: Survey) -> Iterable[Pin]:
        return self.retained

    @property
    def living(self) -> list[Upkeep]:
        return [self.upkeep[id] for id in self.upkeep if id not in self.cluster.peers.down]

    async def sweep(self) -> int:
        """All nodes sweep once; returns how many chunks that freed."""
        sweeps = [await upkeep.sweeper.sweep() for upkeep in self.living]
        return sum(sweep.freed_chunks for sweep in sweeps if sweep)

    async def sweep_all(self, clock: trio.testing.MockClock) -> int:
        """Look, and go on looking for a grace."""
        return await self.sweep() + await self.sweep_for(clock, GRACE + 1)

    async def sweep_for(self, clock: trio.testing.MockClock, seconds: float) -> int:
        """Let time pass, no more than a grace, with the sweeps that are made in it."""
        freed = 0
        for _ in range(SWEEPS_A_GRACE):
            clock.jump(seconds / SWEEPS_A_GRACE)
            freed += await self.sweep()
        return freed

    async def heal(self) -> int:
        """All nodes heal once; returns how many copies were made or handed back."""
        rounds = [await upkeep.healer.round() for upkeep in self.living]
        return sum(done.copied_chunks + done.handed_back_chunks for done in rounds)

    async def hear(self) -> None:
        """Every node's mirror has all that etcd has."""
        for node in self.nodes:
            await node.feed.reached(self.cluster.etcd.revision)

    def copies(self) -> dict[ChunkId, set[NodeId]]:
        """Which living nodes hold which chunk."""
        found: dict[ChunkId, set[NodeId]] = {}
        for id, store in self.cluster.stores.items():
            if id not in self.cluster.peers.down:
                for chunk, _ in store.owned():
                    found.setdefault(chunk, set()).add(id)
        return found


@asynccontextmanager
async def kept_cluster(count: int, directory: Path) -> AsyncIterator[Kept]:
    async with cluster_of(count, directory) as cluster:
        await cluster.etcd.commit(Txn((), (Put(keys.CLUSTER, b"c"), Put(keys.SEQ, b"test"))))
        kept = Kept(cluster)
        await kept.hear()
        yield kept


async def make(node: Node, name: bytes, data: bytes, replicas: int = 2) -> None:
    await node.make_file(name, replicas)
    await node.write_file(name, data)


async def needed_by(kept: Kept) -> set[ChunkId]:
    """What the current versions name, root and pages included, found in another way."""
    node, found = kept.nodes[0], set()
    for _, record in list(node.mirror.inodes()):
        if record.manifest is not None:
            found.add(ChunkId(record.manifest.id))
            entries = await node.contents.all_entries(record)
            found |= {ChunkId(bytes(entry["id"])) for entry in entries if entry["length"]}
    return found
