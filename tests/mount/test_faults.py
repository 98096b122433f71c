"""What breaks, and what users see then: killed, paused and damaged nodes of a real lab.

Every test begins and ends with all three nodes up (`fault_dirs`). Nothing here touches the mount of
a node that is down.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import blake3
import pytest

from modelfs import stripe
from modelfs.limits import PEER_PATIENCE_SECONDS
from modelfsd.lab.cluster import Lab
from modelfsd.lab.state import LabNode
from tests.mount.mount_parts import (
    BIG_BYTES,
    MIB,
    Dirs,
    ask,
    assert_same,
    finish_child,
    forget_pages,
    in_child,
    info,
    make_whole,
    pattern,
    start_child,
    version_in,
    wait_for_leader,
    wait_until,
)

pytestmark = pytest.mark.fuse

# For one read() beside a dying node: it does not wait until that is known to be dead. G7 says 1 s
# on an idle machine.
READ_SECONDS_MAX = 0.9 * PEER_PATIENCE_SECONDS
REFUSAL_SECONDS_MAX = 40.0  # for a change without etcd's quorum; its own deadlines are shorter

READ_SLOWLY = """
wanted_bytes, worst, done = open(wanted, "rb").read(), 0.0, 0
with open(path, "rb", buffering=0) as file:
    while True:
        started = time.monotonic()
        data = file.read(131072)
        worst = max(worst, time.monotonic() - started)
        if not data:
            break
        assert data == wanted_bytes[done:done + len(data)]
        done += len(data)
        if done == 4 << 20:
            print(json.dumps("reading"), flush=True)
            sys.stdin.readline()
print(json.dumps([done, worst]))
"""


@contextlib.contextmanager
def down(lab: Lab, *names: str) -> Iterator[None]:
    """These nodes are killed for as long as the body runs; then all are up again."""
    for name in names:
        lab.kill(name)
    try:
        if len(names) == 1:  # the others are a majority
            wait_for_leader(lab)
        yield
    finally:
        make_whole(lab)


def chunk_files(node: LabNode) -> list[Path]:
    """The chunks that a node owns, on its disk."""
    return [path for path in (node.state_dir / "chunks" / "owned").glob("*/*") if path.is_file()]


def could_write(path: Path, contents: bytes) -> bool:
    """Whether a file could be overwritten; False if another node is its writer, or led etcd."""
    try:
        with path.open("r+b") as file:
            file.write(contents)
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.EROFS, errno.EIO):
            return False
        raise
    return True


# ---------------------------------------------------------------- one node


@pytest.mark.parametrize("how", ["kill", "pause"])
def test_a_reader_goes_on_when_a_node_that_it_reads_from_falls_silent(
    fault_lab: Lab, fault_dirs: Dirs, big: Path, how: str
) -> None:
    here, there = fault_dirs[0] / "big", fault_dirs[2] / "big"
    here.write_bytes(big.read_bytes())
    assert there.stat().st_size == BIG_BYTES
    reader = start_child(READ_SLOWLY, path=there, wanted=big)
    assert reader.stdout is not None and "reading" in reader.stdout.readline()
    getattr(fault_lab, how)("n2")
    result = finish_child(reader)
    assert result.errno == 0
    size, worst_seconds = result.value
    assert size == BIG_BYTES
    assert worst_seconds < READ_SECONDS_MAX
    forget_pages(here)
    assert_same(here, big)


def test_writes_go_on_while_a_node_is_dead_and_it_sees_them_when_it_is_back(
    fault_lab: Lab, fault_dirs: Dirs, big: Path
) -> None:
    first, second, third = fault_dirs
    (first / "before").write_bytes(b"before")
    assert (third / "before").read_bytes() == b"before"
    with down(fault_lab, "n3"):
        (first / "before").write_bytes(b"changed")
        (first / "big").write_bytes(big.read_bytes())
        (second / "directory").mkdir()
        os.rename(second / "big", second / "directory" / "big")
        found = info(fault_lab, second / "directory" / "big")
        assert found["under_replicated"] == 0, "copies are handed off to living nodes"
        assert_same(second / "directory" / "big", big)
    assert (third / "before").read_bytes() == b"changed"
    assert_same(third / "directory" / "big", big)
    assert sorted(os.listdir(third)) == ["before", "directory"]


def test_the_lease_of_a_dead_writer_lapses_and_its_old_version_stays(
    fault_lab: Lab, fault_dirs: Dirs
) -> None:
    file = fault_dirs[0] / "file"
    file.write_bytes(pattern(1, 3 * MIB))
    source = """
file = open(path, "r+b", buffering=0)
file.write(b"never committed")
print(json.dumps("open"), flush=True)
sys.stdin.readline()
"""
    writer = start_child(source, path=fault_dirs[1] / "file")
    assert writer.stdout is not None and "open" in writer.stdout.readline()
    with down(fault_lab, "n2"):
        finish_child(writer)
        assert version_in((fault_dirs[2] / "file").read_bytes()) == 1
        wait_until(lambda: could_write(file, pattern(2, 3 * MIB)), "the lease to lapse")
        assert version_in((fault_dirs[2] / "file").read_bytes()) == 2
    assert version_in((fault_dirs[1] / "file").read_bytes()) == 2


def test_a_writer_that_was_paused_for_too_long_cannot_commit(
    fault_lab: Lab, fault_dirs: Dirs
) -> None:
    file = fault_dirs[0] / "file"
    file.write_bytes(pattern(1, 5 * MIB))
    lost = fault_lab.nodes[1].state_dir / "lost"
    kept_before = set(lost.iterdir())
    source = """
file = open(path, "r+b", buffering=0)
file.write(b"x" * (5 << 20))
print(json.dumps("written"), flush=True)
sys.stdin.readline()
file.close()
"""
    writer = start_child(source, path=fault_dirs[1] / "file")
    assert writer.stdout is not None and "written" in writer.stdout.readline()
    fault_lab.pause("n2")
    wait_until(lambda: could_write(file, pattern(2, 5 * MIB)), "the lease to lapse")
    fault_lab.start("n2")
    result = finish_child(writer)
    assert result.errno == errno.EIO
    make_whole(fault_lab)
    for directory in fault_dirs:
        assert version_in((directory / "file").read_bytes()) == 2
    wait_until(lambda: set(lost.iterdir()) - kept_before, "the lost bytes to be kept")


# ---------------------------------------------------------------- damage


def test_a_damaged_chunk_is_never_served_and_is_repaired(
    fault_lab: Lab, fault_dirs: Dirs, big: Path
) -> None:
    node = fault_lab.nodes[0]
    before = set(chunk_files(node))
    (fault_dirs[0] / "big").write_bytes(big.read_bytes())
    damaged = sorted(set(chunk_files(node)) - before, key=lambda path: path.stat().st_size)[-3:]
    good = {path: path.read_bytes() for path in damaged}
    for path, offset in zip(damaged, (0, MIB + 7, 3 * MIB), strict=True):
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(bytes(byte ^ 0x40 for byte in good[path][offset : offset + 4]))
    for directory in fault_dirs:
        forget_pages(directory / "big")
        assert_same(directory / "big", big)

    def are_repaired() -> bool:
        return all(path.exists() and path.read_bytes() == good[path] for path in damaged)

    wait_until(are_repaired, "the repair")
    assert ask(node, "counters")["chunks"]["corrupt"] > 0


def test_a_chunk_file_that_is_gone_is_read_from_elsewhere(
    fault_lab: Lab, fault_dirs: Dirs, big: Path
) -> None:
    node = fault_lab.nodes[0]
    before = set(chunk_files(node))
    (fault_dirs[0] / "big").write_bytes(big.read_bytes())
    for path in set(chunk_files(node)) - before:
        path.unlink()
    for directory in fault_dirs:
        forget_pages(directory / "big")
        assert_same(directory / "big", big)


def test_a_range_without_any_copy_is_an_error_and_the_rest_still_reads(
    fault_lab: Lab, fault_dirs: Dirs
) -> None:
    contents = os.urandom(12 * MIB)
    (fault_dirs[0] / "file").write_bytes(contents)
    chunk_bytes = info(fault_lab, fault_dirs[0] / "file")["chunk_bytes"]
    start, size = stripe.span(chunk_bytes, stripe.locate(chunk_bytes, 5 * MIB)[0])
    name = blake3.blake3(contents[start : start + size]).hexdigest()
    copies = [
        path
        for node in fault_lab.nodes
        for path in chunk_files(node)
        if path.parent.name + path.name == name
    ]
    assert len(copies) == 2
    for path in copies:
        path.unlink()
    forget_pages(fault_dirs[0] / "file")
    source = """
descriptor = os.open(path, os.O_RDONLY)
first, last = os.pread(descriptor, 1 << 20, 0), os.pread(descriptor, 1 << 20, 10 << 20)
print(json.dumps([first.hex(), last.hex()]))
os.pread(descriptor, 1 << 20, 5 << 20)
"""
    result = in_child(source, path=fault_dirs[0] / "file")
    assert result.errno == errno.EIO
    assert result.value == [contents[:MIB].hex(), contents[10 * MIB : 11 * MIB].hex()]
    os.unlink(fault_dirs[0] / "file")


# ---------------------------------------------------------------- etcd and the quorum


def test_a_daemon_whose_etcd_is_killed_recovers(fault_lab: Lab, fault_dirs: Dirs) -> None:
    node = fault_lab.nodes[0]
    (fault_dirs[0] / "file").write_bytes(b"before")
    pid = int((node.state_dir / "etcd.pid").read_text().split()[0])
    os.kill(pid, signal.SIGKILL)
    source = "with open(path, 'wb') as f: f.write(b'after')"

    def can_write() -> bool:
        return in_child(source, path=fault_dirs[0] / "file").errno == 0

    wait_until(can_write, "writes to work again")
    wait_until(lambda: ask(node, "status")["etcd"]["healthy"], "the daemon to be attached")

    def all_healthy() -> bool:
        members = ask(node, "status")["etcd"]["members"]
        return len(members) == 3 and all(member["healthy"] for member in members)

    wait_until(all_healthy, "the member to be back")
    assert [(directory / "file").read_bytes() for directory in fault_dirs] == [b"after"] * 3


def write_local_file(node: LabNode, directory: Path) -> Path:
    """A file whose chunks, the manifest's too, happen to be on this very node."""
    for number in itertools.count():
        path = directory / f"{number}"
        path.write_bytes(os.urandom(100_000))
        before = ask(node, "counters")["chunks"]["remote_bytes"]
        forget_pages(path)
        path.read_bytes()
        if ask(node, "counters")["chunks"]["remote_bytes"] == before:
            return path
    raise AssertionError


def test_without_the_quorum_reads_go_on_and_writes_fail_in_bounded_time(
    fault_lab: Lab, fault_dirs: Dirs
) -> None:
    first = fault_dirs[0]
    (first / "small").write_bytes(b"inline")
    local = write_local_file(fault_lab.nodes[0], first)
    contents = local.read_bytes()
    names = sorted(os.listdir(first))
    forget_pages(local)
    with down(fault_lab, "n2", "n3"):
        for path, wanted in ((first / "small", b"inline"), (local, contents)):
            source = "print(json.dumps(open(path, 'rb').read().hex()))"
            result = in_child(source, path=path)
            assert (result.errno, result.value) == (0, wanted.hex())
        children = [
            start_child(source, path=str(first))
            for source in (
                "open(path + '/new', 'wb')",
                "open(path + '/0', 'ab')",
                "os.mkdir(path + '/directory')",
                "os.unlink(path + '/small')",
                "os.rename(path + '/small', path + '/other')",
                "os.chmod(path + '/small', 0o600)",
            )
        ]
        refusals = {finish_child(child, REFUSAL_SECONDS_MAX).errno for child in children}
        assert refusals <= {errno.EROFS, errno.EIO}
        source = "print(json.dumps(sorted(os.listdir(path))))"
        assert in_child(source, path=first).value == names
    assert (fault_dirs[1] / "small").read_bytes() == b"inline"
    (fault_dirs[2] / "new").write_bytes(b"works again")
    assert (first / "new").read_bytes() == b"works again"
