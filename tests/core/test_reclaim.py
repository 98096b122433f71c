"""Holdings and reclaim: what is needed, and when the rest may go."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from modelfs import reclaim
from modelfs.chunk import ChunkRef
from modelfs.holdings import REFERENCE, Holdings, references_of, references_of_entries
from modelfs.ids import ChunkId, Epoch
from modelfs.limits import CHUNK_BYTES_MIN
from modelfs.manifest import PAGE_ENTRIES, Manifest, PlacedChunk
from modelfs.reclaim import Waiting
from modelfs.stripe import span

GRACE = 100.0


def name(number: int, tail: int = 0) -> ChunkId:
    """A chunk id; those with the same `number` share their first 8 bytes, the key."""
    return ChunkId(number.to_bytes(8, "big") + bytes(23) + bytes([tail]))


def placed(chunk: ChunkId, epoch: int = 1) -> PlacedChunk:
    return PlacedChunk(ChunkRef(chunk, 7, 9), Epoch(epoch))


def holding(*numbers: int, put_at: float = 5.0) -> Holdings:
    return Holdings.of((name(number), put_at) for number in numbers)


# ---------------------------------------------------------------- what is needed


@given(
    held=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 2)), unique=True),
    named=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 4), st.integers(1, 3))),
)
def test_a_chunk_is_needed_exactly_if_its_key_is_named(
    held: list[tuple[int, int]], named: list[tuple[int, int, int]]
) -> None:
    holdings = Holdings.of((name(*one), 1.0) for one in held)
    references = references_of(placed(name(number), epoch) for number, epoch, _ in named)
    holdings.mark(references, np.array([replicas for *_, replicas in named], np.uint8))
    assert sorted(holdings.chunk(row) for row in range(len(holdings))) == sorted(
        name(*one) for one in held
    )
    for row in range(len(holdings)):
        number = int.from_bytes(holdings.chunk(row)[:8], "big")
        mine = [one for one in named if one[0] == number]
        assert holdings.replicas[row] == max((replicas for *_, replicas in mine), default=0)
        assert holdings.epochs[row] == max((epoch for _, epoch, _ in mine), default=0)


@given(st.sets(st.integers(0, PAGE_ENTRIES + 40), max_size=20), st.booleans())
def test_a_manifest_names_its_chunks_and_pages_and_no_holes(used: set[int], paged: bool) -> None:
    count = PAGE_ENTRIES + 50 if paged else 64
    chunks = {index: placed(name(index + 1)) for index in used if index < count}
    size = sum(span(CHUNK_BYTES_MIN, count - 1))
    table, pages = Manifest.empty(CHUNK_BYTES_MIN).changed(size, chunks)
    table = table.with_pages_stored({page: placed(name(10**6 + page)) for page in pages})
    parts = [references_of(table.own_chunks()), references_of_entries(table.entries())]
    keys = set(np.concatenate(parts)["key"].tolist())
    wanted = [one.ref.id for one in (*chunks.values(), *table.own_chunks())]
    assert keys == {int.from_bytes(chunk[:8], "little") for chunk in wanted}


def test_nothing_held_and_nothing_named_is_no_special_case() -> None:
    holdings = holding()
    holdings.mark(np.zeros(0, REFERENCE), np.zeros(0, np.uint8))
    waiting, ripe = reclaim.watch(Waiting.nothing(), holdings, ~holdings.is_needed, 0.0, GRACE)
    assert (len(waiting), len(ripe), len(holdings)) == (0, 0, 0)


# ---------------------------------------------------------------- when it may go


def test_an_old_chunk_that_has_just_become_unneeded_waits_for_a_whole_grace() -> None:
    holdings = holding(1, put_at=-1e6)
    unneeded = np.array([True])
    waiting, ripe = reclaim.watch(Waiting.nothing(), holdings, unneeded, 1000.0, GRACE)
    assert not len(ripe)
    assert waiting.next_ripe_at(1000.0, GRACE) == 1000.0 + GRACE
    waiting, ripe = reclaim.watch(waiting, holdings, unneeded, 1099.9, GRACE)
    assert not len(ripe)
    _, ripe = reclaim.watch(waiting, holdings, unneeded, 1100.0, GRACE)
    assert ripe.tolist() == [0]


def test_a_clock_that_jumps_ripens_nothing() -> None:
    unneeded = np.array([True])
    waiting, _ = reclaim.watch(Waiting.nothing(), holding(1), unneeded, 0.0, GRACE)
    for put_at in (5.0 + 1e9, 5.0 - 1e9):  # renewed under another time of day
        holdings = holding(1, put_at=put_at)
        _, ripe = reclaim.watch(waiting, holdings, unneeded, GRACE + 1, GRACE)
        assert not len(ripe)


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[float, dict[int, tuple[float, bool]]]]:
    """Looks: (time, chunk -> (put_at, is it needed)), in the order of time."""
    now, looks = 0.0, []
    for _ in range(draw(st.integers(1, 12))):
        now += draw(st.sampled_from([1.0, 30.0, 50.0, 100.0]))
        chunks = draw(
            st.dictionaries(
                st.integers(0, 3), st.tuples(st.sampled_from([1.0, 2.0]), st.booleans())
            )
        )
        looks.append((now, chunks))
    return looks


@given(histories())
def test_what_is_ripe_was_seen_unneeded_and_untouched_for_a_grace(
    looks: list[tuple[float, dict[int, tuple[float, bool]]]],
) -> None:
    waiting = Waiting.nothing()
    since: dict[int, tuple[float, float]] = {}  # the same rule, one chunk at a time
    for now, chunks in looks:
        holdings = Holdings.of((name(number), put) for number, (put, _) in chunks.items())
        numbers = [int.from_bytes(holdings.chunk(row)[:8], "big") for row in range(len(holdings))]
        unneeded = np.array([not chunks[number][1] for number in numbers], np.bool_)
        waiting, ripe = reclaim.watch(waiting, holdings, unneeded, now, GRACE)
        since = {
            number: since[number] if since.get(number, (0, None))[1] == put else (now, put)
            for number, (put, is_needed) in chunks.items()
            if not is_needed
        }
        expected = {number for number, (start, _) in since.items() if now - start >= GRACE}
        assert {numbers[row] for row in ripe.tolist()} == expected
