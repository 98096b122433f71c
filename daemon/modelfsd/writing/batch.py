"""Batches: WRITEs of one chunk that come together go to its staging file together.

The kernel writes dirty pages back in requests of 1 MiB at most, many at a time. To each of them the
way to a worker thread and back costs more than the disk does, so the first one (the *leader*) lets
those come that the kernel has ready, and takes them along. All are answered when all are in the
file: what an answer says is what it said before.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from modelfs.errors import ModelfsError

TICKS = 3  # of trio's loop. pyfuse3 needs two to bring a request that is ready


@dataclass(slots=True, eq=False)
class Batch:
    """What waits to be written into one staging file, in the order in which it came."""

    pieces: list[tuple[int, memoryview]] = field(default_factory=list)  # (start, bytes)
    size: int = 0
    _is_staged: bool = False
    _error: ModelfsError | OSError | None = None
    _done: trio.Event = field(default_factory=trio.Event)

    def add(self, start: int, data: memoryview) -> None:
        """One more piece."""
        self.pieces.append((start, data))
        self.size += len(data)

    @property
    def is_over(self) -> bool:
        """Whether nobody can join any more."""
        return self._done.is_set()

    async def lead(self, size_max: int, write: Callable[[Batch], Awaitable[bool]]) -> None:
        """Write it as soon as nothing more comes, or it has grown to `size_max`.

        `write` lets nobody join any more, and says whether it wrote.
        """
        try:
            count = 0
            while self.size < size_max and len(self.pieces) != count:
                count = len(self.pieces)
                for _ in range(TICKS):
                    await trio.lowlevel.checkpoint()
            self._is_staged = await write(self)
        except (ModelfsError, OSError) as error:
            self._error = error
        finally:
            self._done.set()

    async def is_staged(self) -> bool:
        """Wait for its end. False: it was not written, so everybody has to stage his own again.

        Raises what went wrong.
        """
        await self._done.wait()
        if self._error is not None:
            raise self._error
        return self._is_staged
