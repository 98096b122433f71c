"""What the files of a write that was not committed say: where each byte of the file is.

Reads what `staging` wrote; that module describes the formats. A *layout* says for every chunk
position: in staging files where they were written, below that in the chunk that the position was
sealed as, below that in the base version, and else zero. It is what the `WorkingCopy` knew, derived
from the journal and the sizes of the staging files. Nothing here changes a file.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from modelfs import stripe
from modelfs.chunk import HASH_BYTES, ChunkRef
from modelfs.errors import ProtocolError
from modelfs.extents import Extents
from modelfs.ids import ChunkId, Epoch, InodeNumber
from modelfs.inode import Inode, decode_inode, encode
from modelfs.limits import CHUNK_BYTES_MAX, FILE_BYTES_MAX
from modelfs.manifest import PlacedChunk
from modelfsd.writing.staging import DESCRIPTION, JOURNAL

DESCRIPTION_BYTES_MAX = 1 << 20
CHUNK_NAME_BYTES = 32
CRASHED = "the daemon ended before the file was closed"


@dataclass(frozen=True, slots=True)
class Description:
    """What `description.json` says."""

    path: str  # in the mount, when the writing began
    node: str
    base: Inode  # the version that the writer started from
    base_limit: int  # bytes of it that were still part of the file
    cut_size: int  # the file's size but for what was written since
    why: str
    is_lost: bool  # False: it had not failed; its daemon was killed, or still runs

    def as_json(self, ino: InodeNumber) -> dict[str, object]:
        """What `read_description` reads, and for people the inode and the time."""
        return {
            "path": self.path,
            "node": self.node,
            "ino": ino,
            "base": base64.b64encode(encode(replace(self.base, xattrs={}))).decode("ascii"),
            "base_limit": self.base_limit,
            "cut_size": self.cut_size,
            "time": time.time(),
            "why": self.why,
            "is_lost": self.is_lost,
        }


@dataclass(frozen=True, slots=True)
class Sealed:
    """A position that was about to become a chunk."""

    file: str  # its staging file, if that is still there
    length: int
    chunk: PlacedChunk | None  # None: all zeros


@dataclass(frozen=True, slots=True)
class Staged:
    """A position that was being written."""

    file: str
    extents: Extents


@dataclass(slots=True)
class Layout:
    """Where the bytes of a file are; by chunk position."""

    base: Inode
    size: int
    base_limit: int
    staged: dict[int, Staged] = field(default_factory=dict)
    sealed: dict[int, Sealed] = field(default_factory=dict)
    limits: dict[int, int] = field(default_factory=dict)  # of what lies under a position, in bytes

    def under_limit(self, index: int) -> int:
        """How many bytes of a position its chunk, or the base version, provides."""
        start, span = stripe.span(self.base.chunk_bytes, index)
        below = span if index in self.sealed else max(0, min(span, self.base_limit - start))
        return min(below, self.limits.get(index, span))


def read_description(directory: Path) -> Description:
    """Raises FileNotFoundError, and `ProtocolError` if it is damaged."""
    with open(directory / DESCRIPTION, "rb") as file:
        content = file.read(DESCRIPTION_BYTES_MAX)
    try:
        told = json.loads(content)
        base = decode_inode(base64.b64decode(told["base"], validate=True))
        description = Description(
            str(told["path"]),
            str(told["node"]),
            base,
            _count(told["base_limit"], FILE_BYTES_MAX),
            _count(told["cut_size"], FILE_BYTES_MAX),
            str(told["why"]),
            told["is_lost"] is True,
        )
        stripe.tiers(base.chunk_bytes)
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise ProtocolError(f"{directory / DESCRIPTION} is damaged: {error!r}") from error
    return description


def read_journal(directory: Path) -> list[dict[str, Any]]:
    """The records; a line that was torn is passed over."""
    try:
        lines = (directory / JOURNAL).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def read_layout(directory: Path, description: Description) -> Layout:
    """Where the bytes of a lost file are. Raises `ProtocolError` if the journal makes no sense."""
    sizes = {}
    for path in directory.iterdir():
        if _parts(path.name) is not None:
            with suppress(FileNotFoundError):  # a chunk by now, as the journal says
                sizes[path.name] = path.stat().st_size
    try:
        return replay(description, read_journal(directory), sizes)
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise ProtocolError(f"{directory / JOURNAL} is damaged: {error!r}") from error


def replay(
    description: Description, records: Iterable[Mapping[str, Any]], sizes: Mapping[str, int]
) -> Layout:
    """The layout that the records lead to, with staging files of these sizes.

    Raises `ProtocolError`, KeyError, TypeError, ValueError or AssertionError for nonsense.
    """
    replayed = _Replay(description)
    for record in records:
        replayed.take(record)
    for file in sorted(sizes, key=_require_parts):
        replayed.add_staged(file, sizes[file])
    return replayed.layout


@dataclass(frozen=True, slots=True)
class _Cut:
    """A shortening of the file."""

    serial: int  # of the first staging file after it
    border: int  # the position in which the file ends now
    within: int  # bytes of that position

    def voids(self, index: int, serial: int) -> bool:
        """Whether it took a staging file away."""
        is_past = index > self.border or (index == self.border and not self.within)
        return serial < self.serial and is_past


class _Replay:
    """Takes one record after the other."""

    def __init__(self, description: Description) -> None:
        self.layout = Layout(description.base, description.cut_size, description.base_limit)
        self._journaled: dict[str, Extents] = {}
        self._sealed_files: set[str] = set()
        self._cuts: list[_Cut] = []
        self._limited: set[str] = set()  # staging files that outlived the last cut

    def take(self, record: Mapping[str, Any]) -> None:
        """A record that is none of ours is passed over."""
        if "grow" in record:
            self.layout.size = _count(record["grow"], FILE_BYTES_MAX)
        elif "cut" in record:
            self._cut(_count(record["cut"], FILE_BYTES_MAX), int(record["serial"]))
        elif "limit" in record:
            index, within = int(record["limit"]), _count(record["within"], CHUNK_BYTES_MAX)
            if record["file"] in self._sealed_files:  # else it would be another file's
                self._unseal(record["file"])
            self.layout.limits[index] = min(self.layout.limits.get(index, within), within)
            self._limited.add(record["file"])
            if record["file"] in self._journaled:
                self._journaled[record["file"]].clip(within)
        elif "written" in record:
            if record["file"] in self._sealed_files:
                self._unseal(record["file"])
            extents = self._journaled.setdefault(record["file"], Extents())
            for start, end in record["extents"]:
                extents.add(_count(start, CHUNK_BYTES_MAX), _count(end, CHUNK_BYTES_MAX))
        elif "seal" in record:
            self._sealed_files.add(record["file"])
            if not self._is_void(record["file"]):
                self._seal(record)

    def _cut(self, size: int, serial: int) -> None:
        layout = self.layout
        layout.size, layout.base_limit = size, min(layout.base_limit, size)
        cut = _Cut(serial, *stripe.locate(layout.base.chunk_bytes, size))
        self._cuts.append(cut)
        self._limited.clear()
        for index in [index for index in layout.sealed if cut.voids(index, -1)]:
            del layout.sealed[index]
        for index in [index for index in layout.limits if cut.voids(index, -1)]:
            del layout.limits[index]

    def _is_void(self, file: str) -> bool:
        parts = _require_parts(file)
        return any(cut.voids(*parts) for cut in self._cuts)

    def _seal(self, record: Mapping[str, Any]) -> None:
        file, length = record["file"], _count(record["length"], CHUNK_BYTES_MAX)
        index, serial = _require_parts(file)
        chunk = None if record["chunk"] is None else placed_chunk(record["chunk"])
        self.layout.sealed[index] = Sealed(file, length, chunk)
        self.layout.limits.pop(index, None)
        last = self._cuts[-1] if self._cuts else None
        if last and serial < last.serial and index == last.border and file not in self._limited:
            length = min(length, last.within)  # it was on its way when the file was cut
        start, _ = stripe.span(self.layout.base.chunk_bytes, index)
        self.layout.size = max(self.layout.size, start + length)

    def _unseal(self, file: str) -> None:
        """It did not become a chunk after all."""
        self._sealed_files.remove(file)
        index, _ = _require_parts(file)
        sealed = self.layout.sealed.get(index)
        if sealed is not None and sealed.file == file:
            del self.layout.sealed[index]
            self._journaled.setdefault(file, Extents()).add(0, sealed.length)

    def add_staged(self, file: str, size: int) -> None:
        """A staging file that is there; the latest of a position comes last."""
        if file in self._sealed_files or self._is_void(file):
            return
        index, _ = _require_parts(file)
        start, span = stripe.span(self.layout.base.chunk_bytes, index)
        extents = self._journaled.get(file)
        if extents is None:
            extents = Extents()
            if size:
                extents.add(0, min(size, span))
        extents.clip(span)
        self.layout.staged[index] = Staged(file, extents)
        if extents.end:
            self.layout.size = max(self.layout.size, start + extents.end)


def _parts(file: str) -> tuple[int, int] | None:
    """(position, serial) of a staging file's name; None for other files."""
    index, dash, serial = file.partition("-")
    is_ours = dash and index.isascii() and index.isdigit() and serial.isascii() and serial.isdigit()
    return (int(index), int(serial)) if is_ours else None


def _require_parts(file: str) -> tuple[int, int]:
    parts = _parts(file)
    if parts is None:
        raise ProtocolError(f"{file!r} is not a staging file")
    return parts


def placed_chunk(chunk: Mapping[str, Any]) -> PlacedChunk:
    """A chunk as a record names it. Raises `ProtocolError`."""
    try:
        name = bytes.fromhex(chunk["id"])
        length = _count(chunk["length"], CHUNK_BYTES_MAX)
        checksum = _count(chunk["checksum"], (1 << 8 * HASH_BYTES) - 1)
        epoch = Epoch(_count(chunk["epoch"], (1 << 32) - 1))
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"a damaged record of a chunk: {error!r}") from error
    if len(name) != CHUNK_NAME_BYTES or not length:
        raise ProtocolError("a damaged record of a chunk")
    return PlacedChunk(ChunkRef(ChunkId(name), checksum, length), epoch)


def _count(value: object, largest: int) -> int:
    if type(value) is not int or not 0 <= value <= largest:
        raise ValueError(f"{value!r} is not a number up to {largest}")
    return value
