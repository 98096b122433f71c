"""The peer protocol: any bytes, in any portions, give frames or a ProtocolError."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfs import wire
from modelfs.chunk import describe
from modelfs.errors import ProtocolError
from modelfs.ids import ChunkId
from modelfs.limits import CHUNK_BYTES_MAX, FRAME_HEADER_BYTES_MAX, HAS_CHUNKS_MAX
from modelfs.wire import Frame, FrameReader, Kind

HASHES = st.binary(min_size=32, max_size=32)
NAMES = st.text(max_size=60)
U16 = st.integers(0, 65535)
CHECKSUMS = st.integers(0, (1 << 64) - 1)
SIZES = st.integers(1, CHUNK_BYTES_MAX)
TABLES = st.binary(min_size=8, max_size=512)

PLAIN_MESSAGES = st.one_of(
    st.builds(wire.Hello, U16, U16, NAMES, NAMES, NAMES, NAMES),
    st.builds(wire.Get, HASHES, st.integers(0, CHUNK_BYTES_MAX - 1), SIZES),
    st.builds(wire.Sync),
    st.builds(wire.Has, st.lists(HASHES, max_size=20).map(b"".join), st.booleans()),
    st.builds(wire.Damage, HASHES, CHECKSUMS, SIZES),
    st.builds(wire.Info),
    st.builds(wire.Ping),
    st.builds(wire.Ok),
    st.builds(wire.HasReply, st.binary(max_size=128)),
    st.builds(wire.InfoReply, st.dictionaries(NAMES, NAMES | st.integers(0, 99), max_size=4)),
    st.builds(wire.Working),
    st.builds(wire.Failure, st.sampled_from(wire.FailureKind), st.text(max_size=200)),
)


@st.composite
def framed(draw: st.DrawFn) -> tuple[int, wire.Message, bytes]:
    """A request id, a message, and its payload."""
    request = draw(CHECKSUMS)
    if draw(st.booleans()):
        return request, draw(PLAIN_MESSAGES), b""
    payload = draw(st.binary(min_size=1, max_size=300))
    if draw(st.booleans()):
        put = wire.Put(draw(HASHES), draw(CHECKSUMS), len(payload), draw(TABLES))
        return request, put, payload
    length = draw(st.integers(len(payload), CHUNK_BYTES_MAX))
    return request, wire.GetReply(length, draw(TABLES)), payload


def portions(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """Cut bytes at some places."""
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def drain(parts: Iterable[bytes]) -> list[tuple[Frame, bytes]]:
    """Feed the reader as a driver does, and collect frames with their payloads."""
    reader = FrameReader()
    frames: list[tuple[Frame, bytearray]] = []
    for part in parts:
        rest = memoryview(part)
        if reader.payload_left:  # a driver receives these bytes straight into their place
            taken = min(reader.payload_left, len(rest))
            frames[-1][1].extend(rest[:taken])
            reader.payload_received(taken)
            rest = rest[taken:]
        reader.receive(rest)
        while not reader.payload_left and (frame := reader.next_frame()) is not None:
            payload = bytearray(frame.payload_bytes)
            count = reader.take_payload(memoryview(payload))
            frames.append((frame, payload[:count]))
    return [(frame, bytes(payload)) for frame, payload in frames]


@given(st.lists(framed(), max_size=5), st.lists(st.integers(0), max_size=12))
def test_frames_survive_the_wire_in_any_portions(
    sent: list[tuple[int, wire.Message, bytes]], cuts: list[int]
) -> None:
    stream = b"".join(
        wire.encode(request, message, len(payload)) + payload for request, message, payload in sent
    )
    received = drain(portions(stream, cuts))
    assert [(frame.request, frame.message, data) for frame, data in received] == sent


@given(st.lists(st.binary(max_size=100), max_size=8), st.booleans())
def test_garbage_gives_frames_or_a_protocol_error(parts: list[bytes], with_magic: bool) -> None:
    with suppress(ProtocolError):
        drain([wire.MAGIC, *parts] if with_magic else parts)


@given(
    st.sampled_from(Kind), st.binary(max_size=200), st.integers(0, 300), st.lists(st.integers(0))
)
def test_any_header_of_any_kind_decodes_or_is_refused(
    kind: Kind, header: bytes, payload_bytes: int, cuts: list[int]
) -> None:
    prefix = wire.PREFIX.pack(wire.MAGIC, kind, 0, 0, 7, len(header), payload_bytes)
    with suppress(ProtocolError):
        drain(portions(prefix + header + bytes(payload_bytes), cuts))


@given(framed(), st.integers(0), st.integers(0, 7))
def test_a_flipped_bit_never_gives_anything_but_a_frame_or_an_error(
    sent: tuple[int, wire.Message, bytes], position: int, bit: int
) -> None:
    request, message, payload = sent
    stream = bytearray(wire.encode(request, message, len(payload)) + payload)
    stream[position % len(stream)] ^= 1 << bit
    with suppress(ProtocolError):
        drain([bytes(stream)])


@pytest.mark.parametrize(
    ("kind", "header_bytes", "payload_bytes"),
    [
        (Kind.PUT, FRAME_HEADER_BYTES_MAX + 1, 10),
        (Kind.PUT, 10, CHUNK_BYTES_MAX + 1),
        (Kind.PING, 1, 1),
        (99, 1, 0),
    ],
)
def test_an_oversized_frame_is_refused_before_its_header_arrives(
    kind: int, header_bytes: int, payload_bytes: int
) -> None:
    reader = FrameReader()
    reader.receive(wire.PREFIX.pack(wire.MAGIC, kind, 0, 0, 1, header_bytes, payload_bytes))
    with pytest.raises(ProtocolError):
        reader.next_frame()
    with pytest.raises(ProtocolError):  # and the stream stays broken
        reader.next_frame()


def test_another_protocol_is_recognised_by_its_first_byte() -> None:
    reader = FrameReader()
    reader.receive(b"G")
    with pytest.raises(ProtocolError):
        reader.next_frame()


def test_deep_nesting_is_refused() -> None:
    header = b"\x91\x81\xa1a" + b"\x91" * 50_000 + b"\x90"
    reader = FrameReader()
    reader.receive(wire.PREFIX.pack(wire.MAGIC, Kind.INFO_REPLY, 0, 0, 1, len(header), 0) + header)
    with pytest.raises(ProtocolError):
        reader.next_frame()


@pytest.mark.parametrize(
    "info",
    [
        {str(number): 1 for number in range(65)},
        {"endpoints": ["x"] * 65},
        {"x" * 300: 1},
        {"authorities": [["x"]]},
        {"more": {"deeper": 1}},
    ],
)
def test_what_a_node_tells_is_bounded(info: dict[str, Any]) -> None:
    header = msgspec.msgpack.encode([info])
    reader = FrameReader()
    reader.receive(wire.PREFIX.pack(wire.MAGIC, Kind.INFO_REPLY, 0, 0, 1, len(header), 0) + header)
    with pytest.raises(ProtocolError):
        reader.next_frame()


def test_fields_of_a_later_version_are_ignored() -> None:
    header = msgspec.msgpack.encode([1, 2, "cluster", "node", "name", "incarnation", True, [1]])
    reader = FrameReader()
    reader.receive(wire.PREFIX.pack(wire.MAGIC, Kind.HELLO, 0, 0, 0, len(header), 0) + header)
    frame = reader.next_frame()
    assert frame is not None
    assert frame.message == wire.Hello(1, 2, "cluster", "node", "name", "incarnation", True)


def test_the_largest_messages_fit_the_bounds() -> None:
    ids = [ChunkId(bytes([index % 256]) * 32) for index in range(HAS_CHUNKS_MAX)]
    wire.encode(1, wire.Has(wire.pack_ids(ids), True))
    assert wire.unpack_ids(wire.Has(wire.pack_ids(ids), True)) == ids
    ref, table = describe(bytes(CHUNK_BYTES_MAX))
    put = wire.Put(ref.id, ref.checksum, ref.length, table)
    ((frame, _),) = drain([wire.encode(1, put, ref.length)])
    assert frame.message == put
    assert wire.chunk_ref(put) == ref


@given(st.lists(st.booleans(), max_size=HAS_CHUNKS_MAX))
def test_bitmaps_round_trip(bits: list[bool]) -> None:
    assert wire.unpack_bits(wire.pack_bits(bits), len(bits)) == bits
    with pytest.raises(ProtocolError):
        wire.unpack_bits(wire.pack_bits(bits) + b"\0", len(bits))


@given(U16, U16, U16, U16)
def test_both_sides_choose_the_same_version(a_min: int, a_max: int, b_min: int, b_max: int) -> None:
    common = range(max(a_min, b_min), min(a_max, b_max) + 1)

    def choose(low: int, high: int, their_low: int, their_high: int) -> int | None:
        try:
            return wire.negotiate(wire.Hello(their_low, their_high, "", "", "", ""), low, high)
        except ProtocolError:
            return None

    expected = common[-1] if common else None
    if a_min <= a_max and b_min <= b_max:
        assert choose(a_min, a_max, b_min, b_max) == expected
        assert choose(b_min, b_max, a_min, a_max) == expected
