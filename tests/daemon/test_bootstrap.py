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
from modelfsd.addresses import HostPort
from modelfsd.cluster import bootstrap as bootstraps
from modelfsd.cluster.announcements import Announcement, Found
from modelfsd.cluster.bootstrap import Bootstrap, Entered
from modelfsd.cluster.cluster_record import ClusterRecord
from modelfsd.config import Config
from modelfsd.trust import identity as identities
from modelfsd.trust import pki
from modelfsd.trust.joining import FORMAT, Applicant, Unreachable, Welcome
from modelfsd.trust.pki import Party
from modelfsd.trust.tls import Tls
from modelfsd.trust.tokens import new_token
from tests.pki_parts import authority

OURS, THEIRS = ClusterId("c" * 16), ClusterId("d" * 16)
ENDPOINT = "10.0.0.1:7421"


class Network:
    """Who answers: announcements, infos by address, and etcds by endpoint."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[Found] = []
        self.announced: list[Announcement] = []
        self.asked: list[HostPort] = []
        self.authority = authority(OURS)
        self.infos: dict[tuple[str, int], dict[str, Any]] = {}
        self.etcds: dict[str, MemoryMetadataStore] = {}
        network = self

        class Store:
            """As much of `EtcdStore` as entering needs."""

            def __init__(self, endpoints: Sequence[str], credentials: object) -> None:
                self.endpoints, self.credentials = tuple(endpoints), credentials

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

    async def announce(self, announcement: Announcement) -> None:
        self.announced.append(announcement)

    async def browse_for(self, seconds: float) -> list[Found]:
        await trio.sleep(seconds)
        return self.found

    def snapshot(self) -> list[Found]:
        return self.found

    async def fetch_info(self, tls: Tls, host: str, port: int) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        if (host, port) not in self.infos:
            raise PeerUnavailable(NodeId("?"), "connection refused")
        return self.infos[host, port]

    async def cluster(self, id: ClusterId, name: str, endpoint: str, format: int = FORMAT) -> None:
        """A cluster whose record is behind an endpoint."""
        self.etcds[endpoint] = MemoryMetadataStore()
        record = msgspec.msgpack.encode(ClusterRecord(id, name, format, 1.0))
        await self.etcds[endpoint].commit(Txn((), (Put(keys.CLUSTER, record),)))

    def node(self, cluster: ClusterId, name: str, port: int) -> Found:
        """A node that is announced, and answers members."""
        info = {"cluster": cluster, "endpoints": [ENDPOINT], "format": FORMAT, "time": time.time()}
        if cluster == OURS:
            self.infos["10.0.0.1", port] = info
        found = Found(NodeId("e" * 16), cluster, name, "10.0.0.1", port, 0, "", 1)
        self.found.append(found)
        return found

    def let_in(self, applicant: Applicant, address: HostPort) -> Welcome:
        """What a member answers to JOIN."""
        self.asked.append(address)
        if address not in self.infos:
            raise Unreachable(f"{address[0]}: connection refused")
        ours = self.authority
        party = Party(OURS, applicant.node)
        node, client = pki.issue(ours, applicant.key.public_key(), party, [], time.time())
        return Welcome(
            FORMAT, OURS, "lab", True, pki.to_der(node), pki.to_der(client),
            pki.to_der(ours.certificate), pki.key_to_pem(ours.key), [pki.to_der(ours.certificate)],
            [], [ENDPOINT],
        )  # fmt: skip


TOKEN, _ = new_token(
    OURS, pki.fingerprint(authority(OURS).certificate), [("10.0.0.1", 1)], 0.0, 1.0, 1
)


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
    return await Bootstrap(config, discovery, network.fetch_info, network.let_in).enter()


async def join(network: Network, state_dir: Path, endpoint: str) -> Entered:
    """A member of OURS, whose etcd is the user's own."""
    await network.cluster(OURS, "lab", endpoint)
    network.node(OURS, "lab", 1)
    return await enter(network, state_dir, etcd=(endpoint,), join=TOKEN)


async def test_without_a_token_the_user_is_told_how_to_get_in(
    tmp_path: Path, network: Network, virtual_time: trio.testing.MockClock
) -> None:
    network.node(OURS, "lab", 1)
    network.node(THEIRS, "theirs", 2)
    told = r"(?s)lab .*10.0.0.1:1.*theirs .*10.0.0.1:2.*modelfs token.*mnt --join TOKEN"
    with pytest.raises(UserError, match=told):
        await enter(network, tmp_path)
    with pytest.raises(UserError, match=r"needs a token.*modelfs token.*--join TOKEN"):
        await enter(network, tmp_path, peers=(("10.0.0.1", 1),))
    assert identities.load(tmp_path).cluster == ""
    assert not (tmp_path / "pki").exists() and not network.asked


@pytest.mark.expected_logs("could not become a voter")
async def test_a_token_lets_a_node_in_for_good(
    tmp_path: Path, network: Network, virtual_time: trio.testing.MockClock
) -> None:
    await network.cluster(OURS, "lab", ENDPOINT)
    network.node(THEIRS, "theirs", 9)  # not asked: the token is not of that cluster
    network.node(OURS, "lab", 2)
    entered = await enter(network, tmp_path, join=TOKEN, peers=(("10.0.0.7", 7),))
    assert (entered.identity.cluster, entered.identity.cluster_name) == (OURS, "lab")
    assert identities.load(tmp_path) == entered.identity
    assert entered.identity.endpoints == (ENDPOINT,)
    assert network.asked == [("10.0.0.7", 7), ("10.0.0.1", 1), ("10.0.0.1", 2)]
    keys = entered.keys.load()
    assert keys.node.serial_number == pki.serial_of(entered.identity.node)
    assert pki.addresses_of(keys.node) == {"127.0.0.1"}, "what the member left out is put right"
    again = await enter(network, tmp_path)
    assert again.identity == entered.identity and len(network.asked) == 3
    await enter(network, tmp_path, join=TOKEN)  # as in fstab: it is in already


async def test_a_node_that_missed_a_new_authority_comes_back_with_a_token(
    tmp_path: Path, network: Network
) -> None:
    first = await join(network, tmp_path, "ext")
    network.authority = pki.found_authority(OURS, time.time())
    with_it, _ = new_token(
        OURS, pki.fingerprint(network.authority.certificate), [("10.0.0.1", 1)], 0.0, 1.0, 1
    )
    again = await enter(network, tmp_path, etcd=("ext",), join=with_it)
    assert again.identity == first.identity
    keys = again.keys.load()
    assert keys.trusted == (network.authority.certificate,)
    assert pki.is_signed_by(keys.node, network.authority.certificate)


async def test_members_are_waited_for_and_then_the_user_is_told(
    tmp_path: Path, network: Network, virtual_time: trio.testing.MockClock
) -> None:
    with pytest.raises(UserError, match=r"no node .* can be reached .*refused.*--peer HOST:PORT"):
        await enter(network, tmp_path, join=TOKEN)
    assert trio.current_time() == pytest.approx(bootstraps.JOIN_SECONDS, abs=1)
    assert identities.load(tmp_path).cluster == ""


async def test_a_token_of_another_cluster_is_refused(tmp_path: Path, network: Network) -> None:
    network.etcds["ext"] = MemoryMetadataStore()
    await enter(network, tmp_path, etcd=("ext",))
    with pytest.raises(UserError, match="the join token is of another one"):
        await enter(network, tmp_path, join=TOKEN)
    with pytest.raises(UserError, match="either joins a cluster or founds one"):
        await enter(network, tmp_path / "new", join=TOKEN, new_cluster="lab")


async def test_a_removed_node_is_told_so(tmp_path: Path, network: Network) -> None:
    network.etcds["ext"] = MemoryMetadataStore()
    await enter(network, tmp_path, etcd=("ext",))
    identities.mark_removed(tmp_path)
    with pytest.raises(UserError, match="was removed from the cluster"):
        await enter(network, tmp_path, etcd=("ext",))


async def test_lost_keys_are_told_with_what_to_do(tmp_path: Path, network: Network) -> None:
    network.etcds["ext"] = MemoryMetadataStore()
    await enter(network, tmp_path, etcd=("ext",))
    (tmp_path / "pki" / "ca.key").unlink()
    with pytest.raises(UserError, match="keys of this node are missing"):
        await enter(network, tmp_path, etcd=("ext",))


@pytest.mark.parametrize("fault", [None, *CommitFault])
async def test_an_empty_external_etcd_becomes_a_cluster_with_a_root(
    tmp_path: Path, network: Network, fault: CommitFault | None
) -> None:
    network.etcds["ext"] = MemoryMetadataStore()
    network.etcds["ext"].next_commit_fault = fault
    entered = await enter(network, tmp_path / "one", etcd=("ext",), new_cluster="lab")
    root = await network.etcds["ext"].get(keys.inode(ROOT_INODE))
    assert root is not None and decode_inode(root.value).is_directory
    again = await enter(network, tmp_path / "one", etcd=("ext",))
    assert again.identity == entered.identity
    with pytest.raises(UserError, match=r"holds the cluster lab.*modelfs token"):
        await enter(network, tmp_path / "two", etcd=("ext",))


async def test_two_who_found_at_once_found_one_cluster(tmp_path: Path, network: Network) -> None:
    network.etcds["ext"] = MemoryMetadataStore()
    found: list[Entered] = []
    told: list[UserError] = []

    async def start(name: str) -> None:
        try:
            found.append(await enter(network, tmp_path / name, etcd=("ext",)))
        except UserError as error:
            told.append(error)
            assert not (tmp_path / name / "pki").exists()

    async with trio.open_nursery() as nursery:
        for name in "abc":
            nursery.start_soon(start, name)
    assert len(found) == 1 and len(told) == 2 and "modelfs token" in str(told[0])


async def test_a_state_directory_stays_with_its_cluster(tmp_path: Path, network: Network) -> None:
    await join(network, tmp_path, "ext")
    await network.cluster(THEIRS, "theirs", "other")
    network.etcds["empty"] = MemoryMetadataStore()
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
    await join(network, tmp_path, "ext")
    network.etcds.clear()
    assert (await enter(network, tmp_path, etcd=("ext",))).identity.cluster == OURS
    assert (await enter(network, tmp_path)).identity.cluster == OURS
    with pytest.raises(UserError, match="does not answer"):
        await enter(network, tmp_path / "new", etcd=("ext",))


@pytest.mark.expected_logs("could not become a voter")
async def test_a_node_finds_its_cluster_again_at_a_new_address(
    tmp_path: Path, network: Network, virtual_time: trio.testing.MockClock
) -> None:
    await join(network, tmp_path, "old")
    network.found.clear()
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
