"""Open files: what the kernel asks about handles.

`open` is where the promises between nodes are kept (G2, G3): it is made fresh, it sends the kernel
to look again (`StaleHandle`) when the way that it came may be out of date, and a handle that it
gives out keeps the version that it opened.

The kernel looks again once. So the OPEN that comes back from there is accepted for reading even if
a newer version was committed in between: it was the latest when that look began, hence after
open() began. For writing, the lease is taken *before* the kernel is sent to look again.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

import trio

from modelfs.attributes import (
    AttributeChange,
    changed_when_unlinked,
    may_open,
    only_repeats,
    permissions_after_write,
)
from modelfs.changes import Claim
from modelfs.errors import (
    AccessDenied,
    EntryExists,
    IsDirectory,
    ModelfsError,
    NoSuchEntry,
    StaleHandle,
    WriterElsewhere,
)
from modelfsd.kernel.kernel_cache import KernelCache
from modelfsd.kernel.kernel_inodes import KernelInode
from modelfsd.kernel.looks import Looks
from modelfsd.kernel.pusher import Pusher
from modelfsd.kernel.readahead import Readahead
from modelfsd.kernel.tree import Caller, NewInode, Tree
from modelfsd.metadata.namespace import Namespace
from modelfsd.storage.contents import Contents
from modelfsd.uses import FileUses, current_use
from modelfsd.writing.write_session import WriteSession
from modelfsd.writing.writer import Writer

log = logging.getLogger(__name__)

STOP_SECONDS = 60.0  # for the last commits at a stop
CREATES_MAX = 8  # attempts at a name that comes and goes

GroupsOf = Callable[[int], Iterable[int]]  # the supplementary groups of a process


@dataclass(frozen=True, slots=True)
class Handle:
    """An open file. `session` is set if it may be written, or was emptied by its open."""

    inode: KernelInode
    session: WriteSession | None
    starts_over: bool = False  # opened with O_TRUNC: see `WriteSession.start_over`

    def require_session(self) -> WriteSession:
        """The session of a handle that may be written."""
        assert self.session is not None, "the kernel refuses writes to read-only handles"
        return self.session


def _is_for_writing(flags: int) -> bool:
    """Whether an open needs a session: O_TRUNC changes the file also with O_RDONLY."""
    return flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)


class Files:
    """The open files of this mount."""

    def __init__(
        self,
        namespace: Namespace,
        cache: KernelCache,
        tree: Tree,
        contents: Contents,
        writer: Writer,
        pusher: Pusher,
    ) -> None:
        self._namespace, self._cache, self._tree = namespace, cache, tree
        self._contents, self._writer, self._pusher = contents, writer, pusher
        self._readahead = Readahead(contents, pusher)
        self._handles: dict[int, Handle] = {}
        self._last_handle = 0
        self.looks = Looks(cache, tree)
        self._sent_opens, self._sent_truncates = self.looks.opens, self.looks.truncates
        self.uses = FileUses()

    def __len__(self) -> int:
        return len(self._handles)

    # ------------------------------------------------------------ opening

    async def open(self, inode: KernelInode, flags: int, caller: Caller) -> int:
        """Open a file; returns the number of its handle. Raises `StaleHandle` to look again."""
        # Asked first: an election, which `fresh` waits for, outlasts the memory of who was sent.
        has_looked_again = self._sent_opens.is_back(caller, inode)
        must_look_again = await self._must_look_again(inode, bool(flags & os.O_TRUNC))
        if not _is_for_writing(flags):
            if must_look_again and not has_looked_again:
                self._sent_opens.send(caller, inode)
            return self._new_handle(inode, None)
        return await self._open_for_writing(inode, flags, caller, must_look_again, has_looked_again)

    async def _must_look_again(self, inode: KernelInode, truncates: bool) -> bool:
        """Whether the way to this inode may be out of date, as of now."""
        must_look_again = self._cache.must_look_again(inode, truncates)
        await self._namespace.fresh()
        return must_look_again or self._cache.must_look_again(inode, truncates)

    async def _open_for_writing(
        self,
        inode: KernelInode,
        flags: int,
        caller: Caller,
        must_look_again: bool,
        has_looked_again: bool,
        wait_seconds: float | None = None,
    ) -> int:
        must_look_again = must_look_again and not has_looked_again
        session = self._writer.session_of(inode)
        try:
            await self._pusher.drain(inode)
            session.require_sound()
            size = max(inode.record.size, session.copy.size)
            if must_look_again:  # then the lease is for the OPEN that comes next
                latest = self._namespace.mirror.inode(inode.ino)
                size = latest.size if latest is not None else 0
            if size and self._has_name(inode):
                may_start_over = has_looked_again and bool(flags & os.O_TRUNC)
                await self._take_lease(session, may_start_over, wait_seconds)
            if must_look_again:
                session.reserve_lease()
                raise StaleHandle(inode.id)
            if flags & os.O_TRUNC:
                # Part of what the handle commits: nobody sees an empty version in between, and a
                # writer that dies leaves the old one.
                await self._clear_set_ids(inode, caller)  # may fail: then the file is as it was
                await session.truncate(0)
                session.start_over()
        except BaseException as error:
            await session.release()
            if isinstance(error, StaleHandle):
                if has_looked_again:  # the kernel would tell the application ESTALE
                    raise WriterElsewhere(f"inode {inode.ino} was written twice") from error
                self._sent_opens.send(caller, inode)
            raise
        return self._new_handle(inode, session, flags)

    async def _clear_set_ids(self, inode: KernelInode, caller: Caller) -> None:
        """O_TRUNC takes the set-id bits, as writing does. The kernel leaves this one to us."""
        record = self._namespace.mirror.inode(inode.ino) or inode.record
        permissions = permissions_after_write(record.mode)
        if caller.uid and permissions != stat.S_IMODE(record.mode):
            await self.set_attributes(inode, AttributeChange(permissions), caller)

    def _has_name(self, inode: KernelInode) -> bool:
        """Else it is opened through /proc/self/fd, and nobody will ever see what is written."""
        return self._namespace.mirror.inode(inode.ino) is not None or not inode.handles

    @staticmethod
    async def _take_lease(
        session: WriteSession, may_start_over: bool, wait_seconds: float | None
    ) -> None:
        try:
            await session.ensure_lease(wait_seconds)
        except StaleHandle:
            if not may_start_over:
                raise
            # The kernel has used up its second look, and what is there now goes anyhow.
            await session.start_over_now(wait_seconds)

    def _new_handle(self, inode: KernelInode, session: WriteSession | None, flags: int = 0) -> int:
        self._last_handle += 1
        self._handles[self._last_handle] = Handle(inode, session, bool(flags & os.O_TRUNC))
        inode.handles += 1
        self.uses.of(inode.ino).opens += 1
        return self._last_handle

    async def create(
        self,
        parent: KernelInode,
        name: bytes,
        mode: int,
        flags: int,
        caller: Caller,
        groups_of: GroupsOf,
    ) -> tuple[int, KernelInode]:
        """Create and open in one step. Raises `EntryExists` for O_EXCL.

        If the name was made meanwhile, the kernel is sent back once; then what is there is opened.
        """
        has_looked_again = False
        for _ in range(CREATES_MAX):
            try:
                return await self._create_new(parent, name, mode, flags, caller)
            except EntryExists:
                if flags & os.O_EXCL:
                    raise
                has_looked_again |= self._sent_opens.is_back_in_vain(caller)
                if not has_looked_again:
                    self._sent_opens.send(caller)
            with suppress(NoSuchEntry):  # gone again
                return await self._open_existing(parent, name, flags, caller, groups_of)
        raise WriterElsewhere(f"{os.fsdecode(name)} comes and goes")

    async def _open_existing(
        self, parent: KernelInode, name: bytes, flags: int, caller: Caller, groups_of: GroupsOf
    ) -> tuple[int, KernelInode]:
        """Open a file for CREATE. The kernel then checks no permission, and nobody may wait."""
        inode = await self._tree.lookup(parent, name)
        try:
            record, access = inode.record, flags & os.O_ACCMODE
            if record.is_directory:
                raise IsDirectory(name)
            if not record.is_file:
                raise WriterElsewhere(f"{os.fsdecode(name)} comes and goes")
            is_writer, groups = _is_for_writing(flags), {caller.gid, *groups_of(caller.pid)}
            if not may_open(record, caller.uid, groups, access != os.O_WRONLY, is_writer):
                raise AccessDenied(name)
            if not is_writer:
                return self._new_handle(inode, None), inode
            if flags & os.O_TRUNC:
                inode = self._new_to_the_kernel(inode)
            number = await self._open_for_writing(inode, flags, caller, False, True, 0)
            return number, inode
        except BaseException:
            inode.lookups -= 1
            self._cache.inodes.drop_if_unused(inode)
            raise

    def _new_to_the_kernel(self, inode: KernelInode) -> KernelInode:
        """Another kernel inode, if the kernel knows this one, which was just looked up for CREATE.

        With the writeback cache it believes its own size, and a CREATE with O_TRUNC does not change
        that: it would go on to show, and to append to, what is gone.
        """
        if inode.lookups == 1:
            return inode
        if inode.session is not None:
            raise WriterElsewhere(f"inode {inode.ino} is being written through another name")
        record = self._namespace.require(inode.ino)
        self._cache.retire(inode)
        inode.lookups -= 1
        inode = self._cache.inodes.show(inode.ino, record)
        inode.lookups += 1
        return inode

    async def _create_new(
        self, parent: KernelInode, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[int, KernelInode]:
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        claim = None
        if writable:
            claim = Claim(self._namespace.node_id, self._writer.leases.etcd_lease)
        inode = await self._tree.create(parent, name, NewInode(mode), caller, claim)
        session = None
        if writable:
            session = self._writer.session_of(inode)
            session.adopt_lease()
        return self._new_handle(inode, session), inode

    # ------------------------------------------------------------ using

    def inode_of(self, number: int) -> KernelInode:
        """The inode of a handle."""
        return self._handles[number].inode

    async def read(self, number: int, offset: int, size: int) -> bytes | memoryview:
        """Up to `size` bytes; short only at the end of the file."""
        inode = self._handles[number].inode
        if inode.session is not None and inode.session.copy.is_dirty:
            return await inode.session.read(offset, size)
        record = inode.record
        if record.manifest is None:
            return await self._contents.read(record, offset, size)
        is_stream = self._readahead.observe(inode, offset, size)
        current_use().stream_requests += is_stream
        return await self._contents.read(record, offset, size, whole_chunks=is_stream)

    async def write(self, number: int, offset: int, data: bytes) -> int:
        """Take bytes; returns how many."""
        handle = self._handles[number]
        await handle.require_session().write(offset, data)
        self.uses.note_write(handle.inode.ino, len(data))
        return len(data)

    async def flush(self, number: int) -> None:
        """close() of a descriptor: commit what was written, if this one could write."""
        session = self._handles[number].session
        if session is not None:
            await session.flush()

    async def sync(self, number: int) -> None:
        """fsync(): commit what was written to the file, through whichever handle."""
        inode = self._handles[number].inode
        if inode.session is not None:
            with self._cache.telling_blocks(inode):
                await inode.session.flush()

    async def release(self, number: int) -> None:
        """The last descriptor of a handle is gone."""
        handle = self._handles.pop(number)
        inode, session = handle.inode, handle.inode.session
        inode.handles -= 1
        try:
            if handle.session is not None:
                await handle.session.release(handle.starts_over)
            elif session is not None:
                await session.end_unless_used()
        finally:
            self._cache.inodes.drop_if_unused(inode)

    # ------------------------------------------------------------ attributes of files

    async def truncate(
        self,
        inode: KernelInode,
        size: int,
        mtime_ns: int | None,
        number: int | None,
        caller: Caller,
    ) -> None:
        """ftruncate() on a handle, or truncate() by path: then committed at once."""
        session = self._handles[number].session if number is not None else None
        if session is not None:
            await self._set_size(session, size, mtime_ns, caller)
            return
        has_looked_again = self._sent_truncates.is_back(caller, inode)
        must_look_again = await self._must_look_again(inode, truncates=True)
        session = self._writer.session_of(inode)
        try:
            await self._pusher.drain(inode)
            session.require_sound()
            if self._has_name(inode):
                await session.ensure_lease()
            if must_look_again and not has_looked_again:  # the lease is for who comes back
                session.reserve_lease()
                raise StaleHandle(inode.id)
            await self._set_size(session, size, mtime_ns, caller)
            await session.flush()
        except StaleHandle as error:
            if has_looked_again:  # the kernel would tell the application ESTALE
                raise WriterElsewhere(f"inode {inode.ino} was written twice") from error
            self._sent_truncates.send(caller, inode)
        finally:
            await session.release()

    async def _set_size(
        self, session: WriteSession, size: int, mtime_ns: int | None, caller: Caller
    ) -> None:
        inode = session.inode
        await session.truncate(size)
        session.copy.mtime_ns = mtime_ns
        if mtime_ns is not None and not session.copy.is_dirty and inode.is_current:
            # The size is as it was, so nothing will be committed: the time goes on its own.
            await self.set_attributes(inode, AttributeChange(mtime_ns=mtime_ns), caller)

    async def set_attributes(
        self, inode: KernelInode, change: AttributeChange, caller: Caller
    ) -> None:
        """As `Tree.set_attributes`, but the mtime of uncommitted writes waits for their commit."""
        mtime_ns, session = change.mtime_ns, inode.session
        if session is not None and mtime_ns is not None and await session.set_mtime(mtime_ns):
            change = replace(change, mtime_ns=None)
        if inode.record.is_file and not inode.handles:
            if not inode.is_current and only_repeats(inode.record, change):
                # The kernel sends the times of what was just unlinked or replaced. No call waits
                # for the answer: the next syncfs(2), of anybody, would get the error.
                return
            self.looks.look_again_once(inode, caller)
        if self._namespace.mirror.inode(inode.ino) is None:
            inode.record = changed_when_unlinked(inode.record, change, time.time_ns())
            return
        await self._tree.set_attributes(inode, change)
        self._cache.changed_through(inode)

    async def settle(self) -> None:
        """The mount is gone: commit what is left and let go of every lease, in bounded time."""
        with trio.move_on_after(STOP_SECONDS) as scope:
            for number in list(self._handles):
                try:
                    await self.release(number)
                except (ModelfsError, OSError) as error:
                    log.error("at unmount: %s", error)
            await self._writer.flush_all()
        if scope.cancelled_caught:
            await self._writer.give_up(STOP_SECONDS)
