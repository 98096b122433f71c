"""What was written and not committed can be rebuilt from disk, whenever the daemon ended.

A working copy writes its staging directory; `Rebuild` reads it, after any operation and in the
middle of a seal, and must find what the writer saw. Chunks and metadata are the real parts.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from modelfs.errors import OutOfSpace, UserError
from modelfs.limits import INLINE_BYTES_MAX, KIB
from modelfs.manifest import PlacedChunk
from modelfsd.storage.replicator import Replicator
from modelfsd.writing import lost, recover, staging
from modelfsd.writing.layout import read_journal
from modelfsd.writing.recover import Rebuild, RecoveryFailed
from tests.daemon.node_parts import CHUNK, cluster_of
from tests.daemon.recover_parts import (
    FIRST,
    SIZE_MAX,
    Store,
    Twin,
    lose_sealed_chunks,
    rebuilt,
    staged,
    until,
)

BORDERS = [0, 1, INLINE_BYTES_MAX, FIRST, 2 * FIRST, 8 * FIRST, 8 * FIRST + CHUNK]

places = st.one_of(
    st.tuples(st.sampled_from(BORDERS), st.integers(-3, 3)).map(lambda pair: max(0, sum(pair))),
    st.integers(0, SIZE_MAX),
)
operations = st.one_of(
    st.tuples(st.just("write"), places, places, st.integers(0, 255)),
    st.tuples(st.just("truncate"), places),
    st.tuples(st.sampled_from(["settle", "seal", "flush", "spill"])),
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(places, st.booleans(), st.lists(operations, min_size=1, max_size=9))
@example(
    9 * FIRST, False, [("write", 5, 9, 1), ("truncate", 3), ("truncate", FIRST), ("write", 9, 1, 1)]
)
@example(
    0, False, [("write", 0, 2 * FIRST, 1), ("settle",), ("truncate", 9), ("write", FIRST, 9, 2)]
)
@example(FIRST, True, [("write", 99, 9, 1), ("truncate", 50), ("seal",), ("truncate", 2 * FIRST)])
async def test_a_killed_daemon_leaves_the_file_as_its_writer_saw_it(
    base_bytes: int, is_slow: bool, steps: list[tuple[Any, ...]]
) -> None:
    """What a slow writer leaves in memory is written down between any two steps."""
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
                if is_slow:
                    await session.spill()
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


@pytest.mark.parametrize("is_cut", [False, True])
async def test_a_chunk_that_was_not_put_is_cut_and_written_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cut: bool
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        session = await node.open(b"f")
        twin = Twin(node, session, b"")
        await twin.write(0, FIRST - 9, 1)

        async def full(*arguments: object) -> None:
            raise OutOfSpace("no room")

        with monkeypatch.context() as patch:
            patch.setattr(Replicator, "put", full)
            with pytest.raises(OutOfSpace):
                await twin.seal()
        twin.check(node.state_dir)
        if is_cut:
            await twin.truncate(100)
            twin.check(node.state_dir)
        await twin.write(50, 10, 2)
        twin.check(node.state_dir)
        await twin.truncate(2000)
        await twin.write(FIRST + 5, 10, 2)
        twin.check(node.state_dir)
        await session.release()
        assert await node.read_file(b"f") == twin.model


async def test_a_torn_line_of_the_journal_spoils_no_other(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        session = await node.open(b"f")
        twin = Twin(node, session, b"")
        await twin.write(10, 10, 1)
        await session.spill()
        await twin.write(90, 10, 1)
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


async def test_what_the_disk_does_not_give_back_is_told_and_the_rest_is_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: Random
) -> None:
    """A bad sector under a staging file."""
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        session, data = await node.open(b"f"), rng.randbytes(8 * FIRST + CHUNK - 9)
        await session.write(0, data)
        await until(lambda: node.writer.uploads.used_bytes == 0)
        (name,) = staged(node.state_dir)
        bad, real = 8 * FIRST + CHUNK // 2 + 5, os.preadv

        def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if name in path and offset <= bad - 8 * FIRST < offset + len(buffers[0]):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(descriptor, buffers, offset)

        rebuild = Rebuild(node.state_dir, name, Store(cluster))
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", preadv)
            (gap,) = recover.write_out(rebuild, tmp_path / "made")
        assert gap.start <= bad < gap.end and gap.end - gap.start <= 64 * KIB
        assert "Input/output error" in gap.why
        wanted = data[: gap.start] + bytes(gap.end - gap.start) + data[gap.end :]
        assert (tmp_path / "made").read_bytes() == wanted
        await session.release()


async def test_the_file_has_its_name_for_good_before_its_owner_hears_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        rebuild = Rebuild(node.state_dir, await lose_sealed_chunks(node, 1), Store(cluster))
        synced: list[tuple[str, bool]] = []

        def fsync(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            synced.append((path, dest.exists()))

        dest = tmp_path / "made"
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            recover.write_out(rebuild, dest)
        assert synced[-1] == (str(tmp_path), True)
        assert synced[-2][1] is False and Path(synced[-2][0]).parent == tmp_path


async def test_a_name_may_be_as_long_as_names_can_be(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        rebuild = Rebuild(node.state_dir, await lose_sealed_chunks(node, 1), Store(cluster))
        for name in ("x" * 255, "\N{OGHAM LETTER BEITH}" * 85):
            assert recover.write_out(rebuild, tmp_path / name) == []
            assert (tmp_path / name).stat().st_size == FIRST + 4


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


def test_whole_files_need_no_journal(tmp_path: Path) -> None:
    directory = staging.StagingDirectory(tmp_path / "d")
    directory.make({})
    chunk = directory.new_chunk(0, 0)
    for start in range(0, 100 * KIB, 10 * KIB):
        directory.write(0, chunk, [(start, bytes(10 * KIB))])
        chunk.extents.add(start, start + 10 * KIB)
    directory.write(0, chunk, [(5, b"again")])
    assert not (directory.path / staging.JOURNAL).exists()
