"""The kernel sends the WRITEs of one file many at a time, in any order, across chunk borders."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import trio

from modelfs.chunk import Buffer, describe
from modelfs.limits import KIB
from modelfsd.writing import assembly
from modelfsd.writing.staging import Pieces, StagedChunk, StagingDirectory
from tests.daemon.node_parts import CHUNK, cluster_of

FIRST = CHUNK // 4  # the size of the first chunks
HANG_SECONDS = 60.0


async def test_a_reader_does_not_wait_for_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which waits for other nodes as long as etcd believes that they live."""
    contents = bytes(range(256)) * (3 * CHUNK // 512)  # ends within a chunk
    is_putting, may_go_on = trio.Event(), trio.Event()
    async with cluster_of(2, tmp_path) as cluster:
        node = cluster.nodes[0]
        await node.make_file(b"f")
        session = await node.open(b"f")
        put = node.replicator.put

        async def put_when_told(*args: Any) -> object:  # noqa: ANN401  # as it was called
            is_putting.set()
            await may_go_on.wait()
            return await put(*args)

        monkeypatch.setattr(node.replicator, "put", put_when_told)
        for least in ("PIECE_BYTES_MIN", "CHUNK_BYTES_MIN"):
            monkeypatch.setattr(assembly, least, 1)  # chunks of a test are small
        async with trio.open_nursery() as nursery:
            await session.write(0, contents)
            nursery.start_soon(session.flush)
            await is_putting.wait()
            with trio.fail_after(HANG_SECONDS):
                assert await session.read(0, len(contents)) == contents
            may_go_on.set()
        assert await session.read(0, len(contents)) == contents
        await session.release()
        assert await node.read_file(b"f") == contents


async def test_a_write_that_completes_a_chunk_leaves_the_bytes_of_one_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later WRITE has put its first bytes into the chunk, and is still busy with its second."""
    split = FIRST - 4 * KIB
    earlier, later = b"e" * split, b"l" * FIRST
    is_held, is_sealing = trio.Event(), threading.Event()
    token = trio.lowlevel.current_trio_token()
    write = StagingDirectory.write

    def write_second_chunk_late(
        files: StagingDirectory, index: int, staged: StagedChunk, pieces: Pieces
    ) -> None:
        if index == 1:
            trio.from_thread.run_sync(is_held.set, trio_token=token)
            assert is_sealing.wait(HANG_SECONDS)
        write(files, index, staged, pieces)

    def describe_and_tell(data: Buffer) -> object:
        is_sealing.set()
        return describe(data)

    monkeypatch.setattr(StagingDirectory, "write", write_second_chunk_late)
    monkeypatch.setattr("modelfsd.writing.staging.name_chunk", describe_and_tell)
    async with cluster_of(2, tmp_path) as cluster:
        await cluster.nodes[0].make_file(b"f")
        session = await cluster.nodes[0].open(b"f")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.write, split, later)
            await is_held.wait()
            await session.write(0, earlier)
        await session.flush()
        await session.release()
        for node in cluster.nodes:
            assert await node.read_file(b"f") == earlier + later
