"""What was written and not committed can be rebuilt from disk, whenever the daemon ended.

A working copy writes its staging directory; `Rebuild` reads it, after any operation and in the
middle of a seal, and must find what the writer saw. Chunks and metadata are the real parts.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from modelfs.errors import ChunkMissing, ProtocolError, UserError
from modelfs.inode import Inode
from modelfs.limits import INLINE_BYTES_MAX, KIB
from modelfs.manifest import PlacedChunk
from modelfsd import lost, recover, staging
from modelfsd.layout import read_journal
from modelfsd.recover import Missing, Rebuild, RecoveryFailed
from modelfsd.recovery_service import RecoveryService
from modelfsd.replicator import Replicator
from modelfsd.writer import WriteSession
from tests.daemon.node_parts import CHUNK, Cluster, Node, cluster_of

FIRST = CHUNK // 4  # the size of the first chunks
BORDERS = [0, 1, INLINE_BYTES_MAX, FIRST, 2 * FIRST, 8 * FIRST, 8 * FIRST + CHUNK]
SIZE_MAX = 8 * FIRST + 2 * CHUNK
LOST = r"cannot be committed, they are kept|closed with writes that could not be committed"

places = st.one_of(
    st.tuples(st.sampled_from(BORDERS), st.integers(-3, 3)).map(lambda pair: max(0, sum(pair))),
    st.integers(0, SIZE_MAX),
)
operations = st.one_of(
    st.tuples(st.just("write"), places, places, st.integers(0, 255)),
    st.tuples(st.just("truncate"), places),
    st.tuples(st.sampled_from(["settle", "seal", "flush"])),
)


class Store:
    """Fetches chunks from the nodes' memory, as the daemon would."""

    def __init__(self, cluster: Cluster) -> None:
        self.stores = list(cluster.stores.values())

    def __call__(self, chunk: PlacedChunk, replicas: int, start: int, size: int) -> bytes:
        for store in self.stores:
            try:
                return bytes(store.read(chunk.ref, start, size))
            except ChunkMissing:
                continue
        raise ChunkMissing(chunk.ref.id, "any node")


def rebuilt(state_dir: Path, name: str, cluster: Cluster) -> bytes:
    rebuild = Rebuild(state_dir, name, Store(cluster))
    data = bytearray(rebuild.size)
    missing: list[Missing] = []
    for start, piece in rebuild.positions(missing):
        data[start : start + len(piece)] = piece
    assert not missing
    return bytes(data)


async def until(condition: Callable[[], object]) -> None:
    """Wait for what worker threads bring about."""
    while not condition():
        await trio.lowlevel.checkpoint()


def staged(state_dir: Path) -> list[str]:
    return sorted(path.name for path in (state_dir / "staging").iterdir())


class Twin:
    """A file that is written, and the bytearray that recovery must find."""

    def __init__(self, node: Node, session: WriteSession, model: bytes) -> None:
        self.node, self.session, self.model = node, session, bytearray(model)

    async def write(self, start: int, size: int, value: int) -> None:
        size = max(1, min(size, SIZE_MAX - start))
        data = Random(value).randbytes(size) if value else bytes(size)
        await self.session.write(start, data)
        if start > len(self.model):
            self.model.extend(bytes(start - len(self.model)))
        self.model[start : start + size] = data

    async def truncate(self, size: int) -> None:
        await self.session.truncate(size)
        self.model = self.model[:size].ljust(size, b"\0")

    async def settle(self) -> None:
        """Let the complete chunks be sealed."""
        await until(lambda: self.node.writer.uploads.used_bytes == 0)

    async def seal(self) -> None:
        """Seal what is not complete too, as a commit does that then fails."""
        for index in self.session.copy.staged_positions():
            await self.session.copy.seal(index)

    async def flush(self) -> None:
        await self.session.flush()

    def check(self, state_dir: Path) -> None:
        names = staged(state_dir)
        assert len(names) <= 1
        for name in names:
            assert rebuilt(state_dir, name, self.node.cluster) == self.model


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(places, st.lists(operations, min_size=1, max_size=9))
@example(9 * FIRST, [("write", 5, 9, 1), ("truncate", 3), ("truncate", FIRST), ("write", 9, 1, 1)])
@example(0, [("write", 0, 2 * FIRST, 1), ("settle",), ("truncate", 9), ("write", FIRST, 9, 2)])
@example(FIRST, [("write", 99, 9, 1), ("truncate", 50), ("seal",), ("truncate", 2 * FIRST)])
async def test_a_killed_daemon_leaves_the_file_as_its_writer_saw_it(
    base_bytes: int, steps: list[tuple[Any, ...]]
) -> None:
    with tempfile.TemporaryDirectory(prefix="modelfs-recover.") as directory:
        async with cluster_of(2, Path(directory)) as cluster:
            node = cluster.nodes[0]
            await node.make_file(b"f")
            base = Random(base_bytes).randbytes(base_bytes)
            await node.write_file(b"f", base)
            session = await node.open(b"f")
            twin = Twin(node, session, base)
            for name, *arguments in steps:
                await getattr(twin, name)(*arguments)
                twin.check(node.state_dir)
            await session.release()
            assert not staged(node.state_dir)
            assert await node.read_file(b"f") == twin.model


async def test_it_does_in_the_middle_of_every_seal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: Random
) -> None:
    """A copy of the directory is taken between any two steps of a seal."""
    kept = tmp_path / "kept"
    numbers = itertools.count()
    async with cluster_of(2, tmp_path / "nodes") as cluster:
        node = cluster.nodes[0]
        await node.make_file(b"f")
        base = rng.randbytes(9 * FIRST)
        await node.write_file(b"f", base)

        def keep() -> None:
            for name in staged(node.state_dir):
                source = node.state_dir / "staging" / name
                shutil.copytree(source, kept / "lost" / f"{next(numbers)}")

        real_note, real_put = staging.StagingDirectory.note_seal, Replicator.put

        def note(*arguments: Any) -> None:  # noqa: ANN401
            keep()
            real_note(*arguments)
            keep()

        async def put(*arguments: Any) -> PlacedChunk:  # noqa: ANN401
            placed = await real_put(*arguments)
            keep()
            return placed

        monkeypatch.setattr(staging.StagingDirectory, "note_seal", note)
        monkeypatch.setattr(Replicator, "put", put)
        session = await node.open(b"f")
        twin = Twin(node, session, base)
        await twin.write(100, 50, 1)  # a gap before it, which the seal fills
        await twin.write(3 * FIRST, 2, 2)
        await twin.write(8 * FIRST + 10, 9, 3)
        await twin.truncate(8 * FIRST + 40)
        await twin.truncate(8 * FIRST + 70)
        await twin.seal()
        copies = list((kept / "lost").iterdir())
        assert len(copies) == 9
        for copy in copies:
            assert rebuilt(kept, copy.name, cluster) == twin.model
        await session.release()


async def test_a_torn_line_of_the_journal_spoils_no_other(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        session = await node.open(b"f")
        twin = Twin(node, session, b"")
        await twin.write(10, 10, 1)
        (name,) = staged(node.state_dir)
        journal = node.state_dir / "staging" / name / staging.JOURNAL
        journal.write_bytes(journal.read_bytes() + b'\n{"cut": 3, "ser')
        await twin.write(30, 10, 2)
        torn = b"\0\0\xff{}\n[1]\n" + b"[" * 100_000
        journal.write_bytes(journal.read_bytes() + torn)
        twin.check(node.state_dir)
        await session.release()


async def test_what_was_committed_is_never_shown_as_lost(tmp_path: Path) -> None:
    """After an fsync the file is open, its bytes are safe, and the daemon is killed."""
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        session = await node.open(b"f")
        await session.write(0, bytes(5000))
        await session.flush()
        assert node.writer.keep_leftovers() == 0
        assert not list(node.writer.lost_dir.iterdir())
        await session.release()


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


async def lose_sealed_chunks(node: Node, count: int) -> str:
    """A file of `count` sealed chunks and a few bytes more; the daemon is killed."""
    await node.make_file(b"f")
    session = await node.open(b"f")
    await session.write(0, b"".join(bytes([n + 1]) * FIRST for n in range(count)) + b"tail")
    await until(lambda: node.writer.uploads.used_bytes == 0)
    assert node.writer.keep_leftovers() == 1
    session.copy._files.is_made = False  # the daemon that knew of it is dead
    (name,) = (path.name for path in node.writer.lost_dir.iterdir())
    return name


async def test_what_cannot_be_rebuilt_is_told_range_by_range(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        name = await lose_sealed_chunks(node, 3)
        _, second, _ = lost.lost_chunks(node.writer.lost_dir, time.time())
        journal = read_journal(node.writer.lost_dir / name)
        (at,) = (r["seal"] for r in journal if r.get("chunk", {}).get("id") == second.hex())
        node.store.delete(second)
        rebuild = Rebuild(node.state_dir, name, Store(cluster))
        missing = recover.write_out(rebuild, tmp_path / "made")
        assert [(gap.start, gap.end) for gap in missing] == [(at * FIRST, (at + 1) * FIRST)]
        wanted = b"".join(bytes([n + 1 if n != at else 0]) * FIRST for n in range(3)) + b"tail"
        assert (tmp_path / "made").read_bytes() == wanted
        told = recover.Recovered(name, "made", rebuild.size, "lost", missing)
        assert f"bytes {at * FIRST} to {(at + 1) * FIRST - 1}: chunk" in told.text()
        assert "NOT complete: 64.0 KiB" in told.text()
        assert json.loads(json.dumps(told.as_json()))["missing"][0]["start"] == at * FIRST


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


async def test_a_full_disk_leaves_no_file_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        name = await lose_sealed_chunks(node, 2)
        rebuild = Rebuild(node.state_dir, name, Store(cluster))
        out = tmp_path / "out"
        out.mkdir()

        def full(*arguments: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(RecoveryFailed, match=r"No space left.*nothing is lost"):
                recover.write_out(rebuild, out / "made")
        assert not list(out.iterdir())
        assert recover.write_out(rebuild, out / "made") == []
        assert (out / "made").stat().st_size == 2 * FIRST + 4


async def test_nothing_is_overwritten(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        name = await lose_sealed_chunks(node, 1)
        dest = tmp_path / "out" / "dest"
        dest.parent.mkdir()
        dest.symlink_to("nowhere")
        with pytest.raises(UserError, match="exists: nothing is overwritten"):
            recover.recover(node.state_dir, name, dest)
        with pytest.raises(UserError, match="nothing lost is called x"):
            recover.recover(node.state_dir, "x", tmp_path / "made")
        rebuild = Rebuild(node.state_dir, name, Store(cluster))
        with pytest.raises(RecoveryFailed, match="File exists"):  # it came while we wrote
            recover.write_out(rebuild, dest)
        assert os.listdir(dest.parent) == ["dest"]


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


def test_whole_files_need_no_journal(tmp_path: Path) -> None:
    directory = staging.StagingDirectory(tmp_path / "d")
    directory.make({})
    chunk = directory.new_chunk(0, 0)
    for start in range(0, 100 * KIB, 10 * KIB):
        directory.write(0, chunk, bytes(10 * KIB), start)
        chunk.extents.add(start, start + 10 * KIB)
    directory.write(0, chunk, b"again", 5)
    assert not (directory.path / staging.JOURNAL).exists()
