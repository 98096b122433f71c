"""What a mirror holds and tells: rows with their revisions, and the changes that it announces."""

from __future__ import annotations

from dataclasses import dataclass

from modelfs.ids import Epoch, InodeNumber, NodeId, Revision
from modelfs.inode import Inode, NodeRecord

Name = tuple[InodeNumber, bytes]


@dataclass(frozen=True, slots=True)
class Row:
    """A value of etcd with the revisions that guard it."""

    value: bytes
    create_revision: Revision
    mod_revision: Revision


@dataclass(frozen=True, slots=True)
class Child:
    """A directory entry."""

    ino: InodeNumber
    kind: int  # file type bits
    mod_revision: Revision
    base: int = 0


@dataclass(frozen=True, slots=True)
class NameChanged:
    """A name now means another inode, or none, or a first one."""

    parent: InodeNumber
    name: bytes
    old: InodeNumber | None
    new: InodeNumber | None
    origin: str


@dataclass(frozen=True, slots=True)
class InodeChanged:
    """An inode's record changed, appeared (old is None) or went (new is None)."""

    ino: InodeNumber
    old: Inode | None
    new: Inode | None
    origin: str


@dataclass(frozen=True, slots=True)
class DirectoryTouched:
    """A directory's times changed, or went with it: then `last_mtime_ns` is what they ended with.

    Whoever is inside a removed directory still sees them.
    """

    ino: InodeNumber
    origin: str
    last_mtime_ns: int | None = None


@dataclass(frozen=True, slots=True)
class LeaseChanged:
    """A file's writer changed; None: nobody may write it now."""

    ino: InodeNumber
    node: NodeId | None


@dataclass(frozen=True, slots=True)
class NodeChanged:
    """A node came, spoke or went (None)."""

    node: NodeId
    record: NodeRecord | None


@dataclass(frozen=True, slots=True)
class MapChanged:
    """There is a new placement map."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class PinChanged:
    """A node pinned a manifest, or let go of it."""

    node: NodeId
    manifest: bytes


@dataclass(frozen=True, slots=True)
class SecurityChanged:
    """Something under `keys.SECURITY_PREFIX` changed."""


@dataclass(frozen=True, slots=True)
class BecameUnreadable:
    """A record came that cannot be read: `Mirror.unreadable` has it from now on."""

    key: bytes
    reason: str


_NameChange = NameChanged | InodeChanged | DirectoryTouched
_NodeChange = NodeChanged | MapChanged | PinChanged | SecurityChanged
Change = _NameChange | LeaseChanged | _NodeChange | BecameUnreadable
