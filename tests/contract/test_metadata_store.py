"""The metadata contract, run by the memory store and by real etcd; and both against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from random import Random

import pytest
import trio

from modelfs.errors import MetadataUnavailable, MetadataUncertain
from modelfs.ids import NodeId, Revision
from modelfs.ports import Compare, Delete, MetadataStore, Put, Target, Txn
from modelfs.testing.contract_metadata import METADATA_CLAIMS, Claim, collect, put
from modelfs.testing.metadata import CommitFault, MemoryMetadataStore
from modelfsd.etcd.member import EtcdMember
from modelfsd.etcd.store import EtcdStore
from tests.loopback import new_address
from tests.pki_parts import etcd_tls

HANG_SECONDS = 60  # a guard only
_prefixes = count()


class MemoryHarness:
    """The memory store, whose time the test moves."""

    def __init__(self) -> None:
        self.store = MemoryMetadataStore()

    async def compact(self, revision: Revision) -> None:
        """Forget the history before `revision`."""
        self.store.compact(revision)

    async def let_lapse(self, lease: int) -> None:
        """Move the clock far enough for every lease."""
        self.store.advance(3600)


class EtcdHarness:
    """Real etcd, under a prefix that nobody has used."""

    def __init__(self, store: EtcdStore) -> None:
        self.store = store

    async def compact(self, revision: Revision) -> None:
        """Forget the history before `revision`."""
        await self.store.compact(revision)

    async def let_lapse(self, lease: int) -> None:
        """Real time does it."""


OpenStore = Callable[[bytes], EtcdStore]


@pytest.fixture(scope="module")
def open_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenStore]:
    """A real etcd on a loopback address of this module's own."""
    directory: Path = tmp_path_factory.mktemp("etcd")
    name, address = NodeId("c0" * 8), new_address()
    tls = etcd_tls(directory, name, address)
    member = EtcdMember(directory, name, address, 12379, 12380, tls)
    try:
        trio.run(member.found)
        endpoint = [member.client_endpoint]
        yield lambda prefix: EtcdStore(endpoint, prefix, tls.credentials())
    finally:
        trio.run(member.stop)


@pytest.mark.parametrize("claim", METADATA_CLAIMS, ids=lambda claim: claim.__name__)
def test_memory(claim: Claim) -> None:
    async def main() -> None:
        with trio.fail_after(HANG_SECONDS):
            await claim(MemoryHarness())

    trio.run(main)


@pytest.mark.etcd
@pytest.mark.parametrize("claim", METADATA_CLAIMS, ids=lambda claim: claim.__name__)
def test_etcd(claim: Claim, open_store: OpenStore) -> None:
    async def main() -> None:
        with trio.fail_after(HANG_SECONDS):
            async with open_store(b"test%d/" % next(_prefixes)) as store:
                await claim(EtcdHarness(store))

    trio.run(main)


def random_txn(random: Random, revisions: list[int]) -> Txn:
    """A transaction over a few keys, valid, with comparisons that hold now and then."""
    keys = random.sample([b"k/%d" % index for index in range(6)], k=random.randint(0, 4))
    ops = tuple(
        Delete(key) if random.random() < 0.4 else Put(key, random.randbytes(3)) for key in keys
    )
    if not ops:
        low, high = sorted(random.sample(range(7), k=2))
        ops = (Delete(b"k/%d" % low, range_end=b"k/%d" % high),)
    compares = tuple(
        Compare(
            b"k/%d" % random.randrange(6),
            random.choice([Target.CREATE, Target.MOD]),
            Revision(random.choice([0, 0, *revisions[-5:]])),
            range_end=random.choice([None, None, b"k/3", b"k/6"]),
        )
        for _ in range(random.choice([0, 0, 1, 2]))
    )
    return Txn(compares, ops)


@pytest.mark.etcd
@pytest.mark.parametrize("seed", range(3))
def test_memory_and_etcd_agree_on_random_transactions(seed: int, open_store: OpenStore) -> None:
    async def main() -> None:
        memory, random = MemoryMetadataStore(), Random(seed)
        async with open_store(b"agree%d/" % seed) as etcd:
            shift = (await etcd.load(b""))[0] - memory.revision
            revisions: list[int] = []
            for _ in range(250):
                txn = random_txn(random, revisions)
                expected = await memory.commit(txn)
                shifted = tuple(
                    Compare(c.key, c.target, shifted_by(c.revision, shift), c.range_end)
                    for c in txn.compares
                )
                result = await etcd.commit(Txn(shifted, txn.ops))
                assert result.succeeded == expected.succeeded
                assert result.revision == expected.revision + shift
                revisions.append(expected.revision)
            assert await facts(etcd, shift) == await facts(memory, 0)

    async def guarded() -> None:
        with trio.fail_after(HANG_SECONDS):
            await main()

    trio.run(guarded)


def shifted_by(revision: int, shift: int) -> Revision:
    """A revision of the memory store, as etcd numbers it; 0 stays 0."""
    return Revision(revision + shift if revision else 0)


async def facts(store: MetadataStore, shift: int) -> tuple[object, object]:
    """All keys and the whole history, in the memory store's numbering."""
    revision, keys = await store.load(b"")
    last = max((kv.mod_revision for kv in keys), default=revision)
    async with store.watch(b"", Revision(2 + shift)) as batches:
        events = await collect(batches, last)
    return (
        [(kv.key, kv.value, kv.create_revision - shift, kv.mod_revision - shift) for kv in keys],
        [(event.key, event.value, event.mod_revision - shift) for event in events],
    )


def test_the_memory_store_breaks_on_demand() -> None:
    async def main() -> None:
        store = MemoryMetadataStore()
        start = await put(store, b"a")
        store.next_commit_fault = CommitFault.APPLIED
        with pytest.raises(MetadataUncertain):
            await put(store, b"b")
        store.next_commit_fault = CommitFault.LOST
        with pytest.raises(MetadataUncertain):
            await put(store, b"c")
        assert [kv.key for kv in (await store.load(b""))[1]] == [b"a", b"b"]
        async with store.watch(b"", start) as batches:
            assert len((await anext(batches)).events) == 2
            store.unavailable = True
            with pytest.raises(MetadataUnavailable):
                await anext(batches)
        with pytest.raises(MetadataUnavailable):
            await store.get(b"a")
        store.unavailable = False
        await put(store, b"d")

    trio.run(main)
