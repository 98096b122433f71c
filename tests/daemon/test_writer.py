"""Write sessions: what is committed, what is refused, and that a failure is never forgotten."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing

from modelfs import changes
from modelfs.errors import OutOfSpace, StaleHandle, WriteLost
from modelfs.ids import ROOT_INODE
from modelfs.limits import KIB, MIB
from modelfsd.storage.replicator import Placements
from modelfsd.writing import staging, working_copy
from tests.daemon.node_parts import Node, cluster_of

LOST = r"cannot be committed, they are kept|closed with writes that could not be committed"


async def test_what_is_flushed_is_read_on_every_node(tmp_path: Path, rng: Random) -> None:
    async with cluster_of(3, tmp_path) as cluster:
        one = cluster.nodes[0]
        for size in (0, 1, 4096, 4097, 300 * KIB, 3 * MIB + 5):
            name, data = b"file-%d" % size, rng.randbytes(size)
            await one.make_file(name)
            await one.write_file(name, data)
            for node in cluster.nodes:
                assert await node.read_file(name) == data
        assert not list((one.state_dir / "staging").iterdir())


async def test_two_handles_share_one_session_and_the_last_one_ends_it(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        first, second = await node.open(b"f"), await node.open(b"f")
        assert first is second and first.handles == 2
        await first.write(0, b"hello")
        await first.release()
        assert first.handles == 1 and node.writer.open_sessions == {first}
        await second.release()
        assert not node.writer.open_sessions
        assert await node.read_file(b"f") == b"hello"


async def test_inodes_are_dropped_when_session_and_kernel_let_go(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        for _ in range(3):
            session = await node.open(b"f")
            await session.write(0, b"x")
            await session.release()
            node.inodes.forget([(session.inode.id, session.inode.lookups)])
        assert len(node.inodes) == 1  # the root


async def test_a_file_opened_again_while_it_is_being_closed_keeps_its_session(
    tmp_path: Path,
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        node = cluster.nodes[0]
        await node.make_file(b"f")
        data = bytearray()
        inode = await node.look_up(b"f")

        async def append(turn: int) -> None:
            session = node.writer.session_of(inode)
            await session.ensure_lease()
            piece = bytes([turn]) * 3
            at = len(data)
            data.extend(piece)
            await session.write(at, piece)
            await session.flush()
            await session.release()

        for turn in range(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(append, turn)
                for _ in range(turn):
                    await trio.lowlevel.checkpoint()
                nursery.start_soon(append, turn + 100)
        assert not node.writer.open_sessions
        assert await cluster.nodes[1].read_file(b"f") == bytes(data)


async def test_an_unlinked_file_can_be_written_and_flushed_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await one.make_file(b"f")
        session = await one.open(b"f")
        await session.write(0, b"x" * 5000)
        await two.feed.fresh()
        await two.namespace.change(lambda m: changes.remove(m, ROOT_INODE, b"f", False, 1))
        await session.flush()
        await session.write(5000, b"y")
        await session.flush()
        assert await session.read(4999, 2) == b"xy"
        await session.release()
        assert session.failure is None
        assert not list((one.state_dir / "staging").iterdir())
        assert not list((one.state_dir / "lost").iterdir())


async def _fail_write(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OutOfSpace("no room")

    monkeypatch.setattr(staging, "write_at", full)


async def _lapse(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    await node.cluster.lapse(node.cluster.leases[node.id])


@pytest.mark.expected_logs(LOST, "could not be written beside")
@pytest.mark.parametrize("disaster", [_fail_write, _lapse])
async def test_after_a_failure_nothing_commits_and_the_bytes_are_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    disaster: Callable[[Node, pytest.MonkeyPatch], Awaitable[None]],
) -> None:
    is_short = disaster is _fail_write
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await one.make_file(b"f")
        await one.write_file(b"f", b"old")
        session = await one.open(b"f")
        await session.write(0, b"n" * 10_000)
        with monkeypatch.context() as patch:
            await disaster(one, patch)
            with pytest.raises(OutOfSpace) if is_short else nullcontext():
                await session.write(10_000, b"more")
        for _ in range(2):
            with pytest.raises(WriteLost) if is_short else nullcontext():
                await session.write(10_004, b"and more")
            with pytest.raises(WriteLost):
                await session.truncate(5)
            with pytest.raises(WriteLost):
                await session.flush()
        with pytest.raises(StaleHandle):
            session.require_sound()
        assert not session.inode.is_current
        await session.release()
        assert await two.read_file(b"f") == b"old"
        (kept,) = (one.state_dir / "lost").iterdir()
        written = b"n" * 10_000 + (b"" if is_short else b"moreand more")
        assert (kept / "0-0").read_bytes() == written
        description = json.loads((kept / "description.json").read_bytes())
        assert description["path"] == "/f" and description["why"]
        # The file itself can be written again.
        one.leases.etcd_lease = await cluster.etcd.grant(10)
        await one.write_file(b"f", b"newer")
        assert await two.read_file(b"f") == b"newer"


@pytest.mark.expected_logs(LOST)
async def test_the_first_bytes_of_who_came_too_late_are_kept(tmp_path: Path) -> None:
    """An empty file is opened without a lease, so another node may write it first."""
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await one.make_file(b"f")
        session = one.writer.session_of(await one.look_up(b"f"))
        await two.write_file(b"f", b"first")
        await session.write(0, b"late")
        await session.write(4, b"r")
        with pytest.raises(WriteLost, match="another node wrote it first"):
            await session.flush()
        await session.release()
        assert await one.read_file(b"f") == await two.read_file(b"f") == b"first"
        (kept,) = (one.state_dir / "lost").iterdir()
        assert (kept / "0-0").read_bytes() == b"later"


async def test_who_starts_over_may_write_in_many_requests_at_once(
    tmp_path: Path, rng: Random
) -> None:
    """All of them find that another node wrote the file, and all are for the emptied one."""
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await one.make_file(b"f")
        session = one.writer.session_of(await one.look_up(b"f"))
        session.start_over()
        await two.write_file(b"f", b"first" * 10 * MIB)
        data = rng.randbytes(3 * MIB)
        async with trio.open_nursery() as nursery:
            for offset in range(0, len(data), MIB):
                nursery.start_soon(session.write, offset, data[offset : offset + MIB])
        await session.flush()
        await session.release()
        assert await one.read_file(b"f") == data
        assert await two.read_file(b"f") == data


@pytest.mark.expected_logs(LOST)
@pytest.mark.parametrize("fate", ["unlinked", "lost"])
async def test_who_reads_a_file_goes_on_reading_what_its_writer_could_not_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fate: str
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        session = await node.open(b"f")
        session.inode.handles = 1  # of a reader; that of the writer is not counted here
        await session.write(0, b"n" * 10_000)
        if fate == "unlinked":
            await node.namespace.change(lambda m: changes.remove(m, ROOT_INODE, b"f", False, 1))
        else:
            await _lapse(node, monkeypatch)
        await session.release()
        assert session.inode.session is session
        assert await session.read(9_999, 10) == b"n"
        session.inode.handles = 0
        await session.end_unless_used()
        assert session.inode.session is None
        assert not list((node.state_dir / "staging").iterdir())
        assert len(list((node.state_dir / "lost").iterdir())) == (fate == "lost")


@pytest.mark.expected_logs(LOST)
async def test_a_lease_that_lapses_during_the_first_write_fails_the_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        session = await node.open(b"f")
        write = session.copy.write

        async def slow(offset: int, data: bytes) -> list[int]:
            await _lapse(node, monkeypatch)
            return await write(offset, data)

        monkeypatch.setattr(working_copy.WorkingCopy, "write", lambda self, o, d: slow(o, d))
        await session.write(0, b"data")
        with pytest.raises(WriteLost):
            await session.flush()
        await session.release()
        assert (await node.look_up(b"f")).record.version == 1


@pytest.mark.expected_logs(LOST)
async def test_a_disk_error_while_sealing_poisons_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        node = cluster.nodes[0]
        await node.make_file(b"f")
        session = await node.open(b"f")
        await session.write(0, b"x" * 60_000)  # not a whole chunk: it is the flush that seals it

        def fail(*args: object) -> None:
            raise OSError(5, "the disk is broken")

        with monkeypatch.context() as patch:
            patch.setattr(working_copy, "read_exactly", fail)
            with pytest.raises(OSError, match="broken"):
                await session.flush()
        with pytest.raises(WriteLost):
            await session.flush()
        await session.release()
        assert (await node.look_up(b"f")).record.version == 1


@pytest.mark.expected_logs(LOST, "could not be written beside", "stay where they are")
async def test_a_full_disk_does_not_end_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inline_threads: None
) -> None:
    """Poisoning wants to write a description, to the very disk that is full."""
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        session = await node.open(b"f")
        await session.write(0, b"x" * 5000)

        def full(*args: object) -> None:
            raise OSError(28, "no space left on device")

        monkeypatch.setattr(staging, "write_at", full)
        monkeypatch.setattr(working_copy.WorkingCopy, "describe_on_disk", full)
        monkeypatch.setattr(working_copy.WorkingCopy, "keep", full)
        with pytest.raises(OSError, match="no space"):
            await session.write(0, b"y")
        await session.release()
        await trio.testing.wait_all_tasks_blocked()
        assert not node.writer.open_sessions


async def test_a_writer_of_an_older_version_is_sent_to_look_again(tmp_path: Path) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await one.make_file(b"f")
        old = await one.look_up(b"f")
        await two.write_file(b"f", b"theirs")
        session = one.writer.session_of(old)
        with pytest.raises(StaleHandle):
            await session.ensure_lease()
        await session.release()
        again = await one.open(b"f")  # with the lease that was kept for it
        assert again.copy.size == 6
        await again.release()


async def test_what_a_killed_daemon_had_staged_is_kept_at_the_next_start(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        await cluster.nodes[0].make_file(b"f")
        session = await cluster.nodes[0].open(b"f")
        await session.write(0, b"unsaved")
        await session.spill()
        (directory,) = (cluster.nodes[0].state_dir / "staging").iterdir()
    async with cluster_of(1, tmp_path) as cluster:
        kept = tmp_path / cluster.ids[0] / "lost" / directory.name
        assert (kept / "0-0").read_bytes() == b"unsaved"
        assert json.loads((kept / "description.json").read_bytes())["path"] == "/f"


async def test_a_small_file_is_committed_from_memory(tmp_path: Path) -> None:
    """Neither a file nor a directory is made on the way, and a failed commit keeps the bytes."""
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        staging_dir = one.state_dir / "staging"
        await one.make_file(b"f")
        session = await one.open(b"f")
        for turn in range(3):
            await session.write(turn * 7, b"a line\n")
            await session.truncate(turn * 7 + 7)
            assert await session.read(turn * 7, 99) == b"a line\n"
            assert not list(staging_dir.iterdir())
            await session.flush()
            assert await two.read_file(b"f") == b"a line\n" * (turn + 1)
        await session.write(4090, b"outgrown")
        assert len(list(staging_dir.iterdir())) == 1
        assert await session.read(0, 21) == b"a line\n" * 3
        await session.release()
        data = await two.read_file(b"f")
        assert data == (b"a line\n" * 3).ljust(4090, b"\0") + b"outgrown"
        assert not list(staging_dir.iterdir())


@pytest.mark.expected_logs(LOST)
async def test_what_small_files_hold_in_memory_is_written_down_soon(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        staging_dir, lost_dir = node.state_dir / "staging", node.state_dir / "lost"
        for name in (b"slow", b"lost"):
            await node.make_file(name)
        slow, lost = await node.open(b"slow"), await node.open(b"lost")
        await slow.write(0, b"slow")
        await trio.sleep(0.5)
        assert not list(staging_dir.iterdir())
        await trio.sleep(2)
        (directory,) = staging_dir.iterdir()
        assert (directory / "0-0").read_bytes() == b"slow"
        await slow.write(4, b"er")
        await slow.release()
        assert await node.read_file(b"slow") == b"slower"
        await lost.write(0, b"lost")
        await cluster.lapse(cluster.leases[node.id])
        await trio.testing.wait_all_tasks_blocked()
        (directory,) = staging_dir.iterdir()
        assert (directory / "0-0").read_bytes() == b"lost"
        await lost.release()
        (directory,) = lost_dir.iterdir()
        assert json.loads((directory / "description.json").read_bytes())["is_lost"]


async def test_a_slow_commit_keeps_no_other_file_in_memory_alone(
    tmp_path: Path, virtual_time: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        for name in (b"slow", b"f"):
            await node.make_file(name)
        slow, other = await node.open(b"slow"), await node.open(b"f")

        async def wait(placements: Placements, replicas: int) -> None:
            await trio.sleep(15)

        monkeypatch.setattr(node.replicator, "sync", wait)
        async with trio.open_nursery() as nursery:
            await slow.write(0, b"slow")
            nursery.start_soon(slow.flush)
            await trio.sleep(2.5)  # long enough that it would be written down, but for its commit
            await other.write(0, b"other")
            await trio.sleep(2.5)
            assert other.copy.has_files
        for session in (slow, other):
            await session.release()
        assert await node.read_file(b"slow") == b"slow"
