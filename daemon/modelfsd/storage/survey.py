"""The survey: which of this node's chunks are named by a manifest that matters.

A manifest matters if it is a current version's, if a living node has pinned it, if this node has it
open, or if the caller says so (retained versions). A survey lists the store, makes the mirror
fresh, and marks what all those manifests name: roots, pages and chunks.

What a manifest names never changes, so it is kept between surveys, at 12 bytes for each chunk and
about 300 for each manifest, up to `CACHE_BYTES_MAX`; beyond that manifests are read again each
time. A survey is *complete* if every manifest could be read. Nothing may be deleted after one that
is not: whatever the missing manifest names would look unneeded. The same holds if etcd has a record
that cannot be read and may name a manifest, or place a chunk.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import trio

from modelfs import keys, manifest
from modelfs.errors import ModelfsError, RecordUnreadable
from modelfs.holdings import (
    Holdings,
    References,
    keys_of,
    references_of,
    references_of_entries,
)
from modelfs.ids import ROOT_INODE, ChunkId, InodeNumber
from modelfs.inode import Pin
from modelfs.limits import MIB
from modelfs.manifest import Entries, PlacedChunk, placed_chunk
from modelfs.mirror import Mirror
from modelfsd.logs import RateLimited
from modelfsd.metadata.feed import Feed
from modelfsd.storage.chunks import Chunks

log = logging.getLogger(__name__)

CACHE_BYTES_MAX = 128 * MIB  # 250,000 manifests of one chunk, or 11 million chunks of large files
MANIFEST_OVERHEAD_BYTES = 300  # of a small array and its place in a table
BATCH_MANIFESTS = 256  # between two yields to the other tasks
READERS = 8
QUIET_SECONDS = 600.0  # between two complaints
NEEDED_PREFIXES = (keys.INODE_PREFIX, keys.PIN_PREFIX, keys.HISTORY_PREFIX, keys.MAP_PREFIX)
MARK_ROWS = 1 << 16  # references that are matched in one go


@dataclass(slots=True)
class Survey:
    """What was found. `unreadable` manifests could not be read; `example` says which, and why."""

    holdings: Holdings
    unreadable: int = 0
    example: str = ""

    def miss(self, reason: str) -> None:
        """Note that something could not be read."""
        self.example = self.example or reason
        self.unreadable += 1

    @property
    def is_complete(self) -> bool:
        """Whether an unmarked chunk is surely unneeded."""
        return not self.unreadable


@dataclass(slots=True)
class Named:
    """What manifests say of one chunk."""

    placed: PlacedChunk
    replicas: int  # the most copies that one of them asks for
    manifests: set[bytes] = field(default_factory=set)  # the ids of those that name it


@dataclass(slots=True)
class Found:
    """The chunks of a search that manifests name. `missed`: why there may be more."""

    named: dict[ChunkId, Named]
    missed: str

    def note(self, placed: PlacedChunk, pin: Pin) -> None:
        """A manifest names one of them."""
        named = self.named.setdefault(placed.ref.id, Named(placed, 0))
        named.replicas = max(named.replicas, 1, pin.replicas)
        named.manifests.add(pin.manifest.id)
        if placed.epoch > named.placed.epoch:
            named.placed = placed


# Further manifests that matter. Raises what makes the survey fail; tells it what it must miss.
MorePins = Callable[[Survey], Awaitable[Iterable[Pin]]]


class Surveyor:
    """Makes surveys, one at a time. `more` are further manifests that matter."""

    def __init__(self, chunks: Chunks, feed: Feed, more: tuple[MorePins, ...]) -> None:
        self._chunks, self._feed, self._more = chunks, feed, more
        self._known = _Cache()
        self._surveying = trio.Lock()
        self._quiet = RateLimited(log, QUIET_SECONDS)

    @property
    def known_bytes(self) -> int:
        """How much memory is used between surveys."""
        return self._known.used_bytes

    async def survey(self) -> Survey:
        """List and mark. Raises `MetadataUnavailable`, OSError."""
        async with self._surveying:
            listed = await trio.to_thread.run_sync(Holdings.of, self._chunks.store.owned())
            await self._feed.fresh()
            survey = Survey(listed)
            if reason := _why_not_trusted(self._feed.mirror):
                survey.miss(reason)
                return self._told(survey)
            _miss_unreadable(self._feed.mirror, survey)
            self._known = await self._mark_all(survey)
            return self._told(survey)

    async def find(self, wanted: Collection[ChunkId]) -> Found:
        """Which manifests name these chunks, and what they say of them. Raises as `survey`.

        Costs as much as a survey: what manifests name is known from the last one, or read now.
        """
        async with self._surveying:
            await self._feed.fresh()
            survey = Survey(Holdings.of(()))
            if reason := _why_not_trusted(self._feed.mirror):
                survey.miss(reason)
            _miss_unreadable(self._feed.mirror, survey)
            found = Found({}, "")
            await self._seek(self._pins(), frozenset(wanted), survey, found)
            for more in self._more:
                await self._seek(iter(await more(survey)), frozenset(wanted), survey, found)
            found.missed = survey.example
            return found

    async def _seek(
        self, pins: Iterator[Pin], wanted: frozenset[ChunkId], survey: Survey, found: Found
    ) -> None:
        keys_wanted = keys_of(np.frombuffer(b"".join(wanted), np.uint8).reshape(-1, 32))
        while batch := list(islice(pins, BATCH_MANIFESTS)):
            await trio.lowlevel.checkpoint()
            read = await self._read_missing(batch, survey)
            for pin in batch:
                name = pin.manifest.id
                if name in read:
                    self._known.add(name, read[name])
                references = read.get(name, self._known.get(name))
                if references is None and name in wanted:  # the very chunk that cannot be read
                    found.note(pin.manifest.placed, pin)
                if references is not None and np.isin(references["key"], keys_wanted).any():
                    try:
                        await self._name(pin, wanted, found)
                    except ModelfsError as error:
                        survey.miss(f"manifest {name.hex()[:16]} cannot be read: {error}")

    async def _name(self, pin: Pin, wanted: frozenset[ChunkId], found: Found) -> None:
        """Note what one manifest says of the chunks that are looked for."""
        tables: list[Entries] = []
        own = await self._read_tables(pin, tables.append)
        for placed in own:
            if placed.ref.id in wanted:
                found.note(placed, pin)
        for table in tables:
            for row in np.flatnonzero(np.isin(table["id"], _as_names(wanted))).tolist():
                entry = placed_chunk(table[row])
                assert entry is not None, "nobody looks for holes"
                found.note(entry, pin)

    def _told(self, survey: Survey) -> Survey:
        if survey.unreadable:
            text = "nothing can be reclaimed now, for %d reasons: %s"
            self._quiet.warning("unreadable", text, survey.unreadable, survey.example)
        return survey

    async def _mark_all(self, survey: Survey) -> _Cache:
        """Mark what every manifest names; returns what to keep for the next time."""
        keeping = _Cache()
        waiting = _Marks(survey.holdings)
        await self._mark(self._pins(), survey, waiting, keeping)
        for more in self._more:  # after the mirror's: what it supersedes meanwhile is there
            await self._mark(iter(await more(survey)), survey, waiting, keeping)
        await waiting.flush()
        return keeping

    async def _mark(
        self, pins: Iterator[Pin], survey: Survey, waiting: _Marks, keeping: _Cache
    ) -> None:
        while batch := list(islice(pins, BATCH_MANIFESTS)):
            await trio.lowlevel.checkpoint()
            read = await self._read_missing(batch, survey)
            for pin in batch:
                name = pin.manifest.id
                references = read.get(name)
                if references is None:
                    references = self._known.get(name)
                if references is not None:  # else it is unreadable, and noted
                    await waiting.add(references, pin.replicas)
                    keeping.add(name, references)

    def _pins(self) -> Iterator[Pin]:
        """All manifests that matter. The mirror may change while this is read.

        What is committed meanwhile was put or renewed meanwhile, so it is not deleted.
        """
        mirror = self._feed.mirror
        for ino in mirror.inode_numbers():
            pin = _pin_of(mirror, ino)
            if pin is not None:
                yield pin
        for pins in list(mirror.pins.values()):
            yield from list(pins.values())

    async def _read_missing(self, pins: list[Pin], survey: Survey) -> dict[bytes, References]:
        """What the manifests name that are not known from the last time."""
        read: dict[bytes, References] = {}
        unknown = [pin for pin in pins if self._known.get(pin.manifest.id) is None]
        missing = iter({pin.manifest.id: pin for pin in unknown}.values())

        async def work() -> None:
            for pin in missing:
                try:
                    read[pin.manifest.id] = await self._read(pin)
                except (ModelfsError, OSError) as error:
                    name = pin.manifest.id.hex()[:16]
                    survey.miss(f"manifest {name} cannot be read: {error}")

        async with trio.open_nursery() as nursery:
            for _ in range(READERS):
                nursery.start_soon(work)
        return read

    async def _read(self, pin: Pin) -> References:
        parts: list[References] = []
        own = await self._read_tables(pin, lambda table: parts.append(references_of_entries(table)))
        return np.concatenate([references_of(own), *parts])

    async def _read_tables(self, pin: Pin, take: Callable[[Entries], None]) -> list[PlacedChunk]:
        """Read a manifest, a table of entries at a time; returns the chunks that it consists of."""
        root = pin.manifest.placed
        data = await self._chunks.read(root, pin.replicas, 0, root.ref.length)
        table = manifest.decode(data)
        if not table.is_paged:
            take(table.table)
        for page in table.missing_pages():
            placed = table.page_chunk(page)
            data = await self._chunks.read(placed, pin.replicas, 0, placed.ref.length)
            table.add_page(page, data)
            take(table.pages.pop(page))
        return [root, *table.own_chunks()]


class _Cache:
    """What manifests name, by their chunk id, up to `CACHE_BYTES_MAX`."""

    def __init__(self) -> None:
        self.used_bytes = 0
        self._references: dict[bytes, References] = {}

    def get(self, name: bytes) -> References | None:
        return self._references.get(name)

    def add(self, name: bytes, references: References) -> None:
        size = references.nbytes + MANIFEST_OVERHEAD_BYTES
        if name not in self._references and self.used_bytes + size <= CACHE_BYTES_MAX:
            self._references[name] = references
            self.used_bytes += size


class _Marks:
    """Collects references, to match many at once, off trio's thread."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._parts: list[References] = []
        self._replicas: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []
        self._rows = 0

    async def add(self, references: References, replicas: int) -> None:
        self._parts.append(references)
        self._replicas.append(np.full(len(references), max(1, replicas), np.uint8))
        self._rows += len(references)
        if self._rows >= MARK_ROWS:
            await self.flush()

    async def flush(self) -> None:
        if not self._parts:
            return
        references, replicas = np.concatenate(self._parts), np.concatenate(self._replicas)
        self._parts, self._replicas, self._rows = [], [], 0
        await trio.to_thread.run_sync(self._holdings.mark, references, replicas)


def _as_names(chunks: Collection[ChunkId]) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """Ids as the entries of manifests have them."""
    return np.frombuffer(b"".join(chunks), "V32")


def _pin_of(mirror: Mirror, ino: InodeNumber) -> Pin | None:
    """A current version, as a pin; None if it has no chunks."""
    record = mirror.readable_inode(ino)
    if record is None or record.manifest is None:
        return None
    return Pin(record.manifest, record.replicas)


def _miss_unreadable(mirror: Mirror, survey: Survey) -> None:
    """A record that cannot be read may be a version's, or say where chunks are."""
    for key, (reason, _) in mirror.unreadable.items():
        if key.startswith(NEEDED_PREFIXES):
            survey.miss(str(RecordUnreadable(key, reason)))


def _why_not_trusted(mirror: Mirror) -> str:
    """A namespace without a root, or of no cluster, is an accident of etcd's and not an order."""
    if mirror.inode_row(ROOT_INODE) is None:
        return "the namespace has no root directory"
    if mirror.other(keys.CLUSTER) is None:
        return "etcd does not know the cluster any more"
    return ""
