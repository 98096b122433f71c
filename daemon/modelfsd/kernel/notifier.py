"""Tells the kernel what to forget, without ever holding up a request.

An invalidation can block in the kernel until a request on the same directory has been answered.
So they are made on threads of their own, each directory always on the same thread (in order, and
one busy directory does not hold up those of the other threads), with no lock held, after the new
state is in the mirror. Waiting invalidations of one name are merged.

Attributes may be forgotten in vain: the kernel takes what a request was answered although it was
told to forget it between the answer and the moment that the caller runs again. Of an inode that it
did not know by then it says so (ENOENT); that it was just answered a SETATTR or LINK (LOOKUP and
GETATTR mind the order) is for us to know. Then it is told again, a little later.

`NameGuard` is the other half: it remembers which inodes had a name changed by another node, until
the kernel has surely acted on it. Before that, an OPEN may have come along the old name, and must
be sent to look again (ESTALE).
"""

from __future__ import annotations

import errno
import heapq
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

# When attributes are forgotten again that the kernel may have got only afterwards: a caller who has
# been answered takes the answer when he gets a processor.
AGAIN_SECONDS = (0.01, 0.1, 1.0)

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

    def forget_attributes(self, inode: KernelId, was_answered: bool = False) -> None:
        """Make the kernel ask for mode, owner, link count and a directory's times again.

        `was_answered`: it may still have to take older ones, from the answer to a change.
        """
        self._workers[inode % THREADS].add((inode, Forget.ATTRIBUTES), None, was_answered)

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
        self._later: list[tuple[float, KernelId, int]] = []  # a heap: when, what, how often before
        self._attempts: dict[KernelId, int] = {}  # attributes that were to be forgotten before
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

    def add(
        self, entry: Entry, acknowledge: Acknowledge | None, was_answered: bool = False
    ) -> None:
        with self._changed:
            acknowledges = self._pending.setdefault(entry, [])
            if acknowledge is not None:
                acknowledges.append(acknowledge)
            if entry[1] is Forget.ATTRIBUTES:
                self._attempts.pop(entry[0], None)
            if was_answered:
                for attempt in range(len(AGAIN_SECONDS)):
                    self._forget_later(entry[0], attempt, len(AGAIN_SECONDS))
            self._changed.notify()

    def _forget_later(self, inode: KernelId, attempt: int, attempts: int) -> None:
        """Forget attributes once more. With the lock held."""
        due = time.monotonic() + AGAIN_SECONDS[attempt]
        heapq.heappush(self._later, (due, inode, attempts))

    def _next(self) -> tuple[Entry, list[Acknowledge], int] | None:
        """What to forget next, and how often that was tried before; None at the end."""
        with self._changed:
            while not self._is_stopping:
                now = time.monotonic()
                while self._later and self._later[0][0] <= now:
                    _, inode, attempts = heapq.heappop(self._later)
                    if (inode, Forget.ATTRIBUTES) not in self._pending:
                        self._pending[inode, Forget.ATTRIBUTES] = []
                        self._attempts[inode] = attempts
                if self._pending:
                    entry, acknowledges = self._pending.popitem(last=False)
                    is_again = entry[1] is Forget.ATTRIBUTES
                    attempts = self._attempts.pop(entry[0], 0) if is_again else 0
                    return entry, acknowledges, attempts
                self._changed.wait(self._later[0][0] - now if self._later else None)
            return None

    def _run(self) -> None:
        while (following := self._next()) is not None:
            (inode, what), acknowledges, attempts = following
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
                is_unknown = error.errno == errno.ENOENT and what is Forget.ATTRIBUTES
                if is_unknown and attempts < len(AGAIN_SECONDS):
                    with self._changed:
                        self._forget_later(inode, attempts, attempts + 1)
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
