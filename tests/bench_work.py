"""What the benchmark does at each place. One function for each group.

A step of a group runs at every place before the next one begins, and the order of the places
alternates, so that all of them meet the same machine. Each returns the figures it measured.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.bench_places import MIB, Clock, Modelfs, Place

BLOCK = 4 * MIB

Figures = dict[str, float]
Step = Callable[[Place, int], Figures]  # the int is the repetition


@dataclass(frozen=True, slots=True)
class Work:
    """How much of everything."""

    size_mib: int
    small_files: int
    stat_files: int
    processes: int = 8

    @property
    def gb(self) -> float:
        """The size in 10^9 bytes."""
        return self.size_mib * MIB / 1e9

    @property
    def gib(self) -> float:
        """The size in 2^30 bytes, by which CPU seconds are told."""
        return self.size_mib / 1024

    def speed(self, name: str, clock: Clock) -> Figures:
        """GB/s and CPU seconds for each GiB."""
        return {name: self.gb / clock.seconds, f"{name}_cpu": clock.cpu_seconds / self.gib}


def rate(name: str, count: int, clock: Clock) -> Figures:
    """Operations each second, and CPU milliseconds for each."""
    return {name: count / clock.seconds, f"{name}_cpu": clock.cpu_seconds * 1e3 / count}


# ---------------------------------------------------------------- one large file


def write_file(path: Path, size_mib: int, seed: int) -> None:
    """Write random bytes that were never written before, and fsync."""
    block = np.random.default_rng([seed, os.getpid()]).bytes(BLOCK)
    memory = bytearray(block)
    words = np.frombuffer(memory, dtype=np.uint64)
    with path.open("wb", buffering=0) as file:
        left = size_mib * MIB
        while left > 0:
            words[::8192] += np.uint64(0x9E3779B97F4A7C15)  # no 64 KiB of it was there before
            left -= file.write(memoryview(memory)[: min(left, BLOCK)])
        os.fsync(file.fileno())


def read_file(path: Path) -> None:
    """Read from front to back."""
    buffer = bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def sequential(work: Work) -> Iterator[Step]:
    """Write, and read with all caches cold, with the reader's alone, and warm."""

    def timed_read(name: str, path: Path) -> Figures:
        with Clock(work.size_mib) as clock:
            read_file(path)
        return work.speed(name, clock)

    def write(place: Place, repetition: int) -> Figures:
        with Clock(work.size_mib) as clock:
            write_file(place.a / f"seq{repetition}", work.size_mib, repetition)
        return work.speed("write", clock)

    def cold(place: Place, repetition: int) -> Figures:
        place.drop_all()
        return timed_read("read_cold", place.b / f"seq{repetition}")

    def client_cold(place: Place, repetition: int) -> Figures:
        place.drop_client()
        return timed_read("read_client_cold", place.b / f"seq{repetition}")

    def warm(place: Place, repetition: int) -> Figures:
        if place.suffix:  # no data passes between nodes, so nothing would be encrypted
            (place.a / f"seq{repetition}").unlink()
            return {}
        before = place.requests() if isinstance(place, Modelfs) else 0
        found = timed_read("read_warm", place.b / f"seq{repetition}")
        if isinstance(place, Modelfs):  # open, flush, release; and one each for asking, at most
            found["read_warm_requests"] = place.requests() - before
        (place.a / f"seq{repetition}").unlink()
        return found

    yield write
    yield cold
    yield client_cold
    yield warm


def local_replica(work: Work) -> Iterator[Step]:
    """Read what the reading node has on its own disk, with the kernel's caches dropped."""

    def read(place: Place, repetition: int) -> Figures:
        directory = place.a / "here"
        if repetition == 0:
            directory.mkdir()
            if isinstance(place, Modelfs):
                place.keep_here("here")
            write_file(directory / "file", work.size_mib, 1000)
        place.drop_all()
        with Clock(work.size_mib) as clock:
            read_file(place.b / "here/file")
        return work.speed("read_local_replica", clock)

    yield read


# ---------------------------------------------------------------- many at once


def parallel(work: Work) -> Iterator[Step]:
    """Four processes read four files; eight read the same one."""
    fork = multiprocessing.get_context("fork")

    def read_all(paths: list[Path]) -> Clock:
        with ProcessPoolExecutor(len(paths), mp_context=fork) as pool:
            list(pool.map(idle, range(len(paths))))  # the processes are there now
            with Clock(work.size_mib) as clock:
                list(pool.map(read_file, paths))
        return clock

    def four(place: Place, repetition: int) -> Figures:
        if repetition == 0:
            for index in range(4):
                write_file(place.a / f"shard{index}", max(1, work.size_mib // 4), 4000 + index)
        place.drop_client()
        clock = read_all([place.b / f"shard{index}" for index in range(4)])
        return work.speed("read_4_files_client_cold", clock)

    def same(place: Place, repetition: int) -> Figures:
        if repetition == 0:
            write_file(place.a / "shared", work.size_mib, 5000)
        place.drop_client()
        clock = read_all([place.b / "shared"] * 8)
        return work.speed("read_1_file_by_8_client_cold", clock)

    yield four
    yield same


def idle(_: int) -> None:
    """Give each process of a pool something to do, so that all are there."""
    time.sleep(0.01)


def clear(place: Place) -> None:
    """Remove what a group has made."""
    for path in place.a.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
