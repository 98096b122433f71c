"""Changes from several nodes at once: G4 (atomic names) and G5 (one writer)."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from modelfsd.lab.cluster import Lab
from tests.mount.conftest import LOCK_WAIT_SECONDS
from tests.mount.mount_parts import (
    Dirs,
    finish_child,
    refused,
    start_child,
    tree_of,
    wait_until,
)

pytestmark = pytest.mark.fuse


# ---------------------------------------------------------------- G5


def test_a_second_writer_waits_and_then_is_told_that_the_file_is_busy(plain_lab: Lab) -> None:
    here, there = (node.mount / "busy" for node in plain_lab.nodes)
    here.write_bytes(b"contents")
    with here.open("r+b"):
        started = time.monotonic()
        with refused(errno.EBUSY):
            os.open(there, os.O_WRONLY)
        assert time.monotonic() - started >= LOCK_WAIT_SECONDS * 0.9
        assert there.read_bytes() == b"contents"
        with refused(errno.EBUSY):
            os.truncate(there, 0)

    def overwrite() -> bool:
        try:
            with there.open("r+b") as file:
                file.write(b"CONTENTS")
        except OSError as error:  # on a busy machine the lease may be given back after 2 s
            if error.errno == errno.EBUSY:
                return False
            raise
        return True

    wait_until(overwrite, "the lease to be given back")
    assert here.read_bytes() == b"CONTENTS"
    here.unlink()


def test_a_second_writer_goes_on_from_what_the_first_one_closed(dirs: Dirs) -> None:
    (dirs[0] / "file").write_bytes(b"zero,")
    with (dirs[0] / "file").open("ab") as file:
        second = start_child("with open(path, 'ab') as f: f.write(b'two')", path=dirs[1] / "file")
        file.write(b"one,")
        time.sleep(0.5)  # so that the child waits for the lease, usually
    assert finish_child(second).errno == 0
    assert (dirs[2] / "file").read_bytes() == b"zero,one,two"


def test_a_lock_file_that_nobody_writes_can_be_open_on_two_nodes(dirs: Dirs) -> None:
    for _ in range(3):
        descriptors = [
            os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_TRUNC) for directory in dirs
        ]
        for descriptor in descriptors:
            os.close(descriptor)
    assert (dirs[0] / "lock").stat().st_size == 0


def test_appends_from_three_nodes_in_turn_lose_none(dirs: Dirs) -> None:
    for number in range(60):
        with (dirs[number % 3] / "log").open("ab") as log:
            log.write(b"%05d\n" % number)
    wanted = b"".join(b"%05d\n" % number for number in range(60))
    assert [(directory / "log").read_bytes() for directory in dirs] == [wanted] * 3


def test_appends_from_three_nodes_at_once_lose_none(dirs: Dirs) -> None:
    (dirs[0] / "log").write_bytes(b"begin\n")
    source = """
for number in range(15):
    with open(path, "ab") as log:
        log.write(b"%d %d\\n" % (writer, number))
"""
    children = [
        start_child(source, path=directory / "log", writer=index)
        for index, directory in enumerate(dirs)
    ]
    assert [finish_child(child).text for child in children] == ["", "", ""]
    lines = (dirs[0] / "log").read_bytes().splitlines()
    assert sorted(lines[1:]) == sorted(b"%d %d" % (w, n) for w in range(3) for n in range(15))


# ---------------------------------------------------------------- G4


def test_of_many_exclusive_creations_exactly_one_wins(dirs: Dirs) -> None:
    def create(path: Path) -> bool:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        for number in range(15):
            paths = [directory / f"{number}" for directory in dirs * 2]
            assert sum(pool.map(create, paths)) == 1


def test_of_many_exclusive_links_exactly_one_wins(dirs: Dirs) -> None:
    """How lock files work on file systems without O_EXCL."""
    for index in range(3):
        (dirs[index] / f"node-{index}").write_bytes(b"%d" % index)

    def link(index: int) -> bool:
        try:
            os.link(dirs[index] / f"node-{index}", dirs[index] / "lock")
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(3) as pool:
        for _ in range(10):
            assert sum(pool.map(link, range(3))) == 1
            (dirs[0] / "lock").unlink()


def test_a_directory_that_is_in_use_here_can_be_moved_elsewhere_and_then_here(dirs: Dirs) -> None:
    """Linux has one place for a directory's kernel inode, and cannot move it within rename(2)."""
    for name in ("a", "b", "c", "a/moved", "a/moved/below"):
        (dirs[0] / name).mkdir()
    (dirs[0] / "a/moved/below/file").write_bytes(b"old")
    inside = os.open(dirs[0] / "a/moved/below", os.O_RDONLY | os.O_DIRECTORY)
    above = os.open(dirs[0] / "a/moved", os.O_RDONLY | os.O_DIRECTORY)
    try:
        for _ in range(3):
            (dirs[1] / "a/moved").rename(dirs[1] / "b/moved")
            (dirs[0] / "b/moved").rename(dirs[0] / "c/moved")  # looked up within rename
            (dirs[1] / "c/moved/below").rename(dirs[1] / "a/below")
            (dirs[1] / "c/moved").rename(dirs[1] / "a/moved")
            (dirs[0] / "a/below").rename(dirs[0] / "a/moved/below")
        # Who is inside stays there, and sees what others do.
        (dirs[1] / "a/moved/below/file").write_bytes(b"new")
        for name in ("file", "theirs", "mine"):
            (dirs[1] / "a/moved/below" / f"{name}-2").write_bytes(b"2")
        descriptor = os.open("file", os.O_RDONLY, dir_fd=inside)
        assert os.read(descriptor, 9) == b"new"
        os.close(descriptor)
        os.unlink("theirs-2", dir_fd=inside)
        os.mkdir("made", dir_fd=inside)
        assert set(os.listdir(inside)) == {"file", "file-2", "mine-2", "made"}
        for directory in dirs:
            below = directory / "a/moved/below"
            wait_until(partial(_is_gone, below / "theirs-2"), "one directory")
            assert sorted(os.listdir(below)) == ["file", "file-2", "made", "mine-2"]
        (dirs[0] / "a/moved/below/mine-2").unlink()
        wait_until(lambda: not os.access("mine-2", os.F_OK, dir_fd=inside), "the event")
        os.chmod(".", 0o711, dir_fd=inside)
        assert (dirs[0] / "a/moved/below").stat().st_mode & 0o777 == 0o711
        assert os.fstat(inside).st_mode & 0o777 == 0o711
    finally:
        os.close(inside)
        os.close(above)


def _is_gone(path: Path) -> bool:
    return not path.exists()


CHANGE_THE_TREE = """
import random
chance = random.Random(seed)
names = [f"{root}/{a}" for a in "abc"] + [f"{root}/{a}/{b}" for a in "abc" for b in "xyz"]
allowed = {errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR,
           errno.EINVAL, errno.EPERM}
for _ in range(count):
    operation, one, two = chance.randrange(7), chance.choice(names), chance.choice(names)
    try:
        if operation == 0:
            os.mkdir(one)
        elif operation == 1:
            with open(one, "xb") as file:
                file.write(one.encode())
        elif operation == 2:
            os.unlink(one)
        elif operation == 3:
            os.rmdir(one)
        elif operation == 4:
            os.link(one, two)
        else:
            os.rename(one, two)
    except OSError as error:
        if error.errno not in allowed:
            raise OSError(error.errno, f"{operation} {one} {two}")
"""


@pytest.mark.parametrize("seed", range(2))
def test_changes_of_names_from_three_nodes_leave_one_tree(dirs: Dirs, seed: int) -> None:
    children = [
        start_child(CHANGE_THE_TREE, root=directory, seed=seed * 3 + index, count=150)
        for index, directory in enumerate(dirs)
    ]
    assert [finish_child(child).text for child in children] == ["", "", ""]
    trees = [tree_of(directory) for directory in dirs]
    wait_until(lambda: tree_of(dirs[1]) == tree_of(dirs[0]) == tree_of(dirs[2]), "one tree")
    assert trees[0].keys() == trees[1].keys() == trees[2].keys()
    for directory in dirs:
        for path, detail in tree_of(directory).items():
            parts = Path(path).parts
            assert len(parts) == len(set(parts)) or "d" not in detail[:1], "a cycle"
