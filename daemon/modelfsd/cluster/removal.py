"""`modelfs node remove`: a node that belongs no more.

One guarded transaction refuses the node's certificates, ends its registration, and gives the next
placement map without it, so that its chunks get new copies at once. Every node acts on that as soon
as its mirror shows it (`security`). Then its member leaves etcd.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import msgspec

from modelfs import keys
from modelfs.changes import Plan
from modelfs.errors import MetadataUnavailable, MetadataUncertain, UserError
from modelfs.ids import NodeId, Revision
from modelfs.mirror import Mirror
from modelfs.ports import Compare, Delete, Put, Target, Txn
from modelfsd.etcd.store import EtcdStore
from modelfsd.metadata.namespace import Namespace

log = logging.getLogger(__name__)


class RemovedNode(msgspec.Struct, array_like=True, frozen=True):
    """What is kept of a removed node, for people."""

    name: str
    removed_at: float


class Removal:
    """The handler."""

    def __init__(
        self, namespace: Namespace, store: EtcdStore, node: NodeId, is_etcd_ours: bool
    ) -> None:
        self._namespace, self._store = namespace, store
        self._node, self._is_etcd_ours = node, is_etcd_ours

    async def remove(self, request: dict[str, Any]) -> dict[str, Any]:
        """Remove the node that the request names. To ask again does no harm."""
        wanted = str(request.get("name", ""))
        try:
            node = await self._namespace.change(lambda mirror: self._plan(mirror, wanted))
            if self._is_etcd_ours:
                for member in await self._store.members():
                    if member.name == node:
                        await self._store.remove_member(member.id)
        except (MetadataUnavailable, MetadataUncertain) as error:
            raise UserError(
                f"etcd did not carry out all of it: ask again once it answers ({error})"
            ) from error
        log.warning("node %s (%s) was removed from the cluster", wanted, node)
        return {"node": node, "name": wanted}

    def _plan(self, mirror: Mirror, wanted: str) -> Plan[NodeId]:
        node, name = self._find(mirror, wanted)
        if node == self._node:
            raise UserError("a node cannot remove itself: ask another one to do it")
        if node in mirror.revoked() and node not in mirror.nodes:
            return Plan(Txn((), ()), node)
        compares: list[Compare] = []
        ops: list[Put | Delete] = [
            Put(keys.revoked(node), msgspec.msgpack.encode(RemovedNode(name, time.time()))),
            Delete(keys.node(node)),
        ]
        latest = mirror.latest_map
        if latest is not None and latest.member(node) is not None:
            smaller = latest.without_member(node)
            key = keys.placement_map(smaller.epoch)
            compares.append(Compare(key, Target.CREATE, Revision(0)))
            ops.append(Put(key, smaller.encode()))
        return Plan(Txn(tuple(compares), tuple(ops)), node)

    @staticmethod
    def _find(mirror: Mirror, wanted: str) -> tuple[NodeId, str]:
        """(id, name) of the node with this id or name. Raises `UserError`."""
        names = {node: record.name for node, record in mirror.nodes.items()}
        for member in mirror.latest_map.members if mirror.latest_map else ():
            names.setdefault(member.id, member.name)
        for node in mirror.revoked():
            names.setdefault(node, "(removed)")
        found = [node for node, name in names.items() if wanted in (node, name)]
        if len(found) == 1:
            return found[0], names[found[0]]
        rows = "\n".join(f"  {node}  {name}" for node, name in sorted(names.items()))
        how = "no node is" if not found else "several nodes are"
        raise UserError(f"{how} called {wanted!r}; give the id of one of these:\n{rows}")
