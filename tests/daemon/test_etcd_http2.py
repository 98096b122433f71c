"""HTTP/2 as far as gRPC needs it: frames that were made by hand, in one piece and byte by byte."""

from __future__ import annotations

import struct

import hpack
import pytest

from modelfs.errors import ProtocolError
from modelfsd.etcd.http2 import (
    NOT_TAKEN,
    PREFACE,
    TOO_LARGE,
    WINDOW_BYTES,
    Http2Client,
    MessageReceived,
    Status,
    StreamEnded,
    request_headers,
)

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    0, 1, 3, 4, 6, 7, 8, 9,
)  # fmt: skip
END_STREAM, END_HEADERS, PADDED = 1, 4, 8
BLOCK = request_headers("127.0.0.1:2379", "/etcdserverpb.KV/Range", (("hasleader", "true"),))
MAX = 1 << 20


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(
        ">I", stream
    ) + payload  # fmt: skip


def frames(data: bytes | bytearray) -> list[tuple[int, int, int, bytes]]:
    """(type, flags, stream, payload) of each frame of what a client sent."""
    found, position = [], 0
    while position < len(data):
        length = int.from_bytes(data[position : position + 3], "big")
        kind, flags, stream = struct.unpack_from(">BBI", data, position + 3)
        found.append((kind, flags, stream, bytes(data[position + 9 : position + 9 + length])))
        position += 9 + length
    return found


def message(data: bytes) -> bytes:
    return struct.pack(">BI", 0, len(data)) + data


class Member:
    """The other end: encodes headers as etcd does, with a compression state."""

    def __init__(self) -> None:
        self.encoder = hpack.Encoder()

    def headers(self, stream: int, flags: int, **fields: str) -> bytes:
        named = [(name.replace("_", "-"), value) for name, value in fields.items()]
        return frame(HEADERS, END_HEADERS | flags, stream, self.encoder.encode(named))

    def response(self, stream: int, *messages: bytes) -> bytes:
        return (
            self.headers(stream, 0, content_type="application/grpc")
            + b"".join(frame(DATA, 0, stream, message(data)) for data in messages)
            + self.headers(stream, END_STREAM, grpc_status="0", grpc_message="")
        )


def connected() -> Http2Client:
    client = Http2Client()
    assert client.outgoing.startswith(PREFACE)
    sent = frames(client.outgoing[len(PREFACE) :])
    assert [kind for kind, *_ in sent] == [SETTINGS, WINDOW_UPDATE]
    client.outgoing.clear()
    return client


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_responses_come_whole_however_they_are_cut(step: int) -> None:
    client, member = connected(), Member()
    one, two = (client.request(BLOCK, b"ask", MAX, ends=True) for _ in range(2))
    assert (one, two) == (1, 3)
    sent = frames(client.outgoing)
    assert [(kind, flags, stream) for kind, flags, stream, _ in sent] == [
        (HEADERS, END_HEADERS, 1), (DATA, END_STREAM, 1),
        (HEADERS, END_HEADERS, 3), (DATA, END_STREAM, 3),
    ]  # fmt: skip
    decoded = {str(name): str(value) for name, value in hpack.Decoder().decode(sent[0][3])}
    assert decoded[":path"] == "/etcdserverpb.KV/Range" and decoded["hasleader"] == "true"
    assert sent[1][3] == message(b"ask")
    data = member.response(3, b"second") + member.response(1, b"x" * 5000)
    events = []
    for start in range(0, len(data), step):
        events += client.receive(data[start : start + step])
    assert events == [
        MessageReceived(3, b"second"), StreamEnded(3, Status.OK, ""),
        MessageReceived(1, b"x" * 5000), StreamEnded(1, Status.OK, ""),
    ]  # fmt: skip


def test_a_stream_brings_messages_until_it_is_given_up() -> None:
    client, member = connected(), Member()
    watch = client.request(BLOCK, b"watch", MAX, ends=False)
    client.send(watch, b"progress")
    flags = [flags for kind, flags, *_ in frames(client.outgoing) if kind == DATA]
    assert flags == [0, 0]
    client.outgoing.clear()
    head = member.headers(watch, 0, content_type="application/grpc")
    both = message(b"a") + message(b"") + message(b"b" * 9)[:7]
    assert client.receive(head + frame(DATA, 0, watch, both)) == [
        MessageReceived(watch, b"a"), MessageReceived(watch, b""),
    ]  # fmt: skip
    rest = frame(DATA, PADDED, watch, b"\2" + message(b"b" * 9)[7:] + b"\0\0")
    assert client.receive(rest) == [MessageReceived(watch, b"b" * 9)]
    client.reset(watch)
    assert [kind for kind, *_ in frames(client.outgoing)] == [RST_STREAM]
    assert client.receive(frame(DATA, 0, watch, message(b"late"))) == []


def test_requests_wait_for_the_windows_of_the_member() -> None:
    client = connected()
    settings = struct.pack(">HIHI", 4, 100, 5, 32_768)  # a stream's window, a frame's size
    assert client.receive(frame(SETTINGS, 0, 0, settings)) == []
    assert [(kind, flags) for kind, flags, *_ in frames(client.outgoing)] == [(SETTINGS, 1)]
    client.outgoing.clear()
    body = bytes(range(256)) * 400
    stream = client.request(BLOCK, body, MAX, ends=True)
    for number, size in ((stream, 70_000), (0, 50_000), (stream, 50_000)):
        client.receive(frame(WINDOW_UPDATE, 0, number, struct.pack(">I", size)))
    sent = [(flags, data) for kind, flags, _, data in frames(client.outgoing) if kind == DATA]
    assert len(sent[0][1]) == 100 and max(len(data) for _, data in sent) <= 32_768
    assert sum(len(data) for _, data in sent[:-1]) <= 70_100
    assert b"".join(data for _, data in sent) == message(body)
    assert [flags for flags, _ in sent] == [0] * (len(sent) - 1) + [END_STREAM]


def test_a_connection_that_goes_away_says_what_it_never_took() -> None:
    client, member = connected(), Member()
    for _ in range(3):
        client.request(BLOCK, b"ask", MAX, ends=True)
    away = frame(GOAWAY, 0, 0, struct.pack(">II", 1, 0))
    assert client.receive(away) == [
        StreamEnded(3, Status.UNAVAILABLE, NOT_TAKEN),
        StreamEnded(5, Status.UNAVAILABLE, NOT_TAKEN),
    ]
    assert not client.is_usable
    assert client.receive(member.response(1, b"done"))[0] == MessageReceived(1, b"done")


def test_resets_refusals_and_proxies_are_told_apart() -> None:
    client, member = connected(), Member()
    for _ in range(5):
        client.request(BLOCK, b"ask", 8, ends=True)
    assert client.receive(frame(RST_STREAM, 0, 1, struct.pack(">I", 7))) == [
        StreamEnded(1, Status.UNAVAILABLE, NOT_TAKEN)
    ]
    (cut,) = client.receive(frame(RST_STREAM, 0, 3, struct.pack(">I", 2)))
    assert isinstance(cut, StreamEnded) and cut.text != NOT_TAKEN
    refused = member.headers(5, END_STREAM, grpc_status="8", grpc_message="etcd%3A full")
    assert client.receive(refused) == [StreamEnded(5, Status.RESOURCE_EXHAUSTED, "etcd: full")]
    fields = hpack.Encoder().encode([(":status", "502")])
    proxy = frame(HEADERS, END_STREAM, 7, fields[:1]) + frame(
        CONTINUATION, END_HEADERS, 7, fields[1:]
    )
    assert client.receive(proxy) == [StreamEnded(7, Status.UNKNOWN, "HTTP status 502")]
    (large,) = client.receive(frame(DATA, 0, 9, message(b"123456789")))
    assert isinstance(large, StreamEnded) and large.text == f"{TOO_LARGE} (9 vs. 8)"


def test_pings_are_answered_and_received_bytes_given_back() -> None:
    client = connected()
    stream = client.request(BLOCK, b"watch", 1 << 31, ends=False)
    client.outgoing.clear()
    client.receive(frame(PING, 0, 0, b"12345678"))
    assert frames(client.outgoing) == [(PING, 1, 0, b"12345678")]
    client.outgoing.clear()
    piece = bytes(16_384)
    client._streams[stream].uncredited = client._uncredited = WINDOW_BYTES // 2
    client.receive(frame(DATA, 0, stream, piece))
    given = {number: data for _, _, number, data in frames(client.outgoing)}
    assert given == dict.fromkeys((0, stream), struct.pack(">I", WINDOW_BYTES // 2 + len(piece)))


@pytest.mark.parametrize(
    "bad",
    [
        frame(DATA, 0, 1, b"\1\0\0\0\1x"),
        frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff"),
        frame(CONTINUATION, END_HEADERS, 1, b""),
        frame(WINDOW_UPDATE, 0, 0, b"xy"),
        frame(SETTINGS, 0, 0, b"1234567"),
        frame(DATA, PADDED, 1, b""),
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
)
def test_damage_ends_the_connection(bad: bytes) -> None:
    client = connected()
    client.request(BLOCK, b"ask", MAX, ends=True)
    with pytest.raises(ProtocolError):
        client.receive(bad)
