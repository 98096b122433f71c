"""Certificates at etcd: what its members are told, and what a client of theirs shows and trusts."""

from __future__ import annotations

import ssl
from pathlib import Path

from modelfs.errors import UserError
from modelfsd.etcd.channel import Credentials
from modelfsd.trust import tls
from modelfsd.trust.keyring import KeyRing

# Of TLS 1.2; all certificates are ECDSA. The first is the one that HTTP/2 asks for.
_CIPHERS = (
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
)


class EtcdTls:
    """The certificates of the cluster's own etcd: what its members are told, and its clients."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys

    def credentials(self) -> Credentials:
        """For a client, from what the files hold now.

        Whoever has a certificate for servers by the cluster's authority is a member, and as good
        as any other: addresses are not compared.
        """
        keys = self._keys
        context = tls.client_context(keys, keys.client)
        context.set_alpn_protocols(["h2"])
        return context

    def arguments(self) -> list[str]:
        """For etcd's command line."""
        keys = self._keys
        return [
            "--client-cert-auth",
            f"--trusted-ca-file={keys.ca}",
            f"--cert-file={keys.node}",
            f"--key-file={keys.node_key}",
            f"--client-crl-file={keys.revoked}",
            "--peer-client-cert-auth",
            f"--peer-trusted-ca-file={keys.ca}",
            f"--peer-cert-file={keys.node}",
            f"--peer-key-file={keys.node_key}",
            f"--peer-crl-file={keys.revoked}",
            # A member's connections may come from another of its machine's addresses.
            "--experimental-peer-skip-client-san-verification",
            f"--cipher-suites={','.join(_CIPHERS)}",
            "--enable-grpc-gateway=false",  # nobody uses the JSON door
        ]


def outside_credentials(ca: Path | None, certificate: Path | None, key: Path | None) -> Credentials:
    """For an etcd of the user's own that speaks TLS. Without `ca` the system's are trusted.

    Raises `UserError` if the files cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        named = ", ".join(str(path) for path in (ca, certificate, key) if path is not None)
        raise UserError(f"the certificates for etcd ({named}) cannot be used: {error}") from error
    context.set_alpn_protocols(["h2"])
    return context
