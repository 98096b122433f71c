"""Manifests: the ordered chunks of one version of one file.

A manifest is a table of 48-byte entries, one for each chunk position (see `stripe`). It is kept
as chunks itself: a *root*, and for files of more than `PAGE_ENTRIES` chunks a level of *pages*.
So a 1 TiB file opens by reading a root of a few kilobytes, and a change stores the pages that it
touches and a new root. The only description of the format:

    root    HEADER: magic, file size, chunk size, number of entries, number of entries a page
            then the entries, or where there are more than PAGE_ENTRIES, one entry for each page
    page    PAGE_ENTRIES entries (the last page: the rest)
    entry   BLAKE3 name (32), checksum (8), stored length (4), epoch (4), little-endian

The epoch is that of the placement map by which the chunk was placed. An entry of zeros is a
*hole*: it reads as zeros and costs nothing. A chunk that is stored shorter than its position in
the file reads as zeros after its end, so extending a file changes no chunk.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from modelfs.chunk import ChunkRef
from modelfs.errors import ProtocolError
from modelfs.ids import ChunkId, Epoch
from modelfs.limits import CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, FILE_BYTES_MAX
from modelfs.stripe import chunk_count, span

ENTRY = np.dtype([("id", "V32"), ("checksum", "<u8"), ("length", "<u4"), ("epoch", "<u4")])
HEADER = struct.Struct("<8sQIII")
MAGIC = b"mfsMANI1"
PAGE_ENTRIES = 2048  # 96 KiB a page: one change in a large file rewrites that much of its manifest
HOLE = bytes(32)

Entries = npt.NDArray[np.void]

assert ENTRY.itemsize == 48


@dataclass(frozen=True, slots=True)
class PlacedChunk:
    """A chunk and the epoch of the map that says where it is."""

    ref: ChunkRef
    epoch: Epoch


def placed_chunk(entry: np.void) -> PlacedChunk | None:
    """What one entry names; None for a hole."""
    name = bytes(entry["id"])
    if name == HOLE:
        return None
    ref = ChunkRef(ChunkId(name), int(entry["checksum"]), int(entry["length"]))
    return PlacedChunk(ref, Epoch(int(entry["epoch"])))


def _store(entries: Entries, index: int, chunk: PlacedChunk | None) -> None:
    if chunk is None:
        entries[index] = np.zeros((), ENTRY)
    else:
        name = np.void(chunk.ref.id)
        entries[index] = (name, chunk.ref.checksum, chunk.ref.length, chunk.epoch)


def page_count(entry_count: int) -> int:
    """How many pages hold this many entries; 0 if they stand in the root."""
    return -(-entry_count // PAGE_ENTRIES) if entry_count > PAGE_ENTRIES else 0


@dataclass(frozen=True, slots=True, eq=False)
class Manifest:
    """A manifest's root, with those of its pages that have been loaded.

    `table` holds the entries of the file, or of its pages where there are any. Treat the arrays
    as read-only; only `add_page` changes a manifest, and it only adds what the root names.
    """

    size: int  # of the file, bytes
    chunk_bytes: int
    count: int  # entries: chunk positions of the file
    table: Entries
    pages: dict[int, Entries] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def empty(cls, chunk_bytes: int) -> Manifest:
        """The manifest of a file without contents."""
        return cls(0, chunk_bytes, 0, np.zeros(0, ENTRY))

    @property
    def is_paged(self) -> bool:
        """Whether the entries stand in pages of their own."""
        return self.count > PAGE_ENTRIES

    def page_of(self, index: int) -> int | None:
        """The page that must be loaded before `entry(index)`; None if none is missing."""
        if not self.is_paged or index >= self.count:
            return None
        page = index // PAGE_ENTRIES
        if page in self.pages or placed_chunk(self.table[page]) is None:
            return None
        return page

    def page_chunk(self, page: int) -> PlacedChunk:
        """Where a page's bytes are."""
        placed = placed_chunk(self.table[page])
        assert placed is not None, "a page of holes is never loaded"
        return placed

    def add_page(self, page: int, data: bytes | memoryview) -> None:
        """Take a loaded page. Raises `ProtocolError` if it has the wrong size."""
        entries = min(PAGE_ENTRIES, self.count - page * PAGE_ENTRIES)
        if len(data) != entries * ENTRY.itemsize:
            raise ProtocolError(f"manifest page {page} has {len(data)} bytes")
        self.pages[page] = np.frombuffer(data, ENTRY)

    def entry(self, index: int) -> PlacedChunk | None:
        """The chunk at a position; None for a hole and past the end. Its page must be loaded."""
        if index >= self.count:
            return None
        if not self.is_paged:
            return placed_chunk(self.table[index])
        page, within = divmod(index, PAGE_ENTRIES)
        if placed_chunk(self.table[page]) is None:
            return None
        return placed_chunk(self.pages[page][within])

    def entries(self) -> Entries:
        """All entries as one array. Every page must be loaded."""
        if not self.is_paged:
            return self.table
        return np.concatenate([self._page_entries(page) for page in range(len(self.table))])

    def own_chunks(self) -> Iterable[PlacedChunk]:
        """The chunks of the pages (not of the file)."""
        if self.is_paged:
            yield from (
                placed for entry in self.table if (placed := placed_chunk(entry)) is not None
            )

    def hole_bytes(self) -> int:
        """How much of the file lies where no chunk is. A page that is not loaded counts as full."""
        is_hole = np.zeros(self.count + 2, np.bool_)  # with one chunk before and one after
        if not self.is_paged:
            is_hole[1:-1] = self.table["length"] == 0
        for page in range(len(self.table) if self.is_paged else 0):
            first = page * PAGE_ENTRIES
            last = min(first + PAGE_ENTRIES, self.count)
            if self.table[page]["length"] == 0:
                is_hole[first + 1 : last + 1] = True
            elif page in self.pages:
                is_hole[first + 1 : last + 1] = self.pages[page]["length"] == 0
        borders = [
            min(self.size, span(self.chunk_bytes, int(index))[0])
            for index in np.flatnonzero(is_hole[1:] != is_hole[:-1])
        ]
        return sum(borders[1::2]) - sum(borders[::2])

    @property
    def loaded_bytes(self) -> int:
        """What its arrays take in memory."""
        return int(self.table.nbytes + sum(page.nbytes for page in self.pages.values()))

    def missing_pages(self) -> list[int]:
        """The pages that `entries` needs and that are not loaded."""
        if not self.is_paged:
            return []
        return [
            page
            for page in range(len(self.table))
            if page not in self.pages and placed_chunk(self.table[page]) is not None
        ]

    def _page_entries(self, page: int) -> Entries:
        length = min(PAGE_ENTRIES, self.count - page * PAGE_ENTRIES)
        if placed_chunk(self.table[page]) is None:
            return np.zeros(length, ENTRY)
        return self.pages[page]

    def pages_to_change(self, size: int, indexes: Iterable[int]) -> set[int]:
        """The pages that `changed` will need, and that must be loaded first."""
        if not self.is_paged:
            return set()
        count = chunk_count(self.chunk_bytes, size)
        wanted = {index // PAGE_ENTRIES for index in indexes if index < self.count}
        if count != self.count:  # a partial last page changes its length
            wanted.add(max(0, min(count, self.count) - 1) // PAGE_ENTRIES)
        if count <= PAGE_ENTRIES:
            wanted.add(0)
        return {page for page in wanted if self.page_of(page * PAGE_ENTRIES) is not None}

    def changed(
        self, size: int, changes: Mapping[int, PlacedChunk | None]
    ) -> tuple[Manifest, dict[int, bytes]]:
        """The manifest of the next version, and the bytes of the pages that it needs stored.

        The new manifest is complete once `with_pages_stored` has been given the places of those
        pages. Changes past the new end are ignored; positions between the old end and the new
        one that are not in `changes` are holes.
        """
        assert 0 <= size <= FILE_BYTES_MAX
        count = chunk_count(self.chunk_bytes, size)
        kept = {index: chunk for index, chunk in changes.items() if index < count}
        if count <= PAGE_ENTRIES:
            table = np.zeros(count, ENTRY)
            old = self._page_entries(0) if self.is_paged else self.table
            table[: min(count, len(old))] = old[:count]
            for index, chunk in kept.items():
                _store(table, index, chunk)
            return Manifest(size, self.chunk_bytes, count, table), {}
        return self._changed_pages(size, count, kept)

    def _changed_pages(
        self, size: int, count: int, changes: Mapping[int, PlacedChunk | None]
    ) -> tuple[Manifest, dict[int, bytes]]:
        table = np.zeros(page_count(count), ENTRY)
        if self.is_paged:
            shared = min(len(table), len(self.table))
            table[:shared] = self.table[:shared]
        by_page: dict[int, dict[int, PlacedChunk | None]] = {}
        for index, chunk in changes.items():
            page, within = divmod(index, PAGE_ENTRIES)
            by_page.setdefault(page, {})[within] = chunk
        if self.count and count != self.count:  # the page where the lengths part is cut or grows
            by_page.setdefault((min(count, self.count) - 1) // PAGE_ENTRIES, {})
            if not self.is_paged:
                by_page.setdefault(0, {})
        pages = {page: entries for page, entries in self.pages.items() if page < len(table)}
        stored: dict[int, bytes] = {}
        for page, page_changes in by_page.items():
            entries = np.zeros(min(PAGE_ENTRIES, count - page * PAGE_ENTRIES), ENTRY)
            old = self._old_entries(page)[: len(entries)]
            entries[: len(old)] = old
            for within, chunk in page_changes.items():
                _store(entries, within, chunk)
            if entries.tobytes().strip(b"\0"):
                pages[page] = entries
                stored[page] = entries.tobytes()
            else:
                _store(table, page, None)
                pages.pop(page, None)
        return Manifest(size, self.chunk_bytes, count, table, pages), stored

    def _old_entries(self, page: int) -> Entries:
        if self.is_paged:
            return self._page_entries(page) if page < len(self.table) else np.zeros(0, ENTRY)
        return self.table[page * PAGE_ENTRIES : (page + 1) * PAGE_ENTRIES]

    def with_pages_stored(self, places: Mapping[int, PlacedChunk]) -> Manifest:
        """This manifest, naming the given chunks for its changed pages."""
        table = self.table.copy()
        for page, placed in places.items():
            _store(table, page, placed)
        return replace(self, table=table)

    def encode(self) -> bytes:
        """The bytes of the root."""
        head = HEADER.pack(MAGIC, self.size, self.chunk_bytes, self.count, PAGE_ENTRIES)
        return head + self.table.tobytes()


def decode(data: bytes | memoryview) -> Manifest:
    """A root from its bytes. Raises `ProtocolError` if they are not one."""
    if len(data) < HEADER.size:
        raise ProtocolError(f"a manifest root of {len(data)} bytes")
    magic, size, chunk_bytes, count, page_entries = HEADER.unpack_from(data)
    if magic != MAGIC or page_entries != PAGE_ENTRIES:
        raise ProtocolError("not a manifest root of this version of modelfs")
    power_of_two = chunk_bytes & (chunk_bytes - 1) == 0
    if not (CHUNK_BYTES_MIN <= chunk_bytes <= CHUNK_BYTES_MAX and power_of_two):
        raise ProtocolError(f"a manifest with chunks of {chunk_bytes} bytes")
    if size > FILE_BYTES_MAX or count != chunk_count(chunk_bytes, size):
        raise ProtocolError(f"a manifest of {size} bytes with {count} chunks")
    rows = page_count(count) or count
    if len(data) != HEADER.size + rows * ENTRY.itemsize:
        raise ProtocolError(f"a manifest root of {len(data)} bytes for {count} chunks")
    table = np.frombuffer(data, ENTRY, offset=HEADER.size)
    return Manifest(size, chunk_bytes, count, table)
