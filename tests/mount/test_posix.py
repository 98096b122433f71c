"""One node as a POSIX file system: names, links, renames and errors, through real system calls."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from tests.mount.mount_parts import Dirs, in_child, pass_a_tick, refused, run, tree_of, wait_until

pytestmark = pytest.mark.fuse

RENAME_NOREPLACE = 1
AT_FDCWD = -100
NOBODY = 65534
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def here(dirs: Dirs) -> Path:
    """A directory on one node."""
    return dirs[0]


def rename_without_replacing(old: Path, new: Path) -> None:
    """renameat2(2) with RENAME_NOREPLACE."""
    words = (AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), RENAME_NOREPLACE)
    if _libc.renameat2(*words) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# ---------------------------------------------------------------- names


def test_a_new_file_is_listed_and_a_removed_one_is_not(here: Path) -> None:
    (here / "file").write_bytes(b"contents")
    assert os.listdir(here) == ["file"]
    assert (here / "file").read_bytes() == b"contents"
    (here / "file").unlink()
    assert os.listdir(here) == []
    with refused(errno.ENOENT):
        (here / "file").open()


def test_directories_refuse_what_posix_refuses(here: Path) -> None:
    (here / "directory").mkdir()
    (here / "file").touch()
    with refused(errno.EEXIST):
        (here / "directory").mkdir()
    with refused(errno.EEXIST):
        (here / "file").mkdir()
    with refused(errno.ENOENT):
        (here / "missing" / "directory").mkdir()
    with refused(errno.ENOTDIR):
        (here / "file" / "below").mkdir()
    with refused(errno.ENOTDIR):
        (here / "file").rmdir()
    with refused(errno.EISDIR):
        (here / "directory").unlink()
    with refused(errno.EISDIR):
        os.open(here / "directory", os.O_WRONLY)
    (here / "directory" / "below").touch()
    with refused(errno.ENOTEMPTY):
        (here / "directory").rmdir()


def test_link_counts_of_directories_count_their_subdirectories(here: Path) -> None:
    assert here.stat().st_nlink == 2
    for name in ("one", "two"):
        (here / name).mkdir()
    (here / "file").touch()
    assert here.stat().st_nlink == 4
    (here / "one").rename(here / "two" / "one")
    assert (here.stat().st_nlink, (here / "two").stat().st_nlink) == (3, 3)
    (here / "two" / "one").rmdir()
    assert (here / "two").stat().st_nlink == 2


def test_a_change_in_a_directory_moves_its_mtime(here: Path) -> None:
    os.utime(here, ns=(1, 1))
    assert here.stat().st_mtime_ns == 1
    (here / "file").touch()
    after_create = here.stat().st_mtime_ns
    assert after_create > 1
    pass_a_tick(here)
    (here / "file").unlink()
    assert here.stat().st_mtime_ns > after_create


def test_symbolic_links_keep_their_target_to_the_byte(here: Path) -> None:
    (here / "file").write_bytes(b"target")
    (here / "link").symlink_to("file")
    assert (here / "link").read_bytes() == b"target"
    assert (here / "link").lstat().st_size == 4
    long = "x" * 4095
    (here / "long").symlink_to(long)
    assert os.readlink(here / "long") == long
    (here / "loop").symlink_to("loop")
    with refused(errno.ELOOP):
        (here / "loop").open()
    with refused(errno.EINVAL):
        os.readlink(here / "file")
    with refused(errno.EEXIST):
        (here / "link").symlink_to("other")


def test_hard_links_are_one_file(here: Path) -> None:
    (here / "a").write_bytes(b"one")
    (here / "b").hardlink_to(here / "a")
    assert (here / "a").stat().st_nlink == (here / "b").stat().st_nlink == 2
    assert (here / "a").samefile(here / "b")
    with (here / "b").open("ab") as file:
        file.write(b", two")
    assert (here / "a").read_bytes() == b"one, two"
    (here / "a").unlink()
    assert (here / "b").stat().st_nlink == 1
    assert (here / "b").read_bytes() == b"one, two"
    with refused(errno.EEXIST):
        os.link(here / "b", here / "b")
    with refused(errno.EPERM):
        os.link(here, here / "directory")


def test_names_have_at_most_255_bytes_of_any_kind(here: Path) -> None:
    names = ["n" * 255, "ä" * 127, "a b\nc\td", "\udcff\udc80", "*?[]'\"\\$`", "-rf", "..."]
    for name in names:
        (here / name).write_text(name, errors="surrogateescape")
    assert sorted(os.listdir(here)) == sorted(names)
    for name in names:
        assert (here / name).read_text(errors="surrogateescape") == name
    for make in (Path.touch, Path.mkdir, Path.stat):
        with refused(errno.ENAMETOOLONG):
            make(here / ("n" * 256))
    with refused(errno.ENAMETOOLONG):
        os.rename(here / names[0], here / ("n" * 256))


def test_special_files_are_made_and_work(here: Path) -> None:
    os.mkfifo(here / "fifo", 0o640)
    assert stat.S_ISFIFO((here / "fifo").stat().st_mode)
    thread = threading.Thread(target=(here / "fifo").write_bytes, args=(b"through",))
    thread.start()
    assert (here / "fifo").read_bytes() == b"through"
    thread.join()
    os.mknod(here / "plain", stat.S_IFREG | 0o600)
    assert (here / "plain").stat().st_size == 0


# ---------------------------------------------------------------- rename


def test_rename_replaces_a_file_and_an_empty_directory(here: Path) -> None:
    (here / "old").write_bytes(b"old")
    (here / "new").write_bytes(b"new")
    (here / "new").rename(here / "old")
    assert os.listdir(here) == ["old"]
    assert (here / "old").read_bytes() == b"new"
    (here / "source" / "below").mkdir(parents=True)
    (here / "empty").mkdir()
    (here / "source").rename(here / "empty")
    assert os.listdir(here / "empty") == ["below"]


def test_rename_refuses_what_posix_refuses(here: Path) -> None:
    (here / "full" / "below").mkdir(parents=True)
    (here / "directory").mkdir()
    (here / "file").touch()
    with refused(errno.ENOTEMPTY):
        os.rename(here / "directory", here / "full")
    with refused(errno.EINVAL):
        os.rename(here / "full", here / "full" / "below" / "inside")
    with refused(errno.ENOTDIR):
        os.rename(here / "directory", here / "file")
    with refused(errno.EISDIR):
        os.rename(here / "file", here / "directory")
    with refused(errno.ENOENT):
        os.rename(here / "missing", here / "file")
    assert sorted(os.listdir(here)) == ["directory", "file", "full"]


def test_rename_to_itself_or_to_another_link_of_it_changes_nothing(here: Path) -> None:
    (here / "a").write_bytes(b"same")
    (here / "b").hardlink_to(here / "a")
    os.rename(here / "a", here / "a")
    os.rename(here / "a", here / "b")
    assert sorted(os.listdir(here)) == ["a", "b"]


def test_rename_without_replacing_leaves_an_existing_name(here: Path) -> None:
    (here / "a").write_bytes(b"a")
    (here / "b").write_bytes(b"b")
    with refused(errno.EEXIST):
        rename_without_replacing(here / "a", here / "b")
    rename_without_replacing(here / "a", here / "c")
    assert ((here / "b").read_bytes(), (here / "c").read_bytes()) == (b"b", b"a")


def test_open_files_follow_their_renames(here: Path) -> None:
    with (here / "a").open("w+b") as moved, (here / "b").open("w+b") as replaced:
        moved.write(b"moved")
        replaced.write(b"replaced")
        moved.flush()
        replaced.flush()
        os.rename(here / "a", here / "b")
        moved.write(b", and more")
        replaced.seek(0)
        assert replaced.read() == b"replaced"
        assert os.fstat(replaced.fileno()).st_nlink == 0
    assert (here / "b").read_bytes() == b"moved, and more"


def test_a_working_directory_follows_its_rename(here: Path) -> None:
    (here / "a" / "b").mkdir(parents=True)
    source = "os.chdir(a); os.rename(a, c); open('file', 'w').close()"
    assert in_child(source, a=here / "a", c=here / "c").errno == 0
    assert sorted(os.listdir(here / "c")) == ["b", "file"]


# ---------------------------------------------------------------- owners and modes


def test_mode_owner_and_times_are_kept_to_the_nanosecond(dirs: Dirs) -> None:
    file = dirs[0] / "file"
    file.touch()
    os.chmod(file, 0o4751)
    os.chown(file, 1234, 5678, follow_symlinks=False)
    os.chmod(file, 0o751)
    os.utime(file, ns=(1_000_000_001, 2_000_000_000_000_000_003))
    last = file.stat().st_mtime_ns
    wait_until(
        lambda: {(directory / "file").stat().st_mtime_ns for directory in dirs} == {last},
        "the last change",
    )
    for directory in dirs:
        status = (directory / "file").stat()
        assert stat.S_IMODE(status.st_mode) == 0o751
        assert (status.st_uid, status.st_gid) == (1234, 5678)
        assert status.st_atime_ns == 1_000_000_001
        assert status.st_mtime_ns == 2_000_000_000_000_000_003


def test_set_group_id_directories_hand_their_group_down(here: Path) -> None:
    (here / "shared").mkdir()
    os.chown(here / "shared", 0, 4321)
    os.chmod(here / "shared", 0o2775)
    (here / "shared" / "file").touch()
    (here / "shared" / "below").mkdir()
    assert (here / "shared" / "file").stat().st_gid == 4321
    below = (here / "shared" / "below").stat()
    assert below.st_gid == 4321 and below.st_mode & stat.S_ISGID


def test_other_users_get_what_the_modes_say(here: Path) -> None:
    (here / "private").write_bytes(b"secret")
    os.chmod(here / "private", 0o600)
    (here / "readable").write_bytes(b"public")
    os.chmod(here / "readable", 0o644)
    (here / "drop").mkdir()
    os.chmod(here / "drop", 0o1777)
    (here / "drop" / "of-root").touch()

    def as_nobody(source: str) -> int:
        return in_child(source, uid=NOBODY, here=str(here)).errno

    assert as_nobody("open(here + '/private')") == errno.EACCES
    assert as_nobody("assert open(here + '/readable').read() == 'public'") == 0
    assert as_nobody("open(here + '/readable', 'a')") == errno.EACCES
    assert as_nobody("open(here + '/new', 'w')") == errno.EACCES
    assert as_nobody("os.unlink(here + '/readable')") == errno.EACCES
    assert as_nobody("os.chmod(here + '/readable', 0o777)") == errno.EPERM
    assert as_nobody("os.utime(here + '/readable', (1, 1))") == errno.EPERM
    assert as_nobody("os.unlink(here + '/drop/of-root')") == errno.EPERM
    assert as_nobody("open(here + '/drop/mine', 'w').write('mine')") == 0
    assert (here / "drop" / "mine").stat().st_uid == NOBODY


# ---------------------------------------------------------------- many


def test_a_listing_is_whole_while_others_come_and_go(dirs: Dirs) -> None:
    kept = {f"kept-{number:04}" for number in range(2000)}
    here, there = dirs[0] / "many", dirs[1] / "many"
    here.mkdir()
    for name in sorted(kept):
        os.close(os.open(here / name, os.O_CREAT | os.O_RDONLY))
    is_done = threading.Event()

    def come_and_go() -> None:
        number = 0
        while not is_done.is_set():
            number += 1
            (there / f"other-{number}").touch()
            (there / f"other-{number}").unlink()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(5):
            names = os.listdir(here)
            assert len(names) == len(set(names))
            assert {name for name in names if name.startswith("kept")} == kept
    finally:
        is_done.set()
        thread.join()
    assert set(os.listdir(dirs[2] / "many")) == kept
    run("rm", "-rf", here)
    wait_until(lambda: not there.exists(), "the removal to be seen")


def test_programs_copy_trees_faithfully(dirs: Dirs, tmp_path: Path) -> None:
    here, there = dirs[0], dirs[1]
    source = tmp_path / "source"
    (source / "a" / "b").mkdir(parents=True)
    (source / "a" / "small").write_bytes(b"small")
    (source / "a" / "b" / "large").write_bytes(os.urandom(5_000_000))
    (source / "link").symlink_to("a/small")
    (source / "hard").hardlink_to(source / "a" / "small")
    os.utime(source / "a" / "small", ns=(5, 1_234_567_890_123_456_789))
    os.chmod(source / "a", 0o750)
    wanted = tree_of(source)
    run("cp", "-a", source, here / "copy")
    assert tree_of(there / "copy") == wanted
    assert (there / "copy" / "a" / "small").stat().st_mtime_ns == 1_234_567_890_123_456_789
    assert (there / "copy" / "hard").stat().st_nlink == 2
    run("tar", "-C", there, "-cf", there / "archive.tar", "copy")
    (here / "untarred").mkdir()
    run("tar", "-C", here / "untarred", "-xf", here / "archive.tar")
    assert tree_of(here / "untarred" / "copy") == wanted
    run("mv", there / "copy", there / "untarred" / "moved")
    assert tree_of(dirs[2] / "untarred" / "moved") == wanted
    run("diff", "-r", source, here / "untarred" / "moved")


def test_the_file_system_says_how_large_it_is(here: Path) -> None:
    status = os.statvfs(here)
    assert status.f_namemax == 255
    assert 0 < status.f_bavail <= status.f_bfree <= status.f_blocks
    assert status.f_ffree > 0
    shown = subprocess.run(["df", here], capture_output=True, text=True, check=True).stdout
    assert "modelfs" in shown
