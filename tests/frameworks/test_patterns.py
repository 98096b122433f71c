"""Odd ways to write a file: out of order, in tiny pieces, with holes, in great numbers."""

from __future__ import annotations

import mmap
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mount.mount_parts import MIB, Dirs

SIZE = 10 * MIB + 7


@pytest.mark.parametrize("grown", [True, False], ids=["truncated first", "growing"])
@pytest.mark.parametrize("synced", [0, 97], ids=["", "with fsyncs"])
def test_writes_at_random_offsets_agree_with_a_local_file(
    dirs: Dirs, rng: random.Random, grown: bool, synced: int
) -> None:
    twin = bytearray(SIZE if grown else 0)
    descriptor = os.open(dirs[0] / "a", os.O_RDWR | os.O_CREAT)
    try:
        if grown:
            os.ftruncate(descriptor, SIZE)
        for number in range(400):
            size = rng.choice([1, 8, 511, 4096, 65_537])
            offset = rng.randrange(SIZE - size)
            data = rng.randbytes(size)
            os.pwrite(descriptor, data, offset)
            twin.extend(bytes(max(0, offset + size - len(twin))))
            twin[offset : offset + size] = data
            if synced and number % synced == 0:
                os.fsync(descriptor)
            at = rng.randrange(len(twin))
            assert os.pread(descriptor, 9000, at) == twin[at : at + 9000]
    finally:
        os.close(descriptor)
    for directory in dirs:
        assert (directory / "a").read_bytes() == twin


def test_what_is_appended_at_any_page_is_whole_elsewhere(dirs: Dirs, rng: random.Random) -> None:
    """The kernel's large WRITEs cross the borders of chunks, and come several at once."""
    for number in range(8):
        first, rest = rng.randbytes(4096 * rng.randrange(1, 1024)), rng.randbytes(9 * MIB)
        (dirs[0] / f"{number}").write_bytes(first)
        with (dirs[1] / f"{number}").open("ab") as file:
            file.write(rest)
        assert (dirs[2] / f"{number}").read_bytes() == first + rest


def test_sizes_that_go_up_and_down_agree_with_a_local_file(
    dirs: Dirs, rng: random.Random, tmp_path: Path
) -> None:
    """Truncations between writes, as databases and HDF5 do; every round by another node."""
    twin = tmp_path / "twin"
    twin.touch()
    for number in range(12):
        seed = rng.random()
        for path in (twin, dirs[number % 3] / "a"):
            chance = random.Random(seed)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
            try:
                for _ in range(15):
                    os.ftruncate(descriptor, chance.choice([0, 5000, 4 * MIB, 9 * MIB + 3]))
                    os.pwrite(descriptor, chance.randbytes(70_001), chance.randrange(9 * MIB))
                    if chance.random() < 0.2:
                        os.fsync(descriptor)
            finally:
                os.close(descriptor)
        for directory in dirs:
            assert (directory / "a").read_bytes() == twin.read_bytes(), f"round {number}"


def test_a_shared_mapping_grown_by_truncation_is_whole_elsewhere(
    dirs: Dirs, rng: random.Random
) -> None:
    twin = bytearray()
    with (dirs[0] / "a").open("w+b") as file:
        for _ in range(6):
            size = len(twin) + rng.randrange(MIB, 3 * MIB)
            twin.extend(bytes(size - len(twin)))
            file.truncate(size)
            with mmap.mmap(file.fileno(), size) as mapped:
                for _ in range(20):
                    at, data = rng.randrange(size - 5000), rng.randbytes(5000)
                    mapped[at : at + 5000] = twin[at : at + 5000] = data
    for directory in dirs[1:]:
        assert (directory / "a").read_bytes() == twin


def test_a_large_sparse_file_is_read_where_it_was_written(dirs: Dirs) -> None:
    size, step = 800 * MIB + 3, 199 * MIB
    with (dirs[0] / "sparse").open("wb") as file:
        file.truncate(size)
        for offset in range(0, size, step):
            file.seek(offset)
            file.write(b"%020d" % offset)
    with (dirs[1] / "sparse").open("rb") as file:
        assert file.seek(0, os.SEEK_END) == size
        for offset in range(0, size, step):
            lead = min(offset, 100)
            file.seek(offset - lead)
            assert file.read(lead + 120) == bytes(lead) + b"%020d" % offset + bytes(100)
        file.seek(350 * MIB)
        assert not file.read(8 * MIB).strip(b"\0")
        file.seek(size - 1)
        assert file.read() == b"\0"


def test_many_small_files_made_at_once_are_all_there(dirs: Dirs) -> None:
    count, makers = 300, 8

    def make(number: int) -> None:
        path = dirs[number % 2] / f"{number:04}.json"
        path.with_suffix(".tmp").write_text(f'{{"number": {number}}}' * (1 + number % 300))
        path.with_suffix(".tmp").rename(path)

    with ThreadPoolExecutor(makers) as pool:
        list(pool.map(make, range(count)))
    for directory in dirs:
        assert sorted(os.listdir(directory)) == [f"{number:04}.json" for number in range(count)]
    for number in range(count):
        text = (dirs[2] / f"{number:04}.json").read_text()
        assert text == f'{{"number": {number}}}' * (1 + number % 300)


def test_lines_that_many_threads_append_are_all_there_once(dirs: Dirs) -> None:
    def append(who: int) -> None:
        for number in range(60):
            with (dirs[1] / "log").open("a") as log:
                log.write(f"{who} {number}\n")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(append, range(4)))
    lines = (dirs[0] / "log").read_text().splitlines()
    assert sorted(lines) == sorted(f"{who} {number}" for who in range(4) for number in range(60))


@pytest.mark.parametrize(
    "flags", [os.O_SYNC, os.O_DSYNC, os.O_APPEND], ids=["sync", "dsync", "append"]
)
def test_small_writes_with_open_flags_reach_the_others(dirs: Dirs, flags: int) -> None:
    descriptor = os.open(dirs[0] / "a", os.O_WRONLY | os.O_CREAT | flags)
    try:
        for number in range(40):
            os.write(descriptor, b"record %06d\n" % number)
            if flags != os.O_APPEND:
                assert (dirs[1] / "a").read_bytes().endswith(b"record %06d\n" % number)
    finally:
        os.close(descriptor)
    assert (dirs[2] / "a").read_bytes() == b"".join(b"record %06d\n" % n for n in range(40))
