"""The key `cluster`: who the keys around it belong to. Written once, by who founds the cluster."""

from __future__ import annotations

import logging
import os
import time
from typing import Annotated

import msgspec

from modelfs import keys
from modelfs.errors import MetadataUncertain, UserError
from modelfs.ids import ROOT_INODE, Revision
from modelfs.inode import Inode, encode
from modelfs.limits import NAME_BYTES_MAX
from modelfs.ports import Compare, Put, Target, Txn
from modelfsd.cluster.founding import Claim
from modelfsd.etcd.store import EtcdStore
from modelfsd.trust.joining import FORMAT

log = logging.getLogger(__name__)


class ClusterRecord(msgspec.Struct, array_like=True, frozen=True):
    """The cluster's own record."""

    id: Annotated[str, msgspec.Meta(min_length=16, max_length=16)]
    name: Annotated[str, msgspec.Meta(max_length=NAME_BYTES_MAX)]
    format: int
    founded_at: float
    data_tls: bool = True  # whether chunks are encrypted on their way


async def found_in(store: EtcdStore, claim: Claim, data_tls: bool | None) -> ClusterRecord:
    """Write the cluster's record and its root directory, unless somebody was faster."""
    record = ClusterRecord(
        claim.cluster, claim.name, FORMAT, claim.founded_at, data_tls is not False
    )
    now_ns = time.time_ns()
    # Of who founds it: where no node runs as root, nobody could give it away.
    user, group = os.geteuid(), os.getegid()
    root = Inode(
        mode=0o40755, uid=user, gid=group, atime_ns=now_ns, mtime_ns=now_ns, ctime_ns=now_ns
    )
    absent = Compare(keys.CLUSTER, Target.CREATE, Revision(0))
    puts = (
        Put(keys.CLUSTER, msgspec.msgpack.encode(record)),
        Put(keys.inode(ROOT_INODE), encode(root)),
        Put(keys.SEQ, b"founding"),
    )
    try:
        await store.commit(Txn((absent,), puts))
    except MetadataUncertain as error:
        log.info("asking etcd again: %s", error)
        await store.commit(Txn((absent,), puts))
    found = await read_record(store)
    assert found is not None
    return found


async def read_record(store: EtcdStore) -> ClusterRecord | None:
    """What etcd holds of a cluster; None if it holds none. Raises `UserError`."""
    row = await store.get(keys.CLUSTER)
    if row is None:
        return None
    try:
        record = msgspec.msgpack.decode(row.value, type=ClusterRecord)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UserError(
            f"what etcd holds of a cluster is not a record of this version ({error}): install "
            "the version of the other nodes, or give another etcd"
        ) from error
    if record.format != FORMAT:
        raise UserError(
            f"the cluster {record.name} keeps its records in format {record.format}, this "
            f"version of modelfs knows {FORMAT}: install the version of the other nodes"
        )
    return record
