"""TLS between nodes: what a connection must show before anything is said on it.

Version 1.2 or newer, and the ciphers of 1.3 or those of 1.2 with forward secrecy and AEAD. Both
sides show a certificate of the cluster's authority; what counts in it is the URI that names cluster
and node (see `pki`), not the address. A client without a certificate is a *stranger*: it is let
through the handshake, so that it can join, and `peers.session` answers nothing else.

No tickets and no resumption: each connection proves itself, and after the handshake the server has
nothing more to send by itself, so a connection can be taken out of TLS cleanly (`secure_channel`).

`Tls` is shared by threads. Contexts and the set of refused nodes are replaced as a whole, never
changed; connections that are open keep what they were made with. But each time that an authority is
trusted no more a new *generation* begins, and connections of those before carry no further request.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from modelfs.errors import ProtocolError
from modelfs.ids import NodeId
from modelfsd.trust import pki
from modelfsd.trust.keyring import KeyRing
from modelfsd.trust.pki import Party

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"  # of TLS 1.2; 1.3 has none that are weak


class TlsFailed(ProtocolError):
    """A handshake that failed, or bytes that the other side never encrypted."""


class Tls:
    """Who this node is on connections, whom it trusts and whom it refuses."""

    def __init__(self, keys: KeyRing, party: Party, data_tls: bool = True) -> None:
        """`data_tls`: whether chunks are encrypted on their way too, as the cluster has it."""
        self.keys, self.party, self.data_tls = keys, party, data_tls
        self._refused: frozenset[NodeId] = frozenset()
        self._trusted: frozenset[pki.Certificate] = frozenset()
        self.generation = 0
        self.reload()

    def reload(self) -> None:
        """Use what the files hold now, from the next connection on."""
        server, client = server_context(self.keys), client_context(self.keys)
        self.server, self.client = server, client
        trusted = frozenset(self.keys.load_authority()[1])
        if not self._trusted <= trusted:  # whoever has read the new number finds the new contexts
            self.generation += 1
        self._trusted = trusted

    @property
    def refused(self) -> frozenset[NodeId]:
        """The nodes that were removed from the cluster."""
        return self._refused

    def refuse(self, nodes: Iterable[NodeId]) -> None:
        """Take these for the removed nodes, from the next connection on."""
        self._refused = frozenset(nodes)


def server_context(keys: KeyRing) -> ssl.SSLContext:
    """For the connections that others make. Who they are is asked, and may stay open."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _harden(context)
    context.num_tickets = 0
    context.verify_mode = ssl.CERT_OPTIONAL
    context.load_verify_locations(cafile=keys.ca)
    context.load_cert_chain(keys.node, keys.node_key)
    return context


def client_context(keys: KeyRing, certificate: Path | None = None) -> ssl.SSLContext:
    """For the connections that this node makes, with its own certificate or another one."""
    context = _client_context()
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cafile=keys.ca)
    context.load_cert_chain(certificate or keys.node, keys.node_key)
    if len(keys.load_authority()[1]) == 1:  # the list is that of the authority which signs
        context.load_verify_locations(cafile=keys.revoked)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


def stranger_context(trusted: pki.Certificate | None = None) -> ssl.SSLContext:
    """For a node that has no certificate yet. Without `trusted` it believes what it is told."""
    context = _client_context()
    if trusted is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=pki.to_der(trusted))
    return context


def _client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _harden(context)
    context.check_hostname = False  # names and addresses are hints; the node's id is what counts
    context.verify_mode = ssl.CERT_NONE
    return context


def _harden(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET


def party_of(connection: ssl.SSLSocket) -> Party | None:
    """Who is at the other end, once its certificate is verified; None for a stranger.

    Raises `TlsFailed` for a certificate that names no node.
    """
    certificate = connection.getpeercert()
    if not certificate:
        return None
    names: Any = certificate.get("subjectAltName", ())  # pairs of texts, as far as we need them
    party = pki.party_of(names)
    if party is None:
        raise TlsFailed("its certificate names no node")
    return party
