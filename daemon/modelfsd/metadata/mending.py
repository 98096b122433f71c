"""Carries out what `modelfs.consistency` says of faults: one guarded transaction for each."""

from __future__ import annotations

import stat
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from modelfs import changes
from modelfs.consistency import LOST_FOUND, Fault, FaultKind, are_names_known, mend
from modelfs.errors import EntryExists
from modelfs.ids import ROOT_INODE, InodeNumber
from modelfs.inode import Inode
from modelfsd.metadata.namespace import Namespace

ATTEMPTS_MAX = 3  # each failure means that somebody else changed what the fault is about


class Mender:
    """Mends faults. The kernel is told of it as of another node's changes."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace

    async def mend(self, fault: Fault, look: Callable[[], Fault | None]) -> bool:
        """Whether the fault is gone; `look` looks for it. Raises as `Namespace.attempt`."""
        for _ in range(ATTEMPTS_MAX):
            needs_name = fault.kind is FaultKind.NO_NAME and are_names_known(self._namespace.mirror)
            lost_found = await self._lost_found() if needs_name else None
            txn = mend(self._namespace.mirror, fault, lost_found, time.time_ns())
            if txn is None or await self._namespace.attempt(txn, by_kernel=False):
                break
        return look() is None

    async def _lost_found(self) -> InodeNumber | None:
        """The directory for what has no name, made if need be; None if that cannot be."""
        mirror = self._namespace.mirror
        if mirror.child(ROOT_INODE, LOST_FOUND) is None:
            root, now_ns = self._namespace.require(ROOT_INODE), time.time_ns()
            record = Inode(
                mode=stat.S_IFDIR | 0o700,
                uid=root.uid,
                gid=root.gid,
                atime_ns=now_ns,
                mtime_ns=now_ns,
                ctime_ns=now_ns,
            )
            ino = await self._namespace.new_inode_number()
            make = partial(
                changes.create, parent=ROOT_INODE, name=LOST_FOUND, ino=ino, record=record
            )
            with suppress(EntryExists):
                await self._namespace.change(make, by_kernel=False)
        child = mirror.child(ROOT_INODE, LOST_FOUND)
        return child.ino if child is not None and stat.S_ISDIR(child.kind) else None
