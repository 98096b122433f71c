"""The index of names: what is in a directory, and where an inode has its names.

Invariants: `names[i]` is the set of (p, n) for which `children[p][n]` is i; no directory without
names has an entry in `children`.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator

from modelfs.announced import Child, Name
from modelfs.ids import ROOT_INODE, InodeNumber


class Names:
    """All names, by directory and by inode."""

    def __init__(self) -> None:
        self.children: dict[InodeNumber, dict[bytes, Child]] = {}
        self.names: dict[InodeNumber, set[Name]] = {}
        self._subdirectories: dict[InodeNumber, int] = {}

    def child(self, parent: InodeNumber, name: bytes) -> Child | None:
        """The entry of a directory."""
        return self.children.get(parent, {}).get(name)

    @property
    def directory_count(self) -> int:
        """How many directories there are, the root included."""
        return 1 + sum(self._subdirectories.values())

    def subdirectory_count(self, directory: InodeNumber) -> int:
        """How many directories are directly in a directory."""
        return self._subdirectories.get(directory, 0)

    def parent_of(self, directory: InodeNumber) -> InodeNumber | None:
        """The directory that holds a directory; None for the root and for a removed one."""
        for parent, _ in self.names.get(directory, ()):
            return parent
        return None

    def is_inside(self, ino: InodeNumber, directory: InodeNumber) -> bool:
        """Whether `ino` (a directory) is `directory` or somewhere below it."""
        return directory in self.upwards(ino)

    def upwards(self, directory: InodeNumber) -> Iterator[InodeNumber]:
        """A directory, then those above it. Names that somebody tied to a circle end it too."""
        current: InodeNumber | None = directory
        seen: set[InodeNumber] = set()
        while current is not None and current not in seen:
            yield current
            seen.add(current)
            current = self.parent_of(current)

    def path_of(self, ino: InodeNumber) -> bytes:
        """One path of an inode from the root, for people: b"a/b/c"; b"" for the root."""
        parts: list[bytes] = []
        seen: set[InodeNumber] = set()
        while ino != ROOT_INODE:
            seen.add(ino)
            name = next(iter(self.names.get(ino, ())), None)
            if name is None or name[0] in seen:
                return b"(unlinked)/" + b"/".join(reversed(parts))
            ino, part = name
            parts.append(part)
        return b"/".join(reversed(parts))

    def put_name(self, name: Name, new: Child | None) -> InodeNumber | None:
        """What a name means from now on; returns what it meant."""
        parent, own = name
        entries = self.children.setdefault(parent, {})
        old = entries.pop(own, None)
        if old is not None:
            self._unname(old, parent, own)
        if new is not None:
            entries[own] = new
            self.names.setdefault(new.ino, set()).add(name)
            if stat.S_ISDIR(new.kind):
                self._subdirectories[parent] = self._subdirectories.get(parent, 0) + 1
        if not entries:
            del self.children[parent]
        return old.ino if old else None

    def _unname(self, old: Child, parent: InodeNumber, name: bytes) -> None:
        names = self.names[old.ino]
        names.discard((parent, name))
        if not names:
            del self.names[old.ino]
        if stat.S_ISDIR(old.kind):
            self._subdirectories[parent] -= 1
            if not self._subdirectories[parent]:
                del self._subdirectories[parent]
