"""Placement: balance, proportion, minimal movement, zones, and an order that never changes."""

from __future__ import annotations

import math

import blake3
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelfs.errors import ProtocolError
from modelfs.ids import ChunkId, Epoch, NodeId
from modelfs.placement import (
    EPOCH_MAX,
    MEMBERS_MAX,
    WEIGHT_MAX,
    WEIGHT_MIN,
    Member,
    PlacementMap,
    decode_map,
    make_map,
)

FIRST = Epoch(1)


def node(number: int, weight: float = 1.0, zone: str = "") -> Member:
    """A member whose id comes from a hash, as real ids are random."""
    name = f"n{number}"
    return Member(NodeId(blake3.blake3(name.encode()).hexdigest(length=8)), name, weight, zone)


def chunk_ids(count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """`count` ids, uniform as BLAKE3's are, and the same in every run."""
    return np.random.default_rng(seed).integers(0, 256, (count, 32), dtype=np.uint8)


def placed_names(members: PlacementMap, chunk: bytes, replicas: int) -> list[str]:
    placed = members.place(ChunkId(chunk), replicas)
    return [found.name for id in placed if (found := members.member(id)) is not None]


def dumb_place(members: PlacementMap, chunk: bytes, replicas: int) -> list[NodeId]:
    """The definition, with nothing clever: take the best of a zone that has no replica yet."""
    left = list(members.order(ChunkId(chunk)))
    zone = {member.id: member.zone for member in members.members}
    placed: list[NodeId] = []
    while left and len(placed) < replicas:
        used = {zone[id] for id in placed}
        best = next((id for id in left if zone[id] not in used), left[0])
        placed.append(best)
        left.remove(best)
    return placed


weights = st.floats(0.01, 1000) | st.sampled_from([WEIGHT_MIN, WEIGHT_MAX])
maps = st.lists(
    st.tuples(weights, st.sampled_from(["", "a", "b", "c"])), min_size=1, max_size=12
).map(lambda facts: make_map(FIRST, [node(i, *fact) for i, fact in enumerate(facts)]))
replica_counts = st.integers(1, 6)


@given(maps, replica_counts, st.integers(0, 1 << 32))
@settings(deadline=None)
def test_the_vectorised_placement_agrees_with_the_dumb_one(
    members: PlacementMap, replicas: int, seed: int
) -> None:
    ids = chunk_ids(16, seed)
    rows = members.place_many(ids, replicas)
    assert rows.shape == (16, replicas)
    for row, chunk in zip(rows, ids, strict=True):
        expected = dumb_place(members, chunk.tobytes(), replicas)
        assert [members.members[index].id for index in row if index >= 0] == expected
        assert list(members.place(ChunkId(chunk.tobytes()), replicas)) == expected
        count = len(expected)
        assert (row[:count] >= 0).all()
        assert (row[count:] == -1).all()


def test_placement_in_slices_agrees_with_placement_one_by_one() -> None:
    members = make_map(FIRST, [node(i, 1 + i % 3, f"z{i % 7}") for i in range(100)])
    ids = chunk_ids(3000)  # several slices of 655 rows, and a short last one
    rows = members.place_many(ids, 3)
    for index in range(0, 3000, 37):
        placed = members.place(ChunkId(ids[index].tobytes()), 3)
        assert tuple(members.members[member].id for member in rows[index]) == placed


def test_a_map_without_members_places_nothing() -> None:
    empty = make_map(FIRST, [])
    assert empty.place(ChunkId(bytes(32)), 2) == ()
    assert empty.place_many(chunk_ids(3), 2).tolist() == [[-1, -1]] * 3


# ---------------------------------------------------------------- balance


def test_equal_nodes_hold_equal_shares() -> None:
    """100 nodes, 10^5 chunks, two copies: each node holds within 10 % of its fair 2,000 copies.

    A node's count is binomial (10^5 chunks, p = 1/50), so sigma is 44 copies or 2.2 %; 10 % is
    4.5 sigma, which a hundred fair nodes exceed with probability 0.0007. The ids are fixed, so
    the test gives the same answer each time. The sum of squared deviations over all nodes
    (chi-squared with 99 degrees of freedom, if the counts were independent) is checked too: it
    sees a skew that is spread over many nodes.
    """
    members = make_map(FIRST, [node(i) for i in range(100)])
    rows = members.place_many(chunk_ids(100_000), 2)
    copies = np.bincount(rows.ravel(), minlength=100)
    assert copies.sum() == 200_000
    assert np.abs(copies / 2000 - 1).max() < 0.10
    chi_squared = ((copies - 2000) ** 2 / 2000).sum()
    assert 99 - 4 * math.sqrt(198) < chi_squared < 99 + 4 * math.sqrt(198)


def test_shares_are_in_proportion_to_weights() -> None:
    """The first choice falls on a node with probability weight / total, within 5 sigma."""
    weights = [1.0, 2.0, 4.0, 8.0, 0.5, 100.0]
    members = make_map(FIRST, [node(i, weight) for i, weight in enumerate(weights)])
    first = members.place_many(chunk_ids(100_000), 1)[:, 0]
    copies = np.bincount(first, minlength=len(weights))
    share = np.array([member.weight for member in members.members]) / sum(weights)
    sigma = np.sqrt(100_000 * share * (1 - share))
    assert (np.abs(copies - 100_000 * share) < 5 * sigma).all()


def test_the_second_choice_is_independent_of_the_first() -> None:
    """A dead node's chunks are spread evenly over all others, so no single one inherits them."""
    members = make_map(FIRST, [node(i) for i in range(10)])
    rows = members.place_many(chunk_ids(90_000), 2)
    heirs = np.bincount(rows[rows[:, 0] == 3, 1], minlength=10)
    fair = heirs.sum() / 9
    assert heirs[3] == 0
    assert (np.abs(np.delete(heirs, 3) - fair) < 5 * math.sqrt(fair)).all()


# ---------------------------------------------------------------- movement


@given(maps, replica_counts, st.floats(0.01, 1000), st.sampled_from(["", "a", "new"]))
@settings(deadline=None)
def test_chunks_move_only_to_a_node_that_joins(
    members: PlacementMap, replicas: int, weight: float, zone: str
) -> None:
    newcomer = node(99, weight, zone)
    larger = members.with_member(newcomer)
    assert larger.epoch == members.epoch + 1
    for chunk in chunk_ids(20):
        before = set(members.place(ChunkId(chunk.tobytes()), replicas))
        after = set(larger.place(ChunkId(chunk.tobytes()), replicas))
        assert after - before <= {newcomer.id}
        assert len(before - after) <= 1


@given(maps, replica_counts, st.data())
@settings(deadline=None)
def test_only_the_chunks_of_a_node_that_leaves_move(
    members: PlacementMap, replicas: int, data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(members.members))
    smaller = members.without_member(gone.id)
    assert smaller.epoch == members.epoch + 1
    assert smaller.member(gone.id) is None
    for chunk in chunk_ids(20):
        before = set(members.place(ChunkId(chunk.tobytes()), replicas))
        after = set(smaller.place(ChunkId(chunk.tobytes()), replicas))
        assert before - after <= {gone.id}
        if gone.id not in before:
            assert after == before


def test_a_join_moves_the_newcomers_share_and_no_more() -> None:
    """From 50 to 51 equal nodes 2/51 of the chunks get a copy on the new one, within 5 sigma."""
    members = make_map(FIRST, [node(i) for i in range(50)])
    larger = members.with_member(node(50))
    ids = chunk_ids(50_000)
    name = np.array([m.id for m in members.members])
    names_after = np.array([m.id for m in larger.members])
    before = np.sort(name[members.place_many(ids, 2)], axis=1)
    after = np.sort(names_after[larger.place_many(ids, 2)], axis=1)
    moved = int((before != after).any(axis=1).sum())
    share = 2 / 51
    assert abs(moved - 50_000 * share) < 5 * math.sqrt(50_000 * share)


def test_a_new_weight_moves_chunks_to_or_from_that_node_only() -> None:
    members = make_map(FIRST, [node(i) for i in range(20)])
    heavier = members.with_member(node(7, 2.0))
    assert len(heavier.members) == 20
    for chunk in chunk_ids(500):
        before = set(members.place(ChunkId(chunk.tobytes()), 2))
        after = set(heavier.place(ChunkId(chunk.tobytes()), 2))
        assert after - before <= {node(7).id}


# ---------------------------------------------------------------- zones, hand-offs


@given(maps, replica_counts, st.integers(0, 1 << 32))
@settings(deadline=None)
def test_no_zone_is_used_twice_while_another_is_unused(
    members: PlacementMap, replicas: int, seed: int
) -> None:
    zone = {member.id: member.zone for member in members.members}
    for chunk in chunk_ids(8, seed):
        placed = members.place(ChunkId(chunk.tobytes()), replicas)
        assert len(placed) == len(set(placed)) == min(replicas, len(members.members))
        zones_used = {zone[id] for id in placed}
        assert len(zones_used) == min(len(placed), len(set(zone.values())))


@given(maps, replica_counts, st.integers(0, 1 << 32))
@settings(deadline=None)
def test_candidates_are_the_placed_nodes_and_then_the_rest_in_order(
    members: PlacementMap, replicas: int, seed: int
) -> None:
    chunk = ChunkId(chunk_ids(1, seed)[0].tobytes())
    placed = members.place(chunk, replicas)
    candidates = members.candidates(chunk, replicas)
    assert candidates[: len(placed)] == placed
    rest = [id for id in members.order(chunk) if id not in placed]
    assert list(candidates[len(placed) :]) == rest


# ---------------------------------------------------------------- for all time


def golden_map() -> PlacementMap:
    return make_map(FIRST, [node(i, 1.0 + i % 4, "xyz"[i % 3]) for i in range(8)])


GOLDEN = [
    "07543261",
    "42653701",
    "64572310",
    "73516240",
    "13270645",
    "37216405",
    "73546210",
    "37264051",
    "53162704",
    "75362014",
    "65701243",
    "26735401",
    "76520134",
    "62453071",
    "27314650",
    "76203154",
    "75314620",
    "64275130",
    "67230154",
    "76213540",
    "72356140",
    "72346501",
    "62701534",
    "70235164",
]


def test_the_order_never_changes() -> None:
    """Golden values. If this fails the change is wrong: all stored chunks would be misplaced."""
    members = golden_map()
    found = [
        "".join(name[1:] for name in placed_names(members, blake3.blake3(bytes([i])).digest(), 8))
        for i in range(24)
    ]
    assert found == GOLDEN


def test_many_placements_hash_to_the_golden_value() -> None:
    """Every bit of the arithmetic, over 10^4 chunks and 40 nodes."""
    members = make_map(FIRST, [node(i, 0.5 + i, f"zone {i % 6}") for i in range(40)])
    seeds = np.arange(10_000, dtype="<u4")
    ids = np.frombuffer(
        b"".join(blake3.blake3(seed.tobytes()).digest() for seed in seeds), dtype=np.uint8
    ).reshape(-1, 32)
    rows = members.place_many(ids, 40).astype("<i4")
    assert blake3.blake3(rows.tobytes()).hexdigest(length=8) == "15dc9583f7fc482d"


# ---------------------------------------------------------------- the record


@given(maps)
def test_a_map_survives_encoding(members: PlacementMap) -> None:
    assert decode_map(members.encode()) == members


def test_the_largest_map_fits_its_record() -> None:
    label = "\N{GREEK SMALL LETTER ALPHA}" * 32
    largest = make_map(
        Epoch(EPOCH_MAX),
        [Member(NodeId(f"{i:016x}"), label, 1e9, label) for i in range(MEMBERS_MAX)],
    )
    assert decode_map(largest.encode()) == largest
    with pytest.raises(ValueError, match="1025 members"):
        make_map(FIRST, [*largest.members, Member(NodeId("f" * 16), "n", 1, "")])


@given(st.binary(max_size=200))
def test_bytes_that_are_no_map_are_a_protocol_error(record: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_map(record)


@pytest.mark.parametrize(
    "rows",
    [
        [["0" * 15, "n", 1.0, ""]],
        [["0" * 16, "n", 0.0, ""]],
        [["0" * 16, "n", 1e-308, ""]],
        [["0" * 16, "n", -1.0, ""]],
        [["0" * 16, "n", math.nan, ""]],
        [["0" * 16, "n", math.inf, ""]],
        [["0" * 16, "n\x00", 1.0, ""]],
        [["0" * 16, "n" * 65, 1.0, ""]],
        [["0" * 16, "n", 1.0, "z\n"]],
        [["0" * 16, "n", 1.0]],
        [["1" * 16, "n", 1.0, ""], ["0" * 16, "n", 1.0, ""]],
        [["0" * 16, "n", 1.0, ""], ["0" * 16, "n", 1.0, ""]],
        [[f"{i:016x}", "n", 1.0, ""] for i in range(MEMBERS_MAX + 1)],
    ],
)
def test_a_malformed_member_is_a_protocol_error(rows: list[list[object]]) -> None:
    with pytest.raises(ProtocolError):
        decode_map(msgspec.msgpack.encode([1, 1, rows]))


@pytest.mark.parametrize("head", [[2, 1], [1, 0], [1, 1 << 32], [1, "1"]])
def test_an_unknown_format_or_epoch_is_a_protocol_error(head: list[object]) -> None:
    with pytest.raises(ProtocolError):
        decode_map(msgspec.msgpack.encode([*head, []]))


def test_an_oversized_record_is_not_even_parsed() -> None:
    with pytest.raises(ProtocolError, match="bytes"):
        decode_map(bytes(300_000))


def test_a_map_cannot_hold_two_members_with_one_id() -> None:
    with pytest.raises(ValueError, match="twice"):
        make_map(FIRST, [node(1), node(1, 2.0)])
