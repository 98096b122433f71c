"""Memory for bulk bytes: buffers that are not zeroed first, and a bounded pool of them.

`bytearray(n)` writes zeros over memory that the next `recv` or `read` overwrites anyway, and does
so with the GIL held (0.3 ms for 4 MiB). `empty_buffer` leaves that out, and lets the pages be
faulted in by the kernel's copy, without the GIL.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from modelfs.chunk import Buffer


def empty_buffer(size: int) -> memoryview:
    """`size` writable bytes with arbitrary contents."""
    return np.empty(size, dtype=np.uint8).data


def advance(views: list[memoryview], count: int) -> None:
    """Drop the first `count` bytes of a list of buffers: what a vectored call has dealt with."""
    while views and count >= len(views[0]):
        count -= len(views.pop(0))
    if views and count:
        views[0] = views[0][count:]


def as_views(buffers: tuple[Buffer, ...] | list[Buffer]) -> list[memoryview]:
    """Byte views of buffers, for the vectored calls; empty ones are left out."""
    return [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]


class BufferPool:
    """Receive buffers within a budget, and reused: a page that is mapped already costs no fault.

    Invariant: the buffers in use and the idle ones together never exceed `bytes_max`, except that
    one buffer is always granted to a caller who is alone.
    """

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._used_bytes = 0
        self._idle: list[memoryview] = []
        self._changed = threading.Condition()

    @contextmanager
    def borrow(self, size: int) -> Iterator[memoryview]:
        """A buffer of exactly `size` bytes for the length of the block; waits for its turn."""
        buffer = self._take(size)
        try:
            yield buffer[:size]
        finally:
            with self._changed:
                self._used_bytes -= len(buffer)
                self._idle.append(buffer)
                self._changed.notify_all()

    def _take(self, size: int) -> memoryview:
        with self._changed:
            while self._used_bytes and self._used_bytes + size > self.bytes_max:
                self._changed.wait()
            # By position: `remove` would compare contents, and take out another buffer that
            # happens to hold the same bytes, so that this one could be lent twice.
            fitting = [i for i, buffer in enumerate(self._idle) if size <= len(buffer) <= 2 * size]
            buffer = self._idle.pop(fitting[-1]) if fitting else None
            self._used_bytes += size if buffer is None else len(buffer)
            while self._idle and self._used_bytes + sum(map(len, self._idle)) > self.bytes_max:
                self._idle.pop(0)
        return empty_buffer(size) if buffer is None else buffer
