"""Keeps the kernel's caches true to the mirror.

The feed announces what changed; this decides what the kernel must forget. Changes that this node's
own kernel asked for need nothing: it made them itself. The division of labour with OPEN: a file
that has a newer view is caught because its kernel inode is no longer current; a name that means
something else by now is caught by the guard.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from msgspec.structs import replace

from modelfs.attributes import AttributeChange, changed_attributes
from modelfs.ids import ROOT_INODE, InodeNumber
from modelfs.inode import Inode
from modelfs.mirror import Change, DirectoryTouched, InodeChanged, Mirror, Name, NameChanged
from modelfsd.kernel.kernel_inodes import KernelInode, KernelInodes
from modelfsd.kernel.notifier import NameGuard, Notifier
from modelfsd.metadata.namespace import Namespace

ANSWER_SECONDS = 1.0  # an answer may wait so long for its caller to get a processor
SYMLINKS = InodeNumber(-1)  # in the guard: all symlinks that this node's kernel knows


class KernelCache:
    """The listener between the feed and the kernel."""

    def __init__(self, inodes: KernelInodes, namespace: Namespace, notifier: Notifier) -> None:
        self.inodes = inodes
        self.guard = NameGuard()
        self._mirror: Mirror = namespace.mirror
        self._namespace, self._notifier = namespace, notifier

    def on_changes(self, changes: list[Change]) -> None:
        """Take what the feed announces."""
        for change in changes:
            match change:
                case NameChanged():
                    self._on_name(change)
                case InodeChanged():
                    self._on_inode(change)
                case DirectoryTouched():
                    self._on_directory(change)
                case _:
                    pass

    def _on_name(self, change: NameChanged) -> None:
        is_own = self._namespace.is_own(change.origin)
        has_older = self.inodes.has_older(change.parent)
        if change.new is not None and is_own and has_older:
            self._retire_directories(change.new)  # who knows in which of them it has been put
        if is_own:
            self._undeceive(change)
        # A new name needs nothing: the kernel never caches that a name is missing.
        if change.old is None:
            return
        # Where a directory has several kernel inodes, ours changed the names of one of them.
        if not is_own or has_older:
            self._forget_name(change.parent, change.name, change.old)
        if not is_own and self._mirror.parent_of(change.old) != change.parent:
            self._retire_directories(change.old)

    def _undeceive(self, change: NameChanged) -> None:
        """This node's kernel changed a name, and it may have taken it for something else.

        It held the directory all along, so it has not acted on a change of that name by another
        node meanwhile: it moved another inode than the cluster did, or took a link from another.
        A directory that was moved in the kernel alone could not be looked up where it is, and one
        that was removed there alone stays dead.
        """
        believed = self.guard.believed((change.parent, change.name))
        if not believed:
            return
        believed.update(ino for ino in (change.old, change.new) if ino is not None)
        for ino in believed:
            self._retire_directories(ino)
            for inode in self.inodes.all_of(ino):
                self._forget_attributes(inode)

    def _retire_directories(self, top: InodeNumber) -> None:
        """A directory was moved to another parent: new kernel inodes for it and those below it.

        The kernel knows a directory only if it knows the one above, so the walk is no longer than
        what it knows.
        """
        waiting: list[tuple[InodeNumber, KernelInode | None]] = [(top, None)]
        while waiting:
            ino, above = waiting.pop()
            inode = self.inodes.current(ino)
            if inode is None or not inode.record.is_directory:
                continue
            inode.inside = above
            self.inodes.retire(inode)
            children = self._mirror.children.get(ino, {}).values()
            waiting.extend((child.ino, inode) for child in children if stat.S_ISDIR(child.kind))

    def renamed(self, source: Name, target: Name, moved: InodeNumber) -> None:
        """This node's kernel renamed what it took `source` for: see `_undeceive`.

        If both are names of one file by now, nothing was changed. But the kernel has taken a link
        from what it took `target` for.
        """
        if self.guard.believed(source):
            self._forget_name(*target, moved)
        for ino in self.guard.believed(target):
            for inode in self.inodes.all_of(ino):
                self._forget_attributes(inode)

    def unsure(self, believed: Mapping[Name, InodeNumber], touched: Iterable[InodeNumber]) -> None:
        """A change by this node's kernel failed, and may have happened: it must ask again.

        `believed` is what names meant before, `touched` are the inodes whose attributes may be
        others now. If it happens later, that is announced as if another node had made it.
        """
        for (parent, name), ino in believed.items():
            self._forget_name(parent, name, ino)
            if self._mirror.parent_of(ino) != parent:
                self._retire_directories(ino)
        for ino in {*touched, *believed.values()}:
            for inode in self.inodes.all_of(ino):
                self._forget_attributes(inode)

    def _on_inode(self, change: InodeChanged) -> None:
        self._on_older(change)
        inode = self.inodes.current(change.ino)
        if inode is None:
            return
        if change.new is None and self._mirror.is_unreadable(change.ino):
            self._hide(inode)
        elif change.new is None:
            self._on_removal(inode, change)
        elif self._namespace.is_own(change.origin) and not self._is_foreign_commit(inode, change):
            inode.record = change.new
        elif change.new.is_file and self._is_new_view(inode, change.new):
            self.retire(inode)
        else:
            inode.record = change.new
            self._forget_attributes(inode)

    def _hide(self, inode: KernelInode) -> None:
        """The record cannot be read now: who has it open keeps what he has, others must ask."""
        if inode.record.is_file:
            self.retire(inode)
            return
        for parent, name in self._mirror.names.get(inode.ino, ()):
            self._forget_name(parent, name, inode.ino)
        self._forget_attributes(inode)

    def _on_removal(self, inode: KernelInode, change: InodeChanged) -> None:
        """The last name is gone: who has it open sees that in the link count.

        And in the ctime, which the kernel keeps of files alone.
        """
        if inode.record.is_directory:
            inode.record = replace(inode.record, ctime_ns=time.time_ns())
        self.inodes.retire(inode)
        is_seen = inode.handles > 0 or inode.record.is_directory
        if is_seen and not self._namespace.is_own(change.origin):
            self._forget_attributes(inode)

    def _on_older(self, change: InodeChanged) -> None:
        """The older kernel inodes of a file keep its contents, but mode and link count are as now.

        Those of a directory show all of it as it is now. Also after a change by this node's kernel,
        which knows of it for one kernel inode only.
        """
        for inode in self.inodes.all_of(change.ino):
            if inode.is_current:
                continue
            if change.new is not None and change.new.is_directory:
                inode.record = change.new
            elif change.new is None and change.old is not None:
                inode.record = _owned_as(inode.record, change.old)
            if inode.handles or inode.record.is_directory:
                self._forget_attributes(inode)

    @staticmethod
    def _is_foreign_commit(inode: KernelInode, change: InodeChanged) -> bool:
        """Whether this node committed contents, but through another kernel inode than this one."""
        assert change.new is not None
        has_written = inode.session is not None and inode.session.has_lease
        return not has_written and change.new.version != inode.record.version

    @staticmethod
    def _is_new_view(inode: KernelInode, record: Inode) -> bool:
        if inode.session is not None and inode.session.has_lease:
            # Nobody else can have written; another node's utimens yields to our own writes.
            return record.version != inode.record.version
        return record.view != inode.record.view

    def changed_through(self, inode: KernelInode) -> None:
        """This node set attributes through a handle of an older view.

        The kernel knows it of that kernel inode only, and must learn it of the current one too.
        """
        current = self.inodes.current(inode.ino)
        if current is None or current is inode:
            return
        if current.session is None:
            self.retire(current)
        else:
            self._forget_attributes(current)

    @contextmanager
    def telling_blocks(self, inode: KernelInode) -> Iterator[None]:
        """Around a commit of a file that stays open: it may take more or less space than before.

        The kernel asks by itself when a file is closed. Until then it would go on with what a
        new file takes, none, and programs that look for holes would take it for one.
        """
        stored_bytes = inode.record.stored_bytes
        yield
        if inode.record.stored_bytes != stored_bytes:
            self._forget_attributes(inode)

    def retire(self, inode: KernelInode) -> None:
        """Make lookups of this file's names give another kernel inode."""
        for parent, name in self._mirror.names.get(inode.ino, ()):
            self._forget_name(parent, name, inode.ino)
        self.inodes.retire(inode)

    def _on_directory(self, change: DirectoryTouched) -> None:
        known = self.inodes.all_of(change.ino)
        if change.last_mtime_ns is not None:  # the mirror has it no longer
            for inode in known:
                inode.record = replace(inode.record, mtime_ns=change.last_mtime_ns)
        if len(known) > 1 or not self._namespace.is_own(change.origin):
            for inode in known:
                self._forget_attributes(inode)

    def _forget_attributes(self, inode: KernelInode) -> None:
        was_answered = time.monotonic() - inode.changed_at < ANSWER_SECONDS
        self._notifier.forget_attributes(inode.id, was_answered)

    def _forget_name(self, parent: InodeNumber, name: bytes, old: InodeNumber) -> None:
        is_symlink = any(stat.S_ISLNK(inode.record.mode) for inode in self.inodes.all_of(old))
        guarded = (old, SYMLINKS) if is_symlink else (old,)

        def lower() -> None:
            for ino in guarded:
                self.guard.lower_for(ino, (parent, name))

        # A directory that the kernel does not know has no name that it knows.
        for directory in self.inodes.all_of(parent):
            for ino in guarded:
                self.guard.raise_for(ino, (parent, name))
            self._notifier.forget_name(directory.id, name, lower)

    def must_look_again(self, inode: KernelInode, truncates: bool = False) -> bool:
        """Whether an OPEN may have come here along a name that means something else by now.

        `truncates`: it has O_TRUNC, or is a truncate(2), and waited for others of its kind.
        """
        return not inode.is_current or self.is_way_doubtful(inode, truncates)

    def is_way_doubtful(self, inode: KernelInode, truncates: bool = False) -> bool:
        """Whether a call may have come to this inode along a name that means something else by now.

        Through a symlink a call may have come to anything.
        """
        if not self.guard.is_raised(truncates):
            return False
        if self.guard.covers(SYMLINKS):
            return True
        seen: set[InodeNumber] = set()
        above = [inode.ino]
        while above:
            ino = above.pop()
            if ino in seen or ino == ROOT_INODE:
                continue
            if self.guard.covers(ino, truncates):
                return True
            seen.add(ino)
            above.extend(parent for parent, _ in self._mirror.names.get(ino, ()))
        return False


def _owned_as(view: Inode, last: Inode) -> Inode:
    """An older view of an inode that is gone, with the mode and the owner that it had at last."""
    change = AttributeChange(stat.S_IMODE(last.mode), last.uid, last.gid)
    return changed_attributes(view, change, last.ctime_ns)
