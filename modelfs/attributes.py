"""What chmod, chown and utimens make of a record, and what its mode lets a caller do."""

from __future__ import annotations

import stat
from collections.abc import Collection
from dataclasses import dataclass

from msgspec.structs import replace

from modelfs.inode import Inode

TIME_NS_MIN, TIME_NS_MAX = -(1 << 63), (1 << 63) - 1  # what dirtimes and records hold


@dataclass(frozen=True, slots=True)
class AttributeChange:
    """What chmod, chown and utimens set; None leaves a field as it is.

    `moves_ctime` is a chown(-1, -1), which sets nothing, and moves ctime all the same.
    """

    permissions: int | None = None  # mode bits without the file type
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    moves_ctime: bool = False


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


def changed_when_unlinked(record: Inode, change: AttributeChange, now_ns: int) -> Inode:
    """As `changed_attributes`, of what has no name any more, and is seen through handles alone.

    A removed directory has its mtime in its record.
    """
    changed = changed_attributes(record, change, now_ns)
    return changed if change.mtime_ns is None else replace(changed, mtime_ns=change.mtime_ns)


def only_repeats(record: Inode, change: AttributeChange) -> bool:
    """Whether this only repeats the mtime. An explicit chmod or chown must move ctime.

    Of anything but a file the kernel keeps no times, so there it repeats nothing.
    """
    if change.permissions is not None or change.uid is not None or change.gid is not None:
        return False
    if change.moves_ctime:
        return False
    if change.atime_ns is not None or not record.is_file:
        return change == AttributeChange()
    return change.mtime_ns is None or change.mtime_ns == record.mtime_ns


def permissions_after_write(mode: int) -> int:
    """The permissions without what a write by others than root takes: the set-id bits.

    Without the group's x the set-group-id bit means something else, and stays.
    """
    taken = stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0)
    return stat.S_IMODE(mode) & ~taken


def storable(time_ns: int) -> int:
    """The nearest time that a record can hold, as Linux has it: 1677 to 2262."""
    return min(max(time_ns, TIME_NS_MIN), TIME_NS_MAX)


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
