"""What operations cost, by counting: transactions, linearizable reads, and bytes sent to peers."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest
import trio

from modelfs.errors import NoSuchEntry
from modelfs.limits import KIB, MIB
from modelfs.ports import KeyValue, Txn, TxnResult
from modelfs.testing.metadata import MemoryMetadataStore
from modelfsd.kernel.files import Files
from modelfsd.kernel.pusher import Pusher
from modelfsd.kernel.tree import Caller, Tree
from tests.daemon.node_parts import Cluster, Node, cluster_of

CALLER = Caller(0, 0, 1)
MODE = stat.S_IFREG | 0o644


def no_groups(pid: int) -> frozenset[int]:
    """The groups of a process."""
    return frozenset()


class CountingStore(MemoryMetadataStore):
    """Counts what a real etcd would be asked."""

    def __init__(self) -> None:
        super().__init__()
        self.commits = self.reads = 0

    async def commit(self, txn: Txn) -> TxnResult:
        self.commits += 1
        return await super().commit(txn)

    async def get(self, key: bytes) -> KeyValue | None:
        self.reads += 1
        return await super().get(key)

    def taken(self) -> tuple[int, int]:
        """(transactions, linearizable reads) since the last look."""
        counted = self.commits, self.reads
        self.commits = self.reads = 0
        return counted


class Mount:
    """What the kernel asks of one node."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.tree = Tree(node.namespace, node.cache)
        self.files = Files(
            node.namespace, node.cache, self.tree, node.contents, node.writer, Pusher(node.inodes)
        )
        self.root = node.inodes[1]

    async def create(self, name: bytes, data: bytes) -> None:
        """open(O_CREAT | O_EXCL), write, close."""
        with pytest.raises(NoSuchEntry):
            await self.tree.lookup(self.root, name)
        number, _ = await self.files.create(self.root, name, MODE, os.O_WRONLY, CALLER, no_groups)
        await self.files.write(number, 0, data)
        await self.files.flush(number)
        await self.files.release(number)

    async def read(self, name: bytes) -> bytes:
        """open, read, close."""
        inode = await self.tree.lookup(self.root, name)
        number = await self.files.open(inode, os.O_RDONLY, CALLER)
        data = bytes(await self.files.read(number, 0, inode.record.size))
        await self.files.flush(number)
        await self.files.release(number)
        return data


async def until_all_leases_are_back(writer: Mount, observer: Mount) -> None:
    """They linger, then ride along with another transaction, or go by themselves."""
    node = writer.node
    with trio.fail_after(60):
        while node.mirror.leases_of(node.id):  # noqa: ASYNC110 -- nobody else waits for that
            await trio.sleep(0.01)
    await observer.node.feed.fresh()


@asynccontextmanager
async def mounted(path: Path) -> AsyncIterator[tuple[Cluster, CountingStore, Mount, Mount]]:
    """Two nodes, and their etcd."""
    store = CountingStore()
    async with cluster_of(2, path, store) as cluster:
        one, two = (Mount(node) for node in cluster.nodes)
        await one.create(b"first", b"takes the block of inode numbers")
        await until_all_leases_are_back(one, two)
        store.taken()
        yield cluster, store, one, two


async def test_a_small_file_costs_two_transactions_and_one_read(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (_, store, one, two):
        for index in range(10):
            await one.create(b"%d" % index, b"x" * 4096)
        commits, reads = store.taken()
        # Leases go back in bulk, as time allows: with the clock, not with the files.
        assert 20 <= commits <= 30 and reads == 10
        assert not list((one.node.state_dir / "staging").iterdir())
        await until_all_leases_are_back(one, two)
        store.taken()
        for index in range(10):
            assert await two.read(b"%d" % index) == b"x" * 4096
        assert store.taken() == (0, 10)


async def test_the_first_look_at_a_file_that_another_node_is_writing_is_a_fresh_one(
    tmp_path: Path,
) -> None:
    async with mounted(tmp_path) as (_, store, one, two):
        number, _ = await one.files.create(one.root, b"new", MODE, os.O_WRONLY, CALLER, no_groups)
        await one.files.write(number, 0, b"x" * 4096)
        await two.node.feed.fresh()
        await one.files.flush(number)
        assert (await two.tree.lookup(two.root, b"new")).record.size == 4096
        await one.files.release(number)
        await until_all_leases_are_back(one, two)
        store.taken()
        assert (await two.tree.lookup(two.root, b"new")).record.size == 4096
        assert store.taken() == (0, 0)


async def test_leases_of_many_small_files_go_back_together(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    async with mounted(tmp_path) as (_, store, one, _):
        for index in range(50):
            await one.create(b"%d" % index, b"x")
        await trio.sleep(1)
        assert store.taken() == (101, 50)
        assert not one.node.mirror.leases_of(one.node.id)


async def test_names_cost_one_transaction_each(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (_, store, one, _):
        await one.tree.rename((one.root, b"first"), (one.root, b"second"), keep_existing=False)
        assert store.taken() == (1, 0)
        await one.tree.lookup(one.root, b"second")
        assert store.taken() == (0, 0)
        await one.tree.remove(one.root, b"second", directory=False)
        assert store.taken() == (1, 0)


async def test_those_who_open_at_the_same_time_share_a_read(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    async with mounted(tmp_path) as (_, store, _, two):
        await two.node.feed.fresh()
        store.taken()
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(two.read, b"first")
        commits, reads = store.taken()
        assert commits == 0 and reads <= 3


async def test_operations_that_wait_at_the_same_time_share_transactions(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    async with mounted(tmp_path) as (_, store, one, _):
        async with trio.open_nursery() as nursery:
            for index in range(40):
                nursery.start_soon(one.create, b"%d" % index, b"x")
        commits, _ = store.taken()
        assert commits <= 20


async def write_model(mount: Mount, name: bytes, data: bytes) -> None:
    """A large file, of chunks as a real one has them."""
    number, inode = await mount.files.create(mount.root, name, MODE, os.O_WRONLY, CALLER, no_groups)
    assert inode.record.chunk_bytes == 4 * MIB
    await save(mount, number, data)


async def save(mount: Mount, number: int, data: bytes) -> None:
    for start in range(0, len(data), MIB):
        await mount.files.write(number, start, data[start : start + MIB])
    await mount.files.flush(number)
    await mount.files.release(number)


async def test_what_did_not_change_is_not_sent(tmp_path: Path, rng: Random) -> None:
    async with mounted(tmp_path) as (_, _, one, two):
        data = rng.randbytes(12 * MIB)
        replicator = one.node.replicator
        await write_model(one, b"model", data)
        assert len(data) <= replicator.sent_bytes <= len(data) + 64 * KIB
        sent = replicator.sent_bytes
        inode = await one.tree.lookup(one.root, b"model")

        # The same checkpoint again: saved over itself, and under another name.
        number = await one.files.open(inode, os.O_WRONLY | os.O_TRUNC, CALLER)
        await save(one, number, data)
        await write_model(one, b"again", data)
        assert replicator.sent_bytes - sent <= 64 * KIB
        for name in (b"model", b"again"):
            assert await two.node.read_file(name) == data

        # A change of 10 bytes in the middle of a chunk of 4 MiB.
        sent = replicator.sent_bytes
        number = await one.files.open(inode, os.O_WRONLY, CALLER)
        await one.files.write(number, 9 * MIB, b"0123456789")
        await one.files.flush(number)
        await one.files.release(number)
        assert replicator.sent_bytes - sent <= 4 * MIB + 64 * KIB
        assert (
            await two.node.read_file(b"model")
            == data[: 9 * MIB] + b"0123456789" + data[9 * MIB + 10 :]
        )
