"""What a mode lets a caller do, when the kernel does not ask first."""

from __future__ import annotations

import stat

import pytest

from modelfs.attributes import (
    TIME_NS_MAX,
    TIME_NS_MIN,
    AttributeChange,
    may_open,
    only_repeats,
    permissions_after_write,
    storable,
)
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


@pytest.mark.parametrize(
    ("mode", "left"),
    [(0o6777, 0o777), (0o4600, 0o600), (0o2644, 0o2644), (0o2654, 0o654), (0o1755, 0o1755)],
)
def test_a_write_takes_the_set_id_bits_that_mean_execution(mode: int, left: int) -> None:
    assert permissions_after_write(stat.S_IFREG | mode) == left


def test_times_are_kept_within_what_a_record_holds() -> None:
    assert [storable(each) for each in (-(1 << 70), -5, 0, 1 << 70)] == [
        TIME_NS_MIN,
        -5,
        0,
        TIME_NS_MAX,
    ]


@pytest.mark.parametrize(
    ("change", "repeats"),
    [
        (AttributeChange(mtime_ns=2), True),
        (AttributeChange(mtime_ns=3), False),
        (AttributeChange(atime_ns=1, mtime_ns=2), False),
        (AttributeChange(permissions=0o644, mtime_ns=2), False),
        (AttributeChange(uid=7), False),
        (AttributeChange(moves_ctime=True), False),
    ],
)
def test_only_a_file_s_own_mtime_is_a_repetition(change: AttributeChange, repeats: bool) -> None:
    record = Inode(
        mode=stat.S_IFREG | 0o644, uid=7, gid=8, atime_ns=1, mtime_ns=2, ctime_ns=3, inline=b""
    )
    assert only_repeats(record, change) is repeats
