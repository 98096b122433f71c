"""Times of access: when they move, and what moving them leaves alone."""

from __future__ import annotations

import pytest

from modelfs import keys
from modelfs.access_times import STALE_NS, is_due, touch
from modelfs.ids import InodeNumber
from modelfs.inode import Inode, decode_inode, encode, encode_dirtime
from modelfs.mirror import Mirror
from modelfs.ports import Put
from tests.core.posix_tree import History

FILE = InodeNumber(7)


def mirror_with(record: Inode, dirtime: tuple[int, int] | None = None) -> Mirror:
    """A mirror that holds one inode."""
    history, mirror = History(), Mirror()
    puts = [Put(keys.inode(FILE), encode(record))]
    if dirtime is not None:
        puts.append(Put(keys.dirtime(FILE), encode_dirtime(*dirtime)))
    history._apply(puts)
    mirror.apply(history.events_after(0))
    return mirror


def a_record(atime_ns: int, mtime_ns: int, ctime_ns: int, mode: int = 0o100644) -> Inode:
    """Some inode."""
    return Inode(
        mode=mode, uid=0, gid=0, atime_ns=atime_ns, mtime_ns=mtime_ns, ctime_ns=ctime_ns, size=5
    )


@pytest.mark.parametrize(
    ("atime_ns", "now_ns", "wanted"),
    [(10, 11, True), (20, 21, True), (21, 22, False), (21, 21 + STALE_NS, True)],
)
def test_an_access_counts_after_a_change_or_a_day(atime_ns: int, now_ns: int, wanted: bool) -> None:
    record = a_record(atime_ns, 15, 20)
    assert is_due(mirror_with(record), FILE, record, now_ns) == wanted


def test_a_directory_changes_with_its_names() -> None:
    record = a_record(20, 15, 15, 0o40755)
    assert not is_due(mirror_with(record), FILE, record, 30)
    assert is_due(mirror_with(record, (25, 25)), FILE, record, 30)


def test_a_touch_moves_atime_alone_and_compares_what_it_writes() -> None:
    record = a_record(10, 15, 20)
    plan = touch(mirror_with(record), {FILE: 30, InodeNumber(8): 30})
    assert plan.result == 1
    (put,) = plan.txn.ops
    assert isinstance(put, Put) and [put.key] == [compare.key for compare in plan.txn.compares]
    touched = decode_inode(put.value)
    assert (touched.atime_ns, touched.mtime_ns, touched.ctime_ns) == (30, 15, 20)
    assert touched.view == record.view


def test_what_was_touched_by_others_meanwhile_is_left_alone() -> None:
    assert not touch(mirror_with(a_record(25, 15, 20)), {FILE: 30}).txn.ops
