"""Who does not belong, at the data port: without a certificate, with a foreign one, or removed."""

from __future__ import annotations

import contextlib
import socket
import ssl
import warnings
from contextlib import closing

import pytest
import trio

from modelfs import wire
from modelfs.errors import PeerUnavailable
from modelfs.ids import ClusterId, NodeId
from modelfs.limits import MIB
from modelfs.ports import Holding
from modelfsd.peers import session as peer_session
from modelfsd.peers.client import PeerClient
from modelfsd.trust.pki import Party
from modelfsd.trust.tls import Tls, stranger_context
from tests.daemon.peer_parts import (
    CLIENT,
    GUARD_SECONDS,
    SERVER,
    hello,
    make,
    make_impatient,
    read_frames,
    served,
    wait_for_end,
)
from tests.pki_parts import CLUSTER, key_ring, tls_of

OTHER = ClusterId("d" * 16)
STRANGER = hello(cluster="", node=CLIENT)
REF, TABLE, DATA = make(1000)


def foreign_tls() -> Tls:
    """A node that says it is of our cluster, by an authority of its own."""
    keys = key_ring(CLIENT, cluster=OTHER)
    keys.certify(Party(CLUSTER, CLIENT), ["127.0.0.1"], 1e9, force=True)
    keys.certify(Party(CLUSTER, CLIENT), ["127.0.0.1"], 1.79e9, force=True)
    return Tls(keys, Party(CLUSTER, CLIENT))


@pytest.mark.expected_logs("closed the connection")
@pytest.mark.parametrize("data", [hello(node=CLIENT), b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100])
def test_without_tls_nothing_is_answered(data: bytes) -> None:
    with served() as peer:
        with closing(peer.plain()) as connection:
            connection.sendall(data)
            heard = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := connection.recv(1 << 16):
                    heard += piece
            assert len(heard) <= 7 and wire.MAGIC not in heard, "at most a TLS alert"


@pytest.mark.expected_logs("closed the connection")
def test_old_versions_of_tls_are_refused() -> None:
    context = stranger_context()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with served() as peer, pytest.raises(ssl.SSLError):
        peer.raw(context)


@pytest.mark.parametrize(
    "message",
    [
        wire.Get(REF.id, 0, 1),
        wire.Has(REF.id, False),
        wire.Sync(),
        wire.Ping(),
        wire.Damage(REF.id, REF.checksum, REF.length),
        wire.Put(REF.id, REF.checksum, REF.length, TABLE),
    ],
)
def test_a_stranger_may_ask_to_be_let_in_and_nothing_else(message: wire.Request) -> None:
    with served() as peer, closing(peer.raw(stranger_context())) as connection:
        peer.store.put(REF, TABLE, DATA, Holding.OWNED)
        is_put = isinstance(message, wire.Put)
        connection.sendall(STRANGER + wire.encode(1, wire.Info()))
        connection.sendall(wire.encode(2, wire.Join(b"letter")))
        connection.sendall(wire.encode(3, message, REF.length if is_put else 0))
        greeting, info, welcome, refusal = (f.message for f in read_frames(connection, 4))
        assert isinstance(greeting, wire.Hello) and info == wire.InfoReply({"etcd": []})
        assert welcome == wire.JoinReply(b"welcome") and peer.letters == [(b"letter", None)]
        assert isinstance(refusal, wire.Failure) and "for members" in refusal.text
        wait_for_end(connection)


@pytest.mark.expected_logs("shows no certificate")
def test_a_stranger_who_says_he_is_a_member_is_refused() -> None:
    with served() as peer, closing(peer.raw(stranger_context())) as connection:
        connection.sendall(hello(node=CLIENT))
        [answer] = read_frames(connection, 1)
        assert isinstance(answer.message, wire.Failure)
        wait_for_end(connection)


@pytest.mark.expected_logs("shows the certificate of 9999999999999999")
async def test_a_member_cannot_speak_for_another() -> None:
    liar = Tls(tls_of(CLIENT).keys, Party(CLUSTER, NodeId("2" * 16)))
    with served() as peer:
        with pytest.raises(PeerUnavailable, match="shows the certificate of"):
            await peer.client(liar).ping(SERVER)


@pytest.mark.expected_logs("certificate is refused|closed the connection")
async def test_a_certificate_of_another_authority_is_refused_by_both_sides() -> None:
    foreign = foreign_tls()
    with served() as peer:
        with pytest.raises(PeerUnavailable, match="certificate is refused"):
            await peer.client(foreign).ping(SERVER)
        context = foreign.client
        context.verify_mode = ssl.CERT_NONE  # it believes anybody, but nobody believes it
        with closing(peer.raw(context)) as connection:
            with pytest.raises(OSError, match=r"(?i)unknown.ca|reset|pipe"):
                wait_for_end(connection)


async def test_who_answers_at_a_peers_address_must_be_that_peer() -> None:
    third = NodeId("3" * 16)
    with served() as peer:
        client = PeerClient(tls_of(CLIENT), "client")
        client.set_address(third, peer.host, peer.port)
        with pytest.raises(PeerUnavailable, match=f"is node {SERVER}"):
            await client.ping(third)


@pytest.mark.expected_logs("was removed")
async def test_a_removed_node_loses_open_connections_and_gets_no_new_ones() -> None:
    tls = Tls(tls_of(SERVER).keys, Party(CLUSTER, SERVER))
    with served(tls=tls) as peer, closing(peer.raw()) as connection:
        connection.sendall(hello(node=CLIENT) + wire.encode(1, wire.Ping()))
        read_frames(connection, 2)
        other = peer.client(tls_of(NodeId("2" * 16)))
        await other.ping(SERVER)
        tls.refuse([CLIENT])
        peer.server.refuse({CLIENT})
        await trio.to_thread.run_sync(wait_for_end, connection)
        with pytest.raises(PeerUnavailable, match="was removed from the cluster"):
            await peer.client().ping(SERVER)
        await other.ping(SERVER)
        assert other.statistics()[SERVER].connects == 1, "the others notice nothing"
        other.close()


async def test_a_removed_node_is_not_asked_for_anything() -> None:
    tls = Tls(tls_of(CLIENT).keys, Party(CLUSTER, CLIENT))
    tls.refuse([SERVER])
    with served() as peer:
        with pytest.raises(PeerUnavailable, match="was removed"):
            await peer.client(tls).ping(SERVER)


@pytest.mark.expected_logs("took too long")
def test_a_handshake_that_is_not_finished_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    make_impatient(monkeypatch)
    with served() as peer:
        with closing(peer.plain()) as connection:
            connection.sendall(b"\x16\x03\x01")
            wait_for_end(connection)


# ---------------------------------------------------------------- chunks in the clear


def plain_connection(peer_port: int) -> socket.socket:
    """A member's connection that has left TLS, as a client of its own would make it."""
    raw = socket.create_connection(("127.0.0.1", peer_port))
    raw.settimeout(GUARD_SECONDS)
    connection = tls_of(CLIENT).client.wrap_socket(raw)
    greeting = wire.Hello(1, 1, CLUSTER, CLIENT, "plain", "", True)
    connection.sendall(wire.encode(0, greeting))
    [answer] = read_frames(connection, 1)
    assert isinstance(answer.message, wire.Hello)
    if answer.message.plain:
        connection.unwrap()
        plain = socket.socket(fileno=connection.detach())
        plain.settimeout(GUARD_SECONDS)
        return plain
    return connection


def test_chunks_go_in_the_clear_only_where_the_cluster_says_so() -> None:
    for data_tls in (True, False):
        with served(data_tls=data_tls) as peer:
            with closing(plain_connection(peer.port)) as connection:
                assert isinstance(connection, ssl.SSLSocket) == data_tls


def test_what_goes_in_the_clear_is_chunks_alone() -> None:
    with served(data_tls=False) as peer, closing(plain_connection(peer.port)) as connection:
        peer.store.put(REF, TABLE, DATA, Holding.OWNED)
        connection.sendall(wire.encode(1, wire.Get(REF.id, 0, REF.length)))
        heard = b""
        while not heard.endswith(DATA):
            heard += connection.recv(1 << 16)
        assert heard.startswith(wire.MAGIC)
        connection.sendall(wire.encode(2, wire.Sync()))
        [answer] = read_frames(connection, 1)
        assert isinstance(answer.message, wire.Failure) and "in TLS" in answer.message.text
        wait_for_end(connection)


def test_no_proof_no_chunks_also_where_they_go_in_the_clear() -> None:
    with served(data_tls=False) as peer, closing(peer.raw(stranger_context())) as connection:
        connection.sendall(wire.encode(0, wire.Hello(1, 1, "", CLIENT, "stranger", "", True)))
        connection.sendall(wire.encode(1, wire.Get(REF.id, 0, 1)))
        greeting, refusal = (frame.message for frame in read_frames(connection, 2))
        assert isinstance(greeting, wire.Hello) and not greeting.plain
        assert isinstance(refusal, wire.Failure)


@pytest.mark.parametrize("data_tls", [True, False])
async def test_many_large_chunks_in_both_directions(data_tls: bool) -> None:
    chunks = [make(3 * MIB + seed, seed) for seed in range(6)]
    with served(data_tls=data_tls) as peer:
        client = peer.client()
        async with trio.open_nursery() as nursery:
            for chunk in chunks:
                nursery.start_soon(client.put, SERVER, *chunk)

        async def fetch(number: int) -> None:
            ref, _, data = chunks[number]
            assert await client.fetch(SERVER, ref, 0, ref.length, GUARD_SECONDS) == data

        async with trio.open_nursery() as nursery:
            for number in range(len(chunks)):
                nursery.start_soon(fetch, number)
        await client.sync(SERVER)
        client.close()


@pytest.mark.expected_logs("took too long")
async def test_a_stranger_who_says_nothing_more_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_session, "STRANGER_SECONDS", 0.5)  # from its greeting on
    with served() as peer:
        client = peer.client()
        await client.ping(SERVER)
        before = peer.server.statistics().connections
        for _ in range(3):
            with closing(peer.raw(stranger_context())) as stranger:
                stranger.sendall(STRANGER)
                read_frames(stranger, 1)
                wait_for_end(stranger)
        await client.ping(SERVER)
        await trio.to_thread.run_sync(peer.wait_for_connections, before)
        client.close()


@pytest.mark.expected_logs("without a certificate are open")
@pytest.mark.parametrize("limit", ["UNPROVED_MAX", "UNPROVED_OF_ADDRESS_MAX"])
async def test_strangers_do_not_crowd_members_out(
    limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"modelfsd.peers.server.{limit}", 2)
    with served() as peer, contextlib.ExitStack() as stack:
        client = peer.client()
        await client.ping(SERVER)
        for _ in range(2):
            stranger = stack.enter_context(closing(peer.raw(stranger_context())))
            stranger.sendall(STRANGER)
            read_frames(stranger, 1)
        with pytest.raises(OSError, match=r"reset|EOF|closed"):
            peer.raw(stranger_context())
        await client.ping(SERVER)
        assert peer.server.statistics().connections_refused == 1
        client.close()
