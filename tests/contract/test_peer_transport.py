"""The contract of peer transports, in memory and over real sockets on loopback."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio

from modelfs.chunk import describe
from modelfs.ids import ChunkId, NodeId
from modelfs.ports import ChunkStore, Holding
from modelfs.testing.contract_chunks import Open, PeersUnderTest, PeerTransportContract
from modelfs.testing.stores import MemoryChunkStore, MemoryPeers
from modelfsd.peers.client import PeerClient
from modelfsd.peers.server import PeerServer
from tests.pki_parts import tls_of

NODES = (NodeId("1" * 16), NodeId("2" * 16))
CAPACITY_BYTES = 10_000_000
HANG_GUARD_SECONDS = 60


def _stores() -> dict[NodeId, MemoryChunkStore]:
    return {node: MemoryChunkStore(CAPACITY_BYTES) for node in NODES}


def _run(main: Callable[[], Awaitable[None]]) -> None:
    async def guarded() -> None:
        with trio.fail_after(HANG_GUARD_SECONDS):
            await main()

    trio.run(guarded)


class TestMemoryPeers(PeerTransportContract):
    @pytest.fixture
    def run(self) -> Open:
        def run(scenario: Callable[[PeersUnderTest], Awaitable[None]]) -> None:
            stores = _stores()
            peers = MemoryPeers(stores)

            def damage(node: NodeId, chunk: ChunkId) -> None:
                stores[node].damage(chunk)

            def fill(node: NodeId) -> None:
                data = bytes(CAPACITY_BYTES - 2_000)
                stores[node].put(*describe(data), data, Holding.OWNED)

            ports: dict[NodeId, ChunkStore] = dict(stores)
            _run(lambda: scenario(PeersUnderTest(peers, ports, damage, fill, peers.down.add)))

        return run


class TestSocketPeers(PeerTransportContract):
    @pytest.fixture(params=[True, False], ids=["tls", "plain"])
    def run(self, request: pytest.FixtureRequest) -> Open:
        data_tls = request.param

        def run(scenario: Callable[[PeersUnderTest], Awaitable[None]]) -> None:
            stores = _stores()
            servers = {
                node: PeerServer(
                    store,
                    tls_of(node, data_tls=data_tls),
                    "test",
                    lambda is_member: {},
                    lambda letter, member: b"",
                    lambda ref: None,
                )
                for node, store in stores.items()
            }
            addresses = {node: server.start("127.0.0.1", 0) for node, server in servers.items()}

            async def over_sockets() -> None:
                client = PeerClient(tls_of(NodeId("9" * 16), data_tls=data_tls), "client")
                for node, address in addresses.items():
                    client.set_address(node, *address)
                ports: dict[NodeId, ChunkStore] = dict(stores)
                try:
                    await scenario(PeersUnderTest(client, ports, damage, fill, stop))
                finally:
                    client.close()

            def damage(node: NodeId, chunk: ChunkId) -> None:
                stores[node].damage(chunk)

            def fill(node: NodeId) -> None:
                data = bytes(CAPACITY_BYTES - 2_000)
                stores[node].put(*describe(data), data, Holding.OWNED)

            def stop(node: NodeId) -> None:
                servers[node].stop()

            try:
                _run(over_sockets)
            finally:
                for server in servers.values():
                    server.stop()

        return run
