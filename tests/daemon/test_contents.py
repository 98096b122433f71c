"""Contents: one fetch for many readers, memory that is bounded, and bytes that are right."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import msgspec
import pytest
import trio
import trio.testing

from modelfs import stripe
from modelfs.chunk import ChunkRef, describe
from modelfs.errors import ChunkUnavailable
from modelfs.ids import Epoch, NodeId
from modelfs.inode import ManifestRef
from modelfs.limits import GIB, KIB, MIB
from modelfs.manifest import Manifest, PlacedChunk
from modelfs.ports import Holding
from modelfsd.storage.contents import Contents
from tests.daemon.node_parts import CHUNK, Cluster, Node, cluster_of

# Several tests look at what there is when all tasks wait: no thread may be at work then.
pytestmark = pytest.mark.usefixtures("inline_threads")


class Fetches:
    """Counts what is fetched from peers, and can hold it up."""

    def __init__(self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count: Counter[bytes] = Counter()
        self.under_way = self.most = 0
        self.gate: trio.Event | None = None
        real = cluster.peers.fetch

        async def fetch(
            node: NodeId, ref: ChunkRef, offset: int, size: int, patience: float
        ) -> memoryview:
            self.count[ref.id] += 1
            self.under_way += size
            self.most = max(self.most, self.under_way)
            try:
                if self.gate is not None:
                    await self.gate.wait()
                return await real(node, ref, offset, size, patience)
            finally:
                self.under_way -= size

        monkeypatch.setattr(cluster.peers, "fetch", fetch)


async def a_remote_file(cluster: Cluster, data: bytes) -> tuple[Node, bytes]:
    """A file whose chunks the first node does not have."""
    await cluster.nodes[1].make_file(b"f")
    await cluster.nodes[1].write_file(b"f", data)
    store = cluster.stores[cluster.ids[0]]
    for chunk, _ in list(store.owned()):
        store.lose(chunk)
    return cluster.nodes[0], data


async def test_many_readers_of_one_chunk_share_one_fetch(
    tmp_path: Path, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        node, data = await a_remote_file(cluster, rng.randbytes(50 * KIB))
        record = (await node.look_up(b"f")).record
        await node.contents.manifest(record)
        fetches = Fetches(cluster, monkeypatch)
        fetches.gate = trio.Event()

        async def read(offset: int) -> None:
            found = await node.contents.read(record, offset, 1000, whole_chunks=True)
            assert found == data[offset : offset + 1000]

        async with trio.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(read, rng.randrange(49 * KIB))
            await trio.testing.wait_all_tasks_blocked()
            fetches.gate.set()
        assert list(fetches.count.values()) == [1]


@pytest.mark.parametrize("is_lost", [False, True])
async def test_who_asks_for_what_is_expected_of_him_waits_for_it(
    tmp_path: Path, rng: Random, monkeypatch: pytest.MonkeyPatch, is_lost: bool
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        node, data = await a_remote_file(cluster, rng.randbytes(50 * KIB))
        record = (await node.look_up(b"f")).record
        await node.contents.manifest(record)
        fetches = Fetches(cluster, monkeypatch)
        fetches.gate = trio.Event()
        arrived, found = [], []
        start, end = 8 * KIB, 16 * KIB

        def take(begin: int, piece: memoryview) -> None:
            arrived.append((begin, bytes(piece)))

        async def read(offset: int, size: int) -> None:
            try:
                found.append(bytes(await node.contents.read(record, offset, size)))
            except ChunkUnavailable:
                found.append(b"")

        node.contents.read_run_ahead(record, start, end, take)
        async with trio.open_nursery() as nursery:
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(read, start, 4 * KIB)
            nursery.start_soon(read, end - 1000, 1000)
            await trio.testing.wait_all_tasks_blocked()
            assert list(fetches.count.values()) == [1]
            if is_lost:  # then each asks for himself, and hears why
                for chunk, _ in list(cluster.stores[cluster.ids[1]].owned()):
                    cluster.stores[cluster.ids[1]].lose(chunk)
            fetches.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        pieces = [data[start : start + 4 * KIB], data[end - 1000 : end]]
        assert sorted(found) == ([b"", b""] if is_lost else sorted(pieces))
        assert arrived == ([] if is_lost else [(start, data[start:end])])


async def test_runs_that_are_expected_stay_within_a_part_of_the_memory(
    tmp_path: Path, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        node, _ = await a_remote_file(cluster, rng.randbytes(50 * KIB))
        record = (await node.look_up(b"f")).record
        fetches = Fetches(cluster, monkeypatch)
        contents = Contents(node.chunks, 8 * 8 * KIB, node.start)
        await contents.manifest(record)
        arrived: list[int] = []

        def take(begin: int, piece: memoryview) -> None:
            arrived.append(begin)

        for _ in range(2):  # what has come makes room for more
            fetches.gate = trio.Event()
            for start in range(0, 40 * KIB, 4 * KIB):
                contents.read_run_ahead(record, start, start + 4 * KIB, take)
            await trio.testing.wait_all_tasks_blocked()
            assert fetches.under_way == 8 * KIB
            fetches.gate.set()
            await trio.testing.wait_all_tasks_blocked()
        assert sorted(arrived) == [0, 0, 4 * KIB, 4 * KIB]


@pytest.mark.parametrize("budget_chunks", [1, 3])
async def test_readahead_and_readers_stay_within_the_memory(
    tmp_path: Path, rng: Random, monkeypatch: pytest.MonkeyPatch, budget_chunks: int
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        node, data = await a_remote_file(cluster, rng.randbytes(2 * CHUNK + 5 * CHUNK))
        record = (await node.look_up(b"f")).record
        fetches = Fetches(cluster, monkeypatch)
        contents = Contents(node.chunks, budget_chunks * CHUNK, node.start)
        await contents.manifest(record)

        async def read_all() -> None:
            for offset in range(0, len(data), 100 * KIB):
                contents.read_ahead(record, offset, offset + 10 * MIB)
                found = await contents.read(record, offset, 100 * KIB, whole_chunks=True)
                assert found == data[offset : offset + 100 * KIB]
                assert contents.buffered_bytes <= budget_chunks * CHUNK

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(read_all)
        await trio.testing.wait_all_tasks_blocked()
        assert fetches.most <= budget_chunks * CHUNK
        buffers = contents._buffers
        assert buffers.used_bytes == buffers._held_bytes


@pytest.mark.expected_logs("fails its checksum")
async def test_failed_and_cancelled_reads_give_their_memory_back(
    tmp_path: Path, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        node, data = await a_remote_file(cluster, rng.randbytes(50 * KIB))
        record = (await node.look_up(b"f")).record
        manifest = await node.contents.manifest(record)
        placed = manifest.entry(0)
        assert placed is not None
        cluster.peers.down.add(cluster.ids[1])
        with pytest.raises(ChunkUnavailable):
            await node.contents.read(record, 0, 10, whole_chunks=True)
        cluster.peers.down.clear()
        fetches = Fetches(cluster, monkeypatch)
        fetches.gate = trio.Event()
        with trio.move_on_after(0.05):
            await node.contents.read(record, 0, 10, whole_chunks=True)
        assert node.contents.buffered_bytes == 0
        fetches.gate.set()
        assert await node.contents.read(record, 0, 10, whole_chunks=True) == data[:10]


async def test_what_is_dropped_is_fetched_again(
    tmp_path: Path, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        node, data = await a_remote_file(cluster, rng.randbytes(50 * KIB))
        record = (await node.look_up(b"f")).record
        fetches = Fetches(cluster, monkeypatch)
        for times in (1, 2):
            assert await node.contents.read(record, 0, 10, whole_chunks=True) == data[:10]
            assert await node.contents.read(record, 9, 10, whole_chunks=True) == data[9:19]
            assert set(fetches.count.values()) == {times}
            assert node.contents.drop() == len(data)
            assert node.contents.buffered_bytes == 0


async def test_a_file_of_many_manifest_pages_is_read_page_by_page(
    tmp_path: Path, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await two.make_file(b"f")
        session = await two.open(b"f")
        places = [0, 700 * MIB, 5000 * MIB]
        for place in places:
            await session.write(place, b"here %d" % place)
        await session.release()
        for chunk, _ in list(one.store.owned()):
            one.store.lose(chunk)
        record = (await one.look_up(b"f")).record
        fetches = Fetches(cluster, monkeypatch)
        for place in places:
            assert await one.contents.read(record, place, 6) == (b"here %d" % place)[:6]
            assert await one.contents.read(record, place + 100 * KIB, 6) in (bytes(6), b"")
        assert len(fetches.count) <= 1 + 2 * len(places)
        assert len(await one.contents.all_entries(record)) == 4100 or record.size > 5000 * MIB


async def test_a_file_of_100_gib_is_opened_without_its_manifest(
    tmp_path: Path, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One chunk, repeated: a read loads the root, one page of the manifest, and the chunk."""
    size = 100 * GIB
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await two.make_file(b"f")
        data = rng.randbytes(CHUNK)
        ref, table = describe(data)
        two.store.put(ref, table, data, Holding.OWNED)
        chunk = PlacedChunk(ref, cluster_epoch(one))
        large = Manifest.empty(CHUNK)
        count = stripe.chunk_count(CHUNK, size)
        large, pages = large.changed(size, dict.fromkeys(range(count), chunk))
        assert len(pages) > 5
        places = {page: put_at(two, page_data) for page, page_data in pages.items()}
        root = put_at(two, large.with_pages_stored(places).encode())
        record = msgspec.structs.replace(
            (await one.look_up(b"f")).record, size=size, inline=None, manifest=ManifestRef.of(root)
        )
        fetches = Fetches(cluster, monkeypatch)
        for offset in (0, 50 * GIB, 50 * GIB + CHUNK, size - CHUNK):
            begin, _ = stripe.span(CHUNK, stripe.locate(CHUNK, offset)[0])
            assert await one.contents.read(record, begin, 1000) == data[:1000]
        assert sum(fetches.count.values()) == 1 + 3 + 4
        assert one.contents.manifest_bytes < 5 * 1024 * 48  # three pages, and the root


async def test_the_manifests_at_hand_are_bounded(
    tmp_path: Path, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelfsd.storage.contents.MANIFEST_BYTES_MAX", 200 * KIB)
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        records = []
        for number in range(6):
            name = b"%d" % number
            await two.make_file(name)
            session = await two.open(name)
            for place in (0, 1400 * MIB):
                await session.write(place, b"here %d" % place)
            await session.release()
            records.append((await one.look_up(name)).record)
        for record in records * 2:
            for place in (0, 1400 * MIB):
                assert await one.contents.read(record, place, 6) == (b"here %d" % place)[:6]
            assert one.contents.manifest_bytes <= 200 * KIB


def put_at(node: Node, data: bytes) -> PlacedChunk:
    """A chunk that this node has."""
    ref, table = describe(data)
    node.store.put(ref, table, data, Holding.OWNED)
    return PlacedChunk(ref, cluster_epoch(node))


def cluster_epoch(node: Node) -> Epoch:
    latest = node.mirror.latest_map
    assert latest is not None
    return latest.epoch
