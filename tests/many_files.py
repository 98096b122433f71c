"""Many empty files, straight into etcd: by the mount each would take two transactions."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import trio

from modelfs import keys
from modelfs.ids import InodeNumber
from modelfs.inode import Dentry, Inode, encode
from modelfs.limits import MIB, TRANSACTION_OPS_MAX
from modelfs.ports import Delete, Put, Txn
from modelfsd.commands import control
from modelfsd.etcd.store import EtcdStore
from modelfsd.etcd.tls import EtcdTls
from modelfsd.kernel.kernel_inodes import VIEW_BITS
from modelfsd.lab.state import LabNode
from modelfsd.trust.keyring import KeyRing

FIRST_INODE = 1 << 36  # numbers that no daemon will hand out meanwhile
ASK_SECONDS = 60.0


def inode_of(directory: Path) -> InodeNumber:
    """The inode number of a directory in a mount."""
    return InodeNumber(directory.stat().st_ino >> VIEW_BITS)


def fill(node: LabNode, parent: InodeNumber, numbers: Iterable[int]) -> None:
    """Put empty files `file-NNNNNN` into a directory."""
    times: dict[str, Any] = dict.fromkeys(("atime_ns", "mtime_ns", "ctime_ns"), time.time_ns())
    record = encode(
        Inode(mode=0o100644, uid=0, gid=0, inline=b"", chunk_bytes=4 * MIB, replicas=2, **times)
    )
    ops: list[Put | Delete] = []
    for number in numbers:
        ino = InodeNumber(FIRST_INODE + number)
        ops.append(Put(keys.inode(ino), record))
        ops.append(Put(keys.dentry(parent, b"file-%06d" % number), encode(Dentry(ino, 0o100000))))
    _commit(node, ops)


def empty(node: LabNode, parent: InodeNumber, numbers: Iterable[int]) -> None:
    """Undo `fill`."""
    ops: list[Put | Delete] = []
    for number in numbers:
        ops.append(Delete(keys.dentry(parent, b"file-%06d" % number)))
        ops.append(Delete(keys.inode(InodeNumber(FIRST_INODE + number))))
    _commit(node, ops)


def store_of(node: LabNode) -> EtcdStore:
    """A client of the lab's etcd, which is taken for this node."""
    status = control.call(node.control_path, "status", ASK_SECONDS)
    credentials = EtcdTls(KeyRing(node.state_dir)).credentials()
    return EtcdStore(status["etcd"]["endpoints"], credentials=credentials)


def _commit(node: LabNode, ops: list[Put | Delete]) -> None:
    """Carry out many operations, a transaction's worth at a time."""
    step = TRANSACTION_OPS_MAX - 2

    async def commit_all() -> None:
        async with store_of(node) as store:
            for start in range(0, len(ops), step):
                sequence = Put(keys.SEQ, b"test:%d:%d" % (time.time_ns(), start))
                await store.commit(Txn((), (*ops[start : start + step], sequence)))

    trio.run(commit_all)
