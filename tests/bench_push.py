"""How fast pages go into the kernel by `notify_store`: a file system of one file, and a push of it.

It runs in a process of its own, since a process has one FUSE session, and this one must not hang
with it. What it measures is the kernel's copy into fresh pages and what pyfuse3 adds to that.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import stat
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FUSEError, InodeT, RequestContext

from modelfsd import mounts
from tests.bench_places import MIB, Clock

NAME = b"pages"
FILE_INODE = 2
PUSH_BYTES = 4 * MIB
CACHE_SECONDS = 3600.0


class OneFile(pyfuse3.Operations):
    """A directory with one file, which nobody reads."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self._size_bytes = size_bytes

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        """The directory's attributes, or the file's."""
        entry = EntryAttributes()
        entry.st_ino = inode
        entry.entry_timeout = entry.attr_timeout = CACHE_SECONDS
        is_file = inode == FILE_INODE
        entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | 0o444 if is_file else stat.S_IFDIR | 0o555)
        entry.st_nlink = 1
        entry.st_size = self._size_bytes if is_file else 0
        return entry

    async def lookup(
        self, parent_inode: InodeT, name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """The one name that there is."""
        if name != NAME:
            raise FUSEError(errno.ENOENT)
        return await self.getattr(InodeT(FILE_INODE), ctx)


def measure(directory: Path, size_bytes: int) -> tuple[int, Clock]:
    """Push a file of this size; returns what was pushed, and how long it took."""
    mountpoint = directory / "push"
    mountpoint.mkdir()
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            return size_bytes, pool.submit(_mount_and_push, mountpoint, size_bytes).result()
    finally:
        mounts.detach(mountpoint)  # if that process was killed
        mountpoint.rmdir()


def _mount_and_push(mountpoint: Path, size_bytes: int) -> Clock:
    return trio.run(_serve_and_push, mountpoint, size_bytes)


async def _serve_and_push(mountpoint: Path, size_bytes: int) -> Clock:
    pyfuse3.init(OneFile(size_bytes), str(mountpoint), {"fsname=modelfs-bench", "ro"})
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pyfuse3.main)
            clock = await trio.to_thread.run_sync(_push, mountpoint, size_bytes)
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=True)
    return clock


def _push(mountpoint: Path, size_bytes: int) -> Clock:
    """On a thread beside the one that answers the kernel, as the daemon does it."""
    os.stat(mountpoint / os.fsdecode(NAME))  # the kernel has the inode now
    data = memoryview(os.urandom(PUSH_BYTES))
    with Clock(size_bytes // MIB) as clock:
        for offset in range(0, size_bytes, PUSH_BYTES):
            pyfuse3.notify_store(InodeT(FILE_INODE), offset, data)  # type: ignore[arg-type]  # any buffer will do
    return clock
