"""Scrubbing: bad copies are found and restored, nothing good is touched, rounds keep their pace.

Three nodes over memory stores; where the disk itself matters, over a real `DiskChunkStore`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
import trio.testing

from modelfs.chunk import ChunkRef, describe
from modelfs.errors import ChunkMissing, UserError
from modelfs.ids import ChunkId, NodeId
from modelfs.limits import KIB, MIB
from modelfs.ports import HeldChunk, Holding
from modelfsd.commands.scrub_service import ScrubService
from modelfsd.storage.chunk_tree import DAMAGED_FILES_MAX
from modelfsd.storage.disk import DiskChunkStore
from modelfsd.storage.restoring import RETRY_SECONDS, Outcome
from modelfsd.storage.scrub_rounds import (
    RoundsState,
    ScrubRounds,
    position_of,
    read_state,
    write_state,
)
from modelfsd.storage.scrubbing import Scrubber, Tour
from modelfsd.storage.upkeep import Upkeep
from tests.daemon.upkeep_parts import Kept, kept_cluster, make

ROUND = 1000.0
FAILS = "cannot be restored|fails its checksum|has a damaged copy"


@asynccontextmanager
async def scrubbed_cluster(directory: Path) -> AsyncIterator[Kept]:
    """Three nodes that restore what is bad."""
    async with kept_cluster(3, directory) as kept, trio.open_nursery() as nursery:
        for upkeep in kept.upkeep.values():
            nursery.start_soon(upkeep.restorer.run)
        yield kept
        nursery.cancel_scope.cancel()


async def tour_of(upkeep: Upkeep) -> Tour:
    tour = await upkeep.scrubber.start()
    await upkeep.scrubber.walk(tour)
    return tour


def on(kept: Kept, id: NodeId) -> list[ChunkId]:
    return [chunk for chunk, holders in kept.copies().items() if id in holders]


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
        assert len(os.listdir(root / "damaged")) == DAMAGED_FILES_MAX


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


# ---------------------------------------------------------------- pace


async def test_a_tour_keeps_below_its_rate(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with scrubbed_cluster(tmp_path) as kept:
        await make(kept.nodes[0], b"f", rng.randbytes(4 * MIB), replicas=3)
        upkeep = kept.upkeep[kept.cluster.ids[0]]
        tour = await upkeep.scrubber.start()
        started = trio.current_time()
        await upkeep.scrubber.walk(tour, 100 * KIB)
        assert trio.current_time() - started == pytest.approx(tour.bytes / (100 * KIB), rel=0.01)


@pytest.mark.parametrize("rate", [1, -1, "50MiB", None, 1.5])
async def test_a_rate_that_makes_no_sense_is_refused(tmp_path: Path, rate: object) -> None:
    async with scrubbed_cluster(tmp_path) as kept:
        service = ScrubService(
            "n1", kept.upkeep[kept.cluster.ids[0]].scrubber, rounds_of(kept, tmp_path / "s")
        )
        listener: Any = None
        with pytest.raises(UserError, match="is not a rate"):
            await service.scrub({"rate": rate}, listener)


def rounds_of(kept: Kept, path: Path) -> ScrubRounds:
    return ScrubRounds(kept.upkeep[kept.cluster.ids[0]].scrubber, path, ROUND)


async def test_a_round_looks_at_every_copy_once_and_evenly(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with scrubbed_cluster(tmp_path) as kept, trio.open_nursery() as nursery:
        await make(kept.nodes[0], b"f", rng.randbytes(4 * MIB), replicas=3)
        rounds, scrubber = (
            rounds_of(kept, tmp_path / "s"),
            kept.upkeep[kept.cluster.ids[0]].scrubber,
        )
        held = on(kept, kept.cluster.ids[0])
        nursery.start_soon(rounds.run)
        for part in range(1, 10):
            await trio.sleep(ROUND / 10)
            due = sum(position_of(chunk) < part / 10 for chunk in held)
            assert abs(scrubber.counters().chunks - due) <= 1
            assert rounds.state().position == pytest.approx(part / 10, abs=0.02)
        await trio.sleep(ROUND / 10 + 1)
        assert scrubber.counters().chunks == len(held)
        assert rounds.state().completed_at > 0
        assert rounds.state().position < 0.1
        await trio.sleep(ROUND)
        assert scrubber.counters().chunks == 2 * len(held)
        nursery.cancel_scope.cancel()


async def test_a_round_goes_on_where_the_daemon_was_stopped(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with scrubbed_cluster(tmp_path) as kept:
        await make(kept.nodes[0], b"f", rng.randbytes(4 * MIB), replicas=3)
        scrubber = kept.upkeep[kept.cluster.ids[0]].scrubber
        held = on(kept, kept.cluster.ids[0])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rounds_of(kept, tmp_path / "s").run)
            await trio.sleep(0.7 * ROUND)
            nursery.cancel_scope.cancel()
        seen = scrubber.counters().chunks
        await trio.sleep(3 * ROUND)  # down for long
        again = rounds_of(kept, tmp_path / "s")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(again.run)
            await trio.sleep(0.65 * ROUND)  # the file is 300 s old at most
            nursery.cancel_scope.cancel()
        assert again.state().completed_at > 0
        repeated = scrubber.counters().chunks - len(held)
        assert 0 <= repeated <= seen


async def test_a_tour_by_command_counts_as_a_round(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    async with scrubbed_cluster(tmp_path) as kept, trio.open_nursery() as nursery:
        rounds = rounds_of(kept, tmp_path / "s")
        nursery.start_soon(rounds.run)
        await trio.sleep(ROUND / 2)
        rounds.completed()
        await trio.sleep(ROUND / 4)
        assert rounds.state().position <= 0.26
        await trio.sleep(ROUND / 2)
        assert 0.7 < rounds.state().position <= 0.76
        nursery.cancel_scope.cancel()


async def test_without_a_period_nothing_is_done(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with scrubbed_cluster(tmp_path) as kept:
        await make(kept.nodes[0], b"f", rng.randbytes(MIB), replicas=3)
        scrubber = kept.upkeep[kept.cluster.ids[0]].scrubber
        await ScrubRounds(scrubber, tmp_path / "s", 0.0).run()
        assert scrubber.counters().chunks == 0


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"position": 2, "completed_at": 0}', '{"position": NaN}', "\x00" * 9000],
)
def test_a_state_file_that_makes_no_sense_is_no_state(text: str, tmp_path: Path) -> None:
    path = tmp_path / "scrub.json"
    assert read_state(path) == RoundsState()
    path.write_text(text)
    assert read_state(path) == RoundsState()
    write_state(path, RoundsState(0.25, 1e9))
    assert read_state(path) == RoundsState(0.25, 1e9)
    assert os.listdir(tmp_path) == ["scrub.json"]
    assert path.stat().st_mode & 0o777 == 0o600
