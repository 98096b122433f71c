"""How each file has been used on this node: what was asked of it, and where its bytes came from.

A read of a file puts its account into a context variable. Whatever is done on its behalf, in
background tasks that it starts too, finds the account there (trio hands contexts on), so the parts
between need not pass it along. All accounts belong to trio's thread.

Accounts are kept for the files that were used last; an inode that is forgotten begins anew.
"""

from __future__ import annotations

from collections import OrderedDict
from contextvars import ContextVar
from dataclasses import dataclass

from modelfs.ids import InodeNumber

FILES_REMEMBERED = 4096  # 1 MiB of accounts


@dataclass(slots=True)
class FileUse:
    """One file's account since this node began to use it."""

    opens: int = 0
    read_requests: int = 0
    read_bytes: int = 0  # as the kernel asked for them: what it has cached it does not ask for
    stream_requests: int = 0  # reads that continued a stream, so that what follows was fetched too
    memory_bytes: int = 0  # ... of them answered from chunks that were here already
    pushed_bytes: int = 0  # given to the kernel before it asked
    local_bytes: int = 0  # read from this node's disk
    remote_bytes: int = 0  # fetched from peers
    write_requests: int = 0
    write_bytes: int = 0

    @property
    def given_bytes(self) -> int:
        """What the kernel was given."""
        return self.read_bytes + self.pushed_bytes

    @property
    def fetched_bytes(self) -> int:
        """What was brought into memory to serve the reads."""
        return self.local_bytes + self.remote_bytes


_current: ContextVar[FileUse | None] = ContextVar("the use of a file", default=None)
_nobody = FileUse()


def current_use() -> FileUse:
    """The account of the file on whose behalf this task runs."""
    return _current.get() or _nobody


class FileUses:
    """The accounts of this node."""

    def __init__(self) -> None:
        self._accounts: OrderedDict[InodeNumber, FileUse] = OrderedDict()

    def of(self, ino: InodeNumber) -> FileUse:
        """The account of a file, opened if need be."""
        use = self._accounts.get(ino)
        if use is None:
            use = self._accounts[ino] = FileUse()
            while len(self._accounts) > FILES_REMEMBERED:
                self._accounts.popitem(last=False)
        else:
            self._accounts.move_to_end(ino)
        return use

    def known(self, ino: InodeNumber) -> FileUse:
        """The account of a file as it is, without opening one."""
        return self._accounts.get(ino) or FileUse()

    def reading(self, ino: InodeNumber) -> FileUse:
        """Count a read, and let all that this task does from now on be on its account."""
        use = self.of(ino)
        use.read_requests += 1
        _current.set(use)
        return use

    def note_write(self, ino: InodeNumber, size: int) -> None:
        """Count a write of this many bytes."""
        use = self.of(ino)
        use.write_requests += 1
        use.write_bytes += size
