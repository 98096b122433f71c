"""Names made durable in groups: who may rely on which round of fsyncs."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from modelfsd.storage.dirsync import DirectorySync


class RecordingSync(DirectorySync):
    """Counts rounds, and lets a test hold one up."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.rounds: list[list[str]] = []
        self.began = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)

    def _fsync_all(self, names: list[str]) -> str | None:
        self.rounds.append(names)
        self.began.release()
        assert self.may_end.acquire(timeout=60)
        return super()._fsync_all(names)


def test_callers_that_wait_together_share_a_round_begun_after_their_call(tmp_path: Path) -> None:
    for name in ("aa", "bb"):
        (tmp_path / name).mkdir()
    directories = RecordingSync(str(tmp_path))
    directories.mark("aa")
    threads = [threading.Thread(target=directories.sync) for _ in range(9)]
    threads[0].start()
    directories.began.acquire()
    with directories.changing("bb"):
        pass
    for thread in threads[1:]:
        thread.start()
    directories.may_end.release(2)  # one round for the first, at least one for all the others
    directories.began.acquire()
    assert directories.rounds[:2] == [["aa"], ["bb"]]
    directories.may_end.release(8)  # whoever came too late for that round makes another
    for thread in threads:
        thread.join()
    assert all(names == [] for names in directories.rounds[2:])


def test_a_name_whose_rename_is_under_way_is_synced_by_every_round(tmp_path: Path) -> None:
    (tmp_path / "aa").mkdir()
    directories = RecordingSync(str(tmp_path))
    directories.may_end.release(9)
    with directories.changing("aa"):
        directories.sync()
        directories.sync()
    directories.sync()
    directories.sync()
    assert directories.rounds == [["aa"], ["aa"], ["aa"], []]


def test_after_a_failed_sync_nothing_is_claimed_again(tmp_path: Path) -> None:
    directories = DirectorySync(str(tmp_path))
    directories.mark("missing")
    for _ in range(2):
        with pytest.raises(OSError, match="fsync failed") as caught:
            directories.sync()
        assert caught.value.errno == errno.EIO
