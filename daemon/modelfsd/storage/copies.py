"""Whether what versions name is there: the part of `modelfs fsck` that asks who holds what.

Every chunk of a version, those of its manifest too, must be held by as many nodes as its replicas
ask, or by all that are up where there are fewer. Nodes are asked for names alone, a few thousand
at a time; on request every copy is read and verified too, which moves all of it over the network.

Nothing is reported that is only passing. A version may be superseded and its chunks reclaimed while
it is looked at, a copy may be on its way from one node to another, or be fetched anew. So what
looks wrong is looked at again, after pauses, and only as long as somebody still needs the version.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import trio

from modelfs import manifest
from modelfs.errors import (
    ChunkMissing,
    ChunkUnavailable,
    CorruptChunk,
    ModelfsError,
    PeerRefused,
    PeerUnavailable,
)
from modelfs.extents import Extents
from modelfs.ids import ChunkId, Epoch, NodeId
from modelfs.inode import Pin
from modelfs.limits import HAS_CHUNKS_MAX, PEER_PATIENCE_SECONDS
from modelfs.manifest import PAGE_ENTRIES, Entries, Manifest, PlacedChunk, placed_chunk
from modelfs.stripe import span
from modelfsd.storage.chunks import Chunks
from modelfsd.storage.holders import ask_nodes
from modelfsd.storage.recopying import Lacking, Recopier
from modelfsd.storage.restoring import Restorer

log = logging.getLogger(__name__)

BATCH_PIECES = 4 * HAS_CHUNKS_MAX
READERS = 8  # of manifests
COPIES_READ_AT_ONCE = 4
LOOK_AGAIN_SECONDS = (0.2, 0.5, 1.0)  # pauses before what looks wrong is looked at again


@dataclass(slots=True)
class Damage:
    """What is wrong with some chunks of a version."""

    ranges: Extents = field(default_factory=Extents)  # bytes of the file
    chunks: int = 0
    reason: str = ""  # of the first of them


@dataclass(slots=True, eq=False)
class Version:
    """A version of a file to look at. `still_matters` says whether anybody needs it now."""

    pin: Pin
    still_matters: Callable[[], Awaitable[bool]]
    describe: Callable[[], dict[str, object]]  # for people, when something is wrong with it
    lost: Damage = field(default_factory=Damage)  # no good copy
    few: Damage = field(default_factory=Damage)  # fewer than there should be
    mended: Damage = field(default_factory=Damage)
    pending: int = 0  # pieces that have been found and not been looked at
    is_read: bool = False  # whether all its pieces have been found


@dataclass(slots=True, eq=False)
class Piece:
    """A chunk that a version needs for [start, end) of the file; whose copies `holders` have."""

    version: Version
    placed: PlacedChunk
    start: int
    end: int
    holders: frozenset[NodeId] = frozenset()
    wanted: int = 1
    was_bad: bool = False  # a copy of it failed its check
    bad_on: frozenset[NodeId] = frozenset()  # where one could not be put aside: it is none

    @property
    def is_lacking(self) -> bool:
        """Whether there are too few copies."""
        return len(self.holders) < self.wanted


class CopyCheck:
    """Looks at versions, many at a time. `done` is told of each when it is through."""

    def __init__(
        self,
        chunks: Chunks,
        restorer: Restorer,
        recopier: Recopier | None,
        read_all: bool,
        done: Callable[[Version], Awaitable[None]],
    ) -> None:
        """With a `recopier`, missing copies are made. `read_all`: every copy is read.

        The `restorer` is told of bad copies here, and of chunks that no node has.
        """
        self._chunks, self._restorer, self._recopier, self._done = chunks, restorer, recopier, done
        self._read_all = read_all
        self._batch: list[Piece] = []
        self.versions = self.chunks = self.bytes = 0
        self.silent: dict[NodeId, str] = {}  # nodes that did not answer, and why
        self._stuck: dict[ChunkId, set[NodeId]] = {}  # who could not put a bad copy aside

    async def run(self, versions: trio.MemoryReceiveChannel[Version]) -> None:
        """Look at all that come."""

        async def work(source: trio.MemoryReceiveChannel[Version]) -> None:
            async with source:
                async for version in source:
                    await self._look(version)

        async with versions, trio.open_nursery() as nursery:
            for _ in range(READERS):
                nursery.start_soon(work, versions.clone())
        await self._flush()

    # ------------------------------------------------------------ what a version needs

    async def _look(self, version: Version) -> None:
        """Find the chunks of a version."""
        self.versions += 1
        root = version.pin.manifest.placed
        try:
            table = manifest.decode(await self._read(version, root))
        except (ModelfsError, OSError) as error:
            await self._note_unreadable(version, 0, None, f"its manifest: {error}")
        else:
            await self._add(Piece(version, root, 0, table.size))
            if not table.is_paged:
                await self._add_entries(version, table, 0, table.table)
            for page in table.missing_pages():
                await self._look_at_page(version, table, page)
        version.is_read = True
        await self._finish_if_through(version)

    async def _look_at_page(self, version: Version, table: Manifest, page: int) -> None:
        placed, first = table.page_chunk(page), page * PAGE_ENTRIES
        start = span(table.chunk_bytes, first)[0]
        last = min(first + PAGE_ENTRIES, table.count) - 1
        end = min(table.size, sum(span(table.chunk_bytes, last)))
        try:
            table.add_page(page, await self._read(version, placed))
        except (ModelfsError, OSError) as error:
            await self._note_unreadable(version, start, end, f"a page of its manifest: {error}")
            return
        await self._add(Piece(version, placed, start, end))
        await self._add_entries(version, table, first, table.pages.pop(page))

    async def _read(self, version: Version, placed: PlacedChunk) -> memoryview:
        """A chunk of a manifest. One that is on its way between nodes is found the second time."""
        read = partial(self._chunks.read, placed, version.pin.replicas, 0, placed.ref.length)
        try:
            return await read()
        except ChunkUnavailable:
            await trio.sleep(LOOK_AGAIN_SECONDS[0])
            return await read()

    async def _note_unreadable(
        self, version: Version, start: int, end: int | None, reason: str
    ) -> None:
        if await version.still_matters():
            size = version.describe().get("size")
            stop = size if end is None and isinstance(size, int) else end
            _note(version.lost, start, stop or start, reason)

    async def _add_entries(
        self, version: Version, table: Manifest, first: int, entries: Entries
    ) -> None:
        for row in np.flatnonzero(entries["length"]).tolist():
            placed = placed_chunk(entries[row])
            if placed is not None:
                start, size = span(table.chunk_bytes, first + row)
                await self._add(Piece(version, placed, start, min(table.size, start + size)))

    async def _add(self, piece: Piece) -> None:
        piece.version.pending += 1
        self._batch.append(piece)
        if len(self._batch) >= BATCH_PIECES:
            await self._flush()

    # ------------------------------------------------------------ who has it

    async def _flush(self) -> None:
        """Ask about what has been collected, and settle it."""
        batch, self._batch = self._batch, []
        if not batch:
            return
        lacking = await self._ask(batch)
        if self._read_all:
            await self._read_copies(batch)
            lacking = [piece for piece in batch if piece.is_lacking or piece.was_bad]
        for pause_seconds in LOOK_AGAIN_SECONDS:
            if not any(piece.is_lacking for piece in lacking):
                break
            await trio.sleep(pause_seconds)
            lacking = await self._still_needed(lacking)
            await self._ask(lacking)
        await self._settle([piece for piece in lacking if piece.is_lacking or piece.was_bad])
        self.chunks += len(batch)
        self.bytes += sum(piece.placed.ref.length for piece in batch)
        for piece in batch:
            piece.version.pending -= 1
        for version in dict.fromkeys(piece.version for piece in batch):
            await self._finish_if_through(version)

    async def _ask(self, pieces: list[Piece]) -> list[Piece]:
        """Note who has the chunks; returns the pieces of which there are too few copies.

        First those are asked who should have a chunk, then, where copies are lacking, all others.
        """
        up = {*self._chunks.mirror.nodes, self._chunks.node_id}
        for piece in pieces:
            piece.holders = frozenset()
        await self._ask_about(self._expected(pieces, up))
        lacking = self._lacking(pieces, up)
        if lacking:
            await self._ask_about([(piece, tuple(up)) for piece in lacking])
        return self._lacking(lacking, up)

    def _expected(
        self, pieces: list[Piece], up: set[NodeId]
    ) -> list[tuple[Piece, tuple[NodeId, ...]]]:
        """Which nodes should have each chunk, by the map that has placed it."""
        mirror, kinds = self._chunks.mirror, defaultdict[tuple[Epoch, int], list[Piece]](list)
        for piece in pieces:
            kinds[piece.placed.epoch, max(1, piece.version.pin.replicas)].append(piece)
        expected = []
        for (epoch, replicas), some in kinds.items():
            by = mirror.maps.get(epoch) or mirror.latest_map
            assert by is not None
            names = [*(member.id for member in by.members), NodeId("")]  # -1: no such member
            ids = np.frombuffer(b"".join(piece.placed.ref.id for piece in some), np.uint8)
            rows = by.place_many(ids.reshape(-1, 32), replicas).tolist()
            for piece, row in zip(some, rows, strict=True):
                nodes = (names[index] for index in row)
                expected.append((piece, tuple(node for node in nodes if node in up)))
        return expected

    async def _ask_about(self, pieces: list[tuple[Piece, tuple[NodeId, ...]]]) -> None:
        """Ask these nodes for these chunks; whoever has one is noted as a holder."""
        questions: dict[NodeId, list[ChunkId]] = {}
        asked: dict[NodeId, list[Piece]] = {}
        for piece, nodes in pieces:
            for node in nodes:
                questions.setdefault(node, []).append(piece.placed.ref.id)
                asked.setdefault(node, []).append(piece)
        found = await ask_nodes(self._chunks, questions)
        self.silent.update(found.silent)
        for node, answers in found.answers.items():
            for piece, is_there in zip(asked[node], answers, strict=True):
                if is_there and node not in piece.bad_on:
                    piece.holders |= {node}

    def _lacking(self, pieces: list[Piece], up: set[NodeId]) -> list[Piece]:
        living = len(up - self.silent.keys())
        for piece in pieces:
            piece.wanted = max(1, min(piece.version.pin.replicas, living))
        return [piece for piece in pieces if piece.is_lacking]

    async def _still_needed(self, pieces: list[Piece]) -> list[Piece]:
        needed: dict[Version, bool] = {}
        for version in dict.fromkeys(piece.version for piece in pieces):
            needed[version] = await version.still_matters()
        return [piece for piece in pieces if needed[piece.version]]

    async def _read_copies(self, batch: list[Piece]) -> None:
        """Verify every copy, each once. Whoever has a bad one puts it aside and fetches another."""
        by_chunk: dict[ChunkId, list[Piece]] = {}
        for piece in batch:
            by_chunk.setdefault(piece.placed.ref.id, []).append(piece)
        copies = iter(
            [(same, node) for same in by_chunk.values() for node in sorted(same[0].holders)]
        )

        async def work() -> None:
            for same, node in copies:
                if await self._is_good(same[0].placed, node):
                    continue
                stays = {node} & self._stuck.get(same[0].placed.ref.id, set())
                for piece in same:
                    piece.was_bad, piece.bad_on = True, piece.bad_on | stays
                    piece.holders -= {node}

        async with trio.open_nursery() as nursery:
            for _ in range(COPIES_READ_AT_ONCE):
                nursery.start_soon(work)

    async def _is_good(self, placed: PlacedChunk, node: NodeId) -> bool:
        """Whether a node's copy is good. One that cannot be had now is left to the next look."""
        chunks, ref = self._chunks, placed.ref
        try:
            if node == chunks.node_id:
                is_good = await trio.to_thread.run_sync(partial(chunks.store.verify, ref.id))
                if not is_good:
                    await self._restorer.report(ref.id).done.wait()
                return is_good
            await chunks.peers.fetch(node, ref, 0, ref.length, PEER_PATIENCE_SECONDS)
        except CorruptChunk:
            try:
                await chunks.peers.report_damage(node, ref)
            except (PeerUnavailable, PeerRefused) as error:
                self.silent[node] = str(error.reason)
                self._stuck.setdefault(ref.id, set()).add(node)
            return False
        except ChunkMissing:
            return True
        except (ModelfsError, OSError) as error:
            self.silent[node] = str(error)
        return True

    # ------------------------------------------------------------ what becomes of it

    async def _settle(self, pieces: list[Piece]) -> None:
        """Make copies, if that is asked for, and note what is wrong."""
        failures: dict[ChunkId, str] = {}
        wrong = [piece for piece in pieces if piece.is_lacking]
        if self._recopier is not None and wrong:
            work = {
                piece.placed.ref.id: Lacking(piece.placed, piece.wanted, piece.holders)
                for piece in sorted(wrong, key=lambda piece: piece.wanted)
                if piece.holders
            }
            up = {*self._chunks.mirror.nodes, self._chunks.node_id}
            failures = await self._recopier.make(work.values(), up)
            await self._ask(wrong)
        for piece in pieces:
            version, reason = piece.version, failures.get(piece.placed.ref.id, "")
            if not piece.is_lacking and piece.bad_on:
                names = ", ".join(sorted(map(self._chunks.name_of, piece.bad_on)))
                damage, reason = version.few, f"the bad one on {names} could not be put aside"
            elif not piece.is_lacking:
                damage, reason = version.mended, "made anew"
            elif piece.holders:
                damage = version.few
                count = len(piece.holders)
                reason = reason or f"{count} of {piece.wanted} copies"
            else:
                damage, reason = version.lost, self._why_lost()
                self._restorer.note_unavailable(piece.placed.ref.id)
            _note(damage, piece.start, piece.end, reason)

    def _why_lost(self) -> str:
        mirror = self._chunks.mirror
        members = {member.id for by in mirror.maps.values() for member in by.members}
        away = members - {*mirror.nodes, self._chunks.node_id} | self.silent.keys()
        names = ", ".join(sorted(self._chunks.name_of(node) for node in away))
        return "no node that is up has a copy" + (f"; not asked: {names}" if names else "")

    async def _finish_if_through(self, version: Version) -> None:
        if version.is_read and not version.pending:
            version.is_read = False  # once
            await self._done(version)


def _note(damage: Damage, start: int, end: int, reason: str) -> None:
    damage.chunks += 1
    damage.reason = damage.reason or reason
    if start < end:
        damage.ranges.add(start, end)


def ranges_of(damage: Damage, count_max: int) -> tuple[list[list[int]], int]:
    """The first ranges as [start, end), and how many there are."""
    ranges: Iterable[tuple[int, int]] = damage.ranges
    found = [list(one) for one in ranges]
    return found[:count_max], len(found)
