"""Extended attributes: what a record has room for, and what a change of one guards."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfs import keys
from modelfs.errors import (
    AttributeNotSupported,
    AttributesTooLarge,
    NoSuchAttribute,
    NoSuchEntry,
)
from modelfs.ids import InodeNumber, Revision
from modelfs.inode import Inode, decode_inode, encode
from modelfs.limits import INLINE_BYTES_MAX, KIB, RECORD_BYTES_MAX, SYMLINK_BYTES_MAX
from modelfs.mirror import Mirror
from modelfs.ports import Compare, Event, Put, Target
from modelfs.xattrs import get, set_xattr, visible

INO = InodeNumber(7)
EMPTY = Inode(mode=0o100644, uid=0, gid=0, atime_ns=1, mtime_ns=2, ctime_ns=3, inline=b"")


def mirror_with(record: Inode, revision: int = 5) -> Mirror:
    mirror = Mirror()
    at = Revision(revision)
    mirror.apply([Event(keys.inode(INO), encode(record), Revision(4), at)])
    return mirror


def test_a_set_compares_the_inode_and_puts_it_and_nothing_else() -> None:
    plan = set_xattr(mirror_with(EMPTY), INO, b"user.a", b"1", 99)
    assert plan.txn.compares == (Compare(keys.inode(INO), Target.MOD, Revision(5)),)
    (put,) = plan.txn.ops
    assert isinstance(put, Put) and put.key == keys.inode(INO)
    changed = decode_inode(put.value)
    assert changed == plan.result
    assert changed.xattrs == {b"user.a": b"1"} and changed.ctime_ns == 99
    assert changed.view == EMPTY.view and changed.mtime_ns == EMPTY.mtime_ns


@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"user.a", b"trusted.b", b"security.c"]),
            st.one_of(st.none(), st.binary(max_size=9)),
        ),
        max_size=20,
    )
)
def test_they_are_a_dictionary(steps: list[tuple[bytes, bytes | None]]) -> None:
    record, model = EMPTY, dict[bytes, bytes]()
    for name, value in steps:
        if value is None and name not in model:
            with pytest.raises(NoSuchAttribute):
                set_xattr(mirror_with(record), INO, name, None, 1)
            continue
        record = set_xattr(mirror_with(record), INO, name, value, 1).result
        model.pop(name, None)
        if value is not None:
            model[name] = value
        assert record.xattrs == model
        assert sorted(visible(record, True)) == sorted(model)
        assert b"trusted.b" not in visible(record, False)
        for known in model:
            assert get(record, known) == model[known]


def test_a_full_record_keeps_room_for_contents_and_target() -> None:
    record = EMPTY
    for number in range(RECORD_BYTES_MAX // 1000):
        try:
            record = set_xattr(mirror_with(record), INO, b"user.%d" % number, bytes(999), 1).result
        except AttributesTooLarge:
            break
    else:
        pytest.fail("the record was never full")
    spare = RECORD_BYTES_MAX - len(encode(record))
    assert spare > 4 * (INLINE_BYTES_MAX + SYMLINK_BYTES_MAX)
    with pytest.raises(AttributesTooLarge):
        set_xattr(mirror_with(EMPTY), INO, b"user.a", bytes(64 * KIB + 1), 1)
    with pytest.raises(AttributesTooLarge):
        set_xattr(mirror_with(EMPTY), INO, b"user." + b"n" * 251, b"", 1)


@pytest.mark.parametrize("name", [b"system.posix_acl_access", b"user", b"other.a", b""])
def test_other_namespaces_are_refused(name: bytes) -> None:
    with pytest.raises(AttributeNotSupported):
        set_xattr(mirror_with(EMPTY), INO, name, b"", 1)
    with pytest.raises(AttributeNotSupported):
        get(EMPTY, name)


def test_a_file_that_is_gone_has_none() -> None:
    with pytest.raises(NoSuchEntry):
        set_xattr(Mirror(), INO, b"user.a", b"", 1)
