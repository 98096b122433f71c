"""Open files as the kernel asks for them: O_TRUNC, sizes and times."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import trio
import trio.testing

from modelfs import changes
from modelfs.attributes import AttributeChange
from modelfs.errors import MetadataUnavailable, NoSuchEntry, StaleHandle, WriteLost, WriterElsewhere
from modelfs.ids import ROOT_INODE, KernelId
from modelfsd.kernel.files import Files
from modelfsd.kernel.kernel_inodes import KernelInode
from modelfsd.kernel.pusher import Pusher
from modelfsd.kernel.tree import Caller, Tree
from modelfsd.storage.replicator import Placements
from tests.daemon.node_parts import Node, cluster_of

CALLER = Caller(0, 0, 1)
LOST = r"cannot be committed, they are kept|closed with writes that could not be committed"


def no_groups(pid: int) -> frozenset[int]:
    """The groups of a process."""
    return frozenset()


def files_of(node: Node) -> Files:
    tree = Tree(node.namespace, node.cache)
    pusher = Pusher(node.inodes)
    return Files(node.namespace, node.cache, tree, node.contents, node.writer, pusher)


async def create(node: Node, files: Files, data: bytes) -> tuple[int, KernelInode]:
    """A file that is written and not closed."""
    mode = stat.S_IFREG | 0o644
    number, inode = await files.create(node.inodes[1], b"f", mode, os.O_WRONLY, CALLER, no_groups)
    await files.write(number, 0, data)
    return number, inode


async def test_a_time_that_is_set_beside_a_commit_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        files = files_of(one)
        number, inode = await create(one, files, b"data" * 2000)
        sync, has_begun = one.replicator.sync, trio.Event()

        async def slow(placements: Placements, replicas: int) -> None:
            has_begun.set()
            await trio.testing.wait_all_tasks_blocked()
            await sync(placements, replicas)

        monkeypatch.setattr(one.replicator, "sync", slow)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(files.flush, number)
            await has_begun.wait()
            await files.set_attributes(inode, AttributeChange(mtime_ns=12345), CALLER)
        assert (await two.look_up(b"f")).record.mtime_ns == 12345
        await files.release(number)
        assert await two.read_file(b"f") == b"data" * 2000


async def test_a_truncation_to_the_size_that_it_has_is_an_mtime_for_all_nodes(
    tmp_path: Path,
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        files = files_of(one)
        number, inode = await create(one, files, b"data")
        await files.release(number)
        await files.truncate(inode, 4, 12345, None, CALLER)
        record = (await two.look_up(b"f")).record
        assert record.mtime_ns == 12345 and record.size == 4


async def test_an_open_that_fails_empties_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        files = files_of(one)
        number, inode = await create(one, files, b"data" * 2000)
        await files.release(number)
        await files.set_attributes(inode, AttributeChange(permissions=0o4777), CALLER)

        async def fail(*args: object) -> None:
            raise MetadataUnavailable("no connection to etcd")

        with monkeypatch.context() as patch:
            patch.setattr(files, "set_attributes", fail)  # the set-id bits are to go
            with pytest.raises(MetadataUnavailable):
                await files.open(inode, os.O_WRONLY | os.O_TRUNC, Caller(5, 5, 1))
        assert await two.read_file(b"f") == b"data" * 2000


@pytest.mark.expected_logs(LOST)
async def test_who_emptied_a_file_and_closed_it_lets_nobody_else_start_over(
    tmp_path: Path,
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await one.make_file(b"f")
        files, inode = files_of(one), await one.look_up(b"f")
        number = await files.open(inode, os.O_WRONLY, CALLER)
        other = await files.open(inode, os.O_WRONLY | os.O_TRUNC, CALLER)
        await files.flush(other)
        await files.release(other)
        await two.write_file(b"f", b"theirs")
        await files.write(number, 0, b"mine")
        with pytest.raises(WriteLost, match="another node wrote it first"):
            await files.flush(number)
        await files.release(number)
        assert await two.read_file(b"f") == b"theirs"


async def test_a_create_waits_for_no_other_open_that_waits_for_a_lease(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    """The kernel holds the directory meanwhile."""
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await one.make_file(b"f")
        await one.write_file(b"f", b"data")
        await trio.sleep(1)
        other = await two.open(b"f")
        files, inode = files_of(one), await one.look_up(b"f")

        async def open_in_vain() -> None:
            with pytest.raises(WriterElsewhere):
                await files.open(inode, os.O_WRONLY, CALLER)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_in_vain)
            await trio.sleep(1)
            second, begun = Caller(0, 0, 2), trio.current_time()
            mode = stat.S_IFREG | 0o644
            root = one.inodes[1]
            with pytest.raises(StaleHandle):  # it is there: the kernel is sent to look again
                await files.create(root, b"f", mode, os.O_WRONLY, second, no_groups)
            files.looks.note(second, (root.id, b"f"), None)  # and finds it gone, for a moment
            with pytest.raises(WriterElsewhere):
                await files.create(root, b"f", mode, os.O_WRONLY, second, no_groups)
            assert trio.current_time() == begun
        await other.release()


async def test_a_create_of_a_name_that_comes_and_goes_is_sent_to_look_again_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel would tell the application ESTALE the second time."""
    async with cluster_of(1, tmp_path) as cluster:
        (one,) = cluster.nodes
        await one.make_file(b"f")
        files, root, mode = files_of(one), one.inodes[1], stat.S_IFREG | 0o644
        with pytest.raises(StaleHandle):
            await files.create(root, b"f", mode, os.O_WRONLY, CALLER, no_groups)
        files.looks.note(CALLER, (root.id, b"f"), None)
        lookup, gone = Tree.lookup, [True, True]

        async def comes_and_goes(self: Tree, directory: KernelInode, name: bytes) -> KernelInode:
            if gone:
                gone.pop()
                raise NoSuchEntry(name)
            return await lookup(self, directory, name)

        monkeypatch.setattr(Tree, "lookup", comes_and_goes)
        number, _ = await files.create(root, b"f", mode, os.O_WRONLY, CALLER, no_groups)
        assert not gone
        await files.release(number)


async def test_a_create_that_empties_a_file_which_the_kernel_knows_gets_another_inode(
    tmp_path: Path,
) -> None:
    """The kernel would go on to believe the size that it knew, and append behind it."""
    async with cluster_of(1, tmp_path) as cluster:
        (one,) = cluster.nodes
        await one.make_file(b"f")
        await one.write_file(b"f", b"data")
        files, root, mode = files_of(one), one.inodes[1], stat.S_IFREG | 0o644
        flags = os.O_WRONLY | os.O_TRUNC
        known = await one.look_up(b"f")
        with pytest.raises(StaleHandle):
            await files.create(root, b"f", mode, flags, CALLER, no_groups)
        files.looks.note(CALLER, (root.id, b"f"), None)
        lookups = known.lookups
        number, inode = await files.create(root, b"f", mode, flags, CALLER, no_groups)
        assert inode is not known and inode.lookups == 1 and known.lookups == lookups
        assert inode.session is not None and inode.session.copy.size == 0
        await files.write(number, 0, b"new")
        await files.flush(number)
        await files.release(number)
        assert await one.read_file(b"f") == b"new"
        assert inode.is_current and known.record.size == 4, "who has it open reads on"


async def test_a_truncation_by_a_name_that_went_elsewhere_is_sent_to_look_again(
    tmp_path: Path,
) -> None:
    """mv latest old; mv new latest: a truncate(2) of `latest` must not cut `old`."""
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await one.make_file(b"latest")
        await one.write_file(b"latest", b"data")
        files, inode = files_of(one), await one.look_up(b"latest")
        source, target = (ROOT_INODE, b"latest"), (ROOT_INODE, b"old")
        await two.feed.fresh()
        await two.namespace.change(lambda m: changes.rename(m, source, target, False, 2))
        await one.feed.fresh()
        one.notifier.acknowledge_all()  # but the call may have come that way before
        with pytest.raises(StaleHandle):
            await files.truncate(inode, 0, None, None, CALLER)
        assert await two.read_file(b"old") == b"data"
        files.looks.note(CALLER, (KernelId(1), b"old"), inode)  # it was old that was meant
        await files.truncate(inode, 0, None, None, CALLER)
        assert await two.read_file(b"old") == b""


async def test_a_truncation_that_is_sent_to_look_again_waits_for_the_writer_first(
    tmp_path: Path,
) -> None:
    """The kernel looks again once: after that it must find the last version."""
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await two.make_file(b"f")
        files, inode = files_of(one), await one.look_up(b"f")
        session = await two.open(b"f")
        await session.write(0, b"x" * 9000)
        await session.flush()
        await one.feed.fresh()
        assert not inode.is_current

        async def close() -> None:
            await trio.testing.wait_all_tasks_blocked()
            await session.write(0, b"y" * 9000)
            await session.flush()
            await session.release()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(close)
            with pytest.raises(StaleHandle):
                await files.truncate(inode, 5, None, None, CALLER)
        latest, _ = await files.looks.lookup(one.inodes[ROOT_INODE], b"f", CALLER)
        await files.truncate(latest, 5, None, None, CALLER)
        assert await two.read_file(b"f") == b"yyyyy"
