"""Letting nodes in: `modelfs token`, and what a member answers to JOIN (`joining`).

Every member may do both, so every member holds the authority's key.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec
import trio
from cryptography.hazmat.primitives import serialization

from modelfs import keys
from modelfs.errors import MetadataUnavailable, MetadataUncertain, ProtocolError, UserError
from modelfs.ids import NodeId, Revision
from modelfs.mirror import Mirror
from modelfs.ports import Compare, MetadataStore, Put, Target, Txn
from modelfsd.addresses import HostPort
from modelfsd.peers.session import AdmissionFailed
from modelfsd.trust import pki, tokens
from modelfsd.trust.identity import Identity
from modelfsd.trust.joining import (
    ENDPOINTS_MAX,
    FORMAT,
    REVOKED_MAX,
    Request,
    Welcome,
    decode_request,
)
from modelfsd.trust.keyring import KeyRing
from modelfsd.trust.pki import Party
from modelfsd.trust.tokens import TokenRefused
from modelfsd.units import parse_duration

log = logging.getLogger(__name__)

TTL_SECONDS_DEFAULT = 3600.0
ATTEMPTS_MAX = 20  # of a use, while others use the same token

UNAVAILABLE = (MetadataUnavailable, MetadataUncertain)


class Admission:
    """The member's side of joining."""

    def __init__(
        self,
        identity: Identity,
        keyring: KeyRing,
        store: MetadataStore,
        mirror: Mirror,
        own_address: HostPort,
        endpoints: Callable[[], tuple[str, ...]],
    ) -> None:
        self._identity, self._keyring = identity, keyring
        self._store, self._mirror = store, mirror
        self._own_address, self._endpoints = own_address, endpoints
        self._trio_token = trio.lowlevel.current_trio_token()

    def info(self, is_member: bool) -> dict[str, Any]:
        """What a node hears that asks who we are; a stranger hears what zeroconf tells everybody,
        our clock, and whose certificates it may find here.
        """
        identity = self._identity
        _, trusted = self._keyring.load_authority()
        info = {
            "cluster": identity.cluster,
            "cluster_name": identity.cluster_name,
            "node": identity.node,
            "format": FORMAT,
            "time": time.time(),
            "authorities": [pki.to_der(each) for each in trusted],
        }
        return {**info, "endpoints": [*self._endpoints()][:ENDPOINTS_MAX]} if is_member else info

    # ------------------------------------------------------------ tokens

    async def token(self, request: dict[str, Any]) -> dict[str, Any]:
        """The handler of `modelfs token`."""
        ttl_seconds, uses = TTL_SECONDS_DEFAULT, request.get("uses", 1)
        if request.get("ttl") is not None:
            ttl_seconds = parse_duration(str(request["ttl"]))
        if not 1.0 <= ttl_seconds <= tokens.TTL_SECONDS_MAX:
            raise UserError("a token lasts for a second at least, and for 30 days at most")
        if not isinstance(uses, int) or not 1 <= uses <= tokens.USES_MAX:
            raise UserError(f"a token has 1 to {tokens.USES_MAX} uses")
        authority, _ = self._keyring.load_authority()
        others = [(node.host, node.port) for node in self._mirror.nodes.values()]
        addresses = list(dict.fromkeys([self._own_address, *others]))
        token, record = tokens.new_token(
            self._identity.cluster,
            pki.fingerprint(authority.certificate),
            addresses,
            time.time(),
            ttl_seconds,
            uses,
        )
        try:
            lease = await self._store.grant(int(ttl_seconds) + tokens.KEPT_SECONDS)
            put = Put(keys.token(token.id), msgspec.msgpack.encode(record), lease)
            await self._store.commit(Txn((), (put,)))
        except UNAVAILABLE as error:
            raise UserError(f"no token can be made now: {error}") from error
        log.info("made join token %s for %d uses", token.id.hex(), uses)
        return {"token": tokens.format_token(token), "uses": uses, "ttl_seconds": ttl_seconds}

    # ------------------------------------------------------------ joining

    def admit(self, letter: bytes, member: NodeId | None) -> bytes:
        """Answer JOIN. On a connection's thread.

        Raises `TokenRefused`, `ProtocolError`, and `AdmissionFailed` if that cannot be told now.
        """
        try:
            return trio.from_thread.run(self._admit, letter, member, trio_token=self._trio_token)
        except UNAVAILABLE as error:
            raise AdmissionFailed(f"this member has no connection to etcd: {error}") from error
        except (trio.RunFinishedError, trio.Cancelled) as error:
            raise AdmissionFailed("this member is stopping") from error

    async def _admit(self, letter: bytes, member: NodeId | None) -> bytes:
        request = decode_request(letter)
        node = NodeId(request.node)
        if member is None:
            key = pki.requested_key(request.signing_request)
            await self._use_token(request, key)
        elif member != node:
            raise ProtocolError(f"node {member} asks for node {node}")
        else:
            key = self._keyring.own_key().public_key()  # what it gets for it is not used
        party = Party(self._identity.cluster, node)
        try:
            welcome = await trio.to_thread.run_sync(self._welcome, party, key, request.addresses)
        except ValueError as error:  # an address that is none
            raise ProtocolError(f"a request to join that cannot be: {error}") from None
        log.info("let node %s in", node) if member is None else None
        return msgspec.msgpack.encode(welcome)

    async def _use_token(self, request: Request, key: pki.PublicKey) -> None:
        """One guarded transaction: a use is nobody else's. Raises `TokenRefused`."""
        encoded = key.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        holder = hashlib.sha256(encoded + request.node.encode()).digest()[:16]
        at = keys.token(request.token)
        if await self._store.get(keys.revoked(NodeId(request.node))) is not None:
            raise TokenRefused(
                f"node {request.node} was removed from the cluster: "
                "join with an empty state directory, as a new node"
            )
        for _ in range(ATTEMPTS_MAX):
            row = await self._store.get(at)
            record = tokens.decode_record(row.value) if row else None
            used = tokens.use(record, request.secret, holder, time.time())
            if used is record:
                return
            assert row is not None
            # The remaining time of its lease stays: a put without one would keep it for ever.
            lease = await self._store.grant(_seconds_left(used))
            guard = Compare(at, Target.MOD, Revision(row.mod_revision))
            put = Put(at, msgspec.msgpack.encode(used), lease)
            if (await self._store.commit(Txn((guard,), (put,)))).succeeded:
                return
        raise AdmissionFailed("too many nodes use this token at once")

    def _welcome(self, party: Party, key: pki.PublicKey, addresses: list[str]) -> Welcome:
        authority, trusted = self._keyring.load_authority()
        node, client = pki.issue(authority, key, party, addresses, time.time())
        return Welcome(
            format=FORMAT,
            cluster=party.cluster,
            cluster_name=self._identity.cluster_name,
            data_tls=self._identity.data_tls,
            node_certificate=pki.to_der(node),
            client_certificate=pki.to_der(client),
            authority=pki.to_der(authority.certificate),
            authority_key=pki.key_to_pem(authority.key),
            trusted=[pki.to_der(each) for each in trusted],
            revoked=[*sorted(self._mirror.revoked())[:REVOKED_MAX]],
            endpoints=[*self._endpoints()][:ENDPOINTS_MAX],
        )


def _seconds_left(record: tokens.TokenRecord) -> int:
    return max(1, int(record.expires_at - time.time())) + tokens.KEPT_SECONDS
