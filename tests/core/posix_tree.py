"""What the tests of `modelfs.changes` share: a history without a scheduler, and POSIX's rules."""

from __future__ import annotations

from modelfs.errors import (
    DirectoryNotEmpty,
    EntryExists,
    InvalidMove,
    IsDirectory,
    NoSuchEntry,
    NotDirectory,
    NotPermitted,
)
from modelfs.ids import ROOT_INODE
from modelfs.ports import Event, Put, Txn
from modelfs.testing.metadata import MemoryMetadataStore


class History(MemoryMetadataStore):
    """The memory store without a scheduler: its rules, called directly."""

    def commit_now(self, txn: Txn) -> bool:
        """Carry out a transaction; whether it succeeded."""
        if not all(self._holds(compare) for compare in txn.compares):
            return False
        if any(isinstance(op, Put) and op.lease and op.lease not in self._leases for op in txn.ops):
            return False
        self._apply(txn.ops)
        return True

    def grant_now(self) -> int:
        """A new lease."""
        self._last_lease += 1
        self._leases[self._last_lease] = type("L", (), {"keys": set(), "expires_at": 1e9})()
        return self._last_lease

    def events_after(self, revision: int, count: int | None = None) -> list[Event]:
        """The events of the next `count` revisions; None: of all."""
        later = [event for event in self._history if event.mod_revision > revision]
        revisions = sorted({event.mod_revision for event in later})[:count]
        return [event for event in later if event.mod_revision in revisions]


class PosixTree:
    """What the tree should be: directories as dictionaries, POSIX's rules written out."""

    def __init__(self) -> None:
        self.directories: dict[int, dict[bytes, int]] = {ROOT_INODE: {}}
        self.files: set[int] = set()

    def names_of(self, ino: int) -> list[tuple[int, bytes]]:
        return [
            (d, n)
            for d, entries in self.directories.items()
            for n, i in entries.items()
            if i == ino
        ]

    def ancestors(self, ino: int) -> list[int]:
        """The directory itself, then up to the root; fails on a cycle or an orphan."""
        way = [ino]
        while way[-1] != ROOT_INODE:
            ((parent, _),) = self.names_of(way[-1])
            assert parent not in way, "a cycle"
            way.append(parent)
        return way

    def _entries(self, parent: int) -> dict[bytes, int]:
        if parent not in self.directories:
            raise NotDirectory if parent in self.files else NoSuchEntry
        return self.directories[parent]

    def create(self, parent: int, name: bytes, ino: int, is_directory: bool) -> None:
        entries = self._entries(parent)
        if name in entries:
            raise EntryExists
        entries[name] = ino
        if is_directory:
            self.directories[ino] = {}
        else:
            self.files.add(ino)

    def link(self, ino: int, parent: int, name: bytes) -> None:
        if ino not in self.files and ino not in self.directories:
            raise NoSuchEntry
        entries = self._entries(parent)
        if ino in self.directories:
            raise NotPermitted
        if name in entries:
            raise EntryExists
        entries[name] = ino

    def _drop(self, ino: int) -> None:
        if ino in self.directories:
            del self.directories[ino]
        elif not self.names_of(ino):
            self.files.discard(ino)

    def remove(self, parent: int, name: bytes, is_directory: bool) -> None:
        entries = self._entries(parent)
        if name not in entries:
            raise NoSuchEntry
        ino = entries[name]
        if is_directory and ino not in self.directories:
            raise NotDirectory
        if not is_directory and ino in self.directories:
            raise IsDirectory
        if self.directories.get(ino):
            raise DirectoryNotEmpty
        del entries[name]
        self._drop(ino)

    def rename(self, old: tuple[int, bytes], new: tuple[int, bytes], keep: bool) -> None:
        if old[1] not in self._entries(old[0]):
            raise NoSuchEntry
        moving = self.directories[old[0]][old[1]]
        target = self._entries(new[0])
        present = target.get(new[1])
        if present is not None and keep:
            raise EntryExists
        if moving in self.directories and moving in self.ancestors(new[0]):
            raise InvalidMove
        if present == moving:
            return
        if present is not None:
            self.remove(*new, moving in self.directories)
        del self.directories[old[0]][old[1]]
        target[new[1]] = moving
