"""Making new names in many directories durable: fsync of directories as a group commit.

A rename survives a crash once its directory has been fsynced. Callers rename first and call `sync`
later, once for many names, and callers that wait at the same time share one round of fsyncs.

Rule 1: a name that anybody can see is covered by `_changing` or `_dirty` from before its rename
until a round that began after the rename has fsynced its directory. So whoever finds a name
and then calls `sync` may rely on it, though another thread made it.
Rule 2: a caller returns only after a round that began after its call.
Rule 3: a failed fsync is never tried again: the kernel reports a write-back error once and then
forgets the pages, so a second fsync would claim a success that is none. All later calls fail;
a restart marks every directory dirty.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class DirectorySync:
    """The directories below `root` with names that may not be durable yet."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._dirty: set[str] = set()
        self._changing: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._running = False
        self._rounds_begun = 0
        self._rounds_done = 0
        self._failure: str | None = None

    def mark(self, name: str) -> None:
        """Say that directory `name` holds names that may not be durable."""
        with self._changed:
            self._dirty.add(name)

    @contextmanager
    def changing(self, name: str) -> Iterator[None]:
        """Rename into directory `name` inside this block."""
        with self._changed:
            self._changing[name] += 1
        try:
            yield
        finally:
            with self._changed:
                self._dirty.add(name)
                self._changing[name] -= 1
                if not self._changing[name]:
                    del self._changing[name]

    def sync(self) -> None:
        """Make every name that was there before this call durable.

        Raises OSError if it cannot be known that they are.
        """
        with self._changed:
            wanted = self._rounds_begun + 1
            while self._rounds_done < wanted and self._running:
                self._changed.wait()
            if self._rounds_done >= wanted or self._failure:
                self._raise_failure()
                return
            self._running = True
            self._rounds_begun += 1
            names = self._dirty | self._changing.keys()
            self._dirty.clear()
        failure: str | None = "the round was interrupted"
        try:
            failure = self._fsync_all(sorted(names))
        finally:
            with self._changed:
                self._running = False
                self._rounds_done = self._rounds_begun
                if failure:
                    self._failure = failure
                self._changed.notify_all()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure:
            raise OSError(errno.EIO, f"fsync failed, so restart the node: {self._failure}")

    def _fsync_all(self, names: list[str]) -> str | None:
        """Fsync the directories; what went wrong, or None."""
        for name in names:
            try:
                directory = os.open(f"{self._root}/{name}", os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(directory)
                finally:
                    os.close(directory)
            except OSError as error:
                return f"{self._root}/{name}: {error}"
        return None
