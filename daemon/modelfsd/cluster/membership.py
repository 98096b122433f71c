"""This node among the others: its heartbeat, its place in the map, and where the others are.

The heartbeat is the node's lease in etcd, to which its `node/<id>` key and all its write leases are
bound. If it lapses (this node was paused or cut off), every write lease is lost with it, at once
and for the whole cluster; the node then registers again under a new lease.

A node that the latest placement map does not have, or has with another weight or zone, puts the
next epoch. Nodes stay in the map while they are down: their chunks are handed off, not forgotten.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import trio

from modelfs import __version__, keys
from modelfs.changes import Plan
from modelfs.errors import (
    MetadataUnavailable,
    MetadataUncertain,
    OutOfSpace,
    PeerUnavailable,
    ProtocolError,
    UserError,
)
from modelfs.ids import Epoch, NodeId, Revision
from modelfs.inode import NodeRecord, decode_node, encode
from modelfs.limits import GIB, NODE_LEASE_SECONDS
from modelfs.mirror import Change, Mirror, NodeChanged
from modelfs.placement import WEIGHT_MAX, Member, PlacementMap, make_map
from modelfs.ports import Compare, MetadataStore, Put, StoreUsage, Target, Txn
from modelfsd.metadata.leases import Leases
from modelfsd.metadata.namespace import Namespace
from modelfsd.peers.client import PeerClient

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = NODE_LEASE_SECONDS / 4
REPORT_SECONDS = 15.0  # between two updates of the node's record (space used)
LEAVE_SECONDS = 1.0  # to say goodbye; the last nodes of a cluster that stops have no quorum
WEIGHT_STEP = 0.2  # a capacity that changed by less is no reason to move chunks

UNAVAILABLE = (MetadataUnavailable, MetadataUncertain)
TAKES_NO_CHANGE = (*UNAVAILABLE, OutOfSpace)  # a full etcd can still be read


@dataclass(frozen=True, slots=True)
class Self:
    """What does not change about this node while it runs."""

    node: NodeId
    name: str
    host: str
    port: int
    zone: str
    etcd_endpoint: str  # "" if it runs no etcd
    reclaim_grace_seconds: float


class Membership:
    """Keeps this node registered, and the peers' addresses known."""

    def __init__(
        self,
        myself: Self,
        store: MetadataStore,
        namespace: Namespace,
        leases: Leases,
        peers: PeerClient,
        usage: Callable[[], StoreUsage],
    ) -> None:
        self._myself, self._store, self._namespace = myself, store, namespace
        self._leases, self._peers, self._usage = leases, peers, usage
        self._started_at = time.time()
        self._etcd_lease = 0

    # ------------------------------------------------------------ the others

    def on_changes(self, changes: list[Change]) -> None:
        """Take what the feed announces."""
        for change in changes:
            if not isinstance(change, NodeChanged) or change.node == self._myself.node:
                continue
            if change.record is None:
                log.warning("node %s is gone: no heartbeat", self._name_of(change.node))
            else:
                self._peers.set_address(change.node, change.record.host, change.record.port)

    def _name_of(self, node: NodeId) -> str:
        placement = self._namespace.mirror.latest_map
        member = placement.member(node) if placement else None
        return member.name if member else node

    # ------------------------------------------------------------ this node

    async def register(self) -> None:
        """Announce this node in etcd and take its place in the map."""
        await self._refuse_a_twin()
        # The mirror may come from a file that lacks the last moments of our earlier run.
        await self._namespace.reached(await self._renew_registration())
        for ino, token in self._namespace.mirror.leases_of(self._myself.node):
            await self._leases.drop(ino, token)  # of an earlier run of this node
        await self._namespace.change(self._plan_map)

    async def keep_registered(self, start_soon: Callable[..., None]) -> None:
        """Register, or if etcd does not answer now, go on trying while reads are served."""
        try:
            await self.register()
        except TAKES_NO_CHANGE as error:
            log.warning(
                "starting without etcd (%s): reads only, of what this node knew last", error
            )
            start_soon(self._register_later)
            return
        start_soon(self.run)

    async def _register_later(self) -> None:
        while True:
            await trio.sleep(1)
            try:
                await self.register()
            except TAKES_NO_CHANGE as error:
                log.debug("still no etcd: %s", error)
                continue
            log.info("etcd is back: this node is registered")
            return await self.run()

    async def _refuse_a_twin(self) -> None:
        """A copied state directory would give two machines one id."""
        row = await self._store.get(keys.node(self._myself.node))
        if row is None:
            return
        try:
            other = decode_node(row.value)
        except ProtocolError as error:
            log.warning("this node's own record was damaged, and is put anew: %s", error)
            return
        if (other.host, other.port) == (self._myself.host, self._myself.port):
            return
        try:
            info = await self._peers.fetch_info(other.host, other.port)
        except PeerUnavailable:
            return  # that was us, at an address that we no longer have
        if info.get("node") == self._myself.node:
            raise UserError(
                f"a node with this state directory already runs at {other.host}:{other.port}: "
                "was it copied? Give this node a fresh --state-dir"
            )

    async def _renew_registration(self) -> Revision:
        """Register under a new lease of etcd. It is ours once our record is bound to it.

        Until then the old one counts, whose heartbeat fails: so all of it is done again.
        """
        etcd_lease = await self._store.grant(NODE_LEASE_SECONDS)
        revision = await self._report(etcd_lease)
        self._etcd_lease = self._leases.etcd_lease = etcd_lease
        return revision

    async def _report(self, etcd_lease: int) -> Revision:
        """Put our record. Blind: nobody else writes it."""
        usage = await trio.to_thread.run_sync(self._usage)
        record = NodeRecord(
            name=self._myself.name,
            host=self._myself.host,
            port=self._myself.port,
            zone=self._myself.zone,
            capacity_bytes=usage.owned_bytes + usage.cached_bytes + usage.free_bytes,
            used_bytes=usage.owned_bytes,
            free_bytes=usage.free_bytes + usage.cached_bytes,
            software=__version__,
            started_at=self._started_at,
            etcd_endpoint=self._myself.etcd_endpoint,
            reclaim_grace_seconds=self._myself.reclaim_grace_seconds,
        )
        put = Put(keys.node(self._myself.node), encode(record), etcd_lease)
        return (await self._store.commit(Txn((), (put,)))).revision

    def _plan_map(self, mirror: Mirror) -> Plan[Epoch]:
        usage = self._usage()
        capacity_bytes = usage.owned_bytes + usage.cached_bytes + usage.free_bytes
        weight = min(max(capacity_bytes / GIB, 0.001), WEIGHT_MAX)
        member = Member(self._myself.node, self._myself.name, weight, self._myself.zone)
        latest = mirror.latest_map
        if latest is None:
            placement = make_map(Epoch(1), [member])
        elif _is_placed(latest, member):
            return Plan(Txn((), ()), latest.epoch)
        else:
            placement = _joined(latest, member)
        key = keys.placement_map(placement.epoch)
        guard = Compare(key, Target.CREATE, Revision(0))
        log.info("taking this node's place in the placement map: epoch %d", placement.epoch)
        return Plan(Txn((guard,), (Put(key, placement.encode()),)), placement.epoch)

    async def run(self) -> None:
        """Keep the heartbeat going for ever."""
        next_report = trio.current_time() + REPORT_SECONDS
        while True:
            await trio.sleep(HEARTBEAT_SECONDS)
            try:
                if not await self._store.keep_alive(self._etcd_lease):
                    log.error("this node was away for too long: its leases have lapsed")
                    self._leases.lose_all("this node was cut off for too long")
                    await self._renew_registration()
                elif trio.current_time() >= next_report:
                    await self._report(self._etcd_lease)
                    next_report = trio.current_time() + REPORT_SECONDS
            except TAKES_NO_CHANGE as error:
                log.warning("etcd takes no heartbeat: %s", error)

    async def leave(self) -> None:
        """Say goodbye: the others need not wait for the heartbeat to fail."""
        try:
            with trio.fail_after(LEAVE_SECONDS):
                await self._store.revoke(self._etcd_lease)
        except (*UNAVAILABLE, trio.TooSlowError) as error:
            log.info("etcd could not be told that this node stops: %s", error or "no answer")


def _joined(placement: PlacementMap, member: Member) -> PlacementMap:
    """The next map, with this member. Raises UserError if there can be none."""
    try:
        return placement.with_member(member)
    except ValueError as error:
        raise UserError(
            f"the placement map has no room for this node: {error}. `modelfs status` on another "
            "node shows who is down; `modelfs node remove` takes out who will not come back"
        ) from error


def _is_placed(placement: PlacementMap, member: Member) -> bool:
    """Whether the map has this member as it is, but for a small change of capacity."""
    known = placement.member(member.id)
    if known is None or (known.name, known.zone) != (member.name, member.zone):
        return False
    return abs(known.weight - member.weight) <= WEIGHT_STEP * known.weight
