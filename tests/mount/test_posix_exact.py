"""The fine print of POSIX on one node, and what another node shows of it.

What pjdfstest asks of a file system and a writeback cache makes hard: which times move and which do
not, who may do what, and what an unlinked file still is.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelfsd.lab.cluster import Lab
from tests.mount.mount_parts import (
    MIB,
    Dirs,
    forget_pages,
    in_child,
    pass_a_tick,
    refused,
    times,
    wait_until,
)

pytestmark = pytest.mark.fuse

NOBODY = 65534
KINDS = ("file", "directory", "fifo", "block", "character", "socket", "symlink")
RDEV = os.makedev(4000, 70_000)


@pytest.fixture
def here(dirs: Dirs) -> Path:
    """A directory on one node."""
    return dirs[0]


def make(kind: str, path: Path) -> None:
    """An inode of any type."""
    match kind:
        case "file":
            path.touch()
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "block":
            os.mknod(path, stat.S_IFBLK | 0o644, RDEV)
        case "character":
            os.mknod(path, stat.S_IFCHR | 0o644, RDEV)
        case "socket":
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(os.fspath(path))
        case _:
            path.symlink_to("target")


def moves(what: Path, *also: Path, by: Callable[[], object], mtime: bool, ctime: bool) -> None:
    """Do something, and claim which times of some paths it moves."""
    paths = (what, *also)
    for path in paths:
        pass_a_tick(path)
    before = [times(path) for path in paths]
    by()
    for path, (old_mtime, old_ctime) in zip(paths, before, strict=True):
        new_mtime, new_ctime = times(path)
        assert (new_mtime > old_mtime, new_ctime > old_ctime) == (mtime, ctime), path
        assert new_mtime >= old_mtime and new_ctime >= old_ctime


# ---------------------------------------------------------------- times


@pytest.mark.parametrize("kind", KINDS)
def test_changes_of_a_name_move_the_times_of_its_directories(here: Path, kind: str) -> None:
    a, b = here / "a", here / "b"
    a.mkdir()
    b.mkdir()
    moves(a, by=lambda: make(kind, a / "x"), mtime=True, ctime=True)
    moves(a, by=lambda: os.rename(a / "x", a / "y"), mtime=True, ctime=True)
    moves(a, b, by=lambda: os.rename(a / "y", b / "y"), mtime=True, ctime=True)
    if kind != "directory":
        link = lambda: os.link(b / "y", a / "l", follow_symlinks=False)  # noqa: E731
        moves(a, by=link, mtime=True, ctime=True)
        moves(a, by=(a / "l").unlink, mtime=True, ctime=True)
    remove = (b / "y").rmdir if kind == "directory" else (b / "y").unlink
    moves(b, by=remove, mtime=True, ctime=True)


@pytest.mark.parametrize("kind", KINDS)
def test_changes_of_an_inode_move_its_ctime_alone(here: Path, kind: str) -> None:
    x, y = here / "x", here / "y"
    make(kind, x)

    def chown(uid: int, gid: int) -> None:
        os.chown(x, uid, gid, follow_symlinks=False)

    moves(x, by=lambda: chown(123, 456), mtime=False, ctime=True)
    moves(x, by=lambda: chown(123, 456), mtime=False, ctime=True)
    chown(-1, 9)
    chown(8, -1)
    assert (x.lstat().st_uid, x.lstat().st_gid) == (8, 9)
    if kind != "symlink":
        moves(x, by=lambda: os.chmod(x, 0o751), mtime=False, ctime=True)
        moves(x, by=lambda: os.chmod(x, 0o751), mtime=False, ctime=True)
        assert stat.S_IMODE(x.stat().st_mode) == 0o751
    if kind != "directory":
        moves(x, by=lambda: os.link(x, y, follow_symlinks=False), mtime=False, ctime=True)
        moves(y, by=x.unlink, mtime=False, ctime=True)
        assert y.lstat().st_nlink == 1


@pytest.mark.parametrize("kind", KINDS)
def test_times_are_set_to_the_nanosecond_also_far_away(dirs: Dirs, kind: str) -> None:
    path, there = dirs[0] / "x", dirs[1] / "x"
    make(kind, path)
    far = [(-5_000_000_003, -1), (2**32 * 10**9 + 7, 9 * 10**18 + 1), (1, 2)]
    for wanted in far:
        os.utime(path, ns=wanted, follow_symlinks=False)
        for seen in (path, there):
            wait_until(
                lambda seen=seen, wanted=wanted: (  # type: ignore[misc]
                    (seen.lstat().st_atime_ns, seen.lstat().st_mtime_ns) == wanted
                ),
                "the times to be seen",
            )
    # The same times again are a change all the same.
    again = lambda: os.utime(path, ns=far[-1], follow_symlinks=False)  # noqa: E731
    moves(path, by=again, mtime=False, ctime=True)


def test_a_replaced_file_loses_a_link_and_its_ctime_moves(here: Path) -> None:
    (here / "target").touch()
    (here / "other").hardlink_to(here / "target")
    (here / "new").touch()
    rename = lambda: os.rename(here / "new", here / "target")  # noqa: E731
    moves(here / "other", by=rename, mtime=False, ctime=True)
    assert (here / "other").stat().st_nlink == 1


@pytest.mark.parametrize("size", [0, 100])
def test_truncation_through_a_handle_moves_the_times_also_to_the_same_size(
    dirs: Dirs, size: int
) -> None:
    path, there = dirs[0] / "file", dirs[1] / "file"
    path.write_bytes(b"x" * size)
    with path.open("r+b") as file:
        moves(path, by=lambda: os.ftruncate(file.fileno(), size), mtime=True, ctime=True)
    seen = path.stat().st_mtime_ns
    wait_until(lambda: there.stat().st_mtime_ns == seen, "the new mtime")
    empty = lambda: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))  # noqa: E731
    moves(path, by=empty, mtime=True, ctime=True)
    moves(path, by=empty, mtime=True, ctime=True)
    seen = path.stat().st_mtime_ns
    wait_until(lambda: there.stat().st_mtime_ns == seen, "the new mtime")
    assert there.stat().st_size == 0


def test_a_write_moves_the_times_and_closing_keeps_them(dirs: Dirs) -> None:
    path, there = dirs[0] / "file", dirs[1] / "file"
    path.write_bytes(b"before")
    with path.open("r+b", buffering=0) as file:
        moves(path, by=lambda: file.write(b"after"), mtime=True, ctime=True)
        written = times(path)
    assert times(path) == written
    wait_until(lambda: there.stat().st_mtime_ns == written[0], "the new mtime")
    moves(path, by=lambda: os.close(os.open(path, os.O_RDWR)), mtime=False, ctime=False)
    with path.open("r+b", buffering=0) as file:
        file.write(b"again")
        os.utime(path, ns=(5, 123_456_789))
    assert path.stat().st_mtime_ns == 123_456_789


def test_what_is_refused_moves_no_times(here: Path) -> None:
    (here / "file").write_bytes(b"x")
    os.chmod(here, 0o755)
    sources = {
        "os.unlink(here + '/file')": errno.EACCES,
        "os.mkdir(here + '/new')": errno.EACCES,
        "os.rename(here + '/file', here + '/new')": errno.EACCES,
        "os.truncate(here + '/file', 3)": errno.EACCES,
        "os.utime(here + '/file')": errno.EACCES,
        "os.utime(here + '/file', (1, 1))": errno.EPERM,
        "os.chmod(here + '/file', 0o777)": errno.EPERM,
        "os.chown(here + '/file', 65534, -1)": errno.EPERM,
    }

    def attempt() -> None:
        for source, number in sources.items():
            assert in_child(source, uid=NOBODY, here=str(here)).errno == number, source

    moves(here, here / "file", by=attempt, mtime=False, ctime=False)


# ---------------------------------------------------------------- set-id bits, sticky directories


@pytest.mark.parametrize(
    "source", ["open(p, 'r+').write('y')", "os.truncate(p, 1)", "os.truncate(p, 9)"]
)
def test_a_change_by_others_clears_the_set_id_bits(dirs: Dirs, source: str) -> None:
    path, there = dirs[0] / "file", dirs[1] / "file"
    path.write_bytes(b"x")
    os.chmod(path, 0o6777)
    assert in_child(source, uid=NOBODY, p=str(path)).errno == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o777
    wait_until(lambda: stat.S_IMODE(there.stat().st_mode) == 0o777, "the mode")


def test_chown_clears_the_set_id_bits_of_files_only(here: Path) -> None:
    (here / "file").touch()
    (here / "directory").mkdir()
    for path, wanted in ((here / "file", 0o755), (here / "directory", 0o6755)):
        os.chmod(path, 0o6755)
        os.chown(path, 1, 1)
        assert stat.S_IMODE(path.stat().st_mode) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_sticky_directory_only_owners_remove_and_rename(here: Path, kind: str) -> None:
    sticky = here / "sticky"
    sticky.mkdir()
    os.chown(sticky, 100, 100)
    os.chmod(sticky, 0o1777)
    make(kind, sticky / "x")
    os.chown(sticky / "x", 200, 200, follow_symlinks=False)
    remove = "os.rmdir(x)" if kind == "directory" else "os.unlink(x)"
    move = "os.rename(x, x + 'y'); os.rename(x + 'y', x)"
    for source in (remove, move):
        assert in_child(source, uid=300, x=str(sticky / "x")).errno == errno.EPERM
    assert in_child(move, uid=200, x=str(sticky / "x")).errno == 0
    assert in_child(remove, uid=200, x=str(sticky / "x")).errno == 0


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("new", KINDS)
def test_rename_onto_another_type_is_refused_where_posix_says(here: Path, new: str) -> None:
    for number, old in enumerate(KINDS):
        x, y = here / f"x{number}", here / f"y{number}"
        make(old, x)
        make(new, y)
        wanted = x.lstat().st_mode
        if (old == "directory") == (new == "directory"):
            os.rename(x, y)
            assert y.lstat().st_mode == wanted
        else:
            with refused(errno.ENOTDIR if old == "directory" else errno.EISDIR):
                os.rename(x, y)


def test_odd_paths_are_refused_with_the_right_number(here: Path) -> None:
    (here / "file").touch()
    (here / "directory").mkdir()
    (here / "link").symlink_to("file")
    (here / "loop").symlink_to("loop")
    (here / "dangling").symlink_to("nowhere")
    at = os.fspath(here)
    calls: list[tuple[int, Callable[[], object]]] = [
        (errno.EINVAL, lambda: os.rmdir(f"{at}/directory/.")),
        (errno.ENOTEMPTY, lambda: os.rmdir(f"{at}/directory/..")),
        (errno.EBUSY, lambda: os.rename(f"{at}/directory/.", f"{at}/new")),
        (errno.ENOTDIR, lambda: os.unlink(f"{at}/file/")),
        (errno.ENOTDIR, lambda: os.open(f"{at}/file/", os.O_RDONLY)),
        (errno.ENOTDIR, lambda: os.open(f"{at}/file", os.O_DIRECTORY)),
        (errno.EISDIR, lambda: os.open(f"{at}/new/", os.O_CREAT)),
        (errno.EISDIR, lambda: os.open(f"{at}/directory", os.O_CREAT)),
        (errno.ELOOP, lambda: os.open(f"{at}/link", os.O_NOFOLLOW)),
        (errno.ELOOP, lambda: os.stat(f"{at}/loop")),
        (errno.EEXIST, lambda: os.mkdir(f"{at}/dangling")),
        (errno.ENOENT, lambda: os.stat(f"{at}/dangling")),
        (errno.ENOENT, lambda: os.link(f"{at}/file", f"{at}/new/")),
        (errno.EXDEV, lambda: os.link(f"{at}/file", "/dev/shm/new")),
        (errno.ENAMETOOLONG, lambda: os.stat("/tmp/" + "c/" * 2100)),
    ]
    for number, attempt in calls:
        with refused(number):
            attempt()


def test_a_running_program_is_not_written_and_a_written_one_not_run(here: Path) -> None:
    program = here / "cat"
    program.write_bytes(Path("/bin/cat").read_bytes())
    program.chmod(0o755)
    with program.open("ab"), refused(errno.ETXTBSY):
        subprocess.run([program], check=False, stdin=subprocess.DEVNULL)
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdin is not None and running.stdout is not None
        running.stdin.write(b"x")
        running.stdin.flush()
        assert running.stdout.read(1) == b"x"  # now it surely runs
        for attempt in (lambda: program.open("ab"), lambda: os.truncate(program, 1)):
            with refused(errno.ETXTBSY):
                attempt()
        running.stdin.close()


# ---------------------------------------------------------------- unlinked, sparse, mapped


def test_an_unlinked_file_goes_on_for_those_who_have_it_open(here: Path) -> None:
    path = here / "file"
    path.write_bytes(b"x" * 100)
    with path.open("r+b", buffering=0) as file, path.open("rb", buffering=0) as reader:
        path.unlink()
        os.pwrite(file.fileno(), b"y" * 300_000, 50)
        assert os.fstat(reader.fileno()).st_size == 300_050
        os.fsync(file.fileno())
        assert os.pread(reader.fileno(), 3, 49) == b"xyy"
        os.ftruncate(file.fileno(), 7)
        assert os.pread(reader.fileno(), 99, 0) == b"x" * 7
        os.fchmod(file.fileno(), 0o600)
        os.fchown(file.fileno(), 5, 6)
        os.utime(file.fileno(), ns=(3, 4))
        status = os.fstat(reader.fileno())
        assert (status.st_nlink, stat.S_IMODE(status.st_mode)) == (0, 0o600)
        assert (status.st_uid, status.st_gid) == (5, 6)
        assert (status.st_atime_ns, status.st_mtime_ns) == (3, 4)


def test_holes_take_no_blocks(dirs: Dirs) -> None:
    path, there = dirs[0] / "file", dirs[1] / "file"
    with path.open("w+b", buffering=0) as file:
        os.ftruncate(file.fileno(), 1024 * MIB)
        assert os.fstat(file.fileno()).st_blocks == 0
        os.pwrite(file.fileno(), b"x", 500 * MIB)
    for seen in (path, there):
        wait_until(lambda seen=seen: seen.stat().st_size == 1024 * MIB, "the size")  # type: ignore[misc]
        assert 0 < seen.stat().st_blocks * 512 <= 64 * MIB
    path.write_bytes(b"y" * (9 * MIB))
    assert path.stat().st_blocks * 512 == 9 * MIB


def test_posix_fallocate_extends_and_keeps_contents(here: Path) -> None:
    with (here / "file").open("w+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"abc", 100)
        os.posix_fallocate(file.fileno(), 20_000, 3456)
        assert os.fstat(file.fileno()).st_size == 23_456
        assert os.pread(file.fileno(), 3, 100) == b"abc"


def test_a_mapping_past_the_end_of_a_file_is_a_bus_error(here: Path) -> None:
    (here / "file").write_bytes(b"x" * 8192)
    source = (
        "f = open(p, 'r+b'); m = mmap.mmap(f.fileno(), 8192); os.truncate(p, 100)\n"
        "assert m[:200] == b'x' * 100 + bytes(100)\n"
        "import signal; signal.signal(signal.SIGBUS, signal.SIG_DFL); m[5000]"
    )
    child = subprocess.run(
        ["python3", "-c", f"import mmap, os\np = {os.fspath(here / 'file')!r}\n{source}"],
        capture_output=True,
        check=False,
    )
    assert child.returncode == -signal.SIGBUS, child.stderr


# ---------------------------------------------------------------- times of access


@pytest.fixture(scope="module")
def relatime_lab(test_root: Path) -> Iterator[Lab]:
    """Two nodes that keep times of access."""
    root = Path(tempfile.mkdtemp(prefix="relatime-", dir=test_root))
    with Lab.up(root, 2, arguments=("-o", "relatime")) as lab:
        yield lab


def test_relatime_tells_who_has_read_since_the_last_change(relatime_lab: Lab) -> None:
    one, two = (node.mount for node in relatime_lab.nodes)
    (one / "file").write_bytes(b"x" * 100_000)
    before = (two / "file").stat()
    (two / "file").read_bytes()
    wait_until(lambda: (two / "file").stat().st_atime_ns > before.st_mtime_ns, "the new atime")
    after = (two / "file").stat()
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)
    wait_until(lambda: (one / "file").stat().st_atime_ns == after.st_atime_ns, "it elsewhere")


def test_by_default_reading_changes_nothing(dirs: Dirs) -> None:
    (dirs[0] / "file").write_bytes(b"x" * 100_000)
    before = (dirs[1] / "file").stat()
    (dirs[1] / "file").read_bytes()
    forget_pages(dirs[1] / "file")
    (dirs[1] / "file").read_bytes()
    assert (dirs[1] / "file").stat() == before
