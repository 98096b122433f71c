"""What a node notes of other nodes' etcd, to find its cluster again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from modelfs.ids import NodeId
from modelfs.inode import NodeRecord
from modelfs.mirror import Mirror, NodeChanged
from modelfsd.cluster.etcd_addresses import EtcdAddresses
from modelfsd.trust import identity as identities


class Store:
    """As much of `EtcdStore` as this needs."""

    endpoints: tuple[str, ...] = ("a:1",)

    def set_endpoints(self, endpoints: list[str]) -> None:
        self.endpoints = tuple(endpoints)


def news(number: int, endpoint: str) -> NodeChanged:
    record = NodeRecord(
        name=f"n{number}", host="h", port=1, zone="", capacity_bytes=1, used_bytes=0,
        free_bytes=1, software="1", started_at=0.0, etcd_endpoint=endpoint,
    )  # fmt: skip
    return NodeChanged(NodeId(f"{number:016x}"), record)


@pytest.mark.expected_logs("node.json cannot be written")
def test_a_full_disk_is_no_reason_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = Store()
    addresses = EtcdAddresses(tmp_path, identities.load(tmp_path), store, Mirror())

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        addresses.on_changes([news(1, "b:1")])
    assert store.endpoints == ("a:1", "b:1") and identities.load(tmp_path).endpoints == ()
    addresses.on_changes([news(2, "b:1")])
    assert identities.load(tmp_path).endpoints == ("a:1", "b:1"), "it is tried again"
