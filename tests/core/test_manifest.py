"""Manifests, against a plain list: any sequence of changes, at sizes around the page borders."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from modelfs import manifest as manifests
from modelfs.chunk import ChunkRef, describe
from modelfs.errors import ProtocolError
from modelfs.ids import ChunkId, Epoch
from modelfs.inode import ManifestRef
from modelfs.limits import CHUNK_BYTES_MIN, FILE_BYTES_MAX, MIB
from modelfs.manifest import PAGE_ENTRIES, Manifest, PlacedChunk
from modelfs.placement import EPOCH_MAX
from modelfs.stripe import chunk_count, span

CHUNK = CHUNK_BYTES_MIN  # the smallest, so that files of several pages are only gigabytes
counts = st.one_of(
    st.integers(0, 12),
    st.integers(0, 3).flatmap(
        lambda pages: st.integers(-2, 2).map(lambda near: max(0, pages * PAGE_ENTRIES + near))
    ),
    st.integers(0, 3 * PAGE_ENTRIES),
)


def size_of(count: int, less: int) -> int:
    """The size in bytes of a file with this many chunks, the last one `less` bytes short."""
    return sum(span(CHUNK, count - 1)) - less if count else 0


def a_chunk(number: int) -> PlacedChunk:
    """Some chunk."""
    name = ChunkId(number.to_bytes(32, "big"))
    return PlacedChunk(ChunkRef(name, number * 7, 1 + number % CHUNK), Epoch(1 + number % 5))


@dataclass
class Stored:
    """A manifest that goes through its stored form at each step, and the list that it stands for.

    Only the pages that `pages_to_change` asks for are loaded before a change.
    """

    manifest: Manifest = field(default_factory=lambda: Manifest.empty(CHUNK))
    model: list[PlacedChunk | None] = field(default_factory=list)
    chunks: dict[bytes, bytes] = field(default_factory=dict)

    def change(self, size: int, changes: dict[int, PlacedChunk | None]) -> None:
        for page in self.manifest.pages_to_change(size, changes):
            self.load(page)
        changed, pages = self.manifest.changed(size, changes)
        places = {page: self.store(data) for page, data in pages.items()}
        self.manifest = manifests.decode(changed.with_pages_stored(places).encode())
        count = chunk_count(CHUNK, size)
        self.model = (self.model + [None] * count)[:count]
        for index, chunk in changes.items():
            if index < count:
                self.model[index] = chunk

    def store(self, data: bytes) -> PlacedChunk:
        ref, _ = describe(data)
        self.chunks[ref.id] = data
        return PlacedChunk(ref, Epoch(3))

    def load(self, page: int) -> None:
        self.manifest.add_page(page, self.chunks[self.manifest.page_chunk(page).ref.id])

    def check(self, size: int) -> None:
        assert self.manifest.size == size
        assert self.manifest.count == len(self.model)
        probes = {0, 1, len(self.model) // 2, *range(len(self.model) - 2, len(self.model) + 3)}
        for index in sorted(probe for probe in probes if probe >= 0):
            page = self.manifest.page_of(index)
            if page is not None:
                self.load(page)
            want = self.model[index] if index < len(self.model) else None
            assert self.manifest.entry(index) == want
        for page in self.manifest.missing_pages():
            self.load(page)
        entries = self.manifest.entries()
        assert [manifests.placed_chunk(entry) for entry in entries] == self.model


steps = st.lists(
    st.tuples(
        counts,
        st.integers(0, CHUNK // 8),
        st.lists(st.tuples(counts, st.booleans()), max_size=4),
    ),
    min_size=1,
    max_size=5,
)


@given(steps)
@example([(5000, 0, [(2049, True), (4999, True), (10, True)]), (4096, 0, [])])
@example([(4097, 0, [(4095, True)]), (0, 0, []), (2049, 0, [])])
def test_a_manifest_is_a_list_of_chunks(
    plan: list[tuple[int, int, list[tuple[int, bool]]]],
) -> None:
    stored, number = Stored(), 1
    for count, less, touched in plan:
        changes: dict[int, PlacedChunk | None] = {}
        for index, is_chunk in touched:
            number += 1
            changes[index] = a_chunk(number) if is_chunk else None
        size = size_of(count, less)
        stored.change(size, changes)
        # What is not loaded here stays unloaded for the next change: copy, do not share.
        probe = Stored(manifests.decode(stored.manifest.encode()), stored.model, stored.chunks)
        probe.check(size)


def test_a_small_change_of_a_large_file_stores_one_page() -> None:
    stored = Stored()
    every = {index: a_chunk(index + 1) for index in range(3 * PAGE_ENTRIES)}
    stored.change(size_of(3 * PAGE_ENTRIES, 0), dict(every))
    assert len(stored.chunks) == 3
    stored.change(size_of(3 * PAGE_ENTRIES, 0), {PAGE_ENTRIES + 5: a_chunk(99_999)})
    assert len(stored.chunks) == 4
    own = list(stored.manifest.own_chunks())
    assert len(own) == 3 and own[0] != own[1]


@given(st.binary(max_size=400))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        manifests.decode(data)


def test_a_damaged_root_is_refused_or_is_another_root(rng: Random) -> None:
    changed, _ = Manifest.empty(4 * MIB).changed(9 * MIB, {0: a_chunk(1), 8: a_chunk(2)})
    good = changed.encode()
    for _ in range(2000):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        cut = bytes(bad[: rng.choice([len(bad), rng.randrange(len(bad))])])
        try:
            found = manifests.decode(cut)
        except ProtocolError:
            continue
        assert found.encode() == cut and found.size <= FILE_BYTES_MAX
        list(found.entries())


def test_a_page_of_the_wrong_size_is_refused() -> None:
    stored = Stored()
    stored.change(size_of(PAGE_ENTRIES + 2, 0), {0: a_chunk(1), PAGE_ENTRIES: a_chunk(2)})
    (page,) = [page for page in stored.manifest.missing_pages() if page]
    good = stored.chunks[stored.manifest.page_chunk(page).ref.id]
    for bad in (b"", good[:-1], good + bytes(48)):
        with pytest.raises(ProtocolError):
            stored.manifest.add_page(page, bad)


def test_every_epoch_that_a_map_may_have_fits_an_entry() -> None:
    chunk = replace(a_chunk(1), epoch=Epoch(EPOCH_MAX))
    changed, _ = Manifest.empty(CHUNK).changed(size_of(1, 0), {0: chunk})
    assert manifests.decode(changed.encode()).entry(0) == chunk
    assert ManifestRef.of(chunk).placed == chunk


def test_an_empty_manifest_has_a_root() -> None:
    found = manifests.decode(Manifest.empty(4 * MIB).encode())
    assert (found.size, found.count, found.chunk_bytes, len(found.table)) == (0, 0, 4 * MIB, 0)
