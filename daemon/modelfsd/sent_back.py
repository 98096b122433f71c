"""Which calls were sent to look again (ESTALE), and what they found.

The kernel looks again once, then tells the application ESTALE. So it must be known of a call
whether it has been back already: by the thread that makes it, and the lookups since.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NoReturn

import trio

from modelfs.errors import StaleHandle
from modelfs.ids import KernelId
from modelfsd.kernel_inodes import KernelInode
from modelfsd.tree import Caller

# The kernel comes back at once, but may wait for locks of directories in which others change names.
SENT_BACK_SECONDS = 2.0  # to the next lookup, or from the last one to the call itself
SENT_BACK_MAX = 4096  # callers that were told to look again and have not come back yet


class SentBack:
    """Calls of one kind that were sent to look again: what each was shown since.

    A call may end without coming back (ENOENT, EACCES, a signal), and what a later call of the
    same thread looks up must not pass for its look. So only what is surely retried may be sent
    back through here, a lookup in vain ends the memory of it, and so does a second.
    """

    def __init__(self) -> None:
        # By pid: until when, and the inode shown last (0: none), or None after a look in vain.
        self._shown: OrderedDict[int, tuple[float, KernelId | None]] = OrderedDict()

    def send(self, caller: Caller) -> NoReturn:
        """Raise `StaleHandle`."""
        self._shown[caller.pid] = (trio.current_time() + SENT_BACK_SECONDS, KernelId(0))
        while len(self._shown) > SENT_BACK_MAX:
            self._shown.popitem(last=False)
        raise StaleHandle(caller.pid)

    def note_lookup(self, caller: Caller, inode: KernelInode | None) -> None:
        """A lookup was answered; None: in vain."""
        until, shown = self._shown.get(caller.pid, (0.0, None))
        now = trio.current_time()
        if shown is not None and now <= until:
            found = inode.id if inode is not None else None
            self._shown[caller.pid] = (now + SENT_BACK_SECONDS, found)

    def is_back(self, caller: Caller, inode: KernelInode) -> bool:
        """Whether this call was sent back and was shown this very inode since. Tells once."""
        until, shown = self._shown.pop(caller.pid, (0.0, None))
        return shown == inode.id and trio.current_time() <= until

    def is_back_in_vain(self, caller: Caller) -> bool:
        """Whether this call may have been sent back, and found nothing then. Tells once."""
        until, shown = self._shown.pop(caller.pid, (0.0, KernelId(0)))
        return shown is None and trio.current_time() <= until
