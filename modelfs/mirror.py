"""The namespace in memory: what etcd holds under our prefix, indexed for a file system.

The mirror is fed whole revisions, in order, and never ahead of etcd. `apply` and `reload` return
what changed as values; whoever keeps the kernel's caches acts on them. Reading is plain lookups.

Invariants:
- `children[p][n]` exists exactly if etcd has the dentry (p, n) as of `revision`;
- `names[i]` is the set of (p, n) whose dentry names i;
- a revision whose `seq` was put by operation X makes every change of that revision X's.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from modelfs import keys
from modelfs.history import HistoryIndex
from modelfs.ids import ROOT_INODE, Epoch, InodeNumber, NodeId, Revision
from modelfs.inode import (
    Dentry,
    Inode,
    NodeRecord,
    Pin,
    decode_dentry,
    decode_dirtime,
    decode_inode,
    decode_node,
    decode_pin,
    inode_number,
    writer_of,
)
from modelfs.placement import PlacementMap, decode_map
from modelfs.ports import Event, KeyValue

Name = tuple[InodeNumber, bytes]


@dataclass(frozen=True, slots=True)
class Row:
    """A value of etcd with the revisions that guard it."""

    value: bytes
    create_revision: Revision
    mod_revision: Revision


@dataclass(frozen=True, slots=True)
class Child:
    """A directory entry."""

    ino: InodeNumber
    kind: int  # file type bits
    mod_revision: Revision
    base: int = 0


@dataclass(frozen=True, slots=True)
class NameChanged:
    """A name now means another inode, or none, or a first one."""

    parent: InodeNumber
    name: bytes
    old: InodeNumber | None
    new: InodeNumber | None
    origin: str


@dataclass(frozen=True, slots=True)
class InodeChanged:
    """An inode's record changed, appeared (old is None) or went (new is None)."""

    ino: InodeNumber
    old: Inode | None
    new: Inode | None
    origin: str


@dataclass(frozen=True, slots=True)
class DirectoryTouched:
    """A directory's times changed."""

    ino: InodeNumber
    origin: str


@dataclass(frozen=True, slots=True)
class LeaseChanged:
    """A file's writer changed; None: nobody may write it now."""

    ino: InodeNumber
    node: NodeId | None


@dataclass(frozen=True, slots=True)
class NodeChanged:
    """A node came, spoke or went (None)."""

    node: NodeId
    record: NodeRecord | None


@dataclass(frozen=True, slots=True)
class MapChanged:
    """There is a new placement map."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class PinChanged:
    """A node pinned a manifest, or let go of it."""

    node: NodeId
    manifest: bytes


@dataclass(frozen=True, slots=True)
class SecurityChanged:
    """Something under `keys.SECURITY_PREFIX` changed."""


_NameChange = NameChanged | InodeChanged | DirectoryTouched
Change = _NameChange | LeaseChanged | NodeChanged | MapChanged | PinChanged | SecurityChanged


class Mirror:
    """What etcd held at `revision`."""

    def __init__(self) -> None:
        self.revision = Revision(0)
        self.children: dict[InodeNumber, dict[bytes, Child]] = {}
        self.names: dict[InodeNumber, set[Name]] = {}
        self.nodes: dict[NodeId, NodeRecord] = {}
        self.maps: dict[Epoch, PlacementMap] = {}
        self.latest_map: PlacementMap | None = None
        self.pins: dict[NodeId, dict[bytes, Pin]] = {}  # node -> chunk id of a manifest -> pin
        self.history = HistoryIndex()
        self.file_count = 0
        self.file_bytes = 0
        self._inodes: dict[InodeNumber, Row] = {}
        self._dirtimes: dict[InodeNumber, bytes] = {}
        self._leases: dict[InodeNumber, Row] = {}
        self._subdirectories: dict[InodeNumber, int] = {}
        self._others: dict[bytes, Row] = {}

    # ------------------------------------------------------------ reading

    def inode(self, ino: InodeNumber) -> Inode | None:
        """The record of an inode, decoded; None if there is none."""
        row = self._inodes.get(ino)
        return decode_inode(row.value) if row else None

    def inode_row(self, ino: InodeNumber) -> Row | None:
        """An inode's row, for its revisions."""
        return self._inodes.get(ino)

    def inodes(self) -> Iterator[tuple[InodeNumber, Inode]]:
        """All inodes, decoded one at a time. Do not await between them."""
        for ino, row in self._inodes.items():
            yield ino, decode_inode(row.value)

    def inode_numbers(self) -> list[InodeNumber]:
        """A snapshot of all inode numbers."""
        return list(self._inodes)

    def child(self, parent: InodeNumber, name: bytes) -> Child | None:
        """The entry of a directory."""
        return self.children.get(parent, {}).get(name)

    def dirtime(self, ino: InodeNumber) -> tuple[int, int] | None:
        """(mtime, ctime) of a directory in ns; None if no entry of it ever changed."""
        value = self._dirtimes.get(ino)
        return decode_dirtime(value) if value else None

    def lease(self, ino: InodeNumber) -> tuple[NodeId, Revision] | None:
        """(the node that may write the file, its fencing token); None if nobody may."""
        row = self._leases.get(ino)
        return (writer_of(row.value), row.create_revision) if row else None

    def leases_of(self, node: NodeId) -> list[tuple[InodeNumber, Revision]]:
        """The files that a node may write, with their fencing tokens."""
        return [
            (ino, row.create_revision)
            for ino, row in self._leases.items()
            if writer_of(row.value) == node
        ]

    @property
    def directory_count(self) -> int:
        """How many directories there are, the root included."""
        return 1 + sum(self._subdirectories.values())

    def other(self, key: bytes) -> Row | None:
        """A row of one of the single keys (`keys.INODES`, `keys.DIRMOVE`, …)."""
        return self._others.get(key)

    def revoked(self) -> set[NodeId]:
        """The nodes that were removed from the cluster."""
        return {node for key in self._others if (node := keys.revoked_node(key))}

    def link_count(self, ino: InodeNumber, record: Inode) -> int:
        """nlink: for a directory 2 and one for each subdirectory."""
        return 2 + self._subdirectories.get(ino, 0) if record.is_directory else record.nlink

    def parent_of(self, directory: InodeNumber) -> InodeNumber | None:
        """The directory that holds a directory; None for the root and for a removed one."""
        for parent, _ in self.names.get(directory, ()):
            return parent
        return None

    def is_inside(self, ino: InodeNumber, directory: InodeNumber) -> bool:
        """Whether `ino` (a directory) is `directory` or somewhere below it."""
        current: InodeNumber | None = ino
        while current is not None and current != directory:
            current = self.parent_of(current)
        return current == directory

    def path_of(self, ino: InodeNumber) -> bytes:
        """One path of an inode from the root, for people: b"a/b/c"; b"" for the root."""
        parts: list[bytes] = []
        while ino != ROOT_INODE:
            name = next(iter(self.names.get(ino, ())), None)
            if name is None:
                return b"(unlinked)/" + b"/".join(reversed(parts))
            ino, part = name
            parts.append(part)
        return b"/".join(reversed(parts))

    # ------------------------------------------------------------ feeding

    def apply(self, events: Iterable[Event]) -> list[Change]:
        """Take whole revisions, in order; returns what changed."""
        changes: list[Change] = []
        pending: list[Event] = []
        for event in events:
            if pending and event.mod_revision != pending[-1].mod_revision:
                self._apply_revision(pending, changes)
                pending = []
            pending.append(event)
        if pending:
            self._apply_revision(pending, changes)
        return changes

    def reload(self, revision: Revision, rows: Iterable[KeyValue]) -> list[Change]:
        """Become what etcd held at `revision`; returns the difference, with origin ""."""
        fresh = {row.key: row for row in rows}
        stale = [key for key in self._all_keys() if key not in fresh]
        changes: list[Change] = []
        for key in stale:
            self._apply_event(Event(key, None, Revision(0), revision), "", changes)
        for row in fresh.values():
            event = Event(row.key, row.value, row.create_revision, row.mod_revision)
            if not self._is_known(event):
                self._apply_event(event, "", changes)
        self.revision = revision
        return changes

    def _apply_revision(self, events: list[Event], changes: list[Change]) -> None:
        origin = ""
        for event in events:
            if event.key == keys.SEQ and event.value is not None:
                origin = event.value.decode("ascii", "replace")
        for event in events:
            self._apply_event(event, origin, changes)
        assert events[-1].mod_revision >= self.revision
        self.revision = events[-1].mod_revision

    def _apply_event(self, event: Event, origin: str, changes: list[Change]) -> None:
        key = event.key
        if key.startswith(keys.INODE_PREFIX):
            self._apply_inode(keys.ino_of(key, keys.INODE_PREFIX), event, origin, changes)
        elif key.startswith(keys.DENTRY_PREFIX):
            self._apply_dentry(*keys.split_dentry(key), event, origin, changes)
        elif key.startswith(keys.DIRTIME_PREFIX):
            ino = keys.ino_of(key, keys.DIRTIME_PREFIX)
            if event.value is None:
                self._dirtimes.pop(ino, None)
            else:
                self._dirtimes[ino] = event.value
            changes.append(DirectoryTouched(ino, origin))
        elif key.startswith(keys.LEASE_PREFIX):
            ino = keys.ino_of(key, keys.LEASE_PREFIX)
            _set(self._leases, ino, event)
            node = writer_of(event.value) if event.value is not None else None
            changes.append(LeaseChanged(ino, node))
        elif key.startswith(keys.NODE_PREFIX):
            self._apply_node(NodeId(key[len(keys.NODE_PREFIX) :].decode("ascii")), event, changes)
        elif key.startswith(keys.MAP_PREFIX):
            if event.value is not None:
                self._apply_map(event.value, changes)
        elif key.startswith(keys.PIN_PREFIX):
            self._apply_pin(*keys.split_pin(key), event, changes)
        elif key.startswith(keys.HISTORY_PREFIX):
            (self.history.add if event.value is not None else self.history.remove)(key)
        else:
            _set(self._others, key, event)
            if key.startswith(keys.SECURITY_PREFIX):
                changes.append(SecurityChanged())

    def _apply_inode(
        self, ino: InodeNumber, event: Event, origin: str, changes: list[Change]
    ) -> None:
        old = self.inode(ino)
        _set(self._inodes, ino, event)
        new = self.inode(ino)
        for record, sign in ((old, -1), (new, 1)):
            if record is not None and record.is_file:
                self.file_count += sign
                self.file_bytes += sign * record.size
        changes.append(InodeChanged(ino, old, new, origin))

    def _apply_dentry(
        self, parent: InodeNumber, name: bytes, event: Event, origin: str, changes: list[Change]
    ) -> None:
        entries = self.children.setdefault(parent, {})
        old = entries.pop(name, None)
        if old is not None:
            self._unname(old, parent, name)
        new = None
        if event.value is not None:
            dentry: Dentry = decode_dentry(event.value)
            new = Child(inode_number(dentry), dentry.kind, event.mod_revision, dentry.base)
            entries[name] = new
            self.names.setdefault(new.ino, set()).add((parent, name))
            if stat.S_ISDIR(new.kind):
                self._subdirectories[parent] = self._subdirectories.get(parent, 0) + 1
        if not entries:
            del self.children[parent]
        before, after = old.ino if old else None, new.ino if new else None
        changes.append(NameChanged(parent, name, before, after, origin))

    def _unname(self, old: Child, parent: InodeNumber, name: bytes) -> None:
        names = self.names[old.ino]
        names.discard((parent, name))
        if not names:
            del self.names[old.ino]
        if stat.S_ISDIR(old.kind):
            self._subdirectories[parent] -= 1
            if not self._subdirectories[parent]:
                del self._subdirectories[parent]

    def _apply_node(self, node: NodeId, event: Event, changes: list[Change]) -> None:
        if event.value is None:
            self.nodes.pop(node, None)
            changes.append(NodeChanged(node, None))
        else:
            record = decode_node(event.value)
            self.nodes[node] = record
            changes.append(NodeChanged(node, record))

    def _apply_map(self, value: bytes, changes: list[Change]) -> None:
        placement = decode_map(value)
        self.maps[placement.epoch] = placement
        if self.latest_map is None or placement.epoch > self.latest_map.epoch:
            self.latest_map = placement
            changes.append(MapChanged(placement.epoch))

    def _apply_pin(
        self, node: NodeId, manifest: bytes, event: Event, changes: list[Change]
    ) -> None:
        pins = self.pins.setdefault(node, {})
        if event.value is None:
            pins.pop(manifest, None)
        else:
            pins[manifest] = decode_pin(event.value)
        if not pins:
            del self.pins[node]
        changes.append(PinChanged(node, manifest))

    # ------------------------------------------------------------ reload

    def _all_keys(self) -> Iterator[bytes]:
        yield from (keys.inode(ino) for ino in list(self._inodes))
        for parent, entries in list(self.children.items()):
            yield from (keys.dentry(parent, name) for name in list(entries))
        yield from (keys.dirtime(ino) for ino in list(self._dirtimes))
        yield from (keys.lease(ino) for ino in list(self._leases))
        yield from (keys.node(node) for node in list(self.nodes))
        for node, pins in list(self.pins.items()):
            yield from (keys.pin(node, manifest) for manifest in list(pins))
        yield from list(self.history.keys())
        yield from list(self._others)

    def _is_known(self, event: Event) -> bool:
        """Whether an inode or name is already here at this very revision."""
        row: Row | Child | None = None
        if event.key.startswith(keys.INODE_PREFIX):
            row = self._inodes.get(keys.ino_of(event.key, keys.INODE_PREFIX))
        elif event.key.startswith(keys.DENTRY_PREFIX):
            row = self.child(*keys.split_dentry(event.key))
        return row is not None and row.mod_revision == event.mod_revision


def _set(table: dict, key: object, event: Event) -> None:  # type: ignore[type-arg]
    if event.value is None:
        table.pop(key, None)
    else:
        table[key] = Row(event.value, event.create_revision, event.mod_revision)
