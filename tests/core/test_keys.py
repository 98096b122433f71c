"""The key space: keys can be taken apart, keep their order, and never run into each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfs import keys
from modelfs.errors import ProtocolError
from modelfs.ids import Epoch, InodeNumber
from modelfs.limits import INODE_BITS

inos = st.integers(1, (1 << INODE_BITS) - 1).map(InodeNumber)
names = st.binary(min_size=1, max_size=255).filter(
    lambda n: b"/" not in n and b"\0" not in n and n not in (b".", b"..")
)


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


@given(
    st.sampled_from(
        [
            keys.DENTRY_PREFIX, keys.HISTORY_PREFIX, keys.PIN_PREFIX, keys.NODE_PREFIX,
            keys.MAP_PREFIX, keys.INODE_PREFIX,
        ]
    ),
    st.binary(max_size=90)
    | st.from_regex(rb"[0-9a-f]{10}(/[a-c./\x00]{0,5}(\x00[0-9a-f]{8})?)?", fullmatch=True)
    | st.from_regex(rb"[0-9a-f]{16}(/[0-9a-f]{64})?", fullmatch=True),
)  # fmt: skip
def test_any_key_is_refused_or_the_one_way_to_write_it(prefix: bytes, rest: bytes) -> None:
    key = prefix + rest
    take_apart_and_join: dict[bytes, Callable[[], bytes]] = {
        keys.DENTRY_PREFIX: lambda: keys.dentry(*keys.split_dentry(key)),
        keys.HISTORY_PREFIX: lambda: keys.history(*keys.split_history(key)),
        keys.PIN_PREFIX: lambda: keys.pin(*keys.split_pin(key)),
        keys.NODE_PREFIX: lambda: keys.node(keys.node_of(key)),
        keys.INODE_PREFIX: lambda: keys.inode(keys.ino_of(key, keys.INODE_PREFIX)),
    }
    take_apart_and_join[keys.MAP_PREFIX] = lambda: keys.placement_map(keys.epoch_of(key))
    try:
        again = take_apart_and_join[prefix]()
    except ProtocolError:
        return
    assert again == key


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"a\0", b"x" * 256])
def test_a_key_with_a_name_that_cannot_be_is_refused(name: bytes) -> None:
    with pytest.raises(ProtocolError):
        keys.split_dentry(keys.dentry(InodeNumber(1), name))
    with pytest.raises(ProtocolError):
        keys.split_history(keys.history(InodeNumber(1), name, 1))


@pytest.mark.parametrize("ino", [b"1", b"0x00000001", b"000000000G", b"0000000000", b" 000000001"])
def test_a_key_with_another_spelling_of_a_number_is_refused(ino: bytes) -> None:
    with pytest.raises(ProtocolError):
        keys.ino_of(keys.INODE_PREFIX + ino, keys.INODE_PREFIX)
