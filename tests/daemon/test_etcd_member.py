"""Real etcd members on loopback addresses: founding, joining, dying and coming back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from modelfs.errors import UserError
from modelfs.ids import NodeId
from modelfs.testing.contract_metadata import put
from modelfsd.etcd import process as etcd_process
from modelfsd.etcd.endings import MemberCorrupt, MemberRemoved
from modelfsd.etcd.join import JOIN_KEY, Role, wanted_role
from modelfsd.etcd.member import EtcdMember
from modelfsd.etcd.standing import Standing
from modelfsd.etcd.store import MemberInfo
from tests.daemon.etcd_parts import (
    PEER_PORT,
    cluster,
    member_at,
    new_member,
    run,
    until,
)
from tests.loopback import new_address

pytestmark = pytest.mark.etcd


def test_a_founded_member_comes_back_with_its_data(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 1) as (members, store):
            assert members[0].standing is Standing.MEMBER
            await put(store, b"a", b"kept")
            await members[0].stop()
            # The machine got another address meanwhile.
            directory = members[0].process.data_directory.parent
            again = member_at(directory, NodeId(f"{1:016x}"), new_address())
            try:
                await again.resume()
                store.set_endpoints([again.client_endpoint])
                kv = await store.get(b"a")
                assert kv is not None and kv.value == b"kept"
                [info] = await store.members()
                assert info.peer_urls == (again.peer_url,)
                assert info.client_endpoints == (again.client_endpoint,)
            finally:
                await again.stop()

    run(main)


def test_nodes_join_at_the_same_time_and_become_voters(tmp_path: Path) -> None:
    async def main() -> None:
        joiners = [new_member(tmp_path), new_member(tmp_path)]
        try:
            async with cluster(tmp_path, 1) as (_, store):
                async with trio.open_nursery() as nursery:
                    for joiner in joiners:
                        nursery.start_soon(joiner.join, store)
                infos = await store.members()
                assert len(infos) == 3 and not any(info.is_learner for info in infos)
                assert wanted_role(infos) is Role.CLIENT
                assert await store.get(JOIN_KEY) is None
                for joiner in joiners:
                    assert joiner.standing is Standing.MEMBER
                    status = await store.member_status(joiner.client_endpoint)
                    assert status.leader and not status.is_learner
                    await joiner.stop()
        finally:
            for joiner in joiners:
                await joiner.stop()

    run(main)


@pytest.mark.expected_logs("removing etcd learner .* its node died joining")
def test_what_died_while_joining_is_no_obstacle(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 1) as (_, store):
            joiner = new_member(tmp_path)
            try:
                await store.add_learner(f"http://{new_address()}:12380")  # of a node that died
                await joiner.join(store)
                infos = await store.members()
                assert {info.is_learner for info in infos} == {False} and len(infos) == 2
            finally:
                await joiner.stop()

    run(main)


@pytest.mark.expected_logs("removing etcd member .* left over from before")
def test_an_attempt_to_join_that_died_is_made_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 1) as (_, store):
            joiner = new_member(tmp_path)
            try:
                old = await store.add_learner(joiner.peer_url)
                joiner.process.data_directory.mkdir(parents=True)
                (joiner.process.data_directory / "half").write_bytes(b"written")
                await joiner.join(store)
                infos = await store.members()
                assert old.id not in {info.id for info in infos} and len(infos) == 2
            finally:
                await joiner.stop()

    run(main)


@pytest.mark.expected_logs("removing etcd member .* left over from before")
def test_a_voter_whose_disk_was_lost_joins_anew(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 3) as (members, store):
            lost = members[2]
            await lost.stop()
            name = NodeId(lost.process.data_directory.parent.name)
            address = lost.client_endpoint.partition(":")[0]
            fresh = member_at(tmp_path / "new-disk" / name, name, address)
            try:
                assert fresh.standing is Standing.ABSENT
                await fresh.join(store)
                infos = await store.members()
                assert len(infos) == 3 and not any(info.is_learner for info in infos)
            finally:
                await fresh.stop()

    run(main)


@pytest.mark.expected_logs("etcd ended with status -9")
def test_a_killed_child_is_started_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 1) as (members, store):
            await put(store, b"a", b"kept")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(members[0].run)
                old_pid = members[0].process.pid
                assert old_pid is not None
                os.kill(old_pid, signal.SIGKILL)

                async def is_back() -> bool:
                    kv = await store.get(b"a")
                    return kv is not None and members[0].process.pid not in (None, old_pid)

                await until(is_back)
                await members[0].stop()  # ends `run` too

    run(main)


DAEMON = """
import sys, trio
from pathlib import Path
from modelfsd.etcd.tls import EtcdTls
from modelfsd.etcd.member import EtcdMember
from modelfsd.trust.keyring import KeyRing
async def main():
    directory = Path(sys.argv[1])
    tls = EtcdTls(KeyRing(directory))
    member = EtcdMember(directory, sys.argv[2], sys.argv[3], 12379, 12380, tls)
    await member.found()
    print(member.process.pid, flush=True)
    await trio.sleep_forever()
trio.run(main)
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int, EtcdMember]]:
    """Another process that has founded a member; that process, etcd's pid, and our view of it."""
    member = new_member(tmp_path)
    directory = member.process.data_directory.parent
    root = Path(__file__).parents[2]
    child = subprocess.Popen(
        [sys.executable, "-c", DAEMON, directory, directory.name, member.client_endpoint[:-6]],
        env=os.environ | {"PYTHONPATH": f"{root}:{root / 'daemon'}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout is not None
        etcd_pid = int(child.stdout.readline())
        try:
            yield child, etcd_pid, member
        finally:
            child.kill()


def test_etcd_dies_with_its_daemon(daemon: tuple[subprocess.Popen[str], int, EtcdMember]) -> None:
    child, etcd_pid, _ = daemon
    handle = os.pidfd_open(etcd_pid)

    async def main() -> None:
        child.kill()
        await trio.lowlevel.wait_readable(handle)

    try:
        run(main)
    finally:
        os.close(handle)


@pytest.mark.expected_logs("of an earlier daemon still runs")
def test_an_orphan_is_replaced(
    daemon: tuple[subprocess.Popen[str], int, EtcdMember], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_process, "STOP_SECONDS", 1.0)
    child, etcd_pid, member = daemon
    handle = os.pidfd_open(etcd_pid)

    async def main() -> None:
        os.kill(etcd_pid, signal.SIGSTOP)  # stuck: its daemon's death does not end it
        child.kill()
        child.wait()
        try:
            await member.resume()
            await trio.lowlevel.wait_readable(handle)
            assert member.process.pid != etcd_pid
        finally:
            await member.stop()

    try:
        run(main)
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)


def test_a_strange_process_with_the_orphans_number_is_left_alone(tmp_path: Path) -> None:
    process = etcd_process.EtcdProcess(tmp_path)
    with subprocess.Popen(["sleep", "600"]) as stranger:
        try:
            (tmp_path / "etcd.pid").write_text(f"{stranger.pid}\n")
            run(process.end_orphan)
            assert stranger.poll() is None
            assert not (tmp_path / "etcd.pid").exists()
        finally:
            stranger.kill()


def test_a_removed_member_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 2) as (members, store):
            infos = {info.name: info for info in await store.members()}
            removed = members[1]
            member_id = infos[removed.process.data_directory.parent.name].id
            store.set_endpoints([members[0].client_endpoint])

            async def is_removed() -> bool:  # etcd refuses until its peers were up for 5 s
                await store.remove_member(member_id)
                return True

            await until(is_removed)
            with pytest.raises(MemberRemoved, match="removed"):
                await removed.run()

    run(main)


def test_a_damaged_log_is_reported(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 1) as (members, _):
            await members[0].stop()
            for path in (members[0].process.data_directory / "member/wal").glob("*.wal"):
                content = bytearray(path.read_bytes())
                content[200:260] = b"\xff" * 60
                path.write_bytes(content)
            with pytest.raises(MemberCorrupt, match="crc mismatch"):
                await members[0].resume()

    run(main)


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        member = new_member(tmp_path)
        with socket.create_server((member.client_endpoint[:-6], PEER_PORT)):
            with pytest.raises(UserError, match=r"port 12380.*--etcd-peer-port"):
                await member.found()
        await member.stop()

    run(main)


def test_a_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path: None)

    async def main() -> None:
        member = new_member(tmp_path)
        with pytest.raises(UserError, match="apt-get install etcd-server"):
            await member.found()
        await member.stop()

    run(main)


def test_etcd_that_will_not_start_shows_its_last_words(tmp_path: Path) -> None:
    async def main() -> None:
        member = new_member(tmp_path)
        member.process.start(["--no-such-flag"])
        await member.process.wait()
        with pytest.raises(UserError, match="no-such-flag"):
            raise member._exit_error()
        await member.stop()

    run(main)


def test_a_large_log_is_moved_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd_process, "LOG_BYTES_MAX", 10)
    process = etcd_process.EtcdProcess(tmp_path)
    process.log_path.write_text("a line of the past\n")
    process.bound_log()
    assert process.log_path.read_text() == ""
    assert (tmp_path / "etcd.log.1").read_text() == "a line of the past\n"


def test_three_members_are_enough() -> None:
    def info(number: int, is_learner: bool = False) -> MemberInfo:
        return MemberInfo(number, f"n{number}", (f"http://n{number}",), (), is_learner)

    assert wanted_role([]) is Role.MEMBER
    assert wanted_role([info(1), info(2)]) is Role.MEMBER
    assert wanted_role([info(1), info(2), info(3, is_learner=True)]) is Role.CLIENT
    assert wanted_role([info(1), info(2), info(3)], name="n3") is Role.MEMBER
    assert wanted_role([info(1), info(2), info(3)], peer_url="http://n3") is Role.MEMBER
