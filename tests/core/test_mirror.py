"""The mirror: however the history is cut, and wherever a reload comes in, one state results."""

from __future__ import annotations

import stat
from random import Random
from typing import Any

import pytest

from modelfs import keys
from modelfs.errors import RecordUnreadable
from modelfs.ids import Epoch, InodeNumber, NodeId, Revision
from modelfs.inode import (
    Dentry,
    Inode,
    ManifestRef,
    NodeRecord,
    Pin,
    encode,
    encode_dirtime,
)
from modelfs.mirror import (
    NO_INODE,
    BecameUnreadable,
    Change,
    InodeChanged,
    LeaseChanged,
    Mirror,
    NameChanged,
)
from modelfs.placement import Member, make_map
from modelfs.ports import Delete, Event, KeyValue, Put
from modelfs.testing.metadata import MemoryMetadataStore

NODES = [NodeId(digit * 16) for digit in "abc"]


def a_put(rng: Random, epoch: int) -> Put:
    """Some record that the mirror knows; inode numbers and names repeat."""
    ino = InodeNumber(rng.randrange(2, 9))
    node = rng.choice(NODES)
    kind = stat.S_IFDIR if ino % 2 else stat.S_IFREG
    match rng.randrange(8):
        case 0 | 1:
            times: dict[str, Any] = dict.fromkeys(("atime_ns", "mtime_ns", "ctime_ns"), 1)
            record = Inode(mode=kind, uid=0, gid=0, size=rng.randrange(9), **times)
            return Put(keys.inode(ino), encode(record))
        case 2 | 3:
            name = rng.choice([b"a", b"b", b"c"])
            return Put(
                keys.dentry(InodeNumber(rng.randrange(1, 4)), name), encode(Dentry(ino, kind))
            )
        case 4:
            return Put(keys.dirtime(ino), encode_dirtime(rng.randrange(9), 1))
        case 5:
            return Put(keys.lease(ino), node.encode())
        case 6:
            record_of_node = NodeRecord(
                name="n", host="h", port=1, zone="", capacity_bytes=rng.randrange(9),
                used_bytes=0, free_bytes=0, software="1", started_at=0.0,
            )  # fmt: skip
            return Put(keys.node(node), encode(record_of_node))
        case _:
            if rng.random() < 0.3:
                members = [Member(node, "n", 1.0, "") for node in NODES[: 1 + epoch % 3]]
                return Put(
                    keys.placement_map(Epoch(epoch)), make_map(Epoch(epoch), members).encode()
                )
            pin = Pin(ManifestRef(bytes([ino]) * 32, 1, 1, 1), 2)
            return Put(keys.pin(node, pin.manifest.id), encode(pin))


def random_history(rng: Random) -> MemoryMetadataStore:
    """Revisions of one to four changes; maps are never deleted."""
    store = MemoryMetadataStore()
    for step in range(120):
        ops: dict[bytes, Put | Delete] = {}
        for _ in range(rng.randrange(1, 5)):
            put = a_put(rng, 1 + step)
            is_map = put.key.startswith(keys.MAP_PREFIX)
            ops[put.key] = put if is_map or rng.random() < 0.6 else Delete(put.key)
        if rng.random() < 0.5:
            ops[keys.SEQ] = Put(keys.SEQ, b"op%d" % step)
        store._apply(ops.values())
    return store


def rows_at(events: list[Event], revision: int) -> list[KeyValue]:
    """What a load at a revision gives."""
    rows: dict[bytes, KeyValue] = {}
    for event in events:
        if event.mod_revision <= revision:
            if event.value is None:
                rows.pop(event.key, None)
            else:
                rows[event.key] = KeyValue(
                    event.key, event.value, event.create_revision, event.mod_revision
                )
    return sorted(rows.values(), key=lambda row: row.key)


def state(mirror: Mirror) -> dict[str, Any]:
    """Everything that a mirror knows."""
    return dict(vars(mirror))


@pytest.mark.parametrize("seed", range(15))
def test_applying_and_reloading_lead_to_the_same_state(rng: Random, seed: int) -> None:
    store = random_history(rng)
    events = store._history
    truth = Mirror()
    truth.apply(events)
    last = events[-1].mod_revision
    for _ in range(12):
        mirror = Mirror()
        first, middle = sorted(rng.choices(range(1, last + 1), k=2))
        mirror.reload(Revision(first), rows_at(events, first))
        early = [e for e in events if first < e.mod_revision <= middle]
        cut = rng.randrange(len(early) + 1)
        while cut and cut < len(early) and early[cut].mod_revision == early[cut - 1].mod_revision:
            cut += 1  # whole revisions
        for part in (early[:cut], early[cut:]):
            mirror.apply(part)
        if rng.random() < 0.5:
            mirror.reload(Revision(last), rows_at(events, last))
        else:
            mirror.apply([e for e in events if e.mod_revision > middle])
        assert state(mirror) == state(truth)


@pytest.mark.parametrize("seed", range(5))
def test_a_reload_announces_what_became_different(rng: Random, seed: int) -> None:
    events = random_history(rng)._history
    last = events[-1].mod_revision
    middle = rng.randrange(1, last)
    mirror = Mirror()
    mirror.apply([e for e in events if e.mod_revision <= middle])
    old_names = {
        (p, n): c.ino for p, entries in mirror.children.items() for n, c in entries.items()
    }
    old_inodes = dict(mirror.inodes())
    old_leases = {ino: mirror.lease(ino) for ino in map(InodeNumber, range(9))}
    announced = mirror.reload(last, rows_at(events, last))
    # A listener that only follows the changes ends where the mirror is.
    names = dict(old_names)
    inodes = dict(old_inodes)
    told_leases = set()
    for change in announced:
        if isinstance(change, NameChanged):
            assert names.get((change.parent, change.name)) == change.old and change.origin == ""
            names.pop((change.parent, change.name), None)
            if change.new is not None:
                names[change.parent, change.name] = change.new
        elif isinstance(change, InodeChanged):
            assert inodes.pop(change.ino, None) == change.old
            if change.new is not None:
                inodes[change.ino] = change.new
        elif isinstance(change, LeaseChanged):
            told_leases.add(change.ino)
    assert names == {(p, n): c.ino for p, es in mirror.children.items() for n, c in es.items()}
    assert inodes == dict(mirror.inodes())
    for ino, lease in old_leases.items():
        assert mirror.lease(ino) == lease or ino in told_leases


def test_the_origin_is_that_of_the_revision_alone() -> None:
    store = MemoryMetadataStore()
    record = Inode(mode=stat.S_IFREG, uid=0, gid=0, atime_ns=0, mtime_ns=0, ctime_ns=0)
    put = Put(keys.inode(InodeNumber(2)), encode(record))
    store._apply([put, Put(keys.SEQ, b"mine")])
    store._apply([put])
    store._apply([Put(keys.SEQ, b"theirs"), put])
    changes = [c for c in Mirror().apply(store._history) if isinstance(c, InodeChanged)]
    assert [change.origin for change in changes] == ["mine", "", "theirs"]


def test_paths_and_ancestors() -> None:
    store = MemoryMetadataStore()
    for parent, name, ino in ((1, b"a", 2), (2, b"b", 3), (3, b"c", 4)):
        dentry = encode(Dentry(ino, stat.S_IFDIR))
        store._apply([Put(keys.dentry(InodeNumber(parent), name), dentry)])
    mirror = Mirror()
    mirror.apply(store._history)
    four, two = InodeNumber(4), InodeNumber(2)
    assert mirror.path_of(four) == b"a/b/c"
    assert mirror.is_inside(four, two) and not mirror.is_inside(two, four)
    store._apply([Delete(keys.dentry(InodeNumber(1), b"a"))])
    mirror.apply(store._history[-1:])
    assert mirror.path_of(four) == b"(unlinked)/b/c"
    assert mirror.parent_of(two) is None


# ---------------------------------------------------------------- what cannot be read

FAMILIES = [
    keys.INODE_PREFIX, keys.DENTRY_PREFIX, keys.DIRTIME_PREFIX, keys.LEASE_PREFIX,
    keys.NODE_PREFIX, keys.MAP_PREFIX, keys.PIN_PREFIX, keys.HISTORY_PREFIX,
    keys.SECURITY_PREFIX, keys.REVOKED_PREFIX, keys.SEQ, keys.INODES, keys.CLUSTER, keys.TRUST,
    b"", b"unknown/",
]  # fmt: skip


def spoil(rng: Random, store: MemoryMetadataStore, step: int) -> None:
    """Put garbage under some key: one that is in use, one like it, or any."""
    used = [key for key in store._keys if key != keys.SEQ]
    garbage = rng.choice([b"", b"\xc1", rng.randbytes(16), rng.randbytes(90), b"\x90" * 5000])
    match rng.randrange(4):
        case 0 | 1 if used:
            key = rng.choice(used)
        case 2 if used:
            key = rng.choice(used) + rng.choice([b"0", b"/", b"\0", b"\xff"])
        case _:
            key = rng.choice(FAMILIES) + rng.randbytes(rng.randrange(14))
    store._apply([Put(key, garbage), Put(keys.SEQ, b"spoiler%d" % step)])


def look_at_everything(mirror: Mirror) -> set[bytes]:
    """Ask for all that there is; the keys of the inodes that cannot be read."""
    refused = set()
    for ino in mirror.inode_numbers():
        try:
            assert mirror.inode(ino) is not None
        except RecordUnreadable as error:
            refused.add(error.key)
            assert mirror.readable_inode(ino) is None and mirror.is_unreadable(ino)
        mirror.dirtime(ino)
        mirror.lease(ino)
        mirror.path_of(ino)
        list(mirror.upwards(ino))
    for entries in list(mirror.children.values()):
        for child in entries.values():
            if child.ino == NO_INODE:
                with pytest.raises(RecordUnreadable):
                    mirror.inode(child.ino)
    mirror.revoked()
    list(mirror.inodes())
    return refused


@pytest.mark.parametrize("seed", range(15))
def test_garbage_ends_nothing_and_what_is_beside_it_stays(rng: Random, seed: int) -> None:
    """Applied one by one and reloaded, with garbage in between, until all of it is gone."""
    store = MemoryMetadataStore()
    mirror = Mirror()
    last = 0
    for step in range(150):
        if rng.random() < 0.4:
            spoil(rng, store, step)
        else:
            store._apply([a_put(rng, 1 + step)])
        mirror.apply([e for e in store._history if e.mod_revision > last])
        last = store._history[-1].mod_revision
        refused = look_at_everything(mirror)
        assert refused <= mirror.unreadable.keys() <= store._keys.keys()
        if rng.random() < 0.2:
            again = Mirror()
            again.reload(Revision(last), rows_at(store._history, last))
            seen, truth = state(again), state(mirror)
            for maps in (seen, truth):  # what was a map stays one, where it was seen
                maps.pop("maps"), maps.pop("latest_map")
            assert seen == truth
    bad = [Delete(key) for key in mirror.unreadable]
    if bad:
        store._apply(bad)
        mirror.apply([e for e in store._history if e.mod_revision > last])
    assert not mirror.unreadable and not look_at_everything(mirror)


def test_an_unreadable_record_is_neither_there_nor_gone() -> None:
    store, mirror, seen = MemoryMetadataStore(), Mirror(), 0

    def put(*puts: Put | Delete) -> list[Change]:
        nonlocal seen
        store._apply(puts)
        events = [e for e in store._history if e.mod_revision > seen]
        seen = events[-1].mod_revision
        return mirror.apply(events)

    ino, name = InodeNumber(2), keys.dentry(InodeNumber(1), b"f")
    record = Inode(mode=0o100644, uid=0, gid=0, atime_ns=0, mtime_ns=0, ctime_ns=0, size=9)
    put(Put(keys.inode(ino), encode(record)), Put(name, encode(Dentry(2, stat.S_IFREG))))
    changes = put(Put(keys.inode(ino), b"garbage"))
    assert [type(change) for change in changes] == [InodeChanged, BecameUnreadable]
    assert (mirror.file_count, mirror.file_bytes) == (0, 0)
    with pytest.raises(RecordUnreadable):
        mirror.inode(ino)
    row, child = mirror.inode_row(ino), mirror.child(InodeNumber(1), b"f")
    assert row is not None and row.mod_revision == seen
    assert child is not None and child.ino == ino
    put(Put(keys.inode(ino), encode(record)))
    assert mirror.inode(ino) == record and mirror.file_bytes == 9 and not mirror.unreadable
    put(Put(name, b"garbage"))
    child = mirror.child(InodeNumber(1), b"f")
    assert child is not None and child.ino == NO_INODE
    assert mirror.names.keys() == {NO_INODE}
    put(Delete(name))
    assert not mirror.children and not mirror.names and not mirror.unreadable


def test_who_wrote_a_damaged_lease_is_nobody_and_the_file_is_not_free() -> None:
    store, mirror, ino = MemoryMetadataStore(), Mirror(), InodeNumber(2)
    store._apply([Put(keys.lease(ino), b"garbage")])
    mirror.apply(store._history)
    assert mirror.lease(ino) == (NodeId(""), 2)
    assert list(mirror.unreadable) == [keys.lease(ino)]


def test_a_record_under_anothers_key_is_refused() -> None:
    store, mirror = MemoryMetadataStore(), Mirror()
    member = Member(NODES[0], "n", 1.0, "")
    pin = Pin(ManifestRef(b"m" * 32, 1, 1, 1), 2)
    store._apply([Put(keys.placement_map(Epoch(1)), make_map(Epoch(2), [member]).encode())])
    store._apply([Put(keys.pin(NODES[0], b"o" * 32), encode(pin))])
    mirror.apply(store._history)
    assert len(mirror.unreadable) == 2 and not mirror.maps and not mirror.pins


def test_names_in_a_circle_end_no_walk() -> None:
    store, mirror = MemoryMetadataStore(), Mirror()
    for parent, ino in ((2, 3), (3, 4), (4, 2)):
        dentry = encode(Dentry(ino, stat.S_IFDIR))
        store._apply([Put(keys.dentry(InodeNumber(parent), b"d"), dentry)])
    mirror.apply(store._history)
    assert sorted(mirror.upwards(InodeNumber(2))) == [2, 3, 4]
    assert not mirror.is_inside(InodeNumber(2), InodeNumber(9))
    assert mirror.path_of(InodeNumber(2)).startswith(b"(unlinked)")
