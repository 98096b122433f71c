"""Who this node is, kept in its state directory: `node.json`.

The id is made once and never reused. The cluster is filled in when the node founds or joins one;
the endpoints of etcd are what it knew last, to find its cluster again after a restart.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from modelfs.errors import UserError
from modelfs.ids import ClusterId, NodeId, is_node_id
from modelfsd.trust.pki import Party

FILE = "node.json"
REMOVED = "removed"
FORMAT = 1
NO_CLUSTER = ClusterId("")


@dataclass(frozen=True, slots=True)
class Identity:
    """A node and the cluster that it belongs to ("" before it does)."""

    node: NodeId
    cluster: ClusterId = NO_CLUSTER
    cluster_name: str = ""
    endpoints: tuple[str, ...] = ()
    data_tls: bool = True  # whether the cluster encrypts chunks on their way
    founded_at: float = 0.0  # the cluster
    format: int = FORMAT

    @property
    def party(self) -> Party:
        """This node as its certificate names it."""
        return Party(self.cluster, self.node)

    def in_cluster(
        self,
        cluster: ClusterId,
        name: str,
        endpoints: tuple[str, ...],
        data_tls: bool,
        founded_at: float,
    ) -> Identity:
        """This node as a member of a cluster."""
        return Identity(self.node, cluster, name, endpoints, data_tls, founded_at)

    def knowing(self, endpoints: tuple[str, ...]) -> Identity:
        """This node with what it knows of its cluster's etcd."""
        return replace(self, endpoints=endpoints)


def load(state_dir: Path) -> Identity:
    """The node of this state directory; a new one if it is empty. Raises `UserError`."""
    path = state_dir / FILE
    try:
        stored = json.loads(path.read_bytes())
    except FileNotFoundError:
        identity = Identity(NodeId(secrets.token_hex(8)))
        save(state_dir, identity)
        return identity
    except ValueError as error:
        raise UserError(f"{path} is damaged: restore it, or move {state_dir} away") from error
    is_sane = isinstance(stored, dict) and is_node_id(str(stored.get("node")))
    if not is_sane or stored.get("format") != FORMAT:
        raise UserError(
            f"{path} was not written by this version of modelfs: use the version that wrote it, "
            f"or move {state_dir} away to start as a new node"
        )
    cluster, name = stored.get("cluster"), stored.get("cluster_name")
    endpoints = stored.get("endpoints")
    is_whole = (
        isinstance(cluster, str)
        and (cluster == NO_CLUSTER or is_node_id(cluster))
        and isinstance(name, str)
        and isinstance(endpoints, list)
        and all(isinstance(endpoint, str) for endpoint in endpoints)
    )
    if not is_whole:
        raise UserError(f"{path} is damaged: restore it, or move {state_dir} away")
    data_tls, founded_at = stored.get("data_tls", True), stored.get("founded_at", 0.0)
    if not isinstance(data_tls, bool) or not isinstance(founded_at, float):
        raise UserError(f"{path} is damaged: restore it, or move {state_dir} away")
    return Identity(
        NodeId(stored["node"]), ClusterId(cluster), name, tuple(endpoints), data_tls, founded_at
    )


def save(state_dir: Path, identity: Identity) -> None:
    """Write the file so that a crash leaves the old one or the new one."""
    fresh = state_dir / f"{FILE}.new"
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(asdict(identity), file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, state_dir / FILE)
    directory = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def is_removed(state_dir: Path) -> bool:
    """Whether the cluster has removed this node, as far as it has heard."""
    return (state_dir / REMOVED).exists()


def mark_removed(state_dir: Path) -> None:
    """Remember that the cluster has removed this node: etcd and the peers do not talk to it."""
    os.close(os.open(state_dir / REMOVED, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def new_cluster_id() -> ClusterId:
    """An id for a cluster that is being founded."""
    return ClusterId(secrets.token_hex(8))
