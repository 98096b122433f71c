"""A lock that many may share or one may have alone, fair in the order of arrival."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class SharedLock:
    """Readers and writers, or WRITEs and commits. Not reentrant."""

    def __init__(self) -> None:
        self._sharing = 0
        self._is_alone = False
        self._waiting: deque[tuple[bool, trio.Event]] = deque()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Hold the lock together with others who share it."""
        await self._acquire(alone=False)
        try:
            yield
        finally:
            self._sharing -= 1
            self._wake()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Hold the lock with nobody else."""
        await self._acquire(alone=True)
        try:
            yield
        finally:
            self._is_alone = False
            self._wake()

    async def _acquire(self, alone: bool) -> None:
        if not self._waiting and self._is_free_for(alone):
            self._grant(alone)
            return
        ticket = (alone, trio.Event())
        self._waiting.append(ticket)
        try:
            await ticket[1].wait()
        except trio.Cancelled:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            elif alone:
                self._is_alone = False
            else:
                self._sharing -= 1
            self._wake()
            raise

    def _is_free_for(self, alone: bool) -> bool:
        return not self._is_alone and not (alone and self._sharing)

    def _grant(self, alone: bool) -> None:
        if alone:
            self._is_alone = True
        else:
            self._sharing += 1

    def _wake(self) -> None:
        while self._waiting and self._is_free_for(self._waiting[0][0]):
            alone, event = self._waiting.popleft()
            self._grant(alone)
            event.set()
