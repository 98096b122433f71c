"""The pace of scrubbing: rounds in the background, their memory, and the rate of a tour."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from modelfs.errors import UserError
from modelfs.limits import KIB, MIB
from modelfsd.commands.scrub_service import ScrubService
from modelfsd.storage.scrub_rounds import (
    RoundsState,
    ScrubRounds,
    position_of,
    read_state,
    write_state,
)
from tests.daemon.scrub_parts import on, scrubbed_cluster
from tests.daemon.upkeep_parts import Kept, make

ROUND = 1000.0


async def test_a_tour_keeps_below_its_rate(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with scrubbed_cluster(tmp_path) as kept:
        await make(kept.nodes[0], b"f", rng.randbytes(4 * MIB), replicas=3)
        upkeep = kept.upkeep[kept.cluster.ids[0]]
        tour = await upkeep.scrubber.start()
        started = trio.current_time()
        await upkeep.scrubber.walk(tour, 100 * KIB)
        assert trio.current_time() - started == pytest.approx(tour.bytes / (100 * KIB), rel=0.01)


@pytest.mark.parametrize("rate", [1, -1, "50MiB", None, 1.5])
async def test_a_rate_that_makes_no_sense_is_refused(tmp_path: Path, rate: object) -> None:
    async with scrubbed_cluster(tmp_path) as kept:
        service = ScrubService(
            "n1", kept.upkeep[kept.cluster.ids[0]].scrubber, rounds_of(kept, tmp_path / "s")
        )
        listener: Any = None
        with pytest.raises(UserError, match="is not a rate"):
            await service.scrub({"rate": rate}, listener)


def rounds_of(kept: Kept, path: Path) -> ScrubRounds:
    return ScrubRounds(kept.upkeep[kept.cluster.ids[0]].scrubber, path, ROUND)


async def test_a_round_looks_at_every_copy_once_and_evenly(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with scrubbed_cluster(tmp_path) as kept, trio.open_nursery() as nursery:
        await make(kept.nodes[0], b"f", rng.randbytes(4 * MIB), replicas=3)
        rounds, scrubber = (
            rounds_of(kept, tmp_path / "s"),
            kept.upkeep[kept.cluster.ids[0]].scrubber,
        )
        held = on(kept, kept.cluster.ids[0])
        nursery.start_soon(rounds.run)
        for part in range(1, 10):
            await trio.sleep(ROUND / 10)
            due = sum(position_of(chunk) < part / 10 for chunk in held)
            assert abs(scrubber.counters().chunks - due) <= 1
            assert rounds.state().position == pytest.approx(part / 10, abs=0.02)
        await trio.sleep(ROUND / 10 + 1)
        assert scrubber.counters().chunks == len(held)
        assert rounds.state().completed_at > 0
        assert rounds.state().position < 0.1
        await trio.sleep(ROUND)
        assert scrubber.counters().chunks == 2 * len(held)
        nursery.cancel_scope.cancel()


async def test_a_round_goes_on_where_the_daemon_was_stopped(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with scrubbed_cluster(tmp_path) as kept:
        await make(kept.nodes[0], b"f", rng.randbytes(4 * MIB), replicas=3)
        scrubber = kept.upkeep[kept.cluster.ids[0]].scrubber
        held = on(kept, kept.cluster.ids[0])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rounds_of(kept, tmp_path / "s").run)
            await trio.sleep(0.7 * ROUND)
            nursery.cancel_scope.cancel()
        seen = scrubber.counters().chunks
        await trio.sleep(3 * ROUND)  # down for long
        again = rounds_of(kept, tmp_path / "s")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(again.run)
            await trio.sleep(0.65 * ROUND)  # the file is 300 s old at most
            nursery.cancel_scope.cancel()
        assert again.state().completed_at > 0
        repeated = scrubber.counters().chunks - len(held)
        assert 0 <= repeated <= seen


async def test_a_tour_by_command_counts_as_a_round(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with scrubbed_cluster(tmp_path) as kept, trio.open_nursery() as nursery:
        await make(kept.nodes[0], b"f", rng.randbytes(MIB), replicas=3)
        rounds = rounds_of(kept, tmp_path / "s")
        scrubber = kept.upkeep[kept.cluster.ids[0]].scrubber
        nursery.start_soon(rounds.run)
        await trio.sleep(ROUND / 2)
        listener: Any = SimpleNamespace(progress=None)
        answer = await ScrubService("n1", scrubber, rounds).scrub({"rate": 0}, listener)
        assert answer["chunks"] == scrubber.store.usage().owned_chunks
        assert answer["chunks"] == listener.progress()["chunks"]
        assert not any(answer[key] for key in answer if key.endswith("ed_chunks"))
        assert read_state(tmp_path / "s").completed_at > 0
        assert read_state(tmp_path / "s").position == 0
        await trio.sleep(ROUND / 4)
        assert rounds.state().position <= 0.26
        await trio.sleep(ROUND / 2)
        assert 0.7 < rounds.state().position <= 0.76
        nursery.cancel_scope.cancel()


async def test_without_a_period_nothing_is_done(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with scrubbed_cluster(tmp_path) as kept:
        await make(kept.nodes[0], b"f", rng.randbytes(MIB), replicas=3)
        scrubber = kept.upkeep[kept.cluster.ids[0]].scrubber
        await ScrubRounds(scrubber, tmp_path / "s", 0.0).run()
        assert scrubber.counters().chunks == 0


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"position": 2, "completed_at": 0}', '{"position": NaN}', "\x00" * 9000],
)
def test_a_state_file_that_makes_no_sense_is_no_state(text: str, tmp_path: Path) -> None:
    path = tmp_path / "scrub.json"
    assert read_state(path) == RoundsState()
    path.write_text(text)
    assert read_state(path) == RoundsState()
    write_state(path, RoundsState(0.25, 1e9))
    assert read_state(path) == RoundsState(0.25, 1e9)
    assert os.listdir(tmp_path) == ["scrub.json"]
    assert path.stat().st_mode & 0o777 == 0o600
