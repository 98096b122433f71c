"""Writes that cannot be committed: who waits for them, what is read, and what is found again."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing

from modelfs import changes
from modelfs.chunk import Buffer, ChunkRef
from modelfs.errors import OutOfSpace, WriteLost
from modelfs.ids import ROOT_INODE, NodeId
from modelfs.limits import KIB, MIB
from modelfs.ports import Txn, TxnResult
from modelfs.testing.metadata import MemoryMetadataStore
from modelfs.testing.stores import MemoryPeers
from modelfsd.writing import staging
from modelfsd.writing.layout import read_description
from tests.daemon.node_parts import cluster_of
from tests.daemon.recover_parts import rebuilt

LOST = r"cannot be committed, they are kept|closed with writes that could not be committed"


class FullPeers(MemoryPeers):
    """Peers that have no room."""

    async def put(
        self, node: NodeId, ref: ChunkRef, table: Buffer, data: Buffer, offer: bool = False
    ) -> bool:
        raise OutOfSpace("no room there")


class LateStore(MemoryMetadataStore):
    """An etcd whose next answer comes when a lease has ended too, as all nodes know by then."""

    doomed = 0

    async def commit(self, txn: Txn) -> TxnResult:
        result = await super().commit(txn)
        if self.doomed:
            lease, self.doomed = self.doomed, 0
            self.expire(lease)
            await trio.testing.wait_all_tasks_blocked()
        return result


@pytest.mark.expected_logs(LOST)
@pytest.mark.parametrize("starts_over", [False, True])
async def test_many_writes_wait_for_another_writer_no_longer_than_one(
    tmp_path: Path, virtual_time: trio.testing.MockClock, starts_over: bool
) -> None:
    """The kernel sends dirty pages in many requests at once, and close() waits for all of them."""
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await one.make_file(b"f")
        session = one.writer.session_of(await one.look_up(b"f"))
        if starts_over:
            session.start_over()
            await two.write_file(b"f", b"theirs")
            await trio.sleep(1)
        other = await two.open(b"f")
        begun = trio.current_time()
        async with trio.open_nursery() as nursery:
            for offset in range(0, 4 * MIB, MIB):
                nursery.start_soon(session.write, offset, bytes(MIB))
        assert trio.current_time() - begun == pytest.approx(one.lock_wait_seconds, abs=1)
        with pytest.raises(WriteLost, match="another node went on writing it"):
            await session.flush()
        await session.release()
        await other.release()


@pytest.mark.expected_logs(LOST)
async def test_who_can_commit_nothing_keeps_no_other_writer_away(
    tmp_path: Path, virtual_time: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await one.make_file(b"f")
        session = await one.open(b"f")

        def full(*args: object) -> None:
            raise OutOfSpace("no room")

        with monkeypatch.context() as patch:
            patch.setattr(staging, "write_at", full)
            with pytest.raises(OutOfSpace):
                await session.write(0, bytes(5000))
        await one.write_file(b"f", b"again")  # the program tries once more, the old handle open
        await two.write_file(b"f", b"elsewhere")
        assert await one.read_file(b"f") == b"elsewhere"
        with pytest.raises(WriteLost):
            await session.flush()
        await session.release()
        await trio.sleep(1)
        assert one.mirror.lease(session.inode.ino) is None


@pytest.mark.expected_logs(LOST)
@pytest.mark.parametrize("piece_bytes", [10 * KIB, 60 * KIB])
@pytest.mark.parametrize("is_here", [True, False])
async def test_what_could_not_be_replicated_is_read_and_recovered_whole(
    tmp_path: Path,
    rng: Random,
    monkeypatch: pytest.MonkeyPatch,
    piece_bytes: int,
    is_here: bool,
) -> None:
    """Also where one copy was made, which took the staging file, and what is written later."""
    async with cluster_of(2, tmp_path, peers=FullPeers) as cluster:
        node = cluster.nodes[0]
        await node.make_file(b"f")
        session = await node.open(b"f")

        def full(*args: object) -> None:
            raise OutOfSpace("no room here")

        if not is_here:
            monkeypatch.setattr(node.store, "adopt", full)
        data = bytearray(rng.randbytes(60 * KIB))
        for at in range(0, len(data), piece_bytes):
            await session.write(at, data[at : at + piece_bytes])
        with pytest.raises(OutOfSpace):
            await session.flush()
        assert bytes(await session.read(0, len(data))) == data
        for at in (100, 60 * KIB, 62 * KIB):
            await session.write(at, b"later")
            data.extend(bytes(max(0, at + 5 - len(data))))
            data[at : at + 5] = b"later"
        assert bytes(await session.read(0, len(data))) == data
        await session.release()
        (kept,) = node.writer.lost_dir.iterdir()
        assert rebuilt(node.state_dir, kept.name, cluster) == data


@pytest.mark.expected_logs("etcd is out of reach")
@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("lapses", [True, False])
async def test_an_unlinked_file_needs_no_lease(
    tmp_path: Path, is_known: bool, lapses: bool
) -> None:
    """Nobody else will ever see its bytes, so there is nothing to lose."""
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        session = await node.open(b"f")
        await session.write(0, b"x" * 5000)
        await node.namespace.change(lambda m: changes.remove(m, ROOT_INODE, b"f", False, 1))
        if is_known:
            await session.flush()
        if lapses:
            await cluster.lapse(cluster.leases[node.id])
        node.feed.detach()
        await session.write(5000, b"y")
        await session.flush()
        assert await session.read(4999, 2) == b"xy"
        await session.release()
        assert session.failure is None
        assert not list(node.writer.lost_dir.iterdir())


@pytest.mark.expected_logs(LOST)
async def test_who_wrote_before_his_lease_lapsed_cannot_start_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one, two = cluster.nodes
        await one.make_file(b"f")
        session = one.writer.session_of(await one.look_up(b"f"))
        session.start_over()
        write = session.copy.write

        async def slow(offset: int, data: Buffer) -> list[int]:
            await cluster.lapse(cluster.leases[one.id])
            return await write(offset, data)

        with monkeypatch.context() as patch:
            patch.setattr(session.copy, "write", slow)
            await session.write(0, b"mine")
        one.leases.etcd_lease = await cluster.etcd.grant(10)
        await two.write_file(b"f", b"theirs")
        await session.write(4, b"more")
        with pytest.raises(WriteLost, match="another node wrote it first"):
            await session.flush()
        await session.release()
        await one.write_file(b"f", b"next")
        assert await two.read_file(b"f") == b"next"


@pytest.mark.expected_logs(LOST, "not committed at stop: .* the disk is broken")
async def test_at_a_stop_a_disk_error_of_one_file_is_no_loss_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        sessions = []
        for name in (b"one", b"two", b"three"):
            await node.make_file(name)
            sessions.append(await node.open(name))
            await sessions[-1].write(0, name * 2000)

        async def fail(*args: object) -> None:
            raise OSError(5, "the disk is broken")

        monkeypatch.setattr(sessions[1].copy, "staged_positions", lambda: [0])
        monkeypatch.setattr(sessions[1].copy, "seal", fail)
        await node.writer.flush_all()
        for session in sessions:
            await session.release()
        assert await node.read_file(b"one") == b"one" * 2000
        assert await node.read_file(b"three") == b"three" * 2000


@pytest.mark.parametrize("moment", range(8))
async def test_an_unlinked_file_that_is_closed_while_it_is_written_down_leaves_nothing(
    tmp_path: Path, moment: int
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        session = await node.open(b"f")
        await session.write(0, b"small")
        await node.namespace.change(lambda m: changes.remove(m, ROOT_INODE, b"f", False, 1))
        await session.flush()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.spill)
            for _ in range(moment):
                await trio.lowlevel.checkpoint()
            await session.release()
        assert not node.writer.open_sessions
        assert not list(node.writer.staging_dir.iterdir())


@pytest.mark.expected_logs("cannot be committed, they are kept")
async def test_a_lease_that_lapses_right_after_the_commit_fails_no_close(tmp_path: Path) -> None:
    """A watch that catches up after a pause tells of both at once."""
    async with cluster_of(2, tmp_path, LateStore()) as cluster:
        one, two = cluster.nodes
        await one.make_file(b"f")
        session = await one.open(b"f")
        await session.write(0, b"data" * 2000)
        assert isinstance(cluster.etcd, LateStore)
        cluster.etcd.doomed = cluster.leases[one.id]
        await session.flush()
        await session.flush()  # of another descriptor
        one.leases.etcd_lease = await cluster.etcd.grant(10)
        await session.write(0, b"more")
        await session.flush()
        await session.release()
        assert session.failure is None
        assert await two.read_file(b"f") == b"more" + b"data" * 1999
        assert not list(one.writer.lost_dir.iterdir())


@pytest.mark.expected_logs("cannot be committed, they are kept")
async def test_what_is_written_after_such_a_commit_is_not_called_lost(
    tmp_path: Path, inline_threads: None
) -> None:
    async with cluster_of(2, tmp_path, LateStore()) as cluster:
        one = cluster.nodes[0]
        await one.make_file(b"f")
        session = await one.open(b"f")
        await session.write(0, b"data" * 2000)
        assert isinstance(cluster.etcd, LateStore)
        cluster.etcd.doomed = cluster.leases[one.id]
        one.leases.etcd_lease = await cluster.etcd.grant(10)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.flush)
            await trio.lowlevel.checkpoint()
            nursery.start_soon(session.write, 0, bytes(range(256)) * 4 * KIB)
        await trio.testing.wait_all_tasks_blocked()
        (directory,) = one.writer.staging_dir.iterdir()
        assert not read_description(directory).is_lost
        await session.flush()
        await session.release()
        assert await one.read_file(b"f") == bytes(range(256)) * 4 * KIB
