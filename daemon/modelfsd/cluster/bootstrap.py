"""Entering a cluster: coming back to ours, joining one with a token, or founding one.

In this order: a node that has a cluster returns to it; `--join` joins one; `--new-cluster` founds
one, and so does `--etcd` in an etcd that holds none; else zeroconf is asked, and only when it knows
of nobody is a cluster founded without being asked for (`founding`). What zeroconf says is a hint:
membership is a certificate, and the cluster's own record in etcd is compared with what we remember.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from modelfs.errors import (
    MetadataUnavailable,
    MetadataUncertain,
    PeerUnavailable,
    ProtocolError,
    UserError,
)
from modelfs.ids import ClusterId
from modelfsd.cluster.cluster_record import ClusterRecord, found_in, read_record
from modelfsd.cluster.discovery import Discovery
from modelfsd.cluster.founding import Claim, forget_founding, rival_of, settle_claim
from modelfsd.config import Config
from modelfsd.etcd.channel import Credentials
from modelfsd.etcd.join import Role, wanted_role
from modelfsd.etcd.member import EtcdMember
from modelfsd.etcd.store import EtcdStore
from modelfsd.etcd.tls import EtcdTls, outside_credentials
from modelfsd.trust import identity as identities
from modelfsd.trust import pki
from modelfsd.trust.identity import Identity
from modelfsd.trust.joining import (
    Applicant,
    Ask,
    Unreachable,
    Welcome,
    ask_all,
    ask_to_join,
    check_info,
)
from modelfsd.trust.keyring import KeyRing
from modelfsd.trust.pki import Party
from modelfsd.trust.tls import Tls
from modelfsd.trust.tokens import Token

log = logging.getLogger(__name__)

JOIN_SECONDS = 30.0  # for a member to answer: it may be starting as well
REACH_SECONDS = 60.0  # for our own cluster's etcd to answer at a start, before we serve a copy
RETRY_SECONDS = 0.5

FetchInfo = Callable[[Tls, str, int], Awaitable[dict[str, Any]]]


@dataclass(slots=True)
class Entered:
    """A node in its cluster. `member` is None where etcd is not ours or this node is a client."""

    identity: Identity
    keys: KeyRing
    store: EtcdStore
    member: EtcdMember | None


class Bootstrap:
    """One attempt to enter a cluster. The caller closes what `Entered` holds."""

    def __init__(
        self,
        config: Config,
        discovery: Discovery,
        fetch_info: FetchInfo,
        ask: Ask = ask_to_join,
    ) -> None:
        self._config, self._discovery = config, discovery
        self._fetch_info, self._ask = fetch_info, ask
        self._identity = identities.load(config.state_dir)
        self._keys = KeyRing(config.state_dir)

    @property
    def identity(self) -> Identity:
        """This node, as far as it is known."""
        return self._identity

    async def enter(self) -> Entered:
        """Raises `UserError` if the user must decide, `MetadataUnavailable` if nobody answers."""
        self._check_request()
        config = self._config
        if self._identity.cluster and not self._is_left_behind():
            self._certify()
            return await (self._enter_external() if config.etcd else self._return())
        if not self._identity.cluster:
            await forget_founding(config.state_dir, self._identity, self._keys)
        if config.join is not None:
            return await self._join(config.join)
        if config.etcd:
            return await self._enter_external()
        if config.new_cluster is not None:
            return await self._found(self._new_claim(config.new_cluster))
        if config.peers:
            raise UserError(
                "a new machine needs a token to get in: run `modelfs token` on a node of the "
                f"cluster, and here `modelfs mount {config.mountpoint} --join TOKEN`"
            )
        claim = self._new_claim(f"{config.name}-models")
        await settle_claim(claim, config, self._discovery)
        entered = await self._found(claim)
        if (rival := rival_of(claim, self._discovery)) is not None:
            await self._step_back(entered)
            raise rival
        return entered

    def _check_request(self) -> None:
        config, cluster, ours = self._config, self._identity.cluster, self._identity.cluster_name
        if config.new_cluster is not None and cluster and config.new_cluster != ours:
            raise UserError(
                f"{config.state_dir} belongs to the cluster {ours}: to found {config.new_cluster} "
                "give another --state-dir, or move this one away"
            )
        if config.join is not None and cluster not in ("", config.join.cluster):
            raise UserError(
                f"{config.state_dir} belongs to the cluster {ours}, and the join token is of "
                "another one: give another --state-dir, or move this one away"
            )
        if config.join is not None and config.new_cluster is not None:
            raise UserError("--join and --new-cluster: a node either joins a cluster or founds one")
        if identities.is_removed(config.state_dir):
            raise UserError(
                f"this node was removed from the cluster {ours}: move {config.state_dir} away "
                "and join as a new node with a token"
            )
        if config.data_tls not in (None, self._identity.data_tls) and cluster:
            raise UserError(
                "--data-tls is settled when a cluster is founded: this one has "
                f"it {'on' if self._identity.data_tls else 'off'}"
            )

    def _is_left_behind(self) -> bool:
        """Whether a token speaks of an authority that we have not heard of: it was replaced."""
        token = self._config.join
        if token is None or not self._keys.is_whole:
            return token is not None
        _, trusted = self._keys.load_authority()
        return token.fingerprint not in map(pki.fingerprint, trusted)

    def _new_claim(self, name: str) -> Claim:
        return Claim(self._identity.node, identities.new_cluster_id(), name, time.time())

    def _certify(self) -> None:
        """Make sure that our certificates hold, and name the address that we have now."""
        if not self._keys.is_whole:
            raise UserError(
                f"the keys of this node are missing from {self._keys.directory}: restore them, or "
                f"move {self._config.state_dir} away and join as a new node with a token"
            )
        self._keys.certify(self._identity.party, self._addresses, time.time())

    @property
    def _addresses(self) -> list[str]:
        return [self._config.listen[0].partition("%")[0]]

    # ------------------------------------------------------------ an etcd of our own

    async def _found(self, claim: Claim) -> Entered:
        log.info("founding the cluster %s", claim.name)
        self._make_authority(claim)
        member = self._new_member()
        try:
            await member.found()
            store = self._new_store([member.client_endpoint])
            record = await found_in(store, claim, self._config.data_tls)
        except BaseException:
            await member.stop()
            raise
        self._remember(record, (member.client_endpoint,))
        return self._entered(store, member)

    def _make_authority(self, claim: Claim) -> None:
        self._keys.remove()
        self._keys.found(claim.cluster, claim.founded_at)
        self._keys.certify(claim.party, self._addresses, claim.founded_at)

    async def _step_back(self, entered: Entered) -> None:
        """Undo the founding of a cluster that is empty yet; `forget_founding` goes on with it."""
        assert entered.member is not None
        await entered.member.stop()
        await entered.store.__aexit__(None, None, None)
        self._identity = Identity(self._identity.node)
        identities.save(self._config.state_dir, self._identity)
        await trio.to_thread.run_sync(entered.member.forget)
        self._keys.remove()

    async def _join(self, token: Token) -> Entered:
        """Become a member, then enter as one."""
        welcome = await self._ask_to_join(token)
        cluster, config = ClusterId(welcome.cluster), self._config
        log.info("joining the cluster %s", welcome.cluster_name)
        authority, trusted, revoked = welcome.open()
        self._keys.take(authority, trusted, revoked)
        self._keys.accept(welcome.node_certificate, welcome.client_certificate)
        self._keys.certify(Party(cluster, self._identity.node), self._addresses, time.time())
        if self._identity.cluster == cluster:  # it was left behind, and is as it was
            return await (self._enter_external() if config.etcd else self._return())
        endpoints = config.etcd or tuple(welcome.endpoints)
        store = self._new_store(endpoints)
        try:
            record = await read_record(store)
        except MetadataUnavailable as error:
            raise UserError(
                f"etcd at {', '.join(endpoints)} does not answer ({error}): "
                "check the firewall between the nodes, and that the others run"
            ) from error
        if record is None or record.id != cluster:
            raise UserError(
                f"etcd at {', '.join(endpoints)} does not hold the cluster {welcome.cluster_name}: "
                "start its nodes first"
            )
        self._remember(record, endpoints)
        return self._entered(store, None if config.etcd else await self._become_voter(store))

    async def _ask_to_join(self, token: Token) -> Welcome:
        """Ask the token's addresses, those of --peer, and what zeroconf knows, for a while."""
        config = self._config
        applicant = Applicant(
            self._identity.node, config.name, token, self._keys.own_key(), tuple(self._addresses)
        )
        reasons, addresses = "no answer", [*config.peers, *token.addresses]
        with trio.move_on_after(JOIN_SECONDS):
            while True:
                found = [n for n in self._discovery.snapshot() if n.cluster == token.cluster]
                everywhere = dict.fromkeys([*addresses, *((n.host, n.port) for n in found)])
                ask = partial(ask_all, applicant, [*everywhere], self._ask)
                try:
                    return await trio.to_thread.run_sync(ask, abandon_on_cancel=True)
                except Unreachable as error:
                    reasons = str(error)
                    log.info("no member of the cluster answers yet: %s", reasons)
                await trio.sleep(RETRY_SECONDS)
        raise UserError(
            f"no node of the cluster can be reached ({reasons}): check the network and the "
            "firewall, or name a node that runs with --peer HOST:PORT"
        )

    async def _return(self) -> Entered:
        member = self._new_member()
        log.info("returning to the cluster %s", self._identity.cluster_name)
        try:
            is_voter = await member.come_back()
        except BaseException:
            await member.stop()
            raise
        if is_voter:
            endpoints = dict.fromkeys([member.client_endpoint, *self._identity.endpoints])
            store = self._new_store([*endpoints])
            return self._entered(store, member)
        await member.stop()
        store = self._new_store(self._identity.endpoints)
        with trio.move_on_after(REACH_SECONDS):
            await self._find_again(store)
            return self._entered(store, await self._become_voter(store))
        log.warning("etcd does not answer: serving what this node knew last")
        return self._entered(store, None)

    async def _find_again(self, store: EtcdStore) -> None:
        """Wait for our cluster's etcd, under the addresses we knew or new ones."""
        while True:
            try:
                record = await read_record(store)
            except MetadataUnavailable:
                record = None
            if record is not None and record.id == self._identity.cluster:
                return
            ours = [n for n in self._discovery.snapshot() if n.cluster == self._identity.cluster]
            for host, port in [*self._config.peers, *((n.host, n.port) for n in ours)]:
                if endpoints := await self._endpoints_at(host, port):
                    store.set_endpoints(endpoints)
            await trio.sleep(RETRY_SECONDS)

    async def _endpoints_at(self, host: str, port: int) -> list[str]:
        """What a member knows of etcd; nothing if nobody answers who has proved to be one."""
        where, tls = f"{host}:{port}", Tls(self._keys, self._identity.party)
        try:
            info = await self._fetch_info(tls, host, port)
        except (PeerUnavailable, ProtocolError) as error:
            log.debug("%s: %s", where, error)
            return []
        check_info(info, where)
        endpoints = info.get("endpoints")
        return [each for each in endpoints if isinstance(each, str)] if endpoints else []

    async def _become_voter(self, store: EtcdStore) -> EtcdMember | None:
        """Join etcd if it has room for a voter. A failure leaves the node a client."""
        member = self._new_member()
        try:
            members = await store.members()
            if wanted_role(members, self._identity.node, member.peer_url) is Role.CLIENT:
                await member.stop()
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

    def _entered(self, store: EtcdStore, member: EtcdMember | None) -> Entered:
        if member is not None:
            store.reach_through(member.client_endpoint, member.process.socket_path)
        return Entered(self._identity, self._keys, store, member)

    def _new_store(self, endpoints: Sequence[str]) -> EtcdStore:
        config = self._config
        credentials: Credentials | None = None
        if not config.etcd:
            credentials = EtcdTls(self._keys).credentials()
        elif config.etcd_tls:
            credentials = outside_credentials(config.etcd_ca, config.etcd_cert, config.etcd_key)
        return EtcdStore(endpoints, credentials=credentials)

    def _new_member(self) -> EtcdMember:
        config = self._config
        return EtcdMember(
            config.state_dir,
            self._identity.node,
            config.listen[0],
            config.etcd_client_port,
            config.etcd_peer_port,
            EtcdTls(self._keys),
        )

    # ------------------------------------------------------------ somebody else's etcd

    async def _enter_external(self) -> Entered:
        store = self._new_store(self._config.etcd)
        endpoints = ", ".join(self._config.etcd)
        try:
            record = await read_record(store)
        except MetadataUnavailable as error:
            if self._identity.cluster:
                log.warning("etcd does not answer: serving what this node knew last")
                return self._entered(store, None)
            raise UserError(f"etcd at {endpoints} does not answer: {error}") from error
        if record is None:
            if self._identity.cluster:
                raise UserError(
                    f"etcd at {endpoints} holds no cluster, but {self._config.state_dir} belongs "
                    f"to {self._identity.cluster_name}: give that cluster's etcd"
                )
            claim = self._new_claim(self._config.new_cluster or f"{self._config.name}-models")
            self._make_authority(claim)
            record = await found_in(store, claim, self._config.data_tls)
            if record.id != claim.cluster:  # somebody was faster, and it is his authority
                self._keys.remove()
                raise self._locked_out(record, endpoints)
        elif self._config.new_cluster not in (None, record.name):
            raise UserError(
                f"etcd at {endpoints} holds the cluster {record.name} already: "
                "join it by leaving out --new-cluster"
            )
        elif not self._identity.cluster:
            raise self._locked_out(record, endpoints)
        if self._identity.cluster and record.id != self._identity.cluster:
            raise UserError(
                f"{self._config.state_dir} belongs to the cluster {self._identity.cluster_name}, "
                f"and etcd at {endpoints} holds {record.name}: give another --state-dir"
            )
        self._remember(record, self._config.etcd)
        return self._entered(store, None)

    def _locked_out(self, record: ClusterRecord, endpoints: str) -> UserError:
        return UserError(
            f"etcd at {endpoints} holds the cluster {record.name}: to join it, run `modelfs token` "
            f"on one of its nodes, and here `modelfs mount {self._config.mountpoint} --join TOKEN`"
            " with the same --etcd"
        )

    def _remember(self, record: ClusterRecord, endpoints: tuple[str, ...]) -> None:
        cluster = ClusterId(record.id)
        self._founded_at = record.founded_at
        self._identity = self._identity.in_cluster(
            cluster, record.name, endpoints, record.data_tls, record.founded_at
        )
        identities.save(self._config.state_dir, self._identity)
