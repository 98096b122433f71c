"""Memory for bulk bytes: buffers that are not zeroed first, used again, and a bounded pool of them.

`bytearray(n)` writes zeros over memory that the next `recv` or `read` overwrites anyway, and does
so with the GIL held (0.3 ms for 4 MiB). `empty_buffer` leaves that out. Large buffers come from
memory that was used before, as soon as nobody refers to it any more: the kernel need not clear and
map fresh pages, which costs 0.2 s of CPU for each GiB (0.9 without huge pages).
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from modelfs.chunk import Buffer
from modelfs.limits import KIB, MIB

RECYCLED_BYTES_MIN = 256 * KIB  # smaller buffers are cheaper to have from malloc
IDLE_BYTES_MAX = 64 * MIB
IDLE_MAX = 64

Memory = np.ndarray[Any, np.dtype[np.uint8]]


class _Loan(np.ndarray[Any, np.dtype[np.uint8]]):
    """What every view of a lent buffer refers to: its end is the end of the last of them."""

    give_back: Callable[[], None] | None = None

    def __del__(self) -> None:
        if self.give_back is not None:
            self.give_back()


class Recycler:
    """Lends page-aligned memory, and has it back when the last view of it is gone.

    Nobody returns anything: the interpreter's reference counts say when a buffer is free. Safe to
    use from many threads; `_returned` alone is touched by whoever drops the last reference, at a
    moment that nobody can choose, so that end takes no lock.
    """

    def __init__(self, idle_bytes_max: int) -> None:
        self._idle_bytes_max = idle_bytes_max
        self._idle: list[Memory] = []  # the longest idle first
        self._returned: deque[Memory] = deque()
        self._lock = threading.Lock()

    def take(self, size: int) -> memoryview:
        """`size` writable bytes with arbitrary contents."""
        whole = self._take_idle(-(-size // RECYCLED_BYTES_MIN) * RECYCLED_BYTES_MIN)
        loan = whole[:size].view(_Loan)
        loan.give_back = lambda: self._give_back(whole)
        return loan.data

    def idle_bytes(self) -> int:
        """How much memory is kept that nobody uses."""
        with self._lock:
            self._collect()
            return sum(map(len, self._idle))

    def _give_back(self, whole: Memory) -> None:
        if len(self._returned) < IDLE_MAX:
            self._returned.append(whole)

    def _take_idle(self, capacity: int) -> Memory:
        with self._lock:
            self._collect()
            for position in range(len(self._idle) - 1, -1, -1):
                if len(self._idle[position]) == capacity:
                    return self._idle.pop(position)
        memory = mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel that was built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(memory, dtype=np.uint8)

    def _collect(self) -> None:
        while self._returned:
            self._idle.append(self._returned.popleft())
        while self._idle and sum(map(len, self._idle)) > self._idle_bytes_max:
            self._idle.pop(0)


_recycler = Recycler(IDLE_BYTES_MAX)


def empty_buffer(size: int) -> memoryview:
    """`size` writable bytes with arbitrary contents; page-aligned if they are many."""
    if size >= RECYCLED_BYTES_MIN:
        return _recycler.take(size)
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
        if buffer is not None:
            return buffer
        try:
            return empty_buffer(size)
        except BaseException:  # there is no memory: it is not in use then
            with self._changed:
                self._used_bytes -= size
                self._changed.notify_all()
            raise
