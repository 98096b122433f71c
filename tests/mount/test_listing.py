"""Large directories: every name once, whatever comes and goes meanwhile; and quickly enough."""

from __future__ import annotations

import os
import shutil
import time
from typing import Any

import trio

from modelfs import keys
from modelfs.ids import InodeNumber
from modelfs.inode import Dentry, Inode, encode
from modelfs.limits import MIB, TRANSACTION_OPS_MAX
from modelfs.ports import Delete, Put, Txn
from modelfsd.etcd.store import EtcdStore
from modelfsd.etcd.tls import EtcdTls
from modelfsd.kernel.kernel_inodes import VIEW_BITS
from modelfsd.lab.cluster import Lab
from modelfsd.lab.state import LabNode
from modelfsd.trust.keyring import KeyRing
from tests.mount.mount_parts import Dirs, ask, run

FIRST_INODE = 1 << 36  # numbers that no daemon will hand out during a test


def fill(node: LabNode, parent: InodeNumber, count: int) -> None:
    """Put `count` empty files into a directory, straight into etcd: 2 ms each otherwise."""
    times: dict[str, Any] = dict.fromkeys(("atime_ns", "mtime_ns", "ctime_ns"), time.time_ns())
    record = encode(
        Inode(mode=0o100644, uid=0, gid=0, inline=b"", chunk_bytes=4 * MIB, replicas=2, **times)
    )
    ops: list[Put | Delete] = []
    for number in range(count):
        ino = InodeNumber(FIRST_INODE + number)
        ops.append(Put(keys.inode(ino), record))
        ops.append(Put(keys.dentry(parent, b"file-%06d" % number), encode(Dentry(ino, 0o100000))))
    commit(node, ops)


def empty(node: LabNode, parent: InodeNumber, count: int) -> None:
    """Undo `fill`."""
    ops: list[Put | Delete] = []
    for number in range(count):
        ops.append(Delete(keys.dentry(parent, b"file-%06d" % number)))
        ops.append(Delete(keys.inode(InodeNumber(FIRST_INODE + number))))
    commit(node, ops)


def commit(node: LabNode, ops: list[Put | Delete]) -> None:
    """Carry out many operations, a transaction's worth at a time."""
    status = ask(node, "status")
    endpoints = status["etcd"]["endpoints"]
    credentials = EtcdTls(KeyRing(node.state_dir)).credentials()
    step = TRANSACTION_OPS_MAX - 2

    async def commit_all() -> None:
        async with EtcdStore(endpoints, credentials=credentials) as store:
            for start in range(0, len(ops), step):
                sequence = Put(keys.SEQ, b"test:%d:%d" % (time.time_ns(), start))
                await store.commit(Txn((), (*ops[start : start + step], sequence)))

    trio.run(commit_all)


def test_a_large_directory_is_listed_whole_while_others_change_it(lab: Lab, dirs: Dirs) -> None:
    count = 8000
    one, two, _ = dirs
    parent = InodeNumber(one.stat().st_ino >> VIEW_BITS)
    fill(lab.nodes[0], parent, count)
    names = {f"file-{number:06d}" for number in range(count)}
    for directory in dirs:
        assert sorted(os.listdir(directory)) == sorted(names)
    seen = []
    with os.scandir(two) as entries:
        for number, entry in enumerate(entries):
            seen.append(entry.name)
            if number % 500 == 0:
                (one / f"new-{number}").touch()
                (one / f"file-{number + 200:06d}").rename(one / f"moved-{number}")
    moved = {f"file-{number + 200:06d}" for number in range(0, count, 500)}
    kept = [name for name in seen if name in names - moved]
    assert len(kept) == len(set(kept)) == count - len(moved)
    assert len(seen) == len(set(seen))
    listed = run("ls", "-l", one).splitlines()[1:]
    assert len(listed) == count + len(moved)
    assert run("find", two, "-name", "moved-*", "-newermt", "2000-01-01").count("\n") == len(moved)
    for path in [*one.glob("new-*"), *one.glob("moved-*")]:
        path.unlink()
    empty(lab.nodes[0], parent, count)
    assert os.listdir(one) == []


def test_an_open_directory_shows_what_is_new_when_it_is_read_again(dirs: Dirs) -> None:
    here, there, _ = dirs
    descriptor = os.open(here, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert os.listdir(descriptor) == []
        (here / "ours").touch()
        assert os.listdir(descriptor) == ["ours"]
        (there / "theirs").touch()
        (there / "ours").unlink()
        assert os.listdir(descriptor) == ["theirs"]
    finally:
        os.close(descriptor)


def test_a_tree_is_removed_and_measured_by_the_usual_tools(dirs: Dirs) -> None:
    here, there, _ = dirs
    for number in range(20):
        (here / f"{number}" / "below").mkdir(parents=True)
        (here / f"{number}" / "below" / "file").write_bytes(b"x" * 10_000)
    assert int(run("du", "-s", "--apparent-size", "-B1", there).split()[0]) >= 200_000
    assert run("find", there, "-type", "f", "-size", "+9k").count("\n") == 20
    total, used, free = shutil.disk_usage(there)
    assert 0 <= used <= total and 0 < free <= total
    assert run("df", "--output=fstype", there).split() == ["Type", "fuse.modelfs"]
    run("rm", "-rf", *there.iterdir())
    assert os.listdir(here) == []
