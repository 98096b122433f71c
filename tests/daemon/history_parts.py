"""What the tests of history and retention share: the drivers of a node without a mount."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelfs import changes, keys
from modelfs.ids import ROOT_INODE, Revision
from modelfs.policy import NANOSECONDS
from modelfs.ports import KeyValue
from modelfsd.metadata.history import History
from modelfsd.metadata.retention import Retention
from tests.daemon.node_parts import Node

HOUR_NS = 3600 * NANOSECONDS


def history_of(node: Node) -> History:
    return History(node.writer, node.cluster.etcd, str, Path("/m"))


def retention_of(node: Node) -> Retention:
    return Retention(node.namespace, node.cluster.etcd)


async def versions(node: Node, name: str) -> list[dict[str, Any]]:
    answer = await history_of(node).versions({"path": [name]})
    return [row for row in answer["versions"] if not row["current"]]


async def restore(node: Node, name: str, number: int) -> dict[str, Any]:
    return await history_of(node).restore({"path": [name], "number": number})


async def remove(node: Node, name: bytes, directory: bool = False, now_ns: int = 1) -> None:
    await node.namespace.change(
        lambda mirror: changes.remove(
            mirror, ROOT_INODE, name, directory, now_ns, node.namespace.keep
        )
    )


async def until(node: Node, condition: Callable[[], bool]) -> None:
    """Wait for the node's mirror to become so."""
    while not condition():
        await node.feed.reached(Revision(node.mirror.revision + 1))


async def entries(node: Node) -> list[KeyValue]:
    return (await node.cluster.etcd.load(keys.HISTORY_PREFIX))[1]
