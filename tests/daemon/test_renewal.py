"""Renewal: what is being written, and what was lost, stays until it is committed or recovered."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from random import Random

import msgspec
import pytest
import trio
import trio.testing

from modelfs import changes, keys
from modelfs.ids import ROOT_INODE
from modelfs.limits import KIB, MIB
from modelfs.ports import Put, Txn
from tests.daemon.upkeep_parts import GRACE, kept_cluster, make


@pytest.fixture
def clock(inline_threads: None) -> trio.testing.MockClock:
    """Time stands still but when the test jumps."""
    return trio.testing.MockClock()


@pytest.mark.parametrize("renews", [True, False])
async def test_a_slow_writer_keeps_what_it_wrote_by_renewing_it(
    renews: bool, tmp_path: Path, rng: Random, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(3, tmp_path) as kept:
        writer, reader, _ = kept.nodes
        await writer.make_file(b"f")
        session = await writer.open(b"f")
        data = rng.randbytes(512 * KIB)
        await session.write(0, data)
        while len(session.copy.sealed) < len(data) // (64 * KIB):
            await trio.lowlevel.checkpoint()
        freed = 0
        for _ in range(12):
            clock.jump(GRACE / 3)
            if renews:
                await kept.upkeep[writer.id].renewal.renew_all()
            freed += await kept.sweep()
        assert bool(freed) is not renews
        if renews:
            await session.flush()
            await session.release()
            assert await reader.read_file(b"f") == data
        else:
            session.copy.is_dirty = False  # its bytes are gone, as this was to show
            await session.release()


@pytest.mark.expected_logs("lost a chunk of a file being written")
async def test_a_chunk_that_a_node_lost_before_the_commit_is_put_again(
    tmp_path: Path, rng: Random, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(2, tmp_path) as kept:
        writer, other = kept.nodes
        await writer.make_file(b"f")
        session = await writer.open(b"f")
        await session.write(0, rng.randbytes(64 * KIB))
        while not session.copy.sealed:
            await trio.lowlevel.checkpoint()
        (chunk,) = kept.copies()
        other.store.lose(chunk)
        await kept.upkeep[writer.id].renewal.renew_all()
        assert kept.copies() == {chunk: {writer.id, other.id}}
        await session.flush()
        await session.release()


async def test_a_commit_makes_sure_of_nodes_that_heard_no_renewals(
    tmp_path: Path, rng: Random, clock: trio.testing.MockClock
) -> None:
    """They may have reclaimed what they took; that they did not restart says nothing of it."""
    async with kept_cluster(3, tmp_path) as kept:
        writer = kept.nodes[0]
        await writer.make_file(b"f")
        session = await writer.open(b"f")
        await session.write(0, rng.randbytes(64 * KIB))
        while not session.copy.sealed:
            await trio.lowlevel.checkpoint()
        ((chunk, holders),) = kept.copies().items()
        other = next(id for id in holders if id != writer.id)
        kept.cluster.peers.down.add(other)
        await kept.upkeep[writer.id].renewal.renew_all()
        kept.cluster.stores[other].lose(chunk)
        kept.cluster.peers.down.discard(other)
        await session.flush()
        await session.release()
        assert len(kept.copies()[chunk]) == 2


async def test_a_silent_node_is_waited_for_once_in_a_round_of_renewals(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    """However many files are being written: the other nodes' grace goes on meanwhile."""
    async with kept_cluster(2, tmp_path) as kept:
        writer, other = kept.nodes
        sessions = []
        for name in (b"a", b"b", b"c", b"d"):
            await writer.make_file(name)
            session = await writer.open(name)
            await session.write(0, rng.randbytes(64 * KIB))
            while not session.copy.sealed:
                await trio.lowlevel.checkpoint()
            sessions.append(session)
        kept.cluster.peers.silent.add(other.id)
        begun = trio.current_time()
        await kept.upkeep[writer.id].renewal.renew_all()
        assert trio.current_time() - begun == pytest.approx(10.0)
        kept.cluster.peers.silent.discard(other.id)
        await kept.upkeep[writer.id].renewal.renew_all()
        assert kept.upkeep[writer.id].renewal.renewed == 2 * len(sessions)
        for session in sessions:
            await session.flush()
            await session.release()


@pytest.mark.expected_logs("cannot be committed, they are kept", "closed with writes", "not given")
async def test_what_is_kept_for_recovery_is_renewed_and_its_base_pinned(
    tmp_path: Path, rng: Random, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(2, tmp_path) as kept:
        writer, other = kept.nodes
        await make(writer, b"f", rng.randbytes(MIB))
        session = await writer.open(b"f")
        await session.write(0, rng.randbytes(64 * KIB))
        while not session.copy.sealed:
            await trio.lowlevel.checkpoint()
        held = kept.copies()
        writer.leases.lose_all("as the test asked")
        await session.release()
        assert list((writer.state_dir / "lost").iterdir())
        await other.namespace.change(
            lambda mirror: changes.remove(mirror, ROOT_INODE, b"f", False, time.time_ns())
        )
        for _ in range(4):
            await kept.upkeep[writer.id].renewal.renew_all()
            await kept.upkeep[writer.id].pins.reconcile()
            await kept.hear()
            assert await kept.sweep() == 0
            assert await kept.sweep_for(clock, GRACE * 0.9) == 0
        assert kept.copies() == held
        shutil.rmtree(next((writer.state_dir / "lost").iterdir()))
        await kept.upkeep[writer.id].renewal.renew_all()
        await kept.upkeep[writer.id].pins.reconcile()
        await kept.hear()
        await kept.sweep_all(clock)
        assert not kept.copies()


@pytest.mark.expected_logs("lost writes cannot be looked through")
async def test_renewals_go_on_if_lost_writes_cannot_be_looked_through(
    tmp_path: Path, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(1, tmp_path) as kept, trio.open_nursery() as nursery:
        (node,) = kept.nodes
        (node.state_dir / "lost").rmdir()
        (node.state_dir / "lost").write_text("not a directory")
        renewal = kept.upkeep[node.id].renewal
        nursery.start_soon(renewal.run)
        for _ in range(2):
            await trio.testing.wait_all_tasks_blocked(0.01)
            clock.jump(GRACE / 3)
        nursery.cancel_scope.cancel()


async def test_renewals_follow_the_shortest_grace_of_all_nodes(
    tmp_path: Path, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(2, tmp_path) as kept:
        one, two = kept.nodes
        renewal = kept.upkeep[one.id].renewal
        assert renewal.interval_seconds() == GRACE / 3
        record = one.mirror.nodes[two.id]
        hasty = msgspec.structs.replace(record, reclaim_grace_seconds=60.0)
        put = Put(keys.node(two.id), msgspec.msgpack.encode(hasty))
        await kept.cluster.etcd.commit(Txn((), (put,)))
        await kept.hear()
        assert renewal.interval_seconds() == 20.0


async def test_a_node_with_a_shorter_grace_is_not_kept_waiting_for_the_next_round(
    tmp_path: Path, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(2, tmp_path) as kept, trio.open_nursery() as nursery:
        one, two = kept.nodes
        await one.make_file(b"f")
        session = await one.open(b"f")
        await session.write(0, bytes(range(256)) * 256)
        while not session.copy.sealed:
            await trio.lowlevel.checkpoint()
        nursery.start_soon(kept.upkeep[one.id].renewal.run)
        await trio.testing.wait_all_tasks_blocked(0.01)
        renewed = list(two.store.owned())
        hasty = msgspec.structs.replace(one.mirror.nodes[two.id], reclaim_grace_seconds=60.0)
        put = Put(keys.node(two.id), msgspec.msgpack.encode(hasty))
        await kept.cluster.etcd.commit(Txn((), (put,)))
        await kept.hear()
        clock.jump(20.0)
        for _ in range(100):
            await trio.testing.wait_all_tasks_blocked(0.01)
            if list(two.store.owned()) != renewed:
                break
        assert list(two.store.owned()) != renewed
        await session.release()
        nursery.cancel_scope.cancel()
