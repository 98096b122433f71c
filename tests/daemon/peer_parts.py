"""What the tests of peers share: a server, a client, and peers that misbehave."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from random import Random

import pytest

from modelfs import wire
from modelfs.chunk import ChunkRef, describe
from modelfs.ids import NodeId
from modelfs.testing.stores import MemoryChunkStore
from modelfsd.peers import session as peer_session
from modelfsd.peers.client import PeerClient
from modelfsd.peers.server import PeerServer
from modelfsd.trust.tls import Tls
from tests.pki_parts import CLUSTER, tls_of

SERVER, CLIENT = NodeId("1" * 16), NodeId("9" * 16)
GUARD_SECONDS = 60.0
SHORT = 0.4  # seconds of patience, for peers that will not answer
LONG = 2.0  # ... for peers that will, also on a busy machine, where the test waits for its end


def make(length: int, seed: int = 0) -> tuple[ChunkRef, bytes, bytes]:
    data = Random(seed).randbytes(length)
    ref, table = describe(data)
    return ref, table, data


class Served:
    """A server with a memory store, and what it reported."""

    def __init__(self, store: MemoryChunkStore, data_tls: bool, tls: Tls | None) -> None:
        self.store, self.data_tls = store, data_tls
        self.tls = tls or tls_of(SERVER, data_tls=data_tls)
        self.damaged: list[ChunkRef] = []
        self.letters: list[tuple[bytes, NodeId | None]] = []
        self.server = self.new_server()
        self.host, self.port = self.server.start("127.0.0.1", 0)

    def new_server(self) -> PeerServer:
        return PeerServer(
            self.store,
            self.tls,
            "served",
            lambda is_member: {"etcd": ["url"] if is_member else []},
            self.admit,
            self.damaged.append,
        )

    def admit(self, letter: bytes, member: NodeId | None) -> bytes:
        self.letters.append((letter, member))
        return b"welcome"

    def client(self, tls: Tls | None = None) -> PeerClient:
        client = PeerClient(tls or tls_of(CLIENT, data_tls=self.data_tls), "client")
        client.set_address(SERVER, self.host, self.port)
        return client

    def plain(self, source: str = "127.0.0.1") -> socket.socket:
        """A connection without TLS, from an address of this machine."""
        address = (self.host, self.port)
        return socket.create_connection(address, GUARD_SECONDS, source_address=(source, 0))

    def raw(
        self, context: ssl.SSLContext | None = None, source: str = "127.0.0.1"
    ) -> ssl.SSLSocket:
        """A connection after the TLS handshake; by default with the client's certificate."""
        # Connected last: wrapping one that has been reset already would leave it open.
        connection = (context or tls_of(CLIENT).client).wrap_socket(socket.socket())
        try:
            connection.settimeout(GUARD_SECONDS)
            connection.bind((source, 0))
            connection.connect((self.host, self.port))
        except BaseException:
            connection.close()
            raise
        return connection

    def wait_for_connections(self, count: int) -> None:
        """Wait until so many are left: a thread may take a moment to end."""
        deadline = time.monotonic() + GUARD_SECONDS
        while self.server.statistics().connections != count:
            assert time.monotonic() < deadline, self.server.statistics()
            time.sleep(0.005)


def make_impatient(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.2) -> None:
    """Let the server's deadlines be short, for clients that will not meet them.

    Not before a client has said what it shall be heard with: on a busy machine it may be late.
    """
    for name in ("HELLO_SECONDS", "FRAME_SECONDS", "STRANGER_SECONDS"):
        monkeypatch.setattr(peer_session, name, seconds)
    monkeypatch.setattr(peer_session, "WAIT_SECONDS", seconds / 4)


def trickle(connection: socket.socket, data: bytes, pause_seconds: float = 0.05) -> None:
    """Send a byte whenever nothing was to be read for a moment. Raises OSError at the end."""
    connection.settimeout(pause_seconds)
    for position in range(len(data)):
        connection.sendall(data[position : position + 1])
        try:
            if not connection.recv(1):
                raise ConnectionResetError("the end")
        except TimeoutError:
            continue


@contextmanager
def served(
    store: MemoryChunkStore | None = None, data_tls: bool = True, tls: Tls | None = None
) -> Iterator[Served]:
    peer = Served(store or MemoryChunkStore(), data_tls, tls)
    try:
        yield peer
    finally:
        peer.server.stop()


@contextmanager
def strange_peer(talk: Callable[[socket.socket], None]) -> Iterator[tuple[PeerClient, int]]:
    """A peer that proves itself and whose connections are then handled by `talk`; its client."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []
    opened: list[ssl.SSLSocket] = []

    def accept() -> None:
        while True:
            try:
                accepted, _ = listener.accept()
            except OSError:
                return
            context = tls_of(SERVER).server
            connection = context.wrap_socket(accepted, True, do_handshake_on_connect=False)
            opened.append(connection)
            thread = threading.Thread(target=serve, args=(connection,))
            threads.append(thread)
            thread.start()

    def serve(connection: ssl.SSLSocket) -> None:
        try:
            connection.do_handshake()
            talk(connection)
        except OSError:
            return  # the client has left

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    client = PeerClient(tls_of(CLIENT), "client")
    port = listener.getsockname()[1]
    client.set_address(SERVER, "127.0.0.1", port)
    try:
        yield client, port
    finally:
        client.close()
        listener.shutdown(socket.SHUT_RDWR)
        acceptor.join()
        listener.close()
        for connection in opened:
            with closing(connection):
                try:
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)
                except OSError:
                    continue
        for thread in threads:
            thread.join()


def hello(cluster: str = CLUSTER, node: str = SERVER, version: int = 1) -> bytes:
    return wire.encode(0, wire.Hello(version, version, cluster, node, "strange", "x"))


def wait_for_end(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


def read_frames(connection: socket.socket, count: int) -> list[wire.Frame]:
    """The next frames without payload; signs of life are left out."""
    reader, frames = wire.FrameReader(), list[wire.Frame]()
    while len(frames) < count:
        while (frame := reader.next_frame()) is None:
            data = connection.recv(1 << 16)
            assert data, "the server closed the connection"
            reader.receive(data)
        if not isinstance(frame.message, wire.Working):
            frames.append(frame)
    return frames
