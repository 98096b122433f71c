"""Directories that are open, and what readdir shows of names that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass

from pyfuse3 import EntryAttributes, InodeT

from modelfsd.kernel.kernel_inodes import KernelInode
from modelfsd.kernel.tree import DirectoryEntry

UNREADABLE_KERNEL_ID = 2  # of no inode: numbers begin at 1, and the root's id is 1


@dataclass(slots=True)
class Listing:
    """An open directory; its entries are those at the first readdir, or the last rewinddir."""

    directory: KernelInode
    entries: list[DirectoryEntry] | None = None


def bare_name() -> EntryAttributes:
    """What readdir shows of a name whose record cannot be read: nothing else.

    The kernel takes a name without a file type for the listing only, and asks about it when
    somebody wants more; it gives the id back at once, which `KernelInodes.forget` passes over.
    """
    entry = EntryAttributes()
    entry.st_ino = InodeT(UNREADABLE_KERNEL_ID)
    entry.entry_timeout = entry.attr_timeout = 0
    return entry
