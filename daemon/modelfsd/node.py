"""The composition root: builds every part of a node, starts them in order, and stops them.

Nothing else knows everybody. The parts, from the outside in:

    kernel → operations → tree, files → namespace, writer, contents → chunks, replicator
                                          ↓                             ↓
                                        etcd (store, feed)        disk and peers

Start: enter the cluster, load the namespace, serve peers, register, mount, say ready. Stop, in
reverse: unmount (which brings every dirty page), commit what is left, withdraw, stop etcd.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Callable
from typing import Any

import trio

from modelfs.errors import ModelfsError, UserError
from modelfs.ids import ROOT_INODE
from modelfs.mirror import NodeChanged
from modelfs.policy import Rules
from modelfsd.cluster.announcements import Announcement
from modelfsd.cluster.bootstrap import Bootstrap, Entered
from modelfsd.cluster.discovery import Discovery
from modelfsd.cluster.etcd_addresses import EtcdAddresses
from modelfsd.cluster.membership import Membership, Self
from modelfsd.cluster.removal import Removal
from modelfsd.commands.control import ControlServer
from modelfsd.commands.fsck_service import FsckService
from modelfsd.commands.measures import Measures
from modelfsd.commands.pages import serve_pages
from modelfsd.commands.scrub_service import ScrubService
from modelfsd.commands.status import Status
from modelfsd.config import Config
from modelfsd.kernel.access_times import AccessTimes
from modelfsd.kernel.cache_drop import CacheDrop
from modelfsd.kernel.files import Files
from modelfsd.kernel.kernel_cache import KernelCache
from modelfsd.kernel.kernel_inodes import KernelInodes
from modelfsd.kernel.mount import FuseMount
from modelfsd.kernel.notifier import Notifier
from modelfsd.kernel.operations import Operations
from modelfsd.kernel.pusher import Pusher
from modelfsd.kernel.space import Space
from modelfsd.kernel.tree import Tree
from modelfsd.memory import keep_heap, read_memory_bytes
from modelfsd.metadata.feed import Feed, load_namespace
from modelfsd.metadata.group_commit import GroupCommit
from modelfsd.metadata.history import History
from modelfsd.metadata.leases import Leases
from modelfsd.metadata.namespace import Namespace
from modelfsd.metadata.policies import Policies
from modelfsd.metadata.replica_file import ReplicaFile
from modelfsd.metadata.retention import Retention
from modelfsd.mounts import MountBusy
from modelfsd.peers.client import PeerClient, ask_member
from modelfsd.peers.server import PeerServer
from modelfsd.storage.chunks import Chunks
from modelfsd.storage.contents import Contents
from modelfsd.storage.disk import DiskChunkStore
from modelfsd.storage.repairer import Repairer
from modelfsd.storage.replicator import Replicator
from modelfsd.storage.upkeep import Upkeep, UpkeepParts
from modelfsd.trust.admission import Admission
from modelfsd.trust.rotation import Rotation
from modelfsd.trust.security import Security
from modelfsd.trust.tls import Tls
from modelfsd.writing.recovery_service import RecoveryService
from modelfsd.writing.writer import Writer

log = logging.getLogger(__name__)

CACHE_SHARE = 10  # of the free space, where --cache-size is not given

Ready = Callable[[str], None]


def run_node(config: Config, ready: Ready) -> None:
    """Be a node until it is unmounted or told to stop. Blocks.

    Calls `ready` with a line for the user once the mount answers. Raises `UserError` if the start
    fails for a reason that the user can mend.
    """
    keep_heap()
    failure = trio.run(_guarded, config, ready, strict_exception_groups=True)
    if failure is not None:
        raise failure


async def _guarded(config: Config, ready: Ready) -> ModelfsError | None:
    """Run the node; the error that ended it, out of whatever groups nurseries wrapped it in."""
    failures: list[ModelfsError] = []
    try:
        await _run(config, ready)
    except* ModelfsError as group:
        failures.append(_first(group))
    return failures[0] if failures else None


def _first(group: BaseExceptionGroup[ModelfsError]) -> ModelfsError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


async def _run(config: Config, ready: Ready) -> None:
    async with Discovery(config.listen[0]) as discovery:
        entered = await Bootstrap(config, discovery, ask_member).enter()
        try:
            async with entered.store, trio.open_nursery() as nursery:
                if entered.member is not None:
                    nursery.start_soon(entered.member.run)
                node = Node(config, entered, discovery, nursery)
                try:
                    await node.run(ready)
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            if entered.member is not None:
                await entered.member.stop()
            log.info("stopped")


class Node:
    """A node in its cluster, from registration to withdrawal."""

    def __init__(
        self, config: Config, entered: Entered, discovery: Discovery, nursery: trio.Nursery
    ) -> None:
        self._config, self._identity = config, entered.identity
        self._store, self._member, self._discovery = entered.store, entered.member, discovery
        self._tls = Tls(entered.keys, entered.identity.party, entered.identity.data_tls)
        self._nursery, self._is_etcd_ours = nursery, not config.etcd
        self._warnings: list[str] = []
        path = config.state_dir / "namespace.sqlite"
        self._replica = ReplicaFile(path, entered.identity.cluster)
        self._feed = Feed(self._store, self._replica)
        group = self._group = GroupCommit(self._store, nursery.start_soon)
        defaults = Rules(config.replicas, config.retain_seconds)
        self._namespace = Namespace(group, self._feed, entered.identity.node, defaults)
        self._retention = Retention(self._namespace, self._store)

    async def run(self, ready: Ready) -> None:
        """Start everything, serve until unmounted, stop everything."""
        try:
            await load_namespace(self._feed)
            await self._build_data_path()
            self._build_kernel_side()
            self._server.start(*self._config.listen)
            try:
                self._nursery.start_soon(self._feed.run)
                self._nursery.start_soon(self._repairer.run, self._chunks)
                self._nursery.start_soon(self._security.run)
                await self._membership.keep_registered(self._nursery.start_soon)
                self._nursery.start_soon(self._upkeep.run)
                self._nursery.start_soon(self._retention.run)
                await self._serve(ready)
                await self._membership.leave()
            finally:
                await trio.to_thread.run_sync(self._server.stop)
                self._peers.close()
        finally:
            self._replica.close()

    async def _build_data_path(self) -> None:
        """Chunks: on this node's disk, on the peers', and the way between."""
        config, identity = self._config, self._identity
        self._disk = await trio.to_thread.run_sync(
            DiskChunkStore, config.state_dir / "chunks", _cache_bytes(config)
        )
        self._repairer = Repairer()
        self._peers = PeerClient(self._tls, config.name)
        self._chunks = Chunks(
            identity.node,
            self._feed.mirror,
            self._disk,
            self._peers,
            self._repairer.report,
            self._nursery.start_soon,
        )
        self._contents = Contents(self._chunks, read_memory_bytes(), self._nursery.start_soon)
        self._admission = Admission(
            identity,
            self._tls.keys,
            self._store,
            self._feed.mirror,
            config.listen,
            lambda: self._store.endpoints,
        )
        self._server = PeerServer(
            self._disk,
            self._tls,
            config.name,
            self._admission.info,
            self._admission.admit,
            self._repairer.report_from_thread,
        )
        etcd = self._store, self._member, self._is_etcd_ours, self._feed.mirror
        self._security = Security(
            self._tls, config.listen[0], config.state_dir, *etcd, self._server, self._peers
        )
        if self._is_etcd_ours:
            known = EtcdAddresses(config.state_dir, identity, self._store, self._feed.mirror)
            self._feed.listen(known.on_changes)

    def _build_kernel_side(self) -> None:
        """The mount and what answers it, and the listeners that keep both true to the mirror."""
        config, namespace, mirror = self._config, self._namespace, self._feed.mirror
        start_soon = self._nursery.start_soon
        notifier = Notifier()
        inodes = self._inodes = KernelInodes(namespace.require(ROOT_INODE))
        cache = KernelCache(inodes, namespace, notifier)
        leases = Leases(namespace, config.lock_wait_seconds, start_soon)
        replicator = Replicator(self._chunks)
        self._writer = Writer(
            namespace,
            leases,
            self._contents,
            replicator,
            cache,
            config.state_dir,
            start_soon,
        )
        tree = Tree(namespace, cache)
        self._pusher = Pusher(inodes)
        self._files = Files(namespace, cache, tree, self._contents, self._writer, self._pusher)
        space, xattr = Space(mirror, config.replicas), config.options.xattr
        times = AccessTimes(namespace, config.options.relatime, start_soon)
        self._operations = Operations(mirror, inodes, tree, self._files, space, xattr, times)
        self._mount = FuseMount(config, self._operations, (notifier, self._pusher))
        self._drop = CacheDrop(self._disk.drop_cached, self._contents, inodes, notifier)
        endpoint = self._member.client_endpoint if self._member else ""
        grace = config.reclaim_grace_seconds
        node = self._identity.node
        myself = Self(node, config.name, *config.listen, config.zone, endpoint, grace)
        self._membership = Membership(
            myself, self._store, namespace, leases, self._peers, self._disk.usage
        )
        sessions = self._writer.open_sessions
        parts = UpkeepParts(
            self._feed,
            namespace,
            self._chunks,
            replicator,
            inodes,
            leases,
            lambda: [session.copy for session in sessions],
            self._writer.lost_dir,
        )
        retained = (self._retention.retained,)
        self._upkeep = Upkeep(
            parts, grace, config.down_out_seconds, retained, config.scrub_every_seconds
        )
        self._repairer.on_failure = self._upkeep.restorer.report
        watchers = (self._security, cache, leases, self._membership, self._upkeep, self._retention)
        for listener in watchers:
            self._feed.listen(listener.on_changes)
        self._membership.on_changes([NodeChanged(n, r) for n, r in mirror.nodes.items()])
        self._status = Status(
            config,
            self._identity,
            namespace,
            self._store,
            self._chunks,
            self._contents,
            lambda: self._feed.is_attached,
            lambda: self._warnings,
            os.getpid(),
            self._upkeep.told,
            self._tls.keys.ends,
        )
        if kept := self._writer.keep_leftovers():
            lost_dir = self._writer.lost_dir
            log.warning("%d files that were not committed are kept in %s", kept, lost_dir)

    # ------------------------------------------------------------ mounted

    async def _serve(self, ready: Ready) -> None:
        """Mount, and answer the kernel until the mount is gone."""
        mountpoint = self._config.mountpoint
        history = History(self._writer, self._store, self._chunks.name_of, mountpoint)
        removal = Removal(self._namespace, self._store, self._identity.node, self._is_etcd_ours)
        rotation = Rotation(self._identity, self._tls.keys, self._store, self._feed.mirror)
        handlers = {
            "status": self._status.status,
            "info": self._status.info,
            "drop": self._drop.drop,
            "stop": self._stop,
            "token": self._admission.token,
            "remove": removal.remove,
            "rotate": rotation.rotate,
            "versions": history.versions,
            "restore": history.restore,
            "policy": Policies(self._namespace).policy,
            **RecoveryService(self._writer, self._chunks).handlers(),
        }
        counting = self._operations, self._files, self._writer, self._peers, self._server
        measures = Measures(self._config.name, *counting, self._pusher, self._group, self._upkeep)
        pages = {"/metrics": measures.page}
        scrubs = ScrubService(self._config.name, self._upkeep.scrubber, self._upkeep.scrub_rounds)
        replicator, restorer = self._writer.replicator, self._upkeep.restorer
        checks = FsckService(mountpoint, self._namespace, self._store, replicator, restorer)
        control = ControlServer(
            self._config.control_path,
            {**handlers, **measures.handlers()},
            pages,
            {"scrub": scrubs.scrub, "fsck": checks.fsck},
        )
        self._mount.open()
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(control.serve)
                if self._config.metrics_listen is not None:
                    await nursery.start(serve_pages, self._config.metrics_listen, pages)
                nursery.start_soon(self._watch_signals)
                nursery.start_soon(self._announce_ready, ready)
                await self._mount.serve()
                log.info("unmounted")
                await self._files.settle()
                nursery.cancel_scope.cancel()
        finally:
            self._mount.close()

    async def _announce_ready(self, ready: Ready) -> None:
        if not_set := await self._mount.tune():
            text = ", ".join(not_set)
            log.info("running without root: some kernel settings stay as they are (%s)", text)
            self._warnings.append(
                f"kernel settings could not be raised ({text}): parallel reads are slower"
            )
        config, identity = self._config, self._identity
        await self._discovery.announce(
            Announcement(
                identity.node,
                identity.cluster,
                identity.cluster_name,
                config.listen[1],
                config.etcd_client_port if self._member else 0,
                config.zone,
                int(identity.founded_at * 1000),
            )
        )
        log.info("mounted %s: cluster %s", config.mountpoint, identity.cluster_name)
        ready(f"node {config.name} of the cluster {identity.cluster_name}")

    async def _stop(self, request: dict[str, Any]) -> dict[str, Any]:
        """The handler of `modelfs umount`. Refuses while the mount is in use."""
        await self._mount.unmount()
        return {}

    async def _watch_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                log.info("stopping: %s", signal.Signals(number).name)
                self._nursery.start_soon(self._unmount_for_signal)

    async def _unmount_for_signal(self) -> None:
        try:
            try:
                await self._mount.unmount()
            except MountBusy:
                log.warning("the mount is in use: taking it away from its users")
                await self._mount.write_back(self._writer.open_paths())
                await self._mount.detach()
        except (UserError, OSError) as error:  # the node goes on: what it holds must not be lost
            log.error("%s", error)


def _cache_bytes(config: Config) -> int:
    if config.cache_size is not None:
        return config.cache_size
    return shutil.disk_usage(config.state_dir).free // CACHE_SHARE
