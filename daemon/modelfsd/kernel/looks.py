"""Looking names up, and sending calls to look again (ESTALE) that came by a way which has changed.

Another node replaces a directory (`mv d old; mv new d`) or a symlink, and tells somebody so. Until
the kernel has acted on that, a path through the name leads to what was there before. If the file
is there too, OPEN finds it out (`Files`). But if the name is missing there, no OPEN comes: so
open(2) is not told that it is missing before it has walked the whole path again, and neither is
an old directory opened to be listed.

A LOOKUP does not say for which call it is made, and Linux passes the ESTALE of some on to the
application (`filename_create`: mkdir, mknod, symlink, link, bind). So the caller, who waits in the
kernel for the answer, is looked at: only a call that opens is sent back. Where that cannot be seen
(a daemon that is not root, io_uring, another PID namespace), the name is missing.
"""

from __future__ import annotations

import platform
from pathlib import Path

import trio

from modelfs.errors import NoSuchEntry
from modelfsd.kernel.kernel_cache import KernelCache
from modelfsd.kernel.kernel_inodes import KernelInode
from modelfsd.kernel.sent_back import Entry, SentBack
from modelfsd.kernel.tree import Caller, Tree

# The numbers of open, creat, openat, openat2, execve and execveat, by architecture.
OPENING_CALLS = {
    "x86_64": frozenset({2, 85, 257, 437, 59, 322}),
    "aarch64": frozenset({56, 437, 221, 281}),
}.get(platform.machine(), frozenset())
SEEING_SECONDS = 1.0  # before Linux 5.8 a caller in execve cannot be looked at until it is answered


def is_opening(pid: int) -> bool:
    """Whether a thread that waits in the kernel is in a call that opens a file."""
    try:
        number, *_ = Path(f"/proc/{pid}/syscall").read_text().split()
    except (OSError, ValueError):
        return False
    return number.isdecimal() and int(number) in OPENING_CALLS


class Looks:
    """The lookups of all calls, and which calls were sent to look again."""

    def __init__(self, cache: KernelCache, tree: Tree) -> None:
        self._cache, self._tree = cache, tree
        self.opens, self.links, self.truncates = SentBack(), SentBack(), SentBack()

    async def lookup(
        self, directory: KernelInode, name: bytes, caller: Caller
    ) -> tuple[KernelInode, bool]:
        """As `Tree.lookup`, and whether the kernel may remember it.

        Raises `NoSuchEntry`, and `StaleHandle` to look again.
        """
        entry = (directory.id, name)
        is_doubtful = self._cache.is_way_doubtful(directory)
        try:
            found = await self._tree.lookup(directory, name)
        except NoSuchEntry:
            if is_doubtful or self._cache.is_way_doubtful(directory):
                await self._look_again_once(caller, entry)
            self.note(caller, entry, None)
            raise
        return found, self.note(caller, entry, found)

    async def _look_again_once(self, caller: Caller, entry: Entry) -> None:
        """For a call that opens, and has not looked again yet."""
        if self.opens.is_looking(caller, entry):
            return
        with trio.move_on_after(SEEING_SECONDS):
            if await trio.to_thread.run_sync(is_opening, caller.pid, abandon_on_cancel=True):
                self.opens.send(caller, is_doubtful=True)

    def note(self, caller: Caller, entry: Entry, inode: KernelInode | None) -> bool:
        """A lookup was answered (None: in vain): remember it for who was sent to look again.

        Returns whether the kernel may remember it.
        """
        may_remember = True
        for calls in (self.opens, self.links, self.truncates):
            may_remember &= calls.note_lookup(caller, entry, inode)
        return may_remember

    async def open_directory(self, directory: KernelInode, caller: Caller) -> None:
        """As `Tree.open_directory`. Raises `StaleHandle` to look again."""
        is_back = self.opens.is_back_in_a_directory(caller)
        is_doubtful = self._cache.is_way_doubtful(directory)
        await self._tree.open_directory(directory)
        if not is_back and (is_doubtful or self._cache.is_way_doubtful(directory)):
            self.opens.send(caller, directory)

    def look_again_once(self, inode: KernelInode, caller: Caller) -> None:
        """For link, chmod and the like: send the kernel back from what is superseded, once.

        The name meant that file after the call began, and if it has gone since, that is ENOENT.
        """
        is_back = self.links.is_back_on_the_way(caller, inode)
        if not inode.is_current and not is_back:
            self.links.send(caller)
