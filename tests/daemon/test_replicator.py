"""Replicas: how many copies there are, where, and what a node that dies in between costs."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
import trio.testing

from modelfs.chunk import describe
from modelfs.errors import ChunkMissing, OutOfSpace, ReplicationFailed
from modelfs.ids import ChunkId, NodeId
from modelfs.limits import KIB, NODE_LEASE_SECONDS
from modelfs.ports import Holding
from modelfsd.storage.disk import DiskChunkStore
from modelfsd.storage.replicator import Placements
from tests.daemon.node_parts import Cluster, cluster_of

UNSAFE = "could not make its copies safe"


def holders(cluster: Cluster, chunk: ChunkId) -> list[NodeId]:
    """Who owns a chunk."""
    return [id for id, store in cluster.stores.items() if store.has([chunk], False)[0]]


@pytest.mark.parametrize("replicas", [1, 2, 3])
async def test_a_chunk_gets_its_replicas_where_the_map_says(
    tmp_path: Path, rng: Random, replicas: int
) -> None:
    async with cluster_of(4, tmp_path) as cluster:
        node = cluster.nodes[0]
        for length in (1, 70 * KIB, 300 * KIB):
            data = rng.randbytes(length)
            ref, table = describe(data)
            placed = await node.replicator.put(ref, table, data, replicas, Placements())
            placement = node.mirror.latest_map
            assert placement is not None and placed.epoch == placement.epoch
            assert set(holders(cluster, ref.id)) == set(placement.place(ref.id, replicas))


@pytest.mark.parametrize("trouble", ["down", "silent", "full", "dead"])
async def test_another_node_takes_the_copy_of_one_that_cannot(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock, trouble: str
) -> None:
    async with cluster_of(4, tmp_path) as cluster:
        node = cluster.nodes[0]
        for turn in range(6):
            data = rng.randbytes(1000 + turn)
            ref, table = describe(data)
            placement = node.mirror.latest_map
            assert placement is not None
            order = placement.candidates(ref.id, 2)
            victim = next(id for id in order if id != node.id)
            if trouble == "full":
                cluster.stores[victim]._capacity_bytes = 0
            elif trouble == "dead":
                cluster.die(victim)
                await node.feed.reached(cluster.etcd.revision)
            else:
                getattr(cluster.peers, trouble).add(victim)
            await node.replicator.put(ref, table, data, 2, Placements())
            assert holders(cluster, ref.id) == sorted([id for id in order if id != victim][:2])
            cluster.peers.down.clear()
            cluster.peers.silent.clear()
            cluster.stores[victim]._capacity_bytes = 1 << 30
            if trouble == "dead":
                await cluster.register(victim)
            await trio.sleep(60)


async def test_with_two_nodes_the_death_of_one_costs_its_lease_and_no_more(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    """G1 to the letter: one copy is enough only once etcd has declared the other node dead."""
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        cluster.peers.down.add(two.id)
        data = b"x" * 1000
        ref, table = describe(data)
        done = trio.Event()

        async def put() -> None:
            await one.replicator.put(ref, table, data, 2, Placements())
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(put)
            await trio.sleep(NODE_LEASE_SECONDS / 2)
            assert not done.is_set() and holders(cluster, ref.id) == [one.id]
            cluster.die(two.id)
            await trio.sleep(1)
            assert done.is_set()


async def test_too_few_copies_are_an_error_and_a_full_disk_says_so(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        ref, table = describe(b"x" * 1000)
        cluster.peers.down.add(two.id)
        with pytest.raises(ReplicationFailed) as failed:
            await one.replicator.put(ref, table, b"x" * 1000, 2, Placements())
        assert (failed.value.copies, failed.value.needed) == (1, 2)
        cluster.peers.down.clear()
        cluster.stores[two.id]._capacity_bytes = 0
        with pytest.raises(OutOfSpace):
            await one.replicator.put(ref, table, b"x" * 1000, 2, Placements())


@pytest.mark.expected_logs(UNSAFE)
async def test_a_peer_that_restarted_before_the_sync_is_given_its_copies_again(
    tmp_path: Path, rng: Random
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        account = Placements()
        chunks = [rng.randbytes(size) for size in (1000, 300 * KIB)]
        refs = []
        for data in chunks:
            ref, table = describe(data)
            refs.append(ref)
            await one.replicator.put(ref, table, data, 2, account)
        cluster.peers.restart(two.id)
        cluster.stores[two.id].lose(refs[0].id)  # the name did not survive
        await one.replicator.sync(account, 2)
        assert not account.by_node
        for ref, data in zip(refs, chunks, strict=True):
            assert cluster.stores[two.id].read(ref, 0, ref.length) == data
        assert cluster.stores[one.id].syncs and cluster.stores[two.id].syncs


@pytest.mark.expected_logs(UNSAFE)
async def test_a_peer_that_died_before_the_sync_is_replaced(tmp_path: Path, rng: Random) -> None:
    async with cluster_of(4, tmp_path) as cluster:
        one = cluster.nodes[0]
        account = Placements()
        data = rng.randbytes(5000)
        ref, table = describe(data)
        await one.replicator.put(ref, table, data, 3, account)
        victim = next(id for id in holders(cluster, ref.id) if id != one.id)
        cluster.peers.down.add(victim)
        await one.replicator.sync(account, 3)
        assert len(set(holders(cluster, ref.id)) - {victim}) == 3


@pytest.mark.expected_logs(UNSAFE)
async def test_a_disk_that_cannot_sync_fails_the_commit_in_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, virtual_time: trio.testing.MockClock
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one = cluster.nodes[0]
        account = Placements()
        ref, table = describe(b"x" * 1000)
        await one.replicator.put(ref, table, b"x" * 1000, 2, account)

        def fail() -> None:
            raise OSError(5, "the disk is broken")

        monkeypatch.setattr(one.store, "sync", fail)
        begun = trio.current_time()
        with pytest.raises(ReplicationFailed, match="could not make it safe"):
            await one.replicator.sync(account, 2)
        assert trio.current_time() - begun < 60


async def test_a_chunk_that_a_node_has_is_not_sent_again(tmp_path: Path, rng: Random) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one = cluster.nodes[0]
        data = rng.randbytes(300 * KIB)
        ref, table = describe(data)
        for _ in range(2):
            await one.replicator.put(ref, table, data, 2, Placements())
        assert (one.replicator.sent_bytes, one.replicator.spared_bytes) == (len(data), len(data))


async def test_a_chunk_that_is_new_here_is_not_offered_first(
    tmp_path: Path, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that is to have a copy would have it, if anybody had."""
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        questions = 0
        has = two.store.has

        def count(chunks: Sequence[ChunkId], renew: bool) -> list[bool]:
            nonlocal questions
            questions += 1
            return has(chunks, renew)

        monkeypatch.setattr(two.store, "has", count)
        data = rng.randbytes(300 * KIB)
        ref, table = describe(data)
        for expected in (0, 1):
            await one.replicator.put(ref, table, data, 2, Placements())
            assert questions == expected


async def test_a_cached_copy_becomes_an_owned_one(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        one = cluster.nodes[0]
        ref, table = describe(b"x" * 1000)
        one.store.put(ref, table, b"x" * 1000, Holding.CACHED)
        await one.replicator.put(ref, table, b"x" * 1000, 1, Placements())
        assert one.store.has([ref.id], False) == [True]
        with pytest.raises(ChunkMissing):
            one.store.verify(describe(b"y")[0].id)


@pytest.mark.expected_logs("did not take a chunk")
async def test_a_staged_file_that_could_not_be_synced_is_not_trusted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of a failed write-back once: a second fsync would claim what is not so."""
    async with cluster_of(1, tmp_path) as cluster:
        one = cluster.nodes[0]
        store = one.chunks.store = DiskChunkStore(tmp_path / "chunks", 0)
        data = bytes(100_000)
        ref, table = describe(data)
        path = tmp_path / "staged"
        path.write_bytes(data)
        staged, fsync = path.stat().st_ino, os.fsync

        def fsync_badly(fd: int) -> None:
            if os.fstat(fd).st_ino == staged and not failures:
                failures.append(fd)
                raise OSError(errno.EIO, "the disk forgot a page")
            fsync(fd)

        failures: list[int] = []
        monkeypatch.setattr(os, "fsync", fsync_badly)
        await one.replicator.put(ref, table, data, 1, Placements(), path)
        assert failures
        opened = store.open(ref.id)
        assert os.fstat(opened.fd).st_ino != staged
        os.close(opened.fd)
        assert store.read(ref, 0, ref.length) == data


async def test_a_staged_file_is_consumed_only_by_the_node_that_is_to_hold_it(
    tmp_path: Path, rng: Random
) -> None:
    async with cluster_of(3, tmp_path) as cluster:
        one = cluster.nodes[0]
        seen = set()
        for turn in range(12):
            data = rng.randbytes(1000)
            path = tmp_path / f"staged-{turn}"
            path.write_bytes(data)
            ref, table = describe(data)
            await one.replicator.put(ref, table, data, 1, Placements(), path)
            is_here = holders(cluster, ref.id) == [one.id]
            assert path.exists() != is_here
            seen.add(is_here)
        assert seen == {True, False}
