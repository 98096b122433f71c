"""Times of access, as Linux's `relatime` keeps them (mount(8)): seldom, and good enough.

A read moves atime only if atime is not after mtime and ctime, or is older than a day. So mail
readers and cleaners of caches learn whether a file was read since it was written, and a file that
is read all day is written to once.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from modelfs import keys
from modelfs.changes import Plan
from modelfs.ids import InodeNumber
from modelfs.inode import Inode, encode
from modelfs.mirror import Mirror
from modelfs.ports import Compare, Put, Target, Txn

STALE_NS = 24 * 3600 * 10**9  # as in the kernel's relatime_need_update()


def is_due(mirror: Mirror, ino: InodeNumber, record: Inode, now_ns: int) -> bool:
    """Whether an access now moves atime."""
    times = mirror.dirtime(ino) if record.is_directory else None
    changed_ns = max(record.mtime_ns, record.ctime_ns, *(times or ()))
    return record.atime_ns <= changed_ns or now_ns - record.atime_ns >= STALE_NS


def touch(mirror: Mirror, accesses: Mapping[InodeNumber, int]) -> Plan[int]:
    """Move the atime of those that still need it, in one transaction. The result: how many.

    Contents, version and ctime stay, so no kernel's pages are affected.
    """
    compares, puts = [], []
    for ino, now_ns in accesses.items():
        row, record = mirror.inode_row(ino), mirror.inode(ino)
        if row is None or record is None or not is_due(mirror, ino, record, now_ns):
            continue
        compares.append(Compare(keys.inode(ino), Target.MOD, row.mod_revision))
        puts.append(Put(keys.inode(ino), encode(replace(record, atime_ns=now_ns))))
    return Plan(Txn(tuple(compares), tuple(puts)), len(puts))
