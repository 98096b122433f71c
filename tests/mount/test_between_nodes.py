"""What one node sees of another's work: G2 (open sees the latest) and G3 (a reader keeps it)."""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mount.mount_parts import (
    MIB,
    Dirs,
    finish_child,
    forget_pages,
    in_child,
    pattern,
    refused,
    start_child,
    version_in,
    wait_until,
)

pytestmark = pytest.mark.fuse

VERSION_BYTES = 5 * MIB + 321


# ---------------------------------------------------------------- G2


def test_an_open_after_a_close_sees_it(dirs: Dirs) -> None:
    for number in range(30):
        writer = dirs[number % 3] / "file"
        contents = b"%d" % number * (1 + number * 3000)
        writer.write_bytes(contents)
        for directory in dirs:
            assert (directory / "file").read_bytes() == contents


def test_an_open_after_a_lookup_in_vain_sees_the_new_name(dirs: Dirs) -> None:
    for number in range(30):
        here, there = dirs[number % 3], dirs[(number + 1) % 3]
        with refused(errno.ENOENT):
            (there / f"{number}").open()
        assert not (there / f"{number}").exists()
        (here / f"{number}").write_bytes(b"here")
        assert (there / f"{number}").read_bytes() == b"here"


def test_an_open_after_a_rename_sees_it(dirs: Dirs) -> None:
    for number in range(30):
        here, there = dirs[number % 3], dirs[(number + 1) % 3]
        (here / "temporary").write_bytes(b"%d" % number)
        os.rename(here / "temporary", here / "file")
        assert (there / "file").read_bytes() == b"%d" % number
        with refused(errno.ENOENT):
            (there / "temporary").open()


def test_an_open_after_an_append_or_a_truncation_sees_it(dirs: Dirs) -> None:
    model = b""
    for number in range(30):
        here, there = dirs[number % 3] / "file", dirs[(number + 1) % 3] / "file"
        with here.open("ab") as file:
            file.write(b"%d" % number * 1000)
        model += b"%d" % number * 1000
        assert there.read_bytes() == model
        model = model[: len(model) * 2 // 3]
        os.truncate(there, len(model))
        assert here.read_bytes() == model


def test_a_name_that_moved_never_gives_the_wrong_file(dirs: Dirs) -> None:
    """`mv latest old; mv new latest`: what `latest` was is still current, under another name."""
    here, there = dirs[0], dirs[1]
    (here / "latest").write_bytes(pattern(0, 10_000))
    for version in range(1, 40):
        (here / "new").write_bytes(pattern(version, 10_000))
        assert version_in((there / "latest").read_bytes()) == version - 1
        os.rename(here / "latest", here / "old")
        os.rename(here / "new", here / "latest")
        assert version_in((there / "latest").read_bytes()) == version
        assert version_in((there / "old").read_bytes()) == version - 1


def test_a_directory_that_moved_never_gives_the_wrong_file(dirs: Dirs) -> None:
    here, there = dirs[0], dirs[1]
    (here / "current").mkdir()
    (here / "current" / "file").write_bytes(pattern(0, 100))
    for version in range(1, 30):
        (here / "next").mkdir()
        (here / "next" / "file").write_bytes(pattern(version, 100))
        assert version_in((there / "current" / "file").read_bytes()) == version - 1
        os.rename(here / "current", here / f"old-{version}")
        os.rename(here / "next", here / "current")
        assert version_in((there / "current" / "file").read_bytes()) == version


def test_a_path_through_a_replaced_directory_or_symlink_leads_to_what_is_there(
    dirs: Dirs,
) -> None:
    """Also where this node's kernel is slow to act on it, as others change the directory above."""
    here, there = dirs[0], dirs[1]
    source = """
for number in range(10**9):
    if os.path.exists(f'{top}/stop'):
        break
    os.mkdir(f'{top}/{name}-{number}')
    os.rmdir(f'{top}/{name}-{number}')
"""
    others = [start_child(source, top=there, name=name) for name in "abc"]
    for number in range(24):
        (here / "new").mkdir()
        (here / f"new/{number}").write_bytes(b"%d" % number)
        (here / "new/same").write_bytes(b"%d" % number)
        if number:
            os.rename(here / "d", here / f"old-{number}")
        os.rename(here / "new", here / "d")
        if number % 2:
            assert (there / f"d/{number}").read_bytes() == b"%d" % number
        else:
            assert sorted(os.listdir(there / "d")) == [f"{number}", "same"]
        os.rename(here / "d", here / f"v{number}")
        (here / "d").mkdir()
        os.symlink(f"v{number}", here / "link")
        os.rename(here / "link", here / "latest")
        name = f"{number}" if number % 2 else "same"
        assert (there / "latest" / name).read_bytes() == b"%d" % number
        with refused(errno.ENOENT):
            os.stat(there / "latest/missing")
    (there / "stop").touch()
    for other in others:
        assert finish_child(other).errno == 0


def test_a_listing_opened_before_a_rename_does_not_bring_old_names_back(dirs: Dirs) -> None:
    here, there = dirs[0], dirs[1]
    (here / "latest").write_bytes(b"first")
    (here / "new").write_bytes(b"second")
    listing = os.open(there, os.O_RDONLY | os.O_DIRECTORY)
    os.rename(here / "latest", here / "old")
    os.rename(here / "new", here / "latest")
    wait_until(lambda: (there / "old").exists(), "the renames to be seen")
    os.listdir(listing)
    os.close(listing)
    assert (there / "latest").read_bytes() == b"second"
    assert (there / "latest").stat().st_size == len(b"second")


def test_an_open_that_failed_is_no_excuse_for_an_old_version_later(dirs: Dirs) -> None:
    """A call that was sent to look again and found nothing must not vouch for the next call."""
    here, there = dirs[0], dirs[1]
    for number in range(40):
        (here / "gone").write_bytes(b"x")
        (here / "file").write_bytes(b"%d" % number)
        assert (there / "gone").read_bytes() == b"x"
        (here / "gone").unlink()
        with refused(errno.ENOENT):
            (there / "gone").open()
        assert (there / "file").exists()
        (here / "file").write_bytes(b"newer than %d" % number)
        assert (there / "file").read_bytes() == b"newer than %d" % number


def test_a_file_that_was_touched_elsewhere_while_it_was_opened_empty_is_written_for_all(
    dirs: Dirs,
) -> None:
    """The touch makes a new kernel inode here, and the write comes through the old one."""
    (dirs[1] / "file").touch()
    first = os.open(dirs[0] / "file", os.O_RDWR)
    os.utime(dirs[1] / "file", ns=(5, 7))
    wait_until(lambda: (dirs[0] / "file").stat().st_mtime_ns == 7, "the touch to be seen")
    second = os.open(dirs[0] / "file", os.O_RDWR)
    os.write(first, b"x" * 5000)
    os.fsync(first)
    os.posix_fadvise(first, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(first, 5000, 0) == b"x" * 5000
    assert [(directory / "file").read_bytes() for directory in dirs] == [b"x" * 5000] * 3
    os.close(first)
    os.close(second)
    assert [(directory / "file").read_bytes() for directory in dirs] == [b"x" * 5000] * 3


def test_attributes_that_are_set_through_an_old_handle_are_seen_by_all(dirs: Dirs) -> None:
    (dirs[0] / "file").write_bytes(b"first")
    with (dirs[0] / "file").open("rb") as old:
        (dirs[1] / "file").write_bytes(b"second")
        wait_until(lambda: (dirs[0] / "file").stat().st_size == 6, "the new version")
        os.fchmod(old.fileno(), 0o600)
        os.utime(old.fileno(), ns=(3, 3))

    def shown() -> set[tuple[int, int]]:
        found = [(directory / "file").stat() for directory in dirs]
        return {(status.st_mode & 0o777, status.st_mtime_ns) for status in found}

    wait_until(lambda: shown() == {(0o600, 3)}, "the mode and the mtime")
    assert [(directory / "file").read_bytes() for directory in dirs] == [b"second"] * 3


def test_known_names_and_attributes_follow_within_an_event(dirs: Dirs) -> None:
    here, there = dirs[0], dirs[1]
    (here / "file").write_bytes(b"x")
    assert os.listdir(there) == ["file"]
    os.chmod(here / "file", 0o640)
    wait_until(lambda: (there / "file").stat().st_mode & 0o777 == 0o640, "the mode")
    os.chown(here / "file", 7, 8)
    wait_until(lambda: (there / "file").stat().st_uid == 7, "the owner")
    os.link(here / "file", here / "link")
    wait_until(lambda: (there / "file").stat().st_nlink == 2, "the link count")
    os.utime(here / "file", ns=(1, 2))
    wait_until(lambda: (there / "file").stat().st_mtime_ns == 2, "the mtime")
    (here / "file").write_bytes(b"longer")
    wait_until(lambda: (there / "file").stat().st_size == 6, "the size")
    (here / "file").unlink()
    wait_until(lambda: not (there / "file").exists(), "the removal")
    (here / "below").mkdir()
    wait_until(lambda: there.stat().st_nlink == 3, "the directory's link count")
    assert sorted(os.listdir(there)) == ["below", "link"]


def test_the_mode_and_the_link_count_of_an_open_file_follow_within_an_event(dirs: Dirs) -> None:
    here, there = dirs[0], dirs[1]
    (here / "file").write_bytes(b"first")
    with (there / "file").open("rb") as older:
        assert os.fstat(older.fileno()).st_nlink == 1
        (here / "file").write_bytes(b"second")
        with (there / "file").open("rb") as newer:

            def shown() -> list[tuple[int, int]]:
                found = [os.fstat(file.fileno()) for file in (older, newer)]
                return [(status.st_mode & 0o777, status.st_nlink) for status in found]

            shown()
            os.link(here / "file", here / "link")
            os.chmod(here / "file", 0o600)
            wait_until(lambda: shown() == [(0o600, 2)] * 2, "the mode and the link count")
            (here / "file").unlink()
            (here / "link").unlink()
            wait_until(lambda: shown() == [(0o600, 0)] * 2, "the removal")
            assert (older.read(), newer.read()) == (b"first", b"second")


# ---------------------------------------------------------------- G3


def test_an_open_handle_and_a_mapping_keep_their_version_through_ten_newer_ones(
    dirs: Dirs,
) -> None:
    (dirs[0] / "file").write_bytes(pattern(0, VERSION_BYTES))
    with (dirs[1] / "file").open("rb") as file:
        assert version_in(file.read(100_000)) == 0
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert version_in(mapped[4 * MIB : 4 * MIB + 16]) == 0
            for version in range(1, 11):
                size = VERSION_BYTES + (-1) ** version * version * 300_000
                (dirs[version % 2 * 2] / "file").write_bytes(pattern(version, size))
                assert version_in((dirs[1] / "file").read_bytes()) == version
            assert mapped[:] == pattern(0, VERSION_BYTES)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        assert file.read() == pattern(0, VERSION_BYTES)
        assert os.fstat(file.fileno()).st_size == VERSION_BYTES


def test_readers_of_a_file_replaced_by_rename_never_see_a_mixture(dirs: Dirs) -> None:
    """Every version is one pattern: a torn read, zeros or a wrong size are all seen."""
    here = dirs[0]
    sizes = [VERSION_BYTES, 3000, 70_000, MIB]
    (here / "file").write_bytes(pattern(0, sizes[0]))
    is_done = threading.Event()

    def read(directory: Path, by_mapping: bool) -> int:
        last = 0
        while not is_done.is_set():
            with (directory / "file").open("rb") as file:
                if by_mapping:
                    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                        contents = mapped[:]
                else:
                    contents = file.read()
                version = version_in(contents)
            assert len(contents) == sizes[version % len(sizes)]
            assert version >= last, "a reader went back in time"
            last = version
        return last

    with ThreadPoolExecutor() as pool:
        readers = [
            pool.submit(read, directory, mapped) for directory in dirs for mapped in (False, True)
        ]
        try:
            for version in range(1, 40):
                (here / "temporary").write_bytes(pattern(version, sizes[version % len(sizes)]))
                os.rename(here / "temporary", here / "file")
        finally:
            is_done.set()
        assert all(reader.result() >= 0 for reader in readers)
    assert [version_in((directory / "file").read_bytes()) for directory in dirs] == [39] * 3


def test_readers_of_a_file_that_is_rewritten_elsewhere_see_whole_versions(dirs: Dirs) -> None:
    """In place, not by rename: each open on another node gets one committed version."""
    (dirs[0] / "file").write_bytes(pattern(0, VERSION_BYTES))
    is_done = threading.Event()

    def read(directory: Path) -> int:
        count = 0
        while not is_done.is_set():
            contents = (directory / "file").read_bytes()
            if contents:  # the truncation alone may be committed: then the file is empty
                version_in(contents)
                assert len(contents) == VERSION_BYTES
            count += 1
        return count

    with ThreadPoolExecutor() as pool:
        readers = [pool.submit(read, directory) for directory in dirs[1:]]
        try:
            with (dirs[0] / "file").open("r+b", buffering=0) as file:
                for version in range(1, 15):
                    os.pwrite(file.fileno(), pattern(version, VERSION_BYTES), 0)
                    os.fsync(file.fileno())
        finally:
            is_done.set()
        assert all(reader.result() for reader in readers)


def test_readers_and_a_churning_writer_do_not_disturb_each_other(
    dirs: Dirs, rng: random.Random
) -> None:
    """Many small files come, change and go on one node; another opens them at random."""
    here, there = dirs[0], dirs[1]
    names = [f"{number}" for number in range(20)]
    is_done = threading.Event()

    def read() -> int:
        chance, found = random.Random(rng.random()), 0
        while not is_done.is_set():
            try:
                contents = (there / chance.choice(names)).read_bytes()
            except FileNotFoundError:
                continue
            if contents:
                version_in(contents)
                found += 1
        return found

    with ThreadPoolExecutor() as pool:
        readers = [pool.submit(read) for _ in range(3)]
        try:
            for version in range(200):
                name = rng.choice(names)
                if rng.random() < 0.2:
                    (here / name).unlink(missing_ok=True)
                else:
                    (here / name).write_bytes(pattern(version, rng.choice((20, 5000, 100_000))))
        finally:
            is_done.set()
        assert all(reader.result() for reader in readers)
    for name in os.listdir(here):
        forget_pages(there / name)
        assert (there / name).read_bytes() == (here / name).read_bytes()


def test_a_node_sees_what_a_child_on_another_node_wrote_the_moment_it_ends(dirs: Dirs) -> None:
    source = "with open(path, 'w') as f: f.write(text)\nos.rename(path, path + '.done')"
    for number in range(5):
        result = in_child(source, path=str(dirs[2] / f"{number}"), text=f"text {number}")
        assert result.errno == 0
        assert (dirs[0] / f"{number}.done").read_text() == f"text {number}"
