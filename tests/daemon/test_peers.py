"""Peers over real sockets that die, stall, restart, or answer nonsense."""

from __future__ import annotations

import socket
import struct
import threading
import time
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from modelfs import wire
from modelfs.errors import (
    ChunkMissing,
    CorruptChunk,
    PeerUnavailable,
)
from modelfs.limits import CONNECTIONS_PER_PEER, MIB
from modelfs.ports import Holding
from modelfsd.peers.link import WAIT_SECONDS, Conversation, Link, PeerSilent
from tests.daemon.peer_parts import (
    CLIENT,
    GUARD_SECONDS,
    LONG,
    SERVER,
    SHORT,
    hello,
    make,
    served,
    strange_peer,
    wait_for_end,
)
from tests.pki_parts import tls_of

# ---------------------------------------------------------------- peers that die or stall


async def test_a_peer_that_accepts_and_says_nothing_is_unavailable() -> None:
    with strange_peer(wait_for_end) as (client, _):
        with trio.fail_after(GUARD_SECONDS):
            with pytest.raises(PeerUnavailable, match="silent"):
                await client.fetch(SERVER, make(100)[0], 0, 100, SHORT)


async def test_a_peer_that_dies_in_mid_transfer_is_unavailable() -> None:
    ref, table, data = make(MIB)

    def talk(connection: socket.socket) -> None:
        connection.sendall(hello())
        connection.recv(1 << 16)
        header = wire.encode(1, wire.GetReply(ref.length, table), ref.length)
        connection.sendall(header + data[: len(data) // 2])
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()  # a reset, as from a killed process

    with strange_peer(talk) as (client, _):
        with trio.fail_after(GUARD_SECONDS):
            with pytest.raises(PeerUnavailable):
                await client.fetch(SERVER, ref, 0, ref.length, GUARD_SECONDS)


async def test_a_peer_that_stalls_in_mid_transfer_is_unavailable() -> None:
    ref, table, data = make(MIB)

    def talk(connection: socket.socket) -> None:
        connection.sendall(hello())
        connection.recv(1 << 16)
        header = wire.encode(1, wire.GetReply(ref.length, table), ref.length)
        connection.sendall(header + data[: len(data) // 2])
        wait_for_end(connection)

    with strange_peer(talk) as (client, _):
        with trio.fail_after(GUARD_SECONDS):
            with pytest.raises(PeerUnavailable, match="silent"):
                await client.fetch(SERVER, ref, 0, ref.length, SHORT)


async def test_all_who_wait_for_a_silent_peer_fail_together() -> None:
    with strange_peer(wait_for_end) as (client, _):
        failures: list[PeerUnavailable] = []

        async def fetch() -> None:
            with pytest.raises(PeerUnavailable) as caught:
                await client.fetch(SERVER, make(100)[0], 0, 100, SHORT)
            failures.append(caught.value)

        with trio.fail_after(GUARD_SECONDS):
            async with trio.open_nursery() as nursery:
                for _ in range(10 * CONNECTIONS_PER_PEER):
                    nursery.start_soon(fetch)
        # Only the first few found out for themselves.
        assert len(failures) == 10 * CONNECTIONS_PER_PEER
        assert client.statistics()[SERVER].connects <= CONNECTIONS_PER_PEER
        assert client.inflight(SERVER) == 0


async def test_who_stood_still_looks_for_an_answer_before_it_calls_a_peer_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ref, table, data = make(100)
    skipped_seconds = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + skipped_seconds)
    monkeypatch.setattr("modelfsd.peers.link.time", clock)

    def talk(connection: socket.socket) -> None:
        nonlocal skipped_seconds
        connection.sendall(hello())
        connection.recv(1 << 16)
        skipped_seconds = 3 * LONG  # the whole machine stands still before the answer
        connection.sendall(wire.encode(1, wire.GetReply(ref.length, table), 100) + data)
        wait_for_end(connection)

    with strange_peer(talk) as (client, _):
        with trio.fail_after(GUARD_SECONDS):
            assert await client.fetch(SERVER, ref, 0, 100, LONG) == data


def test_who_stood_still_has_not_listened_though_the_peer_was_heard_elsewhere_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("modelfsd.peers.link.time", SimpleNamespace(monotonic=lambda: now))
    link = Link(SERVER, tls_of(CLIENT), "", "127.0.0.1", 1)
    channel: Any = SimpleNamespace(bytes_in=0, bytes_out=0)
    check = Conversation[None](link, SHORT, lambda _: None)._watch(channel)
    for _ in range(20):
        now += WAIT_SECONDS
        link._hear()
        check()
    now += 10 * SHORT  # the whole machine stands still
    check()
    now += WAIT_SECONDS
    check()
    now += 2 * WAIT_SECONDS
    with pytest.raises(PeerSilent):
        check()


async def test_a_peer_that_talks_on_one_connection_is_alive_on_all() -> None:
    ref, table, data = make(100)
    first, second = threading.Event(), threading.Event()

    def talk(connection: socket.socket) -> None:
        connection.sendall(hello())
        connection.recv(1 << 16)
        if first.is_set():
            # The other one: a trickle, for longer than the patience of the first.
            for _ in range(20):
                connection.sendall(wire.encode(1, wire.Working()))
                second.wait(LONG / 10)
            second.set()
        first.set()
        second.wait(GUARD_SECONDS)
        connection.sendall(wire.encode(1, wire.GetReply(ref.length, table), 100) + data)
        wait_for_end(connection)

    with strange_peer(talk) as (client, _):

        async def fetch() -> None:
            assert await client.fetch(SERVER, ref, 0, 100, LONG) == data

        with trio.fail_after(GUARD_SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fetch)
                await trio.to_thread.run_sync(first.wait, GUARD_SECONDS)
                nursery.start_soon(fetch)


async def test_a_cancelled_fetch_returns_at_once_and_drops_its_connection() -> None:
    ended = threading.Event()
    asked = threading.Event()

    def talk(connection: socket.socket) -> None:
        connection.sendall(hello())
        connection.recv(1 << 16)
        asked.set()
        try:
            wait_for_end(connection)
        finally:
            ended.set()

    with strange_peer(talk) as (client, _):
        with trio.fail_after(GUARD_SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.fetch, SERVER, make(9)[0], 0, 9, GUARD_SECONDS)
                await trio.to_thread.run_sync(asked.wait)
                nursery.cancel_scope.cancel()
            assert await trio.to_thread.run_sync(ended.wait, GUARD_SECONDS)
            assert client.inflight(SERVER) == 0


async def test_a_restarted_peer_costs_nobody_an_error() -> None:
    ref, table, data = make(100)
    with served() as peer:
        peer.store.put(ref, table, data, Holding.OWNED)
        client = peer.client()
        assert await client.fetch(SERVER, ref, 0, 100, 5) == data
        before = await client.incarnation(SERVER)
        peer.server.stop()
        peer.server = peer.new_server()
        peer.server.start(peer.host, peer.port)
        assert await client.fetch(SERVER, ref, 0, 100, 5) == data
        with pytest.raises(PeerUnavailable, match="restarted"):
            await client.sync(SERVER, before)
        client.close()


async def test_a_forgotten_peers_requests_end() -> None:
    with strange_peer(wait_for_end) as (client, _):
        with trio.fail_after(GUARD_SECONDS):
            async with trio.open_nursery() as nursery:

                async def fetch() -> None:
                    with pytest.raises(PeerUnavailable):
                        await client.fetch(SERVER, make(9)[0], 0, 9, GUARD_SECONDS)

                nursery.start_soon(fetch)
                while not client.statistics()[SERVER].connects:
                    await trio.lowlevel.checkpoint()
                client.forget(SERVER)


# ---------------------------------------------------------------- nonsense


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        wire.encode(0, wire.Ok()),
        hello(node="2" * 16),
        hello(cluster="d" * 16),
        hello(version=99),
        hello() + wire.encode(5, wire.Ok()),
        hello() + wire.encode(1, wire.Ok()),
        hello() + wire.encode(1, wire.GetReply(100, bytes(8)), 99),
        hello() + wire.PREFIX.pack(wire.MAGIC, wire.Kind.GET_REPLY, 0, 0, 1, 20, 1 << 31),
        b"",
    ],
)
async def test_a_peer_that_is_not_what_it_should_be_is_unavailable(answer: bytes) -> None:
    def talk(connection: socket.socket) -> None:
        connection.sendall(answer)
        connection.recv(1 << 16)
        connection.shutdown(socket.SHUT_WR)
        wait_for_end(connection)

    with strange_peer(talk) as (client, _):
        with trio.fail_after(GUARD_SECONDS), pytest.raises(PeerUnavailable):
            await client.fetch(SERVER, make(100)[0], 0, 100, GUARD_SECONDS)


async def test_bytes_that_are_not_the_chunks_are_corrupt() -> None:
    ref, table, data = make(100)
    other = make(101)

    def talk(connection: socket.socket) -> None:
        connection.sendall(hello())
        connection.recv(1 << 16)
        connection.sendall(wire.encode(1, wire.GetReply(100, table), 100) + data[::-1])
        connection.recv(1 << 16)
        connection.sendall(wire.encode(2, wire.GetReply(101, other[1]), 101) + other[2])
        wait_for_end(connection)

    with strange_peer(talk) as (client, _):
        with trio.fail_after(GUARD_SECONDS):
            for _ in range(2):
                with pytest.raises(CorruptChunk):
                    await client.fetch(SERVER, ref, 0, 100, GUARD_SECONDS)


# ---------------------------------------------------------------- what is asked of them


async def test_only_a_copy_that_is_really_bad_is_reported_to_the_node() -> None:
    good, bad = make(1000, 1), make(1000, 2)
    with served() as peer:
        for chunk in (good, bad):
            peer.store.put(*chunk, Holding.OWNED)
        peer.store.damage(bad[0].id)
        client = peer.client()
        for ref, _, _ in (good, bad):
            await client.report_damage(SERVER, ref)
        assert peer.damaged == [bad[0]]
        with pytest.raises(ChunkMissing):
            await client.report_damage(SERVER, bad[0])
        client.close()


async def test_a_chunk_that_is_offered_is_sent_only_if_it_is_not_there() -> None:
    ref, table, data = make(MIB)
    with served() as peer, closing(peer.client()) as client:
        assert await client.put(SERVER, ref, table, data)
        assert peer.server.statistics().requests == {"put": 1}, "nobody asked"
        assert not await client.put(SERVER, ref, table, data, offer=True)
        assert peer.server.statistics().requests == {"put": 1, "has": 1}
        other, table, data = make(MIB, seed=1)
        assert await client.put(SERVER, other, table, data, offer=True)
        assert peer.server.statistics().requests == {"put": 2, "has": 2}
        assert all(peer.store.has([ref.id, other.id], renew=False))
