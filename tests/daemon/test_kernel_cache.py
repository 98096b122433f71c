"""What the kernel is told to forget, for which change, and when an OPEN must look again."""

from __future__ import annotations

import stat
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from modelfs import changes
from modelfs.attributes import AttributeChange
from modelfs.ids import ROOT_INODE, InodeNumber
from modelfs.inode import Inode
from modelfs.mirror import Name
from modelfsd.kernel import notifier
from modelfsd.kernel.kernel_inodes import ROOT_KERNEL_ID
from modelfsd.kernel.tree import Tree
from tests.daemon.node_parts import Node, cluster_of


async def make_directory(node: Node, parent: InodeNumber, name: bytes) -> InodeNumber:
    ino = await node.namespace.new_inode_number()
    times: dict[str, Any] = dict.fromkeys(("atime_ns", "mtime_ns", "ctime_ns"), 1)
    record = Inode(mode=stat.S_IFDIR | 0o755, uid=0, gid=0, **times)
    await node.namespace.change(lambda m: changes.create(m, parent, name, ino, record))
    return ino


async def set_attributes(node: Node, change: AttributeChange) -> None:
    await node.feed.fresh()
    child = node.mirror.child(ROOT_INODE, b"f")
    assert child is not None
    await node.namespace.change(lambda m: changes.set_attributes(m, child.ino, change, node.id, 2))


async def commit(node: Node) -> None:
    await node.write_file(b"f", b"new")


async def touch(node: Node) -> None:
    await set_attributes(node, AttributeChange(mtime_ns=99))


async def change_mode(node: Node) -> None:
    await set_attributes(node, AttributeChange(permissions=0o600))


async def unlink(node: Node) -> None:
    await node.feed.fresh()
    await node.namespace.change(lambda m: changes.remove(m, ROOT_INODE, b"f", False, 2))


async def replace(node: Node) -> None:
    await node.make_file(b"g")
    await node.namespace.change(
        lambda m: changes.rename(m, (ROOT_INODE, b"g"), (ROOT_INODE, b"f"), False, 2)
    )


async def create_beside(node: Node) -> None:
    await node.make_file(b"h")


@pytest.mark.parametrize(
    ("change", "forgets_name", "forgets_attributes", "is_current"),
    [
        (commit, True, False, False),
        (touch, True, False, False),
        (change_mode, False, True, True),
        (unlink, True, False, False),
        (replace, True, False, False),
        (create_beside, False, False, True),
    ],
)
async def test_what_another_node_changes_is_forgotten_here(
    tmp_path: Path,
    change: Callable[[Node], Awaitable[None]],
    forgets_name: bool,
    forgets_attributes: bool,
    is_current: bool,
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await one.make_file(b"f")
        inode = await one.look_up(b"f")
        mine = await two.look_up(b"f")
        for node in (one, two):
            node.notifier.names.clear()
            node.notifier.attributes.clear()
        await change(two)
        await one.feed.fresh()
        assert ((ROOT_KERNEL_ID, b"f") in one.notifier.names) == forgets_name
        assert (inode.id in one.notifier.attributes) == forgets_attributes
        assert inode.is_current == is_current
        assert one.cache.must_look_again(inode) == (not is_current)
        # The kernel that asked for the change has made it itself.
        assert not two.notifier.names and not two.notifier.attributes
        assert mine.is_current == (change not in (unlink, replace))


async def test_who_was_just_answered_a_change_is_made_to_ask_once_more(tmp_path: Path) -> None:
    """The kernel takes that answer whenever the caller runs, after it was told to forget it too."""
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await one.make_file(b"f")
        inode = await one.look_up(b"f")
        for mode, changed_at, again in [(0o600, time.monotonic(), [inode.id]), (0o640, 0.0, [])]:
            inode.changed_at = changed_at
            one.notifier.again.clear()
            await set_attributes(two, AttributeChange(permissions=mode))
            await one.feed.fresh()
            assert one.notifier.again == again


async def test_who_has_a_file_open_sees_its_mode_and_link_count_as_they_are(tmp_path: Path) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await one.make_file(b"f")
        older = await one.look_up(b"f")
        older.handles = 1
        await commit(two)
        inode = await one.look_up(b"f")
        inode.handles = 1
        assert inode is not older
        for change, forgotten in [
            (change_mode, {older.id, inode.id}),
            (commit, {older.id}),  # and a new kernel inode shows the latest
            (unlink, {older.id, inode.id}),
        ]:
            one.notifier.attributes.clear()
            await change(two)
            await one.feed.fresh()
            assert set(one.notifier.attributes) - {ROOT_KERNEL_ID} == forgotten
        assert older.record.mode == inode.record.mode
        one.notifier.acknowledge_all()
        await one.make_file(b"f")
        inode = await one.look_up(b"f")
        inode.handles = 1
        one.notifier.attributes.clear()
        await unlink(one)
        assert inode.id not in one.notifier.attributes, "the kernel has counted itself"


async def test_a_directorys_new_times_are_asked_for_again(tmp_path: Path) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await two.make_file(b"x")
        await one.feed.fresh()
        assert ROOT_KERNEL_ID in one.notifier.attributes
        assert ROOT_KERNEL_ID not in two.notifier.attributes


async def test_a_renamed_ancestor_makes_an_open_look_again_until_the_kernel_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifier, "GRACE_SECONDS", 0.0)
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        top = await make_directory(two, ROOT_INODE, b"top")
        below = await make_directory(two, top, b"below")
        file = await two.make_file(b"f")
        await two.namespace.change(
            lambda m: changes.rename(m, (ROOT_INODE, b"f"), (below, b"f"), False, 2)
        )
        other = await two.make_file(b"other")
        await one.feed.fresh()
        for ino in (top, below, file, other):
            one.inodes.show(ino, one.namespace.require(ino)).lookups += 1
        one.notifier.acknowledge_all()
        current = one.inodes.current(file)
        assert current is not None and not one.cache.must_look_again(current)
        await two.namespace.change(
            lambda m: changes.rename(m, (ROOT_INODE, b"top"), (ROOT_INODE, b"moved"), False, 2)
        )
        await one.feed.fresh()
        beside = one.inodes.current(other)
        assert beside is not None and not one.cache.must_look_again(beside)
        assert one.cache.must_look_again(current)
        one.notifier.acknowledge_all()
        assert not one.cache.must_look_again(current)
        assert not one.cache.guard.is_raised()
        # One that truncates may have waited in the kernel for others of its kind.
        assert one.cache.must_look_again(current, truncates=True)
        assert not one.cache.must_look_again(beside, truncates=True)
        monkeypatch.setattr(notifier, "TRUNCATING_GRACE_SECONDS", 0.0)
        assert not one.cache.must_look_again(current, truncates=True)


async def test_the_writer_keeps_its_inode_through_its_own_commits(tmp_path: Path) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await one.make_file(b"f")
        session = await one.open(b"f")
        for turn in range(3):
            await session.write(turn, b"x")
            await session.flush()
            assert session.inode.is_current and session.inode.record.version == 2 + turn
        await touch(two)  # yields to the one who is writing
        await one.feed.fresh()
        assert session.inode.is_current
        await session.release()


async def test_a_directory_moved_elsewhere_is_a_new_kernel_inode_and_so_is_what_is_below(
    tmp_path: Path,
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        old, new = [await make_directory(two, ROOT_INODE, name) for name in (b"old", b"new")]
        top = await make_directory(two, old, b"top")
        below = await make_directory(two, top, b"below")
        await one.feed.fresh()
        inside = {}
        for ino in (old, new, top, below):
            inside[ino] = one.inodes.show(ino, one.namespace.require(ino))
            inside[ino].lookups += 1
        await two.namespace.change(
            lambda m: changes.rename(m, (old, b"top"), (new, b"top"), False, 2)
        )
        await one.feed.fresh()
        assert [inside[ino].is_current for ino in (old, new, top, below)] == [
            True,
            True,
            False,
            False,
        ]
        shown = one.inodes.show(top, one.namespace.require(top))
        shown.lookups += 1
        assert shown.id != inside[top].id and one.inodes.all_of(top) == [inside[top], shown]
        # Names of this directory are forgotten in both, whoever changed them.
        for node, name in ((two, b"theirs"), (one, b"ours")):
            await make_directory(node, top, name)
            one.notifier.names.clear()
            await node.namespace.change(lambda m: changes.remove(m, top, name, True, 2))  # noqa: B023
            await one.feed.fresh()
            assert {(inside[top].id, name), (shown.id, name)} <= set(one.notifier.names)
        # What is not moved to another parent stays what it is.
        await two.namespace.change(
            lambda m: changes.rename(m, (new, b"top"), (new, b"other"), False, 2)
        )
        await one.feed.fresh()
        assert shown.is_current


async def test_a_rename_of_a_name_that_changed_meanwhile_is_looked_up_again(tmp_path: Path) -> None:
    """The kernel moved what it believed to be there; the cluster moved what was."""
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await two.make_file(b"f")
        await one.look_up(b"f")
        await replace(two)  # one's kernel holds the directory for its rename: it cannot forget yet
        await one.feed.fresh()
        source, target = (ROOT_INODE, b"f"), (ROOT_INODE, b"moved")
        child = one.mirror.child(*source)
        assert child is not None
        await one.namespace.change(lambda m: changes.rename(m, source, target, False, 2))
        one.cache.renamed(source, target, child.ino)
        assert (ROOT_KERNEL_ID, b"moved") in one.notifier.names
        one.notifier.acknowledge_all()
        one.notifier.names.clear()
        await one.namespace.change(lambda m: changes.rename(m, target, source, False, 2))
        one.cache.renamed(target, source, child.ino)
        assert not one.notifier.names


async def test_a_rename_that_changes_nothing_takes_a_link_in_the_kernel_alone(
    tmp_path: Path,
) -> None:
    """Another node has made both names mean one file; the kernel has not forgotten the other."""
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        moving = await two.make_file(b"moving")
        other = await two.make_file(b"f")
        await two.namespace.change(lambda m: changes.link(m, other, ROOT_INODE, b"g", 2))
        source, target = await one.look_up(b"moving"), await one.look_up(b"f")
        await unlink(two)
        await two.namespace.change(lambda m: changes.link(m, moving, ROOT_INODE, b"f", 2))
        await one.feed.fresh()
        one.notifier.attributes.clear()  # and somebody has asked again
        tree, root = Tree(one.namespace, one.cache), one.inodes[ROOT_KERNEL_ID]
        await tree.rename((root, b"moving"), (root, b"f"), False)
        assert target.id in one.notifier.attributes and source.is_current
        one.notifier.acknowledge_all()
        one.notifier.attributes.clear()
        await tree.rename((root, b"moving"), (root, b"f"), False)
        assert not one.notifier.attributes


async def test_a_directory_that_the_kernel_alone_moved_or_removed_is_another_inode_for_it(
    tmp_path: Path,
) -> None:
    """Linux looks a directory up at one place only, and never again what it removed."""

    async def renamed(node: Node, old: Name, new: Name) -> None:
        await node.namespace.change(lambda m: changes.rename(m, old, new, False, 2))
        await one.feed.fresh()

    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        into = await make_directory(two, ROOT_INODE, b"into")
        names = [(ROOT_INODE, name) for name in (b"a", b"b", b"free", b"free too")]
        made = [await make_directory(two, *name) for name in names[:2]]
        await one.feed.fresh()
        one.inodes.show(into, one.namespace.require(into)).lookups += 1
        for ends in ("moved", "removed", "replaced"):
            a, b = known = [one.inodes.show(ino, one.namespace.require(ino)) for ino in made]
            a.lookups, b.lookups = 1, 1
            await renamed(two, names[0], names[2])
            await renamed(two, names[1], names[0])  # one's kernel still takes `a` for the first
            one.notifier.attributes.clear()
            if ends == "moved":
                await renamed(one, names[0], (into, b"x"))
                await renamed(two, (into, b"x"), names[1])
            elif ends == "removed":
                await one.namespace.change(lambda m: changes.remove(m, *names[0], True, 2))
                made[1] = await make_directory(two, *names[1])
            else:
                other = await make_directory(two, *names[3])
                await renamed(one, names[3], names[0])
                await renamed(two, names[0], names[1])
                made[1] = other
            assert not a.is_current and not b.is_current, ends
            assert {inode.id for inode in known} <= set(one.notifier.attributes)
            await renamed(two, names[2], names[0])
            one.notifier.acknowledge_all()


async def test_below_an_older_directory_each_directory_has_a_kernel_inode_of_its_own(
    tmp_path: Path,
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (one,) = cluster.nodes
        top = await make_directory(one, ROOT_INODE, b"top")
        below = await make_directory(one, top, b"below")
        file = await one.make_file(b"f")
        require, inodes = one.namespace.require, one.inodes
        older = inodes.show(top, require(top))
        older.lookups += 1
        inodes.retire(older)
        current = inodes.show_in(inodes.show(top, require(top)), below, require(below))
        inside = inodes.show_in(older, below, require(below))
        assert inside is not current and not inside.is_current
        assert inodes.show_in(older, below, require(below)) is inside
        assert inodes.show_in(older, file, require(file)) is inodes.show(file, require(file))
        inodes.drop_if_unused(inside)
        assert inodes.all_of(below) == [current]


def test_the_guard_remembers_nothing_for_longer_than_it_guards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notifier, "TRUNCATING_GRACE_SECONDS", 0.0)
    guard = notifier.NameGuard()
    for ino in range(2, 1002):
        name = (ROOT_INODE, b"%d" % ino)
        guard.raise_for(InodeNumber(ino), name)
        guard.lower_for(InodeNumber(ino), name)  # and nobody here ever opens a file
    assert len(guard._since) <= 1
