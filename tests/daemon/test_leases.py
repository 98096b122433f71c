"""Leases: one writer at a time, who waits, who is told of a loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from modelfs.errors import MetadataUnavailable, MetadataUncertain, WriterElsewhere
from modelfs.ids import InodeNumber, NodeId
from modelfs.ports import Txn, TxnResult
from modelfs.testing.metadata import MemoryMetadataStore
from modelfsd.metadata.leases import (
    DROPPED_MAX,
    LINGER_SECONDS,
    RIDE_SECONDS,
    WAITERS_MAX,
    Leases,
)
from tests.daemon.node_parts import Node, cluster_of


class Holder:
    """Someone who holds a lease and is told when it is lost."""

    def __init__(self, node: Node, ino: InodeNumber) -> None:
        self.node, self.ino = node, ino
        self.losses: list[str] = []

    async def take(self) -> None:
        self.token = await self.node.leases.take(self.ino, self.losses.append)

    async def drop(self) -> None:
        await self.node.leases.drop(self.ino, self.token)


def holder_of(node: Node, ino: InodeNumber) -> NodeId | None:
    lease = node.mirror.lease(ino)
    return lease[0] if lease else None


async def test_a_second_writer_waits_for_the_first(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        ino = await one.make_file(b"f")
        first, second = Holder(one, ino), Holder(two, ino)
        await first.take()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(second.take)
            await trio.sleep(5)
            assert holder_of(one, ino) == one.id
            await first.drop()
            await trio.sleep(0.01)
            assert holder_of(two, ino) == two.id
        assert second.token > first.token and not first.losses


async def test_it_gives_up_after_the_lock_wait_and_leaves_no_lease_behind(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        ino = await one.make_file(b"f")
        first = Holder(one, ino)
        await first.take()
        begun = trio.current_time()
        with pytest.raises(WriterElsewhere):
            await Holder(two, ino).take()
        assert trio.current_time() - begun == pytest.approx(two.lock_wait_seconds)
        await first.drop()
        await trio.sleep(1)
        assert holder_of(two, ino) is None


@pytest.mark.parametrize("moment", range(12))
async def test_a_release_at_the_last_moment_never_orphans_the_lease(
    tmp_path: Path, virtual_time: trio.testing.MockClock, moment: int
) -> None:
    """Whoever takes the lease as its wait ends either has it, or nobody does."""
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        ino = await one.make_file(b"f")
        first, second = Holder(one, ino), Holder(two, ino)
        await first.take()
        outcome: list[bool] = []

        async def wait() -> None:
            try:
                await second.take()
                outcome.append(True)
            except WriterElsewhere:
                outcome.append(False)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(two.lock_wait_seconds)  # both wake up at the same instant
            for _ in range(moment):
                await trio.lowlevel.checkpoint()
            await first.drop()
        await trio.sleep(60)
        assert (holder_of(two, ino) == two.id) == outcome[0]


async def test_a_cancelled_waiter_does_not_stop_the_others(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    async with cluster_of(3, tmp_path) as cluster:
        one, two, three = cluster.nodes
        ino = await one.make_file(b"f")
        first, second, third = Holder(one, ino), Holder(two, ino), Holder(three, ino)
        await first.take()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(third.take)
            with trio.move_on_after(3):
                await second.take()
            await first.drop()
        assert holder_of(three, ino) == three.id


async def test_a_lapsed_lease_is_a_loss_and_only_for_its_holder(tmp_path: Path) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        here, there = Holder(one, await one.make_file(b"f")), Holder(two, await two.make_file(b"g"))
        await here.take()
        await there.take()
        await cluster.lapse(cluster.leases[one.id])
        assert len(here.losses) == 1 and not there.losses
        one.leases.lose_all("again")
        assert len(here.losses) == 1
        # The next holder is not taken for the one that lost it.
        again = Holder(two, here.ino)
        await again.take()
        await here.drop()
        assert holder_of(two, here.ino) == two.id


async def test_a_reservation_keeps_others_away_for_a_while(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        ino = await one.make_file(b"f")
        for comes_back in (True, False):
            first, second = Holder(one, ino), Holder(two, ino)
            await first.take()
            one.leases.reserve(ino, first.token, 2.0)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(second.take)
                await trio.sleep(1)
                assert holder_of(one, ino) == one.id
                if comes_back:
                    again = Holder(one, ino)
                    await again.take()
                    assert again.token == first.token
                    await trio.sleep(10)
                    assert holder_of(one, ino) == one.id
                    await again.drop()
                await trio.sleep(1.5)
                assert holder_of(one, ino) == two.id
            await second.drop()


async def test_waiters_are_few(tmp_path: Path, virtual_time: trio.testing.MockClock) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        ino = await one.make_file(b"f")
        await Holder(one, ino).take()
        refused: list[float] = []

        async def take(leases: Leases) -> None:
            try:
                await leases.take(ino, lambda reason: None)
            except WriterElsewhere:
                refused.append(trio.current_time())

        begun = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(WAITERS_MAX + 5):
                nursery.start_soon(take, two.leases)
        at_once = [at for at in refused if at - begun < 1]
        assert len(at_once) == 5 and len(refused) == WAITERS_MAX + 5


@pytest.mark.expected_logs(
    "could not be given back", "watch of the namespace broke", "out of reach"
)
async def test_a_lease_that_could_not_be_given_back_is_given_back_later(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        ino = await one.make_file(b"f")
        first = Holder(one, ino)
        await first.take()
        cluster.etcd.unavailable = True
        await first.drop()
        await trio.sleep(60)
        cluster.etcd.unavailable = False
        await trio.sleep(1)
        second = Holder(two, ino)
        await second.take()
        await trio.sleep(60)
        assert holder_of(one, ino) == two.id and not second.losses


@pytest.mark.expected_logs("watch of the namespace broke", "out of reach", "did not say whether")
async def test_a_lease_that_was_taken_without_an_answer_keeps_nobody_away(
    tmp_path: Path, virtual_time: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        ino = await one.make_file(b"f")
        commit = MemoryMetadataStore.commit

        async def vanish(store: MemoryMetadataStore, txn: Txn) -> TxnResult:
            await commit(store, txn)
            store.unavailable = True
            raise MetadataUncertain("lost")

        with monkeypatch.context() as patch:
            patch.setattr(MemoryMetadataStore, "commit", vanish)
            with pytest.raises(MetadataUncertain):
                await Holder(one, ino).take()
        cluster.etcd.unavailable = False
        await trio.sleep(1)
        await Holder(two, ino).take()
        assert holder_of(two, ino) == two.id


async def test_a_late_drop_does_not_touch_the_next_holder(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        first, second = Holder(node, await node.make_file(b"f")), Holder(node, InodeNumber(0))
        second.ino = first.ino
        await first.take()
        await cluster.lapse(cluster.leases[node.id])
        node.leases.etcd_lease = await cluster.etcd.grant(10)
        await second.take()
        await first.drop()
        await cluster.lapse(node.leases.etcd_lease)
        assert second.losses


async def test_what_lingers_is_given_back_together(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        holders = [Holder(one, await one.make_file(b"%d" % n)) for n in range(DROPPED_MAX + 5)]
        for holder in holders:
            await holder.take()
        before = one.namespace.transactions
        for holder in holders:
            one.leases.linger(holder.ino, holder.token)
        again = Holder(one, holders[3].ino)
        await again.take()  # at once, and without a transaction
        assert again.token == holders[3].token and one.namespace.transactions == before
        await trio.sleep(1)
        assert one.namespace.transactions == before + 2
        await two.feed.fresh()
        kept = {ino for holder in holders if holder_of(two, ino := holder.ino)}
        assert kept == {again.ino}


@pytest.mark.expected_logs(
    "could not be given back", "watch of the namespace broke", "out of reach"
)
@pytest.mark.parametrize("how", ["linger", "reserve"])
async def test_a_lease_that_was_kept_is_nobodys_while_etcd_is_out_of_reach(
    tmp_path: Path, virtual_time: trio.testing.MockClock, how: str
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        holder = Holder(one, await one.make_file(b"file"))
        await holder.take()
        if how == "linger":
            one.leases.linger(holder.ino, holder.token)
        else:
            one.leases.reserve(holder.ino, holder.token, 2.0)
        cluster.etcd.unavailable = True
        one.feed.detach()
        with pytest.raises(MetadataUnavailable):
            await Holder(one, holder.ino).take()
        cluster.etcd.unavailable = False
        await trio.sleep(60)
        assert holder_of(two, holder.ino) is None


async def test_a_lease_that_waits_for_company_on_its_way_back_is_had_again_at_once(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (one,) = cluster.nodes
        holder = Holder(one, await one.make_file(b"file"))
        await holder.take()
        one.leases.linger(holder.ino, holder.token)
        await trio.sleep(1.25 * LINGER_SECONDS)
        assert one.leases.is_ours(holder.ino)  # nobody has taken it along yet
        started = trio.current_time()
        again = Holder(one, holder.ino)
        await again.take()
        assert trio.current_time() - started < RIDE_SECONDS / 2
        assert again.token != holder.token
