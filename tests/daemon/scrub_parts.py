"""A cluster whose nodes restore what is bad."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio
import trio.testing

from modelfs.ids import ChunkId, NodeId
from tests.daemon.upkeep_parts import Kept, kept_cluster


@asynccontextmanager
async def scrubbed_cluster(directory: Path) -> AsyncIterator[Kept]:
    """Three nodes that restore what is bad."""
    async with kept_cluster(3, directory) as kept, trio.open_nursery() as nursery:
        for upkeep in kept.upkeep.values():
            nursery.start_soon(upkeep.restorer.run)
        yield kept
        nursery.cancel_scope.cancel()


def on(kept: Kept, id: NodeId) -> list[ChunkId]:
    return [chunk for chunk, holders in kept.copies().items() if id in holders]
