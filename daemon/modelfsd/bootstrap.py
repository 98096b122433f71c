"""Entering a cluster: coming back to ours, joining one that is there, or founding one.

In this order: a node that has a cluster returns to it; `--new-cluster` founds one; `--etcd` and
`--peer` say where one is; else zeroconf is asked. Only when nobody answers is a cluster founded
without being asked for. What a stranger says (zeroconf, the info of a peer) is a hint: membership
is what etcd says, and the cluster's own record there is compared with what we remember.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import trio

from modelfs import keys
from modelfs.errors import (
    MetadataUnavailable,
    MetadataUncertain,
    PeerUnavailable,
    ProtocolError,
    UserError,
)
from modelfs.ids import ROOT_INODE, ClusterId, Revision, is_node_id
from modelfs.inode import Inode, encode
from modelfs.ports import Compare, Put, Target, Txn
from modelfsd import identity as identities
from modelfsd.addresses import HostPort
from modelfsd.config import Config
from modelfsd.discovery import Discovery, Found
from modelfsd.etcd import EtcdStore
from modelfsd.etcd_join import Role, wanted_role
from modelfsd.etcd_member import EtcdMember, Standing
from modelfsd.identity import Identity

log = logging.getLogger(__name__)

FORMAT = 1  # of the records in etcd
BROWSE_SECONDS = 3.0  # zeroconf answers within 1.6 s on a quiet network
PEER_SECONDS = 30.0  # for a node named with --peer to answer: it may be starting as well
REACH_SECONDS = 60.0  # for our own cluster's etcd to answer at a start, before we serve a copy
CLOCK_SKEW_SECONDS_MAX = 300.0
RETRY_SECONDS = 0.5

FetchInfo = Callable[[str, int], Awaitable[dict[str, Any]]]


class ClusterRecord(msgspec.Struct, array_like=True, frozen=True):
    """The key `cluster`: who the keys around it belong to."""

    id: str
    name: str
    format: int
    founded_at: float


@dataclass(slots=True)
class Entered:
    """A node in its cluster. `member` is None where etcd is not ours or this node is a client."""

    identity: Identity
    store: EtcdStore
    member: EtcdMember | None


def info_for_strangers(identity: Identity, endpoints: tuple[str, ...]) -> dict[str, Any]:
    """What a node that wants to join may know."""
    return {
        "cluster": identity.cluster,
        "cluster_name": identity.cluster_name,
        "node": identity.node,
        "endpoints": list(endpoints),
        "format": FORMAT,
        "time": time.time(),
    }


class Bootstrap:
    """One attempt to enter a cluster. The caller closes what `Entered` holds."""

    def __init__(self, config: Config, discovery: Discovery, fetch_info: FetchInfo) -> None:
        self._config, self._discovery, self._fetch_info = config, discovery, fetch_info
        self._identity = identities.load(config.state_dir)

    @property
    def identity(self) -> Identity:
        """This node, as far as it is known."""
        return self._identity

    async def enter(self) -> Entered:
        """Raises `UserError` if the user must decide, `MetadataUnavailable` if nobody answers."""
        self._check_request()
        if self._config.etcd:
            return await self._enter_external()
        if self._identity.cluster:
            return await self._return()
        if self._config.new_cluster is not None:
            return await self._found(self._config.new_cluster)
        if self._config.peers:
            return await self._join(await self._ask_peers())
        log.info("looking for a cluster on this network")
        found = await self._discovery.browse_for(BROWSE_SECONDS, until=None)
        clusters = {node.cluster: node for node in found}
        if not clusters:
            return await self._found(f"{self._config.name}-models")
        if len(clusters) > 1:
            raise UserError(self._choice_text(list(clusters.values())))
        return await self._join(await self._ask([(n.host, n.port) for n in found]))

    def _check_request(self) -> None:
        name, ours = self._config.new_cluster, self._identity.cluster_name
        if name is not None and self._identity.cluster and name != ours:
            raise UserError(
                f"{self._config.state_dir} belongs to the cluster {ours}: to found {name} "
                "give another --state-dir, or move this one away"
            )

    @staticmethod
    def _choice_text(clusters: list[Found]) -> str:
        rows = "\n".join(f"  {c.cluster_name}: --peer {c.host}:{c.port}" for c in clusters)
        return f"several clusters are announced on this network; say which to join:\n{rows}"

    # ------------------------------------------------------------ an etcd of our own

    async def _found(self, name: str) -> Entered:
        log.info("founding the cluster %s", name)
        member = self._new_member()
        try:
            await member.found()
            store = EtcdStore([member.client_endpoint])
            record = await self._found_in(store, name)
        except BaseException:
            await member.stop()
            raise
        self._remember(record, (member.client_endpoint,))
        return Entered(self._identity, store, member)

    async def _join(self, info: dict[str, Any]) -> Entered:
        endpoints = tuple(info["endpoints"])
        log.info("joining the cluster %s", info["cluster_name"])
        store = EtcdStore(endpoints)
        record = await self._cluster_record(store)
        if record is None or record.id != info["cluster"]:
            raise UserError(
                f"etcd at {', '.join(endpoints)} does not hold the cluster {info['cluster_name']}: "
                "start its nodes first"
            )
        self._remember(record, endpoints)
        return Entered(self._identity, store, await self._become_voter(store))

    async def _return(self) -> Entered:
        member = self._new_member()
        log.info("returning to the cluster %s", self._identity.cluster_name)
        if member.standing is Standing.MEMBER:
            try:
                await member.resume()
            except BaseException:
                await member.stop()
                raise
            known = [e for e in self._identity.endpoints if e != member.client_endpoint]
            return Entered(self._identity, EtcdStore([member.client_endpoint, *known]), member)
        store = EtcdStore(self._identity.endpoints)
        with trio.move_on_after(REACH_SECONDS):
            await self._find_again(store)
            return Entered(self._identity, store, await self._become_voter(store))
        log.warning("etcd does not answer: serving what this node knew last")
        return Entered(self._identity, store, None)

    async def _find_again(self, store: EtcdStore) -> None:
        """Wait for our cluster's etcd, under the addresses we knew or new ones."""
        while True:
            try:
                record = await self._cluster_record(store)
            except MetadataUnavailable:
                record = None
            if record is not None and record.id == self._identity.cluster:
                return
            ours = [n for n in self._discovery.snapshot() if n.cluster == self._identity.cluster]
            for host, port in [*self._config.peers, *((n.host, n.port) for n in ours)]:
                info = await self._info_of(host, port)
                if info is not None and info["cluster"] == self._identity.cluster:
                    store.set_endpoints(info["endpoints"])
            await trio.sleep(RETRY_SECONDS)

    async def _become_voter(self, store: EtcdStore) -> EtcdMember | None:
        """Join etcd if it has room for a voter. A failure leaves the node a client."""
        member = self._new_member()
        try:
            members = await store.members()
            if wanted_role(members, self._identity.node, member.peer_url) is Role.CLIENT:
                return None
            log.info("joining etcd as a voter")
            await member.join(store)
        except (MetadataUnavailable, MetadataUncertain) as error:
            log.warning("this node could not become a voter of etcd: %s", error)
            await member.stop()
            return None
        except BaseException:
            await member.stop()
            raise
        store.set_endpoints([member.client_endpoint, *store.endpoints])
        return member

    def _new_member(self) -> EtcdMember:
        config = self._config
        return EtcdMember(
            config.state_dir,
            self._identity.node,
            config.listen[0],
            config.etcd_client_port,
            config.etcd_peer_port,
        )

    # ------------------------------------------------------------ somebody else's etcd

    async def _enter_external(self) -> Entered:
        store = EtcdStore(self._config.etcd)
        endpoints = ", ".join(self._config.etcd)
        try:
            record = await self._cluster_record(store)
        except MetadataUnavailable as error:
            if self._identity.cluster:
                log.warning("etcd does not answer: serving what this node knew last")
                return Entered(self._identity, store, None)
            raise UserError(f"etcd at {endpoints} does not answer: {error}") from error
        if record is None:
            if self._identity.cluster:
                raise UserError(
                    f"etcd at {endpoints} holds no cluster, but {self._config.state_dir} belongs "
                    f"to {self._identity.cluster_name}: give that cluster's etcd"
                )
            name = self._config.new_cluster or f"{self._config.name}-models"
            record = await self._found_in(store, name)
        elif self._config.new_cluster not in (None, record.name):
            raise UserError(
                f"etcd at {endpoints} holds the cluster {record.name} already: "
                "join it by leaving out --new-cluster"
            )
        if self._identity.cluster and record.id != self._identity.cluster:
            raise UserError(
                f"{self._config.state_dir} belongs to the cluster {self._identity.cluster_name}, "
                f"and etcd at {endpoints} holds {record.name}: give another --state-dir"
            )
        self._remember(record, self._config.etcd)
        return Entered(self._identity, store, None)

    # ------------------------------------------------------------ the cluster's record

    async def _found_in(self, store: EtcdStore, name: str) -> ClusterRecord:
        """Write the cluster's record and its root directory, unless somebody was faster."""
        record = ClusterRecord(identities.new_cluster_id(), name, FORMAT, time.time())
        now_ns = time.time_ns()
        root = Inode(mode=0o40755, uid=0, gid=0, atime_ns=now_ns, mtime_ns=now_ns, ctime_ns=now_ns)
        absent = Compare(keys.CLUSTER, Target.CREATE, Revision(0))
        puts = (
            Put(keys.CLUSTER, msgspec.msgpack.encode(record)),
            Put(keys.inode(ROOT_INODE), encode(root)),
            Put(keys.SEQ, b"founding"),
        )
        try:
            await store.commit(Txn((absent,), puts))
        except MetadataUncertain as error:
            log.info("asking etcd again: %s", error)
            await store.commit(Txn((absent,), puts))
        found = await self._cluster_record(store)
        assert found is not None
        return found

    @staticmethod
    async def _cluster_record(store: EtcdStore) -> ClusterRecord | None:
        row = await store.get(keys.CLUSTER)
        if row is None:
            return None
        try:
            record = msgspec.msgpack.decode(row.value, type=ClusterRecord)
        except (msgspec.MsgspecError, ValueError) as error:
            raise UserError(
                f"what etcd holds of a cluster is not a record of this version ({error}): install "
                "the version of the other nodes, or give another etcd"
            ) from error
        if record.format != FORMAT:
            raise UserError(
                f"the cluster {record.name} keeps its records in format {record.format}, this "
                f"version of modelfs knows {FORMAT}: install the version of the other nodes"
            )
        return record

    def _remember(self, record: ClusterRecord, endpoints: tuple[str, ...]) -> None:
        cluster = ClusterId(record.id)
        self._identity = self._identity.in_cluster(cluster, record.name, endpoints)
        identities.save(self._config.state_dir, self._identity)

    # ------------------------------------------------------------ asking nodes

    async def _ask_peers(self) -> dict[str, Any]:
        return await self._ask(list(self._config.peers))

    async def _ask(self, addresses: list[HostPort]) -> dict[str, Any]:
        """What the first node that answers says about its cluster."""
        with trio.move_on_after(PEER_SECONDS):
            while True:
                for host, port in addresses:
                    info = await self._info_of(host, port)
                    if info is not None:
                        return info
                await trio.sleep(RETRY_SECONDS)
        asked = ", ".join(f"{host}:{port}" for host, port in addresses)
        raise UserError(
            f"no modelfs node answers at {asked}: check the address and the firewall, or found a "
            "cluster of your own with --new-cluster NAME"
        )

    async def _info_of(self, host: str, port: int) -> dict[str, Any] | None:
        try:
            info = await self._fetch_info(host, port)
        except (PeerUnavailable, ProtocolError) as error:
            log.debug("%s:%d: %s", host, port, error)
            return None
        return _checked(info, f"{host}:{port}")


def _checked(info: dict[str, Any], where: str) -> dict[str, Any]:
    """An info that can be used. Raises `UserError` if the node does not fit to us."""
    if info.get("format") != FORMAT:
        raise UserError(
            f"the node at {where} keeps its records in format {info.get('format')}, this version "
            f"of modelfs knows {FORMAT}: install the same version on all nodes"
        )
    endpoints = info.get("endpoints")
    is_sane = (
        is_node_id(str(info.get("cluster")))
        and isinstance(endpoints, list)
        and 0 < len(endpoints) <= 64
        and all(isinstance(endpoint, str) and len(endpoint) <= 256 for endpoint in endpoints)
        and isinstance(info.get("time"), float)
    )
    if not is_sane:
        raise UserError(f"the node at {where} does not say how to join its cluster")
    skew_seconds = abs(info["time"] - time.time())
    if not skew_seconds <= CLOCK_SKEW_SECONDS_MAX:  # also what is not a number
        raise UserError(
            f"this machine's clock is {skew_seconds:.0f} s away from that of the node at {where}: "
            "set it (for example with chrony or systemd-timesyncd), file times depend on it"
        )
    return {**info, "cluster_name": str(info.get("cluster_name"))[:64]}
