"""Records: what is written is read, what a later version appends is ignored, garbage is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfs import inode as inodes
from modelfs.errors import NameTooLong, ProtocolError
from modelfs.inode import Dentry, Inode, ManifestRef, NodeRecord
from modelfs.limits import RECORD_BYTES_MAX

numbers = st.integers(0, 2**62)
manifest_refs = st.builds(
    ManifestRef, id=st.binary(min_size=32, max_size=32), checksum=numbers, length=numbers,
    epoch=numbers,
)  # fmt: skip
records = st.builds(
    Inode,
    mode=st.integers(0, 0o177777),
    uid=numbers, gid=numbers, atime_ns=numbers,
    mtime_ns=st.integers(-(2**62), 2**62),
    ctime_ns=numbers, nlink=numbers, size=numbers, version=numbers, touches=numbers,
    inline=st.none() | st.binary(max_size=100),
    manifest=st.none() | manifest_refs,
    editor=st.text(max_size=20),
    target=st.binary(max_size=50),
    xattrs=st.dictionaries(st.binary(max_size=10), st.binary(max_size=10), max_size=3),
)  # fmt: skip


@given(records, st.lists(st.none() | st.integers() | st.binary(max_size=5), max_size=3))
def test_an_inode_survives_and_ignores_what_later_versions_append(
    record: Inode, later: list[Any]
) -> None:
    value = inodes.encode(record)
    assert inodes.decode_inode(value) == record
    row = msgspec.msgpack.decode(value)
    later = [field for field in later if not isinstance(field, int) or -(2**63) <= field < 2**64]
    assert inodes.decode_inode(msgspec.msgpack.encode([*row, *later])) == record


def test_fields_that_an_older_version_did_not_write_get_their_defaults() -> None:
    whole = Inode(mode=0o100644, uid=1, gid=2, atime_ns=3, mtime_ns=4, ctime_ns=5)
    row = msgspec.msgpack.decode(inodes.encode(whole))
    assert inodes.decode_inode(msgspec.msgpack.encode(row[:6])) == whole
    node = NodeRecord(
        name="n", host="h", port=1, zone="", capacity_bytes=1, used_bytes=0, free_bytes=1,
        software="1", started_at=1.5,
    )  # fmt: skip
    row = msgspec.msgpack.decode(inodes.encode(node))
    assert inodes.decode_node(msgspec.msgpack.encode(row[:9])) == node


def test_the_order_of_an_inodes_fields_is_the_format() -> None:
    assert Inode.__struct_fields__ == (
        "mode", "uid", "gid", "atime_ns", "mtime_ns", "ctime_ns", "nlink", "size", "version",
        "touches", "inline", "manifest", "chunk_bytes", "replicas", "editor", "rdev", "target",
        "xattrs", "policy", "hole_bytes",
    )  # fmt: skip


@given(st.binary(max_size=200))
def test_garbage_is_refused_by_every_decoder(value: bytes) -> None:
    for decode in (inodes.decode_inode, inodes.decode_dentry, inodes.decode_node):
        try:
            decode(value)
        except ProtocolError:
            continue
    if len(value) != 16:
        with pytest.raises(ProtocolError):
            inodes.decode_dirtime(value)
    inodes.writer_of(value)


@given(records, st.data())
def test_a_damaged_record_is_refused_or_is_another_record(
    record: Inode, data: st.DataObject
) -> None:
    value = bytearray(inodes.encode(record))
    value[data.draw(st.integers(0, len(value) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        inodes.decode_inode(bytes(value))
    except ProtocolError:
        return


def test_an_oversized_record_is_refused() -> None:
    with pytest.raises(ProtocolError):
        inodes.decode_dentry(bytes(RECORD_BYTES_MAX + 1))


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_dirtimes_survive(mtime_ns: int, ctime_ns: int) -> None:
    assert inodes.decode_dirtime(inodes.encode_dirtime(mtime_ns, ctime_ns)) == (mtime_ns, ctime_ns)


def test_names_are_bounded() -> None:
    assert inodes.check_name(b"\xff" * 255) == b"\xff" * 255
    with pytest.raises(NameTooLong):
        inodes.check_name(b"x" * 256)


def test_a_dentry_survives() -> None:
    assert inodes.decode_dentry(inodes.encode(Dentry(7, 0o40000))) == Dentry(7, 0o40000)
