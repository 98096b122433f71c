"""Etcd members whose machine runs short of something: the node does not end with them."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
import trio

from modelfsd.etcd import process as etcd_process
from modelfsd.etcd.member import MemberCorrupt
from tests.daemon.etcd_parts import cluster, new_member, run, until

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
                        await store.get(b"a")
                        return process.pid not in (None, old_pid)

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
