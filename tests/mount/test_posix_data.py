"""One node as a POSIX file system: contents, handles and mappings, through real system calls."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from tests.mount.mount_parts import MIB, Dirs, forget_pages, in_child, refused

pytestmark = pytest.mark.fuse


@pytest.fixture
def here(dirs: Dirs) -> Path:
    """A directory on one node."""
    return dirs[0]


def test_exclusive_creation_refuses_what_exists(here: Path) -> None:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    os.close(os.open(here / "file", flags))
    with refused(errno.EEXIST):
        os.open(here / "file", flags)
    (here / "dangling").symlink_to("nowhere")
    with refused(errno.EEXIST):
        os.open(here / "dangling", flags)


def test_opening_with_truncation_empties_a_file_for_all(dirs: Dirs) -> None:
    (dirs[0] / "file").write_bytes(b"x" * 100_000)
    os.close(os.open(dirs[0] / "file", os.O_WRONLY | os.O_TRUNC))
    assert [(directory / "file").read_bytes() for directory in dirs] == [b"", b"", b""]
    assert [(directory / "file").stat().st_size for directory in dirs] == [0, 0, 0]


def test_appends_go_to_the_end_whatever_was_read_before(here: Path) -> None:
    (here / "file").write_bytes(b"one")
    descriptor = os.open(here / "file", os.O_RDWR | os.O_APPEND)
    os.lseek(descriptor, 0, os.SEEK_SET)
    assert os.read(descriptor, 3) == b"one"
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, b"two")
    os.close(descriptor)
    assert (here / "file").read_bytes() == b"onetwo"


@pytest.mark.parametrize("by", ["path", "handle"])
def test_truncation_cuts_off_and_grows_with_zeros(dirs: Dirs, by: str) -> None:
    contents = os.urandom(9 * MIB)
    file = dirs[0] / "file"
    file.write_bytes(contents)
    model = bytearray(contents)
    with file.open("r+b") as handle:
        for size in (5 * MIB + 123, 8 * MIB, 4 * MIB, 4 * MIB + 1, 100, 6 * MIB, 0, 5):
            if by == "handle":
                os.ftruncate(handle.fileno(), size)
            else:
                os.truncate(file, size)
            model = model[:size] + bytes(size - len(model[:size]))
            assert file.stat().st_size == size
            assert file.read_bytes() == model
    for directory in dirs:
        forget_pages(directory / "file")
        assert (directory / "file").read_bytes() == model


def test_a_size_that_is_too_large_is_refused_and_nothing_is_lost(here: Path) -> None:
    with (here / "file").open("wb", buffering=0) as file:
        file.write(b"x" * 50_000)
        with refused(errno.EFBIG):
            os.ftruncate(file.fileno(), 1 << 60)
        file.write(b"y")
    assert (here / "file").read_bytes() == b"x" * 50_000 + b"y"


def test_sparse_files_read_as_zeros_where_nothing_was_written(dirs: Dirs) -> None:
    with (dirs[0] / "file").open("wb") as file:
        file.seek(1 << 34)
        file.write(b"end")
        file.seek(5 * MIB)
        file.write(b"middle")
    with (dirs[1] / "file").open("rb") as file:
        assert os.fstat(file.fileno()).st_size == (1 << 34) + 3
        for offset, size, wanted in (
            (0, 100, bytes(100)),
            (5 * MIB - 2, 10, b"\0\0middle\0\0"),
            (1 << 33, 100, bytes(100)),
            ((1 << 34) - 3, 100, b"\0\0\0end"),
            (1 << 35, 100, b""),
        ):
            assert os.pread(file.fileno(), size, offset) == wanted


def test_an_unlinked_file_lives_until_it_is_closed(here: Path) -> None:
    contents = os.urandom(5 * MIB)
    descriptor = os.open(here / "file", os.O_RDWR | os.O_CREAT)
    os.write(descriptor, contents)
    os.unlink(here / "file")
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(descriptor, len(contents), 0) == contents
    os.pwrite(descriptor, b"more", len(contents))
    os.ftruncate(descriptor, len(contents) + 2)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(descriptor, 10, len(contents) - 2) == contents[-2:] + b"mo"
    status = os.fstat(descriptor)
    assert (status.st_nlink, status.st_size) == (0, len(contents) + 2)
    os.fchmod(descriptor, 0o600)
    os.close(descriptor)


@pytest.mark.parametrize("remover", [0, 1], ids=["here", "elsewhere"])
def test_what_an_unlinked_file_is_stays_for_its_readers_when_its_writer_closes(
    dirs: Dirs, remover: int
) -> None:
    """Also through /proc/self/fd, where an open brings no name to look up again."""
    contents = os.urandom(5 * MIB)
    (dirs[0] / "file").write_bytes(b"old")
    with (dirs[0] / "file").open("rb", buffering=0) as reader:
        with (dirs[0] / "file").open("r+b", buffering=0) as writer:
            (dirs[remover] / "file").unlink()
            writer.write(contents)
        os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert reader.read() == contents
        again = f"/proc/self/fd/{reader.fileno()}"
        with open(again, "rb") as second:
            assert second.read() == contents
        with open(again, "r+b") as second:
            second.write(b"new")
        os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(reader.fileno(), 6, 0) == b"new" + contents[3:6]
    assert not os.listdir(dirs[0])


def test_a_superseded_file_can_be_opened_again_by_who_has_it_open(dirs: Dirs) -> None:
    (dirs[0] / "file").write_bytes(b"old")
    with (dirs[0] / "file").open("rb") as reader:
        (dirs[1] / "file").write_bytes(b"new")
        with open(f"/proc/self/fd/{reader.fileno()}", "rb") as again:
            assert again.read() == b"old"
    assert (dirs[0] / "file").read_bytes() == b"new"


def test_a_committed_file_that_is_unlinked_stays_readable_and_mapped(dirs: Dirs) -> None:
    contents = os.urandom(9 * MIB)
    (dirs[0] / "file").write_bytes(contents)
    with (dirs[1] / "file").open("rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            (dirs[0] / "file").unlink()
            assert mapped[:] == contents
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert file.read() == contents


def test_a_shared_mapping_is_written_back(dirs: Dirs) -> None:
    file = dirs[0] / "file"
    contents = bytearray(os.urandom(9 * MIB + 17))
    file.write_bytes(contents)
    with file.open("r+b") as handle, mmap.mmap(handle.fileno(), 0) as mapped:
        for offset in (0, 4 * MIB - 3, 8 * MIB, len(contents) - 5):
            mapped[offset : offset + 5] = b"mmapd"
            contents[offset : offset + 5] = b"mmapd"
        mapped.flush()
        assert file.read_bytes() == contents
        os.fsync(handle.fileno())
        assert (dirs[1] / "file").read_bytes() == contents
        mapped[1000:1004] = b"late"
        contents[1000:1004] = b"late"
    assert (dirs[2] / "file").read_bytes() == contents


def test_fsync_commits_without_a_close(dirs: Dirs) -> None:
    with (dirs[0] / "file").open("wb", buffering=0) as file:
        for number in range(3):
            file.write(b"%d" % number)
            os.fsync(file.fileno())
            assert (dirs[1] / "file").read_bytes() == b"012"[: number + 1]


def test_a_child_that_ends_in_mid_write_disturbs_nothing(dirs: Dirs) -> None:
    descriptor = os.open(dirs[0] / "file", os.O_WRONLY | os.O_CREAT)
    for number in range(20):
        os.write(descriptor, b"%07d\n" % number)
        child = os.fork()
        if child == 0:
            os._exit(0)  # closes its copy of the descriptor
        assert os.waitpid(child, 0)[1] == 0
        os.close(os.dup(descriptor))
    os.close(descriptor)
    wanted = b"".join(b"%07d\n" % number for number in range(20))
    assert [(directory / "file").read_bytes() for directory in dirs] == [wanted] * 3


def test_two_handles_of_one_node_see_each_other_at_once(here: Path) -> None:
    with (here / "file").open("w+b", buffering=0) as one, (here / "file").open("r+b", 0) as two:
        one.write(b"from one")
        assert two.read() == b"from one"
        two.write(b", from two")
        assert one.read() == b", from two"
    assert (here / "file").read_bytes() == b"from one, from two"


def test_handles_refuse_what_they_were_not_opened_for(here: Path) -> None:
    (here / "file").write_bytes(b"contents")
    reader = os.open(here / "file", os.O_RDONLY)
    writer = os.open(here / "file", os.O_WRONLY)
    for refuse in (
        lambda: os.write(reader, b"x"),
        lambda: os.read(writer, 1),
        lambda: os.pread(reader, 1, -1),
    ):
        with pytest.raises(OSError):  # noqa: PT011  # EBADF or EINVAL
            refuse()
    with refused(errno.EINVAL):
        os.ftruncate(reader, 0)
    os.close(reader)
    os.close(writer)
    assert (here / "file").read_bytes() == b"contents"


def test_reads_and_seeks_past_the_end_give_nothing(here: Path) -> None:
    (here / "file").write_bytes(b"0123456789")
    with (here / "file").open("rb", buffering=0) as file:
        assert file.seek(0, os.SEEK_END) == 10
        assert file.read(10) == b""
        assert file.seek(1 << 40) == 1 << 40
        assert file.read(10) == b""
        assert os.pread(file.fileno(), 10, 7) == b"789"


def test_files_at_the_border_of_inline_contents_are_whole(dirs: Dirs) -> None:
    for size in (0, 1, 4095, 4096, 4097, 65536, 65537, 4 * MIB, 4 * MIB + 1):
        contents = os.urandom(size)
        (dirs[0] / f"{size}").write_bytes(contents)
        assert (dirs[1] / f"{size}").read_bytes() == contents
        with (dirs[2] / f"{size}").open("ab") as file:
            file.write(b"more")
        assert (dirs[1] / f"{size}").read_bytes() == contents + b"more"


def test_preallocation_is_refused_with_the_right_error(here: Path) -> None:
    with (here / "file").open("wb") as file, refused(errno.EOPNOTSUPP):
        libc_fallocate(file.fileno())


def libc_fallocate(descriptor: int) -> None:
    """fallocate(2): os.posix_fallocate would write zeros where the file system cannot."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if libc.fallocate(descriptor, 0, 0, 4096) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def test_locks_work_within_a_node(here: Path) -> None:
    import fcntl

    with (here / "file").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        source = (
            "import fcntl\nwith open(path, 'w') as f: fcntl.flock(f, fcntl.LOCK_EX|fcntl.LOCK_NB)"
        )
        assert in_child(source, path=here / "file").errno == errno.EWOULDBLOCK
    assert in_child(source, path=here / "file").errno == 0
