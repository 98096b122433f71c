"""The namespace in memory: what etcd holds under our prefix, indexed for a file system.

The mirror is fed whole revisions, in order, and never ahead of etcd. `apply` and `reload` return
what changed as values; whoever keeps the kernel's caches acts on them. Reading is plain lookups.

Invariants:
- `children[p][n]` exists exactly if etcd has the dentry (p, n) as of `revision`;
- a revision whose `seq` was put by operation X makes every change of that revision X's.

A row that cannot be read (`ProtocolError`), since a damaged or malicious member has put it, ends
nothing: it is noted in `unreadable`, and all else is as before. What is asked about such an inode
raises `RecordUnreadable`, so that nobody takes it for one that is gone; a name of which the record
is damaged is listed, and means `NO_INODE`, which is unreadable too. Of a damaged lease nobody is
the holder. Every other unreadable row counts as absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from modelfs import keys
from modelfs.announced import (
    BecameUnreadable,
    Change,
    Child,
    DirectoryTouched,
    InodeChanged,
    LeaseChanged,
    MapChanged,
    Name,
    NameChanged,
    NodeChanged,
    PinChanged,
    Row,
    SecurityChanged,
)
from modelfs.errors import ProtocolError, RecordUnreadable
from modelfs.history import HistoryIndex
from modelfs.ids import Epoch, InodeNumber, NodeId, Revision
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
    trusted_inode,
    writer_of,
)
from modelfs.names import Names
from modelfs.placement import PlacementMap, decode_map
from modelfs.ports import Event, KeyValue

__all__ = [
    "BecameUnreadable",
    "Change",
    "Child",
    "DirectoryTouched",
    "InodeChanged",
    "LeaseChanged",
    "MapChanged",
    "Mirror",
    "Name",
    "NameChanged",
    "NodeChanged",
    "PinChanged",
    "Row",
    "SecurityChanged",
]

NO_INODE = InodeNumber(0)  # what a name with a damaged record means


class Mirror(Names):
    """What etcd held at `revision`."""

    def __init__(self) -> None:
        super().__init__()
        self.revision = Revision(0)
        self.nodes: dict[NodeId, NodeRecord] = {}
        self.maps: dict[Epoch, PlacementMap] = {}
        self.latest_map: PlacementMap | None = None
        self.pins: dict[NodeId, dict[bytes, Pin]] = {}  # node -> chunk id of a manifest -> pin
        self.history = HistoryIndex()
        self.unreadable: dict[bytes, tuple[str, Revision]] = {}  # key -> why, mod_revision
        self.file_count = 0
        self.file_bytes = 0
        self._inodes: dict[InodeNumber, Row] = {}
        self._dirtimes: dict[InodeNumber, bytes] = {}
        self._leases: dict[InodeNumber, Row] = {}
        self._others: dict[bytes, Row] = {}

    # ------------------------------------------------------------ reading

    def inode(self, ino: InodeNumber) -> Inode | None:
        """The record of an inode, decoded; None if there is none. Raises `RecordUnreadable`."""
        row = self._inodes.get(ino)
        if row is not None and row.value:
            return trusted_inode(row.value)
        if row is not None or ino == NO_INODE:
            key = keys.inode(ino)
            raise RecordUnreadable(
                key, self.unreadable.get(key, ("that of its name is damaged",))[0]
            )
        return None

    def readable_inode(self, ino: InodeNumber) -> Inode | None:
        """As `inode`; None also if its record cannot be read."""
        row = self._inodes.get(ino)
        return trusted_inode(row.value) if row is not None and row.value else None

    def is_unreadable(self, ino: InodeNumber) -> bool:
        """Whether there is a record of this inode that cannot be read."""
        row = self._inodes.get(ino)
        return not row.value if row is not None else ino == NO_INODE

    def inode_row(self, ino: InodeNumber) -> Row | None:
        """An inode's row, for its revisions."""
        return self._inodes.get(ino)

    def inodes(self) -> Iterator[tuple[InodeNumber, Inode]]:
        """All readable inodes, decoded one at a time. Do not await between them."""
        for ino in self._inodes:
            record = self.readable_inode(ino)
            if record is not None:
                yield ino, record

    def inode_numbers(self) -> list[InodeNumber]:
        """A snapshot of all inode numbers."""
        return list(self._inodes)

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

    def other(self, key: bytes) -> Row | None:
        """A row of one of the single keys (`keys.INODES`, `keys.DIRMOVE`, …)."""
        return self._others.get(key)

    def revoked(self) -> set[NodeId]:
        """The nodes that were removed from the cluster."""
        return {node for key in self._others if (node := keys.revoked_node(key))}

    def link_count(self, ino: InodeNumber, record: Inode) -> int:
        """nlink: for a directory 2 and one for each subdirectory."""
        return 2 + self.subdirectory_count(ino) if record.is_directory else record.nlink

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
        stale = [key for key in dict.fromkeys(self._all_keys()) if key not in fresh]
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
        if self.unreadable:
            self.unreadable.pop(event.key, None)
        try:
            self._take(event, origin, changes)
        except ProtocolError as error:
            if event.value is not None:  # the deletion of what was never taken means nothing
                self.unreadable[event.key] = (str(error), event.mod_revision)
                self._take_unreadable(event, origin, changes)
                changes.append(BecameUnreadable(event.key, str(error)))

    def _take_unreadable(self, event: Event, origin: str, changes: list[Change]) -> None:
        """Forget what the row said before; of an inode and a name, that there is one stays."""
        try:
            if event.key.startswith(keys.INODE_PREFIX):
                ino = keys.ino_of(event.key, keys.INODE_PREFIX)
                self._put_inode(ino, event, None, origin, changes)
            elif event.key.startswith(keys.DENTRY_PREFIX):
                name = keys.split_dentry(event.key)
                self._put_name(name, Child(NO_INODE, 0, event.mod_revision), origin, changes)
            else:
                self._take(replace(event, value=None), origin, changes)
        except ProtocolError:
            return  # the key itself is none of ours: it has never said anything

    def _take(self, event: Event, origin: str, changes: list[Change]) -> None:
        """Take one row. Raises `ProtocolError`; then nothing has changed."""
        key = event.key
        if key.startswith(keys.INODE_PREFIX):
            ino = keys.ino_of(key, keys.INODE_PREFIX)
            new = decode_inode(event.value) if event.value is not None else None
            self._put_inode(ino, event, new, origin, changes)
        elif key.startswith(keys.DENTRY_PREFIX):
            name = keys.split_dentry(key)
            self._put_name(name, _child_of(event), origin, changes)
        elif key.startswith(keys.DIRTIME_PREFIX):
            ino = keys.ino_of(key, keys.DIRTIME_PREFIX)
            times = self.dirtime(ino) if event.value is None else None
            if event.value is None:
                self._dirtimes.pop(ino, None)
            else:
                decode_dirtime(event.value)
                self._dirtimes[ino] = event.value
            changes.append(DirectoryTouched(ino, origin, times and times[0]))
        elif key.startswith(keys.LEASE_PREFIX):
            self._apply_lease(keys.ino_of(key, keys.LEASE_PREFIX), event, changes)
        elif key.startswith(keys.NODE_PREFIX):
            self._apply_node(keys.node_of(key), event, changes)
        elif key.startswith(keys.MAP_PREFIX):
            self._apply_map(keys.epoch_of(key), event.value, changes)
        elif key.startswith(keys.PIN_PREFIX):
            self._apply_pin(*keys.split_pin(key), event, changes)
        elif key.startswith(keys.HISTORY_PREFIX):
            (self.history.add if event.value is not None else self.history.remove)(key)
        else:
            _set(self._others, key, event)
            if key.startswith(keys.SECURITY_PREFIX):
                changes.append(SecurityChanged())

    def _apply_lease(self, ino: InodeNumber, event: Event, changes: list[Change]) -> None:
        _set(self._leases, ino, event)
        node = writer_of(event.value) if event.value is not None else None
        changes.append(LeaseChanged(ino, node))
        if node == "":
            self.unreadable[event.key] = (reason := "it names no node", event.mod_revision)
            changes.append(BecameUnreadable(event.key, reason))

    def _put_inode(
        self,
        ino: InodeNumber,
        event: Event,
        new: Inode | None,
        origin: str,
        changes: list[Change],
    ) -> None:
        """`new` is None also if the record cannot be read: then its row stays, without a value."""
        old = self.readable_inode(ino)
        _set(self._inodes, ino, event if new else replace(event, value=event.value and b""))
        for record, sign in ((old, -1), (new, 1)):
            if record is not None and record.is_file:
                self.file_count += sign
                self.file_bytes += sign * record.size
        changes.append(InodeChanged(ino, old, new, origin))

    def _put_name(self, name: Name, new: Child | None, origin: str, changes: list[Change]) -> None:
        old = self.put_name(name, new)
        changes.append(NameChanged(*name, old, new.ino if new else None, origin))

    def _apply_node(self, node: NodeId, event: Event, changes: list[Change]) -> None:
        if event.value is None:
            self.nodes.pop(node, None)
            changes.append(NodeChanged(node, None))
        else:
            record = decode_node(event.value)
            self.nodes[node] = record
            changes.append(NodeChanged(node, record))

    def _apply_map(self, epoch: Epoch, value: bytes | None, changes: list[Change]) -> None:
        if value is None:
            return  # nobody deletes a map; chunks that it has placed are found by it
        placement = decode_map(value)
        if placement.epoch != epoch:
            raise ProtocolError(f"a placement map of epoch {placement.epoch}")
        self.maps[epoch] = placement
        if self.latest_map is None or epoch > self.latest_map.epoch:
            self.latest_map = placement
            changes.append(MapChanged(epoch))

    def _apply_pin(
        self, node: NodeId, manifest: bytes, event: Event, changes: list[Change]
    ) -> None:
        pin = decode_pin(event.value) if event.value is not None else None
        if pin is not None and pin.manifest.id != manifest:
            raise ProtocolError("a pin on another manifest")
        pins = self.pins.setdefault(node, {})
        if pin is None:
            pins.pop(manifest, None)
        else:
            pins[manifest] = pin
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
        yield from list(self.unreadable)

    def _is_known(self, event: Event) -> bool:
        """Whether an inode or name is already here at this very revision."""
        row: Row | Child | None = None
        if event.key in self.unreadable:
            return self.unreadable[event.key][1] == event.mod_revision
        try:
            if event.key.startswith(keys.INODE_PREFIX):
                row = self._inodes.get(keys.ino_of(event.key, keys.INODE_PREFIX))
            elif event.key.startswith(keys.DENTRY_PREFIX):
                row = self.child(*keys.split_dentry(event.key))
        except ProtocolError:
            return False
        return row is not None and row.mod_revision == event.mod_revision


def _child_of(event: Event) -> Child | None:
    if event.value is None:
        return None
    dentry: Dentry = decode_dentry(event.value)
    return Child(inode_number(dentry), dentry.kind, event.mod_revision, dentry.base)


def _set(table: dict, key: object, event: Event) -> None:  # type: ignore[type-arg]
    if event.value is None:
        table.pop(key, None)
    else:
        table[key] = Row(event.value, event.create_revision, event.mod_revision)
