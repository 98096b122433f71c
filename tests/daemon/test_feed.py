"""The feed: the mirror follows etcd through breaks and compactions, and knows how fresh it is."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing

from modelfs import keys
from modelfs.errors import MetadataUnavailable
from modelfs.ids import InodeNumber
from modelfs.inode import Dentry, encode
from modelfs.limits import ETCD_REQUEST_SECONDS
from modelfs.mirror import Change, Mirror, NameChanged
from modelfs.ports import KeyValue, Put, Txn
from modelfs.testing.metadata import MemoryMetadataStore
from modelfsd.metadata.feed import WAIT_SECONDS, Feed
from modelfsd.metadata.replica_file import ReplicaFile

BROKEN = "the watch of the namespace broke"
AWAY = "out of reach"


class CountingStore(MemoryMetadataStore):
    """Counts reads, and can hold them up."""

    def __init__(self) -> None:
        super().__init__()
        self.gets = 0
        self.gate: trio.Event | None = None

    async def get(self, key: bytes) -> KeyValue | None:
        self.gets += 1
        found = await super().get(key)  # what is true when the read begins
        if self.gate is not None:
            await self.gate.wait()
        return found


async def put_name(store: MemoryMetadataStore, name: bytes, ino: int, operation: bytes) -> None:
    key = keys.dentry(InodeNumber(1), name)
    ops = (Put(key, encode(Dentry(2 + ino, 0o100000))), Put(keys.SEQ, operation))
    await store.commit(Txn((), ops))


def names(mirror: Mirror) -> dict[bytes, int]:
    return {name: child.ino for name, child in mirror.children.get(InodeNumber(1), {}).items()}


async def until_attached(feed: Feed) -> None:
    while not feed.is_attached:  # noqa: ASYNC110 -- the feed is not written for its tests
        await trio.sleep(0.01)


@pytest.mark.expected_logs(BROKEN, AWAY)
async def test_through_breaks_and_compactions_the_mirror_and_the_file_stay_true(
    tmp_path: Path, rng: Random, virtual_time: trio.testing.MockClock
) -> None:
    store = CountingStore()
    replica = ReplicaFile(tmp_path / "r", "c" * 16)
    feed = Feed(store, replica)
    told: dict[bytes, int] = {}

    def listen(changes: list[Change]) -> None:
        for change in changes:
            if isinstance(change, NameChanged):
                assert told.get(change.name) == change.old
                told.pop(change.name, None)
                if change.new is not None:
                    told[change.name] = change.new

    feed.listen(listen)
    async with feed.running():
        for turn in range(120):
            await put_name(store, rng.choice([b"a", b"b", b"c"]), turn, b"op%d" % turn)
            match rng.randrange(8):
                case 0:
                    store.break_watches()
                case 1:
                    store.break_watches()
                    await put_name(store, b"d", turn, b"x")
                    await put_name(store, b"e", turn, b"x")
                    store.compact(store.revision)
                case 2:
                    store.unavailable = True
                    await trio.sleep(rng.choice([0.5, 2 * ETCD_REQUEST_SECONDS]))
                    store.unavailable = False
                case 3:
                    await trio.sleep(1)
            if rng.random() < 0.5:
                await until_attached(feed)
                await feed.fresh()
                assert told == names(feed.mirror)
        await trio.sleep(2)
        truth = Mirror()
        truth.reload(*await store.load(b""))
        assert names(feed.mirror) == names(truth) == told
        assert feed.resyncs > 1
        final = feed.mirror.revision
    found = Mirror()
    found.reload(*replica.load())
    assert found.revision == final and names(found) == names(truth)
    replica.close()


async def test_fresh_shares_reads_but_never_one_that_began_before_the_call(tmp_path: Path) -> None:
    store = CountingStore()
    replica = ReplicaFile(tmp_path / "r", "c" * 16)
    feed = Feed(store, replica)
    async with feed.running():
        await until_attached(feed)
        store.gets, store.gate = 0, trio.Event()
        seen: list[bool] = []

        async def caller(name: bytes | None) -> None:
            await feed.fresh()
            seen.append(name is None or name in names(feed.mirror))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(caller, None)
            await trio.testing.wait_all_tasks_blocked()  # its read is under way
            await put_name(store, b"late", 7, b"x")
            for _ in range(50):  # they share the next read
                nursery.start_soon(caller, b"late")
            await trio.testing.wait_all_tasks_blocked()
            assert store.gets == 1
            store.gate.set()
        assert len(seen) == 51 and all(seen)
        assert store.gets == 2
    replica.close()


async def test_a_cancelled_caller_does_not_spoil_the_read_of_the_others(tmp_path: Path) -> None:
    store = CountingStore()
    replica = ReplicaFile(tmp_path / "r", "c" * 16)
    feed = Feed(store, replica)
    async with feed.running():
        await until_attached(feed)
        store.gate = trio.Event()
        done: list[int] = []

        async def caller(number: int) -> None:
            await feed.fresh()
            done.append(number)

        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as doomed:
                doomed.start_soon(caller, 0)
                await trio.testing.wait_all_tasks_blocked()
                doomed.start_soon(caller, 1)  # opens the next round, and waits for its turn
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(caller, 2)
                nursery.start_soon(caller, 3)
                await trio.testing.wait_all_tasks_blocked()
                doomed.cancel_scope.cancel()
            store.gate.set()
        assert sorted(done) == [2, 3]
    replica.close()


@pytest.mark.expected_logs(BROKEN, AWAY)
async def test_a_short_break_is_waited_out_and_a_long_one_is_not(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    store = CountingStore()
    replica = ReplicaFile(tmp_path / "r", "c" * 16)
    feed = Feed(store, replica)
    async with feed.running():
        await until_attached(feed)
        store.break_watches()
        await trio.testing.wait_all_tasks_blocked()
        await put_name(store, b"meanwhile", 7, b"x")
        await feed.fresh()  # the watch is broken, etcd is there: what was committed must be seen
        assert b"meanwhile" in names(feed.mirror)
        store.unavailable = True
        with pytest.raises(MetadataUnavailable):
            await feed.fresh()
        await trio.sleep(ETCD_REQUEST_SECONDS + 1)
        assert not feed.is_attached
        begun = trio.current_time()
        with pytest.raises(MetadataUnavailable):
            await feed.fresh()
        assert trio.current_time() == begun
        store.unavailable = False
        await trio.sleep(1)
        assert feed.is_attached
        await feed.fresh()
    replica.close()


async def test_a_restart_goes_on_from_the_file_also_without_etcd(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    store = CountingStore()
    await put_name(store, b"a", 1, b"x")
    replica = ReplicaFile(tmp_path / "r", "c" * 16)
    async with Feed(store, replica).running():
        await trio.sleep(1)
        await put_name(store, b"b", 2, b"x")
        await trio.sleep(1)
    replica.close()
    store.unavailable = True
    replica = ReplicaFile(tmp_path / "r", "c" * 16)
    feed = Feed(store, replica)
    async with feed.running():
        assert names(feed.mirror) == {b"a": 3, b"b": 4}
        await trio.sleep(20)
        assert not feed.is_attached
        store.unavailable = False
        await put_name(store, b"c", 3, b"x")
        await trio.sleep(1)
        await feed.fresh()
        assert names(feed.mirror) == {b"a": 3, b"b": 4, b"c": 5}
        assert feed.resyncs == 0
    replica.close()


async def test_a_revision_that_never_comes_is_waited_for_in_bounded_time(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    store = CountingStore()
    replica = ReplicaFile(tmp_path / "r", "c" * 16)
    feed = Feed(store, replica)
    async with feed.running():
        begun = trio.current_time()
        with pytest.raises(MetadataUnavailable):
            await feed.reached(type(store.revision)(10_000))
        assert trio.current_time() - begun == pytest.approx(WAIT_SECONDS)
    replica.close()


@pytest.mark.expected_logs(AWAY)
async def test_what_arrives_as_the_feed_is_detached_is_in_the_file_too(
    tmp_path: Path, virtual_time: trio.testing.MockClock
) -> None:
    store = CountingStore()
    replica = ReplicaFile(tmp_path / "r", "c" * 16)
    feed = Feed(store, replica)
    async with feed.running():
        await until_attached(feed)
        await trio.testing.wait_all_tasks_blocked()
        await put_name(store, b"a", 1, b"x")
        feed.detach()  # the watch has been woken already
        await trio.sleep(1)
        await put_name(store, b"b", 2, b"x")
        await trio.sleep(1)
        assert names(feed.mirror) == {b"a": 3, b"b": 4}
    found = Mirror()
    found.reload(*replica.load())
    assert found.revision == feed.mirror.revision and names(found) == names(feed.mirror)
    replica.close()
