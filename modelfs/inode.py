"""Inodes and directory entries, as etcd holds them.

Records are MessagePack arrays: a later version may add fields at the end (old readers ignore
them, new readers fill in the defaults) and may never reorder or remove one.

A directory's times and link count are not in its record: the times are its *dirtime*, which every
change of the directory puts blindly (in the record it would make every two creates in one
directory conflict), and the link count follows from its entries.
"""

from __future__ import annotations

import stat
import struct
from typing import TypeVar

import msgspec

from modelfs.chunk import ChunkRef
from modelfs.errors import NameTooLong, ProtocolError
from modelfs.ids import ChunkId, Epoch, InodeNumber, NodeId, Version
from modelfs.limits import INLINE_BYTES_MAX, NAME_BYTES_MAX, RECORD_BYTES_MAX
from modelfs.manifest import PlacedChunk

Record = TypeVar("Record")

_DIRTIME = struct.Struct("<qq")


class ManifestRef(msgspec.Struct, array_like=True, frozen=True):
    """Where the root of a manifest is."""

    id: bytes
    checksum: int
    length: int
    epoch: int

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

    replicas: int | None = None
    retain_seconds: float | None = None  # of superseded versions; 0: they are not kept
    chunk_bytes: int | None = None


class Inode(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """One inode. Times are nanoseconds since 1970; `mode` holds the file type, as in stat(2).

    A file's contents are `inline` (also the empty file) or, if that is None, behind `manifest`.
    `version` counts commits of contents, `touches` changes of mtime alone; their sum is the
    *view*: a kernel that has seen one view keeps its pages, size and mtime for ever.
    """

    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    nlink: int = 1
    size: int = 0
    version: int = 1
    touches: int = 0
    inline: bytes | None = None
    manifest: ManifestRef | None = None
    chunk_bytes: int = 0
    replicas: int = 0
    editor: str = ""  # the node whose commit or utimens made this view
    rdev: int = 0
    target: bytes = b""  # of a symbolic link
    xattrs: dict[bytes, bytes] = {}
    policy: Policy | None = None
    hole_bytes: int = 0  # of the size: where no chunk is; at least so many

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

    ino: int
    kind: int
    base: int = 0


class Pin(msgspec.Struct, array_like=True, frozen=True):
    """A manifest whose chunks must stay, and how many copies of them the version has."""

    manifest: ManifestRef
    replicas: int


class NodeRecord(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """What a living node says of itself; it vanishes with the node's etcd lease. Sizes in bytes."""

    name: str
    host: str
    port: int
    zone: str
    capacity_bytes: int
    used_bytes: int
    free_bytes: int
    software: str
    started_at: float
    etcd_endpoint: str = ""
    protocol: int = 1
    reclaim_grace_seconds: float = 3600.0  # how soon it may delete what nobody needs


_inode_decoder = msgspec.msgpack.Decoder(Inode)
_dentry_decoder = msgspec.msgpack.Decoder(Dentry)
_pin_decoder = msgspec.msgpack.Decoder(Pin)
_node_decoder = msgspec.msgpack.Decoder(NodeRecord)
encode = msgspec.msgpack.encode


def decode_inode(value: bytes) -> Inode:
    """Raises `ProtocolError` if the record is damaged."""
    return _decode(_inode_decoder, value)


def decode_dentry(value: bytes) -> Dentry:
    """Raises `ProtocolError` if the record is damaged."""
    return _decode(_dentry_decoder, value)


def decode_pin(value: bytes) -> Pin:
    """Raises `ProtocolError` if the record is damaged."""
    return _decode(_pin_decoder, value)


def decode_node(value: bytes) -> NodeRecord:
    """Raises `ProtocolError` if the record is damaged."""
    return _decode(_node_decoder, value)


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
    """The node that a lease record names."""
    return NodeId(value.decode("ascii", "replace"))


def inode_number(dentry: Dentry) -> InodeNumber:
    """The inode that a dentry names, typed."""
    return InodeNumber(dentry.ino)
