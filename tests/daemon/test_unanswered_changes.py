"""Changes that failed for this node's kernel, since etcd did not answer, and happened all the same.

The kernel was told EIO, so it believes the names as they were before.
"""

from __future__ import annotations

import stat
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from modelfs import keys
from modelfs.errors import MetadataUncertain
from modelfs.ids import ROOT_INODE
from modelfs.ports import Put, Txn, TxnResult
from modelfs.testing.metadata import CommitFault, MemoryMetadataStore
from modelfsd.kernel.tree import Caller, NewInode, Tree
from modelfsd.metadata.namespace import SETTLE_SECONDS
from tests.daemon.node_parts import cluster_of

AWAY = ("watch of the namespace broke", "out of reach", "did not say whether")
CALLER = Caller(1000, 1000, 4711)


class FadingStore(MemoryMetadataStore):
    """Carries out one more change, and is out of reach before it can answer."""

    def __init__(self, tells_watches: bool) -> None:
        super().__init__()
        self._tells_watches = tells_watches
        self.is_fading = False

    async def commit(self, txn: Txn) -> TxnResult:
        if self.is_fading and not self.unavailable:
            self.next_commit_fault = CommitFault.APPLIED
        try:
            return await super().commit(txn)
        except MetadataUncertain:
            if self._tells_watches:
                await trio.sleep(0.05)
            self.unavailable = True
            raise


@pytest.mark.expected_logs(*AWAY)
@pytest.mark.parametrize("tells_watches", [True, False])
@pytest.mark.parametrize("what", ["rename", "move", "replace", "remove", "rmdir", "link"])
async def test_the_kernel_learns_of_a_change_that_failed_and_happened(
    tmp_path: Path, virtual_time: trio.testing.MockClock, what: str, tells_watches: bool
) -> None:
    store = FadingStore(tells_watches)
    async with cluster_of(1, tmp_path, store) as cluster:
        (node,) = cluster.nodes
        tree, root = Tree(node.namespace, node.cache), node.inodes[1]
        for name in (b"file", b"other"):
            await node.make_file(name)
        for name in (b"directory", b"elsewhere"):
            await tree.create(root, name, NewInode(stat.S_IFDIR | 0o755), CALLER, None)
        known = {
            name: await tree.lookup(root, name)
            for name in (b"file", b"other", b"directory", b"elsewhere")
        }
        store.is_fading = True
        directory, file = known[b"directory"], known[b"file"]
        attempts: dict[str, Callable[[], Awaitable[object]]] = {
            "rename": partial(tree.rename, (root, b"file"), (root, b"new"), False),
            "move": partial(
                tree.rename, (root, b"directory"), (known[b"elsewhere"], b"directory"), False
            ),
            "replace": partial(tree.rename, (root, b"file"), (root, b"other"), False),
            "remove": partial(tree.remove, root, b"file", False),
            "rmdir": partial(tree.remove, root, b"directory", True),
            "link": partial(tree.link, file, root, b"new"),
        }
        with pytest.raises(MetadataUncertain):
            await attempts[what]()
        store.is_fading = store.unavailable = False
        await trio.sleep(1)
        await node.feed.fresh()
        forgotten = node.notifier.names
        for name in known:
            is_gone = node.mirror.child(ROOT_INODE, name) is None
            assert ((root.id, name) in forgotten) == (
                is_gone or (what, name) == ("replace", b"other")
            )
        assert what != "link" or file.id in node.notifier.attributes
        assert root.id in node.notifier.attributes
        assert directory.is_current == (what not in ("move", "rmdir"))


@pytest.mark.expected_logs(*AWAY)
async def test_what_the_kernel_believes_is_not_opened(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    store = FadingStore(tells_watches=True)
    async with cluster_of(1, tmp_path, store) as cluster:
        (node,) = cluster.nodes
        tree, root = Tree(node.namespace, node.cache), node.inodes[1]
        await node.make_file(b"temporary")
        inode = await tree.lookup(root, b"temporary")
        store.is_fading = True
        with pytest.raises(MetadataUncertain):
            await tree.rename((root, b"temporary"), (root, b"final"), False)
        assert trio.current_time() > SETTLE_SECONDS
        assert inode.is_current and node.cache.must_look_again(inode)


async def test_an_unanswered_change_is_known_after_many_others(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.namespace.new_inode_number()
        cluster.etcd.next_commit_fault = CommitFault.APPLIED
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.make_file, b"f")
            await trio.testing.wait_all_tasks_blocked()  # it is about to be sent again
            # Others of this node that were answered meanwhile, from another member.
            others = " ".join(f"{node.id}:run:{number:x}" for number in range(10_000))
            await cluster.etcd.commit(Txn((), (Put(keys.SEQ, others.encode()),)))
        assert node.mirror.child(ROOT_INODE, b"f") is not None
