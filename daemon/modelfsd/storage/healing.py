"""Healing: makes the copies that are missing, and takes hand-offs back (see `modelfs.repair`).

A round looks at every chunk that this node holds and a manifest names, and asks the nodes that
matter whether they hold it, a thousand chunks a question. It runs soon after a node came, went
out, or the map changed, and otherwise every few minutes; it costs this node some 10 µs for each
chunk held, and the one that it asks as much. Copies are checked against their BLAKE3 name before
they are sent, and count when the receiver has synced them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import trio

from modelfs import reclaim
from modelfs.chunk import ChunkRef, describe, table_checksum
from modelfs.errors import CorruptChunk, ModelfsError, OutOfSpace, PeerUnavailable
from modelfs.holdings import Holdings, Indexes, Mask
from modelfs.ids import ChunkId, Epoch, NodeId
from modelfs.limits import HAS_CHUNKS_MAX, MIB
from modelfs.manifest import PlacedChunk
from modelfs.ports import ChunkStore
from modelfs.reclaim import Waiting
from modelfs.repair import Case, DownTimes, Nodes, Order, full_order, make_cases, spares
from modelfsd.budget import ByteBudget
from modelfsd.storage.chunks import Chunks
from modelfsd.storage.survey import Surveyor
from modelfsd.storage.sweeping import delete_rows

INFLIGHT_BYTES = 64 * MIB  # of copies under way: one chunk of the largest size, or 16 usual ones
COPIES_AT_ONCE = 4
BATCH_CHUNKS = 4 * HAS_CHUNKS_MAX


@dataclass(slots=True)
class Round:
    """What one round did."""

    copied_chunks: int = 0
    copied_bytes: int = 0
    handed_back_chunks: int = 0
    handed_back_bytes: int = 0
    hand_offs: int = 0  # copies held here for nodes that do not have theirs yet
    failures: int = 0
    example: str = ""  # the first failure, in words
    silent: set[NodeId] = field(default_factory=set)  # nodes that did not answer

    def fail(self, reason: str) -> None:
        """Note that something must be tried again."""
        self.example = self.example or reason
        self.failures += 1

    @property
    def moved_something(self) -> bool:
        """Whether there is something to tell."""
        return bool(self.copied_chunks or self.handed_back_chunks)


class Healer:
    """Heals for one node."""

    def __init__(
        self, chunks: Chunks, surveyor: Surveyor, down_out_seconds: float, grace_seconds: float
    ) -> None:
        self._chunks, self._surveyor = chunks, surveyor
        self._down_out_seconds, self._grace_seconds = down_out_seconds, grace_seconds
        self._down = DownTimes()
        self._surplus = Waiting.nothing()
        self._epoch = Epoch(0)  # of the map by which they are surplus
        self._budget = ByteBudget(INFLIGHT_BYTES)

    def note_nodes(self) -> None:
        """The mirror's nodes have changed: count from now since when they are down."""
        mirror = self._chunks.mirror
        members = {member.id for map_ in mirror.maps.values() for member in map_.members}
        up = {*mirror.nodes, self._chunks.node_id}
        self._down.note(members, up, trio.current_time())

    def next_round_at(self) -> float:
        """When there will be something to do even if nothing happens; may be infinite."""
        now = trio.current_time()
        return min(
            self._down.next_out_at(now, self._down_out_seconds),
            self._surplus.next_ripe_at(now, self._grace_seconds),
        )

    async def round(self) -> Round:
        """Look at everything once. Raises `MetadataUnavailable`, OSError."""
        survey = await self._surveyor.survey()
        holdings, done = survey.holdings, Round(failures=survey.unreadable, example=survey.example)
        latest = self._chunks.mirror.latest_map
        if latest is None:
            return done
        self.note_nodes()
        surplus = np.zeros(len(holdings), np.bool_)
        for rows in _batches(np.flatnonzero(holdings.is_needed)):
            cases, nodes = await self._cases(holdings, rows, done)
            await self._heal(holdings, cases, nodes, surplus, done)
        if not survey.is_complete:
            surplus[:] = False  # by which maps they are placed is not known for sure
        if self._epoch != latest.epoch:
            self._surplus, self._epoch = Waiting.nothing(), latest.epoch  # wait anew
        self._surplus, ripe = reclaim.watch(
            self._surplus, holdings, surplus, trio.current_time(), self._grace_seconds
        )
        for rows in _batches(ripe):
            cases, nodes = await self._cases(holdings, rows, done)
            await self._hand_back(holdings, cases, nodes, done)
        return done

    def _nodes(self, silent: set[NodeId]) -> Nodes:
        mirror, me = self._chunks.mirror, self._chunks.node_id
        out = self._down.out(trio.current_time(), self._down_out_seconds)
        assert mirror.latest_map is not None
        members = {member.id for member in mirror.latest_map.members}
        gone = {m.id for by in mirror.maps.values() for m in by.members} - members - {*mirror.nodes}
        return Nodes(me, frozenset({*mirror.nodes, me}) - silent, (out | gone) - {me})

    async def _cases(
        self, holdings: Holdings, rows: Indexes, done: Round
    ) -> tuple[list[Case], Nodes]:
        """The cases of some rows, and the nodes as they are now that it is these rows' turn.

        A node that did not answer is left alone for the rest of the round.
        """
        nodes = self._nodes(done.silent)
        cases = make_cases(holdings, rows, self._chunks.mirror, nodes)
        return await trio.to_thread.run_sync(list, cases), nodes

    # ------------------------------------------------------------ who has what

    async def _ask(
        self, holdings: Holdings, questions: dict[NodeId, list[int]], renew: bool, done: Round
    ) -> dict[int, set[NodeId]]:
        """Which of the asked nodes hold each row's chunk. Who does not answer holds nothing."""
        holders: dict[int, set[NodeId]] = {}

        async def ask(node: NodeId, rows: Sequence[int]) -> None:
            chunks = [holdings.chunk(row) for row in rows]
            try:
                answers = await self._chunks.peers.has(node, chunks, renew)
            except ModelfsError as error:
                self._failed(node, error, done)
                return
            for row, is_there in zip(rows, answers, strict=True):
                if is_there:
                    holders.setdefault(row, set()).add(node)

        async with trio.open_nursery() as nursery:
            for node, rows in questions.items():
                nursery.start_soon(ask, node, rows)
        return holders

    def _failed(self, node: NodeId, error: Exception, done: Round) -> None:
        done.silent.add(node)
        if isinstance(error, PeerUnavailable):
            self._chunks.suspect(node)
        done.fail(f"{self._chunks.name_of(node)}: {error}")

    # ------------------------------------------------------------ missing copies

    async def _heal(
        self, holdings: Holdings, cases: list[Case], nodes: Nodes, surplus: Mask, done: Round
    ) -> None:
        """Make what copies are missing, and note which rows are surplus here."""
        questions: dict[NodeId, list[int]] = {}
        for case in cases:
            for node in case.to_ask(nodes):
                questions.setdefault(node, []).append(case.row)
        holders = await self._ask(holdings, questions, False, done)
        nodes = replace(nodes, up=nodes.up - done.silent)
        work = []
        for case in cases:
            decision = case.decide(nodes, holders.get(case.row, ()))
            surplus[case.row] = decision.is_surplus
            done.hand_offs += nodes.me not in case.desired and not decision.is_surplus
            if decision.copy_to:
                work.append((case, decision.copy_to))
        if work:
            await _Copying(self._chunks, self._budget, holdings, nodes, done).run(work)

    # ------------------------------------------------------------ surplus copies

    async def _hand_back(
        self, holdings: Holdings, cases: list[Case], nodes: Nodes, done: Round
    ) -> None:
        """Delete this node's copies, after every desired holder has renewed and synced its own."""
        questions: dict[NodeId, list[int]] = {}
        for case in cases:
            for node in case.desired:
                questions.setdefault(node, []).append(case.row)
        runs = {node: run for node in questions if (run := await self._run_of(node, done))}
        holders = await self._ask(holdings, {node: questions[node] for node in runs}, True, done)
        safe = {node for node, run in runs.items() if await self._sync(node, run, done)}
        rows = [
            case.row
            for case in cases
            if nodes.me not in case.desired
            and safe.issuperset(case.desired)
            and holders.get(case.row, set()).issuperset(case.desired)
        ]
        count, size = await trio.to_thread.run_sync(
            delete_rows, self._chunks.store, holdings, np.array(rows, np.int64)
        )
        done.handed_back_chunks += count
        done.handed_back_bytes += size

    async def _run_of(self, node: NodeId, done: Round) -> str:
        """Which run of a node will answer: its next may lack names that were not synced."""
        try:
            return await self._chunks.peers.incarnation(node)
        except ModelfsError as error:
            self._failed(node, error, done)
            return ""

    async def _sync(self, node: NodeId, run: str, done: Round) -> bool:
        try:
            await self._chunks.peers.sync(node, run)
        except ModelfsError as error:
            self._failed(node, error, done)
            return False
        return True


def _batches(rows: Indexes) -> Iterator[Indexes]:
    for start in range(0, len(rows), BATCH_CHUNKS):
        yield rows[start : start + BATCH_CHUNKS]


class _Copying:
    """Copies some chunks from here to where they are missing, a few at a time."""

    def __init__(
        self, chunks: Chunks, budget: ByteBudget, holdings: Holdings, nodes: Nodes, done: Round
    ) -> None:
        self._chunks, self._budget, self._holdings = chunks, budget, holdings
        self._nodes, self._done = nodes, done
        self._incarnations: dict[NodeId, str] = {}
        self._taken: dict[NodeId, list[int]] = {}  # bytes of each chunk, not synced yet

    async def run(self, work: list[tuple[Case, Order]]) -> None:
        """Make the copies, then make them safe. Failures are noted in the round."""
        waiting = iter(work)

        async def copy_some() -> None:
            for case, targets in waiting:
                try:
                    await self._copy(case, targets)
                except (ModelfsError, OSError) as error:
                    self._done.fail(str(error))

        async with trio.open_nursery() as nursery:
            for _ in range(COPIES_AT_ONCE):
                nursery.start_soon(copy_some)
        for node, sizes in self._taken.items():
            try:
                await self._chunks.peers.sync(node, self._incarnations[node])
            except ModelfsError as error:
                self._done.fail(f"{self._chunks.name_of(node)}: {error}")
                continue
            self._done.copied_chunks += len(sizes)
            self._done.copied_bytes += sum(sizes)

    async def _copy(self, case: Case, targets: Order) -> None:
        chunk = self._holdings.chunk(case.row)
        replicas = int(self._holdings.replicas[case.row])
        placed = PlacedChunk(
            await trio.to_thread.run_sync(_reference, self._chunks.store, chunk),
            Epoch(int(self._holdings.epochs[case.row])),
        )
        length = placed.ref.length
        async with self._budget.holding(length):
            data = await self._chunks.read(placed, replicas, 0, length)
            found, table = await trio.to_thread.run_sync(describe, data)
            if found != placed.ref:  # whole by its own table, and yet not what its name says
                await trio.to_thread.run_sync(self._chunks.store.verify, chunk)
                raise CorruptChunk(chunk, "this node")
            for target in targets:
                if target not in self._done.silent:
                    await self._put(target, case, found, table, data)

    async def _put(
        self, target: NodeId, case: Case, ref: ChunkRef, table: bytes, data: memoryview
    ) -> None:
        """Put a copy on a node, or if it has no room on the next one that has some."""
        try:
            await self._put_on(target, ref, table, data)
            return
        except PeerUnavailable:
            self._done.silent.add(target)
            raise
        except OutOfSpace as error:
            self._done.fail(f"{self._chunks.name_of(target)}: {error}")
        peers, mirror = self._chunks.peers, self._chunks.mirror
        assert mirror.latest_map is not None
        replicas = int(self._holdings.replicas[case.row])
        by = self._chunks.map_of(PlacedChunk(ref, Epoch(int(self._holdings.epochs[case.row]))))
        full = full_order(ref.id, replicas, by or mirror.latest_map, mirror.latest_map)
        for node in spares(full, case.desired, self._nodes):
            try:
                if not (await peers.has(node, [ref.id], False))[0]:
                    await self._put_on(node, ref, table, data)
                return
            except ModelfsError as error:
                self._done.fail(f"{self._chunks.name_of(node)}: {error}")

    async def _put_on(self, node: NodeId, ref: ChunkRef, table: bytes, data: memoryview) -> None:
        if node not in self._incarnations:
            self._incarnations[node] = await self._chunks.peers.incarnation(node)
        await self._chunks.peers.put(node, ref, table, data)
        self._taken.setdefault(node, []).append(ref.length)


def _reference(store: ChunkStore, chunk: ChunkId) -> ChunkRef:
    """What a manifest would say of a chunk that is here. Its bytes are not checked yet."""
    opened = store.open(chunk)
    os.close(opened.fd)
    return ChunkRef(chunk, table_checksum(opened.table), opened.length)
