"""Certificates: what the cluster's authority signs, and what is read out of a certificate.

Nothing here touches a file or a socket; `keyring` keeps the files, `tls` makes connections of them.

A cluster has an authority of its own: an ECDSA P-256 key with a certificate that signs itself. It
signs two certificates for each node, over one key of that node's:

    node      names the node (a URI), and the address it listens on, for the other members of
              etcd. Its data port and its etcd member show it.
    client    names the node alone. etcd holds a client's address against the addresses that its
              certificate names; a machine with two of them, or behind NAT, would be turned away.

The URI is modelfs://<cluster>/<node>; it is what the peer protocol looks at.

Rule: the serial number of all of a node's certificates is its id. RFC 5280 wants numbers that are
used once, for authorities that sign for the public. Here a list of revoked numbers is a list of
nodes: one entry takes every certificate that a node has, or renewed a moment ago. (What verifies
them here, OpenSSL and Go, does not ask for uniqueness.)

Times: a certificate is valid for `NODE_DAYS` and renewed after two thirds of that; the authority
lasts for `AUTHORITY_DAYS`. Validity begins a little before it is signed, as clocks differ.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from modelfs.errors import ProtocolError
from modelfs.ids import ClusterId, NodeId, is_node_id

AUTHORITY_DAYS = 3650
NODE_DAYS = 90  # a node that was away for longer signs a new one for itself when it starts
BACKDATED = timedelta(hours=1)  # more than clocks may differ (`bootstrap`)
RENEW_SHARE = 2 / 3
CERTIFICATE_BYTES_MAX = 8 << 10
SCHEME = "modelfs://"

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
Certificate = x509.Certificate


@dataclass(frozen=True, slots=True)
class Party:
    """A node of a cluster, as a certificate names it."""

    cluster: ClusterId
    node: NodeId

    @property
    def uri(self) -> str:
        """How it stands in a certificate."""
        return f"{SCHEME}{self.cluster}/{self.node}"


@dataclass(frozen=True, slots=True, repr=False)
class Authority:
    """What signs: whoever has its key can make members."""

    certificate: Certificate
    key: PrivateKey


def new_key() -> PrivateKey:
    """A key for a node or an authority."""
    return ec.generate_private_key(ec.SECP256R1())


def found_authority(cluster: ClusterId, now: float) -> Authority:
    """A new authority for a cluster."""
    key = new_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"modelfs cluster {cluster}")])
    starts, ends = _validity(now, AUTHORITY_DAYS)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(starts)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key)


def issue(
    authority: Authority, key: PublicKey, party: Party, addresses: Sequence[str], now: float
) -> tuple[Certificate, Certificate]:
    """(node, client): the two certificates of a node with this key, at these IP addresses."""
    names: list[x509.GeneralName] = [
        x509.UniformResourceIdentifier(party.uri),
        *(x509.IPAddress(ipaddress.ip_address(address)) for address in addresses),
    ]
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return (
        _sign(authority, key, party, names, both, now),
        _sign(authority, key, party, names[:1], both[1:], now),
    )


def _sign(
    authority: Authority,
    key: PublicKey,
    party: Party,
    names: Sequence[x509.GeneralName],
    usages: Sequence[x509.ObjectIdentifier],
    now: float,
) -> Certificate:
    starts, ends = _validity(now, NODE_DAYS)
    issuer = authority.certificate
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, party.node)]))
        .issuer_name(issuer.subject)
        .public_key(key)
        .serial_number(serial_of(party.node))
        .not_valid_before(starts)
        .not_valid_after(min(ends, issuer.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(identifier, critical=False)
        .sign(authority.key, hashes.SHA256())
    )


def _validity(now: float, days: int) -> tuple[datetime, datetime]:
    signed = datetime.fromtimestamp(int(now), UTC)
    return signed - BACKDATED, signed + timedelta(days=days)


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


# ---------------------------------------------------------------- requests and revocation


def request(key: PrivateKey, node: NodeId) -> bytes:
    """A signing request (DER), which proves that its sender has the key."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def requested_key(data: bytes) -> PublicKey:
    """The key in a signing request. What else stands in it does not count: the signer decides.

    Raises `ProtocolError`.
    """
    try:
        parsed = x509.load_der_x509_csr(data[:CERTIFICATE_BYTES_MAX])
        key = parsed.public_key()
        is_whole = parsed.is_signature_valid
    except (ValueError, TypeError, x509.UnsupportedGeneralNameType, InvalidSignature) as error:
        raise ProtocolError(f"this is not a signing request: {error}") from None
    is_ours = isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp256r1"
    if not is_ours or not is_whole:
        raise ProtocolError("a signing request with a key of another kind, or of somebody else")
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key


def serial_of(node: NodeId) -> int:
    """The serial number of all certificates of a node. Never 0, which is not allowed."""
    assert is_node_id(node)
    return 1 << 64 | int(node, 16)


def revocation_list(authority: Authority, nodes: Iterable[NodeId], now: float) -> bytes:
    """The list (PEM) of the nodes whose certificates are refused."""
    starts, ends = _validity(now, AUTHORITY_DAYS)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(starts)
        .next_update(ends)
    )
    for node in sorted(nodes):
        revoked = x509.RevokedCertificateBuilder().serial_number(serial_of(node))
        builder = builder.add_revoked_certificate(revoked.revocation_date(starts).build())
    signed = builder.sign(authority.key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)


def listed(data: bytes) -> set[NodeId]:
    """The nodes on such a list. Raises `ProtocolError`."""
    try:
        revoked = x509.load_pem_x509_crl(data)
    except ValueError as error:
        raise ProtocolError(f"this is not a list of revoked certificates: {error}") from None
    return {NodeId(f"{each.serial_number & ~(1 << 64):016x}") for each in revoked}


# ---------------------------------------------------------------- bytes


def fingerprint(certificate: Certificate) -> bytes:
    """What a token says of the authority."""
    return hashlib.sha256(to_der(certificate)).digest()


def to_der(certificate: Certificate) -> bytes:
    """A certificate's bytes."""
    return certificate.public_bytes(serialization.Encoding.DER)


def to_pem(certificates: Iterable[Certificate]) -> bytes:
    """A file of certificates."""
    encoding = serialization.Encoding.PEM
    return b"".join(certificate.public_bytes(encoding) for certificate in certificates)


def key_to_pem(key: PrivateKey) -> bytes:
    """A key's file, not encrypted: its mode protects it."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def parse_certificate(data: bytes) -> Certificate:
    """A certificate from DER. Raises `ProtocolError`."""
    try:
        return x509.load_der_x509_certificate(data[:CERTIFICATE_BYTES_MAX])
    except (ValueError, TypeError) as error:
        raise ProtocolError(f"this is not a certificate: {error}") from None


def parse_certificates(data: bytes) -> list[Certificate]:
    """The certificates in a file of ours. Raises `ProtocolError`."""
    try:
        return x509.load_pem_x509_certificates(data)
    except (ValueError, TypeError) as error:
        raise ProtocolError(f"these are not certificates: {error}") from None


def parse_key(data: bytes) -> PrivateKey:
    """A key from a file of ours, or from a member. Raises `ProtocolError`, without its bytes."""
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError):
        raise ProtocolError("this is not a private key") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ProtocolError("this is a private key of another kind")
    return key


def belongs(certificate: Certificate, key: PrivateKey) -> bool:
    """Whether a certificate is over this key."""
    return certificate.public_key() == key.public_key()


def is_signed_by(certificate: Certificate, issuer: Certificate) -> bool:
    """Whether an authority has signed a certificate."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


# ---------------------------------------------------------------- who a certificate names


def party_of(names: Iterable[tuple[str, str]]) -> Party | None:
    """Who is named by the subjectAltName of a verified certificate, as `ssl` gives it."""
    parties = [parse_party(text) for kind, text in names if kind == "URI"]
    return parties[0] if len(parties) == 1 else None


def parse_party(uri: str) -> Party | None:
    """A party from its URI; None if it is not one."""
    cluster, _, node = uri.removeprefix(SCHEME).partition("/")
    if not uri.startswith(SCHEME) or not (is_node_id(cluster) and is_node_id(node)):
        return None
    return Party(ClusterId(cluster), NodeId(node))


def addresses_of(certificate: Certificate) -> set[str]:
    """The IP addresses that a certificate names."""
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return {str(address) for address in extension.value.get_values_for_type(x509.IPAddress)}


def is_due(certificate: Certificate, now: float) -> bool:
    """Whether a certificate should be renewed: most of its time is over, or has not begun."""
    starts = certificate.not_valid_before_utc.timestamp()
    ends = certificate.not_valid_after_utc.timestamp()
    return not starts <= now <= starts + RENEW_SHARE * (ends - starts)
