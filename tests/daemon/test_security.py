"""A running node's keys: renewed without a restart, and a removed node that hears of it."""

from __future__ import annotations

import errno
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from cryptography import x509

from modelfs import keys
from modelfs.errors import PeerUnavailable
from modelfs.ids import NodeId, Revision
from modelfs.mirror import Mirror, SecurityChanged
from modelfs.ports import Event, Txn
from modelfsd.commands.status import judge_keys
from modelfsd.trust import identity as identities
from modelfsd.trust import pki
from modelfsd.trust.keyring import KeyRing
from modelfsd.trust.pki import Authority, Party
from modelfsd.trust.rotation import Trust
from modelfsd.trust.security import Removed, Security
from modelfsd.trust.tls import Tls
from tests.daemon.peer_parts import CLIENT, SERVER, Served, served
from tests.pki_parts import CLUSTER, authority, key_ring, tls_of

DAY = 86400.0


class Store:
    """As much of `EtcdStore` as keys need."""

    def __init__(self) -> None:
        self.renewals = 0

    async def commit(self, txn: Txn) -> None:
        await trio.lowlevel.checkpoint()

    def set_credentials(self, credentials: object) -> None:
        self.renewals += 1


def security(peer: Served, tls: Tls, mirror: Mirror, state_dir: Path, store: Store) -> Security:
    etcd: Any = store
    client = peer.client()
    return Security(tls, "127.0.0.1", state_dir, etcd, None, True, mirror, peer.server, client)


def shown_by(peer: Served) -> x509.Certificate:
    with closing(peer.raw()) as connection:
        shown = connection.getpeercert(binary_form=True)
        assert shown is not None
        return x509.load_der_x509_certificate(shown)


def removed(node: NodeId, revision: int) -> list[Event]:
    return [Event(keys.revoked(node), b"", Revision(revision), Revision(revision))]


async def test_a_certificate_is_renewed_while_the_node_serves(tmp_path: Path) -> None:
    ring = key_ring(SERVER, directory=tmp_path)
    party, store = Party(CLUSTER, SERVER), Store()
    ring.certify(party, ["127.0.0.1"], time.time() - 61 * DAY, force=True)
    tls = Tls(ring, party)
    with served(tls=tls) as peer:
        driver = security(peer, tls, Mirror(), tmp_path, store)
        client = peer.client()
        await client.ping(SERVER)
        before = shown_by(peer)
        await driver._follow()
        after = shown_by(peer)
        assert (after.not_valid_after_utc - before.not_valid_after_utc).days == 61
        assert after.public_key() == before.public_key() and store.renewals == 1
        await client.ping(SERVER)
        assert client.statistics()[SERVER].connects == 1, "open connections go on"
        await driver._follow()
        assert store.renewals == 1
        client.close()


def trusting(revision: int, *authorities: Authority) -> list[Event]:
    """The decision to trust these, the last of which signs."""
    ders = [pki.to_der(each.certificate) for each in authorities]
    record = msgspec.msgpack.encode(Trust(revision, ders, len(ders) - 1, SERVER))
    return [Event(keys.TRUST, record, Revision(revision), Revision(revision))]


@pytest.mark.expected_logs("is refused|closed the connection")
async def test_who_was_let_in_by_an_authority_that_is_trusted_no_more_is_out(
    tmp_path: Path,
) -> None:
    ring, mirror = key_ring(SERVER, directory=tmp_path), Mirror()
    tls, old = Tls(ring, Party(CLUSTER, SERVER)), authority()
    with served(tls=tls) as peer:
        driver = security(peer, tls, mirror, tmp_path, Store())
        client = peer.client()
        await client.ping(SERVER)
        new = ring.make_next(CLUSTER, time.time())
        mirror.apply(trusting(5, old, new))
        await driver._follow()
        await client.ping(SERVER)
        assert client.statistics()[SERVER].connects == 1, "both are trusted"
        mirror.apply(trusting(6, new))
        await driver._follow()
        with pytest.raises(PeerUnavailable, match=r"refused|ended|TLS failed"):
            await client.ping(SERVER)
        await trio.to_thread.run_sync(peer.wait_for_connections, 0)
        client.close()


@pytest.mark.expected_logs("is refused|closed the connection")
async def test_a_removal_counts_in_the_step_in_which_the_mirror_shows_it(tmp_path: Path) -> None:
    ring, store = key_ring(SERVER, directory=tmp_path), Store()
    tls, mirror = Tls(ring, Party(CLUSTER, SERVER)), Mirror()
    with served(tls=tls) as peer:
        driver = security(peer, tls, mirror, tmp_path, store)
        client, other = peer.client(), peer.client(tls_of(NodeId("2" * 16)))
        await client.ping(SERVER)
        await other.ping(SERVER)
        changes = mirror.apply(removed(CLIENT, 5))
        assert changes == [SecurityChanged()]
        driver.on_changes(changes)
        assert tls.refused == {CLIENT} and ring.listed() == set()
        await driver._follow()
        assert ring.listed() == {CLIENT} and store.renewals == 1
        await other.ping(SERVER)
        assert other.statistics()[SERVER].connects == 1
        client.close()
        other.close()


async def test_a_node_that_was_removed_ends_and_remembers_it(tmp_path: Path) -> None:
    ring, mirror = key_ring(SERVER, directory=tmp_path), Mirror()
    mirror.apply(removed(SERVER, 5))
    tls = Tls(ring, Party(CLUSTER, SERVER))
    with served(tls=tls) as peer:
        driver = security(peer, tls, mirror, tmp_path, Store())
        with pytest.raises(Removed, match="join as a new node with a token"):
            await driver.run()
    assert identities.is_removed(tmp_path)


def test_an_end_of_keys_that_comes_near_is_warned_of(tmp_path: Path) -> None:
    ring, now = key_ring(SERVER, directory=tmp_path), time.time()
    certificate_ends, authority_ends = ring.ends()
    assert 89 * DAY < certificate_ends - now <= 90 * DAY < authority_ends - now
    assert judge_keys(certificate_ends, authority_ends, now) == []
    # Renewed with 30 days left: until 20 there is nothing to say.
    assert judge_keys(certificate_ends, authority_ends, certificate_ends - 21 * DAY) == []
    [warning] = judge_keys(certificate_ends, authority_ends, certificate_ends - 19 * DAY)
    assert "certificate ends in 19 days" in warning
    [warning] = judge_keys(2 * authority_ends, authority_ends, authority_ends - 100 * DAY)
    assert "modelfs ca rotate" in warning


@pytest.mark.expected_logs("keys stay as they are")
@pytest.mark.parametrize("operation", ["_read", "_write"])
async def test_a_machine_short_of_something_ends_no_node(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    virtual_time: trio.testing.MockClock,
    operation: str,
) -> None:
    ring, store, mirror = key_ring(SERVER, directory=tmp_path), Store(), Mirror()
    tls = Tls(ring, Party(CLUSTER, SERVER))

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with served(tls=tls) as peer:
        driver = security(peer, tls, mirror, tmp_path, store)
        driver.on_changes(mirror.apply(removed(CLIENT, 5)))
        async with trio.open_nursery() as nursery:
            with monkeypatch.context() as patch:
                patch.setattr(KeyRing, operation, fail)
                nursery.start_soon(driver.run)
                await trio.sleep(10)
            assert ring.listed() == set()
            await trio.sleep(10)
            assert ring.listed() == {CLIENT}
            nursery.cancel_scope.cancel()


@pytest.mark.expected_logs("cannot be noted")
async def test_a_removed_node_ends_also_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, virtual_time: trio.testing.MockClock
) -> None:
    ring, mirror = key_ring(SERVER, directory=tmp_path), Mirror()
    mirror.apply(removed(SERVER, 5))
    tls = Tls(ring, Party(CLUSTER, SERVER))

    def fail(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(identities, "mark_removed", fail)
    with served(tls=tls) as peer:
        driver = security(peer, tls, mirror, tmp_path, Store())
        with trio.fail_after(60), pytest.raises(Removed):
            await driver.run()
