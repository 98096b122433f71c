"""What a node has counted, joined in one place: for `modelfs stats`, for Prometheus, for tests.

Each part counts for itself and gives a snapshot; nothing is counted here. Answers the commands

    counters    numbers since the start, by part
    measures    these, and the latency histograms of requests and stages
    use         one file: how it was used on this node, and who has it open

and makes the page `/metrics` (see `modelfsd.commands.metrics`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

import trio

from modelfsd.commands import metrics
from modelfsd.kernel.files import Files
from modelfsd.kernel.kernel_inodes import KernelInode
from modelfsd.kernel.operations import Operations
from modelfsd.kernel.pusher import Pusher
from modelfsd.metadata.group_commit import GroupCommit
from modelfsd.metadata.locating import find, names_of
from modelfsd.peers.client import PeerClient
from modelfsd.peers.server import PeerServer
from modelfsd.stages import recorder
from modelfsd.storage.upkeep import Upkeep
from modelfsd.writing.writer import Writer

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Measures:
    """The parts that count."""

    name: str
    operations: Operations
    files: Files
    writer: Writer
    peers: PeerClient
    server: PeerServer
    pusher: Pusher
    group: GroupCommit
    upkeep: Upkeep

    def handlers(self) -> dict[str, Handler]:
        """The commands of the admin socket that this answers."""
        return {"counters": self.counters, "measures": self.measures, "use": self.use}

    async def counters(self, request: dict[str, Any]) -> dict[str, Any]:
        """What was counted since the start, and how much of everything there is now."""
        writer, chunks = self.writer, self.writer.replicator.chunks
        mirror = writer.namespace.mirror
        return {
            "requests": dict(self.operations.requests),
            "kernel_inodes": len(self.writer.inodes),
            "handles": len(self.files),
            "chunks": asdict(chunks.statistics()),
            "pushes": dict(self.pusher.counters),
            "buffered_bytes": writer.contents.buffered_bytes,
            "sent_bytes": writer.replicator.sent_bytes,
            "spared_bytes": writer.replicator.spared_bytes,
            "changes": writer.namespace.transactions,
            "transactions": self.group.requests,
            "peers": {
                chunks.name_of(node): asdict(peer) for node, peer in self.peers.statistics().items()
            },
            "served": asdict(self.server.statistics()),
            "store": asdict(await trio.to_thread.run_sync(chunks.store.usage)),
            "upkeep": asdict(self.upkeep.statistics()),
            "scrub": self.upkeep.scrub_statistics(),
            "files": mirror.file_count,
            "bytes": mirror.file_bytes,
            "nodes_up": len(mirror.nodes),
        }

    async def measures(self, request: dict[str, Any]) -> dict[str, Any]:
        """`counters`, with the histograms."""
        requests = self.operations.latencies.items()
        return {
            "node": self.name,
            "time": trio.current_time(),
            "counters": await self.counters({}),
            "requests": {name: found.snapshot().as_json() for name, found in requests},
            "stages": {name: found.as_json() for name, found in recorder.snapshot().items()},
        }

    async def page(self) -> str:
        """`/metrics`, in Prometheus's text format."""
        requests = {name: found.snapshot() for name, found in self.operations.latencies.items()}
        return metrics.text(await self.counters({}), requests, recorder.snapshot())

    async def use(self, request: dict[str, Any]) -> dict[str, Any]:
        """The handler of `modelfs stats PATH`; `path` is a list of names."""
        names = names_of(request)
        await self.writer.namespace.fresh()
        ino, record = find(self.writer.namespace.mirror, names)
        use = self.files.uses.known(ino)
        views = [inode for inode in self.writer.inodes if inode.ino == ino]
        return {
            "path": "/" + b"/".join(names).decode(errors="replace"),
            "ino": ino,
            "version": record.version,
            "size": record.size,
            **asdict(use),
            "fetched_bytes": use.fetched_bytes,
            "amplification": use.fetched_bytes / given if (given := use.given_bytes) else None,
            "views": [_view(inode) for inode in views],
        }


def _view(inode: KernelInode) -> dict[str, Any]:
    """A version of a file that this node's kernel knows."""
    session = inode.session
    return {
        "version": inode.record.version,
        "current": inode.is_current,
        "handles": inode.handles,
        "writers": session.handles if session is not None else 0,
        "uncommitted": session is not None and session.copy.is_dirty,
    }
