"""The pool of receive buffers: whoever borrows one has it alone."""

from __future__ import annotations

from contextlib import ExitStack

from modelfsd.buffers import BufferPool


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
