"""Tells the kernel what to forget, without ever holding up a request.

An invalidation can block in the kernel until a request on the same directory has been answered.
So they are made on threads of their own, each directory always on the same thread (in order, and
one busy directory does not hold up those of the other threads), with no lock held, after the new
state is in the mirror. Waiting invalidations of one name are merged.

`NameGuard` is the other half: it remembers which inodes had a name changed by another node, until
the kernel has surely acted on it. Before that, an OPEN may have come along the old name, and must
be sent to look again (ESTALE).
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum

import pyfuse3

from modelfs.ids import InodeNumber, KernelId
from modelfs.mirror import Name
from modelfsd.stages import timed

log = logging.getLogger(__name__)

THREADS = 4
# A request that walked the old name may wait this long in the kernel's queue before we see it.
GRACE_SECONDS = 2.0
# So may one that truncates, which first waits for the lock of the file: others who do the same hold
# it while they wait for the lease, each as long as `lock_wait`.
TRUNCATING_GRACE_SECONDS = 120.0

# ENOENT: the kernel did not know the name. ENOSYS: libfuse has not heard of the kernel yet, which
# knows nothing then. ENOTCONN, ENODEV: it is unmounting.
HARMLESS = frozenset({errno.ENOENT, errno.ENOSYS, errno.ENOTCONN, errno.ENODEV})

Acknowledge = Callable[[], None]


class Forget(Enum):
    """What of an inode itself the kernel is to forget."""

    ATTRIBUTES = "attributes"
    PAGES = "pages"  # its attributes too; dirty pages are written back first


Entry = tuple[KernelId, bytes | Forget]  # (parent, name), or an inode and what of it


class Notifier:
    """Threads that carry out invalidations."""

    def __init__(self) -> None:
        self._workers = [_Worker(index) for index in range(THREADS)]

    def start(self) -> None:
        """Start the threads. The file system must be mounted."""
        for worker in self._workers:
            worker.start()

    def stop(self) -> None:
        """End the threads, before the file system is unmounted. What waits is dropped."""
        for worker in self._workers:
            worker.stop()

    def forget_name(self, parent: KernelId, name: bytes, acknowledge: Acknowledge) -> None:
        """Make the kernel look `name` up again; then call `acknowledge`, on another thread."""
        self._workers[parent % THREADS].add((parent, name), acknowledge)

    def forget_attributes(self, inode: KernelId) -> None:
        """Make the kernel ask for mode, owner, link count and a directory's times again."""
        self._workers[inode % THREADS].add((inode, Forget.ATTRIBUTES), None)

    def forget_pages(self, inode: KernelId, acknowledge: Acknowledge) -> None:
        """Make the kernel drop what it has cached of a file's contents; then call `acknowledge`."""
        self._workers[inode % THREADS].add((inode, Forget.PAGES), acknowledge)

    @property
    def waiting(self) -> int:
        """How many invalidations have not been made yet."""
        return sum(worker.waiting for worker in self._workers)


class _Worker:
    """One thread and what waits for it."""

    def __init__(self, index: int) -> None:
        self._pending: OrderedDict[Entry, list[Acknowledge]] = OrderedDict()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name=f"notify-{index}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._is_stopping = True
            self._pending.clear()
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    @property
    def waiting(self) -> int:
        return len(self._pending)

    def add(self, entry: Entry, acknowledge: Acknowledge | None) -> None:
        with self._changed:
            acknowledges = self._pending.setdefault(entry, [])
            if acknowledge is not None:
                acknowledges.append(acknowledge)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._pending and not self._is_stopping:
                    self._changed.wait()
                if self._is_stopping:
                    return
                (inode, what), acknowledges = self._pending.popitem(last=False)
            try:
                with timed("invalidate"):
                    if isinstance(what, Forget):
                        only = what is Forget.ATTRIBUTES
                        pyfuse3.invalidate_inode(pyfuse3.InodeT(inode), attr_only=only)
                    else:
                        pyfuse3.invalidate_entry(pyfuse3.InodeT(inode), pyfuse3.FileNameT(what))
            except OSError as error:
                if error.errno not in HARMLESS:
                    log.warning("the kernel refused to forget inode %d: %s", inode, error)
            for acknowledge in acknowledges:
                acknowledge()


class NameGuard:
    """Inodes whose names the kernel may still have wrong. Safe to use from any thread."""

    def __init__(self) -> None:
        self._waiting: dict[InodeNumber, int] = {}  # invalidations not acknowledged yet
        self._names: dict[Name, list[InodeNumber]] = {}  # the same, by name
        # Acknowledged, but within the longer grace: since when, the oldest first.
        self._since: OrderedDict[InodeNumber, float] = OrderedDict()
        self._lock = threading.Lock()

    def raise_for(self, ino: InodeNumber, name: Name) -> None:
        """A name of this inode changed elsewhere; guard it until `lower_for`, once for each."""
        with self._lock:
            self._waiting[ino] = self._waiting.get(ino, 0) + 1
            self._names.setdefault(name, []).append(ino)

    def lower_for(self, ino: InodeNumber, name: Name) -> None:
        """The kernel has forgotten the name: guard only against what is already on its way."""
        with self._lock:
            self._waiting[ino] -= 1
            if not self._waiting[ino]:
                del self._waiting[ino]
            self._end_graces()
            self._since[ino] = time.monotonic()
            self._since.move_to_end(ino)
            self._names[name].remove(ino)
            if not self._names[name]:
                del self._names[name]

    def believed(self, name: Name) -> set[InodeNumber]:
        """What the kernel may take this name for, if it has not been made to forget it yet."""
        with self._lock:
            return set(self._names.get(name, ()))

    def is_raised(self, truncates: bool = False) -> bool:
        """Whether any inode is guarded: usually not, and then no open needs a closer look."""
        if not self._waiting and not self._since:
            return False
        with self._lock:
            self._end_graces()
            newest = next(reversed(self._since), None)
            return bool(self._waiting) or self._is_within(newest, truncates)

    def _end_graces(self) -> None:
        """Forget those whose grace is over. With the lock held; also where nobody opens files."""
        while self._since and not self._is_within(next(iter(self._since)), True):
            self._since.popitem(last=False)

    def _is_within(self, ino: InodeNumber | None, truncates: bool) -> bool:
        grace = TRUNCATING_GRACE_SECONDS if truncates else GRACE_SECONDS
        since = None if ino is None else self._since.get(ino)
        return since is not None and time.monotonic() - since < grace

    def covers(self, ino: InodeNumber, truncates: bool = False) -> bool:
        """Whether an OPEN of this inode must look its name up again; `truncates`: with O_TRUNC."""
        return ino in self._waiting or self._is_within(ino, truncates)
