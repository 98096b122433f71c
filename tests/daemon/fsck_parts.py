"""A cluster that can be damaged behind its nodes' backs, and checked."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
import trio.testing

from modelfs import changes, keys
from modelfs.chunk import describe
from modelfs.ids import ROOT_INODE, ChunkId, InodeNumber
from modelfs.inode import Inode
from modelfs.ports import Delete, Put, Txn
from modelfsd.commands.checking import fsck_code
from modelfsd.commands.fsck_service import FsckService
from tests.daemon.node_parts import Node
from tests.daemon.upkeep_parts import Kept, kept_cluster


@dataclass
class Checked:
    """What one fsck said."""

    answer: dict[str, Any]
    findings: list[dict[str, Any]]

    @property
    def code(self) -> int:
        return fsck_code(self.answer)

    def said(self) -> list[tuple[str, str, bool]]:
        return sorted(
            (path, one["kind"], one["mended"]) for one in self.findings for path in one["paths"]
        )


@dataclass
class Ears:
    """Stands in for a client's listener."""

    findings: list[dict[str, Any]] = field(default_factory=list)
    progress: Callable[[], dict[str, Any]] = dict

    async def tell(self, news: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        self.findings.append(news["finding"])


class World(Kept):
    """A cluster whose first node can check it."""

    def service(self) -> FsckService:
        node = self.nodes[0]
        restorer = self.upkeep[node.id].restorer
        return FsckService(
            Path("/models"), node.namespace, self.cluster.etcd, node.replicator, restorer
        )

    async def fsck(self, **request: bool) -> Checked:
        ears: Any = Ears()
        answer = await self.service().fsck(dict(request), ears)
        assert ears.progress()["left"] == answer["left"]
        return Checked(answer, ears.findings)

    async def let_go(self, ino: InodeNumber) -> None:
        """Wait until nobody has the right to write a file."""
        while any(node.mirror.lease(ino) for node in self.nodes):
            await trio.lowlevel.checkpoint()

    async def put(self, *ops: Put | Delete) -> None:
        """Change etcd as nobody should."""
        await self.cluster.etcd.commit(Txn((), (*ops, Put(keys.SEQ, b"damage"))))
        await self.hear()

    async def ino(self, name: bytes) -> InodeNumber:
        return (await self.nodes[0].look_up(name)).ino


@asynccontextmanager
async def world(directory: Path, count: int = 3) -> AsyncIterator[World]:
    async with kept_cluster(count, directory) as kept:
        yield World(kept.cluster)


async def make_directory(node: Node, name: bytes, parent: InodeNumber = ROOT_INODE) -> InodeNumber:
    ino = await node.namespace.new_inode_number()
    record = Inode(mode=stat.S_IFDIR | 0o755, uid=0, gid=0, atime_ns=1, mtime_ns=1, ctime_ns=1)
    await node.namespace.change(lambda mirror: changes.create(mirror, parent, name, ino, record))
    return ino


def lose(world: World, data: bytes, copies: int) -> ChunkId:
    """Delete so many copies of a chunk."""
    ref, _ = describe(data)
    for id in sorted(world.copies()[ref.id])[:copies]:
        world.cluster.stores[id].lose(ref.id)
    return ref.id
