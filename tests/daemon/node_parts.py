"""Nodes without a mount: the drivers over one memory store and memory peers.

The kernel is played by the test: it opens sessions, writes, flushes and releases as `Files` does.
What the notifier would tell the kernel is written down.
"""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from modelfs import changes, keys
from modelfs.chunk import ChunkRef
from modelfs.ids import ROOT_INODE, Epoch, InodeNumber, KernelId, NodeId
from modelfs.inode import Inode, NodeRecord, encode
from modelfs.limits import CHUNK_BYTES_MIN, MIB
from modelfs.placement import Member, make_map
from modelfs.ports import Put, Txn
from modelfs.testing.metadata import MemoryMetadataStore
from modelfs.testing.stores import MemoryChunkStore, MemoryPeers
from modelfsd.kernel.kernel_cache import KernelCache
from modelfsd.kernel.kernel_inodes import KernelInode, KernelInodes
from modelfsd.metadata.feed import Feed
from modelfsd.metadata.group_commit import GroupCommit
from modelfsd.metadata.leases import Leases
from modelfsd.metadata.namespace import Namespace
from modelfsd.metadata.replica_file import ReplicaFile
from modelfsd.storage.chunks import Chunks
from modelfsd.storage.contents import Contents
from modelfsd.storage.replicator import Replicator
from modelfsd.writing.write_session import WriteSession
from modelfsd.writing.writer import Writer

CHUNK = CHUNK_BYTES_MIN  # of the tests' files: their first eight chunks have 64 KiB
IDS = [NodeId(digit * 16) for digit in "abcd"]


@dataclass
class RecordedNotifier:
    """Stands in for the kernel's side: writes down what it was to forget."""

    names: list[tuple[KernelId, bytes]] = field(default_factory=list)
    attributes: list[KernelId] = field(default_factory=list)
    again: list[KernelId] = field(default_factory=list)  # attributes, more than once
    acknowledges: list[Callable[[], None]] = field(default_factory=list)

    def forget_name(self, parent: KernelId, name: bytes, acknowledge: Callable[[], None]) -> None:
        self.names.append((parent, name))
        self.acknowledges.append(acknowledge)

    def forget_attributes(self, inode: KernelId, was_answered: bool = False) -> None:
        self.attributes.append(inode)
        if was_answered:
            self.again.append(inode)

    def acknowledge_all(self) -> None:
        waiting, self.acknowledges = self.acknowledges, []
        for acknowledge in waiting:
            acknowledge()


class Node:
    """The parts of one node, joined as `modelfsd.node` joins them."""

    def __init__(
        self, cluster: Cluster, id: NodeId, directory: Path, start: Callable[..., None]
    ) -> None:
        self.id, self.cluster, self.start = id, cluster, start
        self.store = cluster.stores[id]
        self.replica = ReplicaFile(directory / "namespace.sqlite", "c" * 16)
        self.feed = Feed(cluster.etcd, self.replica)
        self.namespace = Namespace(GroupCommit(cluster.etcd, start), self.feed, id)
        self.mirror = self.feed.mirror
        self.damaged: list[ChunkRef] = []
        self.chunks = Chunks(id, self.mirror, self.store, cluster.peers, self.damaged.append, start)
        self.replicator = Replicator(self.chunks)
        self.contents = Contents(self.chunks, 16 * MIB, start)
        self.notifier = RecordedNotifier()
        self.state_dir, self.lock_wait_seconds = directory, 30.0

    def join(self) -> None:
        """Build what needs the namespace; it has been loaded."""
        root = self.namespace.require(ROOT_INODE)
        notifier: Any = self.notifier
        self.inodes = KernelInodes(root)
        self.cache = KernelCache(self.inodes, self.namespace, notifier)
        self.leases = Leases(self.namespace, self.lock_wait_seconds, self.start)
        self.writer = Writer(
            self.namespace, self.leases, self.contents, self.replicator, self.cache,
            self.state_dir, self.start,
        )  # fmt: skip
        self.writer.keep_leftovers()
        self.feed.listen(self.leases.on_changes)
        self.feed.listen(self.cache.on_changes)

    # ------------------------------------------------------------ what the kernel does

    async def make_file(self, name: bytes, replicas: int = 2) -> InodeNumber:
        """An empty file in the root, without a lease."""
        ino = await self.namespace.new_inode_number()
        times: dict[str, Any] = dict.fromkeys(("atime_ns", "mtime_ns", "ctime_ns"), 1)
        record = Inode(
            mode=stat.S_IFREG | 0o644, uid=0, gid=0, inline=b"", chunk_bytes=CHUNK,
            replicas=replicas, **times,
        )  # fmt: skip
        await self.namespace.change(
            lambda mirror: changes.create(mirror, ROOT_INODE, name, ino, record)
        )
        return ino

    async def look_up(self, name: bytes) -> KernelInode:
        """The kernel inode behind a name in the root, made fresh."""
        await self.feed.fresh()
        child = self.mirror.child(ROOT_INODE, name)
        assert child is not None, name
        inode = self.inodes.show(child.ino, self.namespace.require(child.ino))
        inode.lookups += 1
        return inode

    async def open(self, name: bytes) -> WriteSession:
        """A writable handle, with its lease."""
        session = self.writer.session_of(await self.look_up(name))
        try:
            await session.ensure_lease()
        except BaseException:
            await session.release()
            raise
        return session

    async def write_file(self, name: bytes, data: bytes) -> None:
        """Replace a file's contents; returns when they are committed."""
        session = await self.open(name)
        try:
            await session.truncate(0)
            if data:
                await session.write(0, data)
            await session.flush()
        finally:
            await session.release()

    async def read_file(self, name: bytes) -> bytes:
        """The latest contents."""
        record = (await self.look_up(name)).record
        return bytes(await self.contents.read(record, 0, record.size))


class Cluster:
    """An etcd, the chunk stores and the way between them."""

    def __init__(self, count: int, etcd: MemoryMetadataStore, peers: type[MemoryPeers]) -> None:
        self.etcd = etcd
        self.ids = IDS[:count]
        self.stores = {id: MemoryChunkStore() for id in self.ids}
        self.peers = peers(self.stores)
        self.leases: dict[NodeId, int] = {}
        self.nodes: list[Node] = []

    async def found(self) -> None:
        """The root directory, the placement map, and every node's registration."""
        root = Inode(mode=0o40755, uid=0, gid=0, atime_ns=0, mtime_ns=0, ctime_ns=0)
        members = [Member(id, id[0], 1.0, "") for id in self.ids]
        first = make_map(Epoch(1), members)
        ops = (
            Put(keys.inode(ROOT_INODE), encode(root)),
            Put(keys.placement_map(Epoch(1)), first.encode()),
            Put(keys.SEQ, b"founding"),
        )
        await self.etcd.commit(Txn((), ops))
        for id in self.ids:
            await self.register(id)

    async def register(self, id: NodeId) -> None:
        """A node's heartbeat begins."""
        self.leases[id] = await self.etcd.grant(10)
        record = NodeRecord(
            name=id[0], host="h", port=1, zone="", capacity_bytes=1, used_bytes=0, free_bytes=1,
            software="1", started_at=0.0,
        )  # fmt: skip
        await self.etcd.commit(Txn((), (Put(keys.node(id), encode(record), self.leases[id]),)))

    def die(self, id: NodeId) -> None:
        """A node's process and its heartbeat end; its store stays where it is."""
        self.peers.down.add(id)
        self.etcd.expire(self.leases[id])

    async def lapse(self, lease: int) -> None:
        """A lease in etcd ends, and every node hears of it (no `seq` is put, so not by `fresh`)."""
        self.etcd.expire(lease)
        for node in self.nodes:
            await node.feed.reached(self.etcd.revision)


@asynccontextmanager
async def cluster_of(
    count: int,
    directory: Path,
    etcd: MemoryMetadataStore | None = None,
    peers: type[MemoryPeers] = MemoryPeers,
) -> AsyncIterator[Cluster]:
    """A running cluster."""
    cluster = Cluster(count, etcd or MemoryMetadataStore(), peers)
    await cluster.found()
    async with trio.open_nursery() as nursery:
        for id in cluster.ids:
            path = directory / id
            path.mkdir(parents=True, exist_ok=True)
            node = Node(cluster, id, path, nursery.start_soon)
            await node.feed.start()
            node.join()
            node.leases.etcd_lease = cluster.leases[id]
            cluster.nodes.append(node)
            nursery.start_soon(node.feed.run)
        for node in cluster.nodes:
            while not node.feed.is_attached:
                await trio.lowlevel.checkpoint()
        try:
            yield cluster
        finally:
            nursery.cancel_scope.cancel()
    for node in cluster.nodes:
        node.replica.close()
