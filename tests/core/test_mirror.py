"""The mirror: however the history is cut, and wherever a reload comes in, one state results."""

from __future__ import annotations

import stat
from random import Random
from typing import Any

import pytest

from modelfs import keys
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
from modelfs.mirror import InodeChanged, LeaseChanged, Mirror, NameChanged
from modelfs.placement import Member, make_map
from modelfs.ports import Delete, Event, KeyValue, Put
from modelfs.testing.metadata import MemoryMetadataStore

NODES = [NodeId(digit * 16) for digit in "abc"]


def a_put(rng: Random, epoch: int) -> Put:
    """Some record that the mirror knows; inode numbers and names repeat."""
    ino = InodeNumber(rng.randrange(1, 8))
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
    old_leases = {ino: mirror.lease(ino) for ino in map(InodeNumber, range(8))}
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
