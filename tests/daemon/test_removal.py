"""What `modelfs node remove` decides, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelfs.errors import UserError
from modelfs.ids import NodeId
from modelfsd.cluster.removal import Removal
from tests.daemon.node_parts import IDS, Cluster, cluster_of


class EtcdMembers:
    """As much of `EtcdStore` as removing needs: its members."""

    def __init__(self) -> None:
        self.left: list[int] = []

    async def members(self) -> list[Any]:
        class Member:
            id, name = 7, IDS[1]

        return [Member()]

    async def remove_member(self, member_id: int) -> None:
        self.left.append(member_id)


def removal(cluster: Cluster, etcd: EtcdMembers, is_ours: bool = True) -> Removal:
    store: Any = etcd
    return Removal(cluster.nodes[0].namespace, store, cluster.ids[0], is_ours)


@pytest.mark.expected_logs("was removed from the cluster|is gone")
@pytest.mark.parametrize("by_name", [True, False])
async def test_a_node_is_refused_and_leaves_map_and_etcd(tmp_path: Path, by_name: bool) -> None:
    async with cluster_of(3, tmp_path) as cluster:
        etcd, gone = EtcdMembers(), cluster.ids[1]
        done = await removal(cluster, etcd).remove({"name": gone[0] if by_name else gone})
        assert done["node"] == gone and etcd.left == [7]
        for node in cluster.nodes:
            await node.feed.reached(cluster.etcd.revision)
            mirror = node.feed.mirror
            assert mirror.revoked() == {gone} and gone not in mirror.nodes
            assert mirror.latest_map is not None and mirror.latest_map.epoch == 2
            assert [member.id for member in mirror.latest_map.members] == [IDS[0], IDS[2]]
        again = await removal(cluster, etcd).remove({"name": gone})
        assert again["node"] == gone, "to ask again does no harm"
        assert cluster.nodes[0].feed.mirror.latest_map == mirror.latest_map


@pytest.mark.expected_logs("was removed from the cluster|is gone")
async def test_a_node_that_is_down_can_be_removed(tmp_path: Path) -> None:
    async with cluster_of(3, tmp_path) as cluster:
        cluster.die(cluster.ids[2])
        etcd = EtcdMembers()
        await removal(cluster, etcd, is_ours=False).remove({"name": cluster.ids[2][0]})
        assert etcd.left == [], "an etcd of the user's own has other members"


async def test_what_cannot_be_removed_is_told(tmp_path: Path) -> None:
    async with cluster_of(3, tmp_path) as cluster:
        ask = removal(cluster, EtcdMembers())
        with pytest.raises(UserError, match=r"(?s)no node is called 'x'.*aaaa  a.*bbbb  b"):
            await ask.remove({"name": "x"})
        with pytest.raises(UserError, match="cannot remove itself"):
            await ask.remove({"name": "a"})
        with pytest.raises(UserError, match="no node is called"):
            await ask.remove({"name": NodeId("../" * 5 + "a")})
