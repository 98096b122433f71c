"""Several new machines start at once: at most one of them founds a cluster.

The network is played: announcements take up to a second and a half to arrive, each at its own time.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from modelfs.errors import UserError
from modelfs.ids import ClusterId, NodeId
from modelfsd.cluster.announcements import FOUNDING, UP, Announcement, Found
from modelfsd.cluster.discovery import Discovery
from modelfsd.cluster.founding import CLAIM_SECONDS, Claim, rival_of, settle_claim
from modelfsd.config import Config

DELAY_SECONDS_MAX = 1.5
LAB = ClusterId("0" * 16)


class Air:
    """Multicast between machines."""

    def __init__(self, chance: random.Random, nursery: trio.Nursery) -> None:
        self.chance, self._nursery = chance, nursery
        self.ears: list[Ear] = []

    def carry(self, speaker: Ear, announcement: Announcement | None) -> None:
        for ear in self.ears:
            if ear is not speaker:
                delay = self.chance.uniform(0, DELAY_SECONDS_MAX)
                self._nursery.start_soon(ear.hear, speaker.node, announcement, delay)


class Ear:
    """As much of `Discovery` as founding needs."""

    def __init__(self, air: Air, node: NodeId) -> None:
        self.node, self._air = node, air
        self._said: Announcement | None = None
        self._heard: dict[NodeId, Found] = {}
        self._latest: dict[NodeId, float] = {}
        air.ears.append(self)
        for other in air.ears:  # a query, which those who are announced answer
            if other._said is not None:
                delay = air.chance.uniform(0, DELAY_SECONDS_MAX)
                air._nursery.start_soon(self.hear, other.node, other._said, delay)

    async def announce(self, announcement: Announcement) -> None:
        self._said = announcement
        self._air.carry(self, announcement)

    def leave(self) -> None:
        self._said = None
        self._air.carry(self, None)
        self._air.ears.remove(self)

    async def hear(self, node: NodeId, said: Announcement | None, delay: float) -> None:
        sent_at = trio.current_time()
        await trio.sleep(delay)
        if sent_at < self._latest.get(node, 0.0):
            return  # something newer has come
        self._latest[node] = sent_at
        if said is None:
            self._heard.pop(node, None)
        else:
            self._heard[node] = Found(
                node, said.cluster, said.cluster_name, "h", 1, 0, "", 1, said.since_ms, said.state
            )

    async def browse_for(self, seconds: float) -> list[Found]:
        await trio.sleep(seconds)
        return self.snapshot()

    def snapshot(self) -> list[Found]:
        return list(self._heard.values())


def config() -> Config:
    options: Any = None
    return Config(Path("/m"), Path("/s"), "gpu", ("127.0.0.1", 7420), options)


@pytest.mark.parametrize("seed", range(150))
async def test_of_several_founders_at_most_one_founds(
    seed: int, autojump_clock: trio.testing.MockClock
) -> None:
    chance = random.Random(seed)
    founders: list[Claim] = []
    told: list[str] = []

    async def start(air: Air, number: int) -> None:
        await trio.sleep(chance.choice([0.0, chance.uniform(0, 0.1), chance.uniform(0, 8)]))
        clock = trio.current_time() + chance.choice([0.0, chance.uniform(-100, 100), -1e6])
        node = NodeId(f"{number:016x}")
        claim = Claim(node, ClusterId(f"{chance.getrandbits(64):016x}"), "lab", 2e6 + clock)
        ear: Any = Ear(air, node)
        try:
            await settle_claim(claim, config(), ear)
            await trio.sleep(chance.uniform(0, 3))  # etcd starts
            assert rival_of(claim, ear) is None
            founders.append(claim)
        except UserError as error:
            told.append(str(error))
            ear.leave()

    count = chance.randint(2, 5)
    async with trio.open_nursery() as nursery:
        air = Air(chance, nursery)
        for number in range(count):
            nursery.start_soon(start, air, number)
    assert len(founders) == 1 and len(told) == count - 1
    assert all("modelfs token" in text and "--new-cluster NAME" in text for text in told)


def heard(state: str, since_ms: int) -> Discovery:
    class Quiet:
        def snapshot(self) -> list[Found]:
            cluster = ClusterId("e" * 16)
            return [Found(NodeId("e" * 16), cluster, "old", "h", 1, 0, "", 1, since_ms, state)]

    quiet: Any = Quiet()
    found: Discovery = quiet
    return found


def test_an_empty_cluster_steps_back_from_an_older_one_that_turns_up() -> None:
    claim = Claim(NodeId("1" * 16), LAB, "lab", 5.0)
    rival = rival_of(claim, heard(UP, 4999))
    assert rival is not None and "old (a node is at h:1)" in str(rival)
    assert rival_of(claim, heard(UP, 5001)) is None
    assert rival_of(claim, heard(FOUNDING, 1)) is None, "it will step back by itself"


def test_a_claim_is_announced_for_longer_than_multicast_takes() -> None:
    assert CLAIM_SECONDS > DELAY_SECONDS_MAX
