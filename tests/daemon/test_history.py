"""Restore, expiry and what reclaim is told, by whole nodes over a memory store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
import trio.testing

from modelfs import changes, keys
from modelfs.errors import MetadataUnavailable, ProtocolError, UserError
from modelfs.history import decode_retained
from modelfs.ids import ROOT_INODE, Revision
from modelfs.inode import Policy, decode_inode
from modelfs.limits import KIB
from modelfs.mirror import Change, InodeChanged
from modelfs.policy import NANOSECONDS
from modelfs.ports import KeyValue, Put, Txn
from modelfsd import history as history_module
from modelfsd import retention as retention_module
from modelfsd.history import History
from modelfsd.policies import Policies
from modelfsd.retention import Retention
from tests.daemon.node_parts import Node, cluster_of

HOUR_NS = 3600 * NANOSECONDS


def history_of(node: Node) -> History:
    return History(node.writer, node.cluster.etcd, str, Path("/m"))


def retention_of(node: Node) -> Retention:
    return Retention(node.namespace, node.cluster.etcd)


async def versions(node: Node, name: str) -> list[dict[str, Any]]:
    answer = await history_of(node).versions({"path": [name]})
    return [row for row in answer["versions"] if not row["current"]]


async def restore(node: Node, name: str, number: int) -> dict[str, Any]:
    return await history_of(node).restore({"path": [name], "number": number})


async def remove(node: Node, name: bytes, directory: bool = False, now_ns: int = 1) -> None:
    await node.namespace.change(
        lambda mirror: changes.remove(
            mirror, ROOT_INODE, name, directory, now_ns, node.namespace.keep
        )
    )


async def until(node: Node, condition: Callable[[], bool]) -> None:
    """Wait for the node's mirror to become so."""
    while not condition():
        await node.feed.reached(Revision(node.mirror.revision + 1))


async def entries(node: Node) -> list[KeyValue]:
    return (await node.cluster.etcd.load(keys.HISTORY_PREFIX))[1]


# ---------------------------------------------------------------- restore


async def test_a_restored_version_shares_every_chunk(tmp_path: Path, rng: Random) -> None:
    async with cluster_of(3, tmp_path) as cluster:
        one, other = cluster.nodes[:2]
        old = rng.randbytes(900 * KIB)
        await one.make_file(b"f")
        await one.write_file(b"f", old)
        first = (await one.look_up(b"f")).record
        await other.write_file(b"f", rng.randbytes(100))
        held = {id: set(store.owned()) for id, store in cluster.stores.items()}
        (row,) = await versions(one, "f")
        answer = await restore(other, "f", row["number"])
        assert answer["number"] == row["number"] + 2
        again = (await one.look_up(b"f")).record
        assert again.manifest == first.manifest and again.version == first.version + 2
        assert await one.read_file(b"f") == old
        assert {id: set(store.owned()) for id, store in cluster.stores.items()} == held


async def test_the_kernel_of_the_restoring_node_is_told_like_the_others(tmp_path: Path) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one = cluster.nodes[0]
        await one.make_file(b"f")
        for data in (b"old", b"new"):
            await one.write_file(b"f", data)
        before = await one.look_up(b"f")
        origins: list[str] = []

        def listen(announced: list[Change]) -> None:
            origins.extend(c.origin for c in announced if isinstance(c, InodeChanged))

        one.feed.listen(listen)
        one.notifier.names.clear()
        (row,) = await versions(one, "f")
        await restore(one, "f", row["number"])
        assert not any(one.namespace.is_own(origin) for origin in origins)
        assert not before.is_current and before.record.inline == b"new"
        assert [name for _, name in one.notifier.names] == [b"f"]
        assert await one.read_file(b"f") == b"old"
        origins.clear()
        await one.write_file(b"f", b"by the kernel")
        assert all(one.namespace.is_own(origin) for origin in origins)
        assert one.mirror.lease(before.ino) is None or one.leases.etcd_lease


async def test_a_version_that_expires_meanwhile_is_not_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        for data in (b"old", b"new"):
            await node.write_file(b"f", data)
        (row,) = await versions(node, "f")
        history, retention = history_of(node), retention_of(node)
        once = history._restore_once

        async def expire_first(place: Any, *arguments: Any) -> bool:  # noqa: ANN401
            await retention.expire(2 * HOUR_NS + row["superseded_ns"])
            return await once(place, *arguments)

        monkeypatch.setattr(history, "_restore_once", expire_first)
        with pytest.raises(UserError, match="is not retained \\(none is\\)"):
            await history.restore({"path": ["f"], "number": row["number"]})
        assert await node.read_file(b"f") == b"new"


async def test_a_file_that_is_being_written_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_module, "BUSY_SECONDS", 0.05)
    async with cluster_of(2, tmp_path) as cluster:
        one, other = cluster.nodes
        await one.make_file(b"f")
        for data in (b"old", b"new"):
            await one.write_file(b"f", data)
        session = await one.open(b"f")
        (row,) = await versions(other, "f")
        for node in (one, other):
            with pytest.raises(UserError, match="/m/f is being written on node aaaa"):
                await restore(node, "f", row["number"])
        await session.write(0, b"more")
        await session.release()
        assert await other.read_file(b"f") == b"more"


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        ({"path": ["f"], "number": "2"}, "not the number"),
        ({"path": ["f"], "number": 0}, "not the number"),
        ({"path": ["f"], "number": 1 << 40}, "not the number"),
        ({"path": ["f"]}, "not the number"),
        ({"path": [], "number": 1}, "no earlier versions"),
        ({"path": "f", "number": 1}, "not a list"),
        ({"path": [".."], "number": 1}, "not a name"),
        ({"path": ["a/b"], "number": 1}, "not a name"),
        ({"path": ["x" * 300], "number": 1}, "at most 255"),
        ({"path": ["nowhere", "f"], "number": 1}, "no directory /m/nowhere"),
        ({"path": ["f"], "number": 7}, "not retained"),
        ({"path": ["f"], "number": 1}, "current one"),
    ],
)
async def test_what_cannot_be_restored_is_refused_in_words(
    tmp_path: Path, request_: dict[str, Any], complaint: str
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        with pytest.raises(UserError, match=complaint):
            await history_of(node).restore(request_)


async def test_without_etcd_nothing_is_restored_set_or_deleted(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        await node.write_file(b"f", b"x")
        await remove(node, b"f")
        cluster.etcd.unavailable = True
        for attempt in (
            lambda: restore(node, "f", 2),
            lambda: versions(node, "f"),
            lambda: Policies(node.namespace).policy({"path": [], "set": {"retain": "1d"}}),
        ):
            with pytest.raises(MetadataUnavailable):
                await attempt()
        await retention_of(node).expire(10 * HOUR_NS)
        with pytest.raises(MetadataUnavailable):
            await retention_of(node).retained()


async def test_a_name_that_keeps_changing_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        await node.write_file(b"f", b"x")
        await remove(node, b"f")
        history = history_of(node)

        async def never(*arguments: object) -> bool:
            return False

        monkeypatch.setattr(history, "_restore_once", never)
        monkeypatch.setattr(history_module, "ATTEMPTS_MAX", 3)
        with pytest.raises(UserError, match="keeps being changed"):
            await history.restore({"path": ["f"], "number": 2})


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
        with pytest.raises(ProtocolError):
            await retention_of(node).retained()


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
                assert len(await entries(other)) == 1
                if retention is first:
                    nursery.start_soon(first.run)
                await until(other, lambda: not other.mirror.history.count)
                assert (retention.expired, other_one.expired) == (1, number)
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
            await trio.testing.wait_all_tasks_blocked(0.01)
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

        async def change_names() -> None:
            while True:
                name = rng.choice(names)
                if writer.mirror.child(ROOT_INODE, name) is None:
                    await writer.make_file(name)
                if rng.random() < 0.3:
                    await remove(writer, name)
                else:
                    await writer.write_file(name, rng.randbytes(5 * KIB))

        for _ in range(5):
            seen: set[bytes] = set()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(change_names)
                await trio.testing.wait_all_tasks_blocked()
                needed = await manifests_in(surveyor)
                await surveyor.feed.fresh()
                for ino in surveyor.mirror.inode_numbers():
                    record = surveyor.mirror.inode(ino)
                    if record is not None and record.manifest is not None:
                        seen.add(record.manifest.id)
                    for _ in range(rng.randrange(8)):
                        await trio.lowlevel.checkpoint()
                seen |= {pin.manifest.id for pin in await retention_of(surveyor).retained()}
                nursery.cancel_scope.cancel()
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
