"""Group commit: who shares a transaction, and who waits for whom. The clock is virtual."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from modelfs.ports import Put, Txn, TxnResult
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
