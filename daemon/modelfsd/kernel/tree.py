"""Names and attributes: what the kernel asks about the tree, answered from the mirror.

Looking up a name that is there costs no round trip; that it is *not* there is only said after
`Namespace.fresh`. Changes go through `modelfs.changes`. Lookup counts: every method that returns a
kernel inode for a reply has counted one lookup.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from modelfs import changes, xattrs
from modelfs.attributes import AttributeChange, only_repeats
from modelfs.changes import Claim
from modelfs.errors import MetadataUncertain, NoSuchEntry, NotDirectory
from modelfs.ids import ROOT_INODE, InodeNumber
from modelfs.inode import Inode, check_name
from modelfs.mirror import Name
from modelfs.policy import rules_of
from modelfsd.kernel.kernel_cache import KernelCache
from modelfsd.kernel.kernel_inodes import KernelInode
from modelfsd.metadata.namespace import Namespace


@dataclass(frozen=True, slots=True)
class Caller:
    """On whose behalf a request is made."""

    uid: int
    gid: int
    pid: int


@dataclass(frozen=True, slots=True)
class NewInode:
    """What a create, mkdir, mknod or symlink asks for."""

    mode: int  # with the file type
    rdev: int = 0
    target: bytes = b""


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """One row of a listing."""

    name: bytes
    ino: InodeNumber


class Tree:
    """The tree as this node's kernel sees it."""

    def __init__(self, namespace: Namespace, cache: KernelCache) -> None:
        self._namespace, self._cache = namespace, cache
        self._mirror = namespace.mirror

    # ------------------------------------------------------------ looking

    async def lookup(self, parent: KernelInode, name: bytes) -> KernelInode:
        """The inode behind a name. Raises `NoSuchEntry`, surely.

        Of a file that another node was seen to write the first look is a fresh one: it may be
        closed by now, and whoever was told so expects its size.
        """
        check_name(name)
        child = self._mirror.child(parent.ino, name)
        if child is None or self._is_written_elsewhere(child.ino):
            await self._namespace.fresh()
            child = self._mirror.child(parent.ino, name)
        if child is None:
            raise NoSuchEntry(name)
        return self._counted(parent, child.ino, self._namespace.require(child.ino))

    def _is_written_elsewhere(self, ino: InodeNumber) -> bool:
        lease = self._mirror.lease(ino)
        return lease is not None and lease[0] != self._namespace.node_id

    def _counted(self, parent: KernelInode, ino: InodeNumber, record: Inode) -> KernelInode:
        inode = self._cache.inodes.show_in(parent, ino, record)
        inode.lookups += 1
        return inode

    def _counted_since(self, parent: KernelInode, ino: InodeNumber, made: Inode) -> KernelInode:
        """As `_counted`, after a change that made a name for an inode.

        Another node may have changed the inode since: then the latest record is shown. If it is
        gone by now, what was made is shown to who has made it, and to nobody else; the kernel holds
        the directory, and hears after the reply that the name is gone.
        """
        latest = self._mirror.inode(ino)
        inode = self._counted(parent, ino, latest or made)
        if latest is None:
            self._cache.inodes.retire(inode)
        return inode

    async def open_directory(self, directory: KernelInode) -> None:
        """Make sure that what is listed from now on is the latest."""
        await self._namespace.fresh()
        if not directory.record.is_directory:
            raise NotDirectory(directory.ino)

    def list_directory(self, directory: KernelInode) -> list[DirectoryEntry]:
        """A snapshot of a directory: ".", "..", then its names in the order they were made."""
        above = self._mirror.parent_of(directory.ino) or ROOT_INODE
        entries = [DirectoryEntry(b".", directory.ino), DirectoryEntry(b"..", above)]
        names = self._mirror.children.get(directory.ino, {})
        entries.extend(DirectoryEntry(name, child.ino) for name, child in names.items())
        return entries

    def entries_from(
        self, directory: KernelInode, entries: list[DirectoryEntry], start: int
    ) -> Iterator[tuple[int, DirectoryEntry, KernelInode | None]]:
        """(position, entry, inode) from `start` on, without counting lookups.

        The inode is None where its record cannot be read: the name is there all the same.

        The kernel takes each entry as a lookup of its name. So a name is shown with what it means
        now, not when the directory was opened, and one that is gone by now is left out.
        """
        for position in range(start, len(entries)):
            entry = entries[position]
            if entry.name not in (b".", b".."):
                child = self._mirror.child(directory.ino, entry.name)
                if child is None:
                    continue
                entry = DirectoryEntry(entry.name, child.ino)
            if self._mirror.is_unreadable(entry.ino):
                yield position, entry, None
                continue
            record = self._mirror.inode(entry.ino)
            if record is not None:
                shown = self._cache.inodes.show_in(directory, entry.ino, record)
                yield position, entry, shown

    # ------------------------------------------------------------ changing

    @contextmanager
    def _as_if_unmade(self, *names: Name, of: KernelInode | None = None) -> Iterator[None]:
        """Around a change of these names, or of an inode.

        If it fails though it may have happened, the kernel takes it for not made, and would
        believe that for a day.
        """
        before = {name: self._mirror.child(*name) for name in names}
        try:
            yield
        except MetadataUncertain:
            believed = {name: child.ino for name, child in before.items() if child is not None}
            touched = [parent for parent, _ in names] + ([of.ino] if of is not None else [])
            self._cache.unsure(believed, touched)
            raise

    async def create(
        self, parent: KernelInode, name: bytes, new: NewInode, caller: Caller, claim: Claim | None
    ) -> KernelInode:
        """Make an inode under a new name. Raises `EntryExists`."""
        check_name(name)
        ino = await self._namespace.new_inode_number()
        record = self._new_record(parent, new, caller)
        with self._as_if_unmade((parent.ino, name)):
            await self._namespace.change(
                lambda mirror: changes.create(mirror, parent.ino, name, ino, record, claim)
            )
        return self._counted_since(parent, ino, record)

    def _new_record(self, parent: KernelInode, new: NewInode, caller: Caller) -> Inode:
        now_ns = time.time_ns()
        mode, gid = new.mode, caller.gid
        if parent.record.mode & stat.S_ISGID:  # a set-group-id directory hands its group down
            gid = parent.record.gid
            if stat.S_ISDIR(mode):
                mode |= stat.S_ISGID
        is_file = stat.S_ISREG(mode)
        rules = rules_of(self._mirror, parent.ino, self._namespace.defaults)
        return Inode(
            mode=mode,
            uid=caller.uid,
            gid=gid,
            atime_ns=now_ns,
            mtime_ns=now_ns,
            ctime_ns=now_ns,
            size=len(new.target),
            inline=b"" if is_file else None,
            chunk_bytes=rules.chunk_bytes if is_file else 0,
            replicas=rules.replicas if is_file else 0,
            editor=self._namespace.node_id,
            rdev=new.rdev,
            target=new.target,
        )

    async def link(self, inode: KernelInode, parent: KernelInode, name: bytes) -> KernelInode:
        """A further name. Raises `EntryExists`."""
        with self._as_if_unmade((parent.ino, name), of=inode):
            record = await self._namespace.change(
                lambda mirror: changes.link(mirror, inode.ino, parent.ino, name, time.time_ns())
            )
        return self._counted_since(parent, inode.ino, record)

    async def remove(self, parent: KernelInode, name: bytes, directory: bool) -> None:
        """unlink, or rmdir."""
        with self._as_if_unmade((parent.ino, name)):
            await self._namespace.change(
                lambda mirror: changes.remove(
                    mirror, parent.ino, name, directory, time.time_ns(), self._namespace.keep
                )
            )

    async def rename(
        self,
        source: tuple[KernelInode, bytes],
        target: tuple[KernelInode, bytes],
        keep_existing: bool,
    ) -> None:
        """Move a name."""
        old, new = (source[0].ino, source[1]), (target[0].ino, target[1])
        with self._as_if_unmade(old, new):
            renamed = await self._namespace.change(
                lambda mirror: changes.rename(
                    mirror, old, new, keep_existing, time.time_ns(), self._namespace.keep
                )
            )
        self._cache.renamed(old, new, renamed.ino)

    async def set_attributes(self, inode: KernelInode, change: AttributeChange) -> None:
        """chmod, chown, utimens; no transaction if nothing would change.

        The kernel repeats an mtime after writes, renames and links: those cost nothing here.
        """
        record = self._namespace.require(inode.ino)
        if only_repeats(record, change):
            return
        with self._as_if_unmade(of=inode):
            await self._namespace.change(
                lambda mirror: changes.set_attributes(
                    mirror, inode.ino, change, self._namespace.node_id, time.time_ns()
                )
            )

    async def set_xattr(self, inode: KernelInode, name: bytes, value: bytes | None) -> None:
        """Set an extended attribute, or remove it (None)."""
        if self._mirror.inode(inode.ino) is None:
            # Unlinked, and held by a descriptor or a working directory: nobody else can see it.
            inode.record = xattrs.changed_xattrs(inode.record, name, value, time.time_ns())
            return
        await self._namespace.change(
            lambda mirror: xattrs.set_xattr(mirror, inode.ino, name, value, time.time_ns())
        )
