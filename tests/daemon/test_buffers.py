"""The pools of buffers: whoever has one has it alone."""

from __future__ import annotations

import errno
import mmap
import threading
from contextlib import ExitStack

import pytest

from modelfs.limits import MIB
from modelfsd import buffers
from modelfsd.buffers import RECYCLED_BYTES_MIN, BufferPool, Recycler


def test_buffers_with_the_same_contents_are_not_lent_twice() -> None:
    pool = BufferPool(1000)
    with pool.borrow(100) as one, pool.borrow(100) as two:
        one[:] = two[:] = b"x" * 100
    with ExitStack() as stack:
        lent = [stack.enter_context(pool.borrow(100)) for _ in range(3)]
        for number, buffer in enumerate(lent):
            buffer[:] = bytes([number]) * 100
        assert [bytes(buffer) for buffer in lent] == [bytes([n]) * 100 for n in range(3)]


def test_a_buffer_that_fits_is_used_again() -> None:
    pool = BufferPool(1000)
    with pool.borrow(100) as buffer:
        buffer[:5] = b"first"
    with pool.borrow(60) as buffer:
        assert len(buffer) == 60
        assert bytes(buffer[:5]) == b"first"


def test_memory_comes_back_when_the_last_view_of_it_is_gone() -> None:
    recycler = Recycler(16 * MIB)
    buffer = recycler.take(4 * MIB)
    buffer[:5] = b"first"
    part = buffer[3:5].toreadonly()
    del buffer
    other = recycler.take(4 * MIB)
    assert bytes(other[:5]) == bytes(5)
    other[:] = bytes(4 * MIB)
    assert bytes(part) == b"st"
    del part
    assert bytes(recycler.take(4 * MIB)[:5]) == b"first"


def test_idle_memory_is_bounded_and_other_sizes_make_way() -> None:
    recycler = Recycler(8 * MIB)
    buffers = [recycler.take(MIB + 1) for _ in range(20)]
    del buffers
    assert MIB < recycler.idle_bytes() <= 8 * MIB
    large = [recycler.take(4 * MIB) for _ in range(2)]
    assert all(len(buffer) == 4 * MIB for buffer in large)
    del large
    assert recycler.idle_bytes() <= 8 * MIB


def test_threads_never_get_the_same_memory() -> None:
    recycler = Recycler(4 * MIB)
    failures: list[int] = []

    def use(number: int) -> None:
        for _ in range(200):
            buffer = recycler.take(MIB)
            buffer[:8] = buffer[-8:] = bytes([number]) * 8
            if buffer[:8] != bytes([number]) * 8 or buffer[-8:] != bytes([number]) * 8:
                failures.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_kernel_without_huge_pages_lends_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows no MADV_HUGEPAGE; all that reads chunks would fail with it."""

    class PlainMemory(mmap.mmap):
        def madvise(self, *args: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", PlainMemory)
    buffer = Recycler(0).take(RECYCLED_BYTES_MIN)
    buffer[-1] = 7
    assert len(buffer) == RECYCLED_BYTES_MIN


def test_a_machine_short_of_memory_takes_nothing_from_the_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the chunks that peers put would wait for ever, once it has happened often enough."""
    pool = BufferPool(2 * MIB)

    def fail(size: int) -> memoryview:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(buffers, "empty_buffer", fail)
        for _ in range(3):
            with pytest.raises(OSError, match="memory"), pool.borrow(MIB):
                pass
    assert pool._used_bytes == 0
    with pool.borrow(MIB) as buffer:
        assert len(buffer) == MIB
