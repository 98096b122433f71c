"""The namespace's copy on disk: always some whole revision, and never in the way."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from random import Random

import pytest

from modelfs.ids import Revision
from modelfs.ports import Event, KeyValue, WatchBatch
from modelfsd.metadata.replica_file import ReplicaFile

CLUSTER = "c" * 16


def row(key: bytes, value: bytes, revision: int) -> KeyValue:
    return KeyValue(key, value, Revision(revision), Revision(revision))


def batch(revision: int, key: bytes, value: bytes | None) -> WatchBatch:
    event = Event(key, value, Revision(revision), Revision(revision))
    return WatchBatch(Revision(revision), (event,))


def loaded(path: Path, cluster: str = CLUSTER) -> tuple[int, dict[bytes, bytes]]:
    """What a daemon that starts now would load."""
    file = ReplicaFile(path, cluster)
    revision, rows = file.load()
    file.close()
    return revision, {kv.key: kv.value for kv in rows}


def test_what_was_taken_is_there_after_a_crash(tmp_path: Path, rng: Random) -> None:
    """A killed daemon closes nothing: what another connection sees is what the next start finds."""
    path = tmp_path / "namespace.sqlite"
    file = ReplicaFile(path, CLUSTER)
    model: dict[bytes, bytes] = {}
    file.replace(Revision(5), [row(b"a", b"1", 5)])
    model[b"a"] = b"1"
    for revision in range(6, 60, 2):
        batches = []
        for step in range(2):
            key = b"key%d" % rng.randrange(6)
            value = rng.choice([None, b"v%d" % revision])
            batches.append(batch(revision + step, key, value))
            model.pop(key, None)
            if value is not None:
                model[key] = value
        file.extend(batches)
        copy = tmp_path / f"crashed-{revision}.sqlite"
        for suffix in ("", "-wal"):
            source = path.with_name(path.name + suffix)
            copy.with_name(copy.name + suffix).write_bytes(source.read_bytes())
        assert loaded(copy) == (revision + 1, model)
    file.close()
    assert loaded(path) == (59, model)


def test_the_file_of_another_cluster_is_started_anew(tmp_path: Path) -> None:
    path = tmp_path / "namespace.sqlite"
    file = ReplicaFile(path, CLUSTER)
    file.replace(Revision(5), [row(b"a", b"1", 5)])
    file.close()
    assert loaded(path, "d" * 16) == (0, {})
    assert loaded(path) == (0, {})


@pytest.mark.expected_logs("is damaged")
@pytest.mark.parametrize("where", [0, 30, 5000, 9000, 20_000])
def test_a_damaged_file_is_started_anew(tmp_path: Path, where: int) -> None:
    path = tmp_path / "namespace.sqlite"
    file = ReplicaFile(path, CLUSTER)
    rows = [row(b"key%05d" % n, b"v" * 100, 5) for n in range(500)]
    file.replace(Revision(5), rows)
    file.close()
    with path.open("r+b") as damaged:
        damaged.seek(where)
        damaged.write(os.urandom(3000))
    revision, found = loaded(path)
    assert (revision, found) in ((0, {}), (5, {kv.key: kv.value for kv in rows}))
    again = ReplicaFile(path, CLUSTER)
    again.load()
    again.replace(Revision(9), [row(b"a", b"1", 9)])
    again.close()
    assert loaded(path) == (9, {b"a": b"1"})


@pytest.mark.expected_logs("is damaged")
def test_what_is_no_database_is_started_anew(tmp_path: Path) -> None:
    path = tmp_path / "namespace.sqlite"
    path.write_bytes(b"not a database at all" * 100)
    assert loaded(path) == (0, {})


@pytest.mark.expected_logs("cannot be written")
def test_on_a_full_disk_the_file_stays_at_a_whole_revision(tmp_path: Path) -> None:
    path = tmp_path / "namespace.sqlite"
    file = ReplicaFile(path, CLUSTER)
    file.replace(Revision(5), [row(b"a", b"1", 5)])
    (pages,) = file._database.execute("PRAGMA page_count").fetchone()
    file._database.execute(f"PRAGMA max_page_count={pages}")
    file.extend([batch(6, b"big", b"x" * 200_000)])
    file._database.execute("PRAGMA max_page_count=1000000")
    file.extend([batch(7, b"b", b"2")])  # must not go in without revision 6
    assert file.load()[0] == 5
    file.replace(Revision(8), [row(b"b", b"2", 8)])
    file.extend([batch(9, b"c", b"3")])
    file.close()
    assert loaded(path) == (9, {b"b": b"2", b"c": b"3"})


def test_batches_that_a_reload_overtook_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "namespace.sqlite"
    file = ReplicaFile(path, CLUSTER)
    file.replace(Revision(10), [row(b"a", b"new", 9)])
    file.extend([batch(7, b"a", b"old"), batch(8, b"gone", b"x"), batch(11, b"b", b"1")])
    file.close()
    assert loaded(path) == (11, {b"a": b"new", b"b": b"1"})


def test_a_failed_transaction_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "namespace.sqlite"
    file = ReplicaFile(path, CLUSTER)
    file.replace(Revision(5), [row(b"a", b"1", 5)])

    def broken() -> object:
        yield row(b"b", b"2", 6)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        file.replace(Revision(6), broken())  # type: ignore[arg-type]
    assert sqlite3.connect(path).execute("SELECT revision FROM progress").fetchone() == (5,)
    file.close()
    assert loaded(path) == (5, {b"a": b"1"})
