"""What the kernel knows: its inodes, each of which is one view of one of ours.

The rule (modelfs/DESIGN.md, "One kernel inode for each view"): a file that another node commits
gets a new kernel inode here, so that the pages, size and mtime that the kernel caches are right
for ever, and an open handle keeps the version that it opened. On the node that writes, the kernel
inode stays, since the kernel made the change itself. Symlinks and special files have one kernel
inode for life.

A directory gets a new one when another node moves it to another parent, and so do the directories
below it. Linux allows a directory's kernel inode one place only: as long as anybody here still
uses the old one, a lookup at the new one fails with ESTALE or ELOOP whenever the locks to move it
cannot be had at once (`d_splice_alias`), and within rename(2) they never can. Who is inside stays
in the old kernel inode, which serves the same directory.

A kernel id is the inode number with the low 24 bits of the view at its first sight (so st_ino
outlives a remount), or the next free one if the kernel still holds that id for something else.

The lookup count is ours to keep: a kernel inode is forgotten when the kernel has forgotten every
reference that we gave it, and not before, whatever was unlinked meanwhile.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from modelfs.access import AccessPattern
from modelfs.errors import StaleHandle
from modelfs.ids import ROOT_INODE, InodeNumber, KernelId
from modelfs.inode import Inode

if TYPE_CHECKING:
    from modelfsd.writing.write_session import WriteSession

log = logging.getLogger(__name__)

VIEW_BITS = 24
ROOT_KERNEL_ID = KernelId(1)  # FUSE_ROOT_ID


@dataclass(slots=True, eq=False)
class KernelInode:
    """One inode of the kernel.

    `record` is the view that it shows: contents, size and mtime are read from here, never from
    the mirror. `lookups` is the kernel's reference count, `handles` the number of open handles.
    """

    id: KernelId
    ino: InodeNumber
    record: Inode
    lookups: int = 0
    handles: int = 0
    pushes: int = 0  # under way into its pages: its id must not come to mean another inode
    changed_at: float = -math.inf  # monotonic: when its kernel was last answered a change of it
    is_current: bool = True  # whether a lookup of its name gives this kernel inode
    inside: KernelInode | None = field(default=None, repr=False)  # for `KernelInodes.show_in`
    session: WriteSession | None = field(default=None, repr=False)
    access: AccessPattern | None = field(default=None, repr=False)


class KernelInodes:
    """All inodes that the kernel holds references to."""

    def __init__(self, root: Inode) -> None:
        self._by_id: dict[KernelId, KernelInode] = {}
        self._current: dict[InodeNumber, KernelInode] = {}
        self._older: dict[InodeNumber, set[KernelInode]] = {}  # not current, still referred to
        self.show(ROOT_INODE, root)

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[KernelInode]:
        return iter(list(self._by_id.values()))

    def __getitem__(self, kernel_id: int) -> KernelInode:
        try:
            return self._by_id[KernelId(kernel_id)]
        except KeyError:
            raise StaleHandle(kernel_id) from None

    def current(self, ino: InodeNumber) -> KernelInode | None:
        """The kernel inode that shows the latest view of an inode, if the kernel knows one."""
        return self._current.get(ino)

    @property
    def outdated(self) -> list[KernelInode]:
        """Those that are no longer current, and are still referred to."""
        return [inode for older in self._older.values() for inode in older]

    @property
    def has_outdated(self) -> bool:
        """Whether there are any."""
        return bool(self._older)

    def has_older(self, ino: InodeNumber) -> bool:
        """Whether any kernel inode of this inode is no longer current."""
        return ino in self._older

    def all_of(self, ino: InodeNumber) -> list[KernelInode]:
        """All kernel inodes of an inode: the current one last."""
        current = self._current.get(ino)
        return [*self._older.get(ino, ()), *([current] if current else ())]

    def show(self, ino: InodeNumber, record: Inode) -> KernelInode:
        """The kernel inode for the latest view of an inode, made if need be. Counts no lookup."""
        inode = self._current.get(ino)
        if inode is None:
            inode = self._current[ino] = self._new(ino, record)
        return inode

    def show_in(self, directory: KernelInode, ino: InodeNumber, record: Inode) -> KernelInode:
        """As `show`, for a lookup in this directory.

        Inside a directory's older kernel inode, the directories below it have kernel inodes of
        their own: the current ones have their place below the current one.
        """
        if directory.is_current or not record.is_directory:
            return self.show(ino, record)
        for inode in self._older.get(ino, ()):
            if inode.inside is directory:
                return inode
        inode = self._new(ino, record)
        inode.is_current, inode.inside = False, directory
        self._older.setdefault(ino, set()).add(inode)
        return inode

    def _new(self, ino: InodeNumber, record: Inode) -> KernelInode:
        inode = KernelInode(self._free_id(ino, record), ino, record)
        self._by_id[inode.id] = inode
        return inode

    def retire(self, inode: KernelInode) -> None:
        """A newer view exists, or the inode is gone: a lookup no longer gives this one."""
        inode.is_current = False
        if self._current.get(inode.ino) is inode:
            del self._current[inode.ino]
        self._older.setdefault(inode.ino, set()).add(inode)
        self.drop_if_unused(inode)

    def forget(self, forgotten: Iterable[tuple[int, int]]) -> None:
        """Take back lookups: pairs of kernel id and count."""
        for kernel_id, count in forgotten:
            inode = self._by_id.get(KernelId(kernel_id))
            if inode is None or inode.id == ROOT_KERNEL_ID:
                continue
            inode.lookups -= count
            if inode.lookups < 0:  # a bug, of ours or of the kernel's, that need not end the mount
                log.error("the kernel forgot inode %d more often than it saw it", kernel_id)
                inode.lookups = 0
            self.drop_if_unused(inode)

    def drop_if_unused(self, inode: KernelInode) -> None:
        """Forget an inode that neither the kernel nor we refer to."""
        if inode.lookups or inode.handles or inode.pushes or inode.session:
            return
        if inode.id == ROOT_KERNEL_ID:
            return
        self._by_id.pop(inode.id, None)
        older = self._older.get(inode.ino, set())
        older.discard(inode)
        if not older:
            self._older.pop(inode.ino, None)
        if self._current.get(inode.ino) is inode:
            del self._current[inode.ino]

    def _free_id(self, ino: InodeNumber, record: Inode) -> KernelId:
        if ino == ROOT_INODE:
            return ROOT_KERNEL_ID
        view = record.view if record.is_file else 0
        while True:
            kernel_id = KernelId(ino << VIEW_BITS | view % (1 << VIEW_BITS))
            if kernel_id not in self._by_id:
                return kernel_id
            view += 1
