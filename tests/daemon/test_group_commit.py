"""Group commit: who shares a transaction, and who waits for whom. The clock is virtual."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from modelfs.errors import MetadataOutOfReach, MetadataUnavailable
from modelfs.ids import Revision
from modelfs.limits import ETCD_REQUEST_SECONDS, XATTRS_BYTES_MAX
from modelfs.ports import Compare, Put, Target, Txn, TxnResult
from modelfs.testing.metadata import MemoryMetadataStore
from modelfsd.metadata.group_commit import COMPANY_SECONDS_MAX, GroupCommit

TRANSACTION_SECONDS = 0.002


class SlowStore(MemoryMetadataStore):
    """Takes as long as a real etcd."""

    async def commit(self, txn: Txn) -> TxnResult:
        await trio.sleep(TRANSACTION_SECONDS)
        return await super().commit(txn)


async def work(group: GroupCommit, name: str, rounds: int, pause_seconds: float) -> None:
    """A process: one change after the other, with something else between them."""
    for number in range(rounds):
        key = f"{name}/{number}".encode()
        result = await group.commit(Txn((), (Put(key, b""),)), f"node:run:{name}-{number}")
        assert result.succeeded
        await trio.sleep(pause_seconds)


async def test_those_who_come_back_together_share(virtual_time: trio.testing.MockClock) -> None:
    store = SlowStore()
    async with trio.open_nursery() as nursery:
        group = GroupCommit(store, nursery.start_soon)
        async with trio.open_nursery() as processes:
            for index in range(8):
                # None is back before the one that was the first to be sent is.
                pause_seconds = TRANSACTION_SECONDS * (0.5 + index / 16)
                processes.start_soon(work, group, f"p{index}", 20, pause_seconds)
    assert group.requests <= 20 + 5


async def test_who_is_alone_never_waits(virtual_time: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        group = GroupCommit(SlowStore(), nursery.start_soon)
        started = trio.current_time()
        await work(group, "alone", 50, 0)
        spent = trio.current_time() - started
    assert group.requests == 50
    assert abs(spent - 50 * TRANSACTION_SECONDS) < TRANSACTION_SECONDS / 2


async def test_who_is_left_alone_soon_waits_no_more(virtual_time: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        group = GroupCommit(SlowStore(), nursery.start_soon)
        async with trio.open_nursery() as processes:
            for index in range(16):
                processes.start_soon(work, group, f"p{index}", 2, TRANSACTION_SECONDS)
        started = trio.current_time()
        await work(group, "alone", 50, 0)
        waited = trio.current_time() - started - 50 * TRANSACTION_SECONDS
    assert waited < 7 * min(TRANSACTION_SECONDS, COMPANY_SECONDS_MAX)


def put(name: str) -> Txn:
    return Txn((), (Put(name.encode(), b""),))


async def test_what_has_patience_rides_along(virtual_time: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        group = GroupCommit(SlowStore(), nursery.start_soon)
        for number in range(20):
            nursery.start_soon(group.commit, put(f"rider-{number}"), f"node:run:r{number}", 0.03)
            await work(group, f"worker-{number}", 1, 0.01)
    assert group.requests <= 21  # the last may find nobody


async def test_patience_ends_and_what_nobody_takes_along_is_sent_alone(
    virtual_time: trio.testing.MockClock,
) -> None:
    store = SlowStore()
    async with trio.open_nursery() as nursery:
        group = GroupCommit(store, nursery.start_soon)
        started = trio.current_time()
        result = await group.commit(put("rider"), "node:run:r", 0.03)
        assert result.succeeded
        assert trio.current_time() - started == pytest.approx(0.03 + TRANSACTION_SECONDS)
        nursery.start_soon(group.commit, put("another"), "node:run:a", 3600.0)
        await trio.testing.wait_all_tasks_blocked()
        group.hurry()
    assert trio.current_time() - started < 1
    assert await store.get(b"another") is not None


async def test_a_rider_that_is_cancelled_is_not_sent(virtual_time: trio.testing.MockClock) -> None:
    store = SlowStore()
    async with trio.open_nursery() as nursery:
        group = GroupCommit(store, nursery.start_soon)
        with trio.move_on_after(0.01):
            await group.commit(put("rider"), "node:run:r", 0.03)
        await work(group, "worker", 1, 0)
    assert await store.get(b"rider") is None
    assert group.requests == 1


async def test_a_rider_that_clashes_stays_behind(virtual_time: trio.testing.MockClock) -> None:
    store = SlowStore()
    async with trio.open_nursery() as nursery:
        group = GroupCommit(store, nursery.start_soon)
        nursery.start_soon(group.commit, put("worker/0"), "node:run:r", 0.03)
        await trio.testing.wait_all_tasks_blocked()
        await work(group, "worker", 1, 0)
        assert group.requests == 1
    assert group.requests == 2


async def test_what_etcd_refuses_of_one_is_not_refused_to_those_who_shared_it(
    virtual_time: trio.testing.MockClock,
) -> None:
    store = SlowStore()
    async with trio.open_nursery() as nursery:
        group = GroupCommit(store, nursery.start_soon)
        refused: list[MetadataUnavailable] = []

        async def put_under_a_lapsed_lease() -> None:
            try:
                await group.commit(Txn((), (Put(b"lapsed", b"", 4711),)), "node:run:lapsed")
            except MetadataUnavailable as error:
                refused.append(error)

        async with trio.open_nursery() as processes:
            processes.start_soon(work, group, "first", 1, 0)
            await trio.testing.wait_all_tasks_blocked()
            processes.start_soon(put_under_a_lapsed_lease)
            processes.start_soon(work, group, "beside", 1, 0)
        assert len(refused) == 1
    assert await store.get(b"beside/0") is not None and await store.get(b"lapsed") is None


async def test_large_changes_at_one_time_do_not_exceed_a_request(
    virtual_time: trio.testing.MockClock,
) -> None:
    store = SlowStore()
    async with trio.open_nursery() as nursery:
        group = GroupCommit(store, nursery.start_soon)
        for index in range(24):
            txn = Txn((), (Put(b"%d" % index, bytes(XATTRS_BYTES_MAX)),))
            nursery.start_soon(group.commit, txn, f"node:run:{index}")
    assert len((await store.load(b""))[1]) == 24 + 1
    assert group.requests <= 8


class DistantStore(SlowStore):
    """While out of reach, it says so after as long as a request may take."""

    async def commit(self, txn: Txn) -> TxnResult:
        if self.unavailable:
            await trio.sleep(ETCD_REQUEST_SECONDS)
        return await super().commit(txn)


@pytest.mark.parametrize("goes", ["before", "after a merged one has failed"])
async def test_nobody_waits_for_the_requests_of_others_to_a_distant_etcd(
    virtual_time: trio.testing.MockClock, goes: str
) -> None:
    store = DistantStore()
    outcomes: list[str] = []
    async with trio.open_nursery() as nursery:
        group = GroupCommit(store, nursery.start_soon)
        await work(group, "taken", 1, 0)

        async def touch(number: int) -> None:
            """Merged with others, or not, and refused by the store if it can be reached."""
            key = b"taken/0" if goes == "before" else b"taken/%d" % number
            compare = Compare(b"taken/0", Target.CREATE, Revision(0))
            try:
                result = await group.commit(Txn((compare,), (Put(key, b""),)), f"node:run:{number}")
                outcomes.append(f"{result.succeeded}")
            except MetadataOutOfReach:
                outcomes.append("out of reach")

        started = trio.current_time()
        store.unavailable = goes == "before"
        async with trio.open_nursery() as processes:
            for number in range(1, 101):
                processes.start_soon(touch, number)
            await trio.sleep(1.5 * TRANSACTION_SECONDS)  # the first merged one has failed
            store.unavailable = True
        assert trio.current_time() - started < 3 * ETCD_REQUEST_SECONDS
        assert len(outcomes) == 100 and outcomes.count("out of reach") > 50
        store.unavailable = False
        await work(group, "again", 3, 0)
