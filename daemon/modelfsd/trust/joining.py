"""Joining, as the new node does it: find a member, believe it for the right reason, ask.

A token names the authority by its fingerprint. So the node asks in two connections:

1. without believing anything: INFO, which has the authorities' certificates. One of them must have
   the fingerprint. Nothing of ours was sent.
2. believing that authority alone, so that OpenSSL verifies the member's certificate: INFO again
   (format, clock), then JOIN with the secret and a signing request. The answer is `Welcome`.

Whoever answers at an address but cannot show such a certificate is somebody else, and gets nothing
but the fact that we asked. A member that is known may ask JOIN too, without a secret, and gets the
authority: that is how a new one spreads (`security`).
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from modelfs import wire
from modelfs.errors import ProtocolError, UserError
from modelfs.ids import ClusterId, NodeId, is_node_id
from modelfs.limits import CONNECT_SECONDS
from modelfs.wire import FailureKind
from modelfsd.addresses import HostPort, format_host_port
from modelfsd.peers.secure_channel import SecureChannel
from modelfsd.trust import pki
from modelfsd.trust.pki import Certificate
from modelfsd.trust.tls import TlsFailed, stranger_context
from modelfsd.trust.tokens import Token

FORMAT = 1  # of records, letters and infos
WAIT_SECONDS = 0.2
ANSWER_SECONDS = 15.0  # of one member, its etcd's answer included
CLOCK_SKEW_SECONDS_MAX = 300.0
AUTHORITIES_MAX = 8
REVOKED_MAX = 1024  # removed nodes that a letter names, 18 KiB; etcd tells a member of all
ENDPOINTS_MAX = 64  # of etcd, that one node tells another
# X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED.
_VERIFY_TIMES = (9, 10)

_Text = Annotated[str, msgspec.Meta(max_length=256)]
_Der = Annotated[bytes, msgspec.Meta(max_length=pki.CERTIFICATE_BYTES_MAX)]


class Request(msgspec.Struct, array_like=True, frozen=True):
    """What a new node says of itself. A member's has no token."""

    format: int
    token: Annotated[bytes, msgspec.Meta(max_length=8)]
    secret: Annotated[bytes, msgspec.Meta(max_length=64)]
    node: Annotated[str, msgspec.Meta(max_length=16)]
    signing_request: _Der
    addresses: Annotated[
        list[Annotated[str, msgspec.Meta(max_length=64)]], msgspec.Meta(max_length=8)
    ]

    def __repr__(self) -> str:
        return f"Request(of {self.node})"


class Welcome(msgspec.Struct, array_like=True, frozen=True):
    """What makes a member. It has the authority's key: see the threat model in DESIGN.md."""

    format: int
    cluster: Annotated[str, msgspec.Meta(max_length=16)]
    cluster_name: _Text
    data_tls: bool
    node_certificate: _Der
    client_certificate: _Der
    authority: _Der
    authority_key: Annotated[bytes, msgspec.Meta(max_length=4096)]
    trusted: Annotated[list[_Der], msgspec.Meta(max_length=AUTHORITIES_MAX)]
    revoked: Annotated[
        list[Annotated[str, msgspec.Meta(max_length=16)]], msgspec.Meta(max_length=REVOKED_MAX)
    ]
    endpoints: Annotated[list[_Text], msgspec.Meta(max_length=ENDPOINTS_MAX)]

    def __repr__(self) -> str:
        return f"Welcome(to {self.cluster})"

    def open(self) -> tuple[pki.Authority, list[Certificate], list[NodeId]]:
        """(who signs, who is trusted, who is refused). Raises `ProtocolError`."""
        authority = pki.Authority(
            pki.parse_certificate(self.authority), pki.parse_key(self.authority_key)
        )
        if not pki.belongs(authority.certificate, authority.key):
            raise ProtocolError("the authority's key does not belong to its certificate")
        trusted = [pki.parse_certificate(each) for each in self.trusted]
        return authority, trusted, [NodeId(node) for node in self.revoked if is_node_id(node)]


class Unreachable(ProtocolError):
    """This address does not help; another one, or a later attempt, may."""


class Impostor(UserError):
    """Who answers is not of the token's cluster."""


class ClockWrong(UserError):
    """This machine's clock cannot be right."""


@dataclass(frozen=True, slots=True, repr=False)
class Applicant:
    """A node that wants to be let in."""

    node: NodeId
    name: str
    token: Token
    key: pki.PrivateKey
    addresses: tuple[str, ...]

    def request(self) -> bytes:
        """The letter that goes with JOIN."""
        signing_request = pki.request(self.key, self.node)
        token = self.token
        return msgspec.msgpack.encode(
            Request(FORMAT, token.id, token.secret, self.node, signing_request, [*self.addresses])
        )


def decode_request(letter: bytes) -> Request:
    """Raises `ProtocolError`."""
    try:
        request = msgspec.msgpack.decode(letter, type=Request)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"a malformed request to join: {error}") from None
    if request.format != FORMAT or not is_node_id(request.node):
        raise ProtocolError("a request to join of another version")
    return request


def decode_welcome(letter: bytes) -> Welcome:
    """Raises `ProtocolError`."""
    try:
        welcome = msgspec.msgpack.decode(letter, type=Welcome)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise ProtocolError("an answer to JOIN that is malformed") from None
    if welcome.format != FORMAT or not is_node_id(welcome.cluster):
        raise ProtocolError("an answer to JOIN of another version")
    return welcome


def ask_to_join(applicant: Applicant, address: HostPort) -> Welcome:
    """Ask the member at an address. Blocks, in bounded time.

    Raises `Unreachable`, `Impostor`, `ClockWrong`, and `UserError` with the cluster's refusal.
    """
    where = format_host_port(address)
    deadline = time.monotonic() + ANSWER_SECONDS
    try:
        with _Talk(applicant, address, stranger_context(), deadline) as talk:
            info = talk.info()
        authority = _authority(info, applicant.token, where)
        with _Talk(applicant, address, stranger_context(authority), deadline) as talk:
            check_info(talk.info(), where)
            return talk.join()
    except TlsFailed as error:
        raise _tls_error(error, where) from error
    except (OSError, ProtocolError) as error:
        raise Unreachable(f"{where}: {getattr(error, 'strerror', None) or error}") from error


def _authority(info: dict[str, Any], token: Token, where: str) -> Certificate:
    """The authority that the token means. Raises `Impostor`."""
    authorities = info.get("authorities")
    for data in authorities[:AUTHORITIES_MAX] if isinstance(authorities, list) else []:
        if isinstance(data, bytes):
            certificate = pki.parse_certificate(data)
            if pki.fingerprint(certificate) == token.fingerprint:
                return certificate
    if info.get("cluster") == token.cluster:
        raise Impostor(
            f"the node at {where} does not have the authority that this join token was made "
            "with: if it was changed since (`modelfs ca rotate`), make another token; "
            "if not, somebody plays your cluster"
        )
    raise Impostor(
        f"the node at {where} is of another cluster than this join token: "
        "name a node of the right one with --peer, or take a token from this one"
    )


def _tls_error(error: TlsFailed, where: str) -> UserError:
    cause = error.__cause__
    if isinstance(cause, ssl.SSLCertVerificationError) and cause.verify_code in _VERIFY_TIMES:
        now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        return ClockWrong(
            f"this machine's clock says {now}, when the certificate of the node at {where} is not "
            "valid: set the clock first (for example with chrony or systemd-timesyncd)"
        )
    return Impostor(
        f"the node at {where} cannot prove that it is of this join token's cluster ({error}): if "
        "its authority was changed since (`modelfs ca rotate`), make another token; "
        "if not, somebody plays your cluster"
    )


def check_info(info: dict[str, Any], where: str) -> None:
    """Whether what a node says fits to us. Raises `UserError`."""
    if info.get("format") != FORMAT:
        raise UserError(
            f"the node at {where} keeps its records in format {info.get('format')}, this version "
            f"of modelfs knows {FORMAT}: install the same version on all nodes"
        )
    theirs = info.get("time")
    if not isinstance(theirs, float) or not is_node_id(str(info.get("cluster"))):
        raise UserError(f"the node at {where} does not say how to join its cluster")
    skew_seconds = abs(theirs - time.time())
    if not skew_seconds <= CLOCK_SKEW_SECONDS_MAX:  # also what is not a number
        raise ClockWrong(
            f"this machine's clock is {skew_seconds:.0f} s away from that of the node at {where}: "
            "set it (for example with chrony or systemd-timesyncd), file times depend on it"
        )


class _Talk:
    """One connection of a stranger."""

    def __init__(
        self, applicant: Applicant, address: HostPort, context: ssl.SSLContext, deadline: float
    ) -> None:
        self._applicant, self._deadline = applicant, deadline
        self._is_trusting = context.verify_mode is ssl.CERT_NONE
        connection = socket.create_connection(address, CONNECT_SECONDS)
        self._channel = SecureChannel(connection, WAIT_SECONDS, context, False)
        self._requests = 0

    def __enter__(self) -> _Talk:
        try:
            self._greet()
        except BaseException:
            self._channel.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def info(self) -> dict[str, Any]:
        """What a stranger may know."""
        reply = self._ask(wire.Info())
        if not isinstance(reply, wire.InfoReply):
            raise ProtocolError(_words(reply))
        return reply.info

    def join(self) -> Welcome:
        """Send the secret; only over a connection whose other end was verified."""
        assert not self._is_trusting
        reply = self._ask(wire.Join(self._applicant.request()))
        if isinstance(reply, wire.Failure) and reply.kind is FailureKind.REFUSED:
            raise UserError(reply.text)
        if not isinstance(reply, wire.JoinReply):
            raise ProtocolError(_words(reply))
        welcome = decode_welcome(reply.answer)
        if welcome.cluster != self._applicant.token.cluster:
            raise ProtocolError(f"it answers for the cluster {welcome.cluster}")
        return welcome

    def _greet(self) -> None:
        party = self._channel.handshake(self._check)
        if not self._is_trusting and (party is None or party.cluster != self._cluster):
            raise TlsFailed("its certificate names another cluster")
        ours = self._applicant
        hello = wire.Hello(wire.VERSION_MIN, wire.VERSION_MAX, "", ours.node, ours.name, "")
        reply = self._ask(hello)
        if not isinstance(reply, wire.Hello):
            raise ProtocolError(_words(reply))
        wire.negotiate(reply)

    @property
    def _cluster(self) -> ClusterId:
        return ClusterId(self._applicant.token.cluster)

    def _ask(self, message: wire.Request) -> wire.Message:
        self._channel.send([wire.encode(self._requests, message)], self._check)
        while True:
            frame = self._channel.next_frame(self._check)
            if frame is None:
                raise ConnectionResetError("it closed the connection")
            if frame.request != self._requests or frame.payload_bytes:
                raise ProtocolError("it answers what was not asked")
            if not isinstance(frame.message, wire.Working):
                self._requests += 1
                return frame.message

    def _check(self) -> None:
        if time.monotonic() > self._deadline:
            raise TimeoutError(f"no answer in {ANSWER_SECONDS:.0f} s")


def _words(reply: wire.Message) -> str:
    if isinstance(reply, wire.Failure):
        return reply.text
    return f"{type(reply).__name__} is not the reply to what was asked"


Ask = Callable[[Applicant, HostPort], Welcome]


def ask_all(applicant: Applicant, addresses: Sequence[HostPort], ask: Ask = ask_to_join) -> Welcome:
    """Ask one after the other. Raises `Unreachable` if none of them answers, else the most
    telling `UserError`: an impostor at one address must not keep us from the members.
    """
    reasons: list[str] = []
    wrong: UserError | None = None
    for address in addresses:
        try:
            return ask(applicant, address)
        except Unreachable as error:
            reasons.append(str(error))
        except Impostor as error:
            wrong = wrong or error
    if wrong is not None:
        raise wrong
    raise Unreachable("; ".join(reasons) or "no address is known")
