"""The scrub in the background: every copy is looked at once in a *round*, a fortnight by default.

Ids are hashes, so they are spread evenly, and a chunk's id is also its time: in a round of length T
the copies whose ids begin with a half of all possible values have been looked at after T/2. So the
pace is even whatever the disk holds, and all that a round knows is its *position*, from 0 to 1:
every copy below it has been looked at. It stands in the state directory, and is written every few
minutes. A node that was down goes on where it was; time when it did not run does not count.

Looks are made one after the other and take no more than a fifth of the time: on a disk that is too
slow for its contents a round takes longer. Chunks that come during a round may be left to the next.
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from modelfs.ids import ChunkId
from modelfsd.logs import RateLimited
from modelfsd.storage.scrubbing import SHELVES, Scrubber

log = logging.getLogger(__name__)

SAVE_SECONDS = 300.0
REST_SHARE = 4  # of the time that a look took, to rest before the next
POSITION_BYTES = 6  # of an id: exact in a float
STATE_BYTES_MAX = 4096


@dataclass(frozen=True, slots=True)
class RoundsState:
    """What survives a restart. `completed_at` in Unix seconds; 0: no round has ended yet."""

    position: float = 0.0
    completed_at: float = 0.0


def position_of(chunk: ChunkId) -> float:
    """Where in a round a chunk has its turn."""
    scale: int = 1 << 8 * POSITION_BYTES
    return int.from_bytes(chunk[:POSITION_BYTES], "big") / scale


class ScrubRounds:
    """One node's rounds. `round_seconds` of 0: none are made."""

    def __init__(self, scrubber: Scrubber, path: Path, round_seconds: float) -> None:
        self._scrubber, self._path, self.round_seconds = scrubber, path, round_seconds
        self._position = self._completed_at = 0.0
        self._started_at = 0.0  # trio's clock: when a round at this position would have begun
        self._turn = 0  # counts rounds, also those that a tour by command has made superfluous
        self._saved_at = float("-inf")
        self._quiet = RateLimited(log, 3600.0)

    def state(self) -> RoundsState:
        """Where the round is, and when one was last complete."""
        return RoundsState(self._position, self._completed_at)

    def completed(self) -> None:
        """Everything has been looked at just now: the next round begins."""
        self._completed_at = time.time()
        self._begin(0.0)
        self._turn += 1
        self._saved_at = float("-inf")

    async def run(self) -> None:
        """Make rounds, for ever."""
        state = await trio.to_thread.run_sync(read_state, self._path)
        self._completed_at = state.completed_at
        self._begin(state.position)
        while self.round_seconds:
            turn = self._turn
            await self._walk(turn)
            if turn == self._turn and await self._wait_for(1.0, turn):
                log.info("a round of scrubbing is complete: %s", self._scrubber.counters())
                self.completed()
            await self.save()

    def _begin(self, position: float) -> None:
        self._position = position
        self._started_at = trio.current_time() - position * self.round_seconds

    async def _walk(self, turn: int) -> None:
        """Look at all copies from the position on, each in its turn."""
        for first in range(int(self._position * SHELVES), SHELVES):
            if not await self._wait_for(first / SHELVES, turn):
                return
            try:
                shelf = await self._scrubber.shelf(first)
            except OSError as error:
                self._quiet.error("shelf", "the disk's chunks cannot be listed: %s", error)
                continue
            for held in shelf:
                position = position_of(held.chunk)
                if position < self._position:
                    continue
                if not await self._wait_for(position, turn):
                    return
                began = trio.current_time()
                await self._scrubber.look(held)
                await trio.sleep(REST_SHARE * (trio.current_time() - began))

    async def _wait_for(self, position: float, turn: int) -> bool:
        """Sleep until it is this position's turn. False if the round has ended meanwhile."""
        due = self._started_at + position * self.round_seconds
        while turn == self._turn:
            now = trio.current_time()
            elapsed = (now - self._started_at) / self.round_seconds
            self._position = max(self._position, min(position, elapsed))
            if now >= due:
                return True
            if now - self._saved_at >= SAVE_SECONDS:
                await self.save()
            await trio.sleep_until(min(due, now + SAVE_SECONDS))
        return False

    async def save(self) -> None:
        """Write down where the round is, for the next start."""
        self._saved_at = trio.current_time()
        try:
            await trio.to_thread.run_sync(write_state, self._path, self.state())
        except OSError as error:
            self._quiet.warning("save", "%s cannot be written: %s", self._path, error)


def read_state(path: Path) -> RoundsState:
    """The state in a file; a new one if there is none, or none that makes sense."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        with path.open("rb") as file:
            found = json.loads(file.read(STATE_BYTES_MAX))
        state = RoundsState(float(found["position"]), float(found["completed_at"]))
        if 0 <= state.position <= 1 and 0 <= state.completed_at < float("inf"):
            return state
    return RoundsState()


def write_state(path: Path, state: RoundsState) -> None:
    """Replace the file. Not fsynced: an old position costs a few looks, no more."""
    temporary = path.with_name(f"{path.name}.new")
    fields = {"position": state.position, "completed_at": state.completed_at}
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="ascii") as file:
        file.write(json.dumps(fields) + "\n")
    temporary.replace(path)
