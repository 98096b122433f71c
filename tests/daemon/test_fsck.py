"""fsck: missing and bad copies are named, with their ranges, and made anew.

Damage is done to the stores behind the nodes' backs.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing

from modelfs import keys
from modelfs.chunk import ChunkRef, describe
from modelfs.errors import PeerRefused
from modelfs.ids import ROOT_INODE, ChunkId, NodeId
from modelfs.inode import Pin, encode
from modelfs.limits import KIB, MIB
from modelfs.ports import Delete, Put
from modelfs.testing.stores import MemoryPeers
from tests.daemon.fsck_parts import lose, make_directory, world
from tests.daemon.upkeep_parts import make

BLOCK = 64 * KIB  # the first eight chunks of the tests' files


async def test_a_healthy_cluster_is_clean(tmp_path: Path, rng: Random) -> None:
    async with world(tmp_path) as w:
        for number in range(20):
            await make(w.nodes[number % 3], b"f%d" % number, rng.randbytes(200 * KIB))
        await make(w.nodes[0], b"small", b"x" * 100)
        await make_directory(w.nodes[1], b"d")
        for request in ({}, {"repair": True}, {"data": True}):
            checked = await w.fsck(**request)
            assert (checked.code, checked.findings) == (0, [])
            assert checked.answer["versions"] == 20
            assert checked.answer["chunks"] == 20 * 5
            assert checked.answer["inodes"] == 23


async def test_missing_copies_are_named_with_their_ranges_and_made(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with world(tmp_path) as w:
        data = rng.randbytes(6 * BLOCK + 5)
        await make(w.nodes[0], b"a\xff", data)
        await make(w.nodes[0], b"other", rng.randbytes(MIB))
        home = w.copies()
        for index in (1, 2, 5):
            lose(w, data[index * BLOCK : (index + 1) * BLOCK], 1)
        checked = await w.fsck()
        assert checked.code == 4
        (finding,) = checked.findings
        assert finding["paths"] == ["/a\udcff"]
        assert finding["kind"] == "copies"
        assert finding["ranges"] == [[BLOCK, 3 * BLOCK], [5 * BLOCK, 6 * BLOCK]]
        assert finding["chunks"] == 3
        assert "1 of 2 copies" in finding["text"]
        repaired = await w.fsck(repair=True)
        assert (repaired.code, repaired.said()) == (1, [("/a\udcff", "copies", True)])
        assert w.copies() == home
        assert (await w.fsck()).code == 0


async def test_a_manifest_s_own_chunks_count_too(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with world(tmp_path) as w:
        await make(w.nodes[0], b"f", rng.randbytes(MIB))
        record = (await w.nodes[0].look_up(b"f")).record
        assert record.manifest is not None
        root = ChunkId(record.manifest.id)
        first, last = sorted(w.copies()[root])
        w.cluster.stores[first].lose(root)
        checked = await w.fsck(repair=True)
        assert (checked.code, checked.said()) == (1, [("/f", "copies", True)])
        assert checked.findings[0]["ranges"] == [[0, MIB]]
        for id in (first, last):
            w.cluster.stores[id].lose(root)
        checked = await w.fsck(repair=True)
        assert (checked.code, checked.said()) == (4, [("/f", "lost", False)])
        assert checked.findings[0]["ranges"] == [[0, MIB]]
        assert "its manifest" in checked.findings[0]["text"]


async def test_what_nobody_has_is_lost_on_that_range_alone(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with world(tmp_path) as w:
        data = rng.randbytes(3 * BLOCK)
        await make(w.nodes[0], b"f", data)
        lose(w, data[BLOCK : 2 * BLOCK], 2)
        for repair in (False, True):
            checked = await w.fsck(repair=repair)
            assert (checked.code, checked.said()) == (4, [("/f", "lost", False)])
            assert checked.findings[0]["ranges"] == [[BLOCK, 2 * BLOCK]]
            assert "no node that is up has a copy" in checked.findings[0]["text"]
            assert "not asked" not in checked.findings[0]["text"]


@pytest.mark.expected_logs("fails its checksum|cannot be restored")
async def test_with_data_bad_copies_are_found_and_without_they_are_not(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with world(tmp_path) as w, trio.open_nursery() as nursery:
        nursery.start_soon(w.upkeep[w.nodes[0].id].restorer.run)
        data = rng.randbytes(3 * BLOCK)
        await make(w.nodes[0], b"f", data, replicas=3)
        ref, _ = describe(data[:BLOCK])
        for id in w.cluster.ids[:2]:
            w.cluster.stores[id].damage(ref.id)
        assert (await w.fsck()).code == 0
        checked = await w.fsck(data=True, repair=True)
        assert (checked.code, checked.said()) == (1, [("/f", "copies", True)])
        for id in w.cluster.ids:
            assert w.cluster.stores[id].verify(ref.id)
            w.cluster.stores[id].damage(ref.id)
        checked = await w.fsck(data=True, repair=True)
        assert (checked.code, checked.said()) == (4, [("/f", "lost", False)])
        assert checked.findings[0]["ranges"] == [[0, BLOCK]]
        nursery.cancel_scope.cancel()


@pytest.mark.expected_logs("fails its checksum")
async def test_a_bad_copy_that_cannot_be_put_aside_ends_nothing_and_is_never_counted(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    """As on a disk that can be read, here and there, and not be written to."""

    async def refuse(self: MemoryPeers, node: NodeId, ref: ChunkRef) -> None:
        raise PeerRefused(node, "Read-only file system")

    async with world(tmp_path) as w:
        data = rng.randbytes(3 * BLOCK)
        await make(w.nodes[0], b"f", data, replicas=3)
        ref, _ = describe(data[:BLOCK])
        w.cluster.stores[w.cluster.ids[1]].damage(ref.id)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MemoryPeers, "report_damage", refuse)
            checked = await w.fsck(data=True)
        assert (checked.code, checked.said()) == (8, [("/f", "copies", False)])
        assert checked.answer["nodes_silent"] == {"b": "Read-only file system"}
        assert "the bad one on b could not be put aside" in checked.findings[0]["text"]


@pytest.mark.expected_logs("fails its checksum")
async def test_a_node_that_once_did_not_answer_can_still_put_a_bad_copy_aside(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with world(tmp_path) as w:
        data = rng.randbytes(3 * BLOCK)
        await make(w.nodes[0], b"f", data, replicas=3)
        (ref, _), (bad, _) = describe(data[:BLOCK]), describe(data[BLOCK : 2 * BLOCK])
        node, fetch = w.cluster.ids[1], MemoryPeers.fetch
        w.cluster.stores[node].damage(bad.id)
        had_trouble = trio.Event()

        async def trouble(
            self: MemoryPeers,
            whose: NodeId,
            what: ChunkRef,
            offset: int,
            size: int,
            patience: float,
        ) -> memoryview:
            if whose == node and what == ref:
                had_trouble.set()
                raise PeerRefused(node, "Too many open files")
            if whose == node and what == bad:
                await had_trouble.wait()
            return await fetch(self, whose, what, offset, size, patience)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MemoryPeers, "fetch", trouble)
            checked = await w.fsck(data=True, repair=True)
        assert checked.said() == [("/f", "copies", True)]


async def test_a_node_that_is_down_leaves_copies_missing_which_others_take(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with world(tmp_path, 4) as w:
        data = rng.randbytes(MIB)
        await make(w.nodes[0], b"f", data)
        w.cluster.die(w.cluster.ids[3])
        await w.hear()
        lacking = [chunk for chunk, holders in w.copies().items() if len(holders) < 2]
        assert lacking
        checked = await w.fsck()
        assert checked.code == 4
        assert checked.answer["nodes_down"] == ["d"]
        assert checked.findings[0]["chunks"] == len(lacking)
        assert (await w.fsck(repair=True)).code == 1
        assert {len(holders) for holders in w.copies().values()} == {2}
        assert await w.nodes[1].read_file(b"f") == data


async def test_a_node_that_does_not_answer_makes_the_check_incomplete(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with world(tmp_path) as w:
        await make(w.nodes[0], b"f", rng.randbytes(MIB))
        w.cluster.peers.down.add(w.cluster.ids[2])  # though its heartbeat goes on
        checked = await w.fsck()
        assert checked.code == 8
        assert list(checked.answer["nodes_silent"]) == ["c"]


async def test_fewer_nodes_than_replicas_is_no_fault_of_the_files(
    tmp_path: Path, rng: Random
) -> None:
    async with world(tmp_path, 1) as w:
        await make(w.nodes[0], b"f", rng.randbytes(MIB), replicas=3)
        assert (await w.fsck()).code == 0


async def test_retained_and_pinned_versions_are_checked(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    async with world(tmp_path) as w:
        data = rng.randbytes(2 * BLOCK)
        await make(w.nodes[0], b"f", data)
        record = (await w.nodes[0].look_up(b"f")).record
        assert record.manifest is not None
        await w.nodes[0].write_file(b"f", b"new")
        lose(w, data[:BLOCK], 1)
        checked = await w.fsck()
        assert (checked.code, checked.said()) == (4, [("/f", "copies", False)])
        assert checked.findings[0]["version"] == "retained version 2"
        await w.put(Delete(keys.history(ROOT_INODE, b"f", 2)))
        assert (await w.fsck()).code == 0
        pin = encode(Pin(record.manifest, 2))
        await w.put(Put(keys.pin(w.nodes[1].id, record.manifest.id), pin))
        checked = await w.fsck(repair=True)
        assert checked.code == 1
        assert checked.findings[0]["version"] == "superseded, and open on b"


async def test_what_is_superseded_during_the_check_is_no_damage(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    """The chunks of a version go at once here, which a grace would keep for an hour."""
    async with world(tmp_path) as w, trio.open_nursery() as nursery:
        names = [b"f%d" % number for number in range(8)]
        for name in names:
            await make(w.nodes[0], name, rng.randbytes(2 * BLOCK))

        async def rewrite() -> None:
            while True:
                for name in names:
                    before = set(w.copies())
                    await w.nodes[1].write_file(name, rng.randbytes(2 * BLOCK))
                    record = (await w.nodes[1].look_up(name)).record
                    needed = {record.manifest.id} if record.manifest else set()
                    entries = await w.nodes[1].contents.all_entries(record)
                    needed |= {bytes(entry["id"]) for entry in entries}
                    gone = set(w.copies()) - before - needed
                    for id in w.cluster.ids:
                        for chunk in gone:
                            w.cluster.stores[id].delete(chunk)
                    await trio.sleep(0.01)

        nursery.start_soon(rewrite)
        for _ in range(5):
            checked = await w.fsck()
            assert (checked.code, checked.findings) == (0, [])
        nursery.cancel_scope.cancel()
