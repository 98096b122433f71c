"""HTTP/2 as a gRPC client needs it: bytes from etcd in, events out. Owns no socket and no clock.

gRPC (grpc/doc/PROTOCOL-HTTP2.md) puts each call on a stream of its own (RFC 9113): request headers,
messages in DATA frames, each behind five bytes (0, length), then the response's headers, messages,
and trailers with `grpc-status` and `grpc-message`.

Rules

- What is to be sent is appended to `outgoing`; the driver sends it in order, and takes it away.
- Our headers are literals that touch no compression state, so those of a method are made once.
- Received bytes are acknowledged at once, in large steps: who wants to slow the member down stops
  reading the socket. What we send obeys the member's windows and waits in its stream for room.
- A stream that has ended is forgotten; frames that still come for it are passed over.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from urllib.parse import unquote

import hpack

from modelfs.errors import ProtocolError

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEADER_BYTES = 9
FRAME_BYTES_MAX = 16_384  # neither side may send more unless the other allowed it; we never do
WINDOW_BYTES = (1 << 31) - 1  # what we let the member send; given back when half is used
WINDOW_BYTES_INITIAL = 65_535  # of both sides, until told otherwise
HEADER_BLOCK_BYTES_MAX = 64 << 10

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = (
    0, 1, 3, 4, 6, 7, 8, 9,
)  # fmt: skip
_END_STREAM = _ACK = 0x1
_END_HEADERS, _PADDED, _PRIORITY = 0x4, 0x8, 0x20
_SETTING_ENABLE_PUSH, _SETTING_INITIAL_WINDOW, _SETTING_FRAME_BYTES = 2, 4, 5
_ERROR_REFUSED_STREAM, _ERROR_CANCEL = 7, 8

_FRAME = struct.Struct(">BHBBI")  # length (high byte, low bytes), type, flags, stream
_SETTING = struct.Struct(">HI")
_NUMBER = struct.Struct(">I")
_MESSAGE = struct.Struct(">BI")


class Status(IntEnum):
    """gRPC's status codes."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


NOT_TAKEN = "the member did not take the request"
TOO_LARGE = "CLIENT: Received message larger than max"


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A whole message of a stream's response."""

    stream: int
    data: bytes


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """The response is complete, or the stream was given up."""

    stream: int
    status: Status
    text: str


@dataclass(slots=True)
class _Stream:
    """A call on its way."""

    message_bytes_max: int
    window: int  # how much the member lets us send on it
    unsent: bytearray = field(default_factory=bytearray)
    ends: bool = True  # after what is unsent, we have nothing more to say
    received: bytearray = field(default_factory=bytearray)
    uncredited: int = 0  # bytes received since the last WINDOW_UPDATE of the stream


def request_headers(authority: str, path: str, metadata: tuple[tuple[str, str], ...]) -> bytes:
    """The header block of a method's requests."""
    pairs = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", authority),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        *metadata,
    )
    return b"".join(_literal(name.encode(), value.encode()) for name, value in pairs)


def _literal(name: bytes, value: bytes) -> bytes:
    """A header that is not to be remembered (RFC 7541, 6.2.2), its strings as they are."""
    assert len(name) < 127 and len(value) < 127, "longer ones have longer lengths"
    return b"\0%c%b%c%b" % (len(name), name, len(value), value)


class Http2Client:
    """One connection's state."""

    def __init__(self) -> None:
        self.outgoing = bytearray(PREFACE)
        settings = _SETTING.pack(_SETTING_ENABLE_PUSH, 0)
        settings += _SETTING.pack(_SETTING_INITIAL_WINDOW, WINDOW_BYTES)
        self._send(_SETTINGS, 0, 0, settings)
        self._widen(0, WINDOW_BYTES - WINDOW_BYTES_INITIAL)
        self.is_usable = True  # for further requests
        self._streams: dict[int, _Stream] = {}
        self._last_stream = -1
        self._incoming = bytearray()
        self._uncredited = 0  # bytes received since the last WINDOW_UPDATE
        self._window, self._window_initial = WINDOW_BYTES_INITIAL, WINDOW_BYTES_INITIAL
        self._frame_bytes_max = FRAME_BYTES_MAX
        self._decoder = hpack.Decoder(max_header_list_size=HEADER_BLOCK_BYTES_MAX)
        self._block: tuple[int, int, bytearray] | None = None  # headers whose rest is to come

    # ------------------------------------------------------------ sending

    def request(self, headers: bytes, message: bytes, message_bytes_max: int, ends: bool) -> int:
        """Begin a call; returns its stream. Unless that `ends` it, `send` may follow."""
        assert self.is_usable
        self._last_stream += 2
        self._streams[self._last_stream] = _Stream(message_bytes_max, self._window_initial)
        self._send(_HEADERS, _END_HEADERS, self._last_stream, headers)
        self.send(self._last_stream, message, ends)
        self.is_usable = self._last_stream < 1 << 30  # the numbers of streams are used once
        return self._last_stream

    def send(self, number: int, message: bytes, ends: bool = False) -> None:
        """One more message of a call."""
        stream = self._streams[number]
        stream.unsent += _MESSAGE.pack(0, len(message)) + message
        stream.ends = ends
        self._send_waiting(number, stream)

    def reset(self, number: int) -> None:
        """Give a call up, if it is still on its way."""
        if self._streams.pop(number, None) is not None:
            self._send(_RST_STREAM, 0, number, _NUMBER.pack(_ERROR_CANCEL))

    def _send(self, kind: int, flags: int, stream: int, payload: bytes | bytearray) -> None:
        length = len(payload)
        self.outgoing += _FRAME.pack(length >> 16, length & 0xFFFF, kind, flags, stream)
        self.outgoing += payload

    def _send_waiting(self, number: int, stream: _Stream) -> None:
        """Send as much of a stream as the windows allow."""
        while stream.unsent:
            size = min(len(stream.unsent), self._window, stream.window, self._frame_bytes_max)
            if size <= 0:
                return
            is_last = stream.ends and size == len(stream.unsent)
            self._send(_DATA, _END_STREAM if is_last else 0, number, stream.unsent[:size])
            del stream.unsent[:size]
            self._window -= size
            stream.window -= size

    def _widen(self, stream: int, size: int) -> None:
        self._send(_WINDOW_UPDATE, 0, stream, _NUMBER.pack(size))

    # ------------------------------------------------------------ receiving

    def receive(self, data: bytes) -> list[MessageReceived | StreamEnded]:
        """Take bytes. Raises `ProtocolError`; then the connection is of no use."""
        self._incoming += data
        events: deque[MessageReceived | StreamEnded] = deque()
        position = 0
        while len(self._incoming) - position >= FRAME_HEADER_BYTES:
            high, low, kind, flags, number = _FRAME.unpack_from(self._incoming, position)
            length = high << 16 | low
            if length > FRAME_BYTES_MAX:
                raise ProtocolError(f"an HTTP/2 frame of {length} bytes")
            start = position + FRAME_HEADER_BYTES
            if len(self._incoming) < start + length:
                break
            position = start + length
            payload = bytes(memoryview(self._incoming)[start:position])
            events.extend(self._take(kind, flags, number & 0x7FFF_FFFF, payload))
        del self._incoming[:position]
        return list(events)

    def _take(
        self, kind: int, flags: int, number: int, payload: bytes
    ) -> Iterator[MessageReceived | StreamEnded]:
        try:
            if kind == _DATA:
                yield from self._take_data(flags, number, payload)
            elif kind in (_HEADERS, _CONTINUATION):
                yield from self._take_headers(kind, flags, number, payload)
            elif kind == _RST_STREAM:
                (code,) = _NUMBER.unpack(payload)
                text = NOT_TAKEN if code == _ERROR_REFUSED_STREAM else f"reset with code {code}"
                yield from self._end(number, Status.UNAVAILABLE, text)
            elif kind == _SETTINGS and not flags & _ACK:
                self._take_settings(payload)
            elif kind == _PING and not flags & _ACK:
                self._send(_PING, _ACK, 0, payload)
            elif kind == _GOAWAY:
                self.is_usable = False
                last = _NUMBER.unpack_from(payload)[0] & 0x7FFF_FFFF
                for above in [number for number in self._streams if number > last]:
                    yield from self._end(above, Status.UNAVAILABLE, NOT_TAKEN)
            elif kind == _WINDOW_UPDATE:
                self._take_window(number, _NUMBER.unpack(payload)[0] & 0x7FFF_FFFF)
        except (struct.error, IndexError, hpack.HPACKError) as error:
            raise ProtocolError(f"a damaged HTTP/2 frame of type {kind}: {error}") from error

    def _take_data(
        self, flags: int, number: int, payload: bytes
    ) -> Iterator[MessageReceived | StreamEnded]:
        self._uncredited += len(payload)
        if self._uncredited > WINDOW_BYTES // 2:
            self._widen(0, self._uncredited)
            self._uncredited = 0
        stream = self._streams.get(number)
        if stream is None:
            return
        stream.uncredited += len(payload)
        if stream.uncredited > WINDOW_BYTES // 2:  # a watch of many days
            self._widen(number, stream.uncredited)
            stream.uncredited = 0
        if flags & _PADDED:
            payload = payload[1 : len(payload) - payload[0]]
        stream.received += payload
        while len(stream.received) >= _MESSAGE.size:
            is_compressed, length = _MESSAGE.unpack_from(stream.received)
            if is_compressed:
                raise ProtocolError("a compressed message, which nobody asked for")
            if length > stream.message_bytes_max:
                self.reset(number)
                text = f"{TOO_LARGE} ({length} vs. {stream.message_bytes_max})"
                yield StreamEnded(number, Status.RESOURCE_EXHAUSTED, text)
                return
            end = _MESSAGE.size + length
            if len(stream.received) < end:
                break
            yield MessageReceived(number, bytes(memoryview(stream.received)[_MESSAGE.size : end]))
            del stream.received[:end]
        if flags & _END_STREAM:
            yield from self._end(number, Status.UNKNOWN, "a response without a status")

    def _take_headers(
        self, kind: int, flags: int, number: int, payload: bytes
    ) -> Iterator[StreamEnded]:
        if kind == _HEADERS:
            if flags & _PADDED:
                payload = payload[1 : len(payload) - payload[0]]
            if flags & _PRIORITY:
                payload = payload[5:]
            self._block = (number, flags, bytearray())
        if self._block is None or self._block[0] != number:
            raise ProtocolError("the rest of headers that never began")
        _, first_flags, block = self._block
        block += payload
        if len(block) > HEADER_BLOCK_BYTES_MAX:
            raise ProtocolError("headers without an end")
        if not flags & _END_HEADERS:
            return
        self._block = None
        headers = {str(name): str(value) for name, value in self._decoder.decode(bytes(block))}
        if first_flags & _END_STREAM:
            yield from self._end(number, *_outcome(headers))

    def _end(self, number: int, status: Status, text: str) -> Iterator[StreamEnded]:
        if self._streams.pop(number, None) is not None:
            yield StreamEnded(number, status, text)

    def _take_settings(self, payload: bytes) -> None:
        for identifier, value in _SETTING.iter_unpack(payload):
            if identifier == _SETTING_INITIAL_WINDOW:
                for stream in self._streams.values():
                    stream.window += value - self._window_initial
                self._window_initial = value
            elif identifier == _SETTING_FRAME_BYTES:
                self._frame_bytes_max = value
        self._send(_SETTINGS, _ACK, 0, b"")
        self._send_all_waiting()

    def _take_window(self, number: int, size: int) -> None:
        if number == 0:
            self._window += size
            self._send_all_waiting()
        elif number in self._streams:
            self._streams[number].window += size
            self._send_waiting(number, self._streams[number])

    def _send_all_waiting(self) -> None:
        for number, stream in self._streams.items():
            self._send_waiting(number, stream)


def _outcome(headers: dict[str, str]) -> tuple[Status, str]:
    """The status of a call by its trailers (or by a proxy's answer, which has none)."""
    try:
        status = Status(int(headers["grpc-status"]))
    except (KeyError, ValueError):
        return Status.UNKNOWN, f"HTTP status {headers.get(':status', 'missing')}"
    return status, unquote(headers.get("grpc-message", ""))
