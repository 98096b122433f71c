"""Changes of the namespace, by several nodes whose mirrors lag, against a tree of dictionaries.

Each step plans from some node's mirror, which may be far behind, and commits. Whatever a
transaction lets through must be what POSIX would have done at that moment; a node that is up to
date must also be refused what POSIX refuses, with the same error.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from modelfs import changes, keys
from modelfs.attributes import AttributeChange
from modelfs.changes import Claim, Plan
from modelfs.errors import EntryExists, ModelfsError, NamespaceError, NoSuchEntry, WriteLost
from modelfs.ids import ROOT_INODE, InodeNumber, NodeId, Revision
from modelfs.inode import Inode, encode
from modelfs.limits import INLINE_BYTES_MAX
from modelfs.mirror import Mirror
from modelfs.ports import Put
from tests.core.posix_tree import History, PosixTree

NODES = [NodeId(digit * 16) for digit in "abc"]
NAMES = [b"a", b"b", b"c"]
Result = TypeVar("Result")
Error = type[ModelfsError]


class Node:
    """A node: its mirror, its lease in etcd and the files that it writes."""

    def __init__(self, id: NodeId, history: History) -> None:
        self.id, self.mirror = id, Mirror()
        self.etcd_lease = history.grant_now()
        self.writing: dict[InodeNumber, tuple[Revision, int]] = {}  # (token, base version)


picks = st.integers(0, 1000)
node_picks = st.integers(0, len(NODES) - 1)
name_picks = st.sampled_from(NAMES)


class Namespace(RuleBasedStateMachine):
    """The rules and what must always hold."""

    def __init__(self) -> None:
        super().__init__()
        self.history, self.tree, self.truth = History(), PosixTree(), Mirror()
        self.now, self.last_ino = 1, int(ROOT_INODE)
        self.versions: dict[InodeNumber, int] = {}
        root = Inode(mode=0o40755, uid=0, gid=0, atime_ns=0, mtime_ns=0, ctime_ns=0)
        self.history._apply([Put(keys.inode(ROOT_INODE), encode(root))])
        self.nodes = [Node(id, self.history) for id in NODES]
        for node in self.nodes:
            self.catch_up(node)
        self.truth.apply(self.history.events_after(0))

    # ------------------------------------------------------------ the driver

    def catch_up(self, node: Node, count: int | None = None) -> None:
        node.mirror.apply(self.history.events_after(node.mirror.revision, count))

    def change(
        self,
        node: Node,
        make_plan: Callable[[Mirror], Plan[Result]],
        in_posix: Callable[[], None],
        resend: bool = False,
    ) -> Result | None:
        """Plan, commit, compare with POSIX. None if it was refused or met a conflict."""
        is_fresh = node.mirror.revision == self.history.revision
        try:
            plan = make_plan(node.mirror)
        except (NamespaceError, WriteLost) as error:
            if is_fresh:
                refusal = type(error)
                assert self.posix_says(in_posix) is refusal
            return None
        if not plan.txn.ops and not is_fresh:
            return None  # nothing to do, as of then: the driver looks again, as after a refusal
        if not self.history.commit_now(plan.txn):
            assert not is_fresh, "a conflict with nobody"
            return None
        if resend and plan.txn.ops:
            before = self.history.revision
            assert not self.history.commit_now(plan.txn), "done twice"
            assert self.history.revision == before
        assert self.posix_says(in_posix) is None
        self.truth.apply(self.history.events_after(self.truth.revision))
        self.catch_up(node)  # read your own writes
        return plan.result

    @staticmethod
    def posix_says(operation: Callable[[], None]) -> Error | None:
        try:
            operation()
        except ModelfsError as error:
            return type(error)
        return None

    def some_inode(self, pick: int) -> InodeNumber:
        return InodeNumber(1 + pick % self.last_ino)  # also removed ones

    def some_directory(self, node: Node, pick: int) -> InodeNumber:
        """A directory as this node sees it; seldom any inode at all."""
        if pick % 20 == 0:
            return self.some_inode(pick // 20)
        known = [ino for ino, record in node.mirror.inodes() if record.is_directory]
        return known[pick % len(known)]

    def some_name(self, node: Node, pick: int) -> tuple[InodeNumber, bytes]:
        """A name that this node knows; seldom one that it does not."""
        names = [(p, n) for p, entries in node.mirror.children.items() for n in entries]
        if not names or pick % 20 == 0:
            return self.some_directory(node, pick), NAMES[pick % len(NAMES)]
        return names[pick % len(names)]

    # ------------------------------------------------------------ rules

    @rule(node=node_picks, count=st.integers(1, 4))
    def hear(self, node: int, count: int) -> None:
        self.catch_up(self.nodes[node], count)

    @rule(node=node_picks)
    def hear_all(self, node: int) -> None:
        self.catch_up(self.nodes[node])

    @rule(n=node_picks, pick=picks, name=name_picks, directory=st.booleans(), again=st.booleans())
    def create(self, n: int, pick: int, name: bytes, directory: bool, again: bool) -> None:
        node = self.nodes[n]
        parent = self.some_directory(node, pick)
        self.now += 1
        self.last_ino += 1
        ino = InodeNumber(self.last_ino)
        kind = stat.S_IFDIR if directory else stat.S_IFREG
        times: dict[str, Any] = dict.fromkeys(("atime_ns", "mtime_ns", "ctime_ns"), self.now)
        record = Inode(mode=kind | 0o644, uid=0, gid=0, inline=None if directory else b"", **times)
        claim = None if directory else Claim(node.id, node.etcd_lease)
        made = self.change(
            node,
            lambda mirror: changes.create(mirror, parent, name, ino, record, claim),
            lambda: self.tree.create(parent, name, ino, directory),
            again,
        )
        if made is not None and claim is not None:
            lease = node.mirror.lease(ino)
            assert lease is not None and lease[0] == node.id
            node.writing[ino] = (lease[1], 1)

    @rule(n=node_picks, pick=picks, other=picks, name=name_picks, again=st.booleans())
    def link(self, n: int, pick: int, other: int, name: bytes, again: bool) -> None:
        node, ino = self.nodes[n], self.some_inode(pick)
        parent = self.some_directory(node, other)
        self.change(
            node,
            lambda mirror: changes.link(mirror, ino, parent, name, self.now),
            lambda: self.tree.link(ino, parent, name),
            again,
        )

    @rule(n=node_picks, pick=picks, rightly=st.integers(0, 4), again=st.booleans())
    def remove(self, n: int, pick: int, rightly: int, again: bool) -> None:
        node = self.nodes[n]
        parent, name = self.some_name(node, pick)
        child = node.mirror.child(parent, name)
        directory = (child is not None and stat.S_ISDIR(child.kind)) == bool(rightly)
        self.change(
            node,
            lambda mirror: changes.remove(mirror, parent, name, directory, self.now),
            lambda: self.tree.remove(parent, name, directory),
            again,
        )

    @rule(
        n=node_picks, pick=picks, other=picks, name=name_picks, keep=st.booleans(),
        again=st.booleans(),
    )  # fmt: skip
    def rename(self, n: int, pick: int, other: int, name: bytes, keep: bool, again: bool) -> None:
        node = self.nodes[n]
        old = self.some_name(node, pick)
        new = (self.some_directory(node, other), name)
        done = self.change(
            node,
            lambda mirror: changes.rename(mirror, old, new, keep, self.now),
            lambda: self.tree.rename(old, new, keep),
            again,
        )
        if done is not None:
            here = node.mirror.child(*new)
            assert here is not None and here.ino == done.ino

    @rule(n=node_picks, pick=picks, mtime=st.none() | picks, again=st.booleans())
    def set_attributes(self, n: int, pick: int, mtime: int | None, again: bool) -> None:
        node, ino = self.nodes[n], self.some_inode(pick)
        before = self.truth.inode(ino)
        change = AttributeChange(permissions=0o600, mtime_ns=mtime)
        changed = self.change(
            node,
            lambda mirror: changes.set_attributes(mirror, ino, change, node.id, self.now),
            lambda: self._require(ino),
            again,
        )
        if changed is not None:
            assert before is not None and (changed.mode, changed.kind) == (
                before.kind | 0o600,
                before.kind,
            )
            if before.is_file and mtime is not None:
                assert changed.mtime_ns == mtime
                assert (changed.view > before.view) == (mtime != before.mtime_ns)

    def _require(self, ino: InodeNumber) -> None:
        if ino not in self.tree.files and ino not in self.tree.directories:
            raise NoSuchEntry

    @rule(n=node_picks, pick=picks, again=st.booleans())
    def take_lease(self, n: int, pick: int, again: bool) -> None:
        node, ino = self.nodes[n], self.some_inode(pick)

        def in_posix() -> None:
            self._require(ino)
            if self.truth.lease(ino) is not None:
                raise EntryExists

        plan = node.mirror.inode(ino)
        taken = self.change(
            node,
            lambda mirror: changes.take_lease(mirror, ino, node.id, node.etcd_lease),
            in_posix,
            again,
        )
        lease, record = node.mirror.lease(ino), node.mirror.inode(ino)
        if taken is None and lease is not None and lease[0] == node.id and plan and record:
            node.writing.setdefault(ino, (lease[1], record.version))

    @precondition(lambda self: any(node.writing for node in self.nodes))
    @rule(n=node_picks, pick=picks, size=st.integers(0, INLINE_BYTES_MAX), again=st.booleans())
    def commit(self, n: int, pick: int, size: int, again: bool) -> None:
        node = self.nodes[n]
        if not node.writing:
            return
        ino = sorted(node.writing)[pick % len(node.writing)]
        token, base = node.writing[ino]
        before, lease = self.truth.inode(ino), self.truth.lease(ino)

        def in_posix() -> None:
            if before is None:
                raise NoSuchEntry
            if lease != (node.id, token) or before.version != base:
                raise WriteLost(ino, "")

        stale = Inode(mode=0, uid=9, gid=9, atime_ns=9, mtime_ns=self.now, ctime_ns=9, size=size)
        committed = self.change(
            node,
            lambda mirror: changes.commit_contents(mirror, ino, token, base, stale, self.now),
            in_posix,
            again,
        )
        if committed is not None:
            assert before is not None
            kept = {"mode", "uid", "gid", "atime_ns", "nlink", "touches"}
            assert all(getattr(committed, name) == getattr(before, name) for name in kept)
            assert (committed.version, committed.size) == (base + 1, size)
            node.writing[ino] = (token, base + 1)

    @rule(n=node_picks, pick=picks)
    def drop_lease(self, n: int, pick: int) -> None:
        node = self.nodes[n]
        if node.writing:
            ino = sorted(node.writing)[pick % len(node.writing)]
            token, _ = node.writing.pop(ino)
            others = {i: lease for i in node.writing if (lease := self.truth.lease(i))}
            plan = partial(changes.drop_leases, tokens={ino: token})
            self.change(node, plan, lambda: None)
            assert all(self.truth.lease(i) == lease for i, lease in others.items())

    @rule(n=node_picks)
    def be_cut_off(self, n: int) -> None:
        """The node's lease lapses; it does not know and still tries to commit."""
        self.history.expire(self.nodes[n].etcd_lease)
        self.nodes[n].etcd_lease = self.history.grant_now()
        self.truth.apply(self.history.events_after(self.truth.revision))

    # ------------------------------------------------------------ what must hold

    @invariant()
    def the_tree_is_the_one_that_posix_would_have(self) -> None:
        names = {
            (parent, name): child.ino
            for parent, entries in self.truth.children.items()
            for name, child in entries.items()
        }
        assert names == {
            (d, name): ino
            for d, entries in self.tree.directories.items()
            for name, ino in entries.items()
        }
        records = dict(self.truth.inodes())
        assert set(records) == self.tree.files | set(self.tree.directories)
        for ino, record in records.items():
            links = self.tree.names_of(ino)
            assert self.truth.names.get(ino, set()) == set(links)
            assert record.is_directory == (ino in self.tree.directories)
            if record.is_directory:
                self.tree.ancestors(ino)
                below = sum(i in self.tree.directories for i in self.tree.directories[ino].values())
                assert self.truth.link_count(ino, record) == 2 + below
            else:
                assert self.truth.link_count(ino, record) == len(links) > 0
            child_kinds = {self.truth.children[InodeNumber(p)][n].kind for p, n in links}
            assert child_kinds <= {record.kind}
        assert self.truth.file_count == len(self.tree.files)
        assert self.truth.directory_count == len(self.tree.directories)
        sizes = [record.size for record in records.values() if record.is_file]
        assert self.truth.file_bytes == sum(sizes)

    @invariant()
    def versions_only_grow(self) -> None:
        for ino, record in self.truth.inodes():
            assert record.view >= self.versions.get(ino, 0)
            self.versions[ino] = record.view


TestNamespace = Namespace.TestCase
TestNamespace.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(40))
def test_a_long_random_walk_keeps_every_invariant(rng: Random, seed: int) -> None:
    """As the state machine, which shrinks well; this one meets more races."""
    machine = Namespace()

    def pick() -> int:
        return rng.randrange(1001)

    for _ in range(250):
        n, name, flag, again = rng.randrange(3), rng.choice(NAMES), rng.random() < 0.6, pick() < 200
        match rng.choices(range(10), [6, 1, 6, 2, 4, 9, 1, 2, 3, 0.5])[0]:
            case 0:
                machine.hear(n, rng.randrange(1, 9))
            case 1:
                machine.hear_all(n)
            case 2:
                machine.create(n, pick(), name, flag, again)
            case 3:
                machine.link(n, pick(), pick(), name, again)
            case 4:
                machine.remove(n, pick(), rng.randrange(5), again)
            case 5:
                machine.rename(n, pick(), pick(), name, pick() < 100, again)
            case 6:
                machine.set_attributes(n, pick(), rng.choice([None, 5, 6]), again)
            case 7:
                machine.take_lease(n, pick(), again)
            case 8:
                machine.commit(n, pick(), rng.randrange(100), again)
            case 9:
                if flag:
                    machine.be_cut_off(n)
                else:
                    machine.drop_lease(n, pick())
        machine.the_tree_is_the_one_that_posix_would_have()
        machine.versions_only_grow()


def test_a_commit_keeps_what_was_changed_beside_it() -> None:
    """A chmod or a utimens of the atime between open and close is not undone by the close."""
    machine = Namespace()
    machine.create(0, 1, b"a", directory=False, again=False)
    node = machine.nodes[0]
    ino, (token, base) = next(iter(node.writing.items()))
    opened = node.mirror.inode(ino)
    assert opened is not None
    machine.change(
        node,
        lambda mirror: changes.set_attributes(
            mirror, ino, AttributeChange(permissions=0o400, atime_ns=77, uid=5), node.id, 9
        ),
        lambda: None,
    )
    done = machine.change(
        node,
        lambda mirror: changes.commit_contents(
            mirror, ino, token, base, replace(opened, size=3, inline=b"abc"), 10
        ),
        lambda: None,
    )
    assert done is not None
    assert (done.mode & 0o777, done.atime_ns, done.uid, done.inline) == (0o400, 77, 5, b"abc")
