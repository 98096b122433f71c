"""Scrubbing: bad copies are found and restored, nothing good is touched, rounds keep their pace.

Three nodes over memory stores; where the disk itself matters, over a real `DiskChunkStore`.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing

from modelfs.chunk import ChunkRef, describe
from modelfs.errors import ChunkMissing, ChunkUnavailable
from modelfs.ids import ChunkId
from modelfs.limits import KIB, MIB
from modelfs.ports import HeldChunk, Holding
from modelfsd.storage.disk import DiskChunkStore
from modelfsd.storage.restoring import RETRY_SECONDS, Outcome
from modelfsd.storage.scrubbing import Scrubber, Tour
from modelfsd.storage.upkeep import Upkeep
from tests.daemon.scrub_parts import on, scrubbed_cluster
from tests.daemon.upkeep_parts import make

FAILS = "cannot be restored|fails its checksum|has a damaged copy"


async def tour_of(upkeep: Upkeep) -> Tour:
    tour = await upkeep.scrubber.start()
    await upkeep.scrubber.walk(tour)
    return tour


async def test_a_clean_store_has_nothing_bad(tmp_path: Path, rng: Random) -> None:
    async with scrubbed_cluster(tmp_path) as kept:
        await make(kept.nodes[0], b"f", rng.randbytes(2 * MIB))
        before = kept.copies()
        for id, upkeep in kept.upkeep.items():
            tour = await tour_of(upkeep)
            usage = kept.cluster.stores[id].usage()
            assert (tour.chunks, tour.bytes) == (usage.owned_chunks, usage.owned_bytes)
            assert not tour.restorations
            assert not tour.dropped_chunks
        assert kept.copies() == before


@pytest.mark.expected_logs("fails its checksum")
async def test_every_bad_copy_of_a_node_is_restored(tmp_path: Path, rng: Random) -> None:
    async with scrubbed_cluster(tmp_path) as kept:
        data = rng.randbytes(2 * MIB)
        await make(kept.nodes[0], b"f", data)
        before, id = kept.copies(), kept.cluster.ids[1]
        bad = on(kept, id)
        assert len(bad) > 3
        for chunk in bad:
            kept.cluster.stores[id].damage(chunk)
        tour = await tour_of(kept.upkeep[id])
        assert {one.chunk for one in tour.restorations} == set(bad)
        assert {one.outcome for one in tour.restorations} == {Outcome.RESTORED}
        assert kept.copies() == before
        assert all(kept.cluster.stores[id].verify(chunk) for chunk in bad)
        assert not (await tour_of(kept.upkeep[id])).restorations
        statistics = kept.upkeep[id].scrub_statistics()
        assert statistics["bad_chunks"] == statistics["restored_chunks"] == len(bad)
        assert statistics["lost_chunks"] == 0


@pytest.mark.expected_logs(FAILS)
async def test_what_nobody_has_is_failing_with_its_paths_until_it_turns_up(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with scrubbed_cluster(tmp_path) as kept:
        data = rng.randbytes(200 * KIB)
        await make(kept.nodes[0], b"f\xff", data)
        await make(kept.nodes[0], b"other", rng.randbytes(MIB))
        ref, table = describe(data[: 64 * KIB])
        holders = kept.copies()[ref.id]
        for id in holders:
            kept.cluster.stores[id].damage(ref.id)
        id = min(holders)
        (failed,) = (await tour_of(kept.upkeep[id])).restorations
        assert failed.outcome is Outcome.FAILED
        assert failed.paths == ["/f\udcff"]
        assert failed.reason
        assert [one.chunk for one in kept.upkeep[id].restorer.failing()] == [ref.id]
        assert kept.upkeep[id].told()["lost_chunks"][0]["paths"] == ["/f\udcff"]
        spare = next(id for id in kept.cluster.ids if id not in holders)
        kept.cluster.stores[spare].put(ref, table, data[: 64 * KIB], Holding.OWNED)
        await trio.sleep(RETRY_SECONDS + 1)
        assert not kept.upkeep[id].restorer.failing()
        assert kept.cluster.stores[id].verify(ref.id)


@pytest.mark.expected_logs(FAILS)
async def test_a_failure_is_forgotten_when_no_file_needs_the_chunk(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with scrubbed_cluster(tmp_path) as kept:
        await make(kept.nodes[0], b"f", rng.randbytes(100 * KIB), replicas=1)
        (chunk, (id,)) = next((c, h) for c, h in kept.copies().items() if len(h) == 1)
        kept.cluster.stores[id].damage(chunk)
        await tour_of(kept.upkeep[id])
        assert kept.upkeep[id].restorer.failing()
        await kept.nodes[0].write_file(b"f", b"")
        await trio.sleep(RETRY_SECONDS + 1)
        assert not kept.upkeep[id].restorer.failing()


@pytest.mark.expected_logs(FAILS)
async def test_what_a_read_finds_nowhere_is_known_too(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with scrubbed_cluster(tmp_path) as kept:
        reader, data = kept.nodes[0], rng.randbytes(200 * KIB)
        await make(reader, b"f", data)
        record = (await reader.look_up(b"f")).record
        assert record.manifest is not None
        chunk = ChunkId(record.manifest.id)
        holders = kept.copies()[chunk]
        root_ref = record.manifest.placed.ref
        root = bytes(kept.cluster.stores[min(holders)].read(root_ref, 0, root_ref.length))
        for id in holders:
            kept.cluster.stores[id].lose(chunk)
        reader.contents.drop()
        for _ in range(3):
            with pytest.raises(ChunkUnavailable):
                await reader.contents.read(record, 0, 100)
        await trio.sleep(1)
        (failed,) = kept.upkeep[reader.id].restorer.failing()
        assert (failed.chunk, failed.paths) == (chunk, ["/f"])
        ref, table = describe(root)
        kept.cluster.stores[max(holders)].put(ref, table, root, Holding.OWNED)
        await trio.sleep(RETRY_SECONDS + 1)
        assert not kept.upkeep[reader.id].restorer.failing()
        assert await reader.read_file(b"f") == data


async def test_garbage_and_cached_copies_are_put_away_without_fuss(
    tmp_path: Path, rng: Random, caplog: pytest.LogCaptureFixture
) -> None:
    async with scrubbed_cluster(tmp_path) as kept:
        id = kept.cluster.ids[0]
        store = kept.cluster.stores[id]
        refs = []
        for holding in (Holding.OWNED, Holding.CACHED):
            data = rng.randbytes(5000)
            ref, table = describe(data)
            store.put(ref, table, data, holding)
            store.damage(ref.id)
            refs.append(ref)
        with caplog.at_level("CRITICAL"):
            tour = await tour_of(kept.upkeep[id])
        assert [one.outcome for one in tour.restorations] == [Outcome.UNNEEDED]
        assert tour.dropped_chunks == 1
        for ref in refs:
            with pytest.raises(ChunkMissing):
                store.read(ref, 0, 10)


async def test_chunks_that_go_before_their_turn_are_passed_over(
    tmp_path: Path, rng: Random
) -> None:
    async with scrubbed_cluster(tmp_path) as kept:
        upkeep = kept.upkeep[kept.cluster.ids[0]]
        gone = HeldChunk(describe(rng.randbytes(100))[0].id, Holding.OWNED, 140)
        tour = await upkeep.scrubber.start()
        await upkeep.scrubber.look(gone, tour)
        assert (tour.chunks, tour.restorations, tour.unreadable_chunks) == (0, [], 0)


@pytest.mark.expected_logs("was damaged on|fails its checksum")
async def test_a_tour_that_is_cancelled_restores_what_it_had_found(
    tmp_path: Path, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scrubbed_cluster(tmp_path) as kept:
        await make(kept.nodes[0], b"f", rng.randbytes(MIB))
        id = kept.cluster.ids[0]
        upkeep, bad = kept.upkeep[id], on(kept, id)
        for chunk in bad:
            kept.cluster.stores[id].damage(chunk)
        tour = await upkeep.scrubber.start()
        store, scope = kept.cluster.stores[id], trio.CancelScope()
        verify = store.verify

        def verify_and_cancel(chunk: ChunkId) -> bool:
            trio.from_thread.run_sync(scope.cancel)
            return verify(chunk)

        with scope, monkeypatch.context() as patch:
            patch.setattr(store, "verify", verify_and_cancel)
            await upkeep.scrubber.walk(tour)
        assert scope.cancelled_caught
        (restoration,) = tour.restorations
        await restoration.done.wait()
        assert restoration.outcome is Outcome.RESTORED


# ---------------------------------------------------------------- the disk


def put(store: DiskChunkStore, data: bytes, holding: Holding = Holding.OWNED) -> ChunkRef:
    ref, table = describe(data)
    store.put(ref, table, data, holding)
    return ref


def file_of(root: Path, ref: ChunkRef, holding: Holding = Holding.OWNED) -> Path:
    name = ref.id.hex()
    return root / holding.value / name[:2] / name[2:]


def spoil(path: Path, where: str, length: int) -> None:
    """Change one byte of a chunk's file, or its size."""
    size = path.stat().st_size
    place = {"first": 0, "last": length - 1, "table": length, "footer": size - 1}.get(where)
    with path.open("r+b") as file:
        if place is not None:
            byte = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), place)
        else:
            file.truncate({"short": size - 1, "long": size + 1, "empty": 0}[where])


@pytest.mark.expected_logs("was damaged on")
async def test_a_file_that_differs_in_any_way_is_found(tmp_path: Path, rng: Random) -> None:
    async with scrubbed_cluster(tmp_path / "cluster") as kept:
        root = tmp_path / "chunks"
        store = DiskChunkStore(root, 16 * MIB)
        spoilt = set()
        for length in (1, 4096, 300_000):
            for where in ("first", "last", "table", "footer", "short", "long", "empty"):
                put(store, rng.randbytes(length + 10))  # stays good
                ref = put(store, rng.randbytes(length + 20))
                spoil(file_of(root, ref), where, length + 20)
                spoilt.add(ref.id)
        scrubber = Scrubber(store, kept.upkeep[kept.cluster.ids[0]].restorer)
        tour = await scrubber.start()
        await scrubber.walk(tour)
        assert {one.chunk for one in tour.restorations} == spoilt
        assert tour.chunks == 2 * len(spoilt)
        assert store.has(sorted(spoilt), renew=False) == [False] * len(spoilt)
        assert store.usage().owned_chunks == len(spoilt)
        assert set(os.listdir(root / "damaged")) == {chunk.hex() for chunk in spoilt}


async def test_a_tour_does_not_change_which_cached_chunk_goes_first(
    tmp_path: Path, rng: Random
) -> None:
    async with scrubbed_cluster(tmp_path / "cluster") as kept:
        root = tmp_path / "chunks"
        size = 10_000
        store = DiskChunkStore(root, 4 * (size + 200))
        refs = [put(store, rng.randbytes(size), Holding.CACHED) for _ in range(4)]
        scrubber = Scrubber(store, kept.upkeep[kept.cluster.ids[0]].restorer)
        tour = await scrubber.start()
        await scrubber.walk(tour)
        assert tour.chunks == 4
        for index in range(4):
            put(store, rng.randbytes(size), Holding.CACHED)
            there = [file_of(root, ref, Holding.CACHED).exists() for ref in refs]
            assert there == [number > index for number in range(4)]


@pytest.mark.expected_logs(FAILS, "watch of the namespace broke", "etcd is out of reach")
async def test_a_failure_stays_known_while_it_cannot_be_asked_who_needs_the_chunk(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with scrubbed_cluster(tmp_path) as kept:
        data = rng.randbytes(200 * KIB)
        await make(kept.nodes[0], b"f", data)
        ref, _ = describe(data[: 64 * KIB])
        holders = kept.copies()[ref.id]
        for id in holders:
            kept.cluster.stores[id].damage(ref.id)
        upkeep = kept.upkeep[min(holders)]
        await tour_of(upkeep)
        assert upkeep.told()["lost_chunks"][0]["paths"] == ["/f"]
        kept.cluster.etcd.unavailable = True
        (again,) = (await tour_of(upkeep)).earlier
        assert again.outcome is Outcome.FAILED
        assert upkeep.told()["lost_chunks"][0]["paths"] == ["/f"]


@pytest.mark.expected_logs("cannot be listed")
async def test_a_directory_that_cannot_be_read_keeps_no_other_from_being_looked_at(
    tmp_path: Path, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scrubbed_cluster(tmp_path) as kept:
        await make(kept.nodes[0], b"f", rng.randbytes(2 * MIB))
        id = kept.cluster.ids[0]
        chunks, store, upkeep = on(kept, id), kept.cluster.stores[id], kept.upkeep[id]
        first, real = min(chunks)[0], store.shelf
        others = [chunk for chunk in chunks if chunk[0] != first]

        def shelf(at: int) -> list[HeldChunk]:
            if at == first:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(at)

        monkeypatch.setattr(store, "shelf", shelf)
        tour = await tour_of(upkeep)
        assert others
        assert tour.chunks == len(others)
        assert tour.unreadable_chunks == 1
        assert f"{first:02x}" in tour.example


def test_a_cached_copy_that_cannot_be_removed_keeps_no_other_from_going(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged inode: whoever makes room, or empties the cache, goes on."""
    store = DiskChunkStore(tmp_path, MIB)
    refs = []
    for data in (b"bad", b"good", b"better"):
        ref, table = describe(data)
        store.put(ref, table, data, Holding.CACHED)
        refs.append(ref)
    name, real = refs[0].id.hex()[2:], os.unlink

    def unlink(path: str) -> None:
        if path.endswith(name):
            raise OSError(errno.EUCLEAN, os.strerror(errno.EUCLEAN))
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        store.drop_cached()
    assert store.usage().cached_chunks == 0
    assert [path.name for path in (tmp_path / "cached").rglob("?????*")] == [name]
