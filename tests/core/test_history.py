"""Retained versions: every name against a list of what it showed, by nodes whose mirrors lag."""

from __future__ import annotations

import stat
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec.structs import replace

from modelfs import changes, keys
from modelfs.changes import Plan
from modelfs.errors import NamespaceError, ProtocolError
from modelfs.history import HistoryIndex, Retained, decode_retained
from modelfs.ids import ROOT_INODE, InodeNumber, NodeId
from modelfs.inode import Inode, Policy, encode
from modelfs.mirror import Mirror, Name
from modelfs.policy import Keep, Rules, number_of
from modelfs.ports import Delete, Event, KeyValue, Put, Txn
from modelfs.testing.metadata import MemoryMetadataStore

NODE = NodeId("a" * 16)
KEEP = Keep(NODE, Rules(retain_seconds=60))
NAMES: list[Name] = [(ROOT_INODE, b"a"), (ROOT_INODE, b"b"), (ROOT_INODE, b"c")]
SMALL = InodeNumber(5)


def an_inode(kind: int) -> Inode:
    times: dict[str, Any] = dict.fromkeys(("atime_ns", "mtime_ns", "ctime_ns"), 1)
    return Inode(mode=kind | 0o644, uid=0, gid=0, **times)


class Cluster:
    """The memory store without a scheduler, and mirrors that hear of it when the test says so."""

    def __init__(self, mirrors: int = 1) -> None:
        self.store = MemoryMetadataStore()
        self.store._apply([Put(keys.inode(ROOT_INODE), encode(an_inode(stat.S_IFDIR)))])
        self.mirrors = [Mirror() for _ in range(mirrors)]
        self.truth = Mirror()
        self.next_ino = 2
        for mirror in (*self.mirrors, self.truth):
            self.hear(mirror)

    def hear(self, mirror: Mirror) -> None:
        new: list[Event] = [e for e in self.store._history if e.mod_revision > mirror.revision]
        mirror.apply(new)

    def do(self, mirror: Mirror, make_plan: Callable[[Mirror], Plan[Any]]) -> bool:
        """Plan from a mirror and commit. Whether it went through."""
        try:
            plan = make_plan(mirror)
        except NamespaceError:
            return False
        if not plan.txn.ops or not self.commit(plan.txn):
            return False
        self.hear(mirror)
        return True

    def commit(self, txn: Txn) -> bool:
        if not all(self.store._holds(compare) for compare in txn.compares):
            return False
        self.store._apply(txn.ops)
        self.hear(self.truth)
        return True

    def create(self, name: Name, mirror: Mirror | None = None, kind: int = stat.S_IFREG) -> bool:
        ino = InodeNumber(self.next_ino)
        self.next_ino += 1
        record = an_inode(kind)
        return self.do(mirror or self.truth, lambda m: changes.create(m, *name, ino, record))

    def write(self, name: Name, size: int, keep: Keep | None = KEEP) -> None:
        """Commit contents of this size, by a node that is up to date."""
        child = self.truth.child(*name)
        assert child is not None
        ino, record = child.ino, self.truth.inode(child.ino)
        assert record is not None
        assert self.do(self.truth, lambda m: changes.take_lease(m, ino, NODE, 0))
        lease, contents = self.truth.lease(ino), replace(record, size=size)
        assert lease is not None
        assert self.do(
            self.truth,
            lambda m: changes.commit_contents(m, ino, lease[1], record.version, contents, 7, keep),
        )
        assert self.do(self.truth, lambda m: changes.drop_leases(m, {ino: lease[1]}))

    def retained(self, name: Name) -> dict[int, Retained]:
        """What etcd holds of a name's history."""
        prefix = keys.history_of(*name)
        return {
            keys.split_history(key)[2]: decode_retained(row.value)
            for key, row in self.store._keys.items()
            if key.startswith(prefix)
        }

    def number(self, name: Name) -> int:
        return number_of(self.truth, *name)


# ---------------------------------------------------------------- the model

picks = st.integers(0, len(NAMES) - 1)
mirror_picks = st.integers(0, 1)


class NamesAndTheirPasts(RuleBasedStateMachine):
    """Contents are told apart by their sizes, which are never used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster(2)
        self.past: dict[Name, dict[int, tuple[int, str]]] = {name: {} for name in NAMES}
        self.last_size = 0

    def shown(self, name: Name) -> tuple[int, int] | None:
        """(number, size) of what a name shows."""
        child = self.cluster.truth.child(*name)
        if child is None:
            return None
        record = self.cluster.truth.inode(child.ino)
        assert record is not None
        return self.cluster.number(name), record.size

    @rule(n=mirror_picks)
    def hear(self, n: int) -> None:
        self.cluster.hear(self.cluster.mirrors[n])

    @rule(n=mirror_picks, pick=picks)
    def create(self, n: int, pick: int) -> None:
        name = NAMES[pick]
        highest = max(self.past[name], default=0)
        if self.cluster.create(name, self.cluster.mirrors[n]):
            assert self.cluster.number(name) > highest

    @rule(pick=picks)
    def write(self, pick: int) -> None:
        name = NAMES[pick]
        child = self.cluster.truth.child(*name)
        if child is None:
            return
        before = {link: self.shown(link) for link in self.cluster.truth.names[child.ino]}
        self.last_size += 1
        self.cluster.write(name, self.last_size)
        for link, was in before.items():
            assert was is not None
            if was[1]:
                self.past[link][was[0]] = (was[1], "rewritten")
            shown = self.shown(link)
            # A create that did not know of the latest entries has too low a base; its empty version
            # leaves no trace, so the number that was shown for it is used again.
            same_number = not was[1] and shown == (was[0], self.last_size)
            assert same_number or shown == (was[0] + 1, self.last_size)

    @rule(n=mirror_picks, pick=picks)
    def remove(self, n: int, pick: int) -> None:
        name = NAMES[pick]
        was = self.shown(name)
        mirror = self.cluster.mirrors[n]
        if self.cluster.do(mirror, lambda m: changes.remove(m, *name, False, 7, KEEP)):
            assert was is not None
            self.past[name][was[0]] = (was[1], "deleted")

    @rule(n=mirror_picks, old=picks, new=picks)
    def rename(self, n: int, old: int, new: int) -> None:
        source, target = NAMES[old], NAMES[new]
        moving, was = self.shown(source), self.shown(target)
        mirror = self.cluster.mirrors[n]
        if self.cluster.do(mirror, lambda m: changes.rename(m, source, target, False, 7, KEEP)):
            assert moving is not None
            if was is not None:
                self.past[target][was[0]] = (was[1], "replaced")
                assert self.shown(target) == (was[0] + 1, moving[1])
            assert self.cluster.number(target) > max(self.past[target], default=0)

    @rule(n=mirror_picks, old=picks, new=picks)
    def link(self, n: int, old: int, new: int) -> None:
        child = self.cluster.mirrors[n].child(*NAMES[old])
        if child is not None:
            ino = child.ino
            self.cluster.do(self.cluster.mirrors[n], lambda m: changes.link(m, ino, *NAMES[new], 7))

    @rule(pick=picks, which=st.integers(0, 5))
    def expire(self, pick: int, which: int) -> None:
        name = NAMES[pick]
        if self.past[name]:
            number = sorted(self.past[name])[which % len(self.past[name])]
            del self.past[name][number]
            assert self.cluster.commit(Txn((), (Delete(keys.history(*name, number)),)))
            # Who has not heard of it yet only takes a higher number than it would have to.
            for mirror in self.cluster.mirrors:
                self.cluster.hear(mirror)

    @invariant()
    def what_is_retained_is_what_was_shown(self) -> None:
        for name in NAMES:
            found = self.cluster.retained(name)
            assert {n: (e.record.size, e.why) for n, e in found.items()} == self.past[name]
            assert self.cluster.truth.history.highest(*name) == max(found, default=0)
            shown = self.shown(name)
            assert shown is None or shown[0] > max(found, default=0)

    @invariant()
    def every_mirror_that_is_up_to_date_knows_the_same(self) -> None:
        fresh = Mirror()
        rows = sorted(self.cluster.store._keys.values(), key=lambda row: row.key)
        fresh.reload(self.cluster.store.revision, [as_loaded(row) for row in rows])
        assert fresh.history == self.cluster.truth.history


def as_loaded(row: KeyValue) -> KeyValue:
    """As a load gives it: history entries without their values."""
    value = b"" if row.key.startswith(keys.HISTORY_PREFIX) else row.value
    return KeyValue(row.key, value, row.create_revision, row.mod_revision)


TestNamesAndTheirPasts = NamesAndTheirPasts.TestCase
TestNamesAndTheirPasts.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


# ---------------------------------------------------------------- single claims


def test_a_save_by_tmp_and_rename_keeps_what_was_there() -> None:
    cluster, name, temporary = Cluster(), NAMES[0], NAMES[1]
    cluster.create(name)
    cluster.write(name, 1)
    for size in (2, 3):
        cluster.create(temporary)
        cluster.write(temporary, size)
        assert cluster.do(
            cluster.truth,
            lambda m: changes.rename(m, temporary, name, False, size, KEEP),  # noqa: B023
        )
    found = cluster.retained(name)
    assert [entry.record.size for entry in found.values()] == [1, 2]
    assert {entry.why for entry in found.values()} == {"replaced"}
    assert [entry.superseded_ns for entry in found.values()] == [2, 3]
    assert cluster.number(name) == max(found) + 1
    assert cluster.retained(temporary) == {}


def test_a_new_file_leaves_no_trace_of_its_empty_first_version() -> None:
    cluster, name = Cluster(), NAMES[0]
    cluster.create(name)
    cluster.write(name, 1)
    assert cluster.retained(name) == {}
    assert cluster.number(name) == 2


def test_numbers_go_on_after_everything_has_expired_while_the_name_lives() -> None:
    cluster, name, temporary = Cluster(), NAMES[0], NAMES[1]
    cluster.create(name)
    for size in range(1, 6):
        cluster.write(name, size, keep=None)
    before = cluster.number(name)
    cluster.create(temporary)
    assert cluster.do(cluster.truth, lambda m: changes.rename(m, temporary, name, False, 7))
    assert cluster.number(name) == before + 1


def test_a_removed_directory_is_kept_and_a_symlink_is_not() -> None:
    cluster, name = Cluster(), NAMES[0]
    cluster.create(name, kind=stat.S_IFDIR)
    assert cluster.do(cluster.truth, lambda m: changes.remove(m, *name, True, 9, KEEP))
    (entry,) = cluster.retained(name).values()
    assert entry.record.is_directory and (entry.ino, entry.why, entry.node) == (2, "deleted", NODE)
    link = NAMES[1]
    cluster.create(link, kind=stat.S_IFLNK)
    assert cluster.do(cluster.truth, lambda m: changes.remove(m, *link, False, 9, KEEP))
    assert cluster.retained(link) == {}


def test_nothing_is_kept_where_the_retention_is_zero() -> None:
    cluster, name = Cluster(), NAMES[0]
    cluster.create(name)
    nothing = Policy(retain_seconds=0)
    assert cluster.do(cluster.truth, lambda m: changes.set_policy(m, ROOT_INODE, nothing))
    cluster.write(name, 1)
    cluster.write(name, 2)
    assert cluster.do(cluster.truth, lambda m: changes.remove(m, *name, False, 9, KEEP))
    assert cluster.retained(name) == {}


def test_of_an_inode_with_many_names_the_first_sixteen_are_kept() -> None:
    cluster = Cluster()
    names = [(ROOT_INODE, b"%02d" % number) for number in range(20)]
    cluster.create(names[0])
    for name in names[1:]:
        assert cluster.do(cluster.truth, lambda m: changes.link(m, InodeNumber(2), *name, 7))  # noqa: B023
    cluster.write(names[0], 1)
    cluster.write(names[0], 2)
    assert [len(cluster.retained(name)) for name in names] == [1] * 16 + [0] * 4


@pytest.mark.parametrize("value", [b"", b"\x90", b"\x95\x01\x02\x03\x04\x05", b"\xff" * 40])
def test_a_damaged_entry_is_refused(value: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_retained(value)


def test_a_name_with_any_bytes_keeps_its_history_to_itself() -> None:
    index = HistoryIndex()
    names = [b"a", b"a\xff", b"a0", b"a\x01", b"\xff", b"history"]
    for number, name in enumerate(names, 1):
        key = keys.history(SMALL, name, number)
        assert keys.split_history(key) == (SMALL, name, number)
        owners = [other for other in names if key.startswith(keys.history_of(SMALL, other))]
        assert owners == [name]
        index.add(key)
        index.add(key)
    assert (index.count, index.names(SMALL)) == (len(names), sorted(names))
    for key in list(index.keys()):
        index.remove(key)
        index.remove(key)
    assert index == HistoryIndex()
