"""Makes missing copies at once, wherever they belong among the nodes that are up.

`Healer` does so for the chunks of its own node, and waits until a node that is down has been so for
long. This is for whoever was asked to do it now, for any chunk: a good copy is read from wherever
there is one, checked against its BLAKE3 name, and put on the next living nodes of the chunk's
order. What is surplus when a node comes back, healing takes away again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import trio

from modelfs.errors import CorruptChunk, ModelfsError
from modelfs.ids import ChunkId, NodeId
from modelfs.limits import MIB
from modelfs.manifest import PlacedChunk
from modelfs.repair import full_order
from modelfsd.budget import ByteBudget
from modelfsd.storage.replicator import Placements, Replicator, name_chunk

INFLIGHT_BYTES = 64 * MIB
COPIES_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Lacking:
    """A chunk with too few copies: how many there should be, and who has one."""

    placed: PlacedChunk
    wanted: int
    holders: frozenset[NodeId]


class Recopier:
    """Makes copies."""

    def __init__(self, replicator: Replicator) -> None:
        self._replicator, self._chunks = replicator, replicator.chunks
        self._budget = ByteBudget(INFLIGHT_BYTES)

    async def make(
        self, lacking: Iterable[Lacking], nodes: Collection[NodeId]
    ) -> dict[ChunkId, str]:
        """Make what is missing, on some of these nodes. Returns what kept copies from being made.

        When this returns the copies that were made are safe.
        """
        placements = Placements()
        failures: dict[ChunkId, str] = {}
        waiting = iter(list(lacking))

        async def work() -> None:
            for one in waiting:
                try:
                    async with self._budget.holding(one.placed.ref.length):
                        await self._make_one(one, nodes, placements)
                except (ModelfsError, OSError) as error:
                    failures[one.placed.ref.id] = str(error)

        async with trio.open_nursery() as nursery:
            for _ in range(COPIES_AT_ONCE):
                nursery.start_soon(work)
        made = [chunk for by_node in placements.by_node.values() for chunk in by_node]
        try:
            await self._replicator.sync(placements, 1)
        except ModelfsError as error:
            failures.update((ChunkId(chunk), str(error)) for chunk in made)
        return failures

    async def _make_one(
        self, one: Lacking, nodes: Collection[NodeId], placements: Placements
    ) -> None:
        chunks, placed = self._chunks, one.placed
        data = await chunks.read(placed, one.wanted, 0, placed.ref.length)
        ref, table = await trio.to_thread.run_sync(name_chunk, data)
        if ref != placed.ref:
            raise CorruptChunk(placed.ref.id, "the node that it came from")
        latest, missing = chunks.mirror.latest_map, one.wanted - len(one.holders)
        assert latest is not None
        order = full_order(ref.id, one.wanted, chunks.map_of(placed) or latest, latest)
        failure: Exception | None = None
        for node in order:
            if missing <= 0:
                return
            if node in one.holders or node not in nodes:
                continue
            try:
                if node != chunks.node_id and node not in placements.incarnations:
                    incarnation = await chunks.peers.incarnation(node)
                    placements.incarnations.setdefault(node, incarnation)
                await self._replicator.put_on(node, ref, table, data, None, False)
            except (ModelfsError, OSError) as error:
                failure = error
            else:
                placements.add(placed, [node])
                missing -= 1
        if failure is not None and missing > 0:
            raise failure
