"""What is lost is listed, its chunks are spared, and the daemon helps to get it back."""

from __future__ import annotations

import base64
import errno
import fcntl
import json
import os
import shutil
import time
from pathlib import Path
from random import Random

import pytest

from modelfs.chunk import describe
from modelfs.errors import OutOfSpace, ProtocolError, UserError
from modelfs.ids import Epoch
from modelfs.inode import Inode
from modelfs.limits import KIB
from modelfs.manifest import PlacedChunk
from modelfs.ports import Holding
from modelfsd.storage.disk import DiskChunkStore
from modelfsd.writing import lost, recover, staging
from modelfsd.writing.layout import read_journal
from modelfsd.writing.recover import RecoveryFailed
from modelfsd.writing.recovery_service import RecoveryService
from tests.daemon.node_parts import cluster_of
from tests.daemon.recover_parts import FIRST, Twin, lose_sealed_chunks, rebuilt, until
from tests.needs import small_disk

LOST = r"cannot be committed, they are kept|closed with writes that could not be committed"


@pytest.mark.expected_logs(LOST)
async def test_a_lost_write_is_listed_while_its_file_is_open_and_after(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        session = await node.open(b"f")
        await session.write(3, b"abc")
        lock = os.open(node.state_dir / "lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert lost.lost_copies(node.state_dir, {}) == []  # it is being written, that is all
        cluster.etcd.expire(cluster.leases[node.id])
        await node.feed.fresh()
        await until(lambda: lost.lost_copies(node.state_dir, {}))
        (copy,) = lost.lost_copies(node.state_dir, {})
        assert copy.is_open and copy.path == "/f" and copy.size == 6 and copy.node == "a"
        assert "lease has lapsed" in copy.why
        os.close(lock)
        await session.release()
        (after,) = lost.lost_copies(node.state_dir, {})
        assert after.name == copy.name and not after.is_open and after.why == copy.why
        made = recover.recover(node.state_dir, copy.name[:8], tmp_path / "made")
        assert (tmp_path / "made").read_bytes() == b"\0\0\0abc"
        assert made.size == 6 and not made.missing and "remove that" in made.text()
        assert lost.lost_copies(node.state_dir, {}) == [after]  # nothing is deleted


async def test_the_chunks_of_lost_writes_are_spared_for_a_week(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await lose_sealed_chunks(node, 2)
        now = time.time()
        spared = lost.lost_chunks(node.writer.lost_dir, now)
        assert len(spared) == 2 and all(node.store.has(spared, renew=False))
        (base,) = lost.lost_bases(node.writer.lost_dir, now)
        assert isinstance(base, Inode) and base.version == 1
        later = now + 8 * 86_400
        assert lost.lost_chunks(node.writer.lost_dir, later) == []
        assert lost.lost_bases(node.writer.lost_dir, later) == []


async def test_a_damaged_description_is_listed_and_refused(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        name = await lose_sealed_chunks(node, 1)
        (node.writer.lost_dir / name / staging.DESCRIPTION).write_text('{"path": 1')
        (copy,) = lost.lost_copies(node.state_dir, {})
        assert copy.name == name and "damaged" in copy.why
        with pytest.raises(RecoveryFailed, match="is damaged"):
            recover.recover(node.state_dir, name, tmp_path / "made")


@pytest.mark.expected_logs(LOST)
async def test_the_daemon_names_failed_files_and_reads_chunks(tmp_path: Path, rng: Random) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        node = cluster.nodes[0]
        service = RecoveryService(node.writer, node.chunks)
        await node.make_file(b"f", replicas=1)
        data = rng.randbytes(FIRST)
        session = await node.open(b"f")
        await session.write(0, data)
        await until(lambda: node.writer.uploads.used_bytes == 0)
        assert await service.lost({}) == {"failed": {}}
        (record,) = read_journal(node.state_dir / "staging" / session.copy.directory_name)
        wanted = {**record["chunk"], "replicas": 1, "start": 100, "size": 200}
        answer = await service.chunk(wanted)
        assert base64.b64decode(answer["data"]) == data[100:300]
        for nonsense in ({"size": FIRST}, {"start": -1}, {"size": "1"}, {"replicas": None}):
            with pytest.raises(UserError):
                await service.chunk({**wanted, **nonsense})
        with pytest.raises(ProtocolError):
            await service.chunk({**wanted, "id": "no name"})
        cluster.etcd.expire(cluster.leases[node.id])
        await node.feed.fresh()
        ((name, why),) = (await service.lost({}))["failed"].items()
        assert name == session.copy.directory_name and "lapsed" in why
        assert set(service.handlers()) == {"lost", "chunk"}
        await session.release()


@pytest.mark.expected_logs(LOST)
async def test_a_full_disk_does_not_hide_why_a_write_is_lost(tmp_path: Path) -> None:
    """On a real full disk: the write fails, and so would a second description."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk, 400 * KIB):
        async with cluster_of(1, disk) as cluster:
            (node,) = cluster.nodes
            await node.make_file(b"f")
            session = await node.open(b"f")
            twin = Twin(node, session, b"")
            with pytest.raises(OutOfSpace):
                await fill(twin)
            await session.release()
            (copy,) = lost.lost_copies(node.state_dir, {})
            assert "no room" in copy.why and copy.path == "/f"
            found = rebuilt(node.state_dir, copy.name, cluster)
            assert found[: len(twin.model)] == twin.model


async def fill(twin: Twin) -> None:
    """Write with gaps, which are journaled, until the disk is full."""
    for number in range(1000):
        await twin.write(number * 3 * KIB, 2 * KIB, number % 255 + 1)


def test_a_lost_write_that_cannot_be_read_keeps_no_other_from_being_renewed(
    tmp_path: Path,
) -> None:
    ref, _ = describe(b"sealed")
    for name in ("bad", "good"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / staging.JOURNAL).mkdir()  # like one that the disk does not give back
    (tmp_path / "bad" / staging.DESCRIPTION).mkdir()
    chunk = {"id": ref.id.hex(), "checksum": ref.checksum, "length": ref.length, "epoch": 1}
    (tmp_path / "good" / staging.JOURNAL).write_text(json.dumps({"chunk": chunk}))
    assert lost.lost_chunks(tmp_path, time.time()) == [ref.id]
    assert lost.lost_bases(tmp_path, time.time()) == []


async def test_one_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    """Neither one in lost/, nor one in staging/ while the daemon runs."""
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        name = await lose_sealed_chunks(node, 1)
        journal = node.writer.lost_dir / "bad" / staging.JOURNAL
        shutil.copytree(node.writer.lost_dir / name, journal.parent)
        journal.unlink()
        journal.mkdir()  # like one that the disk does not give back
        (node.state_dir / "staging" / "bad-2" / staging.DESCRIPTION).mkdir(parents=True)
        with (node.state_dir / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            copies = {copy.name: copy for copy in lost.lost_copies(node.state_dir, {})}
        assert sorted(copies) == sorted([name, "bad"])
        assert "cannot be read: Is a directory" in copies["bad"].why
        assert copies[name].size == FIRST + 4
        with pytest.raises(RecoveryFailed, match=r"sealed.jsonl cannot be read: Is a directory"):
            recover.recover(node.state_dir, "bad", tmp_path / "made")


async def test_one_that_moves_while_we_look_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        name = await lose_sealed_chunks(node, 1)
        kept, staged = node.writer.lost_dir / name, node.state_dir / "staging" / name
        kept.rename(staged)
        real, moves = lost._directories, iter([True])

        def directories(parent: Path) -> list[Path]:
            found = real(parent)
            if next(moves, False):
                staged.rename(kept)
            return found

        monkeypatch.setattr(lost, "_directories", directories)
        (copy,) = lost.lost_copies(node.state_dir, {})
        assert copy.name == name and copy.directory == kept


async def test_a_copy_here_that_cannot_be_opened_is_read_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged inode in the store, as `DiskChunkStore` takes it: one copy less."""
    ref, table = describe(b"sealed")
    store = DiskChunkStore(tmp_path / "chunks", 0)
    store.put(ref, table, b"sealed", Holding.OWNED)
    chunks, placed, real = recover._Chunks(tmp_path), PlacedChunk(ref, Epoch(1)), os.open
    assert chunks(placed, 1, 0, 6) == b"sealed"

    def refuse(path: str | Path, flags: int, *more: int) -> int:
        if "/owned/" in str(path):
            raise OSError(errno.EUCLEAN, os.strerror(errno.EUCLEAN))
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match="no modelfs daemon runs"):  # it would have asked the others
        chunks(placed, 1, 0, 6)
