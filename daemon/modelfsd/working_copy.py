"""A working copy: a file as its writer sees it, before it is committed.

It is the base version, overlaid with what was written. Written bytes go to *staging files*, one
for each chunk position. A staging file that is complete is *sealed*: named, put on its replicas
and remembered as a chunk; if this node is to hold it, the file itself moves into the store, so its
bytes are written once. What lies under a chunk position is, in this order: a staged chunk where it
was written, a sealed chunk, the base version, zeros.

Invariants:
- a position is staged or sealed or neither, never both, except while it is being sealed;
- `_base_limit` bytes of the base version are still part of the file: truncating lowers it for good;
- `_Staged.under_limit` is the same for what lies under one staged chunk.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import trio

from modelfs import stripe
from modelfs.chunk import Buffer, describe, is_zeros
from modelfs.errors import FileTooLarge, OutOfSpace
from modelfs.extents import Extents
from modelfs.ids import InodeNumber
from modelfs.inode import Inode
from modelfs.limits import FILE_BYTES_MAX
from modelfs.manifest import PlacedChunk
from modelfsd.contents import Contents, zeros
from modelfsd.replicator import Placements, Replicator

JOURNAL = "sealed.jsonl"
DESCRIPTION = "description.json"


@dataclass(slots=True, eq=False)
class _Staged:
    """A chunk position that is being written."""

    path: Path
    under_limit: int  # bytes of the chunk that what lies under it still provides
    extents: Extents = field(default_factory=Extents)
    lock: trio.Lock = field(default_factory=trio.Lock)


class WorkingCopy:
    """The uncommitted state of one file. Callers keep WRITEs and commits apart."""

    def __init__(
        self,
        ino: InodeNumber,
        base: Inode,
        directory: Path,
        contents: Contents,
        replicator: Replicator,
        limiter: trio.CapacityLimiter,
        path: str,
    ) -> None:
        self.ino, self.base, self.directory = ino, base, directory
        self.size = base.size
        self.mtime_ns: int | None = None  # as the kernel last told us, since the base version
        self.is_dirty = False
        self.placements = Placements()
        self._contents, self._replicator, self._limiter = contents, replicator, limiter
        self._base_limit = base.size
        self._staged: dict[int, _Staged] = {}
        self.sealed: dict[int, PlacedChunk | None] = {}
        self._has_directory = False
        self._path = path

    # ------------------------------------------------------------ writing

    async def write(self, offset: int, data: Buffer) -> list[int]:
        """Stage bytes. Returns the positions of the chunks that this completed.

        Raises `OutOfSpace` and `FileTooLarge`; then the copy must not be committed.
        """
        if offset + len(data) > FILE_BYTES_MAX:
            raise FileTooLarge(self.ino)
        view = memoryview(data)
        completed: list[int] = []
        done = 0
        for piece in stripe.cut(self.base.chunk_bytes, offset, len(data)):
            await self._stage(piece, view[done : done + piece.size], completed)
            done += piece.size
        self.size = max(self.size, offset + len(data))
        self.is_dirty = True
        return completed

    async def _stage(
        self, piece: stripe.ChunkRange, data: memoryview, completed: list[int]
    ) -> None:
        while True:
            staged = self._staged.get(piece.index) or await self._begin(piece.index)
            async with staged.lock:
                if self._staged.get(piece.index) is not staged:
                    continue  # it was sealed while we waited
                await trio.to_thread.run_sync(
                    _write_at, staged.path, data, piece.start, limiter=self._limiter
                )
                staged.extents.add(piece.start, piece.start + piece.size)
                if staged.extents.covers(0, stripe.span(self.base.chunk_bytes, piece.index)[1]):
                    completed.append(piece.index)
                return

    async def _begin(self, index: int) -> _Staged:
        """Start to stage a position."""
        if not self._has_directory:
            await trio.to_thread.run_sync(self._make_directory)
        if index not in self._staged:
            start, span = stripe.span(self.base.chunk_bytes, index)
            limit = span if index in self.sealed else max(0, min(span, self._base_limit - start))
            self._staged[index] = _Staged(self.directory / f"{index}", limit)
        return self._staged[index]

    def _make_directory(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._has_directory = True
        self.describe_on_disk("the daemon ended before the file was closed")

    async def truncate(self, size: int) -> None:
        """Set the file's size. What is cut off reads as zeros should the file grow again."""
        if size > FILE_BYTES_MAX:
            raise FileTooLarge(self.ino)
        shrinks = size < self.size
        self.size = size
        self.is_dirty = True
        if not shrinks:
            return
        border, within = stripe.locate(self.base.chunk_bytes, size)
        for index in [i for i in (*self._staged, *self.sealed) if i > border or not within]:
            if index >= border:
                await self._discard(index)
        self._base_limit = min(self._base_limit, size)
        if within:
            staged = self._staged.get(border) or await self._begin(border)
            async with staged.lock:
                staged.extents.clip(within)
                staged.under_limit = min(staged.under_limit, within)
                await trio.to_thread.run_sync(_cut_at, staged.path, within)

    async def _discard(self, index: int) -> None:
        staged = self._staged.get(index)
        if staged is not None:
            async with staged.lock:
                self._staged.pop(index, None)
                staged.path.unlink(missing_ok=True)
        self.sealed.pop(index, None)

    # ------------------------------------------------------------ reading

    async def read(self, offset: int, size: int) -> bytes | memoryview:
        """Up to `size` bytes from `offset`, as written so far."""
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        parts: list[bytes | memoryview] = []
        for piece in stripe.cut(self.base.chunk_bytes, offset, size):
            staged = self._staged.get(piece.index)
            if staged is None:
                parts.append(await self._under(piece.index, piece.start, piece.size))
                continue
            async with staged.lock:
                if self._staged.get(piece.index) is staged:
                    parts.append(await self._overlay(piece, staged))
                    continue
            parts.append(await self._under(piece.index, piece.start, piece.size))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _overlay(self, piece: stripe.ChunkRange, staged: _Staged) -> bytes:
        """A range of a staged chunk, with what lies under it in the gaps."""
        data = await trio.to_thread.run_sync(
            _read_at, staged.path, piece.start, piece.size, limiter=self._limiter
        )
        end = piece.start + piece.size
        for gap_start, gap_end in list(staged.extents.gaps(piece.start, end)):
            under = await self._under_staged(piece.index, staged, gap_start, gap_end)
            data[gap_start - piece.start : gap_end - piece.start] = under
        return bytes(data)

    async def _under_staged(
        self, index: int, staged: _Staged, start: int, end: int
    ) -> bytes | memoryview:
        valid = max(0, min(end, staged.under_limit) - start)
        if not valid:
            return zeros(end - start)
        data = await self._under(index, start, valid)
        return b"".join((data, zeros(end - start - valid)))

    async def _under(self, index: int, start: int, size: int) -> bytes | memoryview:
        """A range of a chunk position, as sealed or in the base version; zeros elsewhere."""
        if index in self.sealed:
            placed = self.sealed[index]
            if placed is None:
                return zeros(size)
            return await self._contents.chunk_range(placed, self.base.replicas, start, size)
        offset = stripe.span(self.base.chunk_bytes, index)[0] + start
        valid = max(0, min(size, self._base_limit - offset))
        data = await self._contents.read(self.base, offset, valid)
        return data if len(data) == size else b"".join((data, zeros(size - len(data))))

    # ------------------------------------------------------------ sealing

    def staged_positions(self) -> list[int]:
        """The positions that are not sealed yet."""
        return sorted(self._staged)

    def staged_bytes_of(self, index: int) -> int:
        """How many bytes sealing a position will hold in memory."""
        return self._length_of(index)

    def _length_of(self, index: int) -> int:
        start, span = stripe.span(self.base.chunk_bytes, index)
        return max(0, min(span, self.size - start))

    async def seal(self, index: int) -> None:
        """Make a chunk of a staged position and put it on its replicas."""
        staged = self._staged.get(index)
        if staged is None:
            return
        async with staged.lock:
            if self._staged.get(index) is not staged:
                return
            length = self._length_of(index)
            placed = await self._put(index, staged, length) if length else None
            self.sealed[index] = placed
            del self._staged[index]
            await trio.to_thread.run_sync(self._note_sealed, index, placed, staged.path)

    async def _put(self, index: int, staged: _Staged, length: int) -> PlacedChunk | None:
        for start, end in list(staged.extents.gaps(0, min(length, staged.under_limit))):
            under = await self._under(index, start, end - start)
            if not is_zeros(under):
                await trio.to_thread.run_sync(_write_at, staged.path, under, start)
        data = await trio.to_thread.run_sync(
            _read_exactly, staged.path, length, limiter=self._limiter
        )
        if is_zeros(data):
            return None  # a hole
        ref, table = await trio.to_thread.run_sync(describe, data, limiter=self._limiter)
        replicas = self.base.replicas
        return await self._replicator.put(ref, table, data, replicas, self.placements, staged.path)

    def _note_sealed(self, index: int, placed: PlacedChunk | None, path: Path) -> None:
        """Keep a record of what is no longer in a staging file, for recovery after a crash."""
        path.unlink(missing_ok=True)
        chunk = placed and {
            "id": placed.ref.id.hex(),
            "checksum": placed.ref.checksum,
            "length": placed.ref.length,
            "epoch": placed.epoch,
        }
        with open(self.directory / JOURNAL, "a") as journal:
            journal.write(json.dumps({"index": index, "chunk": chunk}) + "\n")

    async def stage_inline_base(self) -> None:
        """Contents that stood in the base's record become a chunk, now that they outgrew it."""
        if self.base.inline and self._base_limit and 0 not in self.sealed:
            await self._begin(0)

    async def inline_contents(self, size_max: int) -> bytes | None:
        """The whole contents, if they fit in an inode record."""
        return bytes(await self.read(0, self.size)) if self.size <= size_max else None

    @property
    def base_limit(self) -> int:
        """How many bytes of the base version are still part of the file."""
        return self._base_limit

    def describe_on_disk(self, why: str) -> None:
        """Write beside the staged bytes what they are, for recovery. Blocks."""
        if self._has_directory:
            description = {
                "path": self._path,
                "ino": self.ino,
                "base_version": self.base.version,
                "chunk_bytes": self.base.chunk_bytes,
                "size": self.size,
                "time": time.time(),
                "why": why,
            }
            (self.directory / DESCRIPTION).write_text(json.dumps(description) + "\n")

    def rebase(self, committed: Inode) -> None:
        """The copy has been committed as this record: it is the base now."""
        assert not self._staged or committed.inline is not None
        self.base = committed
        self._base_limit = committed.size
        for staged in self._staged.values():
            staged.path.unlink(missing_ok=True)
        self._staged.clear()
        self.sealed.clear()
        self.is_dirty = False
        self.mtime_ns = None

    def discard(self) -> None:
        """Remove the staging files. Blocks."""
        if self._has_directory:
            shutil.rmtree(self.directory)
            self._has_directory = False

    def keep(self, lost_dir: Path) -> None:
        """Move the staging files to where recovery looks for them. Blocks."""
        if self._has_directory:
            os.rename(self.directory, lost_dir / self.directory.name)
            self._has_directory = False


def _write_at(path: Path, data: Buffer, offset: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], offset + done)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfSpace(f"no room for {len(data)} bytes in {path.parent}") from error
        raise
    finally:
        os.close(descriptor)


def _read_at(path: Path, offset: int, size: int) -> bytearray:
    """`size` bytes; what the file does not have is zeros."""
    data = bytearray(size)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return data  # nothing was written yet
    try:
        view, done = memoryview(data), 0
        while done < size and (count := os.preadv(descriptor, [view[done:]], offset + done)):
            done += count
    finally:
        os.close(descriptor)
    return data


def _read_exactly(path: Path, length: int) -> bytearray:
    """A whole staging file, made `length` bytes long: the store may take it as it is."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, length)
    finally:
        os.close(descriptor)
    return _read_at(path, 0, length)


def _cut_at(path: Path, size: int) -> None:
    try:
        if path.stat().st_size > size:
            os.truncate(path, size)
    except FileNotFoundError:
        return  # nothing was written yet
