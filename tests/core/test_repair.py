"""Repair: copies become complete again, nobody deletes the last ones, nobody acts for ever."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from modelfs.chunk import ChunkRef
from modelfs.holdings import Holdings, references_of
from modelfs.ids import ChunkId, Epoch, NodeId
from modelfs.manifest import PlacedChunk
from modelfs.mirror import Mirror
from modelfs.placement import Member, PlacementMap, make_map
from modelfs.repair import DownTimes, Nodes, full_order, make_case, make_cases, spares

IDS = [NodeId(f"{number:016x}") for number in range(6)]
CHUNK = ChunkId(bytes(range(32)))


def map_of(nodes: list[NodeId], epoch: int, zones: str = "") -> PlacementMap:
    return make_map(
        Epoch(epoch),
        [Member(node, node, 1.0, zones[i % len(zones)] if zones else "") for i, node in
         enumerate(nodes)],
    )  # fmt: skip


@dataclass
class World:
    """Who holds one chunk, and which node sees whom as up or out."""

    by: PlacementMap
    latest: PlacementMap
    replicas: int
    holders: set[NodeId]
    up: set[NodeId]
    out: dict[NodeId, set[NodeId]] = field(default_factory=dict)
    copies_made: int = 0
    deleted: int = 0

    def act(self, me: NodeId) -> None:
        """One round of one node."""
        if me not in self.holders or me not in self.up:
            return
        out = frozenset(self.out.get(me, set()) - {me})
        nodes = Nodes(me, frozenset(self.up - out), out)
        full = full_order(CHUNK, self.replicas, self.by, self.latest)
        case = make_case(0, full, self.replicas, nodes)
        decision = case.decide(nodes, {n for n in case.to_ask(nodes) if n in self.holders})
        assert self.up.issuperset(decision.copy_to)
        self.copies_made += len(decision.copy_to)
        self.holders.update(decision.copy_to)
        if decision.is_surplus:
            self.holders.discard(me)
            self.deleted += 1


@st.composite
def worlds(draw: st.DrawFn) -> World:
    founders = draw(st.integers(1, 6))
    replicas = draw(st.integers(1, 3))
    zones = draw(st.sampled_from(["", "ab", "abc"]))
    by = map_of(IDS[:founders], 1, zones)
    latest = draw(st.sampled_from([by, map_of(IDS, 2, zones), map_of(IDS[1:], 2, zones)]))
    everyone = sorted({member.id for map_ in (by, latest) for member in map_.members})
    up = draw(st.sets(st.sampled_from(everyone), min_size=1))
    holders = draw(st.sets(st.sampled_from(everyone), min_size=1))
    return World(by, latest, replicas, holders, up)


@given(worlds(), st.randoms(use_true_random=False))
def test_a_chunk_with_a_living_copy_gets_all_of_them_in_two_rounds(
    world: World, chance: Random
) -> None:
    if not world.holders & world.up:
        world.holders.add(min(world.up))
    everyone = sorted(world.up)
    world.out = {node: {other for other in IDS if other not in world.up} for node in everyone}
    for _ in range(2):
        chance.shuffle(everyone)
        for node in everyone:
            world.act(node)
    living = world.holders & world.up
    assert len(living) == min(world.replicas, len(world.up))
    copies_made, deleted = world.copies_made, world.deleted
    for node in everyone:
        world.act(node)
    assert (world.copies_made, world.deleted) == (copies_made, deleted), "it never comes to rest"


@given(worlds(), st.data())
def test_whatever_each_believes_nobody_deletes_the_last_copies(
    world: World, data: st.DataObject
) -> None:
    """Each node has its own idea of who is out; all of them are wrong."""
    beliefs = st.sets(st.sampled_from(IDS))
    world.out = {node: data.draw(beliefs) for node in sorted(world.up)}
    for node in data.draw(st.lists(st.sampled_from(sorted(world.up)), max_size=20)):
        before = len(world.holders & world.up)
        world.act(node)
        after = len(world.holders & world.up)
        assert after >= min(before, world.replicas)


@given(worlds())
def test_one_node_alone_is_responsible(world: World) -> None:
    acting = []
    for me in sorted(world.up & world.holders):
        nodes = Nodes(me, frozenset(world.up), frozenset())
        full = full_order(CHUNK, world.replicas, world.by, world.latest)
        case = make_case(0, full, world.replicas, nodes)
        holders = {node for node in case.to_ask(nodes) if node in world.holders}
        acting += [me] if case.decide(nodes, holders).copy_to else []
    assert len(acting) <= 1


def test_a_node_that_is_down_but_not_out_keeps_its_place() -> None:
    by = map_of(IDS[:3], 1)
    order = by.candidates(CHUNK, 2)
    world = World(by, by, 2, {order[0], order[1]}, {order[0], order[2]})
    world.act(order[0])
    assert world.copies_made == 0
    world.out = {order[0]: {order[1]}}
    world.act(order[0])
    assert world.holders == set(order)
    world.up.add(order[1])  # it is back, with its copy
    for node in order:
        world.act(node)
    assert world.holders == {order[0], order[1]}


@settings(max_examples=40)
@given(
    st.lists(st.binary(min_size=32, max_size=32), unique_by=lambda id: id[:8], max_size=30),
    st.integers(1, 3),
    st.sets(st.sampled_from(IDS)),
    st.sampled_from(["", "ab"]),
)
def test_many_cases_at_once_are_the_cases_one_by_one(
    ids: list[bytes], replicas: int, out: set[NodeId], zones: str
) -> None:
    mirror, me = Mirror(), IDS[0]
    for placement in (map_of(IDS[:2], 1, zones), map_of(IDS, 2, zones)):
        mirror.maps[placement.epoch] = mirror.latest_map = placement
    nodes = Nodes(me, frozenset(IDS), frozenset(out - {me}))
    holdings = Holdings.of((ChunkId(id), 0.0) for id in ids)
    named = [
        PlacedChunk(ChunkRef(ChunkId(id), 0, 1), Epoch(1 + id[31] % 3)) for id in ids
    ]  # a map of epoch 3 is not known: the latest counts
    holdings.mark(references_of(named), np.full(len(ids), replicas, np.uint8))
    rows = np.arange(len(holdings))
    cases = {case.row: case for case in make_cases(holdings, rows, mirror, nodes)}
    assert sorted(cases) == rows.tolist()
    for row, case in cases.items():
        assert mirror.latest_map is not None
        by = mirror.maps.get(Epoch(int(holdings.epochs[row])), mirror.latest_map)
        full = full_order(holdings.chunk(row), replicas, by, mirror.latest_map)
        alone = make_case(row, full, replicas, nodes)
        assert case.desired == alone.desired
        assert set(case.to_ask(nodes)) == set(alone.to_ask(nodes))


def test_spares_are_living_nodes_that_need_not_hold_the_chunk() -> None:
    nodes = Nodes(IDS[0], frozenset(IDS[:4]), frozenset())
    assert spares(tuple(IDS), (IDS[1],), nodes) == (IDS[2], IDS[3])


def test_down_times_count_from_when_a_node_was_first_missed() -> None:
    down = DownTimes()
    down.note(IDS[:3], {IDS[0]}, 100.0)
    down.note(IDS[:3], {IDS[0], IDS[1]}, 150.0)
    assert down.next_out_at(150.0, 60.0) == 160.0
    assert down.out(159.0, 60.0) == frozenset()
    assert down.out(160.0, 60.0) == {IDS[2]}
    down.note(IDS[:3], {IDS[0]}, 200.0)
    assert down.out(200.0, 60.0) == {IDS[2]}
    assert down.next_out_at(200.0, 60.0) == 260.0
