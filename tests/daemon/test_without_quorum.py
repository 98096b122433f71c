"""etcd without its quorum: who waits, how long, and what comes back by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from modelfs.errors import MetadataOutOfReach, MetadataUnavailable
from modelfs.limits import ETCD_REQUEST_SECONDS
from modelfs.ports import KeyValue, Txn, TxnResult
from modelfs.testing.metadata import MemoryMetadataStore
from tests.daemon.node_parts import cluster_of


class LeaderlessStore(MemoryMetadataStore):
    """A member that has lost its quorum: watches hold, requests find nobody for 5 s."""

    is_leaderless = False

    async def commit(self, txn: Txn) -> TxnResult:
        await self._find_leader()
        return await super().commit(txn)

    async def get(self, key: bytes) -> KeyValue | None:
        await self._find_leader()
        return await super().get(key)

    async def _find_leader(self) -> None:
        begun = trio.current_time()
        while self.is_leaderless:
            if trio.current_time() - begun >= ETCD_REQUEST_SECONDS:
                raise MetadataOutOfReach("no leader")
            await trio.sleep(0.25)


@pytest.mark.expected_logs("out of reach", "watch of the namespace broke")
async def test_without_a_quorum_only_the_first_waits(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    store = LeaderlessStore()
    async with cluster_of(1, tmp_path, store) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        store.is_leaderless = True
        begun = trio.current_time()
        waited: dict[str, float] = {}

        async def refresh(name: str, later: float) -> None:
            await trio.sleep(later)
            assert not await node.namespace.fresh()
            waited[name] = trio.current_time() - begun

        async with trio.open_nursery() as nursery:
            nursery.start_soon(refresh, "first", 0)
            nursery.start_soon(refresh, "soon after", 3)
            nursery.start_soon(refresh, "later", 20)
        assert waited == {
            "first": pytest.approx(5, abs=0.5),
            "soon after": pytest.approx(5, abs=0.5),
            "later": pytest.approx(20, abs=0.1),
        }
        begun = trio.current_time()
        with pytest.raises(MetadataUnavailable):
            await node.make_file(b"g")
        assert trio.current_time() == begun
        store.is_leaderless = False
        await trio.sleep(2)
        assert await node.namespace.fresh()
        await node.make_file(b"g")
