"""A file that is written in every order, against a bytearray.

Contents, chunks, replicas and metadata are the real parts. What is read from the working copy, and
after each commit from every node, must be what the bytearray says.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from modelfs.limits import INLINE_BYTES_MAX, KIB
from modelfsd.writing import staging, working_copy
from modelfsd.writing.write_session import WriteSession
from tests.daemon.node_parts import CHUNK, Cluster, cluster_of

FIRST = CHUNK // 4  # the size of the first chunks
BORDERS = [
    0, 1, INLINE_BYTES_MAX, FIRST, 2 * FIRST, 8 * FIRST, 8 * FIRST + CHUNK, 8 * FIRST + 2 * CHUNK,
]  # fmt: skip
SIZE_MAX = 8 * FIRST + 3 * CHUNK

places = st.one_of(
    st.tuples(st.sampled_from(BORDERS), st.integers(-3, 3)).map(lambda pair: max(0, sum(pair))),
    st.integers(0, SIZE_MAX),
)
operations = st.one_of(
    st.tuples(st.just("write"), places, places, st.integers(0, 255)),
    st.tuples(st.just("truncate"), places),
    st.tuples(st.just("read"), places, places),
    st.tuples(st.sampled_from(["flush", "reopen", "settle"])),
)
Operation = tuple[str, int, int, int]


class Twin:
    """A file and the bytearray that it must be equal to."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.model = cluster, bytearray()
        self.writer = 0
        self.session: WriteSession | None = None

    async def open(self) -> WriteSession:
        if self.session is None:
            self.session = await self.cluster.nodes[self.writer].open(b"f")
        return self.session

    async def write(self, start: int, size: int, value: int) -> None:
        size = max(1, min(size, SIZE_MAX - start))
        data = Random(value).randbytes(size) if value else bytes(size)
        await (await self.open()).write(start, data)
        if start > len(self.model):
            self.model.extend(bytes(start - len(self.model)))
        self.model[start : start + size] = data

    async def truncate(self, size: int) -> None:
        await (await self.open()).truncate(size)
        self.model = self.model[:size].ljust(size, b"\0")

    async def read(self, start: int, size: int) -> None:
        session = await self.open()
        assert session.copy.size == len(self.model)
        if session.copy.is_dirty:
            found = await session.read(start, size)
        else:  # as `Files.read` does
            contents = self.cluster.nodes[self.writer].contents
            found = await contents.read(session.inode.record, start, size)
        assert bytes(found) == self.model[start : start + size]

    async def flush(self) -> None:
        session = await self.open()
        await session.flush()
        assert not session.copy.is_dirty
        for node in self.cluster.nodes:
            assert await node.read_file(b"f") == self.model

    async def reopen(self) -> None:
        """Close, and go on from another node."""
        if self.session is not None:
            await self.session.release()
            self.session = None
        self.writer = (self.writer + 1) % len(self.cluster.nodes)
        await self.flush()

    async def settle(self) -> None:
        """Let what is being sealed in the background come to its end."""
        await trio.testing.wait_all_tasks_blocked()

    async def apply(self, name: str, *arguments: int) -> None:
        await getattr(self, name)(*arguments)

    async def close(self) -> None:
        await self.flush()
        assert self.session is not None
        await self.session.release()
        for node in self.cluster.nodes:
            assert not node.writer.open_sessions
            assert not list((node.state_dir / "staging").iterdir())
            assert node.writer.uploads.used_bytes == 0


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(operations, min_size=1, max_size=9))
@example([("write", 0, 2 * FIRST, 1), ("truncate", 10), ("truncate", FIRST), ("flush",)])
@example([("write", 0, 3, 1), ("flush",), ("write", 9 * FIRST, 3, 2), ("truncate", 5), ("flush",)])
@example([("write", 0, 99, 1), ("flush",), ("truncate", 50), ("write", 70_000, 9, 2), ("flush",)])
@example([("write", 5, 3 * FIRST, 1), ("flush",), ("truncate", FIRST + 9), ("truncate", 4 * FIRST)])
async def test_a_file_is_a_bytearray(steps: list[Operation]) -> None:
    with tempfile.TemporaryDirectory(prefix="modelfs-twin.") as directory:
        async with cluster_of(2, Path(directory)) as cluster:
            twin = Twin(cluster)
            await cluster.nodes[0].make_file(b"f")
            for name, *arguments in steps:
                await twin.apply(name, *arguments)
                await twin.read(0, SIZE_MAX)
            await twin.close()


@pytest.mark.expected_logs("could not make its copies safe")
@pytest.mark.parametrize("seed", range(12))
async def test_it_still_is_while_nodes_come_and_go_and_writes_meet_seals(
    tmp_path: Path, rng: Random, seed: int
) -> None:
    async with cluster_of(4, tmp_path) as cluster:
        twin = Twin(cluster)
        await cluster.nodes[0].make_file(b"f")
        for _ in range(30):
            # One node at a time is away; another may have restarted since it took chunks.
            cluster.peers.down = {rng.choice(cluster.ids)} - {cluster.ids[twin.writer]}
            cluster.peers.restart(rng.choice(cluster.ids))
            place = rng.choice(BORDERS) if rng.random() < 0.7 else rng.randrange(SIZE_MAX)
            size = rng.choice([1, 100, FIRST, 2 * FIRST, CHUNK, 3 * CHUNK])
            match rng.choice(["write", "write", "write", "truncate", "read", "flush", "reopen"]):
                case "write":
                    await twin.write(place, size, rng.randrange(256))
                    for _ in range(rng.choice([0, 0, 1, 5, 50])):
                        await trio.lowlevel.checkpoint()
                case "truncate":
                    await twin.truncate(max(0, place + rng.randrange(-3, 3)))
                case "read":
                    await twin.read(place, size)
                case "flush":
                    await twin.flush()
                case "reopen":
                    cluster.peers.down = set()
                    await twin.reopen()
        await twin.close()


class HeldUp:
    """A function of a worker thread that does its work and then waits to be let go."""

    def __init__(self, real: Callable[..., object]) -> None:
        self.reached, self.go_on = trio.Event(), trio.Event()
        self._real, self._token = real, trio.lowlevel.current_trio_token()

    @property
    def call(self) -> Callable[..., object]:
        """A plain function, which can stand in for a method too."""

        def held_up(*arguments: object) -> object:
            result = self._real(*arguments)
            trio.from_thread.run_sync(self.reached.set, trio_token=self._token)
            trio.from_thread.run(self.go_on.wait, trio_token=self._token)
            return result

        return held_up


async def test_a_chunk_that_is_being_sealed_can_be_written_and_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seal is held up at each of its steps, and a write or a truncation comes in."""
    owners = {
        "read_exactly": working_copy,
        "name_chunk": staging,
        "note_seal": staging.StagingDirectory,
    }
    for step in owners:
        for disturb in ("write", "truncate"):
            async with cluster_of(2, tmp_path / step / disturb) as cluster:
                twin = Twin(cluster)
                await cluster.nodes[0].make_file(b"f")
                session = await twin.open()
                owner = owners[step]
                held_up = HeldUp(getattr(owner, step))

                with monkeypatch.context() as patch:
                    patch.setattr(owner, step, held_up.call)
                    await twin.write(0, FIRST, 1)  # a whole chunk: it is sealed at once
                    await held_up.reached.wait()
                    patch.undo()
                    async with trio.open_nursery() as nursery:
                        if disturb == "write":
                            nursery.start_soon(twin.write, 100, 50, 2)
                        else:
                            nursery.start_soon(twin.truncate, 30 * KIB)
                        await trio.testing.wait_all_tasks_blocked()
                        held_up.go_on.set()
                await twin.read(0, SIZE_MAX)
                await twin.truncate(2 * FIRST)
                await twin.read(0, SIZE_MAX)
                assert session is twin.session
                await twin.close()


async def test_a_sparse_file_costs_nothing_but_its_manifest(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        node = cluster.nodes[0]
        await node.make_file(b"f")
        session = await node.open(b"f")
        await session.truncate(1 << 40)
        await session.write((1 << 39) + 5, b"in the middle")
        await session.flush()
        await session.release()
        record = (await node.look_up(b"f")).record
        assert await node.contents.read(record, (1 << 39) + 3, 20) == b"\0\0in the middle" + bytes(
            5
        )
        assert await node.contents.read(record, (1 << 40) - 3, 20) == bytes(3)
        assert node.store.usage().owned_bytes < 16 * CHUNK + 256 * KIB


async def test_a_small_change_stores_only_the_chunks_it_touches(
    tmp_path: Path, rng: Random
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        node = cluster.nodes[0]
        await node.make_file(b"f", replicas=1)
        await node.write_file(b"f", rng.randbytes(SIZE_MAX))
        before = node.store.usage().owned_bytes
        session = await node.open(b"f")
        await session.write(FIRST + 7, b"!")
        await session.release()
        grown = node.store.usage().owned_bytes - before
        assert FIRST < grown < FIRST + 8 * KIB  # one chunk and a root
