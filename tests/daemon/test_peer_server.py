"""The server against clients that stall, send garbage, or do not belong."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
import trio

from modelfs import wire
from modelfs.errors import PeerUnavailable, UserError
from modelfs.limits import MIB
from modelfs.ports import Holding
from modelfsd.peers import session as peer_session
from modelfsd.peers.client import PeerClient
from tests.daemon.peer_parts import (
    CLIENT,
    GUARD_SECONDS,
    SERVER,
    hello,
    make,
    make_impatient,
    read_frames,
    served,
    trickle,
    wait_for_end,
)

OURS = hello(node=CLIENT)


@pytest.mark.expected_logs("closed the connection")
@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        wire.encode(0, wire.Ping()),
        hello(node=CLIENT) + wire.encode(1, wire.Ok()),
        OURS + wire.PREFIX.pack(wire.MAGIC, wire.Kind.PUT, 0, 0, 1, 1 << 31, 0),
        hello(node=CLIENT)
        + wire.PREFIX.pack(wire.MAGIC, wire.Kind.PUT, 0, 0, 1, 9, 1 << 31)
        + bytes(9),
        hello(node=CLIENT)
        + wire.PREFIX.pack(wire.MAGIC, wire.Kind.GET, 0, 0, 1, 3, 0)
        + b"\xc1\xc1\xc1",
    ],
)
def test_garbage_ends_its_connection_and_no_other(garbage: bytes) -> None:
    with served() as peer, closing(peer.raw()) as good, closing(peer.raw()) as bad:
        good.sendall(hello(node=CLIENT))
        bad.sendall(garbage)
        wait_for_end(bad)
        good.sendall(wire.encode(1, wire.Ping()))
        answers = read_frames(good, 2)
        assert isinstance(answers[0].message, wire.Hello)
        assert answers[1] == wire.Frame(1, wire.Ok(), 0)


def test_pipelined_requests_are_answered_in_order() -> None:
    ref, table, data = make(1000)
    put = wire.Put(ref.id, ref.checksum, ref.length, table)
    with served() as peer, closing(peer.raw()) as connection:
        connection.sendall(
            hello(node=CLIENT)
            + wire.encode(1, wire.Ping())
            + wire.encode(2, put, len(data))
            + data
            + wire.encode(3, wire.Has(ref.id, True))
            + wire.encode(4, wire.Get(bytes(32), 0, 1))
            + wire.encode(5, wire.Sync())
        )
        answers = read_frames(connection, 6)[1:]
        assert [frame.request for frame in answers] == [1, 2, 3, 4, 5]
        assert answers[2].message == wire.HasReply(b"\x01")
        failure = answers[3].message
        assert isinstance(failure, wire.Failure)
        assert failure.kind is wire.FailureKind.MISSING
    assert peer.server.statistics().connections == 0


def test_a_put_that_fails_its_checksum_is_refused_and_the_connection_goes_on() -> None:
    ref, table, data = make(1000)
    put = wire.Put(ref.id, ref.checksum, ref.length, table)
    with served() as peer, closing(peer.raw()) as connection:
        connection.sendall(hello(node=CLIENT) + wire.encode(1, put, 1000) + data[::-1])
        connection.sendall(wire.encode(2, wire.Ping()))
        answers = read_frames(connection, 3)
        failure = answers[1].message
        assert isinstance(failure, wire.Failure)
        assert failure.kind is wire.FailureKind.CORRUPT
        assert answers[2].message == wire.Ok()
        assert peer.store.usage().owned_chunks == 0


@pytest.mark.expected_logs("refused: ")
@pytest.mark.parametrize(
    ("greeting", "kind"),
    [
        (hello(cluster="d" * 16), wire.FailureKind.WRONG_CLUSTER),
        (hello(node=CLIENT, version=99), wire.FailureKind.VERSION),
        (hello(node=SERVER), wire.FailureKind.REFUSED),
    ],
)
def test_who_does_not_belong_is_told_why_and_cut_off(
    greeting: bytes, kind: wire.FailureKind
) -> None:
    with served() as peer, closing(peer.raw()) as connection:
        connection.sendall(greeting)
        last = read_frames(connection, 1)[-1].message
        assert isinstance(last, wire.Failure)
        assert last.kind is kind
        wait_for_end(connection)


@pytest.mark.expected_logs("closed the connection")
def test_a_client_that_sends_a_byte_now_and_then_is_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with served() as peer, closing(peer.raw()) as slow:
        slow.sendall(hello(node=CLIENT))
        read_frames(slow, 1)
        make_impatient(monkeypatch)
        frame = wire.encode(1, wire.Has(bytes(32 * 1000), False))
        with pytest.raises(OSError, match=r"reset|pipe|the end"):
            trickle(slow, frame)


@pytest.mark.expected_logs("closed the connection")
def test_a_client_that_never_greets_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    make_impatient(monkeypatch, 1.0)  # the handshake must be over by then
    with served() as peer, closing(peer.raw()) as connection:
        wait_for_end(connection)


@pytest.mark.expected_logs("closed the connection")
def test_a_client_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_session, "BYTES_PER_SECOND_MIN", 1 << 40)
    ref, table, data = make(32 * MIB)
    with served() as peer, closing(peer.raw()) as connection:
        peer.store.put(ref, table, data, Holding.OWNED)
        connection.sendall(hello(node=CLIENT))
        read_frames(connection, 1)  # so its thread is there
        make_impatient(monkeypatch)
        connection.sendall(wire.encode(1, wire.Get(ref.id, 0, ref.length)))
        for thread in threading.enumerate():
            if thread.name.startswith("peer-"):
                thread.join(GUARD_SECONDS)
        assert peer.server.statistics().connections == 0
        assert peer.server.statistics().bytes_out < ref.length


@pytest.mark.expected_logs("connections are open")
async def test_more_connections_than_allowed_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelfsd.peers.server.CONNECTIONS_MAX", 1)
    monkeypatch.setattr("modelfsd.peers.server.ROOM_SECONDS", 0.0)
    monkeypatch.setattr("modelfsd.peers.link.BUSY_SECONDS", GUARD_SECONDS)
    with served() as peer, closing(peer.raw()) as first:
        ping = wire.encode(1, wire.Ping())
        first.sendall(hello(node=CLIENT) + ping[:-1])  # so it is not idle
        read_frames(first, 1)
        client = peer.client()
        with pytest.raises(PeerUnavailable, match="1 connections are open, and in use"):
            await client.ping(SERVER, GUARD_SECONDS / 2)
        assert peer.server.statistics().connections_refused == 1
        first.sendall(ping[-1:])
        assert read_frames(first, 1)[0].message == wire.Ok()
        client.close()


async def test_idle_connections_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelfsd.peers.server.CONNECTIONS_MAX", 2)
    with served() as peer:
        clients = [peer.client() for _ in range(4)]
        for client in [*clients, *clients]:  # each has the connection of one before
            await client.ping(SERVER, GUARD_SECONDS)
        statistics = peer.server.statistics()
        assert statistics.connections_refused == 0
        assert statistics.connections_total == sum(c.statistics()[SERVER].connects for c in clients)
        await trio.to_thread.run_sync(peer.wait_for_connections, 2)
        for client in clients:
            client.close()


@pytest.mark.expected_logs("and in use")
async def test_more_clients_than_places_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelfsd.peers.server.CONNECTIONS_MAX", 2)
    ref, table, data = make(MIB)
    with served() as peer, trio.fail_after(GUARD_SECONDS):
        peer.store.put(ref, table, data, Holding.OWNED)
        clients = [peer.client() for _ in range(8)]

        async def fetch_often(client: PeerClient) -> None:
            for _ in range(20):
                assert await client.fetch(SERVER, ref, 0, MIB, GUARD_SECONDS) == data

        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(fetch_often, client)
        for client in clients:
            client.close()


# ---------------------------------------------------------------- start, stop, counters


def test_a_taken_port_is_named_with_what_to_do() -> None:
    with served() as peer:
        other = peer.new_server()
        with pytest.raises(UserError, match=rf"127\.0\.0\.1 port {peer.port}.*--listen"):
            other.start(peer.host, peer.port)
        other.stop()


async def test_both_sides_count_the_same_bytes() -> None:
    ref, table, data = make(MIB)
    with served() as peer:
        client = peer.client()
        await client.put(SERVER, ref, table, data)
        assert await client.fetch(SERVER, ref, 0, MIB, 5) == data
        await client.ping(SERVER)
        ours = client.statistics()[SERVER]
        with trio.fail_after(GUARD_SECONDS):  # it counts an answer when it has been sent
            while peer.server.statistics().bytes_out < ours.bytes_in:  # noqa: ASYNC110  # threads
                await trio.sleep(0.001)
        theirs = peer.server.statistics()
        assert theirs.requests == {"put": 1, "get": 1, "ping": 1}
        assert (theirs.bytes_in, theirs.bytes_out) == (ours.bytes_out, ours.bytes_in)
        assert ours.bytes_in > MIB
        assert ours.connects == 1
        client.close()


def test_stop_ends_all_threads() -> None:
    before = set(threading.enumerate())
    with served() as peer, closing(peer.raw()) as connection:
        connection.sendall(hello(node=CLIENT))
        read_frames(connection, 1)
        peer.server.stop()
        assert set(threading.enumerate()) <= before
        wait_for_end(connection)
