"""Which calls were sent to look again (ESTALE), and what they found.

The kernel looks again once, then tells the application ESTALE. So it must be known of a call
whether it has been back already: by the thread that makes it, and the lookups since.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NoReturn

import trio

from modelfs.errors import StaleHandle
from modelfs.ids import KernelId
from modelfsd.kernel.kernel_inodes import KernelInode
from modelfsd.kernel.tree import Caller

# To the next lookup, or from the last one to the call itself. The kernel comes back at once, but
# waits for locks: of a directory in which others change names, and of a file that others open with
# O_TRUNC, each of whom may wait for the lease as long as `lock_wait`.
SENT_BACK_SECONDS = 600.0
LOOKUPS_MAX = 4096  # of one call: a path has fewer names
SENT_BACK_MAX = 4096  # callers that were told to look again and have not come back yet

Entry = tuple[KernelId, bytes]  # a directory and a name


@dataclass(slots=True)
class _Look:
    """What a call that was sent to look again has found so far."""

    until: float  # trio's clock: when it is taken not to come back
    sent_from: KernelId | None
    shown: list[KernelId] = field(default_factory=list)
    missed: Entry | None = None  # the last name, if it was not there
    is_doubtful: bool = False  # what is looked up from here on may be of a later call


class SentBack:
    """Calls of one kind that were sent to look again: what each was shown since.

    A call may end without coming back (ENOENT, EACCES, a signal), and what a later call of the
    same thread looks up must not pass for its look. So only what is surely retried may be sent
    back through here, and a lookup in vain ends the look; but for one of the same name that comes
    next, since the kernel looks a name up twice that has gone since it was cached, and one that an
    open with O_CREAT finds missing. If it is there by then, that and all that follows may be of a
    later call, which began with a lookup: the kernel must not remember any of it, so that an open
    by a still later call begins with lookups of its own.
    """

    def __init__(self) -> None:
        self._looks: OrderedDict[int, _Look] = OrderedDict()  # by pid

    def send(
        self, caller: Caller, inode: KernelInode | None = None, is_doubtful: bool = False
    ) -> NoReturn:
        """Raise `StaleHandle`, for a call that came to this inode.

        `is_doubtful`: the end of the call may never be seen.
        """
        until = trio.current_time() + SENT_BACK_SECONDS
        sent_from = inode.id if inode else None
        self._looks[caller.pid] = _Look(until, sent_from, is_doubtful=is_doubtful)
        while len(self._looks) > SENT_BACK_MAX:
            self._looks.popitem(last=False)
        raise StaleHandle(caller.pid)

    def note_lookup(self, caller: Caller, entry: Entry, inode: KernelInode | None) -> bool:
        """A lookup was answered; None: in vain. Whether the kernel may remember the answer."""
        look = self._looks.get(caller.pid)
        now = trio.current_time()
        if look is None or now > look.until:
            return True
        if look.missed not in (None, entry) or len(look.shown) == LOOKUPS_MAX:
            del self._looks[caller.pid]  # another call
            return True
        if inode is None:
            look.missed = entry
        else:
            look.is_doubtful |= look.missed is not None
            look.missed = None
            look.shown.append(inode.id)
        look.until = now + SENT_BACK_SECONDS
        return not look.is_doubtful

    def _end(self, caller: Caller) -> _Look | None:
        look = self._looks.pop(caller.pid, None)
        return look if look is not None and trio.current_time() <= look.until else None

    def is_looking(self, caller: Caller, entry: Entry) -> bool:
        """Whether this lookup, which found nothing, may be of a call that was sent back."""
        look = self._looks.get(caller.pid)
        if look is None or trio.current_time() > look.until:
            return False
        return look.missed in (None, entry)

    def is_back(self, caller: Caller, inode: KernelInode) -> bool:
        """Whether this call was sent back and was shown this very inode last. Tells once.

        Or came back without a lookup, as through /proc/self/fd, where there is no name.
        """
        look = self._end(caller)
        if look is None or look.missed is not None:
            return False
        return (look.shown[-1] if look.shown else look.sent_from) == inode.id

    def is_back_in_a_directory(self, caller: Caller) -> bool:
        """The same for a call that opens a directory, also one without a name ("..", the root)."""
        look = self._end(caller)
        return look is not None and look.missed is None

    def is_back_on_the_way(self, caller: Caller, inode: KernelInode) -> bool:
        """The same for a call that looks up another path after this inode, to a new name."""
        look = self._end(caller)
        return look is not None and inode.id in look.shown

    def is_back_in_vain(self, caller: Caller) -> bool:
        """Whether this call may have been sent back, and found nothing then. Tells once."""
        look = self._end(caller)
        return look is not None and look.missed is not None
