"""Extended attributes: what may be set, and the transaction that sets it.

They stand in the inode record, so they are as durable, atomic and visible as a chmod, and travel
with every change of the record. That bounds them: names and values of an inode together to
`XATTRS_BYTES_MAX`, which leaves the rest of a record the room that it may come to need, and the
names to what listxattr(2) can return.

Kept are `user.*`, `trusted.*` and `security.*`; who may see and set them is checked by the kernel
(but for the listing of `trusted.*`, see `visible`). POSIX ACLs (`system.*`) are refused: the kernel
would have to apply them, which it does not do for this mount.
"""

from __future__ import annotations

from msgspec.structs import replace

from modelfs import keys
from modelfs.changes import Plan
from modelfs.errors import (
    AttributeNotSupported,
    AttributesTooLarge,
    InvalidAttributeName,
    NoSuchAttribute,
    NoSuchEntry,
)
from modelfs.ids import InodeNumber
from modelfs.inode import Inode, encode
from modelfs.limits import (
    RECORD_BYTES_MAX,
    XATTR_NAME_BYTES_MAX,
    XATTR_NAMES_BYTES_MAX,
    XATTR_VALUE_BYTES_MAX,
    XATTRS_BYTES_MAX,
)
from modelfs.mirror import Mirror
from modelfs.ports import Compare, Put, Target, Txn

NAMESPACES = (b"user.", b"trusted.", b"security.")
FRAME_BYTES = 8  # MessagePack's heads of a name and a value, at most


def check_supported(name: bytes) -> None:
    """Raises `AttributeNotSupported` and `InvalidAttributeName`."""
    if name in NAMESPACES:
        raise InvalidAttributeName(name)
    if not name.startswith(NAMESPACES):
        raise AttributeNotSupported(name)


def get(record: Inode, name: bytes) -> bytes:
    """The value. Raises `NoSuchAttribute`, `AttributeNotSupported`."""
    value = record.xattrs.get(name)
    if value is None:
        check_supported(name)
        raise NoSuchAttribute(name)
    return value


def visible(record: Inode, is_root: bool) -> list[bytes]:
    """The names that listxattr shows: `trusted.*` only to root, as on other file systems."""
    return [name for name in record.xattrs if is_root or not name.startswith(b"trusted.")]


def changed_xattrs(record: Inode, name: bytes, value: bytes | None, now_ns: int) -> Inode:
    """A record after an attribute was set, or removed (None). Moves ctime, and nothing else.

    Raises `AttributeNotSupported`, `InvalidAttributeName`, `NoSuchAttribute` and
    `AttributesTooLarge`.
    """
    check_supported(name)
    xattrs = dict(record.xattrs)
    if value is not None:
        xattrs[name] = value
        _check_size(xattrs, name, value)
    elif xattrs.pop(name, None) is None:
        raise NoSuchAttribute(name)
    return replace(record, xattrs=xattrs, ctime_ns=now_ns)


def set_xattr(
    mirror: Mirror, ino: InodeNumber, name: bytes, value: bytes | None, now_ns: int
) -> Plan[Inode]:
    """Set an attribute, or remove it. Raises `NoSuchEntry`, and what `changed_xattrs` does."""
    check_supported(name)
    row, record = mirror.inode_row(ino), mirror.inode(ino)
    if row is None or record is None:
        raise NoSuchEntry(ino)
    changed = changed_xattrs(record, name, value, now_ns)
    encoded = encode(changed)
    if len(encoded) > RECORD_BYTES_MAX:
        raise AttributesTooLarge(name)
    guard = Compare(keys.inode(ino), Target.MOD, row.mod_revision)
    return Plan(Txn((guard,), (Put(keys.inode(ino), encoded),)), changed)


def _check_size(xattrs: dict[bytes, bytes], name: bytes, value: bytes) -> None:
    names_bytes = sum(len(one) + 1 for one in xattrs)
    total_bytes = sum(len(one) + len(its) + FRAME_BYTES for one, its in xattrs.items())
    if (
        len(name) > XATTR_NAME_BYTES_MAX
        or len(value) > XATTR_VALUE_BYTES_MAX
        or names_bytes > XATTR_NAMES_BYTES_MAX
        or total_bytes > XATTRS_BYTES_MAX
    ):
        raise AttributesTooLarge(name)
