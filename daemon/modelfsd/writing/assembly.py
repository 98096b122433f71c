"""Assemblies: chunks that are being written, in memory as well as in their staging files.

A chunk that is written in large pieces is collected in a buffer. So it need not be read back to be
named and sent, and its staging file can be written from there past the page cache: the pages of
one more copy would cost more than all else that is done to the bytes. The file has the bytes as
soon as the write returns, as ever.

How much memory assemblies may take in all is bounded. Who gets none does without.
"""

from __future__ import annotations

import threading

from modelfs.chunk import Buffer
from modelfs.limits import KIB
from modelfsd.buffers import RECYCLED_BYTES_MIN, empty_buffer

PIECE_BYTES_MIN = 64 * KIB  # a chunk that begins with less is not worth a buffer of its size
CHUNK_BYTES_MIN = RECYCLED_BYTES_MIN  # from here on buffers are page-aligned


class Assembly:
    """The bytes of one chunk as far as they are written; what is not, is arbitrary."""

    def __init__(self, memory: AssemblyMemory, size: int) -> None:
        self.data = empty_buffer(size)
        self._memory = memory

    def take(self, data: Buffer, start: int) -> memoryview:
        """Take written bytes; returns where they are now."""
        end = start + len(data)
        self.data[start:end] = data
        return self.data[start:end]

    def __del__(self) -> None:
        self._memory.give_back(len(self.data))


class AssemblyMemory:
    """What all assemblies share. Given back when nobody refers to one any more, on any thread."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.used_bytes = 0
        self._lock = threading.RLock()  # the last reference may go while this thread holds it

    def lend(self, chunk_bytes: int, piece_bytes: int) -> Assembly | None:
        """An assembly for a chunk that begins with such a piece; None: do without."""
        if piece_bytes < PIECE_BYTES_MIN or chunk_bytes < CHUNK_BYTES_MIN:
            return None
        with self._lock:
            if self.used_bytes + chunk_bytes > self.total_bytes:
                return None
            self.used_bytes += chunk_bytes
        return Assembly(self, chunk_bytes)

    def give_back(self, size: int) -> None:
        """For assemblies only."""
        with self._lock:
            self.used_bytes -= size
