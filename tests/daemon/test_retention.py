"""Retention: what expires, who deletes it, and what reclaim is told meanwhile."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing

from modelfs import changes, keys
from modelfs.history import decode_retained
from modelfs.holdings import Holdings
from modelfs.ids import ROOT_INODE, Revision
from modelfs.inode import Policy, decode_inode
from modelfs.limits import KIB
from modelfs.ports import Put, Txn
from modelfsd.metadata import retention as retention_module
from modelfsd.metadata.policies import Policies
from modelfsd.storage.survey import Survey
from tests.daemon.history_parts import (
    HOUR_NS,
    entries,
    history_of,
    remove,
    retention_of,
    until,
)
from tests.daemon.node_parts import Node, cluster_of

# ---------------------------------------------------------------- expiry


async def test_only_what_is_over_is_deleted_and_two_nodes_at_once_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention_module, "PAGE_ENTRIES", 3)
    monkeypatch.setattr(retention_module, "BATCH_ENTRIES", 2)
    async with cluster_of(2, tmp_path) as cluster:
        one, other = cluster.nodes
        for number in range(10):
            name = b"f%d" % number
            await one.make_file(name)
            await one.write_file(name, b"x")
            await remove(one, name, now_ns=number * HOUR_NS)
        async with trio.open_nursery() as nursery:
            for node in (one, other):
                nursery.start_soon(retention_of(node).expire, 6 * HOUR_NS)
        left = [keys.split_history(row.key)[1] for row in await entries(one)]
        await retention_of(one).expire(6 * HOUR_NS)  # what the two left for each other
        left = [keys.split_history(row.key)[1] for row in await entries(one)]
        assert left == [b"f6", b"f7", b"f8", b"f9"]
        await other.feed.fresh()
        assert one.mirror.history == other.mirror.history
        assert one.mirror.history.count == 4


async def test_a_removed_directory_outlives_what_is_retained_below_it(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        namespace = node.namespace
        directory = await namespace.new_inode_number()
        record = namespace.require(ROOT_INODE)
        await namespace.change(lambda m: changes.create(m, ROOT_INODE, b"d", directory, record))
        ino = await node.make_file(b"f")
        await node.write_file(b"f", b"x")
        week = Policy(retain_seconds=7 * 86400)
        await namespace.change(lambda m: changes.set_policy(m, ino, week))
        source, target = (ROOT_INODE, b"f"), (directory, b"f")
        await namespace.change(lambda m: changes.rename(m, source, target, False, 1))
        await namespace.change(
            lambda m: changes.remove(m, directory, b"f", False, 1, namespace.keep)
        )
        await remove(node, b"d", directory=True)
        for hours in (2, 100):
            await retention_of(node).expire(hours * HOUR_NS)
            assert len(await entries(node)) == 2
        answer = await history_of(node).versions({"path": ["d", "f"]})
        assert [row["why"] for row in answer["versions"]] == ["deleted"]
        for _ in range(2):  # the file's, then the directory's
            await retention_of(node).expire(200 * HOUR_NS)
        assert await entries(node) == []


@pytest.mark.expected_logs("is damaged")
async def test_a_damaged_entry_stays_and_stops_reclaim(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        key = keys.history(ROOT_INODE, b"f", 1)
        await cluster.etcd.commit(Txn((), (Put(key, b"\x90"), Put(keys.SEQ, b"x"))))
        await retention_of(node).expire(100 * HOUR_NS)
        assert [row.key for row in await entries(node)] == [key]
        survey = Survey(Holdings.of(()))
        assert not list(await retention_of(node).retained(survey)) and not survey.is_complete


async def test_the_node_with_the_smallest_id_does_it_and_the_next_when_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention_module, "PAUSE_SECONDS_MIN", 0.001)
    monkeypatch.setattr(retention_module, "PAUSE_SECONDS_MAX", 0.001)
    async with cluster_of(2, tmp_path) as cluster:
        one, other = cluster.nodes
        first, second = retention_of(one), retention_of(other)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(second.run)
            for number, (retention, other_one) in enumerate([(first, second), (second, first)]):
                name = b"f%d" % number
                await other.make_file(name)
                await other.write_file(name, b"x")
                await remove(other, name, now_ns=1)  # of 1970
                if retention is first:
                    await trio.testing.wait_all_tasks_blocked()
                    assert len(await entries(other)) == 1
                    nursery.start_soon(first.run)
                while not retention.expired:
                    await trio.lowlevel.checkpoint()
                assert (retention.expired, other_one.expired) == (1, number)
                await until(one, lambda: not one.mirror.history.count)
                cluster.etcd.expire(cluster.leases[one.id])
            nursery.cancel_scope.cancel()


async def test_a_policy_that_is_set_is_acted_on_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention_module, "PAUSE_SECONDS_MIN", 0.001)
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        retention = retention_of(node)
        node.feed.listen(retention.on_changes)
        await node.make_file(b"f")
        for data in (b"old", b"new"):
            await node.write_file(b"f", data)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(retention.run)
            await trio.testing.wait_all_tasks_blocked()
            assert len(await entries(node)) == 1
            policies = Policies(node.namespace)
            answer = await policies.policy({"path": [], "set": {"retain": "0"}})
            assert answer["retain_seconds"] == 0 and answer["from"]["retain_seconds"] == "/"
            await until(node, lambda: not node.mirror.history.count)
            assert await entries(node) == []
            nursery.cancel_scope.cancel()


# ---------------------------------------------------------------- reclaim


@pytest.mark.parametrize("seed", range(8))
async def test_no_version_is_missed_while_others_supersede_and_delete(
    tmp_path: Path, rng: Random, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the survey reads: a fresh mirror, the current versions one by one, then the history."""
    monkeypatch.setattr(retention_module, "PAGE_ENTRIES", 2)
    names = [b"%02d" % number for number in range(6)]
    async with cluster_of(2, tmp_path) as cluster:
        surveyor, writer = cluster.nodes
        for name in names:
            await writer.make_file(name)
            await writer.write_file(name, rng.randbytes(5 * KIB))

        async def change_names(finished: trio.Event) -> None:
            while not finished.is_set():  # not cancelled: the kernel's requests are not, either
                name = rng.choice(names)
                if writer.mirror.child(ROOT_INODE, name) is None:
                    await writer.make_file(name)
                if rng.random() < 0.3:
                    await remove(writer, name)
                else:
                    await writer.write_file(name, rng.randbytes(5 * KIB))

        for _ in range(5):
            seen: set[bytes] = set()
            finished = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(change_names, finished)
                await trio.testing.wait_all_tasks_blocked()
                needed = await manifests_in(surveyor)
                await surveyor.feed.fresh()
                for ino in surveyor.mirror.inode_numbers():
                    record = surveyor.mirror.inode(ino)
                    if record is not None and record.manifest is not None:
                        seen.add(record.manifest.id)
                    for _ in range(rng.randrange(8)):
                        await trio.lowlevel.checkpoint()
                seen |= {
                    pin.manifest.id
                    for pin in await retention_of(surveyor).retained(Survey(Holdings.of(())))
                }
                finished.set()
            assert needed <= seen


async def manifests_in(node: Node) -> set[bytes]:
    """What the current and the retained versions name at one revision of etcd."""
    _, rows = await node.cluster.etcd.load(b"")
    records = [decode_inode(r.value) for r in rows if r.key.startswith(keys.INODE_PREFIX)]
    records += [
        decode_retained(r.value).record for r in rows if r.key.startswith(keys.HISTORY_PREFIX)
    ]
    return {record.manifest.id for record in records if record.manifest is not None}


async def test_of_the_history_neither_file_nor_mirror_keeps_values(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        for data in (b"old" * 1000, b"new"):
            await node.write_file(b"f", data)
        (row,) = await entries(node)
        assert row.value
        while node.replica.load()[0] < node.mirror.revision:
            await trio.lowlevel.checkpoint()
        kept = {one.key: one.value for one in node.replica.load()[1]}
        assert kept[row.key] == b""
        assert row.key in node.mirror.history
        _, bare = await cluster.etcd.load(b"", bare=keys.HISTORY_PREFIX)
        node.mirror.reload(Revision(cluster.etcd.revision), bare)
        assert node.mirror.history.highest(ROOT_INODE, b"f") == 2
