"""What a mode lets a caller do, when the kernel does not ask first."""

from __future__ import annotations

import stat

import pytest

from modelfs.attributes import may_open
from modelfs.inode import Inode


@pytest.mark.parametrize(
    ("mode", "uid", "groups", "read", "write", "allowed"),
    [
        (0o000, 0, {0}, True, True, True),  # root
        (0o600, 7, {1}, True, True, True),  # the owner
        (0o077, 7, {8}, True, False, False),  # the owner's bits count, though others have more
        (0o640, 9, {1, 8}, True, False, True),  # a supplementary group
        (0o640, 9, {1, 8}, True, True, False),
        (0o604, 9, {8}, True, False, False),  # the group's bits count, though others have more
        (0o602, 9, {1}, False, True, True),  # others
        (0o602, 9, {1}, True, True, False),
    ],
)
def test_the_mode_decides_as_posix_says(
    mode: int, uid: int, groups: set[int], read: bool, write: bool, allowed: bool
) -> None:
    record = Inode(
        mode=stat.S_IFREG | mode, uid=7, gid=8, atime_ns=1, mtime_ns=1, ctime_ns=1, inline=b""
    )
    assert may_open(record, uid, groups, read, write) is allowed
