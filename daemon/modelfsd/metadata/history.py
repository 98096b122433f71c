"""What `modelfs info --versions` and `modelfs restore` ask the daemon.

A restored version becomes the newest one: of the file, if its name is still there, else of a new
file. It shares the old one's chunks, so nothing is copied. Its transaction compares the history
entry that it comes from: until it has happened the entry keeps the chunks, from then on the file.
A restored directory is the old one, with its inode number, so the history below it is reachable
again; it is empty, and what was in it is restored name by name.

These changes are not made by this node's kernel. So they are announced to it like another node's:
whoever has the file open here keeps the version that he opened.
"""

from __future__ import annotations

import os
import shlex
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from modelfs import changes, keys
from modelfs.errors import (
    MetadataUnavailable,
    NoSuchEntry,
    ProtocolError,
    UserError,
    WriteLost,
    WriterElsewhere,
)
from modelfs.history import Retained, decode_retained
from modelfs.ids import ROOT_INODE, InodeNumber, NodeId, Revision
from modelfs.inode import Inode
from modelfs.mirror import Child
from modelfs.policy import GoneDirectories, expires_ns, number_of
from modelfs.ports import Compare, KeyValue, MetadataStore, Target, Txn
from modelfsd.commands.status import TYPES
from modelfsd.metadata.locating import names_of, path_text
from modelfsd.writing.writer import Writer

ATTEMPTS_MAX = 20  # at a restore; each failure means that somebody else changed the name
BUSY_SECONDS = 5.0  # that a restore waits for a writer
GONE_NAMES_MAX = 1000  # that `versions` lists of a directory
NUMBER_MAX = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class _Place:
    """A name, and the directories on the way to it that are gone, with their latest numbers."""

    names: list[bytes]
    parent: InodeNumber
    gone: list[tuple[list[bytes], int]]
    policies: GoneDirectories  # of those directories

    @property
    def name(self) -> bytes:
        return self.names[-1]


class History:
    """Answers `versions` and `restore`."""

    def __init__(
        self,
        writer: Writer,
        store: MetadataStore,
        name_of: Callable[[NodeId], str],
        mountpoint: Path,
    ) -> None:
        self._namespace, self._leases = writer.namespace, writer.leases
        self._contents, self._store = writer.contents, store
        self._mirror = writer.namespace.mirror
        self._name_of, self._mountpoint = name_of, mountpoint

    # ------------------------------------------------------------ listing

    async def versions(self, request: dict[str, Any]) -> dict[str, Any]:
        """The handler of `modelfs info PATH --versions`: the newest first."""
        names = names_of(request)
        await self._fresh()
        if not names:
            return {"path": "/", "current": None, "versions": [], **self._gone_in(ROOT_INODE)}
        place = await self._locate(names)
        entries = await self._entries(place.parent, place.name)
        now = self._current(place)
        rows = [self._row(place, number, entry) for number, entry in reversed(entries)]
        if now is None and not rows:
            raise UserError(f"{self._said(names)} does not exist, and nothing of it is retained")
        answer: dict[str, Any] = {"path": path_text(names), "current": None, "versions": rows}
        if now is not None:
            child, record = now
            number = number_of(self._mirror, place.parent, place.name)
            answer["current"] = number
            rows.insert(0, self._described(number, record, NodeId(record.editor)))
            directory = child.ino if record.is_directory else None
        else:
            newest = entries[-1][1]
            directory = InodeNumber(newest.ino) if newest.record.is_directory else None
        if directory is not None:
            answer |= self._gone_in(directory)
        if place.gone:
            answer["removed_directories"] = [
                {"path": path_text(prefix), "number": number} for prefix, number in place.gone
            ]
        return answer

    def _row(self, place: _Place, number: int, entry: Retained) -> dict[str, Any]:
        defaults = self._namespace.defaults
        ends_ns = expires_ns(self._mirror, place.parent, entry, place.policies, defaults)
        row = self._described(number, entry.record, NodeId(entry.node))
        return row | {
            "current": False,
            "why": entry.why,
            "superseded_ns": entry.superseded_ns,
            "expires_ns": ends_ns,
        }

    def _described(self, number: int, record: Inode, node: NodeId) -> dict[str, Any]:
        return {
            "number": number,
            "current": True,
            "type": TYPES.get(record.kind, "unknown"),
            "size": record.size,
            "mtime_ns": record.mtime_ns,
            "why": "",
            "superseded_ns": None,
            "expires_ns": None,
            "node": self._name_of(node) if node else "",
        }

    def _gone_in(self, directory: InodeNumber) -> dict[str, Any]:
        """The names in a directory of which only the history knows."""
        known = self._mirror.history.names(directory)
        gone = [name for name in known if self._mirror.child(directory, name) is None]
        shown = [name.decode(errors="surrogateescape") for name in gone[:GONE_NAMES_MAX]]
        return {"gone_names": shown, "gone_name_count": len(gone)}

    # ------------------------------------------------------------ finding

    async def _fresh(self) -> None:
        if not await self._namespace.fresh():
            raise MetadataUnavailable("etcd is out of reach, and with it the history")

    def _said(self, names: list[bytes]) -> str:
        """A path for people."""
        return str(self._mountpoint) + path_text(names).rstrip("/")

    def _typed(self, names: list[bytes]) -> str:
        """A path as it is to be typed in bash, whatever its bytes."""
        path = b"/".join((os.fsencode(self._mountpoint), *names))
        if (text := os.fsdecode(path)).isprintable():
            return shlex.quote(text)
        is_plain = frozenset(range(0x20, 0x7F)) - frozenset(b"'\\")
        escaped = "".join(chr(c) if c in is_plain else f"\\x{c:02x}" for c in path)
        return f"$'{escaped}'"

    def _current(self, place: _Place) -> tuple[Child, Inode] | None:
        child = self._mirror.child(place.parent, place.name)
        record = self._mirror.inode(child.ino) if child is not None else None
        return (child, record) if child is not None and record is not None else None

    async def _entries(self, parent: InodeNumber, name: bytes) -> list[tuple[int, Retained]]:
        """What is retained of a name, by number."""
        _, rows = await self._store.load(keys.history_of(parent, name))
        entries = []
        for row in rows:
            with suppress(ProtocolError):  # `status` and the log name it
                entries.append((keys.split_history(row.key)[2], decode_retained(row.value)))
        return entries

    async def _locate(self, names: list[bytes]) -> _Place:
        """Where a name is, or was: through living directories and, where one is gone, history."""
        ino = ROOT_INODE
        gone: list[tuple[list[bytes], int]] = []
        policies = GoneDirectories()
        for depth, name in enumerate(names[:-1]):
            child = self._mirror.child(ino, name)
            if child is not None and stat.S_ISDIR(child.kind):
                ino = child.ino
                continue
            entries = await self._entries(ino, name)
            directories = [(n, entry) for n, entry in entries if entry.record.is_directory]
            if not directories:
                raise UserError(f"there is no directory {self._said(names[: depth + 1])}")
            number, entry = directories[-1]
            gone.append((names[: depth + 1], number))
            policies.add(ino, entry)
            ino = InodeNumber(entry.ino)
        return _Place(names, ino, gone, policies)

    # ------------------------------------------------------------ restoring

    async def restore(self, request: dict[str, Any]) -> dict[str, Any]:
        """The handler of `modelfs restore PATH --version N`."""
        names, number = names_of(request), request.get("number")
        if not isinstance(number, int) or not 0 < number <= NUMBER_MAX:
            raise UserError(f"{number!r} is not the number of a version")
        if not names:
            raise UserError("the root of the mount has no earlier versions")
        for _ in range(ATTEMPTS_MAX):
            await self._fresh()
            place = await self._locate(names)
            row = await self._require_entry(place, number)
            entry = decode_retained(row.value)
            if entry.record.manifest is not None:
                await self._contents.all_entries(entry.record)  # raises if they cannot be read
            if await self._restore_once(place, row, entry):
                return {
                    "path": path_text(names),
                    "restored": number,
                    "number": number_of(self._mirror, place.parent, place.name),
                    "type": TYPES.get(entry.record.kind, "unknown"),
                    "size": entry.record.size,
                }
        raise UserError(f"{self._said(names)} keeps being changed: try again")

    async def _require_entry(self, place: _Place, number: int) -> KeyValue:
        """The history entry to restore from. Raises `UserError` that says what is possible."""
        if place.gone:
            prefix, last = place.gone[0]
            raise UserError(
                f"the directory {self._said(prefix)} was removed: restore it first, with\n"
                f"  modelfs restore {self._typed(prefix)} --version {last}"
            )
        if number == number_of(self._mirror, place.parent, place.name):
            raise UserError(f"version {number} of {self._said(place.names)} is the current one")
        row = await self._store.get(keys.history(place.parent, place.name, number))
        if row is None:
            retained = [n for n, _ in await self._entries(place.parent, place.name)]
            what = f"retained are {', '.join(map(str, retained))}" if retained else "none is"
            raise UserError(
                f"version {number} of {self._said(place.names)} is not retained ({what})"
            )
        return row

    async def _restore_once(self, place: _Place, row: KeyValue, entry: Retained) -> bool:
        """One attempt. False if the name changed meanwhile, or the entry went."""
        now = self._current(place)
        if now is None and entry.record.is_directory:
            return await self._make_directory(place, row, entry)
        if now is None:
            return await self._make_file(place, row, entry)
        child, record = now
        if not (record.is_file and entry.record.is_file):
            kind = TYPES.get(record.kind, "unknown")
            raise UserError(f"{self._said(place.names)} is a {kind} now: move it away first")
        return await self._rewrite(place, row, entry, child.ino)

    async def _make_directory(self, place: _Place, row: KeyValue, entry: Retained) -> bool:
        ino = InodeNumber(entry.ino)
        if self._mirror.inode(ino) is not None:
            path = self._said([self._mirror.path_of(ino)])
            raise UserError(f"that directory is back already, as {path}")
        record = replace(entry.record, ctime_ns=time.time_ns())
        return await self._create(place, row, ino, record)

    async def _make_file(self, place: _Place, row: KeyValue, entry: Retained) -> bool:
        ino = await self._namespace.new_inode_number()
        record = replace(
            entry.record,
            ctime_ns=time.time_ns(),
            nlink=1,
            version=1,
            touches=0,
            editor=self._namespace.node_id,
        )
        return await self._create(place, row, ino, record)

    async def _create(self, place: _Place, row: KeyValue, ino: InodeNumber, record: Inode) -> bool:
        if self._current(place) is not None or self._mirror.inode(place.parent) is None:
            return False
        plan = changes.create(self._mirror, place.parent, place.name, ino, record)
        never_used = Compare(keys.inode(ino), Target.CREATE, Revision(0))
        return await self._attempt(plan, row, never_used)

    async def _rewrite(
        self, place: _Place, row: KeyValue, entry: Retained, ino: InodeNumber
    ) -> bool:
        try:
            token = await self._leases.take(ino, lambda reason: None, BUSY_SECONDS)
        except NoSuchEntry:
            return False
        except WriterElsewhere as error:
            holder = self._mirror.lease(ino)
            where = f" on node {self._name_of(holder[0])}" if holder else ""
            raise UserError(
                f"{self._said(place.names)} is being written{where}: "
                "restore it once it has been closed"
            ) from error
        try:
            now = self._current(place)
            if now is None or now[0].ino != ino:
                return False
            contents = replace(entry.record, editor=self._namespace.node_id)
            plan = changes.commit_contents(
                self._mirror,
                ino,
                token,
                now[1].version,
                contents,
                time.time_ns(),
                self._namespace.keep,
            )
            return await self._attempt(plan, row)
        except (NoSuchEntry, WriteLost):
            return False
        finally:
            await self._leases.drop(ino, token)

    async def _attempt(self, plan: changes.Plan[Inode], row: KeyValue, *compares: Compare) -> bool:
        still_retained = Compare(row.key, Target.CREATE, row.create_revision)
        txn = Txn((*plan.txn.compares, still_retained, *compares), plan.txn.ops)
        return await self._namespace.attempt(txn, by_kernel=False)
