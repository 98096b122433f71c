"""Shared locks: many share or one is alone, in the order of arrival, whoever is cancelled."""

from __future__ import annotations

from random import Random

import pytest
import trio
import trio.testing

from modelfsd.shared_lock import SharedLock


@pytest.mark.parametrize("seed", range(5))
async def test_one_alone_or_many_together_and_nothing_leaks(
    rng: Random, autojump_clock: trio.testing.MockClock, seed: int
) -> None:
    lock = SharedLock()
    sharing, alone, most = 0, 0, 0

    async def user(is_alone: bool, patience: float) -> None:
        nonlocal sharing, alone, most
        await trio.sleep(rng.random() * 5)
        with trio.move_on_after(patience):
            async with lock.alone() if is_alone else lock.shared():
                sharing, alone = sharing + (not is_alone), alone + is_alone
                most = max(most, sharing)
                try:
                    assert alone == 0 or (alone == 1 and sharing == 0)
                    await trio.sleep(rng.random() / 10)
                finally:
                    sharing, alone = sharing - (not is_alone), alone - is_alone

    async with trio.open_nursery() as nursery:
        for _ in range(300):
            nursery.start_soon(user, rng.random() < 0.3, rng.choice([0.0, 0.05, 1e6]))
    assert most > 2
    with trio.fail_after(1):
        async with lock.alone():
            pass


async def test_who_comes_later_does_not_pass_by_who_wants_to_be_alone() -> None:
    lock = SharedLock()
    order: list[str] = []

    async def share(name: str) -> None:
        async with lock.shared():
            order.append(name)

    async def be_alone() -> None:
        async with lock.alone():
            order.append("alone")

    async with trio.open_nursery() as nursery:
        async with lock.shared():
            nursery.start_soon(be_alone)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(share, "late")
            await trio.testing.wait_all_tasks_blocked()
            assert order == []
    assert order == ["alone", "late"]
