"""Keys for tests: one authority for the whole run, and a key ring for whoever wants one."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from modelfs.ids import ClusterId, NodeId
from modelfsd.etcd.tls import EtcdTls
from modelfsd.trust import pki
from modelfsd.trust.keyring import KeyRing
from modelfsd.trust.pki import Authority, Party
from modelfsd.trust.tls import Tls

CLUSTER = ClusterId("c" * 16)


def authority(cluster: ClusterId = CLUSTER) -> Authority:
    """The authority of a cluster, made once."""
    return _authority(cluster)


@cache
def _authority(cluster: ClusterId) -> Authority:
    return pki.found_authority(cluster, time.time())


def key_ring(
    node: NodeId,
    addresses: Sequence[str] = ("127.0.0.1",),
    cluster: ClusterId = CLUSTER,
    directory: Path | None = None,
) -> KeyRing:
    """A node's files, in a directory of their own if none is given."""
    directory = directory or Path(
        tempfile.mkdtemp(prefix="keys-", dir=os.environ["MODELFS_TEST_ROOT"])
    )
    keys = KeyRing(directory)
    ours = authority(cluster)
    keys.take(ours, (ours.certificate,), ())
    keys.certify(Party(cluster, node), addresses, time.time())
    return keys


@cache
def tls_of(node: NodeId, cluster: ClusterId = CLUSTER, data_tls: bool = True) -> Tls:
    """What a node shows and trusts on connections."""
    return Tls(key_ring(node, cluster=cluster), Party(cluster, node), data_tls)


def etcd_tls(directory: Path, node: NodeId, address: str) -> EtcdTls:
    """The certificates of an etcd member that listens on an address."""
    directory.mkdir(parents=True, exist_ok=True)
    return EtcdTls(key_ring(node, [address], directory=directory))
