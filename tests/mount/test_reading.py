"""How much a read costs: what the kernel asks for, what is fetched, what is pushed. All counted."""

from __future__ import annotations

import mmap
import os
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from modelfsd.kernel.mount import READ_AHEAD_KIB
from modelfsd.lab.cluster import Lab
from modelfsd.lab.state import LabNode
from tests.mount.mount_parts import MIB, Dirs, ask, finish_child, start_child

pytestmark = pytest.mark.fuse

PAGE = 4096
READER = "with open(path, 'rb', buffering=0) as file:\n while file.read(1 << 16): pass"


class Cost:
    """What a daemon has done between two looks. Begins with cold caches."""

    def __init__(self, node: LabNode) -> None:
        self._node = node
        ask(node, "drop")
        self._before = self._now()

    def _now(self) -> tuple[int, int, int]:
        counted = ask(self._node, "counters")
        fetched = counted["chunks"]["local_bytes"] + counted["chunks"]["remote_bytes"]
        return counted["requests"].get("read", 0), fetched, counted["pushes"].get("bytes", 0)

    def so_far(self) -> tuple[int, int, int]:
        """READs, bytes read from chunks, bytes pushed."""
        reads, fetched, pushed = (
            now - then for now, then in zip(self._now(), self._before, strict=True)
        )
        return reads, fetched, pushed

    def settle(self) -> None:
        """Wait until nothing is on its way to this node, and nothing into its kernel."""
        last, is_asking = self._now(), True
        while is_asking:
            time.sleep(0.02)
            peers = ask(self._node, "counters")["peers"].values()
            now = self._now()
            is_asking = now != last or any(peer["inflight"] for peer in peers)
            last = now


def make(path: Path, size: int) -> bytes:
    contents = os.urandom(size)
    path.write_bytes(contents)
    return contents


def test_a_stream_finds_its_pages_in_the_kernel(lab: Lab, dirs: Dirs) -> None:
    size = 48 * MIB + 12_345
    contents = make(dirs[0] / "file", size)
    cost = Cost(lab.nodes[1])
    found = bytearray()
    with (dirs[1] / "file").open("rb", buffering=0) as file:
        while piece := file.read(MIB // 16):
            found += piece
    assert found == contents
    assert (dirs[1] / "file").stat().st_size == size
    reads, fetched, pushed = cost.so_far()
    assert size <= fetched <= 1.05 * size
    assert pushed > size // 4
    assert reads * READ_AHEAD_KIB * 1024 <= 2 * size
    assert (dirs[1] / "file").read_bytes() == contents
    assert cost.so_far()[0] == reads


def test_a_second_open_costs_its_open_and_close_alone(lab: Lab, dirs: Dirs) -> None:
    """OPEN asks for the latest version; FLUSH and RELEASE come with every close (RELEASE later)."""
    contents = make(dirs[0] / "file", 24 * MIB)
    node = lab.nodes[1]
    assert (dirs[1] / "file").read_bytes() == contents

    def requests() -> Counter[str]:
        return Counter({k: n for k, n in ask(node, "counters")["requests"].items() if n})

    def read_again(with_stat: bool) -> dict[str, int]:
        before = requests()
        file = os.open(dirs[1] / "file", os.O_RDONLY)
        if with_stat:
            os.fstat(file)
        while os.read(file, MIB):
            pass
        os.close(file)
        asked = dict(requests() - before)
        asked.pop("release", None)
        return asked

    assert read_again(False) == {"open": 1, "flush": 1}
    # After each FLUSH the kernel takes st_blocks for unknown, if it keeps writes back.
    assert read_again(True) == {"getattr": 1, "open": 1, "flush": 1}


def test_a_mapping_that_is_touched_in_order_is_a_stream(lab: Lab, dirs: Dirs) -> None:
    size = 40 * MIB
    contents = make(dirs[0] / "file", size)
    cost = Cost(lab.nodes[1])
    with (dirs[1] / "file").open("rb") as file:
        with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
            for start in range(0, size, PAGE):
                assert mapped[start : start + 8] == contents[start : start + 8]
    _, fetched, pushed = cost.so_far()
    assert size <= fetched <= 1.05 * size
    assert pushed > size // 4


def test_random_pages_fetch_what_the_kernel_asks_for(
    lab: Lab, dirs: Dirs, rng: random.Random
) -> None:
    size, touched = 160 * MIB, 40
    with (dirs[0] / "file").open("wb") as file:
        for number in range(size // MIB):
            file.write(number.to_bytes(8, "little") * (MIB // 8))
    cost = Cost(lab.nodes[1])
    with (dirs[1] / "file").open("rb") as file:
        with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
            for page in rng.sample(range(2560, size // PAGE), touched):
                number = int.from_bytes(mapped[page * PAGE : page * PAGE + 8], "little")
                assert number == page * PAGE // MIB
    _, fetched, pushed = cost.so_far()
    assert fetched <= touched * READ_AHEAD_KIB * 1024
    assert pushed == 0


@pytest.mark.parametrize("how", ["read", "mmap", "backwards"])
@pytest.mark.parametrize("first", [0, 12 * MIB])
def test_of_a_stride_the_next_runs_are_pushed_and_nothing_between(
    lab: Lab, dirs: Dirs, how: str, first: int
) -> None:
    size, step, length = 160 * MIB, 6 * MIB, 256 * 1024
    contents = b"".join(number.to_bytes(8, "little") * (MIB // 8) for number in range(size // MIB))
    (dirs[0] / "file").write_bytes(contents)
    starts = list(range(first, size - length, step))
    if how == "backwards":
        starts.reverse()
    cost = Cost(lab.nodes[1])
    with (dirs[1] / "file").open("rb", buffering=0) as file:
        with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
            for start in starts:
                if how == "mmap":
                    found = mapped[start : start + length]
                else:
                    file.seek(start)
                    found = file.read(length)
                assert found == contents[start : start + length]
                cost.settle()  # so that what was foretold is there before it is asked for
    reads, fetched, pushed = cost.so_far()
    wanted = len(starts) * length
    assert pushed > wanted // 3
    before_it_is_known = 5 * 4 * MIB if first == 0 else 3 * 4 * MIB
    assert fetched < before_it_is_known + 2.5 * wanted  # the kernel reads around a touched page
    assert reads < 2 * len(starts)


def test_eight_readers_fetch_a_file_once(lab: Lab, dirs: Dirs) -> None:
    size = 40 * MIB
    make(dirs[0] / "file", size)
    cost = Cost(lab.nodes[1])
    readers = [start_child(READER, path=dirs[1] / "file") for _ in range(8)]
    for reader in readers:
        assert finish_child(reader).errno == 0
    assert size <= cost.so_far()[1] <= 1.05 * size


def test_the_head_and_the_tail_of_an_archive_are_cheap(lab: Lab, dirs: Dirs) -> None:
    """torch.load looks for the directory of the zip at the end before it reads the front."""
    size = 200 * MIB
    with (dirs[0] / "file").open("wb") as file:
        for number in range(size // MIB):
            file.write(number.to_bytes(8, "little") * (MIB // 8))
    cost = Cost(lab.nodes[1])
    with (dirs[1] / "file").open("rb") as file:
        assert file.read(8) == bytes(8)
        file.seek(-70_000, os.SEEK_END)
        assert len(file.read()) == 70_000
    assert cost.so_far()[1] <= 24 * MIB


@pytest.mark.parametrize("attempt", range(4))
def test_a_writer_beside_a_stream_keeps_its_bytes(
    lab: Lab, dirs: Dirs, rng: random.Random, attempt: int
) -> None:
    """What is pushed for a reader must never lie over what a writer on this node has put there."""
    size = 40 * MIB
    model = bytearray(make(dirs[0] / "file", size))
    path = dirs[1] / "file"
    Cost(lab.nodes[1])

    def write() -> None:
        for _ in range(6):
            descriptor = os.open(path, os.O_RDWR)
            for _ in range(20):
                start, piece = rng.randrange(size - 9000), rng.randbytes(rng.randrange(1, 9000))
                os.pwrite(descriptor, piece, start)
                model[start : start + len(piece)] = piece
                assert os.pread(descriptor, len(piece), start) == piece
            os.close(descriptor)
            ask(lab.nodes[1], "drop")

    with ThreadPoolExecutor() as pool:
        writing = pool.submit(write)
        while not writing.done():
            assert len(path.read_bytes()) == size
        writing.result()
    assert path.read_bytes() == model
    ask(lab.nodes[1], "drop")
    for directory in dirs:
        assert (directory / "file").read_bytes() == model


def test_a_file_that_is_cut_while_it_is_streamed_does_not_grow_again(
    lab: Lab, dirs: Dirs, rng: random.Random
) -> None:
    path = dirs[1] / "file"
    for _ in range(6):
        contents = make(dirs[0] / "file", 24 * MIB)
        Cost(lab.nodes[1])
        cut = rng.randrange(1, 24 * MIB)
        with path.open("rb", buffering=0) as file:
            file.read(rng.randrange(1, 8 * MIB))
            os.truncate(path, cut)
            file.read(4 * MIB)
            assert path.stat().st_size == cut
        for directory in dirs:
            assert (directory / "file").read_bytes() == contents[:cut]
