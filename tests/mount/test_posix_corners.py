"""Corners of POSIX that are easily missed: calls which the kernel answers in part without us."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from pathlib import Path

import pytest

from tests.mount.mount_parts import Dirs, in_child, pass_a_tick, refused, times, wait_until

pytestmark = pytest.mark.fuse

NOBODY = 65534
LIBC = ctypes.CDLL(None, use_errno=True)


def sync_file_system(descriptor: int) -> str:
    """syncfs(2); returns the name of its error. It reports what went wrong with any inode."""
    if LIBC.syncfs(descriptor) == 0:
        return ""
    return errno.errorcode[ctypes.get_errno()]


@pytest.mark.parametrize("is_cached", [False, True])
def test_an_open_for_reading_that_truncates_empties_the_file_for_all(
    dirs: Dirs, is_cached: bool
) -> None:
    here, there = dirs[0] / "file", dirs[1] / "file"
    here.write_bytes(b"x" * 100_000)
    if is_cached:
        assert len(there.read_bytes()) == 100_000
    descriptor = os.open(here, os.O_RDONLY | os.O_TRUNC)
    assert os.read(descriptor, 10) == b""
    os.close(descriptor)
    assert (here.read_bytes(), there.read_bytes()) == (b"", b"")
    assert (here.stat().st_size, there.stat().st_size) == (0, 0)


@pytest.mark.parametrize(("mode", "left"), [(0o6777, 0o777), (0o2676, 0o676), (0o2666, 0o2666)])
def test_an_open_that_truncates_takes_the_set_id_bits(dirs: Dirs, mode: int, left: int) -> None:
    here, there = dirs[0] / "file", dirs[1] / "file"
    here.write_bytes(b"x")
    os.chmod(here, mode)
    os.close(os.open(here, os.O_WRONLY | os.O_TRUNC))
    assert stat.S_IMODE(here.stat().st_mode) == mode  # root may keep them
    source = "os.close(os.open(p, os.O_WRONLY | os.O_TRUNC))"
    assert in_child(source, uid=NOBODY, p=str(here)).errno == 0
    assert stat.S_IMODE(here.stat().st_mode) == left
    wait_until(lambda: stat.S_IMODE(there.stat().st_mode) == left, "the mode")


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_times_that_no_record_can_hold_become_the_nearest_that_one_can(
    dirs: Dirs, kind: str
) -> None:
    here, there = dirs[0] / kind, dirs[1] / kind
    here.touch() if kind == "file" else here.mkdir()
    for seconds, wanted_ns in ((1 << 40, (1 << 63) - 1), (-(1 << 40), -(1 << 63))):
        os.utime(here, (seconds, seconds))
        wait_until(lambda wanted_ns=wanted_ns: there.stat().st_mtime_ns == wanted_ns, "the mtime")  # type: ignore[misc]
        assert there.stat().st_atime_ns == wanted_ns


def test_removing_and_replacing_files_leaves_no_error_behind(dirs: Dirs) -> None:
    """The kernel sends the times of what has lost its name, and keeps the answer for syncfs."""
    here, there = dirs[0], dirs[1]
    root = os.open(here, os.O_RDONLY)
    try:
        sync_file_system(root)  # what others left
        (here / "removed").write_bytes(b"x")
        (here / "removed").unlink()
        assert sync_file_system(root) == ""
        for name in ("new", "replaced"):
            (here / name).write_bytes(b"x")
        os.rename(here / "new", here / "replaced")
        assert sync_file_system(root) == ""
        # Superseded by another node, under a second name.
        (here / "linked").hardlink_to(here / "replaced")
        (there / "linked").write_bytes(b"from there")
        os.rename(here / "replaced", here / "moved")
        (there / "linked").write_bytes(b"again")
        Path(here / "moved").unlink()
        assert sync_file_system(root) == ""
    finally:
        os.close(root)


def test_an_unlinked_file_is_truncated_through_its_descriptor_s_path(dirs: Dirs) -> None:
    path = dirs[0] / "file"
    path.write_bytes(b"0123456789")
    with path.open("r+b", buffering=0) as file:
        path.unlink()
        for size in (4, 0, 6):
            os.truncate(f"/proc/self/fd/{file.fileno()}", size)
            assert os.fstat(file.fileno()).st_size == size
        assert os.pread(file.fileno(), 10, 0) == bytes(6)
    with refused(errno.ENOENT):
        os.truncate(path, 1)


@pytest.mark.parametrize("kind", ["file", "directory", "fifo", "symlink"])
def test_a_chown_that_sets_nothing_moves_ctime_for_good(dirs: Dirs, kind: str) -> None:
    here, there = dirs[0] / kind, dirs[1] / kind
    match kind:
        case "file":
            here.write_bytes(b"x")
        case "directory":
            here.mkdir()
        case "fifo":
            os.mkfifo(here)
        case _:
            here.symlink_to("target")
    before = times(here)
    pass_a_tick(here)
    os.chown(here, -1, -1, follow_symlinks=False)
    mtime, ctime = times(here)
    assert mtime == before[0] and ctime > before[1]
    wait_until(lambda: times(there)[1] > before[1], "the ctime elsewhere")


@pytest.mark.parametrize("how", ["removed", "replaced", "removed elsewhere"])
def test_a_removed_directory_keeps_its_times_for_who_is_inside(dirs: Dirs, how: str) -> None:
    here = dirs[0] / "here"
    here.mkdir()
    pass_a_tick(here)
    (here / "file").touch()
    (here / "file").unlink()
    descriptor = os.open(here, os.O_RDONLY)
    try:
        before = times(here)
        pass_a_tick(here)
        match how:
            case "removed":
                here.rmdir()
            case "replaced":
                (dirs[0] / "new").mkdir()
                (dirs[0] / "new").rename(here)
            case _:
                (dirs[1] / "here").rmdir()
        wait_until(lambda: os.fstat(descriptor).st_nlink == 0, "the link count")
        status = os.fstat(descriptor)
        assert status.st_mtime_ns == before[0]
        assert status.st_ctime_ns > before[1]
        os.utime(descriptor, ns=(5, 6))
        os.fchmod(descriptor, 0o700)
        status = os.fstat(descriptor)
        assert (status.st_atime_ns, status.st_mtime_ns) == (5, 6)
    finally:
        os.close(descriptor)


def test_what_was_fsynced_takes_blocks_though_the_file_stays_open(dirs: Dirs) -> None:
    """`tar --sparse` takes a file without blocks for one that is all zeros."""
    here, there = dirs[0] / "file", dirs[1] / "file"
    with here.open("w+b", buffering=0) as file:
        for size in (100, 100_000):
            file.write(b"x" * (size - file.tell()))
            os.fsync(file.fileno())
            blocks = -(-size // 512)
            wait_until(lambda blocks=blocks: here.stat().st_blocks == blocks, "the blocks")  # type: ignore[misc]
            assert there.stat().st_blocks == blocks
            assert os.fstat(file.fileno()).st_size == size


def test_fsync_through_a_descriptor_for_reading_commits_what_others_wrote(dirs: Dirs) -> None:
    """`sync FILE` opens it for reading."""
    here, there = dirs[0] / "file", dirs[1] / "file"
    here.write_bytes(b"old")
    with here.open("r+b", buffering=0) as writer, here.open("rb") as reader:
        writer.write(b"new")
        os.fsync(reader.fileno())
        assert there.read_bytes() == b"new"
