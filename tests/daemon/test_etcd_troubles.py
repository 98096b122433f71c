"""Etcd members whose machine runs short of something: the node does not end with them."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import trio

from modelfs.errors import UserError
from modelfs.ids import NodeId
from modelfs.testing.contract_metadata import put
from modelfsd.cluster import bootstrap as bootstraps
from modelfsd.cluster.announcements import Announcement, Found
from modelfsd.cluster.bootstrap import Bootstrap, Entered
from modelfsd.cluster.cluster_record import read_record
from modelfsd.config import Config
from modelfsd.etcd import process as etcd_process
from modelfsd.etcd.endings import MemberCorrupt
from modelfsd.etcd.member import EtcdMember
from modelfsd.etcd.standing import Standing, StandingRecord
from tests.daemon.etcd_parts import cluster, member_at, new_member, run, until
from tests.loopback import new_address

pytestmark = pytest.mark.etcd


@pytest.mark.expected_logs("etcd.log cannot be moved away")
def test_a_log_that_cannot_be_moved_away_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_process, "LOG_BYTES_MAX", 10)
    monkeypatch.setattr("shutil.copyfile", disk_is_full)
    process = etcd_process.EtcdProcess(tmp_path)
    process.log_path.write_text("a line of the past\n")
    process.bound_log()
    assert process.log_path.read_text() == "a line of the past\n"


@pytest.mark.expected_logs("etcd ended with status -9", "cannot be started", "etcd.pid")
def test_a_full_disk_ends_etcd_and_not_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 1) as (members, store):
            process, find, failures = members[0].process, etcd_process._program, [True]

            def program(name: str, package: str) -> str:
                if failures:
                    failures.clear()
                    disk_is_full()
                return find(name, package)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(members[0].run)
                old_pid = process.pid
                assert old_pid is not None
                with monkeypatch.context() as patch:
                    patch.setattr(etcd_process, "_program", program)
                    patch.setattr(Path, "write_text", disk_is_full)
                    os.kill(old_pid, signal.SIGKILL)

                    async def is_back() -> bool:
                        if process.pid in (None, old_pid):
                            return False
                        await store.get(b"a")
                        return True

                    await until(is_back)
                await members[0].stop()  # ends `run` too

    run(main)


def test_a_full_disk_is_no_damage(tmp_path: Path) -> None:
    member = new_member(tmp_path)
    member.process.log_path.write_text(
        '{"level":"fatal","caller":"etcdserver/raft.go:231","msg":"failed to save Raft hard state '
        'and entries","error":"write /s/etcd/member/wal/0-0.wal: no space left on device"}\n'
    )
    error = member._exit_error()
    assert not isinstance(error, MemberCorrupt) and "delete" not in str(error)


def disk_is_full(*_: object, **__: object) -> None:
    """What writing does then."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Killed(Exception):
    """The node ended here, and nothing after it was done."""


class Alone:
    """As much of `Discovery` as founding needs, where nobody is announced."""

    async def announce(self, announcement: Announcement) -> None:
        await trio.lowlevel.checkpoint()

    async def browse_for(self, seconds: float) -> list[Found]:
        return self.snapshot()

    def snapshot(self) -> list[Found]:
        return []


async def enter(state_dir: Path, address: str) -> Entered:
    unused: Any = None
    config = Config(state_dir / "mnt", state_dir, "gpu", (address, 7420), unused)
    alone: Any = Alone()
    return await Bootstrap(config, alone, unused).enter()


def killed(*_: object, **__: object) -> None:
    raise Killed


forget = EtcdMember.forget


def forget_and_die(member: EtcdMember) -> None:
    forget(member)
    raise Killed


def stepping_back(monkeypatch: pytest.MonkeyPatch) -> None:
    rival = UserError("there is a cluster on this network already")
    monkeypatch.setattr(bootstraps, "rival_of", lambda claim, discovery: rival)


@pytest.mark.expected_logs("was not finished here")
@pytest.mark.parametrize("where", ["after etcd", "stepping back"])
def test_a_founding_that_died_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    async def main() -> None:
        address = new_address()
        with monkeypatch.context() as patch:
            if where == "after etcd":
                patch.setattr(bootstraps, "found_in", killed)
            else:
                stepping_back(patch)
                patch.setattr(EtcdMember, "forget", forget_and_die)
            with pytest.raises(Killed):
                await enter(tmp_path, address)
        entered = await enter(tmp_path, address)
        assert entered.member is not None
        try:
            async with entered.store as store:
                record = await read_record(store)
                assert record is not None and record.id == entered.identity.cluster
        finally:
            await entered.member.stop()

    run(main)
    kept = list(tmp_path.glob("etcd.unfinished-*/member"))
    assert len(kept) == (where == "after etcd")  # nothing of etcd's is deleted on a guess


def test_etcd_of_a_node_that_has_lost_its_name_is_kept(tmp_path: Path) -> None:
    async def main() -> None:
        address = new_address()
        entered = await enter(tmp_path, address)
        assert entered.member is not None
        async with entered.store:
            await entered.member.stop()
        kept = sorted((tmp_path / "etcd").rglob("*"))
        (tmp_path / "node.json").unlink()
        with pytest.raises(UserError, match=r"node.json.*restore it, or move"):
            await enter(tmp_path, address)
        assert kept and sorted((tmp_path / "etcd").rglob("*")) == kept

    run(main)


def test_a_voter_that_died_before_it_knew_is_missed_by_nobody_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 1) as (_, store):
            name, address = NodeId("f" * 16), new_address()
            joiner, write = member_at(tmp_path / name, name, address), StandingRecord.write

            def write_or_die(record: StandingRecord, standing: Standing, id: int = 0) -> None:
                if standing is Standing.MEMBER:
                    raise Killed
                write(record, standing, id)

            with monkeypatch.context() as patch:
                patch.setattr(StandingRecord, "write", write_or_die)
                try:
                    with pytest.raises(ExceptionGroup):
                        await joiner.join(store)
                finally:
                    await joiner.stop()
            infos = await store.members()
            assert len(infos) == 2 and not any(info.is_learner for info in infos)
            again = member_at(tmp_path / name, name, address)
            try:
                assert await again.come_back(), "without it there is no majority"
                await put(store, b"a", b"goes on")
                assert again.standing is Standing.MEMBER
            finally:
                await again.stop()

    run(main)


@pytest.mark.expected_logs("was not finished", "removing etcd member .* left over from before")
def test_who_died_as_a_learner_is_no_voter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 1) as (_, store):
            name, address = NodeId("f" * 16), new_address()
            joiner = member_at(tmp_path / name, name, address)
            with monkeypatch.context() as patch:
                patch.setattr(EtcdMember, "_promoted", killed)
                try:
                    with pytest.raises(ExceptionGroup):
                        await joiner.join(store)
                    assert await joiner._serves_within(60)
                finally:
                    await joiner.stop()
            again = member_at(tmp_path / name, name, address)
            try:
                assert not await again.come_back() and not again.process.is_running
                await again.join(store)
                assert again.standing is Standing.MEMBER
            finally:
                await again.stop()

    run(main)
