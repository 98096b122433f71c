"""Writes that cannot be committed: who waits for them, what is read, and what is found again."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from modelfs.chunk import Buffer, ChunkRef
from modelfs.errors import OutOfSpace
from modelfs.ids import NodeId
from modelfs.limits import KIB
from modelfs.testing.stores import MemoryPeers
from tests.daemon.node_parts import cluster_of
from tests.daemon.recover_parts import rebuilt

LOST = r"cannot be committed, they are kept|closed with writes that could not be committed"


class FullPeers(MemoryPeers):
    """Peers that have no room."""

    async def put(
        self, node: NodeId, ref: ChunkRef, table: Buffer, data: Buffer, offer: bool = False
    ) -> bool:
        raise OutOfSpace("no room there")


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
