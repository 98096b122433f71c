"""A node goes on while etcd takes no changes: its quota is used up, or it gives no answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from modelfs import keys
from modelfs.errors import MetadataUncertain, OutOfSpace, UserError
from modelfs.ids import Epoch, NodeId
from modelfs.inode import decode_node
from modelfs.limits import NODE_LEASE_SECONDS
from modelfs.placement import MEMBERS_MAX, WEIGHT_MAX, Member, make_map
from modelfs.ports import Put, StoreUsage, Txn, TxnResult
from modelfs.testing.metadata import MemoryMetadataStore
from modelfsd.cluster.membership import REPORT_SECONDS, Membership, Self
from modelfsd.metadata.leases import SWEEP_SECONDS
from tests.daemon.node_parts import Node, cluster_of

NO_HEARTBEAT = "etcd takes no heartbeat"
WITHOUT_ETCD = "starting without etcd"


class RefusingStore(MemoryMetadataStore):
    """Answers every commit with an error, as long as there is one."""

    error: Exception | None = None

    async def commit(self, txn: Txn) -> TxnResult:
        if (error := self.error) is not None:
            await trio.lowlevel.checkpoint()
            raise error
        return await super().commit(txn)


def membership_of(node: Node, store: MemoryMetadataStore, free_bytes: int = 1) -> Membership:
    myself = Self(node.id, "renamed", "h", 1, "", "", 3600.0)
    nobody: Any = None  # the peers, who are asked only where a twin may be
    usage = StoreUsage(0, 0, 0, 0, free_bytes, free_bytes)
    return Membership(myself, store, node.namespace, node.leases, nobody, lambda: usage)


def name_in(store: MemoryMetadataStore, node: Node) -> str:
    return decode_node(store._keys[keys.node(node.id)].value).name


@pytest.mark.expected_logs(NO_HEARTBEAT, "could not be given back")
async def test_a_full_etcd_ends_no_node(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    store = RefusingStore()
    async with cluster_of(1, tmp_path, store) as cluster:
        (node,) = cluster.nodes
        membership = membership_of(node, store)
        await membership.register()
        ino = await node.make_file(b"f")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(membership.run)
            session = await node.open(b"f")
            store.error = OutOfSpace("etcd's database has reached its quota")
            await session.release()
            await trio.sleep(4 * REPORT_SECONDS)
            assert await node.namespace.fresh()  # reads go on
            assert node.leases.is_ours(ino)
            store.error = None
            await trio.sleep(3 * SWEEP_SECONDS)
            assert node.mirror.lease(ino) is None
            nursery.cancel_scope.cancel()


@pytest.mark.expected_logs(WITHOUT_ETCD, NO_HEARTBEAT)
@pytest.mark.parametrize("error", [MetadataUncertain("no answer"), OutOfSpace("quota")])
async def test_a_node_that_cannot_register_yet_goes_on_trying(
    tmp_path: Path, virtual_time: trio.testing.MockClock, error: Exception
) -> None:
    store = RefusingStore()
    async with cluster_of(1, tmp_path, store) as cluster:
        (node,) = cluster.nodes
        membership = membership_of(node, store)
        async with trio.open_nursery() as nursery:
            store.error = error
            await membership.keep_registered(nursery.start_soon)
            await trio.sleep(2 * NODE_LEASE_SECONDS)
            store.error = None
            await trio.sleep(2)
            assert name_in(store, node) == "renamed"
            nursery.cancel_scope.cancel()


async def test_a_node_for_which_the_map_has_no_room_is_told_so(tmp_path: Path) -> None:
    store = MemoryMetadataStore()
    async with cluster_of(1, tmp_path, store) as cluster:
        (node,) = cluster.nodes
        others = [Member(NodeId(f"{i:016x}"), "n", 1.0, "") for i in range(MEMBERS_MAX)]
        full = make_map(Epoch(2), others).encode()
        await store.commit(Txn((), (Put(keys.placement_map(Epoch(2)), full),)))
        await node.namespace.fresh()
        with pytest.raises(UserError, match=r"at most 1024 are possible.*modelfs node remove"):
            await membership_of(node, store).register()


async def test_a_disk_without_a_known_end_has_the_largest_weight(tmp_path: Path) -> None:
    store = MemoryMetadataStore()
    async with cluster_of(1, tmp_path, store) as cluster:
        (node,) = cluster.nodes
        await membership_of(node, store, free_bytes=(1 << 63) - 1).register()
        placement = node.mirror.latest_map
        assert placement is not None
        assert [member.weight for member in placement.members] == [WEIGHT_MAX]


@pytest.mark.expected_logs(NO_HEARTBEAT, "was away for too long")
async def test_a_registration_that_was_not_answered_does_not_end_all_writing(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    store = RefusingStore()
    async with cluster_of(1, tmp_path, store) as cluster:
        (node,) = cluster.nodes
        membership = membership_of(node, store)
        await membership.register()
        await node.make_file(b"f")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(membership.run)
            await store.revoke(node.leases.etcd_lease)  # it was cut off, and its lease has lapsed
            store.error = MetadataUncertain("no answer")
            await trio.sleep(NODE_LEASE_SECONDS / 2)
            store.error = None
            await trio.sleep(NODE_LEASE_SECONDS)
            assert name_in(store, node) == "renamed"
            session = await node.open(b"f")  # under the lease that is kept alive
            await session.release()
            nursery.cancel_scope.cancel()
