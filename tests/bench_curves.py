"""What grows, and how: with the size of a file, the number of files, and that of chunks and nodes.

- *Opening*: a sparse file of which every page of the manifest names a chunk: its manifest is as
  large as a full one's. Read through a node that has nothing, while its memory is watched.
- *Namespace*: what a node does when it starts, in a process of its own: from etcd, which is how a
  new node begins, and from the copy on its disk, which is how others do.
- *Placement*: where each of many chunks goes.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trio

from modelfs import stripe
from modelfs.ids import Epoch, NodeId
from modelfs.limits import GIB, MIB
from modelfs.manifest import PAGE_ENTRIES
from modelfs.placement import Member, make_map
from modelfsd.lab.state import LabNode
from modelfsd.metadata.feed import Feed
from modelfsd.metadata.replica_file import ReplicaFile
from tests.bench_places import Modelfs
from tests.many_files import empty, fill, inode_of, store_of

CHUNK_BYTES = 4 * MIB  # by default
BLOCK_BYTES = 4096
OPENINGS = 7
REPLICAS = 2

Row = dict[str, float]  # heading -> value
Curves = dict[str, list[Row]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Where the curves are measured."""

    files_mib: tuple[int, ...] = (1, GIB // MIB, 100 * GIB // MIB, 1024 * GIB // MIB)
    file_counts: tuple[int, ...] = (1_000, 10_000, 100_000)
    chunk_counts: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    node_counts: tuple[int, ...] = (3, 16, 64)


def measure(place: Modelfs, sizes: Sizes) -> Curves:
    """All curves."""
    return {
        "a file of ... is opened": [_opening(place, size) for size in sizes.files_mib],
        "a namespace is loaded": _namespaces(place, sizes.file_counts),
        "chunks are placed": [
            _placement(nodes, chunks)
            for nodes in sizes.node_counts
            for chunks in sizes.chunk_counts
        ],
    }


# ---------------------------------------------------------------- opening


def _opening(place: Modelfs, size_mib: int) -> Row:
    name, offsets = f"sparse{size_mib}", _page_offsets(size_mib * MIB)
    with (place.a / name).open("wb", buffering=0) as file:
        file.truncate(size_mib * MIB)
        for offset in offsets:
            os.pwrite(file.fileno(), os.urandom(BLOCK_BYTES), offset)
    found = [_open_cold(place, place.b / name, offsets) for _ in range(OPENINGS)]
    medians = {heading: statistics.median(row[heading] for row in found) for heading in found[0]}
    pages = float(len(offsets))
    return {"file MiB": float(size_mib), "manifest pages": pages, **medians}


def _page_offsets(size_bytes: int) -> list[int]:
    """Where the part of the file begins that each page of its manifest is about."""
    count = stripe.chunk_count(CHUNK_BYTES, size_bytes)
    return [stripe.span(CHUNK_BYTES, index)[0] for index in range(0, count, PAGE_ENTRIES)]


def _open_cold(place: Modelfs, path: Path, offsets: list[int]) -> Row:
    place.drop_client()
    before = _resident_bytes(place.reader)
    started = time.perf_counter()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        opened = time.perf_counter()
        os.pread(descriptor, BLOCK_BYTES, 0)
        read = time.perf_counter()
        grown = _resident_bytes(place.reader) - before
        for offset in offsets:
            os.pread(descriptor, BLOCK_BYTES, offset)
        grown_whole = _resident_bytes(place.reader) - before
    finally:
        os.close(descriptor)
    return {
        "open ms": (opened - started) * 1e3,
        "first 4 KiB ms": (read - opened) * 1e3,
        "daemon grows KiB": grown / 1024,
        "... all pages read KiB": grown_whole / 1024,
    }


def _resident_bytes(node: LabNode) -> int:
    pid = node.pid
    assert pid is not None, f"{node.name} does not run"
    return _resident(pid)


def _resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------- namespace


def _namespaces(place: Modelfs, counts: tuple[int, ...]) -> list[Row]:
    directory = place.a / "namespace"
    directory.mkdir()
    node, parent = place.lab.nodes[0], inode_of(directory)
    spawn = multiprocessing.get_context("spawn")
    rows = []
    done = 0
    try:
        for count in counts:
            fill(node, parent, range(done, count))
            done = count
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                rows.append(pool.submit(_load_namespace, node, count).result())
    finally:
        empty(node, parent, range(done))
    return rows


def _load_namespace(node: LabNode, count: int) -> Row:
    with tempfile.TemporaryDirectory(dir=node.directory) as scratch:
        return trio.run(_start_feeds, node, count, Path(scratch))


async def _start_feeds(node: LabNode, count: int, scratch: Path) -> Row:
    async with store_of(node) as store:

        async def started() -> tuple[Feed, float, float]:
            replica = ReplicaFile(scratch / "namespace.sqlite", "bench")
            feed = Feed(store, replica)
            begun, used = time.perf_counter(), time.process_time()
            await feed.start()
            took, used = time.perf_counter() - begun, time.process_time() - used
            replica.close()
            return feed, took, used

        before = _resident(os.getpid())
        feed, etcd_seconds, etcd_cpu = await started()
        grown = _resident(os.getpid()) - before
        assert feed.mirror.file_count >= count
        _, disk_seconds, disk_cpu = await started()
    return {
        "files": float(count),
        "from etcd s": etcd_seconds,
        "CPU s": etcd_cpu,
        "from its disk s": disk_seconds,
        "its CPU s": disk_cpu,
        "bytes each": grown / count,
    }


# ---------------------------------------------------------------- placement


def _placement(nodes: int, chunks: int) -> Row:
    members = [Member(NodeId(f"{number:016x}"), f"n{number}", 1.0, "") for number in range(nodes)]
    placement = make_map(Epoch(1), members)
    ids = np.random.default_rng(9).integers(0, 256, (chunks, 32), np.uint8)
    started, used = time.perf_counter(), time.process_time()
    placement.place_many(ids, REPLICAS)
    took, used = time.perf_counter() - started, time.process_time() - used
    return {"nodes": float(nodes), "chunks": float(chunks), "s": took, "CPU s": used}
