"""What the daemon does for `modelfs fsck`: the whole cluster, as etcd and the nodes have it.

Three walks, each over snapshots of what there is, so that changes go on beside them:

- the records in etcd that cannot be read, and the names and inodes that do not fit (`consistency`);
- the chunks of all current versions, of those that nodes have pinned, and of the retained ones.

What looks wrong is looked at again with a mirror that was made fresh for it, before it is told.
With `repair` it is mended then and there, where nothing has to be guessed. Each finding is told at
once, so a list of any length takes no memory here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from modelfs import keys
from modelfs.consistency import Fault, FaultKind, describe, fault_of_inode, fault_of_name
from modelfs.errors import MetadataUnavailable, ModelfsError, ProtocolError, UserError
from modelfs.ids import NodeId
from modelfs.ports import MetadataStore
from modelfsd.commands.control import Listener
from modelfsd.metadata.locating import exact_path, paths_of
from modelfsd.metadata.mending import Mender
from modelfsd.metadata.namespace import Namespace
from modelfsd.storage.copies import CopyCheck, Damage, Version, ranges_of
from modelfsd.storage.recopying import Recopier
from modelfsd.storage.replicator import Replicator
from modelfsd.storage.restoring import Restorer
from modelfsd.storage.versions import current_version, pinned_versions, retained_version

LOOKED_AT_ONCE = 1000  # names or inodes between two yields to the other tasks
HISTORY_PAGE = 500
RANGES_TOLD_MAX = 1000  # of one finding
QUEUE_VERSIONS = 64

Told = dict[str, Any]


class FsckService:
    """Answers `fsck`; one at a time."""

    def __init__(
        self,
        mountpoint: Path,
        namespace: Namespace,
        store: MetadataStore,
        replicator: Replicator,
        restorer: Restorer,
    ) -> None:
        self._mountpoint, self._namespace, self._store = mountpoint, namespace, store
        self._replicator, self._restorer = replicator, restorer
        self._checking = trio.Lock()

    async def fsck(self, request: Told, listener: Listener) -> Told:
        """The handler of `modelfs fsck`."""
        repair, data = bool(request.get("repair")), bool(request.get("data"))
        if self._checking.locked():
            raise UserError("another fsck is running on this node: wait for its end")
        async with self._checking:
            if not await self._namespace.fresh():
                raise MetadataUnavailable("etcd is out of reach: nothing can be said for sure")
            recopier = Recopier(self._replicator) if repair else None
            started = trio.current_time()
            mender = Mender(self._namespace) if repair else None
            check = _Check(self._namespace, self._store, listener, mender)
            copies = CopyCheck(
                self._replicator.chunks, self._restorer, recopier, data, check.note_version
            )
            listener.progress = lambda: _progress(check, copies)
            check.copies = copies
            await check.run()
            return {
                "mountpoint": str(self._mountpoint),
                "seconds": trio.current_time() - started,
                **_progress(check, copies),
                "nodes_down": self._down(),
                "nodes_silent": self._named(copies.silent),
            }

    def _down(self) -> list[str]:
        mirror, chunks = self._namespace.mirror, self._replicator.chunks
        members = mirror.latest_map.members if mirror.latest_map else ()
        up = {*mirror.nodes, chunks.node_id}
        return sorted(member.name for member in members if member.id not in up)

    def _named(self, nodes: dict[NodeId, str]) -> dict[str, str]:
        return {self._replicator.chunks.name_of(node): why for node, why in nodes.items()}


def _progress(check: _Check, copies: CopyCheck) -> Told:
    return {
        "names": check.names,
        "inodes": check.inodes,
        "total_inodes": check.total_inodes,
        "versions": copies.versions,
        "chunks": copies.chunks,
        "bytes": copies.bytes,
        "mended": check.mended,
        "left": check.left,
    }


@dataclass(slots=True)
class _Check:
    """One fsck."""

    namespace: Namespace
    store: MetadataStore
    listener: Listener
    mender: Mender | None
    copies: CopyCheck | None = None
    names: int = 0
    inodes: int = 0
    total_inodes: int = 0
    mended: int = 0
    left: int = 0

    async def run(self) -> None:
        """All of it. Raises what kept it from being complete."""
        assert self.copies is not None
        mirror = self.namespace.mirror
        self.total_inodes = len(mirror.inode_numbers())
        for key, (reason, _) in list(mirror.unreadable.items()):
            await self._tell("record", self._paths_of_key(key), f"{_said(key)}: {reason}")
        await self._look_at_names()
        send, receive = trio.open_memory_channel[Version](QUEUE_VERSIONS)
        failures: list[ModelfsError] = []

        async def feed() -> None:
            async with send:
                try:
                    await self._look_at_inodes(send)
                    for version in pinned_versions(self.namespace):
                        await send.send(version)
                    await self._send_retained(send)
                except ModelfsError as error:
                    failures.append(error)  # out of the nursery as it is, not in a group

        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed)
            await self.copies.run(receive)
        for failure in failures:
            raise failure

    async def _tell(
        self, kind: str, paths: list[str], text: str, mended: bool = False, **more: object
    ) -> None:
        self.mended += mended
        self.left += not mended
        finding = {"kind": kind, "paths": paths, "text": text, "mended": mended, **more}
        await self.listener.tell({"finding": finding})

    # ------------------------------------------------------------ names and inodes

    def _paths_of_key(self, key: bytes) -> list[str]:
        """What a record is about, as paths, as far as its key tells."""
        mirror = self.namespace.mirror
        with suppress(ProtocolError):
            if key.startswith(keys.INODE_PREFIX):
                return paths_of(mirror, keys.ino_of(key, keys.INODE_PREFIX))
            if key.startswith(keys.DENTRY_PREFIX):
                return [exact_path(mirror, *keys.split_dentry(key))]
        return []

    async def _look_at_names(self) -> None:
        mirror = self.namespace.mirror
        for parent in list(mirror.children):
            for name in list(mirror.children.get(parent, ())):
                self.names += 1
                if self.names % LOOKED_AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()
                if fault_of_name(mirror, (parent, name)) is not None:
                    await self._see_to(partial(fault_of_name, mirror, (parent, name)))

    async def _look_at_inodes(self, send: trio.MemorySendChannel[Version]) -> None:
        mirror = self.namespace.mirror
        for ino in mirror.inode_numbers():
            self.inodes += 1
            if self.inodes % LOOKED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            if fault_of_inode(mirror, ino) is not None:
                await self._see_to(partial(fault_of_inode, mirror, ino))
            record = mirror.readable_inode(ino)
            if record is not None and record.manifest is not None:
                await send.send(current_version(self.namespace, ino, record, record.manifest))

    async def _see_to(self, look: Callable[[], Fault | None]) -> None:
        """Look at a fault again, mend it if that is wanted, and tell of it."""
        if not await self.namespace.fresh():
            raise MetadataUnavailable("etcd was lost during the check")
        fault = look()
        if fault is None:
            return
        mirror = self.namespace.mirror
        text, paths = describe(mirror, fault), self._paths_of(fault)
        is_mended = self.mender is not None and await self.mender.mend(fault, look)
        if is_mended and fault.kind is FaultKind.NO_NAME:
            paths = paths_of(mirror, fault.ino)
        await self._tell("names", paths, text, is_mended)

    def _paths_of(self, fault: Fault) -> list[str]:
        mirror = self.namespace.mirror
        if fault.name is not None:
            return [exact_path(mirror, *fault.name)]
        return paths_of(mirror, fault.ino)

    # ------------------------------------------------------------ versions

    async def _send_retained(self, send: trio.MemorySendChannel[Version]) -> None:
        page = await self.store.page(keys.HISTORY_PREFIX, b"", HISTORY_PAGE)
        while page:
            for row in page:
                try:
                    version = retained_version(self.namespace, self.store, row)
                except ProtocolError as error:
                    if row.key not in self.namespace.mirror.unreadable:  # else it is told already
                        await self._tell("record", [], f"{_said(row.key)}: {error}")
                    continue
                if version is not None:
                    await send.send(version)
            page = await self.store.page(keys.HISTORY_PREFIX, page[-1].key, HISTORY_PAGE)

    async def note_version(self, version: Version) -> None:
        """Tell what is wrong with a version, if anything is."""
        for kind, damage, text, mended in (
            ("lost", version.lost, "without a good copy", False),
            ("copies", version.few, "with too few copies", False),
            ("copies", version.mended, "had too few good copies", True),
        ):
            if damage.chunks:
                await self._tell_damage(kind, version, damage, text, mended)

    async def _tell_damage(
        self, kind: str, version: Version, damage: Damage, text: str, mended: bool
    ) -> None:
        told = dict(version.describe())
        paths = told.pop("paths")
        assert isinstance(paths, list)
        ranges, count = ranges_of(damage, RANGES_TOLD_MAX)
        chunks = f"{damage.chunks:,} chunk{'' if damage.chunks == 1 else 's'}"
        await self._tell(
            kind,
            paths,
            f"{chunks} {text} ({damage.reason})",
            mended,
            chunks=damage.chunks,
            ranges=ranges,
            range_count=count,
            **told,
        )


def _said(key: bytes) -> str:
    return key.decode(errors="backslashreplace")
