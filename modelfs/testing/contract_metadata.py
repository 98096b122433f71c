"""What every `MetadataStore` must do: the contract, as a list of claims.

Each claim is an async function that takes a `MetadataHarness` around an empty store and fails by
assertion. A test module runs them all against its implementation:

    @pytest.mark.parametrize("claim", METADATA_CLAIMS, ids=lambda claim: claim.__name__)
    def test_memory(claim): ...
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from modelfs.errors import HistoryCompacted, MetadataUnavailable, ProtocolError
from modelfs.ids import Revision
from modelfs.ports import (
    Compare,
    Delete,
    Event,
    KeyValue,
    MetadataStore,
    Put,
    Target,
    Txn,
    TxnResult,
    WatchBatch,
)


class MetadataHarness(Protocol):
    """A store under test, and what the port does not offer."""

    @property
    def store(self) -> MetadataStore:
        """The store; no key under its prefix exists."""
        ...

    async def compact(self, revision: Revision) -> None:
        """Forget the history before `revision`."""
        ...

    async def let_lapse(self, lease: int) -> None:
        """Let time pass until the lease lapses, or begin to."""
        ...


Claim = Callable[[MetadataHarness], Awaitable[None]]


async def put(store: MetadataStore, key: bytes, value: bytes = b"", lease: int = 0) -> Revision:
    """Set one key; returns the revision."""
    result = await store.commit(Txn((), (Put(key, value, lease),)))
    assert result.succeeded
    return result.revision


async def collect(batches: AsyncIterator[WatchBatch], revision: Revision) -> list[Event]:
    """All events up to and including `revision`, with the batches' own rules checked."""
    events: list[Event] = []
    last = 0
    while last < revision:
        batch = await anext(batches)
        assert batch.events and batch.revision == batch.events[-1].mod_revision
        assert batch.events[0].mod_revision > last  # whole revisions: none is in two batches
        events += batch.events
        last = batch.revision
    order = [event.mod_revision for event in events]
    assert order == sorted(order)
    return events


async def a_new_store_is_empty(harness: MetadataHarness) -> None:
    store = harness.store
    revision, keys = await store.load(b"")
    assert revision > 0 and keys == []
    assert await store.get(b"a") is None


async def a_put_is_read_back(harness: MetadataHarness) -> None:
    store = harness.store
    first = await put(store, b"a", b"one")
    assert await store.get(b"a") == KeyValue(b"a", b"one", first, first)
    second = await put(store, b"a", b"two")
    assert second == first + 1
    assert await store.get(b"a") == KeyValue(b"a", b"two", first, second)


async def any_bytes_may_be_key_or_value(harness: MetadataHarness) -> None:
    store = harness.store
    value = bytes(range(256))
    await put(store, b"\x00\xff\x00", value)
    await put(store, b"\xff\xff", b"")
    keys = (await store.load(b""))[1]
    assert [(kv.key, kv.value) for kv in keys] == [(b"\x00\xff\x00", value), (b"\xff\xff", b"")]
    assert [kv.key for kv in (await store.load(b"\xff"))[1]] == [b"\xff\xff"]


async def a_transaction_is_one_revision(harness: MetadataHarness) -> None:
    store = harness.store
    before = await put(store, b"old")
    result = await store.commit(Txn((), (Put(b"b", b"2"), Delete(b"old"), Put(b"a", b"1"))))
    assert result == TxnResult(True, Revision(before + 1))
    _, keys = await store.load(b"")
    assert [(kv.key, kv.mod_revision) for kv in keys] == [
        (b"a", result.revision),
        (b"b", result.revision),
    ]


async def a_failed_comparison_changes_nothing(harness: MetadataHarness) -> None:
    store = harness.store
    revision = await put(store, b"a", b"1")
    held = Compare(b"a", Target.MOD, revision)
    broken = Compare(b"b", Target.MOD, revision)
    result = await store.commit(Txn((held, broken), (Put(b"a", b"2"), Put(b"c", b""))))
    assert result == TxnResult(False, revision)
    assert [kv.value for kv in (await store.load(b""))[1]] == [b"1"]


async def comparisons_see_create_and_mod_revision(harness: MetadataHarness) -> None:
    store = harness.store
    created = await put(store, b"a")
    changed = await put(store, b"a")

    async def holds(target: Target, revision: int, key: bytes = b"a") -> bool:
        compare = Compare(key, target, Revision(revision))
        return (await store.commit(Txn((compare,), ()))).succeeded

    assert await holds(Target.CREATE, created) and not await holds(Target.CREATE, changed)
    assert await holds(Target.MOD, changed) and not await holds(Target.MOD, created)
    assert not await holds(Target.CREATE, 0) and not await holds(Target.MOD, 0)
    assert await holds(Target.CREATE, 0, b"absent") and await holds(Target.MOD, 0, b"absent")
    assert not await holds(Target.MOD, changed, b"absent")


async def a_recreated_key_is_a_new_one(harness: MetadataHarness) -> None:
    store = harness.store
    first = await put(store, b"a")
    await store.commit(Txn((), (Delete(b"a"),)))
    second = await put(store, b"a")
    kv = await store.get(b"a")
    assert kv is not None and kv.create_revision == second == first + 2


async def a_range_comparison_holds_for_every_key(harness: MetadataHarness) -> None:
    store = harness.store

    async def holds(revision: int, start: bytes, end: bytes) -> bool:
        compare = Compare(start, Target.MOD, Revision(revision), range_end=end)
        return (await store.commit(Txn((compare,), ()))).succeeded

    assert await holds(0, b"d/", b"d0") and not await holds(7, b"d/", b"d0")
    result = await store.commit(Txn((), (Put(b"d/a", b""), Put(b"d/b", b""))))
    assert await holds(result.revision, b"d/", b"d0") and not await holds(0, b"d/", b"d0")
    await put(store, b"d/b")
    assert not await holds(result.revision, b"d/", b"d0")
    assert await holds(result.revision, b"d/", b"d/b")  # the end is not part of the range
    assert await holds(0, b"e/", b"e0")


async def a_range_is_deleted_up_to_its_end(harness: MetadataHarness) -> None:
    store = harness.store
    for key in (b"a", b"d/1", b"d/2", b"d0"):
        await put(store, key)
    await store.commit(Txn((), (Delete(b"d/", range_end=b"d0"),)))
    assert [kv.key for kv in (await store.load(b""))[1]] == [b"a", b"d0"]


async def to_delete_what_is_absent_is_no_change(harness: MetadataHarness) -> None:
    store = harness.store
    revision = await put(store, b"a")
    result = await store.commit(Txn((), (Delete(b"b"), Delete(b"c", range_end=b"z"))))
    assert result == TxnResult(True, revision)


async def a_key_put_twice_is_refused(harness: MetadataHarness) -> None:
    store = harness.store
    for ops in (
        (Put(b"a", b"1"), Put(b"a", b"2")),
        (Put(b"a", b"1"), Delete(b"a")),
        (Delete(b"a", range_end=b"b"), Put(b"a", b"1")),
    ):
        try:
            await store.commit(Txn((), ops))
        except ProtocolError:
            continue
        raise AssertionError(f"{ops} was taken")
    assert await store.get(b"a") is None


async def a_request_beyond_etcds_limit_is_refused(harness: MetadataHarness) -> None:
    try:
        await put(harness.store, b"a", bytes(2 << 20))
    except ProtocolError:
        assert await harness.store.get(b"a") is None
        return
    raise AssertionError("2 MiB were taken")


async def many_keys_load_in_order_at_one_revision(harness: MetadataHarness) -> None:
    store = harness.store
    names = [b"n/%05d" % index for index in range(2400)]  # more than two pages
    for start in range(0, len(names), 100):
        ops = tuple(Put(name, bytes(100)) for name in names[start : start + 100])
        result = await store.commit(Txn((), ops))
    await put(store, b"o")
    revision, keys = await store.load(b"n/")
    assert [kv.key for kv in keys] == names
    assert revision >= result.revision + 1


async def a_walk_by_pages_finds_every_key(harness: MetadataHarness) -> None:
    store = harness.store
    wanted = [b"n/%03d" % number for number in range(120)] + [b"n/\xff\xff"]
    for key in (*wanted, b"m", b"n", b"n0", b"o"):
        await put(store, key, key * 2)
    found: list[KeyValue] = []
    while page := await store.page(b"n/", found[-1].key if found else b"", 50):
        assert len(page) <= 50
        found += page
        await put(store, b"n/000")  # behind the walk: it changes nothing
    assert [kv.key for kv in found] == wanted
    assert found[1] == await store.get(wanted[1])
    assert await store.page(b"n/", b"n/\xff\xff\xff", 1) == []


async def a_load_can_leave_values_out(harness: MetadataHarness) -> None:
    store = harness.store
    for key in (b"a", b"n", b"n/1", b"n/2", b"o"):
        await put(store, key, key)
    revision, rows = await store.load(b"", bare=b"n/")
    assert [kv.value for kv in rows] == [b"a", b"n", b"", b"", b"o"]
    whole = await store.load(b"")
    assert whole[0] == revision
    assert [kv.mod_revision for kv in whole[1]] == [kv.mod_revision for kv in rows]


async def a_watch_tells_all_changes_in_order(harness: MetadataHarness) -> None:
    store = harness.store
    start = await put(store, b"w/a", b"1")
    result = await store.commit(Txn((), (Put(b"w/c", b"3"), Put(b"w/b", b"2"))))
    async with store.watch(b"w/", start) as batches:
        deleted = (await store.commit(Txn((), (Delete(b"w/", range_end=b"w0"),)))).revision
        events = await collect(batches, deleted)
    second = result.revision
    assert events == [
        Event(b"w/a", b"1", start, start),
        Event(b"w/c", b"3", second, second),
        Event(b"w/b", b"2", second, second),
        Event(b"w/a", None, Revision(0), deleted),
        Event(b"w/b", None, Revision(0), deleted),
        Event(b"w/c", None, Revision(0), deleted),
    ]


async def a_watch_goes_on_where_another_ended(harness: MetadataHarness) -> None:
    store = harness.store
    start = await put(store, b"w", b"0")
    seen: list[bytes | None] = []
    for index in range(1, 6):
        last = await put(store, b"w", b"%d" % index)
        async with store.watch(b"", start) as batches:
            events = await collect(batches, last)
        seen += [event.value for event in events]
        start = Revision(last + 1)
    assert seen == [b"0", b"1", b"2", b"3", b"4", b"5"]


async def a_watch_waits_for_a_revision_to_come(harness: MetadataHarness) -> None:
    store = harness.store
    revision = await put(store, b"w", b"now")
    async with store.watch(b"w", Revision(revision + 2)) as batches:
        await put(store, b"w", b"next")
        last = await put(store, b"w", b"after")
        events = await collect(batches, last)
    assert [event.value for event in events] == [b"after"]


async def a_watch_sees_only_its_prefix(harness: MetadataHarness) -> None:
    store = harness.store
    start = await put(store, b"a/1")
    await put(store, b"b/1")
    last = await put(store, b"a/2")
    async with store.watch(b"a/", start) as batches:
        events = await collect(batches, last)
    assert [event.key for event in events] == [b"a/1", b"a/2"]


async def a_watch_of_large_history_keeps_revisions_whole(harness: MetadataHarness) -> None:
    store = harness.store
    start = await put(store, b"w/start")
    for _ in range(12):  # 12 revisions of 1 MiB each: far more than one response may hold
        ops = tuple(Put(b"w/%d" % index, bytes(128 << 10)) for index in range(8))
        last = (await store.commit(Txn((), ops))).revision
    async with store.watch(b"w/", start) as batches:
        events = await collect(batches, last)
    assert len(events) == 1 + 12 * 8


async def a_watch_of_compacted_history_says_so(harness: MetadataHarness) -> None:
    store = harness.store
    start = await put(store, b"w", b"1")
    await put(store, b"w", b"2")
    last = await put(store, b"w", b"3")
    await harness.compact(last)
    compacted: HistoryCompacted | None = None
    try:
        async with store.watch(b"w", start) as batches:
            await anext(batches)
    except HistoryCompacted as error:
        compacted = error
    assert compacted is not None and compacted.compact_revision == last
    newer = await put(store, b"w", b"4")
    async with store.watch(b"w", newer) as batches:
        assert [event.value for event in await collect(batches, newer)] == [b"4"]


async def a_revoked_lease_deletes_its_keys_at_once(harness: MetadataHarness) -> None:
    store = harness.store
    lease = await store.grant(30)
    assert await store.keep_alive(lease)
    await put(store, b"free")
    await put(store, b"held/1", lease=lease)
    await put(store, b"held/2", lease=lease)
    await put(store, b"let-go", lease=lease)
    start = await put(store, b"let-go")  # no lease any more
    await store.revoke(lease)
    assert [kv.key for kv in (await store.load(b""))[1]] == [b"free", b"let-go"]
    async with store.watch(b"held/", start) as batches:
        batch = await anext(batches)
    assert sorted(event.key for event in batch.events) == [b"held/1", b"held/2"]
    assert {event.mod_revision for event in batch.events} == {batch.revision}
    assert not await store.keep_alive(lease)
    await store.revoke(lease)  # no error


async def a_lapsed_lease_deletes_its_keys(harness: MetadataHarness) -> None:
    store = harness.store
    lease = await store.grant(1)
    start = await put(store, b"held", lease=lease)
    await harness.let_lapse(lease)
    async with store.watch(b"held", Revision(start + 1)) as batches:
        batch = await anext(batches)
    assert [event.value for event in batch.events] == [None]
    assert not await store.keep_alive(lease)


async def a_put_under_a_lapsed_lease_does_nothing(harness: MetadataHarness) -> None:
    store = harness.store
    lease = await store.grant(30)
    await store.revoke(lease)
    try:
        await store.commit(Txn((), (Put(b"a", b""), Put(b"b", b"", lease))))
    except MetadataUnavailable:
        assert (await store.load(b""))[1] == []
        return
    raise AssertionError("a lapsed lease was used")


METADATA_CLAIMS: tuple[Claim, ...] = (
    a_new_store_is_empty,
    a_put_is_read_back,
    any_bytes_may_be_key_or_value,
    a_transaction_is_one_revision,
    a_failed_comparison_changes_nothing,
    comparisons_see_create_and_mod_revision,
    a_recreated_key_is_a_new_one,
    a_range_comparison_holds_for_every_key,
    a_range_is_deleted_up_to_its_end,
    to_delete_what_is_absent_is_no_change,
    a_key_put_twice_is_refused,
    a_request_beyond_etcds_limit_is_refused,
    many_keys_load_in_order_at_one_revision,
    a_walk_by_pages_finds_every_key,
    a_load_can_leave_values_out,
    a_watch_tells_all_changes_in_order,
    a_watch_goes_on_where_another_ended,
    a_watch_waits_for_a_revision_to_come,
    a_watch_sees_only_its_prefix,
    a_watch_of_large_history_keeps_revisions_whole,
    a_watch_of_compacted_history_says_so,
    a_revoked_lease_deletes_its_keys_at_once,
    a_lapsed_lease_deletes_its_keys,
    a_put_under_a_lapsed_lease_does_nothing,
)
