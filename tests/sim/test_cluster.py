"""A cluster in virtual time: writers, readers and faults, by the seed of the test.

The drivers are the real ones, over the memory store and memory peers. Faults stay within what
modelfs promises to survive: one node at a time is out of reach or silent, any node may restart
between a put and its sync, one copy of a chunk may rot, etcd may go away for a while, drop its
watches, compact its history, or not answer a commit, and a node's lease in etcd may lapse.

What is checked:
- whoever looks after a flush returned sees that version or a later one (G2);
- a reader that takes its time sees one version, whole, and everybody the same one (G3, G4);
- nobody commits on top of a version that was replaced meanwhile (G5);
- at the end every file is readable from every node, with any one other node gone (G1, G6).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing
from trio._core import _run as trio_scheduler

from modelfs.chunk import Buffer, ChunkRef
from modelfs.errors import ModelfsError, StaleHandle, WriterElsewhere
from modelfs.ids import ChunkId, NodeId, Revision
from modelfs.limits import KIB, MIB
from modelfs.ports import ChunkStore, WatchBatch
from modelfs.testing.metadata import CommitFault, MemoryMetadataStore, MemoryWatch
from modelfs.testing.stores import MemoryPeers
from tests.daemon.node_parts import CHUNK, Cluster, Node, cluster_of

NAMES = [b"a", b"b", b"c"]
SECONDS = 90.0
SIZES = [0, 10, 4096, 5000, 60 * KIB, 70 * KIB, 200 * KIB, 3 * CHUNK]


class LaggingWatch(MemoryWatch):
    """Brings its news late, by `lag` seconds now and then."""

    lag = 0.0

    async def __anext__(self) -> WatchBatch:
        batch = await super().__anext__()
        await trio.sleep(self.lag if batch.revision % 3 else 0.0)
        return batch


class LaggingStore(MemoryMetadataStore):
    """An etcd whose watches lag, each by its own time."""

    def __init__(self) -> None:
        super().__init__()
        self.lags = itertools.cycle([0.0, 0.3, 0.02, 0.6, 0.1])

    def watch(self, prefix: bytes, start: Revision) -> MemoryWatch:
        watch = LaggingWatch(self, prefix, start)
        watch.lag = next(self.lags)
        return watch


class ForgetfulPeers(MemoryPeers):
    """A node that restarts has lost what it was sent since its last sync."""

    def __init__(self, stores: Mapping[NodeId, ChunkStore]) -> None:
        super().__init__(stores)
        self.unsynced: dict[NodeId, set[ChunkId]] = {node: set() for node in stores}

    async def put(
        self,
        node: NodeId,
        ref: ChunkRef,
        table: Buffer,
        data: Buffer,
        offer: bool = False,
    ) -> bool:
        await trio.sleep(len(data) / (10 * MIB))
        is_sent = await super().put(node, ref, table, data, offer)
        self.unsynced[node].add(ref.id)
        return is_sent

    async def sync(self, node: NodeId, incarnation: str | None = None) -> None:
        await super().sync(node, incarnation)
        self.unsynced[node].clear()

    def restart(self, node: NodeId) -> None:
        super().restart(node)
        for chunk in self.unsynced[node]:
            self.stores[node].delete(chunk)
        self.unsynced[node].clear()


class Journal:
    """What was tried and what was acknowledged, for each version of each file."""

    def __init__(self) -> None:
        self.tried: dict[tuple[bytes, int], list[bytes]] = {}
        self.known: dict[tuple[bytes, int], bytes] = {}  # acknowledged, or read once
        self.latest: dict[bytes, int] = dict.fromkeys(NAMES, 1)  # acknowledged
        self.reads = self.commits = self.failures = 0

    def saw(self, name: bytes, version: int, contents: bytes) -> None:
        """Somebody read a version: it is what was written, and what everybody else reads."""
        self.reads += 1
        if version == 1:
            assert contents == b""
            return
        key = (name, version)
        assert contents in self.tried[key], f"{name!r} version {version} is a mixture"
        assert self.known.setdefault(key, contents) == contents, "two contents of one version"

    def acknowledge(self, name: bytes, version: int, contents: bytes) -> None:
        """A flush returned."""
        self.commits += 1
        assert self.known.setdefault((name, version), contents) == contents
        assert version > self.latest[name] or self.known.get((name, version)) == contents
        self.latest[name] = max(self.latest[name], version)


class Simulation:
    """The actors."""

    def __init__(self, cluster: Cluster, rng: Random) -> None:
        self.cluster, self.rng, self.journal = cluster, rng, Journal()
        assert isinstance(cluster.peers, ForgetfulPeers)
        self.peers = cluster.peers
        self.ends_at = trio.current_time() + SECONDS

    def goes_on(self) -> bool:
        return trio.current_time() < self.ends_at

    async def pause(self, seconds: float) -> None:
        await trio.sleep(self.rng.uniform(0, seconds))

    async def read_slowly(self, node: Node, name: bytes) -> None:
        before = self.journal.latest[name]
        await node.feed.fresh()  # raises while etcd is away: then nothing is promised
        inode = await node.look_up(name)
        record = inode.record
        try:
            assert record.version >= before, "an open after a flush saw an older version"
            parts = []
            step = self.rng.choice([7000, 64 * KIB, 300 * KIB, 4 * CHUNK])
            for offset in range(0, record.size, step):
                if self.rng.random() < 0.5:
                    node.contents.read_ahead(record, offset, offset + 2 * step)
                whole = self.rng.random() < 0.5
                parts.append(bytes(await node.contents.read(record, offset, step, whole)))
                await self.pause(0.2)
            self.journal.saw(name, record.version, b"".join(parts))
        finally:
            node.inodes.forget([(inode.id, 1)])

    async def reader(self, node: Node) -> None:
        while self.goes_on():
            try:
                await self.read_slowly(node, self.rng.choice(NAMES))
            except ModelfsError:
                self.journal.failures += 1
            await self.pause(1)

    async def write_once(self, node: Node, name: bytes) -> None:
        session = await node.open(name)
        try:
            base = session.copy.base
            if self.rng.random() < 0.5:
                wanted = bytearray()
                await session.truncate(0)
            else:
                wanted = bytearray(await node.contents.read(base, 0, base.size))
                self.journal.saw(name, base.version, bytes(wanted))
            for _ in range(self.rng.randrange(1, 4)):
                data = self.rng.randbytes(self.rng.choice(SIZES))
                offset = self.rng.randrange(len(wanted) + 1)
                if data:
                    wanted[offset : offset + len(data)] = data
                    await session.write(offset, data)
                await self.pause(0.3)
            if not session.copy.is_dirty:
                return
            version = session.copy.base.version + 1
            self.journal.tried.setdefault((name, version), []).append(bytes(wanted))
            await session.flush()
            self.journal.acknowledge(name, version, bytes(wanted))
        finally:
            await session.release()
            node.inodes.forget([(session.inode.id, session.inode.lookups)])

    async def writer(self, node: Node) -> None:
        while self.goes_on():
            try:
                await self.write_once(node, self.rng.choice(NAMES))
            except (StaleHandle, WriterElsewhere):
                await self.pause(0.1)
            except ModelfsError:
                self.journal.failures += 1
            await self.pause(2)

    # ------------------------------------------------------------ faults

    async def faults(self) -> None:
        kinds: list[Callable[[], object]] = [
            self.peer_away, self.restart, self.rot, self.etcd_away, self.break_watches,
            self.compact, self.lose_an_answer, self.lapse,
        ]  # fmt: skip
        while self.goes_on():
            await self.pause(2)
            result = self.rng.choice(kinds)()
            if result is not None:
                await result  # type: ignore[misc]

    async def peer_away(self) -> None:
        how = self.rng.choice([self.cluster.peers.down, self.cluster.peers.silent])
        victim = self.rng.choice(self.cluster.ids)
        how.add(victim)
        await self.pause(8)
        how.discard(victim)

    def restart(self) -> None:
        busy = [id for id, chunks in self.peers.unsynced.items() if chunks]
        self.peers.restart(self.rng.choice(busy or self.cluster.ids))

    def rot(self) -> None:
        """Of a chunk that two other nodes have: else it could not be survived."""
        victim = self.rng.choice(self.cluster.ids)
        for chunk, _ in list(self.cluster.stores[victim].owned()):
            others = [i for i in self.cluster.ids if i != victim]
            if sum(self.cluster.stores[id].has([chunk], False)[0] for id in others) >= 2:
                self.cluster.stores[victim].damage(chunk)
                return

    async def etcd_away(self) -> None:
        self.cluster.etcd.unavailable = True
        await self.pause(12)
        self.cluster.etcd.unavailable = False

    def break_watches(self) -> None:
        self.cluster.etcd.break_watches()

    def compact(self) -> None:
        if self.cluster.etcd.compact_revision < self.cluster.etcd.revision:
            self.cluster.etcd.break_watches()
            self.cluster.etcd.compact(self.cluster.etcd.revision)

    def lose_an_answer(self) -> None:
        self.cluster.etcd.next_commit_fault = self.rng.choice(list(CommitFault))

    async def lapse(self) -> None:
        node = self.rng.choice(self.cluster.nodes)
        self.cluster.etcd.expire(self.cluster.leases[node.id])
        registered = False
        while not registered:
            await self.pause(2)
            try:
                await self.cluster.register(node.id)
                registered = True
            except ModelfsError:
                continue
        node.leases.etcd_lease = self.cluster.leases[node.id]

    # ------------------------------------------------------------ the end

    async def check_the_end(self) -> None:
        cluster = self.cluster
        cluster.etcd.unavailable, cluster.etcd.next_commit_fault = False, None
        cluster.peers.down.clear()
        cluster.peers.silent.clear()
        await trio.sleep(60)
        for node in cluster.nodes:
            assert not node.writer.open_sessions
            assert node.writer.uploads.used_bytes == 0
            for gone in cluster.ids:
                cluster.peers.down = {gone} - {node.id}
                for name in NAMES:
                    inode = await node.look_up(name)
                    contents = await node.contents.read(inode.record, 0, inode.record.size)
                    assert inode.record.version >= self.journal.latest[name]
                    self.journal.saw(name, inode.record.version, bytes(contents))
            assert not [i for i in map(node.mirror.lease, node.mirror.inode_numbers()) if i]


@pytest.mark.expected_logs(".")
@pytest.mark.parametrize("seed", range(4))
async def test_no_acknowledged_byte_is_lost_and_no_version_is_torn(
    tmp_path: Path,
    rng: Random,
    virtual_time: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    monkeypatch.setattr(trio_scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    trio_scheduler._r.seed(rng.random())
    async with cluster_of(4, tmp_path, LaggingStore(), ForgetfulPeers) as cluster:
        for name in NAMES:
            await cluster.nodes[0].make_file(name)
        simulation = Simulation(cluster, rng)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(simulation.faults)
            for node in cluster.nodes:
                nursery.start_soon(simulation.reader, node)
                nursery.start_soon(simulation.writer, node)
        await simulation.check_the_end()
        journal = simulation.journal
        assert journal.commits > 20 and journal.reads > 80
