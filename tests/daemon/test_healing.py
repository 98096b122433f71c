"""Healing: copies become complete again after a node went, and go home when it is back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
import trio
import trio.testing

from modelfs import keys
from modelfs.chunk import describe
from modelfs.holdings import Holdings
from modelfs.ids import ChunkId, Epoch, NodeId
from modelfs.limits import KIB, MIB
from modelfs.placement import Member, make_map
from modelfs.ports import Holding, Put, Txn
from modelfs.testing.stores import MemoryChunkStore
from modelfsd.storage.sweeping import delete_rows
from tests.daemon.upkeep_parts import DOWN_OUT, GRACE, Kept, kept_cluster, make, needed_by


@pytest.fixture
def clock() -> trio.testing.MockClock:
    """Time stands still but when the test jumps."""
    return trio.testing.MockClock()


async def die(kept: Kept, index: int) -> None:
    kept.cluster.die(kept.cluster.ids[index])
    await kept.hear()


async def come_back(kept: Kept, index: int) -> None:
    id = kept.cluster.ids[index]
    kept.cluster.peers.down.discard(id)
    await kept.cluster.register(id)
    await kept.hear()


async def test_a_healthy_cluster_moves_nothing(
    tmp_path: Path, rng: Random, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(4, tmp_path) as kept:
        await make(kept.nodes[0], b"f", rng.randbytes(MIB))
        before = kept.copies()
        for _ in range(3):
            assert await kept.heal() == 0
            clock.jump(GRACE)
        assert kept.copies() == before
        assert all(upkeep.healer.next_round_at() == float("inf") for upkeep in kept.living)


async def test_a_node_that_is_out_is_replaced_and_gets_its_chunks_back(
    tmp_path: Path, rng: Random, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(4, tmp_path) as kept:
        data = rng.randbytes(2 * MIB)
        await make(kept.nodes[0], b"f", data)
        home = kept.copies()
        await die(kept, 2)
        assert await kept.heal() == 0
        clock.jump(DOWN_OUT - 1)
        assert await kept.heal() == 0  # a reboot moves no data
        assert all(
            upkeep.healer.next_round_at() == trio.current_time() + 1 for upkeep in kept.living
        )
        clock.jump(1)
        lost = sum(kept.cluster.ids[2] in holders for holders in home.values())
        assert await kept.heal() == lost > 0
        assert {len(holders) for holders in kept.copies().values()} == {2}
        assert await kept.heal() == 0
        await come_back(kept, 2)
        assert await kept.heal() == 0  # the surplus waits for a grace
        clock.jump(GRACE)
        assert await kept.heal() == lost
        assert kept.copies() == home
        assert await kept.heal() == 0
        assert await kept.nodes[3].read_file(b"f") == data


async def test_what_was_written_while_a_node_was_away_goes_to_it_at_once(
    tmp_path: Path, rng: Random, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(3, tmp_path) as kept:
        await die(kept, 1)
        data = rng.randbytes(2 * MIB)
        await make(kept.nodes[0], b"f", data)
        await come_back(kept, 1)
        assert await kept.heal() > 0
        assert {len(holders) for holders in kept.copies().values()} == {2, 3}
        await kept.heal()  # whoever looked before the copies came finds now that its own is surplus
        clock.jump(GRACE)
        await kept.heal()
        assert {len(holders) for holders in kept.copies().values()} == {2}
        for chunk, holders in kept.copies().items():
            placement = kept.nodes[0].mirror.latest_map
            assert placement is not None
            assert holders == set(placement.place(chunk, 2))


async def test_the_files_of_a_cluster_of_one_get_a_second_copy_when_it_grows(
    tmp_path: Path, rng: Random, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(2, tmp_path) as kept:
        one, _ = kept.cluster.ids
        await die(kept, 1)
        alone = make_map(Epoch(2), [Member(one, "a", 1.0, "")])
        put = Put(keys.placement_map(alone.epoch), alone.encode())
        await kept.cluster.etcd.commit(Txn((), (put, Put(keys.SEQ, b"test"))))
        await kept.hear()
        await make(kept.nodes[0], b"f", rng.randbytes(MIB))
        assert {len(holders) for holders in kept.copies().values()} == {1}
        assert await kept.heal() == 0
        both = make_map(Epoch(3), [Member(id, id[0], 1.0, "") for id in kept.cluster.ids])
        put = Put(keys.placement_map(both.epoch), both.encode())
        await kept.cluster.etcd.commit(Txn((), (put, Put(keys.SEQ, b"test"))))
        await come_back(kept, 1)
        assert await kept.heal() == len(kept.copies())
        assert {len(holders) for holders in kept.copies().values()} == {2}


async def test_a_lost_chunk_is_copied_again_and_garbage_is_not(
    tmp_path: Path, rng: Random, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(3, tmp_path) as kept:
        await make(kept.nodes[0], b"f", rng.randbytes(300 * KIB))
        await kept.nodes[0].write_file(b"f", rng.randbytes(300 * KIB))
        home, needed = kept.copies(), await needed_by(kept)
        for chunk, holders in home.items():
            kept.cluster.stores[min(holders)].lose(chunk)
        assert await kept.heal() == len(needed)
        copies = kept.copies()
        assert {chunk: copies[chunk] for chunk in needed} == {c: home[c] for c in needed}
        assert all(len(copies[chunk]) == 1 for chunk in set(home) - needed)


@pytest.mark.expected_logs("fails its checksum")
async def test_a_damaged_copy_is_not_passed_on(
    tmp_path: Path, rng: Random, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(3, tmp_path) as kept:
        data = rng.randbytes(200 * KIB)
        await make(kept.nodes[0], b"f", data, replicas=3)
        placement = kept.nodes[0].mirror.latest_map
        assert placement is not None
        for chunk in kept.copies():
            first, _, last = placement.place(chunk, 3)
            kept.cluster.stores[first].damage(chunk)
            kept.cluster.stores[last].lose(chunk)
        await kept.heal()
        for chunk, holders in kept.copies().items():
            last = placement.place(chunk, 3)[2]
            assert last in holders
            assert kept.cluster.stores[last].verify(chunk)


async def test_a_full_node_is_passed_over(
    tmp_path: Path, rng: Random, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(4, tmp_path) as kept:
        await make(kept.nodes[0], b"f", rng.randbytes(MIB))
        full = kept.cluster.ids[1]
        store = MemoryChunkStore(capacity_bytes=0)
        kept.cluster.peers.stores[full] = store  # its disk was replaced, by none
        kept.cluster.stores[full] = store
        await kept.heal()
        for chunk in await needed_by(kept):
            holders = kept.copies()[chunk]
            assert len(holders) == 2
            assert full not in holders
        assert await kept.heal() == 0


async def test_a_silent_node_delays_nothing_but_its_own_copies(
    tmp_path: Path, rng: Random, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(4, tmp_path) as kept:
        await make(kept.nodes[0], b"f", rng.randbytes(MIB))
        home = kept.copies()
        one, silent = kept.cluster.ids[:2]
        for chunk in [chunk for chunk, holders in home.items() if one in holders]:
            kept.cluster.stores[one].lose(chunk)
        kept.cluster.peers.down.add(silent)  # unreachable, though its heartbeat goes on
        rounds = [await upkeep.healer.round() for upkeep in kept.living]
        assert any(done.failures for done in rounds)
        copies = kept.copies()
        for chunk, holders in home.items():
            if one in holders and silent not in holders:
                assert copies[chunk] == holders


async def test_a_surplus_copy_is_kept_while_a_holder_cannot_confirm(
    tmp_path: Path, rng: Random, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(3, tmp_path) as kept:
        await make(kept.nodes[0], b"f", b"x" * 5000, replicas=1)
        ref, table = describe(b"x" * 5000)
        (home,) = kept.copies()[ref.id]
        spare = next(id for id in kept.cluster.ids if id != home)
        kept.cluster.stores[spare].put(ref, table, b"x" * 5000, Holding.OWNED)
        healer = kept.upkeep[spare].healer
        await healer.round()
        clock.jump(GRACE)
        kept.cluster.peers.down.add(home)
        done = await healer.round()
        assert done.handed_back_chunks == 0
        kept.cluster.peers.down.discard(home)
        await healer.round()
        clock.jump(GRACE)
        assert (await healer.round()).handed_back_chunks == 1
        assert kept.copies()[ref.id] == {home}


async def test_a_copy_that_somebody_has_come_to_rely_on_is_not_deleted(
    tmp_path: Path, clock: trio.testing.MockClock
) -> None:
    """Why two nodes never delete their copies because of each other: confirming renews."""
    async with kept_cluster(2, tmp_path) as kept:
        data = b"x" * 5000
        await make(kept.nodes[0], b"f", data, replicas=1)
        ref, table = describe(data)
        (home,) = kept.copies()[ref.id]
        spare = next(id for id in kept.cluster.ids if id != home)
        stores = kept.cluster.stores
        stores[spare].put(ref, table, data, Holding.OWNED)
        seen = Holdings.of(stores[home].owned())
        await kept.upkeep[spare].healer.round()
        clock.jump(GRACE)
        assert (await kept.upkeep[spare].healer.round()).handed_back_chunks == 1
        row = next(row for row in range(len(seen)) if seen.chunk(row) == ref.id)
        assert delete_rows(stores[home], seen, np.array([row])) == (0, 0)
        assert kept.copies()[ref.id] == {home}


async def test_a_holder_that_restarts_after_its_answer_has_confirmed_nothing(
    tmp_path: Path, clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name that it has answered for was not safe yet, and may be gone."""
    async with kept_cluster(2, tmp_path) as kept:
        data = b"x" * 5000
        await make(kept.nodes[0], b"f", data, replicas=1)
        ref, table = describe(data)
        (home,) = kept.copies()[ref.id]
        spare = next(id for id in kept.cluster.ids if id != home)
        kept.cluster.stores[spare].put(ref, table, data, Holding.OWNED)
        healer, peers = kept.upkeep[spare].healer, kept.cluster.peers
        await healer.round()
        clock.jump(GRACE)
        has = peers.has

        async def has_and_loses_power(
            node: NodeId, chunks: Sequence[ChunkId], renew: bool
        ) -> list[bool]:
            answers = await has(node, chunks, renew)
            if renew:
                peers.restart(node)
                kept.cluster.stores[node].lose(ref.id)
            return answers

        monkeypatch.setattr(peers, "has", has_and_loses_power)
        assert (await healer.round()).handed_back_chunks == 0
        assert kept.copies()[ref.id] == {spare}


async def test_under_a_new_map_a_surplus_copy_waits_anew(
    tmp_path: Path, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(2, tmp_path) as kept:
        data = b"x" * 5000
        await make(kept.nodes[0], b"f", data, replicas=1)
        ref, table = describe(data)
        (home,) = kept.copies()[ref.id]
        spare = next(id for id in kept.cluster.ids if id != home)
        kept.cluster.stores[spare].put(ref, table, data, Holding.OWNED)
        healer = kept.upkeep[spare].healer
        await healer.round()
        clock.jump(GRACE)
        newer = make_map(Epoch(2), [Member(id, id[0], 1.0, "") for id in kept.cluster.ids])
        put = Put(keys.placement_map(newer.epoch), newer.encode())
        await kept.cluster.etcd.commit(Txn((), (put, Put(keys.SEQ, b"test"))))
        await kept.hear()
        assert (await healer.round()).handed_back_chunks == 0
        assert healer.next_round_at() == trio.current_time() + GRACE
        clock.jump(GRACE)
        assert (await healer.round()).handed_back_chunks == 1
