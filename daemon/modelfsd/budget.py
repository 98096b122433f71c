"""Byte budgets: how much memory a kind of work may hold at once."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class ByteBudget:
    """A first-come, first-served semaphore that counts bytes.

    A request larger than the whole budget is let through alone, so that nothing waits for ever.
    """

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.used_bytes = 0
        self._waiting: deque[tuple[int, trio.Event]] = deque()

    @property
    def wanted_bytes(self) -> int:
        """What the first in the queue waits for; 0 if nobody waits."""
        return self._waiting[0][0] if self._waiting else 0

    def take_nowait(self, size: int) -> bool:
        """Take `size` bytes if they are free and nobody waits; else False."""
        if self._waiting or not self._fits(size):
            return False
        self.used_bytes += size
        return True

    async def take(self, size: int) -> None:
        """Take `size` bytes; wait for them if need be."""
        if self.take_nowait(size):
            return
        ticket = (size, trio.Event())
        self._waiting.append(ticket)
        try:
            await ticket[1].wait()
        except trio.Cancelled:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._wake()  # those behind it may fit
            else:
                self.give(size)
            raise

    def give(self, size: int) -> None:
        """Give back what was taken."""
        self.used_bytes -= size
        assert self.used_bytes >= 0
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            next_size, event = self._waiting.popleft()
            self.used_bytes += next_size
            event.set()

    @asynccontextmanager
    async def holding(self, size: int) -> AsyncIterator[None]:
        """Hold `size` bytes for the time of the body."""
        await self.take(size)
        try:
            yield
        finally:
            self.give(size)

    def _fits(self, size: int) -> bool:
        return self.used_bytes == 0 or self.used_bytes + size <= self.total_bytes
