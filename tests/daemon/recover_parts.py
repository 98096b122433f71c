"""What the tests of recovery share: a file with its model, and a rebuild of it from disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import trio

from modelfs.errors import ChunkMissing
from modelfs.manifest import PlacedChunk
from modelfsd.writing.recover import Missing, Rebuild
from modelfsd.writing.write_session import WriteSession
from tests.daemon.node_parts import CHUNK, Cluster, Node

FIRST = CHUNK // 4  # the size of the first chunks
SIZE_MAX = 8 * FIRST + 2 * CHUNK


class Store:
    """Fetches chunks from the nodes' memory, as the daemon would."""

    def __init__(self, cluster: Cluster) -> None:
        self.stores = list(cluster.stores.values())

    def __call__(self, chunk: PlacedChunk, replicas: int, start: int, size: int) -> bytes:
        for store in self.stores:
            try:
                return bytes(store.read(chunk.ref, start, size))
            except ChunkMissing:
                continue
        raise ChunkMissing(chunk.ref.id, "any node")


def rebuilt(state_dir: Path, name: str, cluster: Cluster) -> bytes:
    rebuild = Rebuild(state_dir, name, Store(cluster))
    data = bytearray(rebuild.size)
    missing: list[Missing] = []
    for start, piece in rebuild.positions(missing):
        data[start : start + len(piece)] = piece
    assert not missing
    return bytes(data)


async def until(condition: Callable[[], object]) -> None:
    """Wait for what worker threads bring about."""
    while not condition():
        await trio.lowlevel.checkpoint()


def staged(state_dir: Path) -> list[str]:
    return sorted(path.name for path in (state_dir / "staging").iterdir())


class Twin:
    """A file that is written, and the bytearray that recovery must find."""

    def __init__(self, node: Node, session: WriteSession, model: bytes) -> None:
        self.node, self.session, self.model = node, session, bytearray(model)

    async def write(self, start: int, size: int, value: int) -> None:
        size = max(1, min(size, SIZE_MAX - start))
        data = Random(value).randbytes(size) if value else bytes(size)
        await self.session.write(start, data)
        if start > len(self.model):
            self.model.extend(bytes(start - len(self.model)))
        self.model[start : start + size] = data

    async def truncate(self, size: int) -> None:
        await self.session.truncate(size)
        self.model = self.model[:size].ljust(size, b"\0")

    async def settle(self) -> None:
        """Let the complete chunks be sealed."""
        await until(lambda: self.node.writer.uploads.used_bytes == 0)

    async def seal(self) -> None:
        """Seal what is not complete too, as a commit does that then fails."""
        for index in self.session.copy.staged_positions():
            await self.session.copy.seal(index)

    async def flush(self) -> None:
        await self.session.flush()

    async def spill(self) -> None:
        await self.session.spill()

    def check(self, state_dir: Path) -> None:
        names = staged(state_dir)
        assert len(names) <= 1
        for name in names:
            assert rebuilt(state_dir, name, self.node.cluster) == self.model


async def lose_sealed_chunks(node: Node, count: int) -> str:
    """A file of `count` sealed chunks and a few bytes more; the daemon is killed."""
    await node.make_file(b"f")
    session = await node.open(b"f")
    await session.write(0, b"".join(bytes([n + 1]) * FIRST for n in range(count)) + b"tail")
    await until(lambda: node.writer.uploads.used_bytes == 0)
    assert node.writer.keep_leftovers() == 1
    session.copy._files.is_made = False  # the daemon that knew of it is dead
    (name,) = (path.name for path in node.writer.lost_dir.iterdir())
    return name
