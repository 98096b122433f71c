"""Repair: who should hold a chunk, who makes the copies that are missing, whose copy is surplus.

Every node decides for the chunks that it holds, from the same facts: the placement maps, who is up
and who is *out* (down for so long that its copies are replaced, or gone from the map). The chunk's
*order* is the one in which readers look for it: the candidates of the map that placed it, then the
nodes that joined later, in the order of the latest map.

- The *desired holders* are the first `replicas` nodes of the order that are not out.
- The first node of the order that is up and holds the chunk is *responsible*: it makes the copies
  that desired holders lack. So one node acts, and if it dies the next takes over.
- A copy elsewhere is *surplus* once every desired holder is up and confirms its own.

No two nodes can delete their copies because of each other, though their views may differ for a
moment: a surplus copy is deleted only after every desired holder has been asked to *renew* its own,
and a deletion is refused for a copy that was renewed since the deleting node looked at it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from modelfs.holdings import Holdings, Indexes
from modelfs.ids import ChunkId, NodeId
from modelfs.mirror import Mirror
from modelfs.placement import PlacementMap

Order = tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class Nodes:
    """Who is there, as one node sees it. `me` is up and never out."""

    me: NodeId
    up: frozenset[NodeId]
    out: frozenset[NodeId]


@dataclass(frozen=True, slots=True)
class Case:
    """A chunk that this node holds, and who should hold it.

    `order` ends with the desired holders, or with this node if that comes later: what follows
    plays no part.
    """

    row: int  # of the holdings
    order: Order
    desired: Order

    def to_ask(self, nodes: Nodes) -> Order:
        """The nodes that must say whether they hold the chunk, before `decide`."""
        return tuple(node for node in self.order if node in nodes.up and node != nodes.me)

    def decide(self, nodes: Nodes, holders: Collection[NodeId]) -> Decision:
        """What this node does; `holders` are those of `to_ask` that hold the chunk."""
        holding = [node for node in self.order if node in holders or node == nodes.me]
        lacking = [node for node in self.desired if node not in holding]
        return Decision(
            tuple(node for node in lacking if node in nodes.up) if holding[0] == nodes.me else (),
            not lacking and nodes.me not in self.desired,
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """To which nodes this one copies the chunk, and whether its own copy is surplus."""

    copy_to: Order
    is_surplus: bool


class DownTimes:
    """Since when each absent node has been seen to be down. Time is the caller's."""

    def __init__(self) -> None:
        self._since: dict[NodeId, float] = {}

    def note(self, members: Collection[NodeId], up: Collection[NodeId], now: float) -> None:
        """Take a look: who belongs to the cluster, and who of them is up."""
        self._since = {node: self._since.get(node, now) for node in members if node not in up}

    def out(self, now: float, down_out_seconds: float) -> frozenset[NodeId]:
        """The nodes that have been down for so long."""
        return frozenset(
            node for node, since in self._since.items() if now - since >= down_out_seconds
        )

    def next_out_at(self, now: float, down_out_seconds: float) -> float:
        """When the next node will be out; infinite if none is on its way there."""
        times = (since + down_out_seconds for since in self._since.values())
        return min((time for time in times if time > now), default=math.inf)


def full_order(chunk: ChunkId, replicas: int, by: PlacementMap, latest: PlacementMap) -> Order:
    """All nodes in the order in which readers look for a chunk that `by` placed."""
    order = by.candidates(chunk, replicas)
    if by.epoch == latest.epoch:
        return order
    known = set(order)
    return (*order, *(node for node in latest.candidates(chunk, replicas) if node not in known))


def make_case(row: int, full: Order, replicas: int, nodes: Nodes) -> Case:
    """The case of one chunk, from its full order."""
    if nodes.me not in full:
        full = (*full, nodes.me)  # we have left the map, and still hold it
    desired = tuple(node for node in full if node not in nodes.out)[:replicas]
    end = max(full.index(desired[-1]), full.index(nodes.me)) + 1
    return Case(row, full[:end], desired)


def make_cases(holdings: Holdings, rows: Indexes, mirror: Mirror, nodes: Nodes) -> Iterator[Case]:
    """The cases of these rows, which manifests must name.

    For rows where nothing is unusual (this node is one of the holders that the map names, and none
    of those is out) the arithmetic is done for all of them at once.
    """
    latest = mirror.latest_map
    assert latest is not None
    kinds = np.stack([holdings.epochs[rows], holdings.replicas[rows]], axis=1)
    for epoch, replicas in np.unique(kinds, axis=0).tolist():
        some = rows[(kinds == (epoch, replicas)).all(axis=1)]
        by = mirror.maps.get(epoch) or latest
        ids = [member.id for member in by.members]
        names = np.array([*ids, ""], dtype=object)  # -1: no such member
        usual = set(ids) - nodes.out
        placed = names[by.place_many(np.ascontiguousarray(holdings.ids[some]), replicas)]
        for row, desired in zip(some.tolist(), map(tuple, placed.tolist()), strict=True):
            if nodes.me in desired and usual.issuperset(desired):
                yield Case(row, desired, desired)
            else:
                full = full_order(holdings.chunk(row), replicas, by, latest)
                yield make_case(row, full, replicas, nodes)


def spares(full: Order, desired: Order, nodes: Nodes) -> Order:
    """The nodes to try, in order, when a desired holder has no room."""
    return tuple(
        node for node in full if node in nodes.up and node not in desired and node != nodes.me
    )
