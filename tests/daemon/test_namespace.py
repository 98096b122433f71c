"""Changes of the namespace: exact answers, from a mirror that lags and an etcd that goes away."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing

from modelfs import changes, keys
from modelfs.attributes import AttributeChange
from modelfs.errors import (
    EntryExists,
    MetadataUnavailable,
    MetadataUncertain,
    NoSuchEntry,
)
from modelfs.ids import ROOT_INODE, InodeNumber
from modelfs.ports import Put, Txn, TxnResult
from modelfs.testing.metadata import CommitFault, MemoryMetadataStore
from tests.daemon.node_parts import Node, cluster_of

AWAY = ("watch of the namespace broke", "out of reach", "did not say whether")


async def remove(node: Node, name: bytes) -> InodeNumber:
    return await node.namespace.change(
        lambda mirror: changes.remove(mirror, ROOT_INODE, name, False, 1)
    )


async def rename(node: Node, old: bytes, new: bytes) -> None:
    await node.namespace.change(
        lambda mirror: changes.rename(mirror, (ROOT_INODE, old), (ROOT_INODE, new), False, 1)
    )


def names(node: Node) -> set[bytes]:
    return set(node.mirror.children.get(ROOT_INODE, {}))


async def test_every_node_reads_its_own_writes_and_all_end_alike(
    tmp_path: Path, rng: Random
) -> None:
    async with cluster_of(3, tmp_path) as cluster:
        outcomes: Counter[str] = Counter()

        async def work(node: Node, turns: list[tuple[int, bytes]]) -> None:
            for what, name in turns:
                try:
                    if what == 0:
                        await node.make_file(name)
                        outcomes["made"] += 1
                    elif what == 1:
                        await remove(node, name)
                        outcomes["removed"] += 1
                    else:
                        await rename(node, name, b"t")
                        outcomes["renamed"] += 1
                except (EntryExists, NoSuchEntry):
                    outcomes["refused"] += 1

        async with trio.open_nursery() as nursery:
            for node in cluster.nodes:
                for _ in range(4):
                    turns = [(rng.randrange(3), rng.choice([b"x", b"y", b"z"])) for _ in range(12)]
                    nursery.start_soon(work, node, turns)
        for node in cluster.nodes:
            await node.feed.fresh()
        assert names(cluster.nodes[0]) == names(cluster.nodes[1]) == names(cluster.nodes[2])
        left = {
            child.ino for child in cluster.nodes[0].mirror.children.get(ROOT_INODE, {}).values()
        }
        numbers = set(cluster.nodes[0].mirror.inode_numbers()) - {ROOT_INODE}
        assert numbers == left, "an inode without a name"
        assert min(outcomes[what] for what in ("made", "removed", "renamed", "refused")) > 0


async def test_of_many_who_create_one_name_exactly_one_succeeds(tmp_path: Path) -> None:
    async with cluster_of(3, tmp_path) as cluster:
        made: list[InodeNumber] = []

        async def create(node: Node) -> None:
            try:
                made.append(await node.make_file(b"lock"))
            except EntryExists:
                assert node.mirror.child(ROOT_INODE, b"lock") is not None

        async with trio.open_nursery() as nursery:
            for node in cluster.nodes * 5:
                nursery.start_soon(create, node)
        assert len(made) == 1


@pytest.mark.parametrize("fault", CommitFault)
@pytest.mark.parametrize("what", ["create", "remove", "rename", "touch"])
async def test_an_unanswered_change_is_made_exactly_once(
    tmp_path: Path, fault: CommitFault, what: str
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        ino = await one.make_file(b"old")
        await one.namespace.new_inode_number()
        cluster.etcd.next_commit_fault = fault
        if what == "create":
            await one.make_file(b"new")
        elif what == "remove":
            assert await remove(one, b"old") == ino
        elif what == "rename":
            await rename(one, b"old", b"new")
        else:
            change = AttributeChange(mtime_ns=77)
            await one.namespace.change(
                lambda mirror: changes.set_attributes(mirror, ino, change, one.id, 1)
            )
        assert cluster.etcd.next_commit_fault is None
        await two.feed.fresh()
        expected = {
            "create": {b"old", b"new"},
            "remove": set[bytes](),
            "rename": {b"new"},
            "touch": {b"old"},
        }
        assert names(one) == names(two) == expected[what]
        if what == "touch":
            record = two.mirror.inode(ino)
            assert record is not None and record.touches == 1


async def test_an_unanswered_change_that_somebody_overtook_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request was lost, and before it is sent again another node takes the name."""
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await one.namespace.new_inode_number()
        await two.namespace.new_inode_number()
        commit = MemoryMetadataStore.commit

        async def overtaken(store: MemoryMetadataStore, txn: Txn) -> TxnResult:
            monkeypatch.setattr(MemoryMetadataStore, "commit", commit)
            await two.make_file(b"name")
            raise MetadataUncertain("lost")

        monkeypatch.setattr(MemoryMetadataStore, "commit", overtaken)
        with pytest.raises(EntryExists):
            await one.make_file(b"name")


async def test_a_refusal_counts_only_when_it_is_fresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await one.make_file(b"a")
        await two.feed.fresh()
        apply, held = two.feed._take, trio.Event()

        async def later() -> None:
            await held.wait()

        waiting: list[object] = []
        monkeypatch.setattr(two.feed, "_take", waiting.append)  # the mirror of two falls behind
        await rename(one, b"a", b"b")
        await one.make_file(b"c")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(remove, two, b"c")  # two has never heard of it
            await trio.testing.wait_all_tasks_blocked()
            monkeypatch.setattr(two.feed, "_take", apply)
            for batch in waiting:
                apply(batch)  # type: ignore[arg-type]
        assert names(two) == {b"b"}


async def test_renaming_between_two_names_of_one_file_is_checked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to commit, so nothing but a fresh look says that both names exist."""
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        ino = await one.make_file(b"a")
        await one.namespace.change(lambda m: changes.link(m, ino, ROOT_INODE, b"b", 1))
        await two.feed.fresh()
        apply = two.feed._take
        waiting: list[object] = []
        monkeypatch.setattr(two.feed, "_take", waiting.append)
        await remove(one, b"a")
        async with trio.open_nursery() as nursery:

            async def expect() -> None:
                with pytest.raises(NoSuchEntry):
                    await rename(two, b"a", b"b")

            nursery.start_soon(expect)
            await trio.testing.wait_all_tasks_blocked()
            monkeypatch.setattr(two.feed, "_take", apply)
            for batch in waiting:
                apply(batch)  # type: ignore[arg-type]


@pytest.mark.expected_logs(*AWAY)
async def test_without_etcd_changes_fail_and_looks_say_that_they_are_old(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        node = cluster.nodes[0]
        await node.make_file(b"a")
        assert await node.namespace.fresh()
        cluster.etcd.unavailable = True
        await trio.sleep(30)
        assert not await node.namespace.fresh()
        with pytest.raises(MetadataUnavailable):
            await node.make_file(b"b")
        with pytest.raises(MetadataUnavailable):
            await remove(node, b"missing")
        assert names(node) == {b"a"}
        cluster.etcd.unavailable = False
        await trio.sleep(1)
        await node.make_file(b"b")
        assert await node.namespace.fresh() and names(node) == {b"a", b"b"}


async def test_inode_numbers_are_never_given_twice(tmp_path: Path) -> None:
    seen: list[InodeNumber] = []
    async with cluster_of(3, tmp_path) as cluster:

        async def take(node: Node) -> None:
            seen.extend([await node.namespace.new_inode_number() for _ in range(20)])

        async with trio.open_nursery() as nursery:
            for node in cluster.nodes * 3:
                nursery.start_soon(take, node)
    assert len(set(seen)) == len(seen) == 180
    assert min(seen) > ROOT_INODE


@pytest.mark.expected_logs(*AWAY)
async def test_what_cannot_be_found_out_is_said_to_be_uncertain(
    tmp_path: Path, virtual_time: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never `MetadataUnavailable`, which says that nothing has happened."""
    async with cluster_of(1, tmp_path) as cluster:
        node = cluster.nodes[0]
        await node.namespace.new_inode_number()
        commit = MemoryMetadataStore.commit

        async def vanish(store: MemoryMetadataStore, txn: Txn) -> TxnResult:
            await commit(store, txn)
            store.unavailable = True
            raise MetadataUncertain("lost")

        async def vanish_later(store: MemoryMetadataStore, txn: Txn) -> TxnResult:
            result = await commit(store, txn)
            store.unavailable = True
            return result

        for turn, fault in enumerate((vanish, vanish_later)):
            with monkeypatch.context() as patch:
                patch.setattr(MemoryMetadataStore, "commit", fault)
                async with trio.open_nursery() as nursery:

                    async def expect(name: bytes) -> None:
                        with pytest.raises(MetadataUncertain):
                            await node.make_file(name)

                    nursery.start_soon(expect, b"n%d" % turn)
                    await trio.testing.wait_all_tasks_blocked()
                    patch.undo()
            cluster.etcd.unavailable = False
            await trio.sleep(10)
            assert b"n%d" % turn in names(node)  # it did happen


async def test_after_a_compaction_an_unanswered_change_is_not_taken_for_a_conflict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        node = cluster.nodes[0]
        await node.namespace.new_inode_number()
        commit = MemoryMetadataStore.commit

        async def overtaken(store: MemoryMetadataStore, txn: Txn) -> TxnResult:
            monkeypatch.setattr(MemoryMetadataStore, "commit", commit)
            loads = node.feed.resyncs
            store._apply(txn.ops)  # all in one step: the watch cannot keep up
            store._apply([Put(keys.SEQ, b"other")])
            store.compact(store.revision)
            while node.feed.resyncs == loads:  # noqa: ASYNC110 -- the feed has no event for it
                await trio.sleep(0.01)
            raise MetadataUncertain("lost")

        monkeypatch.setattr(MemoryMetadataStore, "commit", overtaken)
        with pytest.raises(MetadataUncertain):
            await node.make_file(b"name")
        assert names(node) == {b"name"}
