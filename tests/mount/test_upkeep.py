"""Upkeep on a real cluster: short graces, real kernels, a killed node."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from modelfsd.lab.cluster import Lab
from modelfsd.lab.state import LabNode
from tests.mount.mount_parts import (
    MIB,
    ask,
    chunk_files,
    chunk_names,
    flip,
    forget_pages,
    kill,
    make_whole,
    owned_bytes,
    pattern,
    wait_until,
)

GRACE_SECONDS = 2
SETTINGS = (
    f'reclaim_grace = "{GRACE_SECONDS}s"\ndown_out = "3s"\nretain = "0s"\nscrub_every = "4s"\n'
)
SWEEPS = 9  # more than two graces

Held = dict[str, int]


@pytest.fixture(scope="module")
def upkeep_lab(test_root: Path) -> Iterator[Lab]:
    """A lab in a hurry."""
    root = Path(tempfile.mkdtemp(prefix="upkeep-", dir=test_root))
    with Lab.up(root, 3, settings=SETTINGS) as lab:
        yield lab


@pytest.fixture
def lab(upkeep_lab: Lab) -> Iterator[Lab]:
    """The lab, whole and empty."""
    make_whole(upkeep_lab)
    yield upkeep_lab
    make_whole(upkeep_lab)
    for path in upkeep_lab.nodes[0].mount.iterdir():
        path.unlink()
    wait_until(lambda: not any(held(upkeep_lab).values()), "empty stores")


def held(lab: Lab) -> Held:
    """Bytes of owned chunks on each node's disk."""
    return {node.name: owned_bytes(node) for node in lab.nodes}


def wait_for_sweeps(nodes: list[LabNode], count: int) -> None:
    """Wait until each node has finished so many sweeps that begin from now on."""
    for node in nodes:
        for _ in range(count):
            last = swept_at(node)
            wait_until(partial(_has_swept_since, node, last), "a sweep")


def swept_at(node: LabNode) -> float:
    """When the node's last sweep ended."""
    time: float = ask(node, "status")["upkeep"]["swept_at"]
    return time


def _has_swept_since(node: LabNode, last: float) -> bool:
    return swept_at(node) > last


def random_bytes(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def push_out(descriptor: int) -> None:
    """Have the kernel send a file's dirty pages to the daemon; unlike fsync it commits nothing."""
    before, write, after = 1, 2, 4  # SYNC_FILE_RANGE_*
    libc = ctypes.CDLL(None, use_errno=True)
    everything = ctypes.c_longlong(0)
    done = libc.sync_file_range(descriptor, everything, everything, before | write | after)
    assert done == 0, os.strerror(ctypes.get_errno())


def test_the_space_of_a_deleted_file_comes_back_on_every_node(lab: Lab) -> None:
    first, _, third = (node.mount for node in lab.nodes)
    (first / "kept").write_bytes(random_bytes(3 * MIB, 1))
    before = held(lab)
    (first / "big").write_bytes(random_bytes(32 * MIB, 2))
    assert sum(held(lab).values()) > sum(before.values()) + 64 * MIB
    (third / "big").unlink()
    wait_until(lambda: held(lab) == before, "the space of the deleted file")
    for node in lab.nodes:
        assert (node.mount / "kept").read_bytes() == random_bytes(3 * MIB, 1)
    told = [ask(node, "status")["upkeep"] for node in lab.nodes]
    assert sum(upkeep["freed_bytes"] for upkeep in told) >= 64 * MIB


@pytest.mark.parametrize("how", ["unlink", "replace", "rewrite"])
def test_an_open_version_is_read_to_its_last_byte_long_after_it_went(lab: Lab, how: str) -> None:
    writer, reader, _ = (node.mount for node in lab.nodes)
    size = 24 * MIB + 77
    old = random_bytes(size, 3)
    (writer / "f").write_bytes(old)
    descriptor = os.open(reader / "f", os.O_RDONLY)
    mapped = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    second = os.open(reader / "f", os.O_RDONLY)
    try:
        assert os.pread(second, 4096, 0) == old[:4096]
        if how == "unlink":
            (writer / "f").unlink()
        elif how == "replace":
            (writer / "new").write_bytes(pattern(1, MIB))
            (writer / "new").rename(writer / "f")
        else:
            (writer / "f").write_bytes(pattern(1, MIB))
        wait_until(lambda: ask(lab.nodes[1], "status")["upkeep"]["pins"] == 1, "a pin")
        wait_for_sweeps(list(lab.nodes), SWEEPS)
        os.posix_fadvise(second, 0, 0, os.POSIX_FADV_DONTNEED)
        assert b"".join(iter(lambda: os.read(second, MIB), b"")) == old
        assert mapped[:] == old
    finally:
        mapped.close()
        os.close(second)
        os.close(descriptor)
    wait_until(lambda: sum(held(lab).values()) < 3 * MIB, "the space of the closed version")
    wait_until(lambda: ask(lab.nodes[1], "status")["upkeep"]["pins"] == 0, "no pin")
    if how != "unlink":
        assert (reader / "f").read_bytes() == pattern(1, MIB)


def test_a_slow_writer_commits_what_it_wrote_many_graces_ago(lab: Lab) -> None:
    writer, reader, _ = (node.mount for node in lab.nodes)
    data = random_bytes(20 * MIB, 4)
    with (writer / "slow").open("wb", buffering=0) as file:
        file.write(data[: 12 * MIB])
        push_out(file.fileno())
        wait_until(lambda: sum(held(lab).values()) > 8 * MIB, "early chunks on their nodes")
        wait_for_sweeps(list(lab.nodes), SWEEPS)
        assert (reader / "slow").stat().st_size == 0, "it was committed: this shows nothing"
        file.write(data[12 * MIB :])
    forget_pages(writer / "slow")
    assert (reader / "slow").read_bytes() == data
    assert (writer / "slow").read_bytes() == data
    wait_until(lambda: lacking(lab.nodes[0]) == 0, "as many copies as there shall be")


def lacking(node: LabNode) -> int:
    """How many chunks have too few copies, as a node knows it."""
    count: int = ask(node, "status")["chunks_under_replicated"]
    return count


def test_a_dead_node_is_replaced_and_gets_its_chunks_back(lab: Lab) -> None:
    first, second, third = lab.nodes
    data = random_bytes(40 * MIB, 5)
    (first.mount / "f").write_bytes(data)
    home = held(lab)
    assert home[third.name] > 0
    kill(lab, third.name)

    def is_replaced() -> bool:
        return owned_bytes(first) + owned_bytes(second) >= 2 * len(data)

    # On a machine that stood still the new copies may be there before anybody has looked.
    wait_until(lambda: lacking(first) > 0 or is_replaced(), "n3 to be missed")
    wait_until(is_replaced, "new copies")
    wait_until(lambda: lacking(first) == 0, "as many copies as there shall be")
    (first.mount / "g").write_bytes(random_bytes(8 * MIB, 6))  # its copies are handed off
    lab.start(third.name)
    wait_until(lambda: held(lab)[third.name] > home[third.name], "the chunks written meanwhile")
    (first.mount / "g").unlink()
    wait_until(lambda: held(lab) == home, "everything at home again")
    wait_until(lambda: lacking(first) == 0, "as many copies as there shall be")
    assert (third.mount / "f").read_bytes() == data


def test_what_rots_and_is_never_read_is_put_right(lab: Lab) -> None:
    first, second, _ = lab.nodes
    data = random_bytes(20 * MIB, 7)
    (first.mount / "f").write_bytes(data)
    held = chunk_files(second)
    ours = [held[name] for name in chunk_names(data) if name in held]
    good = {path: path.read_bytes() for path in ours}
    for path in ours:
        flip(path, 1000)

    def is_right() -> bool:
        return all(path.exists() and path.read_bytes() == good[path] for path in ours)

    wait_until(is_right, "the scrub in the background")
    assert ask(second, "status")["scrub"]["bad_chunks"] >= len(ours) > 0
    (first.mount / "f").unlink()  # whose chunks go, while scrubs go on
    wait_until(lambda: ask(second, "status")["scrub"]["completed_at"] > 0, "a whole round")
    assert ask(second, "status")["scrub"]["lost_chunks"] == 0
