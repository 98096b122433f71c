"""Hostile connections over real sockets, at every stage, on both sides.

Each is ended with one line in the log, leaves no connection behind, and nobody else notices.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from modelfs import wire
from modelfs.errors import CorruptChunk, PeerUnavailable
from modelfs.ids import NodeId
from modelfs.inode import NodeRecord
from modelfs.manifest import PlacedChunk
from modelfs.ports import Holding
from modelfs.testing.stores import MemoryChunkStore
from modelfsd.peers import link
from modelfsd.peers.client import PeerClient
from modelfsd.storage.chunks import Chunks
from modelfsd.trust.tls import stranger_context
from tests.daemon.node_parts import cluster_of
from tests.daemon.peer_parts import (
    CLIENT,
    GUARD_SECONDS,
    SERVER,
    SHORT,
    Served,
    hello,
    make,
    make_impatient,
    read_frames,
    served,
    strange_peer,
    trickle,
    wait_for_end,
)
from tests.pki_parts import tls_of

OTHER_ADDRESS = "127.0.0.2"
REF, TABLE, DATA = make(1000)
PUT = wire.encode(1, wire.Put(REF.id, REF.checksum, REF.length, TABLE), REF.length) + DATA
CLIENT_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)  # as TLS begins


@contextmanager
def besides(peer: Served) -> Iterator[None]:
    """A member at another address is served before, during and after the body."""
    with closing(peer.raw(source=OTHER_ADDRESS)) as good:
        good.sendall(hello(node=CLIENT) + wire.encode(1, wire.Ping()))
        assert read_frames(good, 2)[1].message == wire.Ok()
        yield
        peer.wait_for_connections(1)
        good.sendall(wire.encode(2, wire.Ping()))
        assert read_frames(good, 1)[0] == wire.Frame(2, wire.Ok(), 0)
    peer.wait_for_connections(0)


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings of the server, and what is worse."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# ---------------------------------------------------------------- who sends a byte now and then


Impatient = Callable[[], None]  # what makes the server's deadlines short


def before_tls(peer: Served, impatient: Impatient) -> None:
    impatient()
    with closing(peer.plain()) as slow:
        trickle(slow, CLIENT_HELLO)


def before_hello(peer: Served, impatient: Impatient) -> None:
    impatient()
    with closing(peer.raw()) as slow:
        trickle(slow, hello(node=CLIENT) * 9)


def in_a_header(peer: Served, impatient: Impatient) -> None:
    with closing(peer.raw()) as slow:
        slow.sendall(hello(node=CLIENT))
        read_frames(slow, 1)
        impatient()
        trickle(slow, wire.encode(1, wire.Has(bytes(32 * 1000), False)))


def in_a_payload(peer: Served, impatient: Impatient) -> None:
    with closing(peer.raw()) as slow:
        slow.sendall(hello(node=CLIENT))
        read_frames(slow, 1)
        impatient()
        slow.sendall(PUT[:-900])
        trickle(slow, DATA[-900:])


def as_a_stranger(peer: Served, impatient: Impatient) -> None:
    impatient()
    with closing(peer.raw(stranger_context())) as slow:
        slow.sendall(hello(cluster="", node=CLIENT))
        trickle(slow, wire.encode(1, wire.Join(bytes(2000))))


STAGES = [before_tls, before_hello, in_a_header, in_a_payload, as_a_stranger]


@pytest.mark.expected_logs("closed the connection")
@pytest.mark.parametrize("attack", STAGES)
def test_who_sends_a_byte_now_and_then_is_cut_off(
    attack: Callable[[Served, Impatient], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with served() as peer, besides(peer):
        for _ in range(2):
            with monkeypatch.context() as patch:
                with pytest.raises(OSError, match=r"(?i)reset|pipe|the end|EOF|closed"):
                    attack(peer, partial(make_impatient, patch))
                peer.wait_for_connections(1)
        assert len(lines_of(caplog)) == 1, "one line for an address in a while"


# ---------------------------------------------------------------- truncation


@pytest.mark.expected_logs("closed the connection")
@pytest.mark.parametrize("length", [0, 1, 3, 5, 100, len(CLIENT_HELLO)])
def test_an_end_in_the_handshake_leaves_nothing(length: int) -> None:
    with served() as peer, besides(peer):
        with closing(peer.plain()) as connection:
            connection.sendall(CLIENT_HELLO[:length])


@pytest.mark.expected_logs("closed the connection")
def test_an_end_at_any_place_of_a_conversation_leaves_nothing() -> None:
    conversation = hello(node=CLIENT) + PUT + wire.encode(2, wire.Has(REF.id, True))
    cuts = {*range(0, len(conversation), 41), len(hello(node=CLIENT)), len(conversation) - 1}
    with served() as peer, besides(peer):
        for cut in sorted(cuts):
            with closing(peer.raw()) as connection:
                connection.sendall(conversation[:cut])
            peer.wait_for_connections(1)
        assert peer.store.usage().owned_chunks == 1, "from those that sent it whole"


# ---------------------------------------------------------------- replay


def forward(source: socket.socket, target: socket.socket, record: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            record += data
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def overheard(peer: Served) -> bytes:
    """All that a member sends who puts a chunk, as it goes over the network."""
    heard = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        outer = socket.create_connection(listener.getsockname()[:2], GUARD_SECONDS)
        inner, _ = listener.accept()
        onward = peer.plain()
        pairs = ((inner, onward, heard), (onward, inner, bytearray()))
        threads = [threading.Thread(target=forward, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        with closing(tls_of(CLIENT).client.wrap_socket(outer)) as connection:
            connection.sendall(hello(node=CLIENT) + PUT)
            assert read_frames(connection, 2)[1].message == wire.Ok()
        for thread in threads:
            thread.join()
        inner.close()
        onward.close()
    return bytes(heard)


@pytest.mark.expected_logs("closed the connection")
def test_what_was_overheard_is_worth_nothing_on_another_connection() -> None:
    with served() as peer, besides(peer):
        recording = overheard(peer)
        assert len(recording) > len(PUT) and bytes(REF.id) not in recording
        peer.store.delete(REF.id)
        with closing(peer.plain()) as again:
            with contextlib.suppress(OSError):
                again.sendall(recording)
                wait_for_end(again)
        peer.wait_for_connections(1)
        assert peer.store.usage().owned_chunks == 0
        assert peer.server.statistics().requests["put"] == 1


def test_a_member_that_repeats_its_frames_stores_the_same_once() -> None:
    with served() as peer, besides(peer):
        for _ in range(2):
            with closing(peer.raw()) as connection:
                connection.sendall(hello(node=CLIENT) + PUT + PUT)
                assert [f.message for f in read_frames(connection, 3)[1:]] == [wire.Ok(), wire.Ok()]
        assert peer.store.usage().owned_chunks == 1


# ---------------------------------------------------------------- servers that are none


async def test_a_server_without_tls_is_told_nothing() -> None:
    heard: list[bytes] = []

    def pose(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with closing(connection):
            connection.sendall(hello())
            with contextlib.suppress(OSError):
                while data := connection.recv(1 << 16):
                    heard.append(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=pose, args=(listener,))
        thread.start()
        client = PeerClient(tls_of(CLIENT), "client")
        client.set_address(SERVER, *listener.getsockname()[:2])
        with pytest.raises(PeerUnavailable):
            await client.put(SERVER, REF, TABLE, DATA)
        client.close()
        await trio.to_thread.run_sync(thread.join)
    said = b"".join(heard)
    assert said[:1] == b"\x16" and wire.MAGIC not in said and DATA[:20] not in said


async def test_a_server_of_another_version_is_told_so() -> None:
    def talk(connection: socket.socket) -> None:
        read_frames(connection, 1)
        connection.sendall(hello(version=99))
        wait_for_end(connection)

    with strange_peer(talk) as (client, _):
        with pytest.raises(PeerUnavailable, match="protocol versions 99"):
            await client.ping(SERVER)


@pytest.mark.parametrize(
    "sent", [b"", b"mfsP", hello()[:-3], hello() + wire.encode(1, wire.Ok())[:9]]
)
async def test_a_server_that_ends_in_the_middle_is_unavailable(sent: bytes) -> None:
    def talk(connection: socket.socket) -> None:
        read_frames(connection, 1)
        connection.sendall(sent)

    with strange_peer(talk) as (client, _):
        with pytest.raises(PeerUnavailable):
            await client.ping(SERVER)


GET_REPLY = wire.encode(1, wire.GetReply(REF.length, TABLE), REF.length)
FIRST_REPLY = hello() + GET_REPLY


@pytest.mark.parametrize("at_once", [0, len(hello()), len(FIRST_REPLY) - 9, len(FIRST_REPLY)])
async def test_a_server_that_sends_a_byte_now_and_then_is_passed_over(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GREETING_SECONDS", "ANSWER_SECONDS", "PAYLOAD_SECONDS"):
        monkeypatch.setattr(link, name, SHORT)
    said = FIRST_REPLY + DATA

    def talk(connection: socket.socket) -> None:
        read_frames(connection, 1)
        connection.sendall(said[:at_once])
        trickle(connection, said[at_once:])

    with strange_peer(talk) as (client, _), trio.fail_after(GUARD_SECONDS):
        with pytest.raises(PeerUnavailable, match="took too long"):
            await client.fetch(SERVER, REF, 0, REF.length, GUARD_SECONDS)


async def test_a_server_that_goes_on_working_for_ever_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link, "ANSWER_SECONDS", SHORT)

    def talk(connection: socket.socket) -> None:
        connection.sendall(hello())
        while True:
            connection.sendall(wire.encode(1, wire.Working()))
            time.sleep(SHORT / 8)

    with strange_peer(talk) as (client, _), trio.fail_after(GUARD_SECONDS):
        with pytest.raises(PeerUnavailable, match="took too long"):
            await client.put(SERVER, REF, TABLE, DATA)


# ---------------------------------------------------------------- wrong bytes


@pytest.mark.expected_logs("fails its checksum")
async def test_wrong_bytes_of_a_member_are_passed_over_and_reported(tmp_path: Path) -> None:
    """The reader has no copy; one member lies, the other does not."""
    liar, honest = MemoryChunkStore(), MemoryChunkStore()
    third = NodeId("3" * 16)
    for store in (liar, honest):
        store.put(REF, TABLE, DATA, Holding.OWNED)
    liar.damage(REF.id)
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        with served(liar) as first, served(honest, tls=tls_of(third)) as second:
            client = first.client()
            client.set_address(third, second.host, second.port)
            with pytest.raises(CorruptChunk):
                await client.fetch(SERVER, REF, 0, REF.length, GUARD_SECONDS)
            for each, name in ((SERVER, first), (third, second)):
                node.mirror.nodes[each] = NodeRecord(
                    name="n", host=name.host, port=name.port, zone="", capacity_bytes=1,
                    used_bytes=0, free_bytes=1, software="1", started_at=0.0,
                )  # fmt: skip
            latest = node.mirror.latest_map
            assert latest is not None
            chunks = Chunks(
                node.id, node.mirror, node.store, client, node.damaged.append, node.start
            )
            placed = PlacedChunk(REF, latest.epoch)
            for _ in range(4):  # whom it asks first
                assert await chunks.read(placed, 2, 0, REF.length) == DATA
            assert [ref.id for ref in first.damaged] == [REF.id]
            assert not second.damaged
            client.close()
