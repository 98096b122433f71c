"""A path through a name that another node has just replaced: nobody is told ENOENT for it."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from modelfs import changes
from modelfs.errors import NoSuchEntry, StaleHandle
from modelfs.ids import ROOT_INODE
from modelfsd.kernel import looks
from modelfsd.kernel.files import Files
from modelfsd.kernel.kernel_inodes import KernelInode
from modelfsd.kernel.looks import is_opening
from modelfsd.kernel.pusher import Pusher
from modelfsd.kernel.tree import Caller, NewInode, Tree
from tests.daemon.node_parts import Node, cluster_of

CALLER, OTHER = Caller(0, 0, 7), Caller(0, 0, 8)
FILE, DIRECTORY = NewInode(stat.S_IFREG | 0o644), NewInode(stat.S_IFDIR | 0o755)


@pytest.fixture(autouse=True)
def everybody_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The callers here are no threads that could be looked at."""
    monkeypatch.setattr(looks, "is_opening", lambda _: True)


@dataclass
class Replaced:
    """A directory `d`, known to this node's kernel, that another node has replaced by `new`."""

    here: Node
    files: Files
    old: KernelInode

    @property
    def root(self) -> KernelInode:
        return self.here.inodes[ROOT_INODE]

    async def walk(self, caller: Caller = CALLER) -> KernelInode:
        """What the kernel does first when it looks again."""
        found, may_remember = await self.files.looks.lookup(self.root, b"d", caller)
        assert found is not self.old
        assert not may_remember, "the call may be over"
        return found


async def rename(node: Node, old: bytes, new: bytes) -> None:
    names = (ROOT_INODE, old), (ROOT_INODE, new)
    await node.namespace.change(lambda m: changes.rename(m, *names, False, 2))


@asynccontextmanager
async def replaced(path: Path) -> AsyncIterator[Replaced]:
    async with cluster_of(2, path) as cluster:
        here, there = cluster.nodes
        tree = Tree(there.namespace, there.cache)
        await tree.create(there.inodes[1], b"d", DIRECTORY, CALLER, None)
        old = await here.look_up(b"d")
        new = await tree.create(there.inodes[1], b"new", DIRECTORY, CALLER, None)
        await tree.create(new, b"f", FILE, CALLER, None)
        await rename(there, b"d", b"old")
        await rename(there, b"new", b"d")
        here_tree = Tree(here.namespace, here.cache)
        parts = here_tree, here.contents, here.writer, Pusher(here.inodes)
        yield Replaced(here, Files(here.namespace, here.cache, *parts), old)


async def test_a_name_is_not_missing_because_its_directory_was_replaced(tmp_path: Path) -> None:
    async with replaced(tmp_path) as at:
        with pytest.raises(StaleHandle):
            await at.files.looks.lookup(at.old, b"f", CALLER)
        with pytest.raises(StaleHandle):
            await at.files.looks.lookup(at.old, b"f", OTHER)
        found, _ = await at.files.looks.lookup(await at.walk(), b"f", CALLER)
        at.here.inodes.retire(found)  # written once more: it was the latest after the call began
        await at.files.release(await at.files.open(found, os.O_RDONLY, CALLER))
        with pytest.raises(StaleHandle):  # told once
            await at.files.open(found, os.O_RDONLY, CALLER)


async def test_what_is_missing_there_too_is_missing(tmp_path: Path) -> None:
    async with replaced(tmp_path) as at:
        with pytest.raises(StaleHandle):
            await at.files.looks.lookup(at.old, b"g", CALLER)
        new = await at.walk()
        for _ in range(2):  # the kernel asks twice if it has known the name
            with pytest.raises(NoSuchEntry):
                await at.files.looks.lookup(new, b"g", CALLER)
        # Who is inside looks again from there, and finds nothing again.
        with pytest.raises(StaleHandle):
            await at.files.looks.lookup(at.old, b"h", OTHER)
        with pytest.raises(NoSuchEntry):
            await at.files.looks.lookup(at.old, b"h", OTHER)
        at.here.notifier.acknowledge_all()


async def test_only_a_call_that_opens_is_sent_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux would pass it on to who calls mkdir(2)."""
    async with replaced(tmp_path) as at:
        monkeypatch.setattr(looks, "is_opening", lambda pid: pid == OTHER.pid)
        with pytest.raises(NoSuchEntry):
            await at.files.looks.lookup(at.old, b"f", CALLER)
        with pytest.raises(StaleHandle):
            await at.files.looks.lookup(at.old, b"f", OTHER)


def test_what_a_caller_is_doing_can_be_seen(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for command, wanted in [(("cat", str(tmp_path / "fifo")), True), (("sleep", "60"), False)]:
        with subprocess.Popen(command) as child:
            try:
                wait_channel = Path(f"/proc/{child.pid}/syscall")
                while is_opening(child.pid) != wanted or wait_channel.read_text() == "running\n":
                    os.sched_yield()
            finally:
                child.kill()
    assert not is_opening(child.pid), "it is gone"
    assert not is_opening(0)


async def test_a_replaced_directory_is_not_opened_to_be_listed(tmp_path: Path) -> None:
    async with replaced(tmp_path) as at:
        with pytest.raises(StaleHandle):
            await at.files.looks.open_directory(at.old, CALLER)
        found, _ = await at.files.looks.lookup(at.root, b"d", CALLER)
        assert found is not at.old
        await at.files.looks.open_directory(found, CALLER)
        with pytest.raises(StaleHandle):
            await at.files.looks.open_directory(at.old, OTHER)
        await at.files.looks.open_directory(at.old, OTHER)  # who is inside means it


async def test_a_replaced_symlink_may_have_led_anywhere(tmp_path: Path) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        here, there = cluster.nodes
        tree = Tree(there.namespace, there.cache)
        for name, target in [(b"latest", b"v1"), (b"new", b"v2"), (b"unknown", b"v1")]:
            link = NewInode(stat.S_IFLNK | 0o777, target=target)
            await tree.create(there.inodes[1], name, link, CALLER, None)
        await there.make_file(b"v1")
        known, file = await here.look_up(b"latest"), await here.look_up(b"v1")
        assert known.record.target == b"v1"
        await there.namespace.change(lambda m: changes.remove(m, ROOT_INODE, b"unknown", False, 2))
        await here.feed.fresh()
        assert not here.cache.must_look_again(file), "no path of this kernel went through it"
        await rename(there, b"new", b"latest")
        await here.feed.fresh()
        assert here.cache.must_look_again(file)
        here.notifier.acknowledge_all()
        assert not here.cache.guard._waiting
