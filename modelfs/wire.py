"""The peer protocol: frames ↔ bytes. No socket and no clock here.

Each direction of a TCP connection is a sequence of frames, and this is their only description:

    prefix      PREFIX: magic, kind, flags (0), reserved (0), request id, header bytes,
                payload bytes; little-endian
    header      the message as a MessagePack array, fields in the order of its class below;
                at most FRAME_HEADER_BYTES_MAX
    payload     raw bytes of a chunk, at most CHUNK_BYTES_MAX; only GET_REPLY and PUT have any

A conversation: each side sends HELLO as its first frame, the client first. Both take the highest
version that both can; the server answers FAILURE instead if there is none, or if the cluster is
not its own. A client with an empty cluster id is a stranger who may only ask INFO and JOIN. If both
HELLOs say `plain`, both leave TLS now, and GET and PUT are all that follows. After that the client
sends requests, as many as it likes without waiting, and the server answers each
with the same request id, in the order of the requests:

    GET → GET_REPLY     the smallest block-aligned range that covers what was asked
                        (`chunk.covering_blocks`), with the block table to verify it
    PUT → OK            table and data are verified and stored as OWNED; survives a crash once a
    SYNC → OK           has been answered, by the same incarnation of the server
    HAS → HAS_REPLY     one bit for each id, least significant first
    DAMAGE → OK         the server has verified its own copy
    INFO → INFO_REPLY   what a stranger may know to join
    JOIN → JOIN_REPLY   certificates for a token (`modelfsd.joining`)
    PING → OK
    any → FAILURE       instead of the answer

While a request takes long the server sends WORKING with its id, any number of times, before the
answer (never inside a frame): a sign of life. A version may append fields to a message; readers
ignore the ones that they do not know. Whatever else is not as described here is a ProtocolError,
and ends the connection, since the two sides no longer agree where a frame begins.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Annotated, Any

import msgspec

from modelfs.chunk import Buffer, ChunkRef
from modelfs.errors import ProtocolError
from modelfs.ids import ChunkId
from modelfs.limits import CHUNK_BYTES_MAX, FRAME_HEADER_BYTES_MAX, HAS_CHUNKS_MAX, NAME_BYTES_MAX

VERSION_MIN = VERSION_MAX = 1
PREFIX = struct.Struct("<4sBBHQII")
MAGIC = b"mfsP"
FACTS_MAX = 64  # that INFO tells; and words in each


class Kind(IntEnum):
    """What a frame is. Numbers are never reused."""

    HELLO = 1
    GET = 2
    PUT = 3
    SYNC = 4
    HAS = 5
    DAMAGE = 6
    INFO = 7
    PING = 8
    JOIN = 9
    OK = 32
    GET_REPLY = 33
    HAS_REPLY = 34
    INFO_REPLY = 35
    WORKING = 36
    FAILURE = 37
    JOIN_REPLY = 38


class FailureKind(StrEnum):
    """Why a request failed."""

    MISSING = "missing"  # the chunk is not here
    CORRUPT = "corrupt"  # the chunk here, or the one sent, fails its checksum
    NO_SPACE = "no-space"
    REFUSED = "refused"  # a failing disk, a stranger's request; the text says which
    WRONG_CLUSTER = "wrong-cluster"
    VERSION = "version"
    UNAVAILABLE = "unavailable"  # not now; another node may know


_Hash = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_U16 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=CHUNK_BYTES_MAX)]
_Offset = Annotated[int, msgspec.Meta(ge=0, lt=CHUNK_BYTES_MAX)]
_Checksum = Annotated[int, msgspec.Meta(ge=0)]  # MessagePack has none above 64 bits
_Name = Annotated[str, msgspec.Meta(max_length=NAME_BYTES_MAX)]
_Text = Annotated[str, msgspec.Meta(max_length=4096)]
_Table = Annotated[bytes, msgspec.Meta(min_length=8, max_length=FRAME_HEADER_BYTES_MAX // 2)]
_Letter = Annotated[bytes, msgspec.Meta(max_length=FRAME_HEADER_BYTES_MAX // 2)]
_Bitmap = Annotated[bytes, msgspec.Meta(max_length=-(-HAS_CHUNKS_MAX // 8))]


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """Who speaks. `incarnation` names the server's process; a client's may be empty."""

    version_min: _U16
    version_max: _U16
    cluster: _Name
    node: _Name
    name: _Name
    incarnation: _Name
    plain: bool = False  # leave TLS after the HELLOs


class Get(msgspec.Struct, frozen=True, array_like=True):
    """Ask for `size` bytes from `offset` of a chunk."""

    chunk: _Hash
    offset: _Offset
    size: _Size


class Put(msgspec.Struct, frozen=True, array_like=True):
    """Store a chunk; the payload is its data."""

    chunk: _Hash
    checksum: _Checksum
    length: _Size
    table: _Table


class Sync(msgspec.Struct, frozen=True, array_like=True):
    """Make the names of all chunks put so far survive a crash."""


class Has(msgspec.Struct, frozen=True, array_like=True):
    """Ask which chunks are owned here; `chunks` are ids of 32 bytes, one after the other."""

    chunks: Annotated[bytes, msgspec.Meta(max_length=32 * HAS_CHUNKS_MAX)]
    renew: bool


class Damage(msgspec.Struct, frozen=True, array_like=True):
    """The copy that this server sent fails verification."""

    chunk: _Hash
    checksum: _Checksum
    length: _Size


class Info(msgspec.Struct, frozen=True, array_like=True):
    """Ask what a stranger may know."""


class Ping(msgspec.Struct, frozen=True, array_like=True):
    """Ask for a sign of life."""


class Join(msgspec.Struct, frozen=True, array_like=True):
    """Ask to be let in; opaque here."""

    request: _Letter


class JoinReply(msgspec.Struct, frozen=True, array_like=True):
    """What makes a member; opaque here."""

    answer: _Letter


class Ok(msgspec.Struct, frozen=True, array_like=True):
    """Done."""


class GetReply(msgspec.Struct, frozen=True, array_like=True):
    """A range of a chunk of `length` bytes; the payload is the data."""

    length: _Size
    table: _Table


class HasReply(msgspec.Struct, frozen=True, array_like=True):
    """One bit for each id that was asked for."""

    bitmap: _Bitmap


class InfoReply(msgspec.Struct, frozen=True, array_like=True):
    """What a stranger may know: words, numbers, and lists of words."""

    info: Annotated[dict[_Name, Any], msgspec.Meta(max_length=FACTS_MAX)]


class Working(msgspec.Struct, frozen=True, array_like=True):
    """The request with this id is still being worked on."""


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """The request could not be done."""

    kind: FailureKind
    text: _Text


Request = Hello | Get | Put | Sync | Has | Damage | Info | Ping | Join
Reply = Hello | Ok | GetReply | HasReply | InfoReply | JoinReply | Working | Failure
Message = Request | Reply

_CLASSES: dict[Kind, type[Message]] = {
    Kind.HELLO: Hello,
    Kind.GET: Get,
    Kind.PUT: Put,
    Kind.SYNC: Sync,
    Kind.HAS: Has,
    Kind.DAMAGE: Damage,
    Kind.INFO: Info,
    Kind.PING: Ping,
    Kind.JOIN: Join,
    Kind.OK: Ok,
    Kind.GET_REPLY: GetReply,
    Kind.HAS_REPLY: HasReply,
    Kind.INFO_REPLY: InfoReply,
    Kind.WORKING: Working,
    Kind.FAILURE: Failure,
    Kind.JOIN_REPLY: JoinReply,
}
_KINDS = {message: kind for kind, message in _CLASSES.items()}
_DECODERS = {kind: msgspec.msgpack.Decoder(message) for kind, message in _CLASSES.items()}
_ENCODER = msgspec.msgpack.Encoder()
_WITH_PAYLOAD = frozenset({Kind.GET_REPLY, Kind.PUT})

assert set(_CLASSES) == set(Kind)


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame without its payload, which the receiver takes straight to where it belongs."""

    request: int
    message: Message
    payload_bytes: int


def encode(request: int, message: Message, payload_bytes: int = 0) -> bytes:
    """Prefix and header of a frame. The payload, if any, is to follow."""
    header = _ENCODER.encode(message)
    kind = _KINDS[type(message)]
    assert len(header) <= FRAME_HEADER_BYTES_MAX and 0 <= payload_bytes <= CHUNK_BYTES_MAX
    assert payload_bytes == 0 or kind in _WITH_PAYLOAD
    return PREFIX.pack(MAGIC, kind, 0, 0, request, len(header), payload_bytes) + header


def failure(kind: FailureKind, text: str) -> Failure:
    """A failure whose text fits."""
    return Failure(kind, text[:4096])


def chunk_ref(message: Put | Damage) -> ChunkRef:
    """The reference that a message carries."""
    return ChunkRef(ChunkId(message.chunk), message.checksum, message.length)


def negotiate(theirs: Hello, version_min: int = VERSION_MIN, version_max: int = VERSION_MAX) -> int:
    """The protocol version to speak with a peer; raises ProtocolError if there is none."""
    version = min(version_max, theirs.version_max)
    if version < max(version_min, theirs.version_min):
        raise ProtocolError(
            f"it speaks protocol versions {theirs.version_min} to {theirs.version_max}, "
            f"this node {version_min} to {version_max}: upgrade the older of the two"
        )
    return version


def pack_ids(chunks: Sequence[ChunkId]) -> bytes:
    """The ids of one `Has`."""
    assert len(chunks) <= HAS_CHUNKS_MAX
    return b"".join(chunks)


def unpack_ids(message: Has) -> list[ChunkId]:
    """The ids of one `Has`."""
    packed = message.chunks
    return [ChunkId(packed[start : start + 32]) for start in range(0, len(packed), 32)]


def pack_bits(bits: Sequence[bool]) -> bytes:
    """A bitmap, least significant bit first."""
    value = sum(1 << index for index, bit in enumerate(bits) if bit)
    return value.to_bytes(-(-len(bits) // 8), "little")


def unpack_bits(bitmap: bytes, count: int) -> list[bool]:
    """The first `count` bits of a bitmap; raises ProtocolError if it is not of that size."""
    if len(bitmap) != -(-count // 8):
        raise ProtocolError(f"a bitmap of {len(bitmap)} bytes for {count} chunks")
    value = int.from_bytes(bitmap, "little")
    return [bool(value >> index & 1) for index in range(count)]


class FrameReader:
    """Bytes from a peer in, frames out.

    After a frame with a payload the caller takes it: first what has been received already
    (`take_payload`), then the rest straight from the socket, which it tells with
    `payload_received`. Only then the next frame begins.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._payload_left = 0
        self._broken = False

    @property
    def is_between_frames(self) -> bool:
        """Whether no byte of an unfinished frame has come."""
        return not self._buffer and not self._payload_left

    @property
    def payload_left(self) -> int:
        """How many bytes of the last frame's payload have not been taken."""
        return self._payload_left

    def receive(self, data: Buffer) -> None:
        """Take bytes in, in any portions."""
        self._buffer += data

    def next_frame(self) -> Frame | None:
        """The next frame; None if more bytes are needed. Raises ProtocolError, from then on."""
        assert self._payload_left == 0, "the payload of the last frame has not been taken"
        if self._broken:
            raise ProtocolError("the connection has carried nonsense before")
        try:
            return self._take_frame()
        except ProtocolError:
            self._broken = True
            self._buffer.clear()
            raise

    def take_payload(self, into: memoryview) -> int:
        """Move payload bytes that are here already to `into`; returns how many."""
        count = min(len(into), len(self._buffer), self._payload_left)
        into[:count] = self._buffer[:count]
        del self._buffer[:count]
        self._payload_left -= count
        return count

    def payload_received(self, count: int) -> None:
        """Say that the caller has received `count` bytes of payload by itself."""
        assert count <= self._payload_left and not self._buffer
        self._payload_left -= count

    def _take_frame(self) -> Frame | None:
        if self._buffer and not self._buffer.startswith(MAGIC[: len(self._buffer)]):
            raise ProtocolError("these bytes are not of the modelfs peer protocol")
        if len(self._buffer) < PREFIX.size:
            return None
        kind, request, header_bytes, payload_bytes = _unpack_prefix(self._buffer)
        if len(self._buffer) < PREFIX.size + header_bytes:
            return None
        header = bytes(self._buffer[PREFIX.size : PREFIX.size + header_bytes])
        message = _decode(kind, header, payload_bytes)
        del self._buffer[: PREFIX.size + header_bytes]
        self._payload_left = payload_bytes
        return Frame(request, message, payload_bytes)


def _unpack_prefix(buffer: Buffer) -> tuple[Kind, int, int, int]:
    magic, number, flags, reserved, request, *sizes = PREFIX.unpack_from(buffer)
    header_bytes, payload_bytes = sizes
    if magic != MAGIC or flags or reserved:
        raise ProtocolError("a frame with a bad prefix")
    try:
        kind = Kind(number)
    except ValueError:
        raise ProtocolError(f"a frame of unknown kind {number}") from None
    if header_bytes > FRAME_HEADER_BYTES_MAX:
        raise ProtocolError(f"a {kind.name} header of {header_bytes} bytes")
    if payload_bytes > (CHUNK_BYTES_MAX if kind in _WITH_PAYLOAD else 0):
        raise ProtocolError(f"a {kind.name} payload of {payload_bytes} bytes")
    return kind, request, header_bytes, payload_bytes


def _decode(kind: Kind, header: bytes, payload_bytes: int) -> Message:
    try:
        message = _DECODERS[kind].decode(header)
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"a malformed {kind.name} header: {error}") from None
    if isinstance(message, Put) and payload_bytes != message.length:
        raise ProtocolError(f"a PUT of {message.length} bytes with {payload_bytes} of payload")
    if isinstance(message, GetReply) and not 0 < payload_bytes <= message.length:
        raise ProtocolError(f"a GET_REPLY of {payload_bytes} bytes from {message.length}")
    if isinstance(message, Has) and len(message.chunks) % 32:
        raise ProtocolError(f"a HAS with {len(message.chunks)} bytes of ids")
    if isinstance(message, InfoReply) and not all(map(_is_fact, message.info.values())):
        raise ProtocolError("an INFO_REPLY with more than words and numbers")
    return message


def _is_fact(value: object) -> bool:
    if isinstance(value, list):
        return len(value) <= FACTS_MAX and all(isinstance(word, str | bytes) for word in value)
    return value is None or isinstance(value, bool | int | float | str | bytes)
