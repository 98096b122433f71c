"""Chunks that are collected in memory while they are staged."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import trio

from modelfs.chunk import Buffer
from modelfs.errors import OutOfSpace, WriteLost
from modelfs.limits import KIB, MIB
from modelfsd.storage import page_cache
from modelfsd.writing import staging, working_copy
from modelfsd.writing.assembly import AssemblyMemory
from modelfsd.writing.staging import write_at
from tests.daemon.node_parts import CHUNK, cluster_of

BORDER = 8 * 64 * KIB  # from here on the chunks of the tests' files have CHUNK bytes


def test_memory_is_lent_within_its_bound_and_comes_back_by_itself() -> None:
    memory = AssemblyMemory(10 * MIB)
    one, two = memory.lend(4 * MIB, MIB), memory.lend(4 * MIB, MIB)
    assert one is not None and two is not None and memory.used_bytes == 8 * MIB
    assert memory.lend(4 * MIB, MIB) is None, "there is no room"
    assert memory.lend(MIB, KIB) is None, "small pieces are not worth it"
    view = one.take(b"abc", 5)
    assert bytes(view) == bytes(one.data[5:8]) == b"abc"
    del one, view
    assert memory.used_bytes == 4 * MIB
    del two
    assert memory.used_bytes == 0


@pytest.mark.parametrize("size", [4096, 4095, 3 * 4096 + 7, MIB])
def test_what_is_written_past_the_page_cache_is_in_the_file(
    tmp_path: Path, rng: Random, size: int
) -> None:
    memory = AssemblyMemory(4 * MIB)
    assembly = memory.lend(2 * MIB, MIB)
    assert assembly is not None
    data = rng.randbytes(size)
    for start in (0, 4096, MIB // 2 + 1):
        write_at(tmp_path / "f", assembly.take(data, start), start, past_cache=True)
        assert (tmp_path / "f").read_bytes()[start:] == data
    with open(tmp_path / "f", "r+b", buffering=0) as file:
        assert page_cache.write_directly(file.fileno(), memoryview(data), 512) == 0


async def test_a_stream_is_never_read_back(
    tmp_path: Path, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written in large pieces, out of order, over one another, with a gap and a cut."""

    def refuse(*arguments: object) -> bytearray:
        raise AssertionError("a staging file was read")

    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await one.make_file(b"f")
        first = rng.randbytes(BORDER + 3 * CHUNK)
        model = bytearray(first)
        await one.write_file(b"f", first)
        session = await one.open(b"f")
        monkeypatch.setattr(working_copy, "read_exactly", refuse)
        for start, size in ((128, 128), (0, 64), (32, 64), (3 * 256, 128)):
            data = rng.randbytes(size * KIB)
            at = BORDER + start * KIB
            model[at : at + len(data)] = data
            await session.write(at, data)
            seen = bytes(await session.read(BORDER, 2 * CHUNK))
            assert seen == model[BORDER : BORDER + 2 * CHUNK]
        await session.truncate(BORDER + 800 * KIB)
        del model[BORDER + 800 * KIB :]
        await session.truncate(BORDER + 1000 * KIB)
        model.extend(bytes(200 * KIB))
        await session.release()
        assert await two.read_file(b"f") == model
        assert one.writer.memory.used_bytes == 0


async def test_writes_that_come_together_are_staged_together(
    tmp_path: Path, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel writes back: many at a time, and not in order."""
    written: list[tuple[int, int]] = []
    write_at = staging.write_at

    def record(path: Path, data: Buffer, offset: int, past_cache: bool = False) -> None:
        written.append((offset, len(data)))
        write_at(path, data, offset, past_cache)

    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await one.make_file(b"f")
        data = rng.randbytes(BORDER + CHUNK)
        session = await one.open(b"f")
        await session.write(0, data[:BORDER])
        monkeypatch.setattr(staging, "write_at", record)
        async with trio.open_nursery() as nursery:
            for start in range(BORDER, BORDER + CHUNK, CHUNK // 4):
                nursery.start_soon(session.write, start, data[start : start + CHUNK // 4])
        assert written == [(0, CHUNK)]
        await session.release()
        assert await two.read_file(b"f") == data


@pytest.mark.expected_logs("cannot be committed, they are kept: no room")
async def test_writes_that_failed_together_all_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OutOfSpace("no room")

    async with cluster_of(2, tmp_path) as cluster:
        one = cluster.nodes[0]
        await one.make_file(b"f")
        session = await one.open(b"f")
        monkeypatch.setattr(staging, "write_at", fail)
        refused = 0

        async def write(start: int) -> None:
            nonlocal refused
            with pytest.raises(OutOfSpace):
                await session.write(start, bytes(CHUNK // 4))
            refused += 1

        async with trio.open_nursery() as nursery:
            for start in range(BORDER, BORDER + CHUNK, CHUNK // 4):
                nursery.start_soon(write, start)
        assert refused == 4
        with pytest.raises(WriteLost):
            await session.flush()
        await session.release()
