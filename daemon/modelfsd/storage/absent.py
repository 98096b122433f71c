"""Chunks that were looked for in vain, so that nobody looks again.

On most nodes most chunks are elsewhere, and every read of one of them would first ask a worker
thread to open a file that is not there (0.1 ms). An id is remembered only if nothing was installed
between the look and the remembering: a chunk that came meanwhile must not pass for absent.
"""

from __future__ import annotations

import threading

from modelfs.ids import ChunkId

REMEMBERED_MAX = 65_536  # 7 MiB


class AbsentChunks:
    """What one store surely does not have. Safe to use from many threads."""

    def __init__(self) -> None:
        self._ids: set[ChunkId] = set()
        self._installs = 0
        self._lock = threading.Lock()

    def __contains__(self, chunk: ChunkId) -> bool:
        return chunk in self._ids

    def look(self) -> int:
        """Before looking for a chunk: what `remember` must be given afterwards."""
        return self._installs

    def remember(self, chunk: ChunkId, look: int) -> None:
        """The chunk was not there."""
        with self._lock:
            if look != self._installs:
                return
            if len(self._ids) >= REMEMBERED_MAX:
                self._ids.clear()
            self._ids.add(chunk)

    def forget(self, chunk: ChunkId) -> None:
        """The chunk has been installed."""
        with self._lock:
            self._installs += 1
            self._ids.discard(chunk)
