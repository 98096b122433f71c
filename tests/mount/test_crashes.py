"""Nodes that die while they write, or are stopped: what `close` and `rename` promised is there.

The dying node is killed as a power failure does it, all processes at once, at a moment that the
seed chooses. What it had told its application is compared with what the others have.
"""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelfsd.lab import processes as lab_processes
from modelfsd.lab.cluster import Lab
from modelfsd.lab.state import LabNode
from tests.mount.mount_parts import (
    CHILD_SECONDS,
    MIB,
    Dirs,
    assert_same,
    finish_child,
    forget_pages,
    info,
    is_mounted,
    kill,
    make_whole,
    pattern,
    refused,
    start_child,
    version_in,
    wait_until,
)

pytestmark = pytest.mark.fuse

WRITE_CHECKPOINTS = """
number = 0
while True:
    number += 1
    size = sizes[number % len(sizes)]
    data = (b"%015d\\n" % number * (size // 16 + 1))[:size]
    with open(f"{root}/temporary", "wb") as file:
        file.write(data)
    os.rename(f"{root}/temporary", f"{root}/checkpoint-{number:06}")
    print(json.dumps(number), flush=True)
"""
SIZES = [100, 3 * MIB, 70_000, 9 * MIB + 5, 0, 4096]

WRITE_SLOWLY = """
with open(path, "wb", buffering=0) as file:
    for number in range(64):
        file.write(b"%015d\\n" % number * 65536)
        if number == 8:
            print(json.dumps("writing"), flush=True)
            sys.stdin.readline()
print(json.dumps("closed"))
"""


@pytest.fixture
def whole_again(fault_lab: Lab) -> Iterator[None]:
    """All nodes are up when the test has ended."""
    yield
    make_whole(fault_lab)


@pytest.mark.parametrize("seed", range(3))
def test_what_a_dead_writer_had_closed_is_there_and_whole(
    fault_lab: Lab, fault_dirs: Dirs, whole_again: None, seed: int, rng: random.Random
) -> None:
    stop_at = rng.randrange(5, 40)
    writer = start_child(WRITE_CHECKPOINTS, root=fault_dirs[0], sizes=SIZES)
    assert writer.stdout is not None
    told = 0
    for line in writer.stdout:
        told = json.loads(line)
        if told == stop_at:
            break
    kill(fault_lab, "n1")
    told = max(told, *last_words(writer), 0)
    for directory in fault_dirs[1:]:
        names = sorted(name for name in os.listdir(directory) if name.startswith("checkpoint"))
        assert len(names) in (told, told + 1), "one may have been renamed and not told"
        for number, name in enumerate(names, 1):
            contents = (directory / name).read_bytes()
            assert contents == pattern(number, SIZES[number % len(SIZES)])
    make_whole(fault_lab)
    last = fault_dirs[0] / f"checkpoint-{told:06}"
    assert last.read_bytes() == pattern(told, SIZES[told % len(SIZES)])


def last_words(child: subprocess.Popen[str]) -> list[int]:
    """The numbers that a child still told; how it ended does not matter."""
    assert child.stdout is not None
    too_late = threading.Timer(CHILD_SECONDS, child.kill)
    too_late.start()
    try:
        # Not by `communicate`, which passes over what was read with the lines before.
        words = [json.loads(line) for line in child.stdout]
        child.communicate()
    finally:
        too_late.cancel()
    return [word for word in words if isinstance(word, int)]


def test_a_write_goes_on_when_a_node_that_takes_its_copies_dies(
    fault_lab: Lab, fault_dirs: Dirs, whole_again: None
) -> None:
    writer = start_child(WRITE_SLOWLY, path=fault_dirs[0] / "file")
    assert writer.stdout is not None and "writing" in writer.stdout.readline()
    fault_lab.kill("n3")
    result = finish_child(writer)
    assert (result.errno, result.value) == (0, "closed")
    wanted = b"".join(b"%015d\n" % number * 65536 for number in range(64))
    for directory in fault_dirs[:2]:
        forget_pages(directory / "file")
        assert (directory / "file").read_bytes() == wanted
    found = info(fault_lab, fault_dirs[0] / "file")
    assert found["under_replicated"] == 0
    make_whole(fault_lab)
    assert (fault_dirs[2] / "file").read_bytes() == wanted


def test_a_reader_beside_restarting_nodes_never_sees_a_torn_version(
    fault_lab: Lab, fault_dirs: Dirs, whole_again: None
) -> None:
    """n2 is killed and started again while n1 writes versions and n3 reads them."""
    first, _, third = fault_dirs
    (first / "file").write_bytes(pattern(0, 3 * MIB))
    source = """
while not os.path.exists(stop):
    with open(path, "rb") as file:
        data = file.read()
    assert data == (data[:16] * (len(data) // 16 + 1))[:len(data)], "torn"
    assert len(data) == size
print(json.dumps(int(data[:16])))
"""
    stop = first / "stop"
    reader = start_child(source, path=third / "file", stop=third / "stop", size=3 * MIB)
    version = 0
    for _ in range(2):
        kill(fault_lab, "n2")
        for _ in range(5):
            version += 1
            write_version(first, version)
        fault_lab.start("n2")
        for _ in range(5):
            version += 1
            write_version(first, version)
    stop.touch()
    result = finish_child(reader)
    assert result.errno == 0, result.text
    wait_until(lambda: (third / "stop").exists(), "the end")
    assert version_in((third / "file").read_bytes()) == version


def write_version(directory: Path, version: int) -> None:
    """tmp + rename."""
    (directory / "temporary").write_bytes(pattern(version, 3 * MIB))
    os.rename(directory / "temporary", directory / "file")


# ---------------------------------------------------------------- all of them


def test_everything_is_there_after_all_nodes_were_killed_at_once(
    fault_lab: Lab, fault_dirs: Dirs, big: Path
) -> None:
    first, second, third = fault_dirs
    (first / "closed").write_bytes(big.read_bytes())
    (second / "small").write_bytes(b"small")
    (third / "a").mkdir()
    os.rename(third / "small", third / "a" / "renamed")
    source = """
file = open(path, "wb", buffering=0)
file.write(b"s" * 3000000)
os.fsync(file.fileno())
file.write(b"not synced")
print(json.dumps("synced"), flush=True)
sys.stdin.readline()
"""
    writer = start_child(source, path=second / "synced")
    assert writer.stdout is not None and "synced" in writer.stdout.readline()
    lab_processes.kill([node.mark for node in fault_lab.nodes], 20.0)
    finish_child(writer)
    make_whole(fault_lab)
    for directory in fault_dirs:
        assert sorted(os.listdir(directory)) == ["a", "closed", "synced"]
        assert (directory / "a" / "renamed").read_bytes() == b"small"
        assert_same(directory / "closed", big)
        assert (directory / "synced").read_bytes()[:3_000_000] == b"s" * 3_000_000
    (third / "synced").write_bytes(b"writable again")
    assert (first / "synced").read_bytes() == b"writable again"


def umount(node: LabNode) -> subprocess.CompletedProcess[str]:
    """`modelfs umount` of a node's mount."""
    command = [sys.executable, "-m", "modelfsd", "umount", str(node.mount)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd="/", env=environment
    )


def test_a_busy_mount_is_left_alone_and_its_user_is_named(fault_lab: Lab, fault_dirs: Dirs) -> None:
    (fault_dirs[2] / "file").write_bytes(b"x")
    source = "file = open(path)\nprint(json.dumps('open'), flush=True)\nsys.stdin.readline()"
    user = start_child(source, path=fault_dirs[2] / "file")
    assert user.stdout is not None and "open" in user.stdout.readline()
    refused_umount = umount(fault_lab.nodes[2])
    assert refused_umount.returncode != 0
    assert str(user.pid) in refused_umount.stderr and "busy" in refused_umount.stderr
    assert (fault_dirs[2] / "file").read_bytes() == b"x"
    finish_child(user)


def test_a_clean_stop_commits_leaves_nothing_behind_and_starts_again(
    fault_lab: Lab, fault_dirs: Dirs, big: Path
) -> None:
    first, second, third = fault_dirs
    (first / "big").write_bytes(big.read_bytes())
    (second / "small").write_bytes(b"small")
    for node in reversed(fault_lab.nodes):
        stopped = umount(node)
        assert stopped.returncode == 0, stopped.stderr
        assert not is_mounted(node)
        assert node.pid is None
    marks = [node.mark for node in fault_lab.nodes]
    wait_until(lambda: not lab_processes.find(marks), "processes to end")
    make_whole(fault_lab)
    for directory in fault_dirs:
        assert sorted(os.listdir(directory)) == ["big", "small"]
        assert_same(directory / "big", big)
    (third / "small").write_bytes(b"after")
    assert (first / "small").read_bytes() == b"after"
    with refused(errno.ENOENT):
        (second / "missing").open()
