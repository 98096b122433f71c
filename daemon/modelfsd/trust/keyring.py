"""This node's keys and certificates: the files in `<state_dir>/pki`, as etcd and we read them.

    ca.crt        the authorities that are trusted; more than one while one takes over
    ca.key        the key of the one that signs
    node.key      this node's key, made once; both certificates are over it
    node.crt      see `pki`
    client.crt
    revoked.crl   the nodes whose certificates are refused
    next.key      the key of an authority that this node has made, and that does not sign yet
    next.crt      its certificate

The directory has mode 0700 and the files 0600 from the first instant. Each file is replaced as a
whole. A certificate can be replaced while etcd runs, since the key beside it stays: etcd reads
certificate, key and list at each handshake. It reads `ca.crt` only when it starts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelfs.errors import ProtocolError, UserError
from modelfs.ids import ClusterId, NodeId
from modelfsd.trust import pki
from modelfsd.trust.pki import Authority, Certificate, Party, PrivateKey

DIRECTORY = "pki"
FILE_BYTES_MAX = 256 << 10
WHOLE = ("ca.crt", "ca.key", "node.key", "node.crt", "client.crt", "revoked.crl")


@dataclass(frozen=True, slots=True, repr=False)
class Keys:
    """What the files hold."""

    trusted: tuple[Certificate, ...]
    authority: Authority
    key: PrivateKey
    node: Certificate
    client: Certificate


class KeyRing:
    """The directory. Blocking calls, all of them short."""

    def __init__(self, state_dir: Path) -> None:
        self.directory = state_dir / DIRECTORY
        self.ca, self.node_key = self._path("ca.crt"), self._path("node.key")
        self.node, self.client = self._path("node.crt"), self._path("client.crt")
        self.revoked = self._path("revoked.crl")

    @property
    def is_whole(self) -> bool:
        """Whether all files are there."""
        return all(self._path(name).exists() for name in WHOLE)

    def own_key(self) -> PrivateKey:
        """This node's key; made if there is none."""
        try:
            return pki.parse_key(self._read("node.key"))
        except FileNotFoundError:
            key = pki.new_key()
            self._write("node.key", pki.key_to_pem(key))
            return key

    def found(self, cluster: ClusterId, now: float) -> None:
        """Make an authority for a cluster that is being founded."""
        authority = pki.found_authority(cluster, now)
        self.take(authority, (authority.certificate,), ())

    def take(
        self,
        authority: Authority,
        trusted: Iterable[Certificate],
        revoked: Iterable[NodeId],
        now: float | None = None,
    ) -> None:
        """Keep who signs, who is trusted and who is refused."""
        since = authority.certificate.not_valid_before_utc.timestamp()
        self._write("ca.key", pki.key_to_pem(authority.key))
        others = [each for each in trusted if each != authority.certificate]
        self._write("ca.crt", pki.to_pem([authority.certificate, *others]))
        self.refuse(revoked, since if now is None else now, authority)

    def make_next(self, cluster: ClusterId, now: float) -> Authority:
        """Make an authority that is to take over, and keep its key before anybody hears of it."""
        authority = pki.found_authority(cluster, now)
        self._write("next.crt", pki.to_pem([authority.certificate]))
        self._write("next.key", pki.key_to_pem(authority.key))
        return authority

    def load_next(self, certificate: Certificate) -> Authority | None:
        """That authority, if it is the one with this certificate."""
        try:
            key = pki.parse_key(self._read("next.key"))
        except (FileNotFoundError, ProtocolError):
            return None
        return Authority(certificate, key) if pki.belongs(certificate, key) else None

    def forget_next(self) -> None:
        """It signs now, and stands where such keys do."""
        for name in ("next.key", "next.crt"):
            self._path(name).unlink(missing_ok=True)

    def refuse(
        self, revoked: Iterable[NodeId], now: float, authority: Authority | None = None
    ) -> None:
        """Write the list of revoked nodes."""
        authority = authority or self.load_authority()[0]
        self._write("revoked.crl", pki.revocation_list(authority, revoked, now))

    def listed(self) -> set[NodeId]:
        """The nodes on that list."""
        return pki.listed(self._read("revoked.crl"))

    def certify(
        self, party: Party, addresses: Sequence[str], now: float, force: bool = False
    ) -> bool:
        """Sign our certificates anew if that is due, or if they do not fit. Whether it was."""
        authority, _ = self.load_authority()
        key = self.own_key()
        if not force and self._fits(authority, key, party, addresses, now):
            return False
        node, client = pki.issue(authority, key.public_key(), party, addresses, now)
        self._write("node.crt", pki.to_pem([node]))
        self._write("client.crt", pki.to_pem([client]))
        return True

    def accept(self, node: bytes, client: bytes) -> None:
        """Keep the certificates (DER) that a member has signed for us. Raises `ProtocolError`."""
        self._write("node.crt", pki.to_pem([pki.parse_certificate(node)]))
        self._write("client.crt", pki.to_pem([pki.parse_certificate(client)]))

    def load_authority(self) -> tuple[Authority, tuple[Certificate, ...]]:
        """(who signs, who is trusted). Raises `UserError` if the files are damaged."""
        try:
            trusted = pki.parse_certificates(self._read("ca.crt"))
            key = pki.parse_key(self._read("ca.key"))
        except (OSError, ProtocolError) as error:
            raise self._damaged(error) from error
        # Which of them signs is told by the key: a crash between the two files leaves a pair.
        signers = [each for each in trusted if pki.belongs(each, key)]
        if not signers:
            raise self._damaged("ca.key is not the key of one in ca.crt")
        return Authority(signers[0], key), tuple(trusted)

    def load(self) -> Keys:
        """Everything. Raises `UserError` if the files are damaged."""
        authority, trusted = self.load_authority()
        try:
            [node] = pki.parse_certificates(self._read("node.crt"))
            [client] = pki.parse_certificates(self._read("client.crt"))
        except (OSError, ValueError, ProtocolError) as error:
            raise self._damaged(error) from error
        return Keys(trusted, authority, self.own_key(), node, client)

    def ends(self) -> tuple[float, float]:
        """When our certificates, and that of who signs them, end (Unix seconds)."""
        keys = self.load()
        ours = min(keys.node.not_valid_after_utc, keys.client.not_valid_after_utc)
        return ours.timestamp(), keys.authority.certificate.not_valid_after_utc.timestamp()

    def remove(self) -> None:
        """Forget all: the cluster was never founded, or joining it failed."""
        shutil.rmtree(self.directory, ignore_errors=True)

    # ------------------------------------------------------------ inside

    def _fits(
        self,
        authority: Authority,
        key: PrivateKey,
        party: Party,
        addresses: Sequence[str],
        now: float,
    ) -> bool:
        for name in ("node.crt", "client.crt"):
            try:
                [certificate] = pki.parse_certificates(self._read(name))
            except (OSError, ValueError, ProtocolError):
                return False
            if pki.is_due(certificate, now) or not pki.belongs(certificate, key):
                return False
            if not pki.is_signed_by(certificate, authority.certificate):
                return False
            if pki.serial_of(party.node) != certificate.serial_number:
                return False
            if name == "node.crt" and pki.addresses_of(certificate) != set(addresses):
                return False
        return True

    def _path(self, name: str) -> Path:
        return self.directory / name

    def _damaged(self, reason: object) -> UserError:
        return UserError(
            f"the keys in {self.directory} cannot be used ({reason}): restore them, or move "
            f"{self.directory.parent} away and join with a new token as a new node"
        )

    def _read(self, name: str) -> bytes:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        with open(os.open(self._path(name), flags), "rb") as file:
            return file.read(FILE_BYTES_MAX)

    def _write(self, name: str, content: bytes) -> None:
        """Replace a file so that a crash leaves the old one or the new one."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        fresh = self._path(f".{name}.new")
        fresh.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        with open(os.open(fresh, flags, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self._path(name))
        directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
