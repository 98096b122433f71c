"""Peers over real sockets whose disks are slow, hang or fail."""

from __future__ import annotations

import os
import threading
from contextlib import closing

import pytest
import trio

from modelfs import wire
from modelfs.chunk import Buffer, ChunkRef
from modelfs.errors import (
    ChunkMissing,
    PeerRefused,
    PeerUnavailable,
)
from modelfs.ids import ChunkId
from modelfs.limits import BLOCK_BYTES, CONNECTIONS_PER_PEER
from modelfs.ports import Holding, OpenChunk
from modelfs.testing.stores import MemoryChunkStore
from modelfsd.peers import session as peer_session
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
    monkeypatch.setattr("modelfsd.peers.client.PUT_PATIENCE_SECONDS", LONG)
    store = SlowStore()
    ref, table, data = make(1000)
    with served(store) as peer, trio.fail_after(GUARD_SECONDS):
        client = peer.client()
        async with trio.open_nursery() as nursery:
            # As many as may be; a reader gets through beside them, and time passes for all.
            for _ in range(2 * CONNECTIONS_PER_PEER):
                nursery.start_soon(client.put, SERVER, ref, table, data)
            started = trio.current_time()
            while trio.current_time() < started + 1.5 * LONG:
                with pytest.raises(ChunkMissing):
                    await client.fetch(SERVER, make(5, 5)[0], 0, 5, GUARD_SECONDS)
                await trio.sleep(0.05)
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
