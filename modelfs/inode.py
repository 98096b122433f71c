"""Inodes and directory entries, as etcd holds them.

Records are MessagePack arrays: a later version may add fields at the end (old readers ignore
them, new readers fill in the defaults) and may never reorder or remove one.

A directory's times and link count are not in its record: the times are its *dirtime*, which every
change of the directory puts blindly (in the record it would make every two creates in one
directory conflict), and the link count follows from its entries.
"""

from __future__ import annotations

import math
import stat
import struct
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from modelfs.chunk import ChunkRef
from modelfs.errors import NameTooLong, ProtocolError
from modelfs.ids import ChunkId, Epoch, InodeNumber, NodeId, Version, is_label, is_node_id
from modelfs.limits import (
    CHUNK_BYTES_MAX,
    CHUNK_BYTES_MIN,
    FILE_BYTES_MAX,
    INLINE_BYTES_MAX,
    INODE_BITS,
    LINKS_MAX,
    NAME_BYTES_MAX,
    RECORD_BYTES_MAX,
    REPLICAS_MAX,
    RETAIN_SECONDS_MAX,
    SYMLINK_BYTES_MAX,
    XATTR_NAME_BYTES_MAX,
    XATTR_VALUE_BYTES_MAX,
)
from modelfs.manifest import PlacedChunk

Record = TypeVar("Record")

_DIRTIME = struct.Struct("<qq")

KINDS = frozenset(
    {
        stat.S_IFREG,
        stat.S_IFDIR,
        stat.S_IFLNK,
        stat.S_IFIFO,
        stat.S_IFSOCK,
        stat.S_IFCHR,
        stat.S_IFBLK,
    }
)
COUNT_MAX = 1 << 53  # of versions and touches: a million a second for 285 years

_U16 = Annotated[int, Meta(ge=0, lt=1 << 16)]
_U32 = Annotated[int, Meta(ge=0, lt=1 << 32)]
_Natural = Annotated[int, Meta(ge=0)]
_Count = Annotated[int, Meta(ge=0, le=COUNT_MAX)]
_FileBytes = Annotated[int, Meta(ge=0, le=FILE_BYTES_MAX)]
_ChunkBytes = Annotated[int, Meta(ge=0, le=CHUNK_BYTES_MAX)]
_Replicas = Annotated[int, Meta(ge=0, le=REPLICAS_MAX)]
_Word = Annotated[str, Meta(max_length=NAME_BYTES_MAX)]
_XattrName = Annotated[bytes, Meta(min_length=1, max_length=XATTR_NAME_BYTES_MAX)]
_XattrValue = Annotated[bytes, Meta(max_length=XATTR_VALUE_BYTES_MAX)]


class ManifestRef(msgspec.Struct, array_like=True, frozen=True):
    """Where the root of a manifest is."""

    id: Annotated[bytes, Meta(min_length=32, max_length=32)]
    checksum: _Natural
    length: Annotated[int, Meta(ge=1, le=CHUNK_BYTES_MAX)]
    epoch: _U32

    @classmethod
    def of(cls, placed: PlacedChunk) -> ManifestRef:
        """The reference to a stored root."""
        return cls(placed.ref.id, placed.ref.checksum, placed.ref.length, placed.epoch)

    @property
    def placed(self) -> PlacedChunk:
        """The root's chunk."""
        return PlacedChunk(
            ChunkRef(ChunkId(self.id), self.checksum, self.length), Epoch(self.epoch)
        )


class Policy(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """What was set for a directory, or a file; None hands down what holds above."""

    replicas: Annotated[int, Meta(ge=1, le=REPLICAS_MAX)] | None = None
    retain_seconds: float | None = None  # of superseded versions; 0: they are not kept
    chunk_bytes: _ChunkBytes | None = None


class Inode(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """One inode. Times are nanoseconds since 1970; `mode` holds the file type, as in stat(2).

    A file's contents are `inline` (also the empty file) or, if that is None, behind `manifest`.
    `version` counts commits of contents, `touches` changes of mtime alone; their sum is the
    *view*: a kernel that has seen one view keeps its pages, size and mtime for ever.
    """

    mode: _U16
    uid: _U32
    gid: _U32
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    nlink: Annotated[int, Meta(ge=0, le=LINKS_MAX)] = 1
    size: _FileBytes = 0
    version: _Count = 1
    touches: _Count = 0
    inline: Annotated[bytes, Meta(max_length=INLINE_BYTES_MAX)] | None = None
    manifest: ManifestRef | None = None
    chunk_bytes: _ChunkBytes = 0
    replicas: _Replicas = 0
    editor: _Word = ""  # the node whose commit or utimens made this view
    rdev: _Natural = 0
    target: Annotated[bytes, Meta(max_length=SYMLINK_BYTES_MAX)] = b""  # of a symbolic link
    xattrs: dict[_XattrName, _XattrValue] = {}
    policy: Policy | None = None
    hole_bytes: _FileBytes = 0  # of the size: where no chunk is; at least so many

    @property
    def kind(self) -> int:
        """The file type bits: stat.S_IFREG, S_IFDIR, …"""
        return stat.S_IFMT(self.mode)

    @property
    def is_directory(self) -> bool:
        """Whether this is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether this is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def stored_bytes(self) -> int:
        """How much of a file's size is in chunks, at most."""
        return self.size - self.hole_bytes

    @property
    def view(self) -> int:
        """What the kernel may cache for ever; grows with every change of contents or mtime."""
        return self.version + self.touches

    @property
    def edited_version(self) -> Version:
        """`version`, typed."""
        return Version(self.version)


class Dentry(msgspec.Struct, array_like=True, frozen=True):
    """A name in a directory: which inode, of which type (as `Inode.kind`).

    `base` plus the inode's version is the number of what the name shows (see `history`).
    """

    ino: Annotated[int, Meta(ge=2, lt=1 << INODE_BITS)]  # nothing names the root
    kind: _U16
    base: Annotated[int, Meta(ge=-COUNT_MAX, le=COUNT_MAX)] = 0


class Pin(msgspec.Struct, array_like=True, frozen=True):
    """A manifest whose chunks must stay, and how many copies of them the version has."""

    manifest: ManifestRef
    replicas: _Replicas


class NodeRecord(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """What a living node says of itself; it vanishes with the node's etcd lease. Sizes in bytes."""

    name: _Word
    host: _Word
    port: _U16
    zone: _Word
    capacity_bytes: _Natural
    used_bytes: _Natural
    free_bytes: _Natural
    software: _Word
    started_at: float
    etcd_endpoint: _Word = ""
    protocol: _U16 = 1
    reclaim_grace_seconds: float = 3600.0  # how soon it may delete what nobody needs


_inode_decoder = msgspec.msgpack.Decoder(Inode)
_dentry_decoder = msgspec.msgpack.Decoder(Dentry)
_pin_decoder = msgspec.msgpack.Decoder(Pin)
_node_decoder = msgspec.msgpack.Decoder(NodeRecord)
encode = msgspec.msgpack.encode


def decode_inode(value: bytes) -> Inode:
    """Raises `ProtocolError` if the record is damaged."""
    record = _decode(_inode_decoder, value)
    check_inode(record)
    return record


def trusted_inode(value: bytes) -> Inode:
    """The record of a value that `decode_inode` has taken before, in half the time."""
    return _inode_decoder.decode(value)


def decode_dentry(value: bytes) -> Dentry:
    """Raises `ProtocolError` if the record is damaged."""
    dentry = _decode(_dentry_decoder, value)
    if dentry.kind not in KINDS:
        raise ProtocolError(f"a name of the unknown file type {dentry.kind:#o}")
    return dentry


def decode_pin(value: bytes) -> Pin:
    """Raises `ProtocolError` if the record is damaged."""
    return _decode(_pin_decoder, value)


def decode_node(value: bytes) -> NodeRecord:
    """Raises `ProtocolError` if the record is damaged."""
    record = _decode(_node_decoder, value)
    if not (is_label(record.name) and is_label(record.zone)):
        raise ProtocolError(f"a node that is called {record.name!r}, in the zone {record.zone!r}")
    for text in (record.host, record.etcd_endpoint, record.software):
        if not text.isprintable():
            raise ProtocolError(f"a record of a node with {text!r}")
    host, _, port = record.etcd_endpoint.rpartition(":")
    if record.etcd_endpoint and not (host and port.isascii() and port.isdigit()):
        raise ProtocolError(f"a node with etcd at {record.etcd_endpoint!r}")
    for seconds in (record.started_at, record.reclaim_grace_seconds):
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ProtocolError(f"a record of a node with a time of {seconds}")
    return record


def check_inode(record: Inode) -> None:
    """Raises `ProtocolError` if the fields of a decoded record do not fit each other."""
    if reason := _why_impossible(record):
        raise ProtocolError(f"an impossible record: {reason}")


def is_chunk_bytes(size: int) -> bool:
    """Whether a file can be cut into chunks of this size."""
    return CHUNK_BYTES_MIN <= size <= CHUNK_BYTES_MAX and size & (size - 1) == 0


def is_retention(seconds: float) -> bool:
    """Whether superseded versions can be kept for so long."""
    return 0 <= seconds <= RETAIN_SECONDS_MAX  # neither is true of NaN


def _why_impossible(record: Inode) -> str:
    """What is wrong with a record, in words; "" if nothing is."""
    if record.kind not in KINDS:
        return f"the unknown file type {record.kind:#o}"
    if record.chunk_bytes and not is_chunk_bytes(record.chunk_bytes):
        return f"chunks of {record.chunk_bytes} bytes"
    if record.manifest is None:
        if record.size > INLINE_BYTES_MAX:
            return f"{record.size} bytes without a manifest"
        if record.inline is not None and len(record.inline) > record.size:
            return f"{len(record.inline)} bytes of contents for a size of {record.size}"
    elif not record.is_file or record.inline is not None or not record.chunk_bytes:
        return "a manifest, where none can be"
    if record.hole_bytes > record.size:
        return f"{record.hole_bytes} bytes of holes in {record.size}"
    if any(b"\0" in name for name in record.xattrs):
        return "an extended attribute with a NUL in its name"
    policy = record.policy
    if policy is None:
        return ""
    if policy.chunk_bytes is not None and not is_chunk_bytes(policy.chunk_bytes):
        return f"a policy with chunks of {policy.chunk_bytes} bytes"
    if policy.retain_seconds is not None and not is_retention(policy.retain_seconds):
        return f"a policy that keeps versions for {policy.retain_seconds} s"
    return ""


def _decode(decoder: msgspec.msgpack.Decoder[Record], value: bytes) -> Record:
    if len(value) > RECORD_BYTES_MAX:
        raise ProtocolError(f"a record of {len(value)} bytes")
    try:
        return decoder.decode(value)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        # ValueError: text that is not UTF-8. RecursionError: arrays nested too deeply.
        raise ProtocolError(f"a damaged record: {error}") from error


def encode_dirtime(mtime_ns: int, ctime_ns: int) -> bytes:
    """A directory's times as etcd holds them."""
    return _DIRTIME.pack(mtime_ns, ctime_ns)


def decode_dirtime(value: bytes) -> tuple[int, int]:
    """(mtime, ctime) in nanoseconds. Raises `ProtocolError` if the record is damaged."""
    if len(value) != _DIRTIME.size:
        raise ProtocolError("a damaged dirtime record")
    mtime_ns, ctime_ns = _DIRTIME.unpack(value)
    return mtime_ns, ctime_ns


def check_name(name: bytes) -> bytes:
    """A name that a directory may hold. Raises `NameTooLong`."""
    assert name not in (b"", b".", b"..") and b"/" not in name and b"\0" not in name
    if len(name) > NAME_BYTES_MAX:
        raise NameTooLong(name)
    return name


def small_contents(record: Inode) -> bytearray | None:
    """A copy of the contents, if the record holds them and they are few."""
    if record.manifest is not None or record.size > INLINE_BYTES_MAX:
        return None
    return bytearray((record.inline or b"").ljust(record.size, b"\0"))


def writer_of(value: bytes) -> NodeId:
    """The node that a lease record names; "" if it is damaged: then no living node's."""
    text = value.decode("ascii", "replace")
    return NodeId(text if is_node_id(text) else "")


def inode_number(dentry: Dentry) -> InodeNumber:
    """The inode that a dentry names, typed."""
    return InodeNumber(dentry.ino)
