"""Records: what is written is read, what a later version appends is ignored, garbage is refused."""

from __future__ import annotations

import stat
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfs import inode as inodes
from modelfs.errors import NameTooLong, ProtocolError
from modelfs.history import Retained, decode_retained
from modelfs.inode import COUNT_MAX, KINDS, Dentry, Inode, ManifestRef, NodeRecord, Pin, Policy
from modelfs.limits import (
    CHUNK_BYTES_MAX,
    CHUNK_BYTES_MIN,
    FILE_BYTES_MAX,
    INLINE_BYTES_MAX,
    LINKS_MAX,
    RECORD_BYTES_MAX,
    REPLICAS_MAX,
    RETAIN_SECONDS_MAX,
)
from modelfs.placement import decode_map

numbers = st.integers(0, 2**62)
names_of_nodes = st.text("0123456789abcdef", max_size=16)
chunk_sizes = st.sampled_from([CHUNK_BYTES_MIN << shift for shift in range(9)])
manifest_refs = st.builds(
    ManifestRef, id=st.binary(min_size=32, max_size=32), checksum=st.integers(0, 2**64 - 1),
    length=st.integers(1, CHUNK_BYTES_MAX), epoch=st.integers(0, 2**32 - 1),
)  # fmt: skip
policies = st.builds(
    Policy, replicas=st.none() | st.integers(1, REPLICAS_MAX),
    retain_seconds=st.none() | st.floats(0, RETAIN_SECONDS_MAX),
    chunk_bytes=st.none() | chunk_sizes,
)  # fmt: skip
u32 = st.integers(0, 2**32 - 1)
common: dict[str, Any] = {
    "uid": u32,
    "gid": u32,
    "atime_ns": numbers,
    "mtime_ns": st.integers(-(2**62), 2**62),
    "ctime_ns": numbers,
    "nlink": st.integers(0, LINKS_MAX),
    "version": st.integers(0, COUNT_MAX),
    "touches": st.integers(0, COUNT_MAX),
    "replicas": st.integers(0, REPLICAS_MAX),
    "rdev": u32,
    "editor": names_of_nodes,
    "policy": st.none() | policies,
    "xattrs": st.dictionaries(
        st.binary(min_size=1, max_size=10).filter(lambda name: b"\0" not in name),
        st.binary(max_size=10),
        max_size=3,
    ),
}


def modes(kinds: list[int]) -> st.SearchStrategy[int]:
    return st.builds(lambda kind, bits: kind | bits, st.sampled_from(kinds), st.integers(0, 0o7777))


small = st.builds(
    Inode, mode=modes(sorted(KINDS)), size=st.integers(100, INLINE_BYTES_MAX),
    inline=st.none() | st.binary(max_size=100), target=st.binary(max_size=50), **common,
)  # fmt: skip
large = st.builds(
    Inode, mode=modes([stat.S_IFREG]), size=st.integers(10**6, FILE_BYTES_MAX),
    manifest=manifest_refs, chunk_bytes=chunk_sizes, hole_bytes=st.integers(0, 10**6), **common,
)  # fmt: skip
records = small | large


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


RECODERS: list[Callable[[bytes], bytes]] = [
    lambda value: inodes.encode(inodes.decode_inode(value)),
    lambda value: inodes.encode(inodes.decode_dentry(value)),
    lambda value: inodes.encode(inodes.decode_pin(value)),
    lambda value: inodes.encode(inodes.decode_node(value)),
    lambda value: inodes.encode_dirtime(*inodes.decode_dirtime(value)),
    lambda value: inodes.encode(decode_retained(value)),
    lambda value: decode_map(value).encode(),
]


def is_refused_or_stable(value: bytes) -> None:
    """Every decoder refuses bytes, or gives what is written and read as the same record again."""
    for recode in RECODERS:
        try:
            once = recode(value)
        except ProtocolError:
            continue
        assert recode(once) == once
    inodes.writer_of(value)


@given(st.binary(max_size=200))
def test_garbage_is_refused_by_every_decoder(value: bytes) -> None:
    is_refused_or_stable(value)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary()
    | st.text() | st.sampled_from(["ab" * 8, b"x" * 32, 0o100644, 0o40755, CHUNK_BYTES_MIN]),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.binary(), inner, max_size=3),
    max_leaves=30,
)  # fmt: skip


@given(st.lists(anything, max_size=22))
def test_any_array_is_refused_or_a_valid_record(row: list[Any]) -> None:
    is_refused_or_stable(msgspec.msgpack.encode(row))


whole_records = (
    records
    | st.builds(Dentry, st.integers(2, 2**40 - 1), st.sampled_from(sorted(KINDS)), u32)
    | st.builds(Pin, manifest_refs, st.integers(0, REPLICAS_MAX))
    | st.builds(
        Retained, ino=st.integers(1, 2**40 - 1), record=records, superseded_ns=numbers,
        why=st.text(max_size=10), node=names_of_nodes, retain_seconds=st.floats(0, 10**9),
    )
)  # fmt: skip


@given(whole_records, st.data())
def test_a_record_with_another_field_is_refused_or_valid(
    record: object, data: st.DataObject
) -> None:
    """One field at a time, so that the rest does not hide what is wrong with it."""
    row = msgspec.msgpack.decode(inodes.encode(record), strict=False)
    index = data.draw(st.integers(0, len(row) - 1))
    row[index] = data.draw(anything)
    is_refused_or_stable(msgspec.msgpack.encode(row))


@given(whole_records, st.data())
def test_a_damaged_record_is_refused_or_is_another_record(
    record: object, data: st.DataObject
) -> None:
    value = bytearray(inodes.encode(record))
    value[data.draw(st.integers(0, len(value) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    is_refused_or_stable(bytes(value))


FILE = Inode(
    mode=0o100644, uid=0, gid=0, atime_ns=0, mtime_ns=0, ctime_ns=0, size=10**6,
    manifest=ManifestRef(b"m" * 32, 1, 100, 1), chunk_bytes=CHUNK_BYTES_MIN, replicas=2,
)  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": 0o644},
        {"mode": 0o160644},
        {"mode": 1 << 16},
        {"uid": -1},
        {"gid": 1 << 32},
        {"nlink": -1},
        {"nlink": LINKS_MAX + 1},
        {"size": -1},
        {"size": FILE_BYTES_MAX + 1},
        {"version": -1},
        {"touches": COUNT_MAX + 1},
        {"inline": b""},  # and a manifest
        {"manifest": None},  # and a size of a megabyte
        {"manifest": None, "size": 3, "inline": b"four"},
        {"manifest": None, "size": 9000, "inline": bytes(INLINE_BYTES_MAX + 1)},
        {"manifest": ManifestRef(b"m" * 31, 1, 100, 1)},
        {"manifest": ManifestRef(b"m" * 32, -1, 100, 1)},
        {"manifest": ManifestRef(b"m" * 32, 1, 0, 1)},
        {"manifest": ManifestRef(b"m" * 32, 1, CHUNK_BYTES_MAX + 1, 1)},
        {"manifest": ManifestRef(b"m" * 32, 1, 100, 1 << 32)},
        {"mode": 0o40755},  # a directory with a manifest
        {"chunk_bytes": 0},
        {"chunk_bytes": CHUNK_BYTES_MIN // 2},
        {"chunk_bytes": CHUNK_BYTES_MIN * 3},
        {"chunk_bytes": CHUNK_BYTES_MAX * 2},
        {"replicas": -1},
        {"replicas": REPLICAS_MAX + 1},
        {"editor": "x" * 256},
        {"rdev": -1},
        {"target": b"x" * 4096},
        {"xattrs": {b"": b""}},
        {"xattrs": {b"a\0b": b""}},
        {"xattrs": {b"x" * 256: b""}},
        {"xattrs": {b"x": bytes((64 << 10) + 1)}},
        {"policy": Policy(replicas=0)},
        {"policy": Policy(retain_seconds=float("nan"))},
        {"policy": Policy(retain_seconds=-1.0)},
        {"policy": Policy(retain_seconds=1e300)},
        {"policy": Policy(chunk_bytes=5)},
        {"hole_bytes": 10**6 + 1},
    ],
    ids=repr,
)
def test_what_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    assert inodes.decode_inode(inodes.encode(FILE)) == FILE
    value = inodes.encode(msgspec.structs.replace(FILE, **fields))
    with pytest.raises(ProtocolError):
        inodes.decode_inode(value)


@pytest.mark.parametrize(
    "dentry", [Dentry(0, 0o100000), Dentry(1, 0o40000), Dentry(1 << 40, 0o100000), Dentry(2, 0)]
)
def test_a_name_of_what_cannot_be_is_refused(dentry: Dentry) -> None:
    with pytest.raises(ProtocolError):
        inodes.decode_dentry(inodes.encode(dentry))


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
