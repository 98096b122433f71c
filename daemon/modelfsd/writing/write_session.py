"""Writing one file: a session joins a kernel inode, a lease and a working copy.

A session begins with the first writable handle of a kernel inode and ends with the last. The lease
is taken when the session begins, unless the file is empty: then with the first byte, so that two
nodes can hold a lock file open that neither ever writes.

A commit happens in `flush`: seal what is staged, wait for the replicas, store the manifest, and
change the inode in one transaction that compares lease and version. What goes wrong on the way
poisons the session: nothing of it is ever committed, every later flush and fsync of it fails, and
its bytes are kept under `lost/`, also those that are written later, as long as there is room.

That a write can no longer be committed is not told to the WRITE that finds it out. The kernel sends
WRITEs long after write() has returned, and fails for them the close() of whoever has the file open.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from modelfs import changes
from modelfs.chunk import Buffer
from modelfs.errors import (
    FileTooLarge,
    MetadataUnavailable,
    MetadataUncertain,
    ModelfsError,
    NoSuchEntry,
    StaleHandle,
    WriteLost,
    WriterElsewhere,
)
from modelfs.ids import Revision
from modelfs.limits import FILE_BYTES_MAX
from modelfsd.kernel.kernel_inodes import KernelInode
from modelfsd.metadata.leases import RESERVED_SECONDS
from modelfsd.shared_lock import SharedLock
from modelfsd.stages import timed
from modelfsd.writing.staging import StagingDirectory
from modelfsd.writing.working_copy import WorkingCopy

if TYPE_CHECKING:
    from modelfsd.writing.writer import Writer

log = logging.getLogger(__name__)


class WriteSession:
    """One file being written by this node."""

    def __init__(self, writer: Writer, inode: KernelInode, directory: Path) -> None:
        self.inode = inode
        self.handles = 0
        self._releasing = 0  # handles that are being given up
        self.failure: ModelfsError | OSError | None = None
        self._writer = writer
        parts = writer.contents, writer.replicator, writer.limiter, writer.memory
        self.copy = WorkingCopy(inode.ino, inode.record, directory, *parts, str(self))
        self._token: Revision | None = None
        self._starters = 0  # handles that were opened with O_TRUNC
        self._starts_over = False  # one of them is there, and nothing was written since
        self._is_unlinked = False  # its last name is gone: there is nothing to commit to
        self._is_short = False  # bytes were refused: none that come later are taken
        self._leasing = trio.Lock()
        self._gate = SharedLock()  # WRITEs share it, a commit has it alone
        self._size_gate = SharedLock()  # READs share it, a truncation has both alone

    # ------------------------------------------------------------ the lease

    def adopt_lease(self) -> None:
        """The file was created together with its lease."""
        if self._writer.leases.is_ours(self.inode.ino):  # else the first write takes it again
            self._token = self._writer.leases.hold(self.inode.ino, self._lose)

    @property
    def has_lease(self) -> bool:
        """Whether this node may write the file, as far as it knows."""
        return self._token is not None and self.failure is None

    async def ensure_lease(self, wait_seconds: float | None = None) -> None:
        """Become the writer, of the very version that this kernel inode shows.

        Raises `WriterElsewhere`, and `StaleHandle` if the file has changed since.
        """
        async with self._leasing_for(wait_seconds):
            if self._token is not None:
                return
            self.require_sound()  # another WRITE has waited in vain, and need not be followed
            ino = self.inode.ino
            with timed("lease"):
                token = await self._writer.leases.take(ino, self._lose, wait_seconds)
            latest = self._writer.namespace.mirror.inode(ino)
            if latest is None or latest.version != self.copy.base.version:
                self._writer.leases.reserve(ino, token, RESERVED_SECONDS)
                raise StaleHandle(ino)
            self._token = token

    def _leasing_for(self, wait_seconds: float | None) -> trio.Lock:
        """The lock of who takes the lease. Raises `WriterElsewhere` to who must not wait for it."""
        if wait_seconds == 0 and self._token is None and self._leasing.locked():
            raise WriterElsewhere(self.inode.ino)
        return self._leasing

    def reserve_lease(self) -> None:
        """The only handle is about to be given up, and its OPEN will come again: keep the lease."""
        if self._token is not None and self.handles == 1 and not self.copy.is_dirty:
            token, self._token = self._token, None
            self._writer.leases.reserve(self.inode.ino, token, RESERVED_SECONDS)

    def _lose(self, reason: str) -> None:
        self._token = None  # if nothing was written, the next write may take it again
        if self.copy.is_dirty and not self._has_no_name:
            self._poison(WriteLost(self.inode.ino, reason))

    @property
    def _has_no_name(self) -> bool:
        """Whether the file is unlinked, as far as is known here: nobody else will see its bytes."""
        return self._is_unlinked or self._writer.namespace.mirror.inode_row(self.inode.ino) is None

    # ------------------------------------------------------------ writing

    async def write(self, offset: int, data: Buffer) -> None:
        """Take bytes. Raises `OutOfSpace`, `FileTooLarge` and OSError if they cannot be kept."""
        async with self._gate.shared():
            if self._is_short:
                self._raise_failure()
            await self._lease_for_write()
            try:
                completed = await self.copy.write(offset, data)
            except (ModelfsError, OSError) as error:
                self._is_short = True
                self._poison(error)
                raise
        for index in completed:
            if self.failure is None:
                await self._seal_soon(index)

    async def _lease_for_write(self) -> None:
        """The lease, or the session is poisoned."""
        if self.failure is None:
            try:
                await self._first_lease()
            except WriterElsewhere:
                self._poison(WriteLost(self.inode.ino, "another node went on writing it"))
            except ModelfsError as error:
                self._poison(error)

    async def _first_lease(self) -> None:
        """The lease, unless the file is unlinked. Raises `WriterElsewhere` and `WriteLost`."""
        if self._token is not None or self._has_no_name:
            return
        with suppress(NoSuchEntry):  # unlinked: nobody else will ever see these bytes
            try:
                await self.ensure_lease()
            except StaleHandle:
                if not self._starts_over or self.copy.is_dirty:
                    raise WriteLost(self.inode.ino, "another node wrote it first") from None
                await self.start_over_now()

    def start_over(self) -> None:
        """The file was opened with O_TRUNC: whatever stands there when its turn comes, goes.

        So of several nodes that open one name with O_TRUNC at the same time, each commits its own
        contents, one after the other, and the last stands; as if each had opened it in its turn.
        Whoever closes such a handle says so: what is written through others is refused again.
        """
        self._starters += 1
        self._starts_over = not self.copy.is_dirty and not self.copy.size

    async def start_over_now(self, wait_seconds: float | None = None) -> None:
        """Take the lease of the latest version, and empty it."""
        async with self._leasing_for(wait_seconds):
            if self._token is not None:
                return  # another WRITE has come so far meanwhile
            self.require_sound()
            ino = self.inode.ino
            token = await self._writer.leases.take(ino, self._lose, wait_seconds)
            latest = self._writer.namespace.mirror.inode(ino)
            if latest is None:
                await self._writer.leases.drop(ino, token)
                raise NoSuchEntry(ino)
            self.copy.start_over(latest)
            self._token = token

    async def truncate(self, size: int) -> None:
        """Set the size of the working copy."""
        async with self._gate.alone(), self._size_gate.alone():
            self._raise_failure()
            if size > FILE_BYTES_MAX:
                raise FileTooLarge(self.inode.ino)  # nothing was changed, so nothing is lost
            if size == self.copy.size:
                return
            await self._first_lease()  # if it cannot be had, nothing is lost
            try:
                await self.copy.truncate(size)
            except (ModelfsError, OSError) as error:
                self._poison(error)
                raise

    async def set_mtime(self, mtime_ns: int) -> bool:
        """The time that the next commit will give the file; False if nothing is to be committed.

        Waits for a commit that is under way: that has its time already.
        """
        async with self._gate.shared():
            if self.copy.is_dirty:
                self.copy.mtime_ns = mtime_ns
            return self.copy.is_dirty

    async def _seal_soon(self, index: int) -> None:
        """Name and send a complete chunk while the application goes on writing.

        Waits for room in the upload budget, which is what slows down a writer that is faster
        than the network and the disks.
        """
        size = self.copy.staged_bytes_of(index)
        with timed("upload_queue"):
            await self._writer.uploads.take(size)
        self._writer.start_soon(self._seal_in_background, index, size)

    async def _seal_in_background(self, index: int, size: int) -> None:
        try:
            if self.failure is None:
                await self.copy.seal(index)
        except (ModelfsError, OSError) as error:
            self._poison(error)
        finally:
            self._writer.uploads.give(size)

    async def read(self, offset: int, size: int) -> bytes | memoryview:
        """Bytes as written so far. Does not wait for a commit, which may wait for other nodes."""
        async with self._size_gate.shared():
            return await self.copy.read(offset, size)

    # ------------------------------------------------------------ committing

    async def flush(self) -> None:
        """Commit what was written, if anything was. Raises what keeps it from being committed."""
        if (not self.copy.is_dirty or self._is_unlinked) and self.failure is None:
            return
        async with self._gate.alone():
            self._raise_failure()
            if not self.copy.is_dirty:
                return
            try:
                with timed("commit"):
                    await self._commit()
            except NoSuchEntry:
                self._is_unlinked = True  # readable here, from the copy, till the last close
            except (ModelfsError, OSError) as error:
                self._poison(error)
                if isinstance(error, (MetadataUnavailable, MetadataUncertain)):
                    raise WriteLost(self.inode.ino, str(error)) from error
                raise

    async def _commit(self) -> None:
        copy, namespace = self.copy, self._writer.namespace
        if self._has_no_name:
            raise NoSuchEntry(copy.ino)
        if self._token is None:  # it went while the first write was on its way
            raise WriteLost(copy.ino, "its lease has lapsed")
        token = self._token
        contents = await self._writer.versions.store(copy)
        await self._writer.replicator.sync(copy.placements, copy.base.replicas)
        self._raise_failure()
        committed = await namespace.change(
            lambda mirror: changes.commit_contents(
                mirror, copy.ino, token, copy.base.version, contents, time.time_ns(), namespace.keep
            )
        )
        if not self.inode.is_current:  # nobody else tells it: reads go on from what it wrote
            self.inode.record = committed
        self.failure, self._starts_over = None, False  # a lease that has lapsed since lost nothing
        await self._remove(copy.rebase(committed))

    async def spill(self) -> None:
        """Let nothing of it be in memory alone."""
        async with self._gate.alone():
            if self.inode.session is not self:
                return  # it has ended meanwhile
            try:
                await self.copy.spill()
            except (ModelfsError, OSError) as error:
                self._poison(error)

    async def _remove(self, done: StagingDirectory | None) -> None:
        """Remove what has been committed. If that fails the commit stands all the same."""
        if done is None:
            return
        try:
            await trio.to_thread.run_sync(done.discard)
        except OSError as error:
            log.warning("the staging files of %s were committed and remain: %s", self, error)

    # ------------------------------------------------------------ ending

    async def release(self, started_over: bool = False) -> None:
        """One writable handle less; with the last, commit what came after the last flush."""
        self._starters -= started_over
        self._starts_over = self._starts_over and self._starters > 0
        self.handles -= 1
        if self.handles:
            return
        self._releasing += 1
        try:
            await self._settle()
        finally:
            self._releasing -= 1
        await self.end_unless_used()

    async def _settle(self) -> None:
        """Commit what is left, and give the lease back."""
        try:
            if self.failure is None:
                await self.flush()  # pages of a shared mapping come after close()
        except (ModelfsError, OSError) as error:
            log.error("%s was closed with writes that could not be committed: %s", self, error)
        async with self._leasing:
            if not self.handles:  # else it was opened again meanwhile
                self._give_lease_back()

    def _give_lease_back(self) -> None:
        token, self._token = self._token, None
        if token is not None:
            self._writer.leases.linger(self.inode.ino, token)

    async def end_unless_used(self) -> None:
        """A handle is closed: end the session, unless another one needs it.

        Handles for reading need it as long as it has contents that will never be committed: they
        have seen them.
        """
        if self._is_used():
            return
        await self._let_go_of_files()
        if not self._is_used():  # opened again meanwhile
            self._writer.end(self)

    def _is_used(self) -> bool:
        has_readers = self.copy.is_dirty and self.inode.handles > 0
        return self.handles > 0 or self._releasing > 0 or has_readers

    async def _let_go_of_files(self) -> None:
        """Remove the staging files, or keep them for recovery. Waits for `_describe_loss`."""
        if self.failure is None and not self.copy.has_files and not self.copy.is_dirty:
            return
        async with self._gate.alone():
            try:
                if self.failure is None:
                    await trio.to_thread.run_sync(self.copy.discard)
                else:
                    await self.copy.spill()
                    why = str(self.failure)
                    await trio.to_thread.run_sync(self.copy.keep, self._writer.lost_dir, why)
            except (ModelfsError, OSError) as error:
                # A start of the daemon moves what is left to lost/.
                log.error("the files of %s stay where they are, or as they are: %s", self, error)

    def _raise_failure(self) -> None:
        if (lost := self.failure) is not None:
            reason = lost.reason if isinstance(lost, WriteLost) else str(lost)
            raise WriteLost(self.inode.ino, reason) from lost

    def _poison(self, failure: ModelfsError | OSError) -> None:
        """Nothing of it may be committed any more; keep its bytes."""
        if self.failure is not None:
            return
        self.failure = failure
        log.error("writes to %s cannot be committed, they are kept: %s", self, failure)
        self._give_lease_back()
        self._writer.retire(self.inode)
        self._writer.start_soon(self._describe_loss)

    def require_sound(self) -> None:
        """Refuse a handle to contents that cannot be committed. Raises `StaleHandle`.

        The kernel looks again, and finds the file as it is.
        """
        if self.failure is not None:
            raise StaleHandle(self.inode.ino)

    async def _describe_loss(self) -> None:
        async with self._gate.alone():
            if self.failure is None:
                return  # the commit that was under way had been accepted before
            try:
                await self.copy.spill()
                await trio.to_thread.run_sync(self.copy.describe_on_disk, str(self.failure))
            except (ModelfsError, OSError) as error:
                # The full disk, perhaps, that is the very reason.
                log.error("why %s is kept could not be written beside it: %s", self, error)

    def __str__(self) -> str:
        path = self._writer.namespace.mirror.path_of(self.inode.ino)
        return f"/{path.decode(errors='surrogateescape')}"
