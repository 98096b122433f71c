"""The versions of files whose chunks must be there: current, retained, and open somewhere."""

from __future__ import annotations

from collections.abc import Iterator

from modelfs import keys
from modelfs.errors import MetadataUnavailable
from modelfs.history import decode_retained
from modelfs.ids import InodeNumber, NodeId
from modelfs.inode import Inode, ManifestRef, Pin
from modelfs.ports import KeyValue, MetadataStore
from modelfsd.metadata.locating import exact_path, paths_of
from modelfsd.metadata.namespace import Namespace
from modelfsd.storage.copies import Version


def current_version(
    namespace: Namespace, ino: InodeNumber, record: Inode, manifest: ManifestRef
) -> Version:
    """What a file shows now."""
    mirror = namespace.mirror

    async def still_matters() -> bool:
        await namespace.fresh()
        now = mirror.readable_inode(ino)
        return now is not None and now.manifest == manifest

    def describe() -> dict[str, object]:
        return {"paths": paths_of(mirror, ino), "version": "current", "size": record.size}

    return Version(Pin(manifest, record.replicas), still_matters, describe)


def pinned_versions(namespace: Namespace) -> Iterator[Version]:
    """Those that nodes have pinned. The mirror may change while this is read."""
    for node, pins in list(namespace.mirror.pins.items()):
        for name, pin in list(pins.items()):
            yield _pinned(namespace, node, name, pin)


def _pinned(namespace: Namespace, node: NodeId, name: bytes, pin: Pin) -> Version:
    mirror = namespace.mirror

    async def still_matters() -> bool:
        await namespace.fresh()
        return name in mirror.pins.get(node, {})

    def describe() -> dict[str, object]:
        holder = mirror.nodes[node].name if node in mirror.nodes else node
        return {"paths": [], "version": f"superseded, and open on {holder}"}

    return Version(pin, still_matters, describe)


def retained_version(namespace: Namespace, store: MetadataStore, row: KeyValue) -> Version | None:
    """The version of a history entry; None if it has no chunks. Raises `ProtocolError`."""
    parent, name, number = keys.split_history(row.key)
    record = decode_retained(row.value).record
    if record.manifest is None:
        return None

    async def still_matters() -> bool:
        try:
            return await store.get(row.key) is not None
        except MetadataUnavailable:
            return True  # as far as is known

    def describe() -> dict[str, object]:
        path = exact_path(namespace.mirror, parent, name)
        return {"paths": [path], "version": f"retained version {number}", "size": record.size}

    return Version(Pin(record.manifest, record.replicas), still_matters, describe)
