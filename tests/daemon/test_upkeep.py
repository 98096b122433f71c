"""Upkeep: space is given back, what is open or being written stays, copies are kept complete.

The loops' steps are called by hand, on a clock that only the test moves.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing

from modelfs import keys
from modelfs.chunk import describe
from modelfs.errors import MetadataUnavailable
from modelfs.ids import ROOT_INODE, ChunkId
from modelfs.inode import Pin
from modelfs.limits import KIB, MIB
from modelfs.ports import Delete, Holding, Txn
from tests.daemon.upkeep_parts import GRACE, kept_cluster, make, needed_by

UNREADABLE = "nothing can be reclaimed now"


@pytest.fixture
def clock() -> trio.testing.MockClock:
    """Time stands still but when the test jumps."""
    return trio.testing.MockClock()


# ---------------------------------------------------------------- reclaim


async def test_what_nobody_needs_goes_after_a_grace_and_the_rest_stays(
    tmp_path: Path, rng: Random, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(3, tmp_path) as kept:
        one, two, _ = kept.nodes
        old, new, other = (rng.randbytes(size) for size in (2 * MIB, MIB, 300 * KIB))
        await make(one, b"f", old)
        await make(one, b"other", other)
        both = kept.copies()
        await one.write_file(b"f", new)
        stale = set(both) - await needed_by(kept)
        clock.jump(100 * GRACE)  # old as they are, they have only just become unneeded
        assert await kept.sweep() == 0
        assert await kept.sweep_for(clock, GRACE - 1) == 0
        clock.jump(1.1)  # a sixth of a grace is no round number
        assert await kept.sweep() == 2 * len(stale)
        assert set(kept.copies()) == await needed_by(kept)
        assert await two.read_file(b"f") == new
        assert await two.read_file(b"other") == other
        assert await kept.sweep_all(clock) == 0


async def test_a_chunk_that_is_put_again_waits_anew(
    tmp_path: Path, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(1, tmp_path) as kept:
        (node,) = kept.nodes
        ref, table = describe(b"garbage")
        node.store.put(ref, table, b"garbage", Holding.OWNED)
        assert await kept.sweep() == 0
        for _ in range(3):
            assert await kept.sweep_for(clock, GRACE - 1) == 0
            assert node.store.has([ref.id], renew=True) == [True]
            assert await kept.sweep() == 0
        assert await kept.sweep_for(clock, GRACE) == 1


@pytest.mark.expected_logs(
    "the watch of the namespace broke|etcd is out of reach|could not be given back"
)
@pytest.mark.parametrize("knows", [True, False])
async def test_after_a_cut_or_a_pause_a_new_grace_begins(
    knows: bool, tmp_path: Path, clock: trio.testing.MockClock
) -> None:
    """A writer whose renewals did not come through meanwhile has the time to make them."""
    async with kept_cluster(1, tmp_path) as kept:
        (node,) = kept.nodes
        ref, table = describe(b"of a live writer")
        node.store.put(ref, table, b"of a live writer", Holding.OWNED)
        assert await kept.sweep() == 0
        kept.cluster.etcd.unavailable = knows
        clock.jump(2 * GRACE)
        if knows:
            with pytest.raises(MetadataUnavailable):
                await kept.sweep()
            kept.cluster.etcd.unavailable = False
            while not node.feed.is_attached:
                clock.jump(1)
                await trio.testing.wait_all_tasks_blocked()
        assert await kept.sweep() == 0
        assert node.store.has([ref.id], renew=True) == [True]
        assert await kept.sweep_all(clock) == 1


@pytest.mark.expected_logs(UNREADABLE)
async def test_while_a_manifest_cannot_be_read_nothing_goes(
    tmp_path: Path, rng: Random, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(2, tmp_path) as kept:
        one, two = kept.nodes
        await make(one, b"lost", rng.randbytes(MIB))
        await make(one, b"f", rng.randbytes(MIB))
        await one.write_file(b"f", b"")
        record = (await one.look_up(b"lost")).record
        assert record.manifest is not None
        for node in kept.nodes:
            node.store.lose(ChunkId(record.manifest.id))
        before = kept.copies()
        assert await kept.sweep_all(clock) == 0
        assert await kept.sweep_all(clock) == 0
        assert kept.copies() == before
        await two.write_file(b"lost", b"")
        assert await kept.sweep_all(clock) > 0
        assert not kept.copies()


@pytest.mark.expected_logs(
    "the watch of the namespace broke|etcd is out of reach|could not be given back"
)
async def test_without_etcd_nothing_goes(
    tmp_path: Path, rng: Random, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(2, tmp_path) as kept:
        await make(kept.nodes[0], b"f", rng.randbytes(MIB))
        await kept.nodes[0].write_file(b"f", b"")
        assert await kept.sweep() == 0
        kept.cluster.etcd.unavailable = True
        clock.jump(GRACE)
        with pytest.raises(MetadataUnavailable):
            await kept.sweep()
        with pytest.raises(MetadataUnavailable):
            await kept.heal()
        assert kept.copies()


@pytest.mark.expected_logs(UNREADABLE)
@pytest.mark.parametrize("key", [keys.CLUSTER, keys.inode(ROOT_INODE)])
async def test_a_namespace_that_was_wiped_is_no_order_to_delete(
    key: bytes, tmp_path: Path, rng: Random, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(2, tmp_path) as kept:
        await make(kept.nodes[0], b"f", rng.randbytes(MIB))
        before = kept.copies()
        ino = (await kept.nodes[0].look_up(b"f")).ino
        await kept.cluster.etcd.commit(Txn((), (Delete(key), Delete(keys.inode(ino)))))
        await kept.hear()
        assert await kept.sweep_all(clock) == 0
        assert await kept.sweep_all(clock) == 0
        assert kept.copies() == before


async def test_a_retained_version_stays(
    tmp_path: Path, rng: Random, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(3, tmp_path) as kept:
        one = kept.nodes[0]
        data = rng.randbytes(MIB)
        await make(one, b"f", data)
        old = (await one.look_up(b"f")).record
        assert old.manifest is not None
        kept.retained = [Pin(old.manifest, old.replicas)]
        await one.write_file(b"f", rng.randbytes(MIB))
        assert await kept.sweep_all(clock) == 0
        assert await one.contents.read(old, 0, old.size) == data
        kept.retained = []
        assert await kept.sweep_all(clock) > 0


# ---------------------------------------------------------------- pins


async def test_an_open_version_stays_until_it_is_closed(
    tmp_path: Path, rng: Random, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(3, tmp_path) as kept:
        one, reader, _ = kept.nodes
        old, new = rng.randbytes(2 * MIB), rng.randbytes(MIB)
        await make(one, b"f", old)
        inode = await reader.look_up(b"f")
        inode.handles += 1
        await one.write_file(b"f", new)
        await kept.hear()
        assert not inode.is_current
        pins = kept.upkeep[reader.id].pins
        await pins.reconcile()
        await kept.hear()
        assert list(one.mirror.pins) == [reader.id]
        for _ in range(3):
            assert await kept.sweep_all(clock) == 0
        assert bytes(await reader.contents.read(inode.record, 0, len(old))) == old
        inode.handles -= 1
        reader.inodes.drop_if_unused(inode)
        await pins.reconcile()
        await kept.hear()
        assert not one.mirror.pins
        assert await kept.sweep_all(clock) > 0
        assert set(kept.copies()) == await needed_by(kept)


async def test_a_pin_ends_with_its_node_and_is_put_again_under_a_new_lease(
    tmp_path: Path, rng: Random, clock: trio.testing.MockClock
) -> None:
    async with kept_cluster(3, tmp_path) as kept:
        one, reader, _ = kept.nodes
        await make(one, b"f", rng.randbytes(MIB))
        inode = await reader.look_up(b"f")
        inode.handles += 1
        await one.write_file(b"f", b"")
        await kept.hear()
        pins = kept.upkeep[reader.id].pins
        await pins.reconcile()
        kept.cluster.etcd.expire(kept.cluster.leases[reader.id])
        await kept.hear()
        assert not one.mirror.pins
        with pytest.raises(MetadataUnavailable):
            await pins.reconcile()  # the lease has lapsed, and no other one is known yet
        assert await kept.sweep() == 0  # the grace has begun
        await kept.cluster.register(reader.id)
        reader.leases.etcd_lease = kept.cluster.leases[reader.id]
        await pins.reconcile()
        await kept.hear()
        assert list(one.mirror.pins) == [reader.id]
        assert await kept.sweep_all(clock) == 0


async def test_the_task_pins_by_itself(tmp_path: Path, rng: Random) -> None:
    async with kept_cluster(2, tmp_path) as kept, trio.open_nursery() as nursery:
        one, reader = kept.nodes
        await make(one, b"f", rng.randbytes(MIB))
        nursery.start_soon(kept.upkeep[reader.id].pins.run)
        inode = await reader.look_up(b"f")
        inode.handles += 1
        await one.write_file(b"f", b"")
        while not one.mirror.pins:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
