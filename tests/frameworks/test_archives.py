"""Pickle, zip, tar and SQLite: formats that seek, rewrite, append and lock."""

from __future__ import annotations

import pickle
import random
import sqlite3
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from tests.mount.mount_parts import MIB, Dirs, finish_child, start_child


def test_pickles_come_back_equal(dirs: Dirs, rng: random.Random) -> None:
    saved = {"epoch": 3, "blob": rng.randbytes(5 * MIB), "names": [f"w{i}" for i in range(9000)]}
    with (dirs[0] / "state.pkl").open("wb") as file:
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            pickle.dump(saved, file, protocol)
    with (dirs[1] / "state.pkl").open("rb") as file:
        for _ in range(pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.load(file) == saved


def test_out_of_band_buffers_come_back_equal(dirs: Dirs) -> None:
    saved, buffers = np.arange(3 * MIB, dtype=np.uint32), list[pickle.PickleBuffer]()
    with (dirs[2] / "a.pkl").open("wb") as file:
        pickle.dump(saved, file, 5, buffer_callback=buffers.append)
    with (dirs[2] / "a.buf").open("wb", buffering=0) as raw:
        assert raw.write(buffers[0].raw()) == saved.nbytes
    with (dirs[1] / "a.pkl").open("rb") as file:
        loaded = pickle.load(file, buffers=[(dirs[1] / "a.buf").read_bytes()])
    np.testing.assert_array_equal(loaded, saved)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_archives_are_written_appended_to_and_read_by_three_nodes(
    dirs: Dirs, rng: random.Random, method: int
) -> None:
    members = {f"data/{i}": rng.randbytes(300_000 * i) for i in range(8)}
    with zipfile.ZipFile(dirs[0] / "a.zip", "w", method) as archive:
        for name in list(members)[:5]:
            archive.writestr(name, members[name])
    with zipfile.ZipFile(dirs[1] / "a.zip", "a", method) as archive:
        for name in list(members)[5:]:
            # Of unknown size: the member's header is rewritten when its end is known.
            with archive.open(name, "w") as member:
                for start in range(0, len(members[name]), 77_777):
                    member.write(members[name][start : start + 77_777])
    for directory in (dirs[2], dirs[0]):
        with zipfile.ZipFile(directory / "a.zip") as archive:
            assert archive.testzip() is None
            assert {name: archive.read(name) for name in archive.namelist()} == members


@pytest.mark.parametrize("kind", ["", "gz"], ids=["appended to", "compressed"])
def test_tar_archives_are_written_by_one_node_and_unpacked_by_another(
    dirs: Dirs, rng: random.Random, tmp_path: Path, kind: Literal["", "gz"]
) -> None:
    for number in range(6):
        (tmp_path / f"{number}.bin").write_bytes(rng.randbytes(1_000_003 * number))
    (tmp_path / "link").symlink_to("3.bin")
    (tmp_path / "hard").hardlink_to(tmp_path / "4.bin")
    names = sorted(path.name for path in tmp_path.iterdir())
    first = names if kind else names[:3]
    with tarfile.open(dirs[0] / "a.tar", "w:gz" if kind else "w:") as archive:
        for name in first:
            archive.add(tmp_path / name, name)
    if not kind:
        with tarfile.open(dirs[1] / "a.tar", "a:") as archive:
            for name in names[3:]:
                archive.add(tmp_path / name, name)
    (dirs[2] / "out").mkdir()
    with tarfile.open(dirs[2] / "a.tar") as archive:
        archive.extractall(dirs[2] / "out", filter="tar")
    for name in names:
        original, unpacked = tmp_path / name, dirs[0] / "out" / name
        assert unpacked.read_bytes() == original.read_bytes()
        assert unpacked.lstat().st_mode == original.lstat().st_mode
        if not original.is_symlink():
            assert unpacked.stat().st_mtime == pytest.approx(original.stat().st_mtime, abs=1.0)
    assert (dirs[1] / "out/hard").stat().st_nlink == 2
    assert (dirs[1] / "out/link").readlink() == Path("3.bin")


def test_a_header_that_is_written_last_is_seen_elsewhere(dirs: Dirs, rng: random.Random) -> None:
    """Leave room, write the body, seek back, fill in the header: many formats are made so."""
    body = rng.randbytes(9 * MIB + 13)
    with (dirs[0] / "a.bin").open("wb") as file:
        file.write(bytes(64))
        for start in range(0, len(body), 100_001):
            file.write(body[start : start + 100_001])
        file.seek(8)
        file.write(struct.pack("<QQ", len(body), 42))
        file.seek(0, 2)
        file.write(b"END")
        file.seek(0)
        file.write(b"MAGIC")
    for directory in dirs[1:]:
        data = (directory / "a.bin").read_bytes()
        assert data[:5] == b"MAGIC"
        assert struct.unpack_from("<QQ", data, 8) == (len(body), 42)
        assert data[64:-3] == body
        assert data[-3:] == b"END"


SQLITE_WRITER = """
import sqlite3
connection = sqlite3.connect(path, timeout=120, isolation_level=None)
for number in range(rounds):
    connection.execute("BEGIN IMMEDIATE")
    (count,) = connection.execute("SELECT count FROM total").fetchone()
    connection.execute("INSERT INTO steps VALUES (?, ?, randomblob(2000))", (who, number))
    connection.execute("UPDATE total SET count = ?", (count + 1,))
    connection.execute("COMMIT")
connection.close()
"""


@pytest.mark.parametrize("journal", ["delete", "wal", "truncate"])
def test_a_database_has_many_writers_on_one_node_and_readers_elsewhere_later(
    dirs: Dirs, journal: str
) -> None:
    """SQLite's locks are of the node: a database belongs to one node at a time."""
    rounds, writers = 12, 3
    connection = sqlite3.connect(dirs[0] / "runs.db")
    assert connection.execute(f"PRAGMA journal_mode={journal}").fetchone() == (journal,)
    connection.execute("CREATE TABLE steps (who, number, data)")
    connection.execute("CREATE TABLE total (count)")
    connection.execute("INSERT INTO total VALUES (0)")
    connection.commit()
    children = [
        start_child(SQLITE_WRITER, path=dirs[0] / "runs.db", rounds=rounds, who=who)
        for who in range(writers)
    ]
    assert [finish_child(child).errno for child in children] == [0] * writers
    assert connection.execute("SELECT count FROM total").fetchone() == (rounds * writers,)
    connection.close()
    for directory in dirs:
        connection = sqlite3.connect(directory / "runs.db")
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        counted = connection.execute("SELECT count(*), count(DISTINCT who) FROM steps").fetchone()
        assert counted == (rounds * writers, writers)
        connection.close()
    other = sqlite3.connect(dirs[2] / "runs.db")
    other.execute("DELETE FROM steps WHERE who = 0")
    other.commit()
    other.execute("VACUUM")
    other.close()
    connection = sqlite3.connect(dirs[1] / "runs.db")
    assert connection.execute("SELECT count(*) FROM steps").fetchone() == (rounds * (writers - 1),)
    connection.close()
