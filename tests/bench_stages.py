"""Micro-benchmarks: what each stage of a read and a write can do on this machine, by itself.

The figures bound those of the whole: no read is faster than its slowest stage. What the stages
took *in* the whole is told by the nodes' own histograms, which the benchmark prints beside these.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import trio

from modelfs.chunk import ChunkRef, describe, is_range_valid
from modelfs.limits import PEER_PATIENCE_SECONDS
from modelfs.ports import Holding
from modelfs.testing.stores import MemoryChunkStore
from tests.bench_places import MIB, Clock
from tests.bench_work import Figures
from tests.daemon.peer_parts import SERVER, served

CHUNK = 4 * MIB
FETCHES_AT_ONCE = 4


def measure(size_mib: int, directory: Path) -> Figures:
    """All of them, on `size_mib` each."""
    count = max(1, size_mib * MIB // CHUNK)
    data = np.random.default_rng(7).bytes(CHUNK)
    ref, table = describe(data)
    found: Figures = {}

    def note(name: str, act: Callable[[], object]) -> None:
        act()  # once, to have it warm
        with Clock() as clock:
            for _ in range(count):
                act()
        _add(found, name, count * CHUNK, clock)

    note("hash a chunk (BLAKE3 and xxh3)", lambda: describe(data))
    note("verify a chunk (xxh3)", lambda: is_range_valid(table, 0, data))
    note("copy a chunk", lambda: bytearray(data))
    _add(found, "TCP on loopback, sendfile", *_loopback(directory, count))
    _add(found, "peer protocol, verified", *trio.run(_peers, ref, table, data, count))
    _add(found, "write and fsync a chunk file", *_disk(directory, data, count))
    return found


def _add(found: Figures, name: str, size_bytes: int, clock: Clock) -> None:
    found[name] = size_bytes / 1e9 / clock.seconds
    found[f"{name}_cpu"] = clock.cpu_seconds / (size_bytes / (1024 * MIB))


def _loopback(directory: Path, count: int) -> tuple[int, Clock]:
    """One file over one connection: what the kernel alone takes."""
    path = directory / "sent"
    path.write_bytes(bytes(CHUNK))
    buffer = bytearray(CHUNK)

    def send(connection: socket.socket) -> None:
        with connection, path.open("rb") as file:
            for _ in range(count):
                offset = 0
                while offset < CHUNK:
                    offset += os.sendfile(
                        connection.fileno(), file.fileno(), offset, CHUNK - offset
                    )

    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client:
            sender = threading.Thread(target=send, args=(server.accept()[0],))
            with Clock() as clock:
                sender.start()
                while client.recv_into(buffer):
                    pass
            sender.join()
    path.unlink()
    return count * CHUNK, clock


async def _peers(ref: ChunkRef, table: bytes, data: bytes, count: int) -> tuple[int, Clock]:
    """Fetches from a server in this process, a few at a time."""
    store = MemoryChunkStore()
    store.put(ref, table, data, Holding.OWNED)
    left = iter(range(count))

    with served(store) as peer:
        client = peer.client()

        async def fetch() -> None:
            for _ in left:
                await client.fetch(SERVER, ref, 0, CHUNK, PEER_PATIENCE_SECONDS)

        try:
            with Clock() as clock:
                async with trio.open_nursery() as nursery:
                    for _ in range(FETCHES_AT_ONCE):
                        nursery.start_soon(fetch)
        finally:
            client.close()
    return count * CHUNK, clock


def _disk(directory: Path, data: bytes, count: int) -> tuple[int, Clock]:
    paths = [directory / f"chunk{index}" for index in range(count)]
    with Clock() as clock:
        for path in paths:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.write(descriptor, data)
            os.fsync(descriptor)
            os.close(descriptor)
    for path in paths:
        path.unlink()
    return count * CHUNK, clock
