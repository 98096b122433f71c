"""Placement: which nodes hold a chunk. Computed, never looked up.

A *placement map* is the list of members of one *epoch*. Each member draws, for each chunk, an
exponentially distributed waiting time with rate `weight`; the members in the order of these times
are the chunk's *rendezvous order*, and the first of them hold it. This is weighted rendezvous
hashing, the logarithmic method of Schindelhauer & Schomaker, "Weighted Distributed Hash Tables"
(SPAA 2005), with the score -weight / ln(h) written as its inverse. What follows from it:

- A member is first for weight / (sum of weights) of all chunks.
- A time depends on one member and one chunk only. So when a member joins, chunks move only to it;
  when one leaves, only its own chunks move; a new weight moves chunks to or from that member only.

*Zones.* No two replicas share a zone while another zone has none. So replicas spread over zones
before they follow weights: with two zones and two replicas, each zone holds a copy of everything,
however large it is. Members with the empty zone form one zone, which is called "".

The order is part of the format: it must be the same on every machine, for all time, or chunks
cannot be found. Therefore the hash is written out here (xxh3-64 of the member's id, mixed with the
first 8 bytes of the chunk's BLAKE3 id by the finalizer of splitmix64), and the logarithm is a
fixed sequence of IEEE 754 additions, multiplications and divisions, which are exact to the last
bit everywhere; `log` of libm or numpy is not. The tests pin golden values.

A map is stored as msgpack: [FORMAT, epoch, [[id, name, weight, zone], ...]], members by id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from modelfs.errors import ProtocolError
from modelfs.ids import LABEL_BYTES_MAX, ChunkId, Epoch, NodeId, is_label, is_node_id
from modelfs.limits import RECORD_BYTES_MAX

FORMAT = 1
MEMBERS_MAX = 1024  # a map is one etcd record, and every node watches every other
WEIGHT_MIN, WEIGHT_MAX = 1e-9, 1e9  # a byte and an EiB, in GiB: every time is a finite number
EPOCH_MAX = (1 << 32) - 1  # what an entry of a manifest has room for

assert MEMBERS_MAX * (2 * LABEL_BYTES_MAX + 32) < RECORD_BYTES_MAX

Keys = npt.NDArray[np.uint64]
Times = npt.NDArray[np.float64]

_CELLS_PER_SLICE = 1 << 16  # chunks times members worked on at once: 512 KiB a temporary, in cache
_LN_2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476
_ATANH_TERMS = 9  # |s| <= 0.172, so what is left out is below 1e-15


@dataclass(frozen=True, slots=True)
class Member:
    """A node that holds chunks. Raises ValueError if a field is out of its bounds."""

    id: NodeId
    name: str  # for people; may repeat
    weight: float  # a node's share of the chunks is in proportion to it. By custom GiB
    zone: str  # what may fail together, such as a rack

    def __post_init__(self) -> None:
        if not is_node_id(self.id):
            raise ValueError(f"not a node id: {self.id!r}")
        if not WEIGHT_MIN <= self.weight <= WEIGHT_MAX:  # nor is NaN
            raise ValueError(
                f"node {self.id}: weight {self.weight!r} is not in [{WEIGHT_MIN}, {WEIGHT_MAX}]"
            )
        for label in (self.name, self.zone):
            if not is_label(label):
                raise ValueError(f"node {self.id}: {label!r} is not a name or zone")


@dataclass(frozen=True)
class PlacementMap:
    """The members of one epoch, sorted by id. Raises ValueError if they are not a valid map."""

    epoch: Epoch
    members: tuple[Member, ...]
    _seeds: Keys = field(init=False, repr=False, compare=False)
    _weights: Times = field(init=False, repr=False, compare=False)
    _zones: npt.NDArray[np.int64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.epoch <= EPOCH_MAX:
            raise ValueError(f"epoch {self.epoch} is out of bounds")
        if len(self.members) > MEMBERS_MAX:
            raise ValueError(f"{len(self.members)} members; at most {MEMBERS_MAX} are possible")
        ids = [member.id for member in self.members]
        if ids != sorted(set(ids)):
            raise ValueError("members are not sorted by id, or one occurs twice")
        zones = {zone: index for index, zone in enumerate(sorted({m.zone for m in self.members}))}
        seeds = [xxhash.xxh3_64_intdigest(id.encode()) for id in ids]
        put = object.__setattr__  # the dataclass is frozen; these are derived from its fields
        put(self, "_seeds", np.array(seeds, dtype=np.uint64))
        put(self, "_weights", np.array([m.weight for m in self.members], dtype=np.float64))
        put(self, "_zones", np.array([zones[m.zone] for m in self.members], dtype=np.int64))

    # ------------------------------------------------------------ questions

    def member(self, id: NodeId) -> Member | None:
        """The member with this id, if there is one."""
        return next((member for member in self.members if member.id == id), None)

    def order(self, chunk_id: ChunkId) -> tuple[NodeId, ...]:
        """All members, in the chunk's rendezvous order."""
        return tuple(self.members[index].id for index in self._order(chunk_id))

    def place(self, chunk_id: ChunkId, replicas: int) -> tuple[NodeId, ...]:
        """The members that hold the chunk, first choice first; all of them if there are fewer."""
        return self.candidates(chunk_id, replicas)[:replicas]

    def candidates(self, chunk_id: ChunkId, replicas: int) -> tuple[NodeId, ...]:
        """All members: those that hold the chunk, then those to hand it off to, in order.

        Down the rendezvous order each zone is taken once; if replicas are left when every zone
        has one, the best of the other members take them.
        """
        assert replicas >= 1
        order = [self.members[index] for index in self._order(chunk_id)]
        placed: list[Member] = []
        zones_used: set[str] = set()
        for member in order:
            if len(placed) < replicas and member.zone not in zones_used:
                placed.append(member)
                zones_used.add(member.zone)
        # Those left over follow in rendezvous order: first the rest of the replicas, if all zones
        # have one, and then the hand-offs.
        chosen = {member.id for member in placed}
        rest = (member for member in order if member.id not in chosen)
        return tuple(member.id for member in (*placed, *rest))

    def place_many(self, ids: npt.NDArray[np.uint8], replicas: int) -> npt.NDArray[np.int32]:
        """`place` for many chunks at once.

        `ids` has the shape (n, 32). Returns indices into `members`, of the shape (n, replicas),
        -1 where there are fewer members than replicas. Takes about 13 ns per chunk and member on
        one core, and some 20 MiB besides the result.
        """
        assert replicas >= 1
        assert ids.dtype == np.uint8
        assert ids.shape == (len(ids), 32)
        placed = np.full((len(ids), replicas), -1, dtype=np.int32)
        if not self.members:
            return placed
        keys = np.ascontiguousarray(ids[:, :8]).view("<u8")[:, 0].astype(np.uint64)
        rows = max(1, _CELLS_PER_SLICE // len(self.members))
        for start in range(0, len(keys), rows):
            part = slice(start, start + rows)
            self._choose(self._times(keys[part]), placed[part])
        return placed

    # ------------------------------------------------------------ changes

    def with_member(self, member: Member) -> PlacementMap:
        """The map of the next epoch, in which this member has joined or has changed."""
        others = [other for other in self.members if other.id != member.id]
        return make_map(Epoch(self.epoch + 1), [*others, member])

    def without_member(self, id: NodeId) -> PlacementMap:
        """The map of the next epoch, in which no member has this id."""
        others = [other for other in self.members if other.id != id]
        return make_map(Epoch(self.epoch + 1), others)

    # ------------------------------------------------------------ format

    def encode(self) -> bytes:
        """The record that etcd holds."""
        members = [(m.id, m.name, float(m.weight), m.zone) for m in self.members]
        return msgspec.msgpack.encode((FORMAT, self.epoch, members))

    # ------------------------------------------------------------ arithmetic

    def _order(self, chunk_id: ChunkId) -> Iterator[int]:
        assert len(chunk_id) == 32
        key = np.frombuffer(chunk_id, dtype="<u8", count=1).astype(np.uint64)
        # A tie goes to the smaller id; argmin in `_choose` breaks it in the same way.
        return iter(np.argsort(self._times(key)[0], kind="stable").tolist())

    def _times(self, keys: Keys) -> Times:
        """The waiting time of each member for each chunk: shape (chunks, members)."""
        hashes = _mix(keys[:, None] ^ self._seeds[None, :])
        return _minus_log(hashes) / self._weights

    def _choose(self, times: Times, placed: npt.NDArray[np.int32]) -> None:
        """Fill `placed` (a view) with the zone-aware choice for each row of `times`."""
        rows = np.arange(len(times))
        zone_count = int(self._zones.max()) + 1
        open_zones = times.copy()  # infinite for members of a zone that has a replica
        for column in range(min(placed.shape[1], len(self.members))):
            if column < zone_count:
                chosen = open_zones.argmin(axis=1)
                open_zones[self._zones[chosen][:, None] == self._zones[None, :]] = np.inf
            else:
                chosen = times.argmin(axis=1)
            times[rows, chosen] = np.inf
            placed[:, column] = chosen


def make_map(epoch: Epoch, members: Iterable[Member]) -> PlacementMap:
    """A map of these members, in any order. Raises ValueError if an id occurs twice."""
    return PlacementMap(epoch, tuple(sorted(members, key=lambda member: member.id)))


def decode_map(record: bytes) -> PlacementMap:
    """Read what `PlacementMap.encode` wrote. Raises `ProtocolError`."""
    if len(record) > RECORD_BYTES_MAX:
        raise ProtocolError(f"a placement map of {len(record)} bytes")
    try:
        version, epoch, rows = _RECORD.decode(record)
        if version != FORMAT:
            raise ValueError(f"format {version} is unknown")
        members = tuple(Member(NodeId(id), name, weight, zone) for id, name, weight, zone in rows)
        return PlacementMap(Epoch(epoch), members)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"not a placement map: {error}") from error


_RECORD = msgspec.msgpack.Decoder(tuple[int, int, list[tuple[str, str, float, str]]])


def _mix(keys: Keys) -> Keys:
    """The finalizer of splitmix64 (Steele, Lea & Flood, OOPSLA 2014): a bijection of 64 bits."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def _minus_log(hashes: Keys) -> Times:
    """-ln(h) where h, uniform in (0, 1), is (the upper 52 bits of the hash + 1/2) / 2^52.

    With h = m * 2^e and m in [sqrt(1/2), sqrt(2)), ln h = e ln 2 + 2 atanh((m - 1) / (m + 1)).
    Every operation is one correctly rounded IEEE 754 step, so that all machines agree.
    """
    mantissa, exponent = np.frexp(((hashes >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52)
    small = mantissa < _SQRT_HALF
    mantissa = np.where(small, mantissa * 2.0, mantissa)
    exponent = exponent - small
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    series = np.full_like(s, 1.0 / (2 * _ATANH_TERMS + 1))
    for term in range(_ATANH_TERMS - 1, -1, -1):  # Horner's scheme: sum of s^2k / (2k + 1)
        series *= square
        series += 1.0 / (2 * term + 1)
    return -(exponent * _LN_2 + 2.0 * s * series)
