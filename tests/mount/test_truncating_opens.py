"""open(path, "w") of one name on several nodes, at once and in turn."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from tests.mount.mount_parts import MIB, Dirs, refused

pytestmark = pytest.mark.fuse

ROUNDS = 12
LARGE = 5_000  # beyond what an inode record holds
SEVERAL_REQUESTS = 3 * MIB + 5  # which the kernel sends at the same time


@pytest.mark.parametrize("count", [LARGE, SEVERAL_REQUESTS])
def test_all_ranks_may_write_the_same_new_file_at_once(dirs: Dirs, count: int) -> None:
    start = Barrier(len(dirs))

    def write(rank: int, name: str) -> None:
        start.wait()
        (dirs[rank] / name).write_bytes(bytes([rank + 1]) * count)

    with ThreadPoolExecutor(len(dirs)) as pool:
        for number in range(ROUNDS):
            writes = [pool.submit(write, rank, f"config-{number}") for rank in range(len(dirs))]
            for done in writes:
                done.result()
            seen = {(directory / f"config-{number}").read_bytes() for directory in dirs}
            assert len(seen) == 1, "two nodes see different files"
            assert seen.pop() in [bytes([rank + 1]) * count for rank in range(len(dirs))]


def test_who_truncated_an_empty_file_commits_what_it_wrote_in_its_turn(dirs: Dirs) -> None:
    first, second = (directory / "turns" for directory in dirs[:2])
    with open(first, "w") as one, open(second, "w") as two:
        one.write("one" * LARGE)
        one.close()
        assert second.read_text() == "one" * LARGE
        two.write("two")
    for directory in dirs:
        assert (directory / "turns").read_text() == "two"


def test_a_rewrite_is_never_seen_empty(dirs: Dirs) -> None:
    path, elsewhere = dirs[0] / "model", dirs[1] / "model"
    path.write_bytes(b"old" * LARGE)
    with open(path, "wb") as rewritten:
        assert elsewhere.read_bytes() == b"old" * LARGE
        rewritten.write(b"new" * LARGE)
        assert elsewhere.read_bytes() == b"old" * LARGE
    assert elsewhere.read_bytes() == b"new" * LARGE


@pytest.mark.expected_logs("another node wrote it first", "cannot be committed")
def test_who_did_not_truncate_cannot_overwrite_what_came_first(dirs: Dirs) -> None:
    first, second = (directory / "log" for directory in dirs[:2])
    first.touch()
    appending = open(second, "a")  # noqa: SIM115  # closed below, where it must fail
    appending.write("appended")
    first.write_text("first")
    with pytest.raises(OSError, match="Input/output error"):
        appending.close()
    assert first.read_text() == second.read_text() == "first"


@pytest.mark.expected_logs("another node wrote it first", "cannot be committed")
def test_a_write_that_is_lost_fails_only_for_who_made_it(dirs: Dirs) -> None:
    first, second = (directory / "log" for directory in dirs[:2])
    first.touch()
    reader = second.open("rb", buffering=0)
    appending = os.open(second, os.O_WRONLY | os.O_APPEND)
    mapped = os.open(second, os.O_RDWR | os.O_APPEND)
    os.write(appending, b"appended" * LARGE)
    first.write_bytes(b"first")
    with refused(errno.EIO):
        os.fsync(appending)
    assert reader.read() == b"appended" * LARGE, "as it was written on this node"
    for _ in range(3):  # through the name it is another file by now, which is sound
        assert second.read_bytes() == b"first"
        os.truncate(second, 2)
        second.write_bytes(b"first")
    for descriptor in (appending, mapped):
        with refused(errno.EIO):
            os.close(descriptor)
    assert reader.read(1) == b""
    reader.seek(0)
    assert reader.read() == b"appended" * LARGE
    reader.close()
    assert first.read_bytes() == second.read_bytes() == b"first"
