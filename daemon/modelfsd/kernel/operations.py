"""The FUSE operations: translate a request, call a driver, translate the answer. No decisions.

Every handler is wrapped by `answers`, which counts the request and turns whatever goes wrong into
an errno: an exception that escaped into pyfuse3 would end the daemon and hang the mount.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, InodeT, RequestContext, SetattrFields

from modelfs import xattrs
from modelfs.attributes import AttributeChange, storable
from modelfs.errors import ModelfsError, NameTooLong
from modelfs.inode import Inode
from modelfs.limits import NAME_BYTES_MAX, SYMLINK_BYTES_MAX
from modelfs.mirror import Mirror
from modelfsd.kernel.access_times import AccessTimes
from modelfsd.kernel.errnos import errno_of
from modelfsd.kernel.files import Files
from modelfsd.kernel.kernel_inodes import KernelInode, KernelInodes
from modelfsd.kernel.operations_listing import Listing, bare_name
from modelfsd.kernel.tree import Caller, NewInode, Tree
from modelfsd.logs import RateLimited
from modelfsd.stages import Histogram

log = logging.getLogger(__name__)

CACHE_SECONDS = 86_400.0  # entries and attributes: invalidated by events, not by age
BLOCK_BYTES = 512  # of st_blocks
PREFERRED_IO_BYTES = 1 << 20  # st_blksize: the largest request that FUSE makes

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")
Handler = Callable[Concatenate["Operations", Parameters], Coroutine[Any, Any, Answer]]


def answers(handler: Handler[Parameters, Answer]) -> Handler[Parameters, Answer]:
    """Make a handler answer with an errno when it fails."""

    @wraps(handler)
    async def guarded(
        self: Operations, /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Answer:
        self.requests[handler.__name__] += 1
        started = time.perf_counter()
        try:
            return await handler(self, *args, **kwargs)
        except FUSEError:
            raise
        except ModelfsError as error:
            number = errno_of(error)
            if number in (errno.EIO, errno.EROFS, errno.ENOSPC):
                subject = (handler.__name__, number)
                text = os.strerror(number)
                self.complaints.warning(subject, "%s fails with %s: %s", subject[0], text, error)
            raise FUSEError(number) from error
        except OSError as error:
            self.complaints.error(handler.__name__, "%s fails: %s", handler.__name__, error)
            raise FUSEError(error.errno or errno.EIO) from error
        except Exception as error:
            log.exception("a bug in %s", handler.__name__)
            raise FUSEError(errno.EIO) from error
        finally:
            self.latencies[handler.__name__].add(time.perf_counter() - started)

    return guarded


def _caller(ctx: RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.pid)


class Operations(pyfuse3.Operations):
    """What pyfuse3 calls. `space` answers statfs; `has_xattrs` is `-o xattr`."""

    enable_writeback_cache = True
    supports_dot_lookup = False

    def __init__(
        self,
        mirror: Mirror,
        inodes: KernelInodes,
        tree: Tree,
        files: Files,
        space: Callable[[], tuple[int, int, int]],
        has_xattrs: bool,
        access_times: AccessTimes,
    ) -> None:
        super().__init__()
        self.requests: Counter[str] = Counter()
        self.latencies: defaultdict[str, Histogram] = defaultdict(Histogram)
        self.complaints = RateLimited(log)
        self._mirror, self._inodes, self._tree, self._files = mirror, inodes, tree, files
        self._space, self._has_xattrs = space, has_xattrs
        self._access_times = access_times
        self._listings: dict[int, Listing] = {}
        self._last_listing = 0

    # ------------------------------------------------------------ attributes

    def _attributes(self, inode: KernelInode) -> EntryAttributes:
        """What stat shows: contents, size and mtime of the view, the rest as it is now."""
        latest = self._mirror.inode(inode.ino)
        view, now = inode.record, latest or inode.record
        entry = EntryAttributes()
        entry.st_ino = InodeT(inode.id)
        entry.generation = 0
        entry.entry_timeout = CACHE_SECONDS
        entry.attr_timeout = CACHE_SECONDS
        entry.st_mode = pyfuse3.ModeT(now.mode)
        entry.st_nlink = self._mirror.link_count(inode.ino, now) if latest else 0
        entry.st_uid, entry.st_gid, entry.st_rdev = now.uid, now.gid, now.rdev
        size, mtime_ns, ctime_ns = view.size, view.mtime_ns, now.ctime_ns
        stored_bytes = view.stored_bytes
        if inode.session is not None:
            copy = inode.session.copy
            size, mtime_ns = copy.size, mtime_ns if copy.mtime_ns is None else copy.mtime_ns
            stored_bytes = copy.stored_bytes_max
        if now.is_directory and (times := self._mirror.dirtime(inode.ino)) is not None:
            mtime_ns, ctime_ns = times[0], max(times[1], ctime_ns)
        entry.st_size = size
        entry.st_blksize = PREFERRED_IO_BYTES
        entry.st_blocks = -(-stored_bytes // BLOCK_BYTES)
        entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns = now.atime_ns, mtime_ns, ctime_ns
        return entry

    @answers
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return self._attributes(self._inodes[inode])

    @answers
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        target = self._inodes[inode]
        mtime_ns = storable(attr.st_mtime_ns) if fields.update_mtime else None
        if fields.update_size:
            await self._files.truncate(target, attr.st_size, mtime_ns, fh, _caller(ctx))
            mtime_ns = None
        change = AttributeChange(
            permissions=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime_ns=storable(attr.st_atime_ns) if fields.update_atime else None,
            mtime_ns=mtime_ns,
        )
        if change == AttributeChange() and not fields.update_size:
            # A chown(-1, -1). Of a file it comes with the ctime; without it was a write, which
            # would have the set-group-id bit taken if the kernel told us so.
            change = AttributeChange(moves_ctime=fields.update_ctime or not target.record.is_file)
        if change != AttributeChange():
            await self._files.set_attributes(target, change, _caller(ctx))
        target.changed_at = time.monotonic()
        return self._attributes(target)

    @answers
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        capacity_bytes, free_bytes, files = self._space()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = capacity_bytes // 4096
        data.f_bfree = data.f_bavail = free_bytes // 4096
        data.f_files, data.f_ffree = files + (1 << 32), 1 << 32
        data.f_favail = data.f_ffree
        data.f_namemax = NAME_BYTES_MAX
        return data

    # ------------------------------------------------------------ names

    @answers
    async def lookup(
        self, parent_inode: InodeT, name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        directory = self._inodes[parent_inode]
        found, may_remember = await self._files.looks.lookup(directory, name, _caller(ctx))
        attributes = self._attributes(found)
        if not may_remember:
            attributes.entry_timeout = 0
        return attributes

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        self._inodes.forget(inode_list)

    @answers
    async def mkdir(
        self, parent_inode: InodeT, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        return await self._make(parent_inode, name, NewInode(mode), ctx)

    @answers
    async def mknod(
        self, parent_inode: InodeT, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        return await self._make(parent_inode, name, NewInode(mode, rdev), ctx)

    @answers
    async def symlink(
        self, parent_inode: InodeT, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        if len(target) > SYMLINK_BYTES_MAX:
            raise NameTooLong(target)
        new = NewInode(stat.S_IFLNK | 0o777, target=target)
        return await self._make(parent_inode, name, new, ctx)

    async def _make(
        self, parent: InodeT, name: bytes, new: NewInode, ctx: RequestContext
    ) -> EntryAttributes:
        directory = self._inodes[parent]
        return self._attributes(await self._tree.create(directory, name, new, _caller(ctx), None))

    @answers
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> bytes:
        link = self._inodes[inode]
        self._access_times.note(link)
        return link.record.target

    @answers
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        target = self._inodes[inode]
        self._files.looks.look_again_once(target, _caller(ctx))
        directory = self._inodes[new_parent_inode]
        linked = await self._tree.link(target, directory, new_name)
        linked.changed_at = time.monotonic()
        return self._attributes(linked)

    @answers
    async def unlink(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        await self._tree.remove(self._inodes[parent_inode], name, directory=False)

    @answers
    async def rmdir(self, parent_inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        await self._tree.remove(self._inodes[parent_inode], name, directory=True)

    @answers
    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: bytes,
        parent_inode_new: InodeT,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise FUSEError(errno.EINVAL)
        source = (self._inodes[parent_inode_old], name_old)
        target = (self._inodes[parent_inode_new], name_new)
        await self._tree.rename(source, target, bool(flags & pyfuse3.RENAME_NOREPLACE))

    # ------------------------------------------------------------ directories

    @answers
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> int:
        directory = self._inodes[inode]
        await self._files.looks.open_directory(directory, _caller(ctx))
        self._last_listing += 1
        self._listings[self._last_listing] = Listing(directory)
        return self._last_listing

    @answers
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing = self._listings[fh]
        entries = listing.entries
        if entries is not None and start_id == 0:  # rewinddir(3) shows the directory as it is now
            await self._tree.open_directory(listing.directory)
            entries = None
        if entries is None:
            entries = listing.entries = self._tree.list_directory(listing.directory)
        self._access_times.note(listing.directory)
        for position, entry, inode in self._tree.entries_from(listing.directory, entries, start_id):
            attributes = self._attributes(inode) if inode is not None else bare_name()
            is_taken = pyfuse3.readdir_reply(token, entry.name, attributes, position + 1)
            if inode is not None and is_taken and entry.name not in (b".", b".."):
                inode.lookups += 1
            elif inode is not None:
                self._inodes.drop_if_unused(inode)
            if not is_taken:
                return

    @answers
    async def releasedir(self, fh: int) -> None:
        del self._listings[fh]

    @answers
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Every change of a directory is durable in etcd when it returns."""

    # ------------------------------------------------------------ files

    @answers
    async def open(self, inode: InodeT, flags: int, ctx: RequestContext) -> FileInfo:
        number = await self._files.open(self._inodes[inode], flags, _caller(ctx))
        return FileInfo(fh=pyfuse3.FileHandleT(number), keep_cache=True)

    @answers
    async def create(
        self, parent_inode: InodeT, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        directory = self._inodes[parent_inode]
        number, inode = await self._files.create(
            directory, name, mode, flags, _caller(ctx), pyfuse3.get_sup_groups
        )
        info = FileInfo(fh=pyfuse3.FileHandleT(number), keep_cache=True)
        return info, self._attributes(inode)

    @answers
    async def read(self, fh: int, off: int, size: int) -> bytes:
        inode = self._files.inode_of(fh)
        self._access_times.note(inode)
        use = self._files.uses.reading(inode.ino)
        data = await self._files.read(fh, off, size)
        use.read_bytes += len(data)
        return data  # type: ignore[return-value]  # any buffer will do

    @answers
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await self._files.write(fh, off, buf)

    @answers
    async def flush(self, fh: int) -> None:
        await self._files.flush(fh)

    @answers
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._files.sync(fh)

    @answers
    async def release(self, fh: int) -> None:
        await self._files.release(fh)

    # ------------------------------------------------------------ extended attributes

    # Without `-o xattr` all four answer ENOSYS, and the kernel never asks again. That is the
    # default since it asks for security.capability before every write, which costs 4 KiB writes
    # nine tenths of their speed (67 against 701 MB/s).

    @answers
    async def getxattr(self, inode: InodeT, name: bytes, ctx: RequestContext) -> bytes:
        if not self._has_xattrs:
            raise FUSEError(errno.ENOSYS)
        record = self._xattr_record(inode)
        if not record.xattrs and name == b"security.capability":
            raise FUSEError(errno.ENODATA)  # before every write: no detours
        return xattrs.get(record, name)

    @answers
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[bytes]:
        if not self._has_xattrs:
            raise FUSEError(errno.ENOSYS)
        return xattrs.visible(self._xattr_record(inode), ctx.uid == 0)

    @answers
    async def setxattr(self, inode: InodeT, name: bytes, value: bytes, ctx: RequestContext) -> None:
        await self._change_xattr(inode, name, value, ctx)

    @answers
    async def removexattr(self, inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        await self._change_xattr(inode, name, None, ctx)

    def _xattr_record(self, inode: InodeT) -> Inode:
        """The record as it is now. That of a current kernel inode is, and need not be decoded."""
        target = self._inodes[inode]
        if target.is_current:
            return target.record
        return self._mirror.inode(target.ino) or target.record

    async def _change_xattr(
        self, inode: InodeT, name: bytes, value: bytes | None, ctx: RequestContext
    ) -> None:
        if not self._has_xattrs:
            raise FUSEError(errno.ENOSYS)
        target = self._inodes[inode]
        if target.record.is_file and not target.handles:
            self._files.looks.look_again_once(target, _caller(ctx))
        await self._tree.set_xattr(target, name, value)
