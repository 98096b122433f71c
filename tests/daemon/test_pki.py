"""Certificates and the files that keep them."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest
from cryptography import x509

from modelfs.errors import ProtocolError, UserError
from modelfs.ids import ClusterId, NodeId
from modelfsd.trust import pki
from modelfsd.trust.keyring import WHOLE, KeyRing
from modelfsd.trust.pki import Party

CLUSTER, NODE = ClusterId("c" * 16), NodeId("1" * 16)
PARTY = Party(CLUSTER, NODE)
DAY = 86400.0


def ring(directory: Path, now: float | None = None) -> KeyRing:
    keys = KeyRing(directory)
    keys.found(CLUSTER, now or time.time())
    keys.certify(PARTY, ["10.0.0.5"], now or time.time())
    return keys


def test_a_certificate_names_node_and_address(tmp_path: Path) -> None:
    keys = ring(tmp_path).load()
    names = keys.node.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [PARTY.uri]
    assert pki.addresses_of(keys.node) == {"10.0.0.5"}
    assert pki.addresses_of(keys.client) == set()
    assert keys.node.serial_number == keys.client.serial_number == pki.serial_of(NODE)
    assert pki.is_signed_by(keys.node, keys.authority.certificate)
    stranger = pki.found_authority(CLUSTER, time.time())
    assert not pki.is_signed_by(keys.node, stranger.certificate)


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_nobody_else_can_read_the_keys(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        keys = ring(tmp_path)
    finally:
        os.umask(before)
    assert keys.is_whole
    assert stat.S_IMODE(keys.directory.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in keys.directory.iterdir()}
    assert modes == dict.fromkeys(WHOLE, 0o600)


def test_certificates_are_renewed_well_before_they_expire(tmp_path: Path) -> None:
    now = time.time()
    keys = ring(tmp_path, now)
    first, key = keys.load().node, keys.own_key()
    assert not keys.certify(PARTY, ["10.0.0.5"], now + 30 * DAY)
    assert keys.certify(PARTY, ["10.0.0.5"], now + 61 * DAY)
    second = keys.load().node
    assert second.not_valid_after_utc > first.not_valid_after_utc
    assert pki.belongs(second, key) and second.serial_number == first.serial_number
    assert keys.certify(PARTY, ["10.0.0.6"], now + 61 * DAY), "another address"
    assert keys.certify(PARTY, ["10.0.0.6"], now - 300 * DAY), "the clock was set back"


def test_a_revocation_list_names_nodes(tmp_path: Path) -> None:
    keys = ring(tmp_path)
    assert list(x509.load_pem_x509_crl(keys.revoked.read_bytes())) == []
    keys.refuse([NODE], time.time())
    revoked = x509.load_pem_x509_crl(keys.revoked.read_bytes())
    assert [each.serial_number for each in revoked] == [pki.serial_of(NODE)]
    assert revoked.is_signature_valid(keys.load().authority.key.public_key())


def test_a_request_proves_its_key_and_nothing_else(tmp_path: Path) -> None:
    key = pki.new_key()
    request = pki.request(key, NODE)
    assert pki.requested_key(request) == key.public_key()
    for damage in (b"", request[:-1], request[:-8] + bytes(8), b"\x30\x82" * 40):
        with pytest.raises(ProtocolError):
            pki.requested_key(damage)


def test_damaged_files_are_told_with_what_to_do(tmp_path: Path) -> None:
    keys = ring(tmp_path)
    (keys.directory / "ca.key").write_bytes(pki.key_to_pem(pki.new_key()))
    with pytest.raises(UserError, match="join with a new token"):
        keys.load()
    (keys.directory / "ca.key").unlink()
    assert not keys.is_whole
    (keys.directory / "ca.key").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="cannot be used"):
        keys.load()


def test_what_a_certificate_names_must_be_well_formed() -> None:
    assert pki.party_of([("DNS", "x"), ("URI", PARTY.uri)]) == PARTY
    assert pki.party_of([("URI", PARTY.uri), ("URI", PARTY.uri)]) is None
    for uri in ("", "modelfs://", f"modelfs://{CLUSTER}", f"http://{CLUSTER}/{NODE}",
                f"modelfs://{CLUSTER}/{NODE}/", f"modelfs://../{NODE}"):  # fmt: skip
        assert pki.party_of([("URI", uri)]) is None
