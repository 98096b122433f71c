"""Peers over real sockets that die, stall, restart, answer nonsense, or have failing disks."""

from __future__ import annotations

import os
import socket
import struct
import threading
from contextlib import closing

import pytest
import trio

from modelfs import wire
from modelfs.chunk import Buffer, ChunkRef
from modelfs.errors import (
    ChunkMissing,
    CorruptChunk,
    PeerRefused,
    PeerUnavailable,
)
from modelfs.ids import ChunkId
from modelfs.limits import BLOCK_BYTES, CONNECTIONS_PER_PEER, MIB
from modelfs.ports import Holding, OpenChunk
from modelfs.testing.stores import MemoryChunkStore
from modelfsd.peers import session as peer_session
from tests.daemon.peer_parts import (
    CLIENT,
    GUARD_SECONDS,
    SERVER,
    SHORT,
    hello,
    make,
    served,
    strange_peer,
    wait_for_end,
)

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


async def test_a_peer_that_talks_on_one_connection_is_alive_on_all() -> None:
    ref, table, data = make(100)
    first, second = threading.Event(), threading.Event()

    def talk(connection: socket.socket) -> None:
        connection.sendall(hello())
        connection.recv(1 << 16)
        if first.is_set():
            # The other one: a trickle, for several times the patience of the first.
            for _ in range(20):
                connection.sendall(wire.encode(1, wire.Working()))
                second.wait(SHORT / 4)
            second.set()
        first.set()
        second.wait(GUARD_SECONDS)
        connection.sendall(wire.encode(1, wire.GetReply(ref.length, table), 100) + data)
        wait_for_end(connection)

    with strange_peer(talk) as (client, _):

        async def fetch() -> None:
            assert await client.fetch(SERVER, ref, 0, 100, SHORT) == data

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


# ---------------------------------------------------------------- slow and failing disks


class SlowStore(MemoryChunkStore):
    """A store whose put and sync wait for the test."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go_on = threading.Event()

    def put(self, ref: ChunkRef, table: Buffer, data: Buffer, holding: Holding) -> None:
        assert self.may_go_on.wait(GUARD_SECONDS)
        super().put(ref, table, data, holding)

    def sync(self) -> None:
        assert self.may_go_on.wait(GUARD_SECONDS)
        super().sync()


def test_a_slow_put_is_accompanied_by_signs_of_life() -> None:
    store = SlowStore()
    ref, table, data = make(1000)
    with served(store) as peer, closing(peer.raw()) as connection:
        put = wire.Put(ref.id, ref.checksum, ref.length, table)
        connection.sendall(hello(node=CLIENT) + wire.encode(7, put, 1000) + data)
        reader, messages = wire.FrameReader(), list[wire.Message]()
        while len(messages) < 5:
            reader.receive(connection.recv(1 << 16))
            while (frame := reader.next_frame()) is not None:
                messages.append(frame.message)
        assert set(messages[1:]) == {wire.Working()}
        store.may_go_on.set()
        while not isinstance(messages[-1], wire.Ok):
            reader.receive(connection.recv(1 << 16))
            while (frame := reader.next_frame()) is not None:
                messages.append(frame.message)
        assert store.has([ref.id], renew=False) == [True]


async def test_a_slow_fsync_does_not_make_a_peer_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("modelfsd.peers.client.PUT_PATIENCE_SECONDS", 2 * SHORT)
    store = SlowStore()
    ref, table, data = make(1000)
    with served(store) as peer, trio.fail_after(GUARD_SECONDS):
        client = peer.client()
        async with trio.open_nursery() as nursery:
            # As many as may be; a reader gets through beside them, and time passes for all.
            for _ in range(2 * CONNECTIONS_PER_PEER):
                nursery.start_soon(client.put, SERVER, ref, table, data)
            started = trio.current_time()
            while trio.current_time() < started + 6 * SHORT:
                with pytest.raises(ChunkMissing):
                    await client.fetch(SERVER, make(5, 5)[0], 0, 5, SHORT)
                await trio.sleep(SHORT / 8)
            store.may_go_on.set()
        await client.sync(SERVER)
        assert client.latency(SERVER) > 0
        assert 0 < client.load(SERVER) < float("inf")
        client.close()


async def test_a_disk_that_hangs_does_not_live_by_signs_of_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peer_session, "WORKING_SECONDS_MAX", 0.5)
    monkeypatch.setattr("modelfsd.peers.client.PUT_PATIENCE_SECONDS", SHORT)
    store = SlowStore()
    with served(store) as peer, trio.fail_after(GUARD_SECONDS):
        client = peer.client()
        with pytest.raises(PeerUnavailable, match="silent"):
            await client.put(SERVER, *make(1000))
        store.may_go_on.set()
        client.close()


async def test_a_request_that_is_never_answered_ends_though_its_patience_lasts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("modelfsd.peers.link.STALL_SECONDS", SHORT)
    with strange_peer(wait_for_end) as (client, _):
        with trio.fail_after(GUARD_SECONDS):
            with pytest.raises(PeerUnavailable, match="no answer"):
                await client.fetch(SERVER, make(9)[0], 0, 9, GUARD_SECONDS)


class FailingStore(MemoryChunkStore):
    """A disk that fails in every way that it can."""

    def open(self, chunk: ChunkId) -> OpenChunk:
        raise OSError(5, "Input/output error")

    def put(self, ref: ChunkRef, table: Buffer, data: Buffer, holding: Holding) -> None:
        raise OSError(30, "Read-only file system")


@pytest.mark.expected_logs("the disk failed")
async def test_a_failing_disk_is_a_refusal() -> None:
    ref, table, data = make(1000)
    with served(FailingStore()) as peer:
        client = peer.client()
        with pytest.raises(PeerRefused, match="Read-only"):
            await client.put(SERVER, ref, table, data)
        with pytest.raises(PeerRefused, match="Input/output"):
            await client.fetch(SERVER, ref, 0, 10, 5)
        assert client.statistics()[SERVER].connects == 1
        client.close()


class ShrinkingStore(MemoryChunkStore):
    """A chunk file that is shorter than it was when it was opened."""

    def open(self, chunk: ChunkId) -> OpenChunk:
        opened = super().open(chunk)
        os.ftruncate(opened.fd, 10)
        return opened


async def test_a_file_that_shrinks_while_it_is_sent_ends_the_connection() -> None:
    ref, table, data = make(BLOCK_BYTES)
    with served(ShrinkingStore()) as peer:
        peer.store.put(ref, table, data, Holding.OWNED)
        client = peer.client()
        with trio.fail_after(GUARD_SECONDS), pytest.raises(PeerUnavailable):
            await client.fetch(SERVER, ref, 0, BLOCK_BYTES, GUARD_SECONDS)
        client.close()


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
