"""Group commit: who shares a transaction, and who waits for whom. The clock is virtual."""

from __future__ import annotations

import trio

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
