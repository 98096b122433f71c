"""Brings times of access to etcd: lazily, in batches, and only with `-o relatime`.

No read waits for this. What was read is noted; a second later one transaction moves the times of
up to `BATCH` inodes, then the next second's. What does not fit into `NOTED_MAX`, or meets a fault,
is dropped: the next read of that file notes it again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import trio

from modelfs import access_times
from modelfs.errors import ModelfsError
from modelfs.ids import InodeNumber
from modelfsd.kernel.kernel_inodes import KernelInode
from modelfsd.metadata.namespace import Namespace

log = logging.getLogger(__name__)

LAZY_SECONDS = 1.0  # at most one transaction in so long
BATCH = 50  # compares and puts of one transaction stay below etcd's 128
NOTED_MAX = 1000  # twenty seconds' worth


class AccessTimes:
    """The accesses of this node that are not in etcd yet."""

    def __init__(
        self, namespace: Namespace, is_kept: bool, run_in_background: Callable[..., None]
    ) -> None:
        self._namespace, self._is_kept, self._start = namespace, is_kept, run_in_background
        self._noted: dict[InodeNumber, int] = {}
        self._is_running = False

    def note(self, inode: KernelInode) -> None:
        """A file, directory or link was read."""
        if not self._is_kept or inode.ino in self._noted or len(self._noted) >= NOTED_MAX:
            return
        now_ns = time.time_ns()
        if not access_times.is_due(self._namespace.mirror, inode.ino, inode.record, now_ns):
            return
        self._noted[inode.ino] = now_ns
        if not self._is_running:
            self._is_running = True
            self._start(self._run)

    async def _run(self) -> None:
        try:
            while self._noted:
                await trio.sleep(LAZY_SECONDS)
                await self._move([self._noted.popitem() for _ in range(min(BATCH, len(self)))])
        finally:
            self._is_running = False

    def __len__(self) -> int:
        return len(self._noted)

    async def _move(self, batch: list[tuple[InodeNumber, int]]) -> None:
        accesses = dict(batch)
        try:
            # Not as the kernel's own change: it may have asked for the old time meanwhile.
            await self._namespace.change(
                lambda mirror: access_times.touch(mirror, accesses), by_kernel=False
            )
        except ModelfsError as error:
            self._noted.clear()
            log.debug("times of access were dropped: %s", error)
