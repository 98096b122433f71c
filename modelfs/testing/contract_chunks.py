"""What every `ChunkStore` and every `PeerTransport` must do, as suites that each of them runs.

A test module subclasses a suite and gives it fixtures: `store`, or `peers`, a `PeersUnderTest`.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from modelfs.chunk import ChunkRef, describe
from modelfs.errors import ChunkMissing, CorruptChunk, OutOfSpace, PeerUnavailable
from modelfs.ids import ChunkId, NodeId
from modelfs.limits import BLOCK_BYTES, HAS_CHUNKS_MAX
from modelfs.ports import ChunkStore, Holding, PeerTransport

ABSENT = ChunkId(bytes(32))
PATIENCE = 5.0  # seconds; only a test that fails waits so long


def some_bytes(length: int, seed: int = 0) -> bytes:
    """Bytes that no compression and no accident would give."""
    return random.Random(seed).randbytes(length)


class ChunkStoreContract:
    """Run by every store. The store under test starts empty, with a cache of at least 1 MiB."""

    @pytest.mark.parametrize(
        "length", [1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 17]
    )
    def test_what_was_put_is_read_back_at_every_border(
        self, store: ChunkStore, length: int
    ) -> None:
        data = some_bytes(length)
        ref, table = describe(data)
        store.put(ref, table, data, Holding.OWNED)
        edges = sorted({0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, length - 1, length})
        for start in (edge for edge in edges if 0 <= edge < length):
            for end in (edge for edge in edges if start < edge <= length):
                assert store.read(ref, start, end - start) == data[start:end]

    def test_a_missing_chunk_is_missing_everywhere(self, store: ChunkStore) -> None:
        ref = ChunkRef(ABSENT, 0, 100)
        with pytest.raises(ChunkMissing):
            store.read(ref, 0, 100)
        with pytest.raises(ChunkMissing):
            store.open(ABSENT)
        with pytest.raises(ChunkMissing):
            store.verify(ABSENT)
        assert store.has([ABSENT], renew=False) == [False]
        assert store.has([ABSENT], renew=True) == [False]
        assert store.is_absent(ABSENT)

    @pytest.mark.parametrize("holding", [Holding.OWNED, Holding.CACHED])
    def test_what_was_missing_and_is_put_is_not_absent(
        self, store: ChunkStore, holding: Holding
    ) -> None:
        data = some_bytes(1000)
        ref, table = describe(data)
        for _ in range(2):
            with pytest.raises(ChunkMissing):
                store.read(ref, 0, 100)
            assert store.is_absent(ref.id)
            store.put(ref, table, data, holding)
            assert not store.is_absent(ref.id)
            assert store.read(ref, 0, 100) == data[:100]
            store.delete(ref.id)
        assert store.delete(ABSENT)

    def test_a_read_of_another_checksum_is_corrupt(self, store: ChunkStore) -> None:
        data = some_bytes(BLOCK_BYTES * 2)
        ref, table = describe(data)
        store.put(ref, table, data, Holding.OWNED)
        with pytest.raises(CorruptChunk):
            store.read(ChunkRef(ref.id, ref.checksum ^ 1, ref.length), 0, 10)
        with pytest.raises(CorruptChunk):
            store.read(ChunkRef(ref.id, ref.checksum, ref.length - 1), 0, 10)

    def test_a_repeated_put_changes_nothing_but_its_time(self, store: ChunkStore) -> None:
        data = some_bytes(1000)
        ref, table = describe(data)
        store.put(ref, table, data, Holding.OWNED)
        before, (_, put_at) = store.usage(), next(iter(store.owned()))
        store.put(ref, table, data, Holding.OWNED)
        store.put(ref, table, data, Holding.CACHED)
        after, (chunk, renewed_at) = store.usage(), next(iter(store.owned()))
        assert (after.owned_bytes, after.owned_chunks) == (before.owned_bytes, 1)
        assert after.cached_chunks == 0
        assert chunk == ref.id
        assert renewed_at >= put_at

    def test_only_owned_chunks_are_had_and_listed(self, store: ChunkStore) -> None:
        owned, cached = some_bytes(500, 1), some_bytes(500, 2)
        for data, holding in ((owned, Holding.OWNED), (cached, Holding.CACHED)):
            ref, table = describe(data)
            store.put(ref, table, data, holding)
            assert store.read(ref, 0, 500) == data
        ids = [describe(owned)[0].id, describe(cached)[0].id, ABSENT]
        assert store.has(ids, renew=False) == [True, False, False]
        assert [chunk for chunk, _ in store.owned()] == ids[:1]
        usage = store.usage()
        assert (usage.owned_chunks, usage.cached_chunks) == (1, 1)
        assert usage.owned_bytes >= 500
        assert usage.cached_bytes >= 500
        assert usage.free_bytes <= usage.capacity_bytes

    def test_the_shelves_hold_every_chunk_once_and_in_order(self, store: ChunkStore) -> None:
        wanted = {}
        for seed in range(600):  # two or three on a shelf
            data = some_bytes(100 + seed, seed)
            ref, table = describe(data)
            wanted[ref.id] = Holding.CACHED if seed % 3 == 0 else Holding.OWNED
            store.put(ref, table, data, wanted[ref.id])
        shelves = [store.shelf(first) for first in range(256)]
        assert all(one.chunk[0] == first for first in range(256) for one in shelves[first])
        held = [one for shelf in shelves for one in shelf]
        assert [one.chunk for one in held] == sorted(wanted)
        assert {one.chunk: one.holding for one in held} == wanted
        usage = store.usage()
        assert sum(one.file_bytes for one in held) == usage.owned_bytes + usage.cached_bytes

    def test_a_cached_chunk_that_is_put_as_owned_becomes_owned(self, store: ChunkStore) -> None:
        data = some_bytes(70_000)
        ref, table = describe(data)
        store.put(ref, table, data, Holding.CACHED)
        store.put(ref, table, data, Holding.OWNED)
        usage = store.usage()
        assert (usage.owned_chunks, usage.cached_chunks, usage.cached_bytes) == (1, 0, 0)
        assert store.has([ref.id], renew=False) == [True]
        assert store.read(ref, 0, len(data)) == data

    def test_an_opened_chunk_outlives_its_deletion(self, store: ChunkStore) -> None:
        data = some_bytes(BLOCK_BYTES + 5)
        ref, table = describe(data)
        store.put(ref, table, data, Holding.OWNED)
        opened = store.open(ref.id)
        try:
            assert store.delete(ref.id)
            assert (opened.length, opened.table) == (ref.length, table)
            assert os.pread(opened.fd, opened.length, 0) == data
        finally:
            os.close(opened.fd)
        with pytest.raises(ChunkMissing):
            store.read(ref, 0, 1)
        assert store.usage().owned_bytes == 0

    def test_a_renewed_chunk_is_spared_by_the_delete_that_was_planned_before(
        self, store: ChunkStore
    ) -> None:
        data = some_bytes(100)
        ref, table = describe(data)
        store.put(ref, table, data, Holding.OWNED)
        _, put_at = next(iter(store.owned()))
        assert store.has([ref.id], renew=True) == [True]
        assert not store.delete(ref.id, if_put_at=put_at)
        assert not store.delete(ref.id, if_put_at=put_at + 600)  # the clock was set back meanwhile
        assert store.read(ref, 0, 100) == data
        _, renewed_at = next(iter(store.owned()))
        assert store.delete(ref.id, if_put_at=renewed_at)
        assert store.has([ref.id], renew=False) == [False]

    @pytest.mark.parametrize("holding", list(Holding))
    @pytest.mark.parametrize("surplus", [0, 1, 100_000])
    def test_an_adopted_file_becomes_the_chunk(
        self, store: ChunkStore, tmp_path: Path, holding: Holding, surplus: int
    ) -> None:
        data = some_bytes(BLOCK_BYTES + 100)
        ref, table = describe(data)
        staging = tmp_path / "staging"
        staging.write_bytes(data + bytes(surplus))
        store.adopt(staging, ref, table, holding)
        assert not staging.exists()
        assert store.read(ref, 0, len(data)) == data
        assert store.verify(ref.id)
        assert store.has([ref.id], renew=False) == [holding is Holding.OWNED]
        staging.write_bytes(data)
        store.adopt(staging, ref, table, holding)
        assert not staging.exists()
        assert store.usage().owned_chunks + store.usage().cached_chunks == 1

    def test_a_file_too_short_to_be_adopted_stays(self, store: ChunkStore, tmp_path: Path) -> None:
        data = some_bytes(1000)
        ref, table = describe(data)
        staging = tmp_path / "staging"
        staging.write_bytes(data[:-1])
        with pytest.raises(CorruptChunk):
            store.adopt(staging, ref, table, Holding.OWNED)
        assert staging.read_bytes() == data[:-1]
        assert store.usage().owned_chunks == 0

    def test_puts_of_one_chunk_at_the_same_time_leave_one(self, store: ChunkStore) -> None:
        data = some_bytes(BLOCK_BYTES * 4)
        ref, table = describe(data)
        failures: list[BaseException] = []

        def put(holding: Holding) -> None:
            try:
                store.put(ref, table, data, holding)
                store.sync()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=put, args=(holding,)) for holding in [*Holding] * 8]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        usage = store.usage()
        assert (usage.owned_chunks, usage.cached_chunks, usage.cached_bytes) == (1, 0, 0)
        assert store.read(ref, 0, ref.length) == data

    def test_a_cached_chunk_larger_than_the_cache_is_left_out(self, store: ChunkStore) -> None:
        count = 0
        for seed in range(40):
            data = some_bytes(BLOCK_BYTES, seed)
            ref, table = describe(data)
            store.put(ref, table, data, Holding.CACHED)
            count += 1
        usage = store.usage()
        assert 0 < usage.cached_chunks <= count
        assert store.read(ref, 0, 10) == data[:10]  # the newest is there


@dataclass(frozen=True, slots=True)
class PeersUnderTest:
    """A transport, and the stores behind it. `stop` makes a node unreachable."""

    transport: PeerTransport
    stores: dict[NodeId, ChunkStore]
    damage: Callable[[NodeId, ChunkId], None]
    fill: Callable[[NodeId], None]  # leave no room on its disk
    stop: Callable[[NodeId], None]


Open = Callable[[Callable[[PeersUnderTest], Awaitable[None]]], None]
"""Runs a scenario under trio, with two nodes that have empty stores."""


class PeerTransportContract:
    """Run by every transport. The fixture `run` carries out a scenario."""

    def test_what_was_put_on_a_peer_is_fetched_back(self, run: Open) -> None:
        data = some_bytes(3 * BLOCK_BYTES + 17)
        ref, table = describe(data)

        async def scenario(peers: PeersUnderTest) -> None:
            one, other = peers.stores
            await peers.transport.put(one, ref, table, data)
            await peers.transport.sync(one)
            for offset, size in ((0, len(data)), (1, 1), (BLOCK_BYTES, 1), (len(data) - 1, 1)):
                part = await peers.transport.fetch(one, ref, offset, size, PATIENCE)
                assert part == data[offset : offset + size]
            assert peers.stores[one].has([ref.id], renew=False) == [True]
            with pytest.raises(ChunkMissing):
                await peers.transport.fetch(other, ref, 0, 1, PATIENCE)

        run(scenario)

    def test_many_ids_are_asked_for_at_once(self, run: Open) -> None:
        data = some_bytes(100)
        ref, table = describe(data)
        ids = [ChunkId(index.to_bytes(32, "big")) for index in range(HAS_CHUNKS_MAX + 5)]
        ids[HAS_CHUNKS_MAX + 1] = ref.id

        async def scenario(peers: PeersUnderTest) -> None:
            node = next(iter(peers.stores))
            await peers.transport.put(node, ref, table, data)
            assert await peers.transport.has(node, [], renew=False) == []
            found = await peers.transport.has(node, ids, renew=True)
            assert [index for index, bit in enumerate(found) if bit] == [HAS_CHUNKS_MAX + 1]
            assert len(found) == len(ids)

        run(scenario)

    def test_a_damaged_copy_is_refused_reported_and_taken_out_of_service(self, run: Open) -> None:
        data = some_bytes(2 * BLOCK_BYTES)
        ref, table = describe(data)

        async def scenario(peers: PeersUnderTest) -> None:
            node = next(iter(peers.stores))
            await peers.transport.put(node, ref, table, data)
            await peers.transport.report_damage(node, ref)  # a false alarm
            assert await peers.transport.fetch(node, ref, 0, 10, PATIENCE) == data[:10]
            peers.damage(node, ref.id)
            with pytest.raises(CorruptChunk):
                await peers.transport.fetch(node, ref, 0, len(data), PATIENCE)
            await peers.transport.report_damage(node, ref)
            with pytest.raises(ChunkMissing):
                await peers.transport.fetch(node, ref, 0, len(data), PATIENCE)
            await peers.transport.put(node, ref, table, data)
            assert await peers.transport.fetch(node, ref, 0, len(data), PATIENCE) == data

        run(scenario)

    def test_a_full_peer_says_so(self, run: Open) -> None:
        data = some_bytes(BLOCK_BYTES)
        ref, table = describe(data)

        async def scenario(peers: PeersUnderTest) -> None:
            node = next(iter(peers.stores))
            peers.fill(node)
            with pytest.raises(OutOfSpace):
                await peers.transport.put(node, ref, table, data)

        run(scenario)

    def test_a_stopped_or_unknown_peer_is_unavailable(self, run: Open) -> None:
        data = some_bytes(100)
        ref, table = describe(data)

        async def scenario(peers: PeersUnderTest) -> None:
            node, other = peers.stores
            await peers.transport.put(node, ref, table, data)
            peers.stop(node)
            transport = peers.transport
            for attempt in (
                lambda: transport.fetch(node, ref, 0, 10, 0.2),
                lambda: transport.fetch(NodeId("f" * 16), ref, 0, 10, 0.2),
                lambda: transport.put(node, ref, table, data),
                lambda: transport.sync(node),
                lambda: transport.has(node, [ref.id], False),
                lambda: transport.report_damage(node, ref),
            ):
                with pytest.raises(PeerUnavailable):
                    await attempt()
            await transport.put(other, ref, table, data)  # the other is not affected

        run(scenario)

    def test_a_sync_for_an_earlier_incarnation_fails(self, run: Open) -> None:
        async def scenario(peers: PeersUnderTest) -> None:
            node, other = peers.stores
            now = await peers.transport.incarnation(node)
            await peers.transport.sync(node, now)
            with pytest.raises(PeerUnavailable):
                await peers.transport.sync(node, now + "x")
            assert await peers.transport.incarnation(other)

        run(scenario)

    def test_many_fetches_at_once_all_arrive(self, run: Open) -> None:
        pieces = [some_bytes(BLOCK_BYTES + seed, seed) for seed in range(20)]

        async def scenario(peers: PeersUnderTest) -> None:
            node = next(iter(peers.stores))
            arrived: set[int] = set()

            async def move(seed: int) -> None:
                ref, table = describe(pieces[seed])
                await peers.transport.put(node, ref, table, pieces[seed])
                data = await peers.transport.fetch(node, ref, 0, ref.length, PATIENCE)
                assert data == pieces[seed]
                arrived.add(seed)

            async with trio.open_nursery() as nursery:
                for seed in range(len(pieces)):
                    nursery.start_soon(move, seed)
            assert arrived == set(range(len(pieces)))

        run(scenario)
