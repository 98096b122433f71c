"""Keeping a running node's keys true: who was removed, certificates renewed, authorities changed.

What the cluster has decided stands under `security/` in etcd and reaches every node through the
mirror. A removed node is refused in the same step in which the mirror shows it: connections that
are open end, new ones are turned away. Its certificate is put on the list that etcd reads at each
handshake, and the members of etcd restart in turn, which ends the connections to them
(`etcd.restart`).

Our own certificate is renewed with the authority's key well before it expires; new connections use
it from then on, and nothing restarts. A change of the authority is `rotation`; when the old one is
trusted no more, the peers' connections end too.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path

import msgspec
import trio

from modelfs import keys
from modelfs.errors import MetadataUnavailable, OutOfSpace, ProtocolError, RemoteError, UserError
from modelfs.ids import NodeId
from modelfs.mirror import Change, Mirror, SecurityChanged
from modelfs.ports import Put, Txn
from modelfsd.etcd.join import UNAVAILABLE
from modelfsd.etcd.member import EtcdMember
from modelfsd.etcd.restart import restart_in_turn
from modelfsd.etcd.store import EtcdStore
from modelfsd.etcd.tls import EtcdTls
from modelfsd.logs import RateLimited
from modelfsd.peers.client import PeerClient
from modelfsd.peers.server import PeerServer
from modelfsd.trust import identity as identities
from modelfsd.trust import joining
from modelfsd.trust.pki import Authority, Certificate
from modelfsd.trust.rotation import Trust, trust_of
from modelfsd.trust.tls import Tls

log = logging.getLogger(__name__)

CHECK_SECONDS = 3600.0  # how often certificates are looked at
RETRY_SECONDS = 2.0


class Removed(UserError):
    """The cluster has removed this node."""


class Security:
    """One node's keys, certificates and refusals."""

    def __init__(
        self,
        tls: Tls,
        address: str,
        state_dir: Path,
        store: EtcdStore,
        member: EtcdMember | None,
        is_etcd_ours: bool,
        mirror: Mirror,
        server: PeerServer,
        peers: PeerClient,
    ) -> None:
        self._tls, self._keys, self._party = tls, tls.keys, tls.party
        self._addresses, self._state_dir = [address.partition("%")[0]], state_dir
        self._store, self._member, self._is_etcd_ours = store, member, is_etcd_ours
        self._mirror, self._server, self._peers = mirror, server, peers
        self._news = trio.Event()
        self._is_reload_due = self._is_restart_due = False  # noted before the files are written
        self._quiet = RateLimited(log, 600.0)
        self.refuse_removed()

    def on_changes(self, changes: list[Change]) -> None:
        """Take what the feed announces."""
        if any(isinstance(change, SecurityChanged) for change in changes):
            self.refuse_removed()
            self._news.set()

    def refuse_removed(self) -> None:
        """Refuse the nodes that the mirror shows as removed, now."""
        removed = self._mirror.revoked()
        fresh = removed - self._tls.refused
        self._tls.refuse(removed)
        if fresh:
            log.info("refusing the removed nodes %s", ", ".join(sorted(fresh)))
            self._server.refuse(fresh)
            for node in fresh:
                self._peers.forget(node)

    async def run(self) -> None:
        """Follow what the cluster decides, for ever. Raises `Removed`."""
        while True:
            self._news = trio.Event()
            pause_seconds = CHECK_SECONDS
            try:
                await self._follow()
            except (*UNAVAILABLE, OutOfSpace) as error:
                log.warning("what the cluster decided on its keys waits for etcd: %s", error)
                pause_seconds = RETRY_SECONDS
            except ProtocolError as error:
                self._quiet.error("trust", "the keys stay as they are: %s", error)
            except Removed:
                raise
            except (OSError, UserError) as error:  # a full disk, or too few descriptors
                self._quiet.error("files", "the keys stay as they are for now: %s", error)
                pause_seconds = RETRY_SECONDS
            with trio.move_on_after(pause_seconds):
                await self._news.wait()

    async def _follow(self) -> None:
        removed = self._mirror.revoked()
        if self._party.node in removed:
            try:
                identities.mark_removed(self._state_dir)
            except OSError as error:  # it ends all the same; the replica file says so as well
                log.warning("that this node was removed cannot be noted: %s", error)
            raise Removed(
                "this node was removed from the cluster (`modelfs node remove`): move "
                f"{self._state_dir} away to join as a new node with a token"
            )
        trust = trust_of(self._mirror)
        if trust is not None:
            await self._follow_trust(trust, removed)
        await self._renew()
        await self._list_removed(removed)
        if self._is_reload_due:
            self._use_new_files()
            self._is_reload_due = False
        if self._is_restart_due and self._member is not None:
            await restart_in_turn(self._store, self._member, self._party.node)
            self._is_restart_due = False
        if trust is not None:
            await self._tell_step(trust.step)

    async def _follow_trust(self, trust: Trust, removed: set[NodeId]) -> None:
        """Trust whom the cluster trusts, and sign with the key of who signs."""
        wanted, signer = trust.open()
        authority, trusted = await trio.to_thread.run_sync(self._keys.load_authority)
        if set(wanted) == set(trusted) and authority.certificate == signer:
            return
        if authority.certificate != signer:
            authority = await self._obtain(signer)
        self._is_reload_due = True
        # etcd reads the certificates at each handshake, but whom to trust only when it starts.
        if set(wanted) != set(trusted):
            self._is_restart_due = self._member is not None
        take = partial(self._keys.take, authority, wanted, removed)
        await trio.to_thread.run_sync(take)
        await trio.to_thread.run_sync(self._certify)
        log.info("taking step %d in changing the authority", trust.step)

    async def _obtain(self, signer: Certificate) -> Authority:
        """The key of the authority that signs now: ours, or from a member that has it."""
        ours = await trio.to_thread.run_sync(self._keys.load_next, signer)
        if ours is not None:
            return ours
        request = joining.Request(joining.FORMAT, b"", b"", self._party.node, b"", [])
        for node, record in list(self._mirror.nodes.items()):
            if node == self._party.node:
                continue
            try:
                letter = await self._peers.fetch_letter(
                    record.host, record.port, msgspec.msgpack.encode(request)
                )
                authority, _, _ = joining.decode_welcome(letter).open()
            except (RemoteError, ProtocolError) as error:
                log.info("node %s did not hand over the authority: %s", node, error)
                continue
            if authority.certificate == signer:
                return authority
        raise MetadataUnavailable("no member has the new authority's key yet")

    async def _tell_step(self, step: int) -> None:
        key, value = keys.trust_step(self._party.node), b"%d" % step
        row = self._mirror.other(key)
        if row is None or row.value != value:
            await self._store.commit(Txn((), (Put(key, value),)))

    async def _renew(self) -> None:
        if await trio.to_thread.run_sync(self._certify):
            log.info("this node's certificate was renewed")
            self._is_reload_due = True

    def _certify(self) -> bool:
        return self._keys.certify(self._party, self._addresses, time.time())

    def _use_new_files(self) -> None:
        """Make new connections with what the files hold now."""
        generation = self._tls.generation
        self._tls.reload()
        if self._tls.generation != generation:
            self._server.end_earlier_generations()
            self._peers.drop_idle()
        if self._is_etcd_ours:
            self._store.set_credentials(EtcdTls(self._keys).credentials())
        if self._member is not None:
            self._member.use_new_certificates()

    async def _list_removed(self, removed: set[NodeId]) -> None:
        """Put the removed nodes on etcd's list, and end what connections they have to ours."""
        if await trio.to_thread.run_sync(self._keys.listed) == removed:
            return
        self._is_reload_due, self._is_restart_due = True, self._member is not None
        await trio.to_thread.run_sync(lambda: self._keys.refuse(removed, time.time()))
