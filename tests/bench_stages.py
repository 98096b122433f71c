"""Micro-benchmarks: what each stage of a read and a write can do on this machine, by itself.

The figures bound those of the whole: no read is faster than its slowest stage. What the stages
took *in* the whole is told by the nodes' own histograms, which the benchmark prints beside these.
What etcd takes is asked of the lab's own, by the client and through the socket that a daemon uses.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import trio

from modelfs.chunk import ChunkRef, describe, is_range_valid
from modelfs.ids import Epoch, NodeId
from modelfs.limits import PEER_PATIENCE_SECONDS
from modelfs.placement import Member, make_map
from modelfs.ports import Delete, Holding, Put, Txn
from modelfs.testing.stores import MemoryChunkStore
from modelfsd.commands import control
from modelfsd.etcd.process import EtcdProcess
from modelfsd.etcd.store import EtcdStore
from modelfsd.etcd.tls import EtcdTls
from modelfsd.lab.cluster import Lab
from modelfsd.trust.keyring import KeyRing
from tests import bench_push
from tests.bench_places import MIB, TICKS, Clock, processes_of
from tests.daemon.peer_parts import SERVER, served

CHUNK = 4 * MIB
FETCHES_AT_ONCE = 4
ASK_SECONDS = 60.0
ETCD_PREFIX = b"modelfs-bench/"  # no node watches it
ETCD_VALUE = bytes(400)  # about as much as a commit of a file puts
PLACED_CHUNKS = 100_000


@dataclass(frozen=True, slots=True)
class Micro:
    """What one stage does by itself, and the CPU time that it takes."""

    value: float
    unit: str
    cpu: float
    cpu_unit: str

    @classmethod
    def speed(cls, size_bytes: int, clock: Clock) -> Micro:
        """Bytes in some time."""
        gib = size_bytes / (1024 * MIB)
        return cls(size_bytes / 1e9 / clock.seconds, "GB/s", clock.cpu_seconds / gib, "s/GiB")

    @classmethod
    def each(cls, count: int, seconds: float, cpu_seconds: float) -> Micro:
        """Operations one after the other."""
        return cls(seconds * 1e3 / count, "ms", cpu_seconds * 1e3 / count, "ms")


def measure(size_mib: int, operations: int, directory: Path, lab: Lab) -> dict[str, Micro]:
    """All of them: on `size_mib` each, or so many operations."""
    count = max(1, size_mib * MIB // CHUNK)
    data = np.random.default_rng(7).bytes(CHUNK)
    ref, table = describe(data)
    peers = partial(_peers, ref, table, data, count)
    return {
        "hash a chunk (BLAKE3 and xxh3)": _repeated(count, lambda: describe(data)),
        "verify a chunk (xxh3)": _repeated(count, lambda: is_range_valid(table, 0, data)),
        "copy a chunk": _repeated(count, lambda: bytearray(data)),
        "TCP on loopback, sendfile": Micro.speed(*_loopback(directory, count)),
        "peer protocol, verified": Micro.speed(*trio.run(peers, True)),
        "... with --data-tls off": Micro.speed(*trio.run(peers, False)),
        "write and fsync a chunk file": Micro.speed(*_disk(directory, data, count)),
        "push pages into the kernel": Micro.speed(*bench_push.measure(directory, count * CHUNK)),
        "place a chunk, 3 nodes": _placement(),
        **trio.run(_etcd, lab, operations),
    }


def _repeated(count: int, act: Callable[[], object]) -> Micro:
    act()  # once, to have it warm
    with Clock() as clock:
        for _ in range(count):
            act()
    return Micro.speed(count * CHUNK, clock)


def _placement() -> Micro:
    """Where many chunks go, two copies of each."""
    members = [Member(NodeId(digit * 16), digit, 1.0, "") for digit in "abc"]
    placement = make_map(Epoch(1), members)
    ids = np.random.default_rng(8).integers(0, 256, (PLACED_CHUNKS, 32), np.uint8)
    with Clock() as clock:
        placement.place_many(ids, 2)
    million = PLACED_CHUNKS / 1e6
    return Micro(PLACED_CHUNKS / clock.seconds, "1/s", clock.cpu_seconds / million, "us")


async def _etcd(lab: Lab, operations: int) -> dict[str, Micro]:
    """A transaction, and a read that is as fresh. The CPU time is that of all members of etcd."""
    node = lab.nodes[0]
    status = control.call(node.control_path, "status", ASK_SECONDS)
    credentials = EtcdTls(KeyRing(node.state_dir)).credentials()
    own, *others = sorted(
        status["etcd"]["endpoints"], key=lambda endpoint: not endpoint.startswith(node.address)
    )
    async with EtcdStore([own, *others], ETCD_PREFIX, credentials) as store:
        store.reach_through(own, EtcdProcess(node.state_dir).socket_path)

        async def put() -> object:
            return await store.commit(Txn((), (Put(b"key", ETCD_VALUE),)))

        async def timed(ask: Callable[[], Awaitable[object]]) -> Micro:
            await ask()
            with Clock() as clock:
                before = _etcd_cpu(lab)
                for _ in range(operations):
                    await ask()
                cpu_seconds = _etcd_cpu(lab) - before
            return Micro.each(operations, clock.seconds, cpu_seconds)

        found = {
            "an etcd transaction (CPU of its three members)": await timed(put),
            "a linearizable read of etcd (the same)": await timed(lambda: store.get(b"key")),
        }
        await store.commit(Txn((), (Delete(b"key"),)))
    return found


def _etcd_cpu(lab: Lab) -> float:
    """Seconds that the lab's members of etcd have used."""
    ticks = 0
    for pid in processes_of(lab):
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
        if name.endswith("(etcd"):
            ticks += sum(int(word) for word in rest.split()[11:13])
    return ticks / TICKS


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


async def _peers(
    ref: ChunkRef, table: bytes, data: bytes, count: int, data_tls: bool
) -> tuple[int, Clock]:
    """Fetches from a server in this process, a few at a time."""
    store = MemoryChunkStore()
    store.put(ref, table, data, Holding.OWNED)
    left = iter(range(count))

    with served(store, data_tls) as peer:
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
