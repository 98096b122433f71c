"""Reading one chunk from wherever it is good."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing

from modelfs import keys
from modelfs.chunk import ChunkRef, describe
from modelfs.errors import ChunkUnavailable
from modelfs.ids import ChunkId, NodeId
from modelfs.limits import PEER_PATIENCE_SECONDS, PEER_SILENCE_SECONDS
from modelfs.manifest import PlacedChunk
from modelfs.ports import Holding, Put, Txn
from tests.daemon.node_parts import Cluster, cluster_of

DAMAGE = "fails its checksum; reading another replica"


def on(cluster: Cluster, data: bytes, nodes: list[NodeId]) -> PlacedChunk:
    """A chunk that these nodes have."""
    ref, table = describe(data)
    for node in nodes:
        cluster.stores[node].put(ref, table, data, Holding.OWNED)
    latest = cluster.nodes[0].mirror.latest_map
    assert latest is not None
    return PlacedChunk(ref, latest.epoch)


def remote_order(cluster: Cluster, ref: ChunkRef, replicas: int) -> list[NodeId]:
    """The other nodes in the chunk's order, as the first node sees it."""
    latest = cluster.nodes[0].mirror.latest_map
    assert latest is not None
    return [id for id in latest.candidates(ref.id, replicas) if id != cluster.ids[0]]


async def test_a_local_copy_is_read_first_and_then_the_least_loaded_holder(
    tmp_path: Path, rng: Random
) -> None:
    async with cluster_of(4, tmp_path) as cluster:
        chunks = cluster.nodes[0].chunks
        here = on(cluster, rng.randbytes(1000), cluster.ids)
        await chunks.read(here, 2, 0, 1000)
        assert chunks.statistics().local_bytes == 1000
        there = on(cluster, rng.randbytes(1000), cluster.ids[1:])
        order = remote_order(cluster, there.ref, 3)
        cluster.peers.loads = {order[0]: 2.0, order[1]: 1.0}
        first = chunks.sources(there, 3)
        holders = [id for id in order if id in first[:2]]
        assert first[:2] == sorted(holders, key=lambda id: cluster.peers.loads.get(id, 0.0))
        assert set(first) == set(cluster.ids[1:])


async def test_the_dead_and_the_silent_are_asked_last(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with cluster_of(4, tmp_path) as cluster:
        chunks = cluster.nodes[0].chunks
        placed = on(cluster, rng.randbytes(1000), cluster.ids[1:])
        order = chunks.sources(placed, 2)
        chunks.suspect(order[0])
        assert chunks.sources(placed, 2) == [order[1], order[2], order[0]]
        await trio.sleep(60)
        assert chunks.sources(placed, 2) == order
        cluster.die(order[1])
        await cluster.nodes[0].feed.reached(cluster.etcd.revision)
        assert chunks.sources(placed, 2) == [order[0], order[2], order[1]]


async def test_a_silent_node_costs_one_patience_and_then_nothing(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with cluster_of(4, tmp_path) as cluster:
        chunks = cluster.nodes[0].chunks
        data = rng.randbytes(1000)
        placed = on(cluster, data, cluster.ids[1:])
        cluster.peers.silent.add(chunks.sources(placed, 2)[0])
        for cost in (PEER_SILENCE_SECONDS, 0.0):
            begun = trio.current_time()
            assert await chunks.read(placed, 2, 10, 50) == data[10:60]
            assert trio.current_time() - begun == pytest.approx(cost, abs=0.01)


async def test_the_only_holder_is_given_more_time(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with cluster_of(3, tmp_path) as cluster:
        chunks = cluster.nodes[0].chunks
        data = rng.randbytes(1000)
        placed = on(cluster, data, [cluster.ids[1]])
        cluster.peers.silent.add(cluster.ids[1])

        async def wake_up() -> None:
            await trio.sleep(PEER_SILENCE_SECONDS + 0.5 * PEER_PATIENCE_SECONDS)
            cluster.peers.silent.clear()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wake_up)
            with pytest.raises(ChunkUnavailable):  # its patience is for the answer in hand
                await chunks.read(placed, 1, 0, 1000)
            assert trio.current_time() < 2 * PEER_PATIENCE_SECONDS
            assert await chunks.read(placed, 1, 0, 1000) == data


@pytest.mark.expected_logs(DAMAGE, "reading another replica and repairing")
async def test_nothing_corrupt_is_ever_returned_and_who_has_it_is_told(
    tmp_path: Path, rng: Random
) -> None:
    async with cluster_of(4, tmp_path) as cluster:
        node = cluster.nodes[0]
        data = rng.randbytes(200_000)
        placed = on(cluster, data, cluster.ids)
        for victim in cluster.ids[:3]:
            cluster.stores[victim].damage(placed.ref.id, 150_000)
        assert await node.chunks.read(placed, 4, 140_000, 20_000) == data[140_000:160_000]
        assert node.damaged == [placed.ref]
        assert {id for id, _ in cluster.peers.damage_reports} <= set(cluster.ids[1:3])
        cluster.stores[cluster.ids[3]].damage(placed.ref.id, 150_000)
        with pytest.raises(ChunkUnavailable):
            await node.chunks.read(placed, 4, 140_000, 20_000)


@pytest.mark.expected_logs("the disk fails at chunk")
async def test_a_failing_disk_is_passed_over(
    tmp_path: Path, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        node = cluster.nodes[0]
        data = rng.randbytes(1000)
        placed = on(cluster, data, cluster.ids)

        def fail(*arguments: object) -> memoryview:
            raise OSError(5, "the disk is broken")

        monkeypatch.setattr(node.store, "read", fail)
        assert await node.chunks.read(placed, 2, 0, 1000) == data


async def test_a_hand_off_and_a_node_that_joined_later_are_found(
    tmp_path: Path, rng: Random
) -> None:
    async with cluster_of(4, tmp_path) as cluster:
        chunks = cluster.nodes[0].chunks
        data = rng.randbytes(1000)
        ref, _ = describe(data)
        last = remote_order(cluster, ref, 1)[-1]
        placed = on(cluster, data, [last])
        assert await chunks.read(placed, 1, 0, 1000) == data
        unknown_epoch = PlacedChunk(ref, type(placed.epoch)(999))
        assert await chunks.read(unknown_epoch, 1, 0, 1000) == data


async def test_the_error_says_who_was_asked_and_why_it_did_not_help(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    async with cluster_of(3, tmp_path) as cluster:
        ref, _ = describe(b"nowhere")
        cluster.peers.down.add(cluster.ids[1])
        with pytest.raises(ChunkUnavailable) as failed:
            await cluster.nodes[0].chunks.read(
                PlacedChunk(ref, on(cluster, b"x", []).epoch), 2, 0, 3
            )
        assert "b: connection refused" in str(failed.value)
        assert "c: does not have it" in str(failed.value)


async def test_a_node_that_was_removed_is_not_asked_for_what_it_once_had(
    tmp_path: Path, rng: Random
) -> None:
    async with cluster_of(3, tmp_path) as cluster:
        reader, removed = cluster.nodes[0], cluster.ids[2]
        placed = on(cluster, rng.randbytes(1000), [removed])
        noted: list[ChunkId] = []
        reader.chunks.on_unavailable = noted.append
        cluster.die(removed)
        await reader.feed.reached(cluster.etcd.revision)
        with pytest.raises(ChunkUnavailable):
            await reader.chunks.read(placed, 2, 0, 1000)
        assert not noted, "it may come back"
        latest = reader.mirror.latest_map
        assert latest is not None
        smaller = latest.without_member(removed)
        ops = (Put(keys.placement_map(smaller.epoch), smaller.encode()),)
        await reader.feed.reached((await cluster.etcd.commit(Txn((), ops))).revision)
        assert reader.chunks.sources(placed, 2) == [cluster.ids[1]]
        with pytest.raises(ChunkUnavailable):
            await reader.chunks.read(placed, 2, 0, 1000)
        assert noted == [placed.ref.id]
