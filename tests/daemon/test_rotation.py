"""A change of the authority whose coordinator dies after any of its steps: it is gone on with.

The nodes' key rings are real, and follow as `Security` does; etcd is the one in memory.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from modelfs import keys
from modelfs.errors import UserError
from modelfs.ids import NodeId
from modelfs.ports import Put, Txn, TxnResult
from modelfs.testing.metadata import MemoryMetadataStore
from modelfsd.trust import pki
from modelfsd.trust.identity import Identity
from modelfsd.trust.pki import Authority, Certificate, Party
from modelfsd.trust.rotation import Rotation, trust_of
from tests.daemon.node_parts import Cluster, Node, cluster_of
from tests.pki_parts import CLUSTER, key_ring

pytestmark = pytest.mark.expected_logs("authority of the cluster was replaced")


class Dies(Exception):
    """The coordinator's process ends."""


class MortalStore(MemoryMetadataStore):
    """Whoever commits the given decision on the authority dies right after it, or right before."""

    dies_at: int | None = None
    before = False
    on_death: Callable[[], object] = staticmethod(lambda: None)

    async def commit(self, txn: Txn) -> TxnResult:
        decides = any(op.key == keys.TRUST for op in txn.ops)
        if decides and self.dies_at is not None:
            self.dies_at -= 1
            if self.dies_at < 0:
                self.dies_at = None
                self.on_death()
                if not self.before:
                    await super().commit(txn)
                raise Dies
        return await super().commit(txn)


class Rotated:
    """A cluster whose nodes have keys, and follow what is decided on them."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster = cluster
        self.rings = {id: key_ring(id, directory=directory / id) for id in cluster.ids}
        self.old = self.signer_of(cluster.ids[0])
        self.dead: set[NodeId] = set()

    def signer_of(self, id: NodeId) -> Certificate:
        return self.rings[id].load_authority()[0].certificate

    def rotation(self, node: Node) -> Rotation:
        identity = Identity(node.id, CLUSTER, "c")
        return Rotation(identity, self.rings[node.id], self.cluster.etcd, node.mirror)

    async def follow(self, node: Node) -> None:
        """As `Security.run`."""
        while True:
            trust = trust_of(node.mirror)
            if trust is not None and node.id not in self.dead:
                wanted, signer = trust.open()
                authority = self.find(node.id, signer)
                if authority is not None:
                    self.rings[node.id].take(authority, wanted, ())
                    self.rings[node.id].certify(Party(CLUSTER, node.id), ["127.0.0.1"], time.time())
                    self.assert_all_trust_each_other()
                    step = Put(keys.trust_step(node.id), b"%d" % trust.step)
                    await self.cluster.etcd.commit(Txn((), (step, Put(keys.SEQ, b"x"))))
            await trio.sleep(0.01)

    def find(self, id: NodeId, signer: Certificate) -> Authority | None:
        """The key of who signs: ours, or of a member that lives."""
        for other in (id, *(other for other in self.rings if other not in self.dead)):
            ring = self.rings[other]
            if ring.load_authority()[0].certificate == signer:
                return ring.load_authority()[0]
            if other == id and (ours := ring.load_next(signer)) is not None:
                return ours
        return None

    def assert_all_trust_each_other(self) -> None:
        """At every moment, those that live can talk."""
        living = [self.rings[id].load() for id in self.rings if id not in self.dead]
        for one in living:
            for other in living:
                assert any(pki.is_signed_by(one.node, each) for each in other.trusted)

    def assert_done(self) -> None:
        living = [id for id in self.rings if id not in self.dead]
        signers = {pki.fingerprint(self.signer_of(id)) for id in living}
        assert len(signers) == 1 and self.signer_of(living[0]) != self.old
        for id in living:
            assert self.rings[id].load_authority()[1] == (self.signer_of(id),)


@asynccontextmanager
async def rotated(directory: Path, store: MortalStore) -> AsyncIterator[Rotated]:
    async with cluster_of(3, directory, store) as cluster, trio.open_nursery() as nursery:
        found = Rotated(cluster, directory)
        for node in cluster.nodes:
            nursery.start_soon(found.follow, node)
        yield found
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("before", [False, True], ids=["after it", "before it"])
@pytest.mark.parametrize("successor", [0, 1], ids=["itself", "another"])
@pytest.mark.parametrize("decision", [0, 1, 2])
async def test_a_second_command_goes_on_from_where_the_first_died(
    tmp_path: Path, decision: int, successor: int, before: bool
) -> None:
    store = MortalStore()
    async with rotated(tmp_path, store) as found:
        store.dies_at, store.before = decision, before
        with pytest.raises(Dies):
            await found.rotation(found.cluster.nodes[0]).rotate({})
        second = found.cluster.nodes[successor]
        with trio.fail_after(60):
            await second.feed.reached(store.revision)
            await found.rotation(second).rotate({})
        found.assert_done()


@pytest.mark.parametrize("decision", [0, 1])
async def test_a_key_that_dies_with_its_maker_is_replaced(tmp_path: Path, decision: int) -> None:
    store = MortalStore()
    async with rotated(tmp_path, store) as found:
        maker, successor = found.cluster.nodes[0], found.cluster.nodes[1]
        store.dies_at, store.on_death = decision, lambda: found.dead.add(maker.id)
        with pytest.raises(Dies):
            await found.rotation(maker).rotate({})
        await found.cluster.lapse(found.cluster.leases[maker.id])
        with pytest.raises(UserError, match="cannot be reached"):
            await found.rotation(successor).rotate({})
        with trio.fail_after(60):
            await found.rotation(successor).rotate({"force": True})
        found.assert_done()


@pytest.mark.parametrize("second", [0, 1], ids=["on one node", "on two nodes"])
async def test_of_two_commands_at_once_one_is_refused(tmp_path: Path, second: int) -> None:
    store = MortalStore()
    told: list[str] = []
    async with rotated(tmp_path, store) as found:
        rotations = [found.rotation(node) for node in found.cluster.nodes]

        async def rotate(rotation: Rotation) -> None:
            try:
                await rotation.rotate({})
            except UserError as error:
                told.append(str(error))

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(rotate, rotations[0])
                nursery.start_soon(rotate, rotations[second])
        assert len(told) == 1 and "wait until it is done" in told[0]
        found.assert_done()
