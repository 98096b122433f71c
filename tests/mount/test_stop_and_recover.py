"""Stopping a node loses nothing; what a killed one had not committed can be recovered."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from modelfsd.commands.launch import wait_for_exit
from modelfsd.lab.cluster import Lab
from modelfsd.lab.state import LabNode
from tests.mount.mount_parts import MIB, Dirs, in_child, make_whole, start_child, wait_until

HOLD = """
file = os.open(path, os.O_RDWR | os.O_CREAT)
data = open(origin, 'rb').read()
for at in range(0, len(data), 1 << 20):
    os.pwrite(file, data[at : at + (1 << 20)], at)
print(json.dumps('written'), flush=True)
sys.stdin.read()
"""

CHANGE = """
file = os.open(path, os.O_RDWR)
for at, text in ((4096, 'early'), (5 << 20, 'late'), ((7 << 20) + 5, 'past the end')):
    os.pwrite(file, text.encode(), at)
os.ftruncate(file, (7 << 20) + 9)
os.ftruncate(file, (7 << 20) + 30)
os.pwrite(file, b'end', (7 << 20) + 40)
print(json.dumps('written'), flush=True)
sys.stdin.read()
"""


def changed(data: bytes) -> bytes:
    """What CHANGE makes of a file."""
    model = bytearray(data.ljust((7 << 20) + 17, b"\0"))
    for at, text in ((4096, b"early"), (5 << 20, b"late"), ((7 << 20) + 5, b"past the end")):
        model[at : at + len(text)] = text
    model = model[: (7 << 20) + 9].ljust((7 << 20) + 40, b"\0")
    return bytes(model + b"end")


def modelfs(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-P", "-m", "modelfsd", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=120, cwd="/"
    )


def send_pages(node: LabNode) -> None:
    """Have the kernel send what it holds, without a commit as fsync would make.

    syncfs does not wait for FUSE's answers, so we wait until no request is on its way.
    """
    descriptor = os.open(node.mount, os.O_RDONLY)
    try:
        assert ctypes.CDLL(None).syncfs(descriptor) == 0
        connection = os.minor(os.fstat(descriptor).st_dev)
    finally:
        os.close(descriptor)
    waiting = Path(f"/sys/fs/fuse/connections/{connection}/waiting")
    wait_until(lambda: int(waiting.read_text()) == 0, "the daemon's answers")


def lost(node: LabNode, path: Path) -> dict[str, object]:
    """The row of `recover --list` for a file."""
    done = modelfs("recover", "--list", "--json", "--state-dir", node.state_dir)
    assert done.returncode == 0, done.stderr
    wanted = f"/{path.relative_to(node.mount)}"
    (row,) = [row for row in json.loads(done.stdout)["lost"] if row["path"] == wanted]
    found: dict[str, object] = row
    return found


def test_sigterm_commits_what_programs_that_hold_files_open_have_written(
    fault_lab: Lab, fault_dirs: Dirs, tmp_path: Path, rng: Random
) -> None:
    node, data = fault_lab.node("n1"), rng.randbytes(40 * MIB)
    (tmp_path / "origin").write_bytes(data)
    path = fault_dirs[0] / "dirty"
    with start_child(HOLD, path=path, origin=tmp_path / "origin") as child:
        try:
            assert child.stdout is not None and "written" in child.stdout.readline()
            assert node.pid is not None
            pid = node.pid
            os.kill(pid, signal.SIGTERM)
            assert wait_for_exit(pid, 60)
        finally:
            child.kill()
    assert (fault_dirs[1] / "dirty").read_bytes() == data
    make_whole(fault_lab)
    assert path.read_bytes() == data
    assert not list((node.state_dir / "lost").iterdir())


def test_umount_right_after_large_writes_loses_nothing(
    fault_lab: Lab, fault_dirs: Dirs, rng: Random
) -> None:
    node, data = fault_lab.node("n1"), rng.randbytes(40 * MIB)
    (fault_dirs[0] / "closed").write_bytes(data)
    script = """
import mmap
with open(path, 'w+b') as file:
    file.truncate(9 << 20)
    with mmap.mmap(file.fileno(), 9 << 20) as pages:
        pages[:] = bytes([7]) * (9 << 20)
        file.close()
"""
    assert in_child(script, path=fault_dirs[0] / "mapped").errno == 0
    done = modelfs("umount", node.mount)
    assert done.returncode == 0, done.stderr
    assert (fault_dirs[1] / "closed").read_bytes() == data
    assert (fault_dirs[1] / "mapped").read_bytes() == bytes([7]) * (9 << 20)


@pytest.mark.parametrize("is_new", [True, False], ids=["a new file", "a changed file"])
def test_what_a_killed_daemon_had_taken_is_recovered_whole(
    fault_lab: Lab, fault_dirs: Dirs, tmp_path: Path, rng: Random, is_new: bool
) -> None:
    node, data = fault_lab.node("n1"), rng.randbytes(6 * MIB + 100)
    (tmp_path / "origin").write_bytes(data)
    path, dest = fault_dirs[0] / f"file-{is_new}", tmp_path / "made"
    if not is_new:
        (fault_dirs[1] / path.name).write_bytes(data)
    wanted = data if is_new else changed(data)
    with start_child(HOLD if is_new else CHANGE, path=path, origin=tmp_path / "origin") as child:
        try:
            assert child.stdout is not None and "written" in child.stdout.readline()
            send_pages(node)
            fault_lab.kill("n1")
        finally:
            child.kill()
    row = lost(node, path)  # no daemon is needed for that
    assert row["size"] == len(wanted) and row["node"] == "n1"
    make_whole(fault_lab)
    assert path.read_bytes() == (b"" if is_new else data)  # the version that was committed
    row = lost(node, path)
    assert not row["open"] and "daemon ended" in str(row["why"])
    name = str(row["name"])
    done = modelfs("recover", name, dest, "--state-dir", node.state_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    assert dest.read_bytes() == wanted
    again = modelfs("recover", name, dest, "--state-dir", node.state_dir)
    assert again.returncode == 2 and "nothing is overwritten" in again.stderr
    listed = modelfs("recover", "--list", "--mount", node.mount)
    assert name in listed.stdout and path.name in listed.stdout
