"""What the admin socket answers: the state of the cluster, and where a file's chunks are."""

from __future__ import annotations

import stat
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
import trio

from modelfs import __version__
from modelfs.errors import ModelfsError
from modelfs.ids import ChunkId, InodeNumber, NodeId
from modelfs.inode import Inode
from modelfs.manifest import HOLE, Entries
from modelfs.stripe import span
from modelfsd.config import Config
from modelfsd.etcd.store import EtcdStore, MemberInfo
from modelfsd.metadata.locating import find, names_of, path_text, paths_of
from modelfsd.metadata.namespace import Namespace
from modelfsd.storage.chunks import Chunks
from modelfsd.storage.contents import Contents
from modelfsd.storage.holders import ask_holders
from modelfsd.trust.identity import Identity

FILES_COUNTED_MAX = 10_000  # whose replicas `status` counts; beyond that it says "not counted"
DB_QUOTA_BYTES = 8 << 30  # as given to the embedded etcd
ETCD_SECONDS = 2.0
UNREADABLE_SHOWN_MAX = 20
DAMAGED_SHOWN_MAX = 20
DAY_SECONDS = 86_400.0
CERTIFICATE_DAYS_WARN = 20  # they last 90, and are renewed with 30 left
AUTHORITY_DAYS_WARN = 180

TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


@dataclass(frozen=True, slots=True)
class _Copies:
    """How many chunks have too few copies, and which files lack some chunk on every living node."""

    lacking: int
    damaged: list[str]


class Status:
    """Answers `status` and `info`."""

    def __init__(
        self,
        config: Config,
        identity: Identity,
        namespace: Namespace,
        store: EtcdStore,
        chunks: Chunks,
        contents: Contents,
        is_attached: Callable[[], bool],
        warnings: Callable[[], list[str]],
        pid: int,
        upkeep: Callable[[], dict[str, Any]] = dict,
        key_ends: Callable[[], tuple[float, float]] | None = None,
    ) -> None:
        self._config, self._identity = config, identity
        self._namespace, self._mirror = namespace, namespace.mirror
        self._store, self._chunks, self._contents = store, chunks, contents
        self._is_attached, self._warnings, self._pid = is_attached, warnings, pid
        self._upkeep, self._key_ends = upkeep, key_ends

    # ------------------------------------------------------------ status

    async def status(self, request: dict[str, Any]) -> dict[str, Any]:
        """The handler of `modelfs status`."""
        etcd, members = await self._etcd()
        nodes = self._nodes({member.name for member in members if not member.is_learner})
        copies = await self._count_copies()
        under_replicated = copies.lacking if copies else None
        told = self._upkeep()
        placement = self._mirror.latest_map
        ends = await trio.to_thread.run_sync(self._key_ends) if self._key_ends else None
        return {
            "cluster": {"id": self._identity.cluster, "name": self._identity.cluster_name},
            "node": {"id": self._identity.node, "name": self._config.name, "pid": self._pid},
            "mountpoint": str(self._config.mountpoint),
            "state_dir": str(self._config.state_dir),
            "version": __version__,
            "epoch": placement.epoch if placement else 0,
            "replicas": self._config.replicas,
            "nodes": nodes,
            "etcd": etcd,
            "files": self._mirror.file_count,
            "directories": self._mirror.directory_count,
            "bytes": self._mirror.file_bytes,
            "retained_versions": self._mirror.history.count,
            "chunks_under_replicated": under_replicated,
            "upkeep": told.get("upkeep", {}),
            "scrub": told.get("scrub", {}),
            "lost_chunks": told.get("lost_chunks", []),
            "damaged_files": copies.damaged[:DAMAGED_SHOWN_MAX] if copies else None,
            "damaged_file_count": len(copies.damaged) if copies else None,
            "limits": self._limits(),
            "certificate_ends_at": ends[0] if ends else None,
            "authority_ends_at": ends[1] if ends else None,
            "unreadable_records": [
                {"key": key.decode(errors="backslashreplace"), "reason": reason}
                for key, (reason, _) in islice(
                    self._mirror.unreadable.items(), UNREADABLE_SHOWN_MAX
                )
            ],
            "warnings": [
                *self._warnings(),
                *self._judge(nodes, members, under_replicated, etcd),
                *_judge_damage(copies, told.get("lost_chunks", [])),
                *(judge_keys(*ends, time.time()) if ends else ()),
            ],
        }

    def _limits(self) -> list[str]:
        """What programs may expect of a file system and do not get on this mount."""
        options = self._config.options
        limits = ["flock and fcntl locks hold between processes of one node only"]
        if not options.xattr:
            limits.append("no extended attributes (mount every node with -o xattr to have them)")
        if not options.relatime:
            limits.append("reading does not move atime (-o relatime)")
        return limits

    def _nodes(self, voters: set[str]) -> list[dict[str, Any]]:
        placement = self._mirror.latest_map
        members = {member.id: member for member in placement.members} if placement else {}
        rows = []
        for node in sorted({*members, *self._mirror.nodes}):
            record, member = self._mirror.nodes.get(node), members.get(node)
            rows.append(
                {
                    "id": node,
                    "name": record.name if record else member.name if member else node,
                    "address": f"{record.host}:{record.port}" if record else "",
                    "zone": record.zone if record else member.zone if member else "",
                    "up": record is not None,
                    "self": node == self._identity.node,
                    "voter": node in voters,
                    "capacity_bytes": record.capacity_bytes if record else 0,
                    "used_bytes": record.used_bytes if record else 0,
                    "version": record.software if record else "",
                }
            )
        return sorted(rows, key=lambda row: str(row["name"]))

    async def _etcd(self) -> tuple[dict[str, Any], tuple[MemberInfo, ...]]:
        answer: dict[str, Any] = {
            "healthy": False,
            "endpoints": list(self._store.endpoints),
            "members": [],
            "db_bytes": 0,
            "quota_bytes": DB_QUOTA_BYTES,
            "error": "",
        }
        try:
            with trio.fail_after(ETCD_SECONDS):
                members = await self._store.members()
        except (ModelfsError, trio.TooSlowError) as error:
            answer["error"] = str(error) or "no answer"
            return answer, ()
        async with trio.open_nursery() as nursery:
            for member in members:
                nursery.start_soon(self._ask_member, member, answer)
        answer["members"].sort(key=lambda row: row["name"])
        answer["healthy"] = self._is_attached()
        return answer, members

    async def _ask_member(self, member: MemberInfo, answer: dict[str, Any]) -> None:
        is_healthy = False
        if member.client_endpoints:
            try:
                with trio.fail_after(ETCD_SECONDS):
                    told = await self._store.member_status(member.client_endpoints[0])
                is_healthy = bool(told.leader)
                answer["db_bytes"] = max(answer["db_bytes"], told.database_bytes)
            except (ModelfsError, trio.TooSlowError):
                is_healthy = False
        name = NodeId(member.name)
        answer["members"].append(
            {
                "name": self._chunks.name_of(name) if name else "(not started)",
                "address": member.client_endpoints[0] if member.client_endpoints else "",
                "learner": member.is_learner,
                "healthy": is_healthy,
            }
        )

    def _judge(
        self,
        nodes: list[dict[str, Any]],
        members: tuple[MemberInfo, ...],
        under_replicated: int | None,
        etcd: dict[str, Any],
    ) -> list[str]:
        warnings = []
        voters = sum(not member.is_learner for member in members)
        if voters == 2:
            warnings.append(
                "etcd has two voters: the loss of either makes the cluster read-only; "
                "a third node ends that"
            )
        up = sum(bool(node["up"]) for node in nodes)
        if up < self._config.replicas:
            warnings.append(
                f"{up} of the {self._config.replicas} nodes that replicas need are up: "
                "files have fewer copies until more nodes join"
            )
        warnings += [f"node {node['name']} is down" for node in nodes if not node["up"]]
        warnings += [
            f"node {node['name']} is {node['used_bytes'] * 100 // node['capacity_bytes']} % full"
            for node in nodes
            if node["capacity_bytes"] and node["used_bytes"] > 0.9 * node["capacity_bytes"]
        ]
        etcd_bytes = etcd["db_bytes"]
        if etcd_bytes > 0.8 * DB_QUOTA_BYTES:
            warnings.append(
                f"etcd holds {etcd_bytes * 100 // DB_QUOTA_BYTES} % of what it may: remove files, "
                "or keep fewer versions (modelfs policy / --retain), before nothing can be made"
            )
        if self._mirror.unreadable:
            warnings.append(
                f"{len(self._mirror.unreadable)} records in etcd cannot be read: what they are "
                "about answers EIO, and no space is given back until they are restored or deleted"
            )
        if under_replicated:
            warnings.append(f"{under_replicated} chunks have too few copies on living nodes")
        return warnings

    # ------------------------------------------------------------ replicas

    async def _count_copies(self) -> _Copies | None:
        """Of the current versions; None: there are too many to count."""
        if self._mirror.file_count > FILES_COUNTED_MAX:
            return None
        wanted: dict[ChunkId, int] = {}
        damaged: set[InodeNumber] = set()
        for ino in self._mirror.inode_numbers():
            record = self._mirror.readable_inode(ino)
            if record is None or record.manifest is None:
                continue
            try:
                for chunk in await self._chunks_of(record):
                    wanted[chunk] = max(wanted.get(chunk, 0), record.replicas)
            except ModelfsError:
                wanted[ChunkId(record.manifest.id)] = record.replicas + 1  # its manifest is gone
                damaged.add(ino)
        holders = await ask_holders(self._chunks, list(wanted))
        copies = dict(zip(wanted, holders.counts(), strict=True))
        if gone := {chunk for chunk, count in copies.items() if not count}:
            damaged |= await self._files_with(gone)
        paths = [path for ino in sorted(damaged) for path in paths_of(self._mirror, ino)]
        return _Copies(sum(copies[chunk] < wanted[chunk] for chunk in wanted), paths)

    async def _files_with(self, chunks: set[ChunkId]) -> set[InodeNumber]:
        """The files of whose current versions these chunks are."""
        found = set()
        for ino in self._mirror.inode_numbers():
            record = self._mirror.readable_inode(ino)
            if record is not None and record.manifest is not None:
                with suppress(ModelfsError):  # a manifest that is gone has been noted before
                    if not chunks.isdisjoint(await self._chunks_of(record)):
                        found.add(ino)
        return found

    async def _chunks_of(self, record: Inode) -> list[ChunkId]:
        """The chunks of a file and of its manifest."""
        assert record.manifest is not None
        manifest = await self._contents.manifest(record)
        entries = await self._contents.all_entries(record)
        pages = [placed.ref.id for placed in manifest.own_chunks()]
        return [ChunkId(record.manifest.id), *pages, *(ChunkId(n) for n in _names(entries) if n)]

    # ------------------------------------------------------------ info

    async def info(self, request: dict[str, Any]) -> dict[str, Any]:
        """The handler of `modelfs info PATH`; `path` is a list of names."""
        names = names_of(request)
        await self._namespace.fresh()
        ino, record = find(self._mirror, names)
        entries = await self._contents.all_entries(record)
        chunks = [ChunkId(name) for name in _names(entries)]
        holders = await ask_holders(self._chunks, [chunk for chunk in chunks if chunk])
        placed = [index for index, chunk in enumerate(chunks) if chunk]
        return {
            "path": path_text(names),
            "ino": ino,
            "version": record.version,
            "type": TYPES.get(record.kind, "unknown"),
            "size": record.size,
            "chunk_bytes": record.chunk_bytes,
            "chunk_count": len(chunks),
            "replicas": record.replicas,
            "epoch": record.manifest.epoch if record.manifest else 0,
            "manifest": record.manifest.id.hex() if record.manifest else "",
            "inline": record.inline is not None,
            "nodes": [
                self._holder(node, record, [i for i, has in zip(placed, have, strict=True) if has])
                for node, have in holders.answers.items()
            ],
            "under_replicated": sum(count < record.replicas for count in holders.counts()),
        }

    def _holder(self, node: NodeId, record: Inode, held: list[int]) -> dict[str, Any]:
        sizes = (
            min(size, record.size - start)
            for start, size in (span(record.chunk_bytes, index) for index in held)
        )
        return {
            "id": node,
            "name": self._chunks.name_of(node),
            "up": node in self._mirror.nodes,
            "chunks": _runs(held),
            "chunk_count": len(held),
            "bytes": sum(sizes),
        }


def _judge_damage(copies: _Copies | None, lost: list[dict[str, Any]]) -> list[str]:
    if copies is not None and copies.damaged:
        return [
            f"{len(copies.damaged)} files cannot be read whole: of some chunk of theirs no living "
            "node has a copy; `modelfs fsck` says which ranges"
        ]
    if lost:
        return [f"{len(lost)} chunks that were bad on this node cannot be restored"]
    return []


def judge_keys(certificate_ends_at: float, authority_ends_at: float, now: float) -> list[str]:
    """What to warn of. Certificates are renewed with a third of their life left (`pki`)."""
    warnings = []
    days = (certificate_ends_at - now) / DAY_SECONDS
    if days < CERTIFICATE_DAYS_WARN:
        warnings.append(
            f"this node's certificate ends in {days:.0f} days and should have been renewed: its "
            "log says why it was not; without one, no other node will talk to it"
        )
    days = (authority_ends_at - now) / DAY_SECONDS
    if days < AUTHORITY_DAYS_WARN:
        warnings.append(
            f"the cluster's authority ends in {days:.0f} days: replace it with `modelfs ca rotate`"
        )
    return warnings


def _names(entries: Entries) -> list[bytes]:
    """The chunk names of a manifest; b"" for holes."""
    raw = np.ascontiguousarray(entries["id"]).tobytes()
    names = (raw[start : start + 32] for start in range(0, len(raw), 32))
    return [b"" if name == HOLE else name for name in names]


def _runs(numbers: Iterable[int]) -> list[list[int]]:
    """Sorted numbers as runs: [0, 1, 2, 5] becomes [[0, 2], [5, 5]]."""
    runs = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in group]
        runs.append([members[0], members[-1]])
    return runs
