"""What the daemon does for `modelfs scrub`: a tour of this node's copies, told as it goes.

One tour at a time. A complete one counts as a round of the scrub in the background. If the command
goes away the tour ends where it is; what it had found bad is restored all the same.
"""

from __future__ import annotations

from typing import Any

import trio

from modelfs.errors import UserError
from modelfsd.commands.control import Listener
from modelfsd.storage.restoring import Outcome, Restoration
from modelfsd.storage.scrub_rounds import ScrubRounds
from modelfsd.storage.scrubbing import Scrubber, Tour

RATE_MIN = 64 << 10  # bytes a second; slower is a mistyped unit


class ScrubService:
    """Answers `scrub`."""

    def __init__(self, name: str, scrubber: Scrubber, rounds: ScrubRounds) -> None:
        self._name, self._scrubber, self._rounds = name, scrubber, rounds
        self._touring = trio.Lock()

    async def scrub(self, request: dict[str, Any], listener: Listener) -> dict[str, Any]:
        """The handler of `modelfs scrub`; `rate` is in bytes a second, 0: as fast as it goes."""
        rate = request.get("rate", 0)
        if not isinstance(rate, int) or 0 < rate < RATE_MIN or rate < 0:
            raise UserError(f"{rate!r} is not a rate: at least {RATE_MIN >> 10}KiB a second")
        if self._touring.locked():
            raise UserError("another scrub of this node is running: wait for its end")
        async with self._touring:
            started = trio.current_time()
            tour = await self._scrubber.start()
            listener.progress = lambda: _progress(tour)
            await self._scrubber.walk(tour, rate or float("inf"))
            self._rounds.completed()
            await self._rounds.save()
            seconds = trio.current_time() - started
            return {"node": self._name, "seconds": seconds, **_result(tour)}


def _progress(tour: Tour) -> dict[str, Any]:
    return {
        "chunks": tour.chunks,
        "bytes": tour.bytes,
        "total_chunks": tour.total_chunks,
        "total_bytes": tour.total_bytes,
        "bad_chunks": len(tour.restorations) + tour.dropped_chunks,
    }


def _result(tour: Tour) -> dict[str, Any]:
    failed = [one for one in (*tour.restorations, *tour.earlier) if one.outcome is Outcome.FAILED]

    def count(outcome: Outcome) -> int:
        return sum(one.outcome is outcome for one in tour.restorations)

    return {
        "chunks": tour.chunks,
        "bytes": tour.bytes,
        "bad_chunks": len(tour.restorations) + tour.dropped_chunks,
        "repaired_chunks": count(Outcome.RESTORED),
        "dropped_chunks": tour.dropped_chunks,
        "unneeded_chunks": count(Outcome.UNNEEDED),
        "unrepaired_chunks": len(failed),
        "unreadable_chunks": tour.unreadable_chunks,
        "example": tour.example,
        "unrepaired": [_failure(one) for one in failed],
    }


def _failure(one: Restoration) -> dict[str, Any]:
    return {"chunk": one.chunk.hex(), "reason": one.reason, "paths": one.paths}
