"""Puts pages into the kernel before a reader asks for them.

`notify_store` copies without the GIL, on threads of its own, so bulk bytes reach the kernel beside
everything else that this process does. Its rules, each of which has cost a hang or lost bytes:

- A READ never waits for a push. (A push may wait for a READ: it locks the pages that it fills.)
- Only what lies beyond the furthest byte that was asked for is pushed, so no page of a READ that
  is being answered.
- Never into an inode that may be written: a push would overwrite the application's dirty pages.
  Whoever opens one for writing makes its session first, and then waits in `drain`.
- Never past the end of the file, which would grow.
- No lock is held while the kernel works, and the threads end before the file system is unmounted.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import pyfuse3
import trio

from modelfs.ids import KernelId
from modelfs.inode import Inode
from modelfs.limits import MIB, PAGE_BYTES
from modelfs.strides import Run
from modelfsd.kernel.kernel_inodes import KernelInode, KernelInodes
from modelfsd.stages import timed

log = logging.getLogger(__name__)

THREADS = 2  # one core copies at 2.5 GB/s, which is more than a network brings
WAITING_BYTES_MAX = 64 * MIB  # beyond this the reader is served by its own requests

Finished = Callable[[int], None]
# The kernel has forgotten the inode, or is unmounting.
HARMLESS_ERRNOS = frozenset({errno.ENOENT, errno.ENOTCONN, errno.ENODEV, errno.EINVAL})


@dataclass(frozen=True, slots=True)
class Push:
    """Bytes of one view of a file, for its pages from `offset` on, a multiple of the page size.

    `finished` is called on trio's thread with how many of them the kernel has, or is asked for.
    """

    inode: KernelInode
    record: Inode  # the view that the bytes are of
    run: Run  # that they are for
    offset: int
    data: memoryview
    finished: Finished

    @property
    def is_allowed(self) -> bool:
        """Whether the inode still shows these bytes, and nobody may write it."""
        return self.inode.session is None and self.inode.record is self.record


class Pusher:
    """The threads that push, and what waits for them."""

    def __init__(self, inodes: KernelInodes) -> None:
        self._inodes = inodes
        self.counters: Counter[str] = Counter()
        self._waiting: deque[Push] = deque()
        self._waiting_bytes = 0
        self._active: Counter[KernelId] = Counter()
        self._drained: dict[KernelId, list[trio.Event]] = {}
        self._changed = threading.Condition()
        self._is_stopping = False
        self._token: trio.lowlevel.TrioToken | None = None
        self._threads = [
            threading.Thread(target=self._run, name=f"push-{index}", daemon=True)
            for index in range(THREADS)
        ]

    def start(self) -> None:
        """Start the threads. The file system must be mounted."""
        self._token = trio.lowlevel.current_trio_token()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads, before the session is closed. What waits is dropped."""
        with self._changed:
            self._is_stopping = True
            self._waiting.clear()
            self._changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=5)

    def offer(self, push: Push) -> bool:
        """Have it pushed soon. False if it may not be, or if too much waits already."""
        assert push.offset % PAGE_BYTES == 0
        assert push.offset + len(push.data) <= push.record.size
        with self._changed:
            is_full = self._waiting_bytes + len(push.data) > WAITING_BYTES_MAX
            if is_full or self._is_stopping or not push.is_allowed:
                self.counters["refused"] += 1
                return False
            self._waiting.append(push)
            self._waiting_bytes += len(push.data)
            push.inode.pushes += 1
            self._changed.notify()
        return True

    async def drain(self, inode: KernelInode) -> None:
        """Return once nothing is being pushed into an inode that has a session by now."""
        assert inode.session is not None
        with self._changed:
            if not self._active[inode.id]:
                return
            done = trio.Event()
            self._drained.setdefault(inode.id, []).append(done)
        await done.wait()

    # ------------------------------------------------------------ on the threads

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._is_stopping:
                    self._changed.wait()
                if self._is_stopping:
                    return
                push = self._waiting.popleft()
                self._waiting_bytes -= len(push.data)
                is_allowed = push.is_allowed
                if is_allowed:
                    self._active[push.inode.id] += 1
            taken = self._store(push) if is_allowed else 0
            with self._changed:
                self._finish(push, is_allowed, taken)
            del push  # the buffer is free from here on, not when the next push comes

    def _store(self, push: Push) -> int:
        """Push what the reader has not asked for meanwhile; returns how much of it is done with."""
        skipped = min(
            max(0, -(-push.run.end // PAGE_BYTES) * PAGE_BYTES - push.offset), len(push.data)
        )
        data = push.data[skipped:]
        if not len(data):
            return 0
        try:
            with timed("push"):
                pyfuse3.notify_store(
                    pyfuse3.InodeT(push.inode.id),
                    push.offset + skipped,
                    data,  # type: ignore[arg-type]  # any buffer will do
                )
        except OSError as error:
            if error.errno not in HARMLESS_ERRNOS:
                log.warning("the kernel refused pages of inode %d: %s", push.inode.id, error)
            return 0
        return len(data)

    def _finish(self, push: Push, was_allowed: bool, taken: int) -> None:
        assert self._token is not None
        self.counters["pushes"] += bool(taken)
        self.counters["bytes"] += taken
        events: list[trio.Event] = []
        if was_allowed:
            self._active[push.inode.id] -= 1
            if not self._active[push.inode.id]:
                del self._active[push.inode.id]
                events = self._drained.pop(push.inode.id, [])

        def tell(inode: KernelInode = push.inode, finished: Finished = push.finished) -> None:
            inode.pushes -= 1
            self._inodes.drop_if_unused(inode)
            finished(taken)
            for event in events:
                event.set()

        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(tell)
