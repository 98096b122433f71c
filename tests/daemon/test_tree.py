"""The tree when another node's change comes in the same moment as the answer to this node's."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from modelfs import keys
from modelfs.ids import ROOT_INODE, InodeNumber
from modelfs.inode import decode_inode, encode
from modelfs.ports import Delete, Put, Txn, TxnResult
from modelfs.testing.metadata import MemoryMetadataStore
from modelfsd.kernel.files import Files
from modelfsd.kernel.kernel_inodes import KernelInode
from modelfsd.kernel.pusher import Pusher
from modelfsd.kernel.tree import Caller, NewInode, Tree
from tests.daemon.node_parts import Node, cluster_of

CALLER = Caller(1000, 1000, 4711)
Ops = list[Put | Delete]


class OvertakenStore(MemoryMetadataStore):
    """Another node's change follows the next one so closely that one batch brings both."""

    def __init__(self) -> None:
        super().__init__()
        self.next: Callable[[], Ops] | None = None

    async def commit(self, txn: Txn) -> TxnResult:
        result = await super().commit(txn)
        following, self.next = self.next, None
        if following is not None:
            self._apply([*following(), Put(keys.SEQ, b"another:node:1")])
        return result

    def new_contents(self, ino: InodeNumber) -> Ops:
        """What another node puts with a commit of b"new"."""
        record = decode_inode(self._keys[keys.inode(ino)].value)
        new = replace(record, version=record.version + 1, size=3, inline=b"new")
        return [Put(keys.inode(ino), encode(new))]

    def removal(self, name: bytes, ino: InodeNumber) -> Ops:
        """What another node deletes with the only name of an inode."""
        return [Delete(keys.dentry(ROOT_INODE, name)), Delete(keys.inode(ino))]


def tree_of(node: Node) -> tuple[Tree, KernelInode]:
    return Tree(node.namespace, node.cache), node.inodes[1]


async def test_a_link_shows_what_another_node_committed_meanwhile(tmp_path: Path) -> None:
    store = OvertakenStore()
    async with cluster_of(1, tmp_path, store) as cluster:
        (node,) = cluster.nodes
        tree, root = tree_of(node)
        ino = await node.make_file(b"f")
        inode = await node.look_up(b"f")
        store.next = lambda: store.new_contents(ino)
        linked = await tree.link(inode, root, b"g")
        assert not inode.is_current and linked is not inode
        for found in (linked, await tree.lookup(root, b"g"), await tree.lookup(root, b"f")):
            assert found.is_current and found.record.inline == b"new"


@pytest.mark.parametrize("kind", [stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK])
async def test_what_is_removed_as_soon_as_it_is_made_was_made_all_the_same(
    tmp_path: Path, kind: int
) -> None:
    store = OvertakenStore()
    async with cluster_of(1, tmp_path, store) as cluster:
        (node,) = cluster.nodes
        tree, root = tree_of(node)
        ino = InodeNumber(await node.namespace.new_inode_number() + 1)
        store.next = lambda: store.removal(b"x", ino)
        target = b"t" if kind == stat.S_IFLNK else b""
        made = await tree.create(root, b"x", NewInode(kind | 0o755, target=target), CALLER, None)
        assert made.ino == ino and made.lookups == 1 and not made.is_current
        assert (root.id, b"x") in node.notifier.names  # the kernel holds it when it hears of that
        node.inodes.forget([(made.id, 1)])
        assert len(node.inodes) == 1


async def test_a_file_that_is_removed_as_soon_as_it_is_made_can_be_written(tmp_path: Path) -> None:
    store = OvertakenStore()
    async with cluster_of(1, tmp_path, store) as cluster:
        (node,) = cluster.nodes
        tree, root = tree_of(node)
        files = Files(
            node.namespace, node.cache, tree, node.contents, node.writer, Pusher(node.inodes)
        )
        ino = InodeNumber(await node.namespace.new_inode_number() + 1)
        store.next = lambda: store.removal(b"x", ino)
        number, inode = await files.create(
            root, b"x", stat.S_IFREG | 0o644, os.O_RDWR, CALLER, lambda pid: set()
        )
        await files.write(number, 0, b"mine")
        await files.flush(number)
        assert bytes(await files.read(number, 0, 10)) == b"mine"
        await files.release(number)
        node.inodes.forget([(inode.id, 1)])
        assert len(node.inodes) == 1


async def test_a_link_that_is_removed_at_once_with_the_file_was_made(tmp_path: Path) -> None:
    store = OvertakenStore()
    async with cluster_of(1, tmp_path, store) as cluster:
        (node,) = cluster.nodes
        tree, root = tree_of(node)
        ino = await node.make_file(b"f")
        inode = await node.look_up(b"f")
        names = [Delete(keys.dentry(ROOT_INODE, name)) for name in (b"f", b"g")]
        store.next = lambda: [*names, Delete(keys.inode(ino))]
        linked = await tree.link(inode, root, b"g")
        assert not linked.is_current
        node.inodes.forget([(one.id, one.lookups) for one in {inode, linked}])
        assert len(node.inodes) == 1
