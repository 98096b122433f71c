"""Retained versions: what a name showed before. The history follows the name, not the inode.

What a name shows has a *number*. For a living name it is its dentry's base plus the version of its
inode, and always more than any retained number (see `policy.number_of`). So it grows by one with
each commit, and `base` is chosen such that it also grows by one when another file is renamed onto
the name. When a name stops showing some contents, the same transaction puts an entry

    history/<parent>/<name>\\0<number>      Retained

and why: `rewritten` (a commit), `replaced` (a rename onto it) or `deleted`. Names that move away
leave no entry, since their contents live on elsewhere, nor do empty files that are rewritten: the
kernel makes a file empty whenever it is opened with O_TRUNC. Removed directories leave one too, so
that a path below one can be resolved: what is retained below it still has its inode number as
parent.

Numbers never clash. An entry for number n of a name is put by a transaction that compares the
name's dentry or its inode as the mirror shows them. Whoever put an entry of this name since would
have changed one of the two, so `highest` is not behind, and n is larger than all that is retained.

The values stay in etcd: an inode record for every version of the last hour, or week, would be many
times the namespace. The mirror knows the numbers alone (`HistoryIndex`), some 250 bytes a name.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
from msgspec import Meta

from modelfs import keys
from modelfs.errors import ProtocolError
from modelfs.ids import InodeNumber
from modelfs.inode import Inode, check_inode, is_retention
from modelfs.limits import INODE_BITS, KIB, NAME_BYTES_MAX, RECORD_BYTES_MAX

REWRITTEN, REPLACED, DELETED = "rewritten", "replaced", "deleted"
NAMES_KEPT_MAX = 16  # of one inode, when it is rewritten: an entry each, in one transaction
KEPT_BYTES_MAX = 512 * KIB  # then no further name: two records more still fit into the transaction


class Retained(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """What a name showed until `superseded_ns`."""

    ino: Annotated[int, Meta(ge=1, lt=1 << INODE_BITS)]
    record: Inode
    superseded_ns: int  # by the clock of `node`
    why: Annotated[str, Meta(max_length=NAME_BYTES_MAX)]
    node: Annotated[str, Meta(max_length=NAME_BYTES_MAX)]  # which node made the change
    retain_seconds: float  # that held then


_decoder = msgspec.msgpack.Decoder(Retained)


def decode_retained(value: bytes) -> Retained:
    """Raises `ProtocolError` if the entry is damaged."""
    if len(value) > RECORD_BYTES_MAX:
        raise ProtocolError(f"a history entry of {len(value)} bytes")
    try:
        entry = _decoder.decode(value)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"a damaged history entry: {error}") from error
    check_inode(entry.record)
    if not is_retention(entry.retain_seconds):
        raise ProtocolError(f"a history entry that is kept for {entry.retain_seconds} s")
    return entry


@dataclass(slots=True)
class HistoryIndex:
    """Which numbers of which names are retained, as the mirror follows it from keys alone."""

    count: int = 0
    _numbers: dict[InodeNumber, dict[bytes, list[int]]] = field(default_factory=dict)  # ascending

    def add(self, key: bytes) -> None:
        """An entry is there. Adding it twice does nothing."""
        parent, name, number = keys.split_history(key)
        numbers = self._numbers.setdefault(parent, {}).setdefault(name, [])
        place = bisect_left(numbers, number)
        if place == len(numbers) or numbers[place] != number:
            numbers.insert(place, number)
            self.count += 1

    def remove(self, key: bytes) -> None:
        """An entry is gone; if it never was there, nothing happens."""
        if key not in self:
            return
        parent, name, number = keys.split_history(key)
        numbers = self._numbers[parent][name]
        numbers.remove(number)
        self.count -= 1
        if not numbers:
            del self._numbers[parent][name]
        if not self._numbers[parent]:
            del self._numbers[parent]

    def __contains__(self, key: bytes) -> bool:
        parent, name, number = keys.split_history(key)
        return number in self._numbers.get(parent, {}).get(name, ())

    def keys(self) -> Iterator[bytes]:
        """The keys of all entries. Do not change the index meanwhile."""
        for parent, names in self._numbers.items():
            for name, numbers in names.items():
                yield from (keys.history(parent, name, number) for number in numbers)

    def highest(self, parent: InodeNumber, name: bytes) -> int:
        """The highest retained number of a name; 0 if there is none."""
        numbers = self._numbers.get(parent, {}).get(name)
        return numbers[-1] if numbers else 0

    def parents(self) -> list[InodeNumber]:
        """The directories, living or gone, of whose names something is retained."""
        return list(self._numbers)

    def names(self, parent: InodeNumber) -> list[bytes]:
        """The names in a directory, living or gone, of which something is retained."""
        return sorted(self._numbers.get(parent, ()))
