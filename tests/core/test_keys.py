"""The key space: keys can be taken apart, keep their order, and never run into each other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelfs import keys
from modelfs.ids import Epoch, InodeNumber
from modelfs.limits import INODE_BITS

inos = st.integers(0, (1 << INODE_BITS) - 1).map(InodeNumber)
names = st.binary(min_size=1, max_size=255).filter(lambda n: b"/" not in n and b"\0" not in n)


@given(inos, names)
def test_a_dentrys_key_can_be_taken_apart(parent: InodeNumber, name: bytes) -> None:
    assert keys.split_dentry(keys.dentry(parent, name)) == (parent, name)


@given(inos, inos, names)
def test_the_range_of_a_directory_holds_its_names_and_no_others(
    one: InodeNumber, other: InodeNumber, name: bytes
) -> None:
    start, end = keys.dentries(one)
    assert (start <= keys.dentry(other, name) < end) == (one == other)


@given(inos, inos)
def test_keys_are_in_the_order_of_the_numbers(one: InodeNumber, other: InodeNumber) -> None:
    for make, prefix in (
        (keys.inode, keys.INODE_PREFIX),
        (keys.dirtime, keys.DIRTIME_PREFIX),
        (keys.lease, keys.LEASE_PREFIX),
    ):
        assert (make(one) < make(other)) == (one < other)
        assert keys.ino_of(make(one), prefix) == one


def test_no_prefix_is_the_beginning_of_another_key() -> None:
    prefixes = [
        keys.INODE_PREFIX, keys.DENTRY_PREFIX, keys.DIRTIME_PREFIX, keys.LEASE_PREFIX,
        keys.NODE_PREFIX, keys.MAP_PREFIX,
    ]  # fmt: skip
    singles = [keys.CLUSTER, keys.SEQ, keys.INODES, keys.DIRMOVE, keys.ETCD_JOIN]
    for prefix in prefixes:
        assert not any(
            other.startswith(prefix) for other in [*prefixes, *singles] if other != prefix
        )
    assert keys.placement_map(Epoch(255)) == b"map/000000ff"
