"""Garbage in a real etcd, put by a member: the nodes go on, and nothing is lost by it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from modelfs import keys
from modelfs.ids import InodeNumber
from modelfs.ports import Delete, KeyValue, Put, Txn
from modelfsd.etcd.store import EtcdStore
from modelfsd.etcd.tls import EtcdTls
from modelfsd.lab.cluster import Lab
from modelfsd.lab.state import LabNode
from modelfsd.trust.keyring import KeyRing
from tests.mount.mount_parts import MIB, Dirs, ask, make_whole, refused, wait_until

pytestmark = pytest.mark.fuse

GARBAGE = b"\xc1garbage"
WORDS = [b"", b"zz", b"0000000001", b"0000000001/..", b"0000000001/a/b", b"5" * 16, b"\xff" * 300]
FAMILIES = [
    keys.INODE_PREFIX, keys.DENTRY_PREFIX, keys.DIRTIME_PREFIX, keys.LEASE_PREFIX,
    keys.NODE_PREFIX, keys.MAP_PREFIX, keys.PIN_PREFIX, keys.HISTORY_PREFIX,
    keys.SECURITY_PREFIX, keys.REVOKED_PREFIX,
]  # fmt: skip


def in_etcd(node: LabNode, *ops: Put | Delete, read: bytes = keys.SEQ) -> KeyValue | None:
    """What a member with this node's keys can do: read a key, then put and delete any."""

    async def work() -> KeyValue | None:
        credentials = EtcdTls(KeyRing(node.state_dir)).credentials()
        async with EtcdStore([f"{node.address}:7421"], credentials=credentials) as store:
            row = await store.get(read)
            if ops:
                assert (await store.commit(Txn((), (*ops, Put(keys.SEQ, b"malice"))))).succeeded
            return row

    return trio.run(work)


def unreadable(node: LabNode) -> list[str]:
    """The keys that a node cannot read."""
    return [record["key"] for record in ask(node, "status")["unreadable_records"]]


def wait_for(lab: Lab, condition: Callable[[list[str]], bool], what: str) -> None:
    wait_until(lambda: all(condition(unreadable(node)) for node in lab.nodes), what)


@pytest.mark.expected_logs("cannot be read", "fails with Input/output error")
def test_one_file_answers_eio_and_all_others_as_before(fault_lab: Lab, fault_dirs: Dirs) -> None:
    first, second, third = fault_dirs
    contents = os.urandom(5 * MIB)
    for name in ("bad", "good"):
        (first / name).write_bytes(contents)
    with (second / "bad").open("rb") as opened:
        assert opened.read(100) == contents[:100]
        number = InodeNumber(ask(fault_lab.nodes[0], "info", path=[first.name, "bad"])["ino"])
        key = keys.inode(number)
        before = in_etcd(fault_lab.nodes[0], Put(key, GARBAGE), read=key)
        assert before is not None
        wait_for(fault_lab, lambda found: found == [key.decode()], "each node has found it")
        for directory in (first, second, third):
            assert sorted(os.listdir(directory)) == ["bad", "good"], "it stays listed"
            only_eio(directory)
            assert (directory / "good").read_bytes() == contents
            (directory / "new").write_bytes(b"new")
            (directory / "new").unlink()
        assert opened.read() == contents[100:], "who has it open keeps it"
        fault_lab.kill("n3")
        make_whole(fault_lab)  # a node that starts finds it so
        only_eio(third)
    in_etcd(fault_lab.nodes[0], Put(key, before.value))
    wait_for(fault_lab, lambda found: not found, "each node reads it again")
    for directory in (first, second, third):
        assert (directory / "bad").read_bytes() == contents


def only_eio(directory: Path) -> None:
    """Neither to be looked at, nor opened, nor removed, nor replaced."""
    bad, other = directory / "bad", directory / "other"
    other.write_bytes(b"other")
    attempts: list[Callable[[], object]] = [
        bad.stat, bad.read_bytes, bad.unlink, lambda: bad.rename(directory / "x"),
        lambda: other.rename(bad), lambda: bad.write_bytes(b"x"), lambda: os.link(bad, other),
        lambda: os.truncate(bad, 0), lambda: os.chmod(bad, 0o600),
    ]  # fmt: skip
    for attempt in attempts:
        with refused(errno.EIO):
            attempt()
    other.unlink()


def test_garbage_in_every_family_ends_nothing(fault_lab: Lab, fault_dirs: Dirs) -> None:
    first, second, third = fault_dirs
    (first / "f").write_bytes(b"before")
    node = fault_lab.nodes[1]
    garbage = [family + word for family in FAMILIES for word in WORDS]
    garbage.remove(keys.inode(InodeNumber(1)))
    garbage.append(keys.TRUST)
    try:
        for start in range(0, len(garbage), 50):
            in_etcd(node, *(Put(key, GARBAGE) for key in garbage[start : start + 50]))
        wait_for(fault_lab, lambda found: len(found) == 20, "each node has found it")
        pids = [each.pid for each in fault_lab.nodes]
        for directory in (first, second, third):
            (directory / "f").write_bytes(directory.name.encode())
            assert (third / "f").read_bytes() == directory.name.encode()
        fault_lab.kill("n2")
        make_whole(fault_lab)
        (second / "f").write_bytes(b"after")
        assert (first / "f").read_bytes() == b"after"
        now = [each.pid for each in fault_lab.nodes]
        assert (now[0], now[2]) == (pids[0], pids[2]), "nobody died of it"
    finally:
        for start in range(0, len(garbage), 50):
            in_etcd(node, *(Delete(key) for key in garbage[start : start + 50]))
    wait_for(fault_lab, lambda found: not found, "each node reads everything")
    for each in fault_lab.nodes:
        lines = [
            line for line in each.log_path.read_text().splitlines() if "cannot be read" in line
        ]
        assert 0 < len(lines) < len(garbage), "rate-limited"
