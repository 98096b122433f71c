"""Entering a cluster: what a node does with what strangers say, and what it tells its user.

Discovery and the peers' infos are played by the test, and so is etcd, by the memory store. Real
etcd members are started in `test_etcd_member.py`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio.testing

from modelfs import keys
from modelfs.errors import MetadataUnavailable, PeerUnavailable, UserError
from modelfs.ids import ROOT_INODE, ClusterId, NodeId
from modelfs.inode import decode_inode
from modelfs.ports import KeyValue, Put, Txn, TxnResult
from modelfs.testing.metadata import CommitFault, MemoryMetadataStore
from modelfsd import bootstrap as bootstraps
from modelfsd import identity as identities
from modelfsd.bootstrap import FORMAT, Bootstrap, ClusterRecord, Entered, info_for_strangers
from modelfsd.config import Config
from modelfsd.discovery import Found
from modelfsd.identity import Identity

OURS, THEIRS = ClusterId("c" * 16), ClusterId("d" * 16)
ENDPOINT = "10.0.0.1:7421"


class Network:
    """Who answers: announcements, infos by address, and etcds by endpoint."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[Found] = []
        self.infos: dict[tuple[str, int], dict[str, Any]] = {}
        self.etcds: dict[str, MemoryMetadataStore] = {}
        network = self

        class Store:
            """As much of `EtcdStore` as entering needs."""

            def __init__(self, endpoints: Sequence[str]) -> None:
                self.endpoints = tuple(endpoints)

            def set_endpoints(self, endpoints: Sequence[str]) -> None:
                self.endpoints = tuple(endpoints)

            def _etcd(self) -> MemoryMetadataStore:
                for endpoint in self.endpoints:
                    if endpoint in network.etcds:
                        return network.etcds[endpoint]
                raise MetadataUnavailable("nobody there")

            async def get(self, key: bytes) -> KeyValue | None:
                await trio.lowlevel.checkpoint()
                return await self._etcd().get(key)

            async def commit(self, txn: Txn) -> TxnResult:
                return await self._etcd().commit(txn)

            async def members(self) -> None:
                raise MetadataUnavailable("the test has no members")

        monkeypatch.setattr(bootstraps, "EtcdStore", Store)

    async def browse_for(self, seconds: float, until: object) -> list[Found]:
        await trio.sleep(seconds)
        return self.found

    def snapshot(self) -> list[Found]:
        return self.found

    async def fetch_info(self, host: str, port: int) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        if (host, port) not in self.infos:
            raise PeerUnavailable(NodeId("?"), "connection refused")
        return self.infos[host, port]

    async def cluster(self, id: ClusterId, name: str, endpoint: str, format: int = FORMAT) -> None:
        """A cluster whose record is behind an endpoint."""
        self.etcds[endpoint] = MemoryMetadataStore()
        record = msgspec.msgpack.encode(ClusterRecord(id, name, format, 1.0))
        await self.etcds[endpoint].commit(Txn((), (Put(keys.CLUSTER, record),)))

    def node(
        self, cluster: ClusterId, name: str, port: int, changes: dict[str, Any] | None = None
    ) -> Found:
        """A node that is announced and says how to join."""
        identity = Identity(NodeId("e" * 16), cluster, name)
        self.infos["10.0.0.1", port] = info_for_strangers(identity, (ENDPOINT,))
        self.infos["10.0.0.1", port] |= changes or {}
        found = Found(NodeId("e" * 16), cluster, name, "10.0.0.1", port, 0, "", 1)
        self.found.append(found)
        return found


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    return Network(monkeypatch)


async def enter(network: Network, state_dir: Path, **settings: object) -> Entered:
    os.makedirs(state_dir, exist_ok=True)
    unused: Any = None  # the options of the mount, which is not made here
    chosen: dict[str, Any] = dict(settings)
    listen = ("127.0.0.1", 7420)
    config = Config(state_dir / "mnt", state_dir, "gpu-1", listen, unused, **chosen)
    discovery: Any = network
    return await Bootstrap(config, discovery, network.fetch_info).enter()


@pytest.mark.expected_logs("could not become a voter")
async def test_the_only_cluster_that_is_announced_is_joined(
    tmp_path: Path, network: Network, virtual_time: trio.testing.MockClock
) -> None:
    await network.cluster(OURS, "lab", ENDPOINT)
    network.node(OURS, "lab", 1)
    network.node(OURS, "lab", 2)
    entered = await enter(network, tmp_path)
    assert (entered.identity.cluster, entered.identity.cluster_name) == (OURS, "lab")
    assert identities.load(tmp_path) == entered.identity
    assert entered.identity.endpoints == (ENDPOINT,)


async def test_of_several_clusters_the_user_must_choose(
    tmp_path: Path, network: Network, virtual_time: trio.testing.MockClock
) -> None:
    network.node(OURS, "lab", 1)
    network.node(THEIRS, "theirs", 2)
    with pytest.raises(UserError, match=r"(?s)lab: --peer 10.0.0.1:1.*theirs: --peer 10.0.0.1:2"):
        await enter(network, tmp_path)
    assert identities.load(tmp_path).cluster == ""


async def test_a_peer_is_waited_for_and_then_the_user_is_told(
    tmp_path: Path, network: Network, virtual_time: trio.testing.MockClock
) -> None:
    with pytest.raises(UserError, match=r"10.0.0.9:7: check the address"):
        await enter(network, tmp_path, peers=(("10.0.0.9", 7),))
    assert trio.current_time() == pytest.approx(bootstraps.PEER_SECONDS, abs=1)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"time": time.time() - 4000}, r"clock is .* s away"),
        ({"format": FORMAT + 1}, "install the same version"),
        ({"cluster": "no id"}, "does not say how to join"),
        ({"endpoints": []}, "does not say how to join"),
        ({"endpoints": [7]}, "does not say how to join"),
        ({"endpoints": ["x" * 1000]}, "does not say how to join"),
        ({"time": "noon"}, "does not say how to join"),
        ({"time": float("nan")}, "does not say how to join|clock"),
        ({"cluster": THEIRS}, "does not hold the cluster"),
    ],
)
async def test_a_peer_that_does_not_fit_is_refused(
    tmp_path: Path,
    network: Network,
    virtual_time: trio.testing.MockClock,
    changes: dict[str, Any],
    told: str,
) -> None:
    await network.cluster(OURS, "lab", ENDPOINT)
    network.node(OURS, "lab", 1, changes)
    with pytest.raises(UserError, match=told):
        await enter(network, tmp_path, peers=(("10.0.0.1", 1),))
    assert identities.load(tmp_path).cluster == ""


@pytest.mark.parametrize("fault", [None, *CommitFault])
async def test_an_empty_external_etcd_becomes_a_cluster_with_a_root(
    tmp_path: Path, network: Network, fault: CommitFault | None
) -> None:
    network.etcds["ext"] = MemoryMetadataStore()
    network.etcds["ext"].next_commit_fault = fault
    entered = await enter(network, tmp_path / "one", etcd=("ext",), new_cluster="lab")
    root = await network.etcds["ext"].get(keys.inode(ROOT_INODE))
    assert root is not None and decode_inode(root.value).is_directory
    again = await enter(network, tmp_path / "two", etcd=("ext",))
    assert again.identity.cluster == entered.identity.cluster
    assert again.identity.node != entered.identity.node


async def test_two_who_found_at_once_found_one_cluster(tmp_path: Path, network: Network) -> None:
    network.etcds["ext"] = MemoryMetadataStore()
    found: list[Entered] = []

    async def start(name: str) -> None:
        found.append(await enter(network, tmp_path / name, etcd=("ext",)))

    async with trio.open_nursery() as nursery:
        for name in "abc":
            nursery.start_soon(start, name)
    assert len({entered.identity.cluster for entered in found}) == 1


async def test_a_state_directory_stays_with_its_cluster(tmp_path: Path, network: Network) -> None:
    await network.cluster(OURS, "lab", "ext")
    await network.cluster(THEIRS, "theirs", "other")
    network.etcds["empty"] = MemoryMetadataStore()
    await enter(network, tmp_path, etcd=("ext",))
    with pytest.raises(UserError, match="another --state-dir"):
        await enter(network, tmp_path, etcd=("other",))
    with pytest.raises(UserError, match="holds no cluster"):
        await enter(network, tmp_path, etcd=("empty",))
    with pytest.raises(UserError, match="to found fresh"):
        await enter(network, tmp_path, new_cluster="fresh")
    with pytest.raises(UserError, match="holds the cluster theirs already"):
        await enter(network, tmp_path / "new", etcd=("other",), new_cluster="fresh")
    assert identities.load(tmp_path).cluster == OURS


@pytest.mark.expected_logs("etcd does not answer")
async def test_without_etcd_a_known_node_starts_and_a_new_one_says_why_not(
    tmp_path: Path, network: Network, virtual_time: trio.testing.MockClock
) -> None:
    await network.cluster(OURS, "lab", "ext")
    await enter(network, tmp_path, etcd=("ext",))
    network.etcds.clear()
    assert (await enter(network, tmp_path, etcd=("ext",))).identity.cluster == OURS
    assert (await enter(network, tmp_path)).identity.cluster == OURS
    with pytest.raises(UserError, match="does not answer"):
        await enter(network, tmp_path / "new", etcd=("ext",))


@pytest.mark.expected_logs("could not become a voter")
async def test_a_node_finds_its_cluster_again_at_a_new_address(
    tmp_path: Path, network: Network, virtual_time: trio.testing.MockClock
) -> None:
    await network.cluster(OURS, "lab", "old")
    await enter(network, tmp_path, etcd=("old",))
    network.etcds[ENDPOINT] = network.etcds.pop("old")
    network.node(THEIRS, "theirs", 1)
    network.node(OURS, "lab", 2)
    entered = await enter(network, tmp_path)
    assert entered.store.endpoints == (ENDPOINT,)


async def test_records_of_another_format_are_not_touched(tmp_path: Path, network: Network) -> None:
    await network.cluster(OURS, "lab", "ext", format=FORMAT + 1)
    with pytest.raises(UserError, match="install the version of the other nodes"):
        await enter(network, tmp_path, etcd=("ext",))


async def test_an_etcd_with_something_else_in_it_is_refused(
    tmp_path: Path, network: Network
) -> None:
    network.etcds["ext"] = MemoryMetadataStore()
    await network.etcds["ext"].commit(Txn((), (Put(keys.CLUSTER, b"\xc1 not ours"),)))
    with pytest.raises(UserError, match="is not a record of this version"):
        await enter(network, tmp_path, etcd=("ext",))
