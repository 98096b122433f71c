"""Upkeep: the slow loops that give space back and keep copies complete.

    sweep     every quarter of the grace     deletes chunks that nobody needs        `sweeping`
    heal      when nodes come, go out, …     copies chunks to where they are missing `healing`
    renew     thrice in a grace              what is being written                   `renewal`
    pins      when an open version goes      keeps it for its readers                `pins`
    scrub     everything once a fortnight    reads what the disk holds               `scrub_rounds`
    restore   when a copy was bad            fetches a good one                      `restoring`

None of them is in the way of a request, and what one of them cannot do now it tries again later.
With etcd out of reach they rest: nothing is deleted or moved on old news.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import trio

from modelfs.errors import MetadataUnavailable, ModelfsError
from modelfs.inode import Pin
from modelfs.mirror import Change, MapChanged, NodeChanged
from modelfsd.kernel.kernel_inodes import KernelInodes
from modelfsd.logs import RateLimited
from modelfsd.metadata.feed import Feed
from modelfsd.metadata.leases import Leases
from modelfsd.metadata.namespace import Namespace
from modelfsd.metadata.pins import PinKeeper
from modelfsd.storage.chunks import Chunks
from modelfsd.storage.healing import Healer, Round
from modelfsd.storage.renewal import Renewal
from modelfsd.storage.replicator import Replicator
from modelfsd.storage.restoring import Restorer
from modelfsd.storage.scrub_rounds import ScrubRounds
from modelfsd.storage.scrubbing import Scrubber
from modelfsd.storage.survey import MorePins, Survey, Surveyor
from modelfsd.storage.sweeping import Sweep, Sweeper
from modelfsd.units import format_size
from modelfsd.writing.working_copy import WorkingCopy

log = logging.getLogger(__name__)

SWEEPS_A_GRACE = 6  # one may fail, and no wait begins anew (see `sweeping`)
SWEEP_SECONDS_MAX = 900.0
HEAL_SECONDS = 300.0  # between rounds while nothing happens
HEAL_SHARE = 10  # ... but a round takes no more than this part of the time
SETTLE_SECONDS = 1.0  # nodes rarely come alone
FAILING_TOLD_MAX = 20  # chunks that `status` names
RETRY_SECONDS = 5.0  # twice that, then more, after rounds that could not do everything


@dataclass(frozen=True, slots=True)
class UpkeepStatistics:
    """What was done since the start, and when last. Times are Unix seconds; 0: never."""

    swept_at: float = 0.0
    sweep_seconds: float = 0.0
    sweep_freed_bytes: int = 0  # by the last sweep
    freed_bytes: int = 0
    freed_chunks: int = 0
    waiting_chunks: int = 0  # unneeded here, but not for a whole grace period yet
    healed_at: float = 0.0
    copied_bytes: int = 0
    copied_chunks: int = 0
    handed_back_bytes: int = 0
    handed_back_chunks: int = 0
    heal_failures: int = 0  # in the last round
    pins: int = 0  # of this node


@dataclass(frozen=True, slots=True)
class UpkeepParts:
    """The parts of a node that upkeep works on. `copies` are those of the open write sessions."""

    feed: Feed
    namespace: Namespace
    chunks: Chunks
    replicator: Replicator
    inodes: KernelInodes
    leases: Leases
    copies: Callable[[], list[WorkingCopy]]
    lost_dir: Path


class Upkeep:
    """All upkeep of one node. `retained` are further manifests whose chunks must stay.

    `scrub_seconds` is how long a round of scrubbing takes; 0: none are made.
    """

    def __init__(
        self,
        parts: UpkeepParts,
        grace_seconds: float,
        down_out_seconds: float,
        retained: tuple[MorePins, ...] = (),
        scrub_seconds: float = 0.0,
    ) -> None:
        chunks, feed = parts.chunks, parts.feed
        self._mirror = feed.mirror
        self._node_id = chunks.node_id
        self._grace_seconds = grace_seconds
        self.pins = PinKeeper(parts.namespace, parts.inodes, parts.leases)
        surveyor = Surveyor(chunks, feed, (self._open_here, *retained))
        self.sweeper = Sweeper(chunks.store, feed, surveyor, grace_seconds)
        self.healer = Healer(chunks, surveyor, down_out_seconds, grace_seconds)
        self.renewal = Renewal(
            chunks, parts.replicator, parts.copies, parts.lost_dir, self.pins, grace_seconds
        )
        self.restorer = Restorer(chunks, surveyor)
        chunks.on_unavailable = self.restorer.note_unavailable
        self.scrubber = Scrubber(chunks.store, self.restorer)
        state_path = parts.lost_dir.with_name("scrub.json")
        self.scrub_rounds = ScrubRounds(self.scrubber, state_path, scrub_seconds)
        self._up = frozenset(self._mirror.nodes)
        self._news = trio.Event()
        self._statistics = UpkeepStatistics()
        self._quiet = RateLimited(log, 600.0)
        self.healer.note_nodes()

    async def _open_here(self, survey: Survey) -> Iterable[Pin]:
        return self.pins.wanted().values()

    def statistics(self) -> UpkeepStatistics:
        """A snapshot."""
        return replace(self._statistics, pins=len(self._mirror.pins.get(self._node_id, ())))

    def told(self) -> dict[str, Any]:
        """All of it for `modelfs status`, with what cannot be restored."""
        failing = self.restorer.failing()[:FAILING_TOLD_MAX]
        return {
            "upkeep": asdict(self.statistics()),
            "scrub": {**self.scrub_statistics(), "every_seconds": self.scrub_rounds.round_seconds},
            "lost_chunks": [
                {"chunk": one.chunk.hex(), "reason": one.reason, "paths": one.paths}
                for one in failing
            ],
        }

    def scrub_statistics(self) -> dict[str, Any]:
        """What scrubbing has found, and how far it is."""
        return {
            **asdict(self.scrub_rounds.state()),
            **asdict(self.scrubber.counters()),
            "restored_chunks": self.restorer.restored,
            "lost_chunks": len(self.restorer.failing()),
        }

    def on_changes(self, changes: list[Change]) -> None:
        """Take what the feed announces, after `KernelCache` has."""
        self.pins.on_changes(changes)
        up = frozenset(self._mirror.nodes)
        is_news = any(isinstance(change, MapChanged) for change in changes)
        is_of_nodes = any(isinstance(change, NodeChanged) for change in changes)
        if is_of_nodes:
            self.renewal.note_nodes()
        if is_of_nodes and up != self._up:
            self._up = up
            self.healer.note_nodes()
            is_news = True
        if is_news:
            self._news.set()

    async def run(self) -> None:
        """Do all of it, for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.pins.run)
            nursery.start_soon(self.renewal.run)
            nursery.start_soon(self._keep_sweeping)
            nursery.start_soon(self._keep_healing)
            nursery.start_soon(self.restorer.run)
            nursery.start_soon(self.scrub_rounds.run)

    # ------------------------------------------------------------ space

    async def _keep_sweeping(self) -> None:
        while True:
            await trio.sleep(min(self._grace_seconds / SWEEPS_A_GRACE, SWEEP_SECONDS_MAX))
            try:
                sweep = await self.sweeper.sweep()
            except MetadataUnavailable as error:
                log.debug("no sweep: %s", error)
            except (ModelfsError, OSError) as error:
                self._quiet.error("sweep", "space cannot be given back: %s", error)
            else:
                if sweep is not None:
                    self._note_sweep(sweep)

    def _note_sweep(self, sweep: Sweep) -> None:
        if sweep.freed_chunks:
            log.info(
                "gave back %s: %d chunks that nobody needs any more",
                format_size(sweep.freed_bytes),
                sweep.freed_chunks,
            )
        last = self._statistics
        self._statistics = replace(
            last,
            swept_at=time.time(),
            sweep_seconds=sweep.seconds,
            sweep_freed_bytes=sweep.freed_bytes,
            freed_bytes=last.freed_bytes + sweep.freed_bytes,
            freed_chunks=last.freed_chunks + sweep.freed_chunks,
            waiting_chunks=sweep.waiting_chunks,
        )

    # ------------------------------------------------------------ copies

    async def _keep_healing(self) -> None:
        retry_seconds = RETRY_SECONDS
        while True:
            await trio.sleep(SETTLE_SECONDS)
            self._news = trio.Event()
            started = trio.current_time()
            is_done = await self._heal()
            took_seconds = trio.current_time() - started
            retry_seconds = RETRY_SECONDS if is_done else min(2 * retry_seconds, HEAL_SECONDS)
            pause_seconds = max(
                HEAL_SECONDS if is_done else retry_seconds, HEAL_SHARE * took_seconds
            )
            pause_end = trio.current_time() + pause_seconds
            with trio.move_on_at(min(pause_end, self.healer.next_round_at())):
                await self._news.wait()

    async def _heal(self) -> bool:
        """One round. Whether nothing is left to try again."""
        try:
            done = await self.healer.round()
        except MetadataUnavailable as error:
            log.debug("no healing: %s", error)
            return False
        except (ModelfsError, OSError) as error:
            self._quiet.error("heal", "copies cannot be kept complete: %s", error)
            return False
        self._note_round(done)
        return not (done.failures or done.hand_offs)

    def _note_round(self, done: Round) -> None:
        if done.moved_something:
            log.info(
                "made %d missing copies (%s), handed %d back to their places (%s)",
                done.copied_chunks,
                format_size(done.copied_bytes),
                done.handed_back_chunks,
                format_size(done.handed_back_bytes),
            )
        if done.failures:
            log.info("%d steps wait for another try, such as %s", done.failures, done.example)
        last = self._statistics
        self._statistics = replace(
            last,
            healed_at=time.time(),
            copied_bytes=last.copied_bytes + done.copied_bytes,
            copied_chunks=last.copied_chunks + done.copied_chunks,
            handed_back_bytes=last.handed_back_bytes + done.handed_back_bytes,
            handed_back_chunks=last.handed_back_chunks + done.handed_back_chunks,
            heal_failures=done.failures,
        )
