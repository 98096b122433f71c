"""The etcd store when members die, stall or fill up: real members on loopback addresses."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio

from modelfs.errors import MetadataUnavailable, MetadataUncertain, OutOfSpace
from modelfs.ids import Revision
from modelfs.ports import Compare, Delete, Put, Target, Txn
from modelfs.testing.contract_metadata import collect, put
from modelfsd.etcd import channel as etcd_channel
from modelfsd.etcd import process as etcd_process
from modelfsd.etcd import store as etcd
from modelfsd.etcd.channel import Fate, judge
from modelfsd.etcd.http2 import Status
from modelfsd.etcd.member import EtcdMember
from modelfsd.etcd.store import EtcdStore
from modelfsd.lab import processes as lab_processes
from tests.daemon.etcd_parts import cluster

HANG_SECONDS = 120  # a guard only


async def fill(store: EtcdStore) -> None:
    """Put 50 MB."""
    for index in range(200):
        await put(store, b"%d" % index, bytes(256 << 10))


@contextmanager
def paused(member: EtcdMember) -> Iterator[None]:
    """Stop a member's clock, as an overloaded or suspended machine does."""
    pid = member.process.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    assert lab_processes.wait_stopped([pid], 10)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run a test's body under trio, with a guard against hanging."""

    async def guarded() -> None:
        with trio.fail_after(HANG_SECONDS):
            await main()

    trio.run(guarded)


async def put_at_last(store: EtcdStore, key: bytes, value: bytes) -> Revision:
    """Put a key, again and again until etcd says that it is done."""
    while True:
        try:
            return await put(store, key, value)
        except (MetadataUnavailable, MetadataUncertain):
            continue


async def watched_at_last(store: EtcdStore, start: Revision, revision: Revision) -> list[bytes]:
    """The values put from `start` to `revision`; watches again when a watch breaks."""
    values: list[bytes] = []
    while start <= revision:
        try:
            async with store.watch(b"", start) as batches:
                async for batch in batches:
                    values += [event.value for event in batch.events if event.value is not None]
                    start = Revision(batch.revision + 1)
                    if start > revision:
                        break
        except MetadataUnavailable:
            await trio.sleep(0.05)
    return values


async def leader_of(store: EtcdStore, members: list[EtcdMember]) -> EtcdMember:
    """The member that leads. On a busy machine there may be an election under way."""
    while True:
        for member in members:
            with suppress(MetadataUnavailable):
                status = await store.member_status(member.client_endpoint)
                if status.id == status.leader:
                    return member
        await trio.sleep(0.05)


@pytest.mark.etcd
def test_a_member_of_this_machine_is_reached_through_its_socket(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 1) as ([member], store):
            path = member.process.socket_path
            assert path.stat().st_mode & 0o077 == 0
            async with EtcdStore([member.client_endpoint]) as uncertified:
                with pytest.raises(MetadataUnavailable):
                    await uncertified.get(b"a")
                uncertified.reach_through(member.client_endpoint, path)
                start = await put(uncertified, b"a", b"through the socket")
                async with uncertified.watch(b"", start) as batches:
                    assert [event.key for event in await collect(batches, start)] == [b"a"]
            store.reach_through(member.client_endpoint, tmp_path / "not there")
            kv = await store.get(b"a")
            assert kv is not None and kv.value == b"through the socket"

    run(main)


@pytest.mark.etcd
@pytest.mark.parametrize("is_leader", [True, False], ids=["leader", "follower"])
def test_one_of_three_may_be_killed(tmp_path: Path, is_leader: bool) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 3) as (members, store):
            leader = await leader_of(store, members)
            victim = leader if is_leader else next(m for m in members if m is not leader)
            store.set_endpoints([victim.client_endpoint])  # so that it is the preferred one
            start = await put(store, b"a", b"before")
            store.set_endpoints(
                [victim.client_endpoint] + [m.client_endpoint for m in members if m is not victim]
            )
            async with store.watch(b"", start) as batches:
                await collect(batches, start)
                assert victim.process.pid is not None
                os.kill(victim.process.pid, signal.SIGKILL)
                with pytest.raises(MetadataUnavailable):
                    await anext(batches)
            last = await put_at_last(store, b"a", b"after")
            values = await watched_at_last(store, start, last)
            assert values[0] == b"before" and values[-1] == b"after"
            kv = await store.get(b"a")
            assert kv is not None and kv.value == b"after"
            assert store.statistics().watches_lost >= 1

    run(main)


@pytest.mark.etcd
@pytest.mark.parametrize("is_leader", [True, False], ids=["leader", "follower"])
def test_one_of_three_may_stall(tmp_path: Path, is_leader: bool) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 3) as (members, store):
            leader = await leader_of(store, members)
            victim = leader if is_leader else next(m for m in members if m is not leader)
            store.set_endpoints([victim.client_endpoint])
            start = await put(store, b"a", b"before")
            store.set_endpoints(
                [victim.client_endpoint] + [m.client_endpoint for m in members if m is not victim]
            )
            async with store.watch(b"", start) as batches:
                await collect(batches, start)
                with paused(victim):
                    with pytest.raises(MetadataUnavailable, match="sent nothing"):
                        await anext(batches)
                    last = await put_at_last(store, b"a", b"after")
                    values = await watched_at_last(store, start, last)
                    assert values[0] == b"before" and values[-1] == b"after"
                    kv = await store.get(b"a")
                    assert kv is not None and kv.value == b"after"

    run(main)


@pytest.mark.etcd
def test_a_commit_without_an_answer_is_uncertain(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 1) as (members, store):
            await put(store, b"a", b"1")  # the connection is there
            with paused(members[0]):
                with pytest.raises(MetadataUncertain):
                    await put(store, b"a", b"2")
                with pytest.raises(MetadataUnavailable):
                    await store.get(b"a")
            kv = await store.get(b"a")
            assert kv is not None and kv.value in (b"1", b"2")
            assert store.statistics().uncertain == 1

    run(main)


@pytest.mark.etcd
def test_a_commit_to_nobody_surely_did_not_happen(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 1) as (members, store):
            await put(store, b"a", b"1")
            await members[0].process.stop()
            with pytest.raises(MetadataUnavailable):
                await put(store, b"a", b"2")
            with pytest.raises(MetadataUnavailable):
                async with store.watch(b"", Revision(1)) as batches:
                    await anext(batches)
            await members[0].resume()
            kv = await store.get(b"a")
            assert kv is not None and kv.value == b"1"

    run(main)


@pytest.mark.etcd
def test_without_a_quorum_writes_fail_and_do_not_hang(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 2) as (members, store):
            await put(store, b"a", b"1")
            await members[1].process.stop()
            store.set_endpoints([members[0].client_endpoint])
            with pytest.raises((MetadataUnavailable, MetadataUncertain)):
                await put(store, b"a", b"2")
            await members[1].resume()
            await put_at_last(store, b"a", b"3")

    run(main)


@pytest.mark.etcd
def test_a_page_that_is_too_large_is_asked_for_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_channel, "RESPONSE_BYTES_MAX", 64 << 10)

    async def main() -> None:
        async with cluster(tmp_path, 1) as (_, store):
            for index in range(40):
                await put(store, b"%02d" % index, bytes(20 << 10))
            _, keys = await store.load(b"")
            assert [kv.key for kv in keys] == [b"%02d" % index for index in range(40)]

    run(main)


@pytest.mark.etcd
def test_a_load_that_history_overtakes_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd, "PAGE_KEYS", 2)

    async def main() -> None:
        async with cluster(tmp_path, 1) as (_, store):
            for index in range(5):
                await put(store, b"%d" % index)
            pages = 0
            ask = store._range

            async def ask_and_compact(request: object) -> object:
                nonlocal pages
                pages += 1
                if pages == 2:  # between the first page and the second
                    await store.compact(await put(store, b"5"))
                return await ask(request)  # type: ignore[arg-type]

            monkeypatch.setattr(store, "_range", ask_and_compact)
            _, keys = await store.load(b"")
            assert [kv.key for kv in keys] == [b"%d" % index for index in range(6)]
            assert pages > 4

    run(main)


@pytest.mark.etcd
def test_a_full_database_is_out_of_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        "--quota-backend-bytes=4194304" if "quota" in option else option
        for option in etcd_process._OPTIONS
    ]
    monkeypatch.setattr(etcd_process, "_OPTIONS", options)

    async def main() -> None:
        async with cluster(tmp_path, 1) as (_, store):
            await put(store, b"0")
            with pytest.raises(OutOfSpace, match="quota"):
                await fill(store)
            await store.commit(Txn((), (Delete(b"0"),)))  # deleting still works
            with pytest.raises(OutOfSpace):  # not so for a change of names: each puts `seq`
                await store.commit(Txn((), (Delete(b"1"), Put(b"seq", b""))))

    run(main)


@pytest.mark.etcd
def test_a_cancelled_call_leaves_nothing_behind(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 1) as (members, store):
            await put(store, b"a", b"1")
            with paused(members[0]), trio.move_on_after(0.1) as scope:
                await store.get(b"a")
            assert scope.cancelled_caught
            created = Compare(b"a", Target.CREATE, Revision(0))
            assert not (await store.commit(Txn((created,), ()))).succeeded

    run(main)


@pytest.mark.parametrize(
    ("code", "text", "fate"),
    [
        ("UNAVAILABLE", "failed to connect to 127.0.0.1:2379: refused", Fate.UNSENT),
        ("UNAVAILABLE", "etcdserver: no leader", Fate.UNSENT),
        ("UNKNOWN", "raft proposal dropped", Fate.UNSENT),
        ("UNAVAILABLE", "etcdserver: request timed out", Fate.UNKNOWN),
        ("UNAVAILABLE", "etcdserver: leader changed", Fate.UNKNOWN),
        ("UNAVAILABLE", "etcdserver: server stopped", Fate.UNKNOWN),
        ("UNAVAILABLE", "the member closed the connection", Fate.UNKNOWN),
        ("UNAVAILABLE", "the member did not take the request", Fate.UNSENT),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", Fate.UNKNOWN),
        ("UNAVAILABLE", "the connection was closed", Fate.UNKNOWN),
        ("RESOURCE_EXHAUSTED", "CLIENT: Received message larger than max (9 vs. 8)", Fate.UNKNOWN),
        ("RESOURCE_EXHAUSTED", "etcdserver: mvcc: database space exceeded", Fate.REFUSED),
        ("RESOURCE_EXHAUSTED", "etcdserver: too many requests", Fate.UNSENT),
        ("INVALID_ARGUMENT", "etcdserver: request is too large", Fate.REFUSED),
        ("INTERNAL", "anything else", Fate.UNKNOWN),
    ],
)
def test_only_what_is_surely_not_done_counts_as_not_done(code: str, text: str, fate: Fate) -> None:
    assert judge(Status[code], text) is fate
