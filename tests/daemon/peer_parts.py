"""What the tests of peers share: a server, a client, and peers that misbehave."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from random import Random

from modelfs import wire
from modelfs.chunk import ChunkRef, describe
from modelfs.ids import ClusterId, NodeId
from modelfs.testing.stores import MemoryChunkStore
from modelfsd.peer_client import PeerClient
from modelfsd.peer_server import PeerServer

CLUSTER = ClusterId("c" * 16)
SERVER, CLIENT = NodeId("1" * 16), NodeId("9" * 16)
GUARD_SECONDS = 60.0
SHORT = 0.4  # seconds of patience, for peers that will not answer


def make(length: int, seed: int = 0) -> tuple[ChunkRef, bytes, bytes]:
    data = Random(seed).randbytes(length)
    ref, table = describe(data)
    return ref, table, data


class Served:
    """A server with a memory store, and what it reported."""

    def __init__(self, store: MemoryChunkStore, cluster: ClusterId = CLUSTER) -> None:
        self.store = store
        self.damaged: list[ChunkRef] = []
        self.server = PeerServer(
            store, cluster, SERVER, "served", lambda: {"etcd": ["url"]}, self.damaged.append
        )
        self.host, self.port = self.server.start("127.0.0.1", 0)

    def client(self) -> PeerClient:
        client = PeerClient(CLUSTER, CLIENT, "client")
        client.set_address(SERVER, self.host, self.port)
        return client

    def raw(self) -> socket.socket:
        connection = socket.create_connection((self.host, self.port))
        connection.settimeout(GUARD_SECONDS)
        return connection


@contextmanager
def served(store: MemoryChunkStore | None = None) -> Iterator[Served]:
    peer = Served(store or MemoryChunkStore())
    try:
        yield peer
    finally:
        peer.server.stop()


@contextmanager
def strange_peer(talk: Callable[[socket.socket], None]) -> Iterator[tuple[PeerClient, int]]:
    """A peer whose connections are each handled by `talk`, and a client of it."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []
    opened: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            opened.append(connection)
            thread = threading.Thread(target=serve, args=(connection,))
            threads.append(thread)
            thread.start()

    def serve(connection: socket.socket) -> None:
        try:
            talk(connection)
        except OSError:
            return  # the client has left

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    client = PeerClient(CLUSTER, CLIENT, "client")
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
                    connection.shutdown(socket.SHUT_RDWR)
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
