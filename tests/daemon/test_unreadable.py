"""Records in etcd that make no sense: what they are about is refused, all else goes on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
import trio.testing

from modelfs import changes, keys
from modelfs.changes import Plan
from modelfs.errors import (
    DirectoryNotEmpty,
    EntryExists,
    RecordUnreadable,
    WriteLost,
    WriterElsewhere,
)
from modelfs.ids import ROOT_INODE, Epoch, InodeNumber, NodeId
from modelfs.inode import Inode
from modelfs.limits import KIB, MIB
from modelfs.mirror import Mirror
from modelfs.ports import Delete, KeyValue, Put, Txn
from tests.daemon.node_parts import Cluster, Node, cluster_of
from tests.daemon.upkeep_parts import kept_cluster, make

UNREADABLE = r"the record .* in etcd cannot be read"
NO_SWEEP = "nothing can be reclaimed now"
pytestmark = pytest.mark.expected_logs(UNREADABLE, NO_SWEEP)

GARBAGE = b"\xc1garbage"
A_NODE = NodeId("5" * 16)


@pytest.fixture
def clock() -> trio.testing.MockClock:
    """Time stands still but when the test jumps."""
    return trio.testing.MockClock()


async def put(cluster: Cluster, *ops: Put | Delete) -> None:
    """As a malicious member does, and every node hears of it."""
    await cluster.etcd.commit(Txn((), (*ops, Put(keys.SEQ, b"malice"))))
    for node in cluster.nodes:
        await node.feed.reached(cluster.etcd.revision)


async def spoil(cluster: Cluster, key: bytes) -> KeyValue:
    """Damage a record; returns what it was."""
    before = await cluster.etcd.get(key)
    assert before is not None
    await put(cluster, Put(key, GARBAGE))
    return before


async def restore(cluster: Cluster, row: KeyValue) -> None:
    await put(cluster, Put(row.key, row.value))


async def test_a_file_with_a_damaged_record_can_neither_be_read_nor_lost(
    tmp_path: Path, rng: Random
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        contents = rng.randbytes(MIB)
        ino = await one.make_file(b"bad")
        await one.write_file(b"bad", contents)
        await make(one, b"good", contents[:100])
        opened = await two.look_up(b"bad")
        opened.handles += 1
        before = await spoil(cluster, keys.inode(ino))
        for node in cluster.nodes:
            with pytest.raises(RecordUnreadable):
                await node.look_up(b"bad")
            assert await node.read_file(b"good") == contents[:100]
            for attempt in everything_with(node, ino):
                with pytest.raises((RecordUnreadable, EntryExists)):
                    await attempt()
        assert not opened.is_current, "others must look again"
        assert await two.contents.read(opened.record, 0, MIB) == contents, "who has it open reads"
        await one.write_file(b"good", b"goes on")
        await restore(cluster, before)
        for node in cluster.nodes:
            assert await node.read_file(b"bad") == contents and not node.mirror.unreadable
            assert node.mirror.file_count == 2


def everything_with(node: Node, ino: InodeNumber) -> list[Callable[[], Awaitable[object]]]:
    """Every way in which a change could take a name away, or the inode, or give it another."""
    namespace, root, bad, good = node.namespace, ROOT_INODE, b"bad", b"good"
    plans: list[Callable[[Mirror], Plan[Any]]] = [
        lambda m: changes.remove(m, root, bad, False, 9, namespace.keep),
        lambda m: changes.rename(m, (root, bad), (root, b"x"), False, 9, namespace.keep),
        lambda m: changes.rename(m, (root, good), (root, bad), False, 9, namespace.keep),
        lambda m: changes.link(m, ino, root, b"second", 9),
        lambda m: changes.take_lease(m, ino, node.id, 0),
        lambda m: changes.set_policy(m, ino, None),
    ]
    return [*(partial(namespace.change, plan) for plan in plans), partial(node.make_file, bad)]


async def test_a_damaged_name_is_there_and_means_nothing(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        ino = await node.make_file(b"bad")
        await make(node, b"good", b"x")
        before = await spoil(cluster, keys.dentry(ROOT_INODE, b"bad"))
        assert set(node.mirror.children[ROOT_INODE]) == {b"bad", b"good"}
        with pytest.raises(RecordUnreadable):
            await node.look_up(b"bad")
        for attempt in everything_with(node, ino)[:3]:
            with pytest.raises(RecordUnreadable):
                await attempt()
        await restore(cluster, before)
        assert (await node.look_up(b"bad")).ino == ino


async def test_a_directory_with_a_damaged_name_is_not_empty(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        directory = await make_directory(node, b"d")
        await put(cluster, Put(keys.dentry(directory, b"bad"), GARBAGE))
        with pytest.raises(DirectoryNotEmpty):
            await node.namespace.change(
                lambda mirror: changes.remove(mirror, ROOT_INODE, b"d", True, 9)
            )


async def make_directory(node: Node, name: bytes) -> InodeNumber:
    ino = await node.namespace.new_inode_number()
    record = Inode(mode=0o40755, uid=0, gid=0, atime_ns=1, mtime_ns=1, ctime_ns=1)
    await node.namespace.change(
        lambda mirror: changes.create(mirror, ROOT_INODE, name, ino, record)
    )
    return ino


async def test_what_was_being_written_when_the_record_broke_is_kept_to_be_recovered(
    tmp_path: Path,
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        ino = await node.make_file(b"f")
        session = await node.open(b"f")
        await session.write(0, b"x" * (300 * KIB))
        await spoil(cluster, keys.inode(ino))
        with pytest.raises((RecordUnreadable, WriteLost)):
            await session.flush()
        await session.release()
        assert list((node.state_dir / "lost").iterdir())


@pytest.mark.expected_logs("cannot be committed", "are kept", "kept in")
@pytest.mark.parametrize("family", ["inode", "pin", "map", "inode key", "pin key", "history key"])
async def test_nothing_is_reclaimed_while_a_record_that_may_need_it_cannot_be_read(
    tmp_path: Path, rng: Random, clock: trio.testing.MockClock, family: str
) -> None:
    async with kept_cluster(3, tmp_path) as kept:
        one, cluster = kept.nodes[0], kept.cluster
        for name in (b"f", b"gone"):
            await make(one, name, rng.randbytes(MIB))
        record = (await one.look_up(b"f")).record
        assert record.manifest is not None
        child = one.mirror.child(ROOT_INODE, b"f")
        assert child is not None
        await one.namespace.change(
            lambda mirror: changes.remove(mirror, ROOT_INODE, b"gone", False, 9)
        )
        key = {
            "inode": keys.inode(child.ino),
            "pin": keys.pin(A_NODE, record.manifest.id),
            "map": keys.placement_map(Epoch(1)),
            "inode key": keys.INODE_PREFIX + b"zz",
            "pin key": keys.PIN_PREFIX + b"zz",
            "history key": keys.HISTORY_PREFIX + b"zz",
        }[family]
        before = await cluster.etcd.get(key)
        copies = kept.copies()
        await put(cluster, Put(key, GARBAGE))
        assert await kept.sweep_all(clock) == 0 and await kept.sweep_all(clock) == 0
        assert await kept.heal() == 0 and kept.copies() == copies
        await put(cluster, Put(key, before.value) if before else Delete(key))
        assert await kept.sweep_all(clock) > 0
        assert await kept.sweep_all(clock) == 0
        assert len(await one.read_file(b"f")) == MIB


async def test_copies_are_made_though_a_record_cannot_be_read(tmp_path: Path, rng: Random) -> None:
    async with kept_cluster(3, tmp_path) as kept:
        one = kept.nodes[0]
        await make(one, b"f", rng.randbytes(MIB))
        await put(kept.cluster, Put(keys.HISTORY_PREFIX + b"zz", GARBAGE))
        copies = kept.copies()
        chunk, holders = next(iter(copies.items()))
        kept.cluster.stores[next(iter(holders))].delete(chunk)
        assert kept.copies() != copies
        assert await kept.heal() == 1
        assert kept.copies()[chunk] == holders


async def test_a_damaged_lease_keeps_writers_away_until_it_is_gone(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        node.leases._wait_seconds = 0.1
        ino = await node.make_file(b"f")
        await put(cluster, Put(keys.lease(ino), GARBAGE))
        with pytest.raises(WriterElsewhere):
            await node.open(b"f")
        await put(cluster, Delete(keys.lease(ino)))
        await node.write_file(b"f", b"free again")


async def test_a_damaged_counter_of_inode_numbers_gives_nobody_a_number_twice(
    tmp_path: Path,
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        first = await one.make_file(b"first")
        await put(cluster, Put(keys.INODES, GARBAGE))
        with pytest.raises(RecordUnreadable):
            await two.make_file(b"second")
        await put(cluster, Put(keys.INODES, b"0"))  # set back: block 1 is given out again
        second = await two.make_file(b"second")
        assert second != first
        assert two.mirror.inode(first) is not None


async def test_a_number_that_is_taken_unseen_is_not_given_to_another_file(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        ino = await node.make_file(b"f")
        record = node.namespace.require(ino)
        plan = changes.create(node.mirror, ROOT_INODE, b"g", ino, record)
        assert not (await cluster.etcd.commit(plan.txn)).succeeded


FAMILIES = [
    keys.INODE_PREFIX, keys.DENTRY_PREFIX, keys.DIRTIME_PREFIX, keys.LEASE_PREFIX,
    keys.NODE_PREFIX, keys.MAP_PREFIX, keys.PIN_PREFIX, keys.HISTORY_PREFIX,
]  # fmt: skip
NAMES = [
    b"", b"zz", b"0000000001", b"0000000001/", b"0000000001/..", b"0000000001/a/b", b"5" * 16,
    b"5" * 16 + b"/" + b"0" * 64, b"00000007", b"0000000001/f\0zz", b"0000000001/f\x0000000001",
    b"\xff" * 300, b"a" * 2000,
]  # fmt: skip


async def test_garbage_in_every_family_ends_no_node_and_no_restart(tmp_path: Path) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await make(one, b"f", b"first")
        root = await cluster.etcd.get(keys.inode(ROOT_INODE))
        assert root is not None
        garbage = [prefix + name for prefix in FAMILIES for name in NAMES]
        garbage += [keys.TRUST, keys.REVOKED_PREFIX + b"zz", b"unknown/key", b"\xff"]
        garbage.remove(root.key)
        for key in garbage:
            await put(cluster, Put(key, GARBAGE))
        await one.write_file(b"f", b"second")
        assert await two.read_file(b"f") == b"second"
        assert len(one.mirror.unreadable) > 50
        again = type(one.mirror)()
        again.reload(*await cluster.etcd.load(b""))
        assert again.unreadable == one.mirror.unreadable == two.mirror.unreadable
        for key in garbage:
            await put(cluster, Delete(key))
        assert not one.mirror.unreadable and not two.mirror.unreadable
