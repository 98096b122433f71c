"""Renewal: chunks that no manifest names yet, or never will, but that somebody relies on.

Reclaim deletes what is unneeded and was not renewed for a grace period. So, three times in it,
this node renews, on the nodes that have them:

- the chunks of its open write sessions: a checkpoint may take ten hours to write. A node that has
  lost one meanwhile is noticed here, and the chunk gets its copies back before the commit needs it.
  Of a node that did not answer, or whose copies could not be made anew yet, the commit makes sure;
- the chunks of writes that could not be committed, as long as `lost` says so; what those are based
  on is pinned.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import trio

from modelfs.errors import ModelfsError, PeerRefused, PeerUnavailable
from modelfs.ids import ChunkId, NodeId
from modelfs.manifest import PlacedChunk
from modelfsd.logs import RateLimited
from modelfsd.metadata.pins import PinKeeper
from modelfsd.storage.chunks import Chunks
from modelfsd.storage.replicator import Placements, Replicator
from modelfsd.writing import lost
from modelfsd.writing.working_copy import WorkingCopy

log = logging.getLogger(__name__)

RENEWALS_A_GRACE = 3


class Renewal:
    """Renews for one node. `copies` are the working copies of its open sessions."""

    def __init__(
        self,
        chunks: Chunks,
        replicator: Replicator,
        copies: Callable[[], Iterable[WorkingCopy]],
        lost_dir: Path,
        pins: PinKeeper,
        grace_seconds: float,
    ) -> None:
        self._chunks, self._replicator, self._copies = chunks, replicator, copies
        self._lost_dir, self._pins, self._grace_seconds = lost_dir, pins, grace_seconds
        self._quiet = RateLimited(log, 60.0)
        self._silent: set[NodeId] = set()  # in this round: none is waited for twice
        self._interval_seconds = 0.0  # that is being waited for
        self._news = trio.Event()
        self.renewed = 0  # chunks, each copy of them, in the last round

    def interval_seconds(self) -> float:
        """How long to wait between rounds: every node's grace counts, since each sweeps its own."""
        graces = (record.reclaim_grace_seconds for record in self._chunks.mirror.nodes.values())
        return min([self._grace_seconds, *graces]) / RENEWALS_A_GRACE

    def note_nodes(self) -> None:
        """The mirror's nodes have changed: one with a shorter grace does not wait for the rest."""
        if self.interval_seconds() < self._interval_seconds:
            self._news.set()

    async def run(self) -> None:
        """Renew for ever."""
        while True:
            self._news = trio.Event()
            try:
                await self.renew_all()
            except (ModelfsError, OSError) as error:
                self._quiet.error("disk", "lost writes cannot be looked through: %s", error)
            self._interval_seconds = self.interval_seconds()
            with trio.move_on_after(self._interval_seconds):
                await self._news.wait()

    async def renew_all(self) -> None:
        """One round."""
        self.renewed = 0
        self._silent.clear()
        for copy in list(self._copies()):
            for node, placed in list(copy.placements.by_node.items()):
                await self._renew_session(node, list(placed.values()), copy)
        now = time.time()
        self._pins.keep_bases(await trio.to_thread.run_sync(lost.lost_bases, self._lost_dir, now))
        kept = await trio.to_thread.run_sync(lost.lost_chunks, self._lost_dir, now)
        if kept:
            for node in {*self._chunks.mirror.nodes, self._chunks.node_id}:
                await self._renew(node, kept)

    async def _renew_session(
        self, node: NodeId, placed: Sequence[PlacedChunk], copy: WorkingCopy
    ) -> None:
        copy.placements.unsure.add(node)  # until its answer says otherwise
        answers = await self._renew(node, [one.ref.id for one in placed])
        gone = [one for one, is_there in zip(placed, answers, strict=False) if not is_there]
        for one in gone:
            self._quiet.warning(
                node,
                "%s lost a chunk of a file being written: it is put again",
                self._chunks.name_of(node),
            )
            await self._put_again(one, copy.base.replicas, copy.placements)
        if answers and not gone:
            copy.placements.unsure.discard(node)

    async def _put_again(self, one: PlacedChunk, replicas: int, placements: Placements) -> None:
        try:
            await self._replicator.put_again(one, replicas, placements)
        except (ModelfsError, OSError) as error:
            self._quiet.warning("again", "a chunk of a file being written is in danger: %s", error)

    async def _renew(self, node: NodeId, chunks: Sequence[ChunkId]) -> list[bool]:
        """Which of the chunks a node has; none are told if it does not answer."""
        if node in self._silent:
            return []
        try:
            answers = await self._replicator.renew(node, chunks)
        except (PeerUnavailable, PeerRefused, OSError) as error:
            # Its process or its disk may come back within the grace; the commit asks again.
            if isinstance(error, PeerUnavailable):
                self._silent.add(node)
            self._quiet.info(node, "%s renews nothing: %s", self._chunks.name_of(node), error)
            return []
        self.renewed += sum(answers)
        return answers
