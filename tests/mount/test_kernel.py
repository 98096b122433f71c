"""What the kernel asks of a daemon, how often, and in what sizes: read from /sys and counted."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from modelfsd import mounts
from modelfsd.kernel.mount import BACKGROUND_REQUESTS_MAX, READ_AHEAD_KIB
from modelfsd.lab.cluster import Lab
from modelfsd.lab.state import LabNode
from tests.mount.mount_parts import MIB, Dirs, ask, forget_pages, requests, wait_until

pytestmark = pytest.mark.fuse


def device_of(node: LabNode) -> str:
    """The mount's device, as /sys names it."""
    mount = mounts.mount_at(node.mount)
    assert mount is not None
    return mount.device


class Counting:
    """The requests that reach a daemon between two looks."""

    def __init__(self, node: LabNode) -> None:
        self._node = node
        self._before = requests(node)

    def since(self) -> Counter[str]:
        """How many of each kind since the last look."""
        now = requests(self._node)
        made = Counter(now)
        made.subtract(self._before)
        self._before = now
        return +made


def test_the_connection_is_tuned(lab: Lab) -> None:
    for node in lab.nodes:
        device = device_of(node)
        connection = Path("/sys/fs/fuse/connections", device.split(":")[1])
        assert int((connection / "max_background").read_text()) == BACKGROUND_REQUESTS_MAX
        assert int(Path(f"/sys/class/bdi/{device}/read_ahead_kb").read_text()) == READ_AHEAD_KIB


def test_bulk_writes_come_in_requests_of_a_mebibyte(lab: Lab, dirs: Dirs) -> None:
    writer = Counting(lab.nodes[0])
    with (dirs[0] / "file").open("wb", buffering=0) as file:
        for _ in range(32 * 16):
            file.write(os.urandom(MIB // 16))
    assert 32 <= writer.since()["write"] <= 64


def test_what_is_known_is_not_asked_again(lab: Lab, dirs: Dirs) -> None:
    (dirs[0] / "below").mkdir()
    (dirs[0] / "below" / "file").write_bytes(os.urandom(MIB))
    file = dirs[1] / "below" / "file"

    def opens() -> int:
        counting = Counting(lab.nodes[1])
        file.read_bytes()
        return counting.since()["open"]

    # If another node has removed a symlink (of an earlier test), every open looks twice for 2 s.
    wait_until(lambda: opens() == 1, "an open that need not look again")
    file.stat()  # a read makes the kernel ask once for the atime
    counting = Counting(lab.nodes[1])
    for _ in range(100):
        file.stat()
    assert not counting.since()
    for _ in range(5):
        file.read_bytes()
    made = counting.since()
    assert made.pop("open") == 5
    assert set(made) <= {"flush", "release", "getattr"}


def test_what_another_node_wrote_costs_one_look_and_one_open(lab: Lab, dirs: Dirs) -> None:
    (dirs[0] / "file").write_bytes(b"first")
    assert (dirs[1] / "file").read_bytes() == b"first"
    counting = Counting(lab.nodes[1])
    (dirs[0] / "file").write_bytes(b"second")
    wait_until(lambda: (dirs[1] / "file").stat().st_size == 6, "the size")
    assert (dirs[1] / "file").read_bytes() == b"second"
    made = counting.since()
    assert made["lookup"] <= 3
    assert made["open"] <= 2


def test_small_writes_cost_no_request_each(lab: Lab, dirs: Dirs) -> None:
    """The writeback cache gathers them, and nobody asks for security.capability."""
    counting = Counting(lab.nodes[0])
    with (dirs[0] / "file").open("wb", buffering=0) as file:
        for _ in range(2000):
            file.write(b"x" * 100)
    made = counting.since()
    assert made["getxattr"] <= 1
    assert made["write"] <= 20


def test_what_the_kernel_forgets_we_forget(lab: Lab, dirs: Dirs) -> None:
    node = lab.nodes[1]
    before: int = ask(node, "counters")["kernel_inodes"]
    for number in range(400):
        (dirs[0] / f"{number}").write_bytes(b"x" * (number % 3) * 5000)
    for number in range(400):
        assert len((dirs[1] / f"{number}").read_bytes()) == number % 3 * 5000
    os.listdir(dirs[1])
    for number in range(0, 400, 2):
        (dirs[0] / f"{number}").write_bytes(b"a newer version")
        (dirs[0] / f"{number + 1}").unlink()
    os.listdir(dirs[1])
    assert ask(node, "counters")["kernel_inodes"] > before

    def is_forgotten() -> bool:
        Path("/proc/sys/vm/drop_caches").write_text("2\n")
        kept: int = ask(node, "counters")["kernel_inodes"]
        return kept <= before

    wait_until(is_forgotten, "the kernel's inodes to go")
    assert ask(node, "counters")["handles"] == 0
    assert sorted(os.listdir(dirs[1])) == sorted(f"{n}" for n in range(0, 400, 2))
    assert (dirs[1] / "0").read_bytes() == b"a newer version"


def test_an_open_file_outlives_what_the_kernel_drops(dirs: Dirs) -> None:
    contents = os.urandom(5 * MIB)
    (dirs[0] / "file").write_bytes(contents)
    with (dirs[1] / "file").open("rb") as file:
        (dirs[0] / "file").unlink()
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        assert file.read() == contents


def test_a_large_file_read_twice_comes_from_the_page_cache(lab: Lab, dirs: Dirs) -> None:
    contents = os.urandom(16 * MIB)
    (dirs[0] / "file").write_bytes(contents)
    counting = Counting(lab.nodes[1])
    assert (dirs[1] / "file").read_bytes() == contents
    assert counting.since()["read"] > 0

    def is_read_from_the_page_cache() -> bool:
        counting.since()
        assert (dirs[1] / "file").read_bytes() == contents
        return counting.since()["read"] == 0

    # A machine that is short of memory may have dropped pages.
    wait_until(is_read_from_the_page_cache, "a read of which the daemon hears nothing")
    forget_pages(dirs[1] / "file")
    assert (dirs[1] / "file").read_bytes() == contents
    assert counting.since()["read"] > 0
