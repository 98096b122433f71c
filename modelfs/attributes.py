"""What chmod, chown and utimens make of a record, and what its mode lets a caller do."""

from __future__ import annotations

import stat
from collections.abc import Collection
from dataclasses import dataclass

from msgspec.structs import replace

from modelfs.inode import Inode


@dataclass(frozen=True, slots=True)
class AttributeChange:
    """What chmod, chown and utimens set; None leaves a field as it is."""

    permissions: int | None = None  # mode bits without the file type
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


def changed_attributes(record: Inode, change: AttributeChange, now_ns: int) -> Inode:
    """A record after a change; but for a directory's mtime, which is not in it."""
    fields = {"ctime_ns": now_ns}
    if change.permissions is not None:
        fields["mode"] = record.kind | change.permissions
    for name in ("uid", "gid", "atime_ns", *(() if record.is_directory else ("mtime_ns",))):
        value = getattr(change, name)
        if value is not None:
            fields[name] = value
    return replace(record, **fields)


def may_open(
    record: Inode, uid: int, groups: Collection[int], wants_read: bool, wants_write: bool
) -> bool:
    """Whether a file's mode lets a user with these groups open it, as POSIX says."""
    if uid == 0:
        return True
    in_group = record.gid in groups
    shift = 6 if uid == record.uid else 3 * in_group
    wanted = stat.S_IROTH * wants_read | stat.S_IWOTH * wants_write
    return record.mode >> shift & wanted == wanted
