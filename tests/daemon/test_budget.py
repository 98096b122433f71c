"""Byte budgets: never exceeded, never leaking, fair, whatever is cancelled."""

from __future__ import annotations

from random import Random

import pytest
import trio
import trio.testing

from modelfsd.budget import ByteBudget

TOTAL = 100


@pytest.mark.parametrize("seed", range(5))
async def test_the_budget_is_kept_and_given_back_whoever_is_cancelled(
    rng: Random, autojump_clock: trio.testing.MockClock, seed: int
) -> None:
    budget = ByteBudget(TOTAL)
    held: list[int] = []

    async def user(size: int, patience: float) -> None:
        await trio.sleep(rng.random())
        with trio.move_on_after(patience):
            async with budget.holding(size):
                held.append(size)
                try:
                    assert sum(held) <= budget.used_bytes
                    assert sum(held) <= TOTAL or len(held) == 1
                    await trio.sleep(rng.random())
                finally:
                    held.remove(size)

    async with trio.open_nursery() as nursery:
        for _ in range(200):
            size = rng.choice([1, 30, 60, 100, 150])
            nursery.start_soon(user, size, rng.choice([0.3, 1.0, 1e6]))
    assert budget.used_bytes == budget.wanted_bytes == 0


async def test_first_come_first_served() -> None:
    budget = ByteBudget(TOTAL)
    await budget.take(60)
    order: list[int] = []

    async def user(size: int) -> None:
        await budget.take(size)
        order.append(size)

    async with trio.open_nursery() as nursery:
        for size in (80, 30):
            nursery.start_soon(user, size)
            await trio.testing.wait_all_tasks_blocked()
        assert not budget.take_nowait(10), "that would pass by those who wait"
        assert budget.wanted_bytes == 80 and order == []
        budget.give(60)
        await trio.testing.wait_all_tasks_blocked()
        assert order == [80]
        budget.give(80)
    assert order == [80, 30]


async def test_who_waits_behind_a_cancelled_one_goes_on_at_once() -> None:
    budget = ByteBudget(TOTAL)
    await budget.take(60)
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as doomed:
            doomed.start_soon(budget.take, 80)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(budget.take, 40)
            await trio.testing.wait_all_tasks_blocked()
            doomed.cancel_scope.cancel()
        with trio.fail_after(5):
            await trio.testing.wait_all_tasks_blocked()
        assert budget.used_bytes == TOTAL
