"""The files of one working copy: what a writer has written and nobody has committed yet.

    <state_dir>/staging/<name>/          one directory for each file with uncommitted bytes
        <index>-<serial>                 a staging file: one chunk position of the file; the serial
                                         grows by one with each staging file of the directory
        description.json                 what it is (`describe`), and since when it is lost
        sealed.jsonl                     the journal
    <state_dir>/lost/<name>/             the same, once it can no longer be committed

A commit removes the directory, and the next write begins another one. What is still there when the
daemon starts was not committed: it moves to `lost/`, where nothing is ever deleted.

With the base version, which the description holds, these files are the file as its writer saw it,
also after a SIGKILL. `layout` reads them. Rules:

- A staging file without `written` records has been written from its first byte to its last. As soon
  as that is not so, every write to it is journaled, so that a gap is never taken for zeros. (The
  holes of sparse files would tell the same only where a file system's blocks are no larger than a
  write: not on ZFS, NFS or large pages.) Files that are written front to back need no records.
- A journal record is one line, written at once. It begins with a newline besides, so a line that
  was torn by a crash or a full disk spoils no other; a line that is no JSON object is passed over.
- Nothing here is fsynced: these bytes were promised to nobody. A crash of the daemon loses none of
  them, a power failure may.

Records of the journal, in the order in which things happened to any one position:

    {"seal": index, "file": name, "length": bytes, "chunk": {"id", "checksum", "length", "epoch"}}
        before the chunk is put: the staging file is complete, and is about to become this chunk
        (null: all zeros). If the file is still there it holds the same bytes, perhaps and a trailer
    {"written": index, "file": name, "extents": [[start, end], ...]}     offsets in the position.
        After a `seal` of that file: it did not become a chunk, and goes on as a staging file that
        was written up to that length
    {"grow": size}                       the file was made longer
    {"cut": size, "serial": n}           the file was made shorter; staging files with a smaller
                                         serial that lie wholly past its end are void. A position
                                         may be on its way to be sealed meanwhile, at its old length
    {"limit": index, "file": name, "within": bytes}     of the position that `cut` divides: no byte
                                         from there on, neither staged nor below it, counts any
                                         more. After a `seal` of that file: as with `written`
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from modelfs.chunk import Buffer, ChunkRef, is_zeros
from modelfs.errors import OutOfSpace
from modelfs.extents import Extents
from modelfs.ids import Epoch
from modelfsd.stages import timed
from modelfsd.storage.page_cache import write_directly
from modelfsd.storage.replicator import name_chunk
from modelfsd.writing.assembly import Assembly
from modelfsd.writing.batch import Batch

JOURNAL = "sealed.jsonl"
DESCRIPTION = "description.json"
FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})

Pieces = Sequence[tuple[int, Buffer]]  # (offset in the position, bytes), in order of time


@dataclass(slots=True, eq=False)
class StagedChunk:
    """A chunk position that is being written."""

    path: Path
    under_limit: int  # bytes of the chunk that what lies under it still provides
    extents: Extents = field(default_factory=Extents)
    is_journaled: bool = False
    assembly: Assembly | None = None  # holds all that the file holds
    gathering: Batch | None = None  # what will be written next
    lock: trio.Lock = field(default_factory=trio.Lock)

    def join_batch(self, start: int, data: memoryview) -> tuple[Batch, bool]:
        """Have a piece written with the next batch; and whether that begins with it."""
        batch = self.gathering
        if is_first := batch is None or batch.is_over:
            batch = self.gathering = Batch()
        batch.add(start, data)
        return batch, is_first

    def are_prefixes(self, runs: Iterable[tuple[int, int]]) -> bool:
        """Whether after each of these writes the file's length still says what was written."""
        intervals = list(self.extents)
        if intervals and intervals[0][0]:
            return False
        length = intervals[0][1] if intervals else 0
        for start, end in runs:
            if start > length:
                return False
            length = max(length, end)
        return True

    def from_memory(self, start: int, end: int) -> bytes | None:
        """Bytes as they were written, if all of them are in memory."""
        if self.assembly is None or not self.extents.covers(start, end):
            return None
        return bytes(self.assembly.data[start:end])

    def read(self, start: int, size: int) -> bytearray:
        """Bytes as the file has them; arbitrary where nothing was written."""
        if self.assembly is not None:
            return bytearray(self.assembly.data[start : start + size])
        return read_at(self.path, start, size)


class StagingDirectory:
    """One directory. Its methods block; whoever calls `write` holds the lock of the chunk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_made = False
        self._serial = 0

    def make(self, description: Mapping[str, object]) -> None:
        """Make the directory, if it is not there. Raises `OutOfSpace`, OSError."""
        if self.is_made:
            return
        with _full_disk_as_out_of_space(self.path):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.describe(description)
        self.is_made = True

    def describe(self, description: Mapping[str, object]) -> None:
        """Write what the directory is, whole or not at all. Raises OSError.

        On a full disk, which may be the very reason, the old text is written over: it is as long.
        """
        text = json.dumps(description).encode() + b"\n"
        temporary, final = self.path / f".{DESCRIPTION}", self.path / DESCRIPTION
        try:
            temporary.write_bytes(text)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno not in FULL_ERRNOS or not final.exists():
                raise
            write_at(final, text, 0)
            cut_at(final, len(text))
        else:
            temporary.replace(final)

    def new_chunk(self, index: int, under_limit: int) -> StagedChunk:
        """A staging file for a position; it is made by its first write."""
        self._serial += 1
        return StagedChunk(self.path / f"{index}-{self._serial - 1}", under_limit)

    # ------------------------------------------------------------ bytes

    def write(self, index: int, staged: StagedChunk, pieces: Pieces) -> None:
        """Write bytes of a position, one piece over the other. Raises `OutOfSpace`, OSError.

        What an assembly holds side by side is written at once.
        """
        assembly, runs = staged.assembly, [(at, at + len(data)) for at, data in pieces]
        if assembly is not None:
            merged = Extents()
            for at, data in pieces:
                assembly.take(data, at)
                merged.add(at, at + len(data))
            runs = list(merged)
            pieces = [(start, assembly.data[start:end]) for start, end in runs]
        is_journaled = staged.is_journaled or not staged.are_prefixes(runs)
        if is_journaled and not staged.is_journaled:
            self._note_written(index, staged, [list(extent) for extent in staged.extents])
            staged.is_journaled = True
        written: list[list[int]] = []
        try:
            for at, data in pieces:
                with timed("stage"):
                    write_at(staged.path, data, at, assembly is not None)
                written.append([at, at + len(data)])
        finally:
            if is_journaled and written:
                self._note_written(index, staged, written)

    # ------------------------------------------------------------ the journal

    def _note_written(self, index: int, staged: StagedChunk, extents: list[list[int]]) -> None:
        self._note({"written": index, "file": staged.path.name, "extents": extents})

    def name(
        self, index: int, staged: StagedChunk, data: Buffer, epoch: Epoch
    ) -> tuple[ChunkRef, bytes] | None:
        """Name the chunk that a staging file is about to become, and journal that.

        Returns reference and block table; None if it is all zeros.
        """
        named = None if is_zeros(data) else name_chunk(data)
        self.note_seal(index, staged, len(data), named and named[0], epoch)
        return named

    def note_seal(
        self, index: int, staged: StagedChunk, length: int, ref: ChunkRef | None, epoch: Epoch
    ) -> None:
        """A staging file is about to become a chunk; None: it is all zeros.

        Should it not become one, and be written once more, its length no longer says all.
        """
        chunk = ref and {
            "id": ref.id.hex(),
            "checksum": ref.checksum,
            "length": ref.length,
            "epoch": epoch,
        }
        self._note({"seal": index, "file": staged.path.name, "length": length, "chunk": chunk})
        staged.is_journaled = True

    def note_size(self, size: int, shrinks: bool) -> None:
        """The file is being set to another size."""
        self._note({"cut": size, "serial": self._serial} if shrinks else {"grow": size})

    def note_limit(self, index: int, staged: StagedChunk, within: int) -> None:
        """The file was made shorter, and this is the position that its end divides."""
        self._note({"limit": index, "file": staged.path.name, "within": within})

    def _note(self, record: Mapping[str, Any]) -> None:
        line = f"\n{json.dumps(record)}\n".encode()
        with _full_disk_as_out_of_space(self.path):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            descriptor = os.open(self.path / JOURNAL, flags, 0o600)
            try:
                if os.write(descriptor, line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)

    # ------------------------------------------------------------ the end

    def discard(self) -> None:
        """All of it was committed, or nobody wants it. Raises OSError."""
        if self.is_made:
            shutil.rmtree(self.path)
            self.is_made = False

    def keep(self, lost_dir: Path) -> None:
        """Move it to where recovery looks for it. Raises OSError."""
        if self.is_made:
            keep(self.path, lost_dir)
            self.is_made = False


def keep(directory: Path, lost_dir: Path) -> bool:
    """Move a staging directory to `lost/`; one in which nothing was written is removed (False).

    The time of the directory says from then on since when it is lost.
    """
    if not set(os.listdir(directory)) - {DESCRIPTION, f".{DESCRIPTION}"}:
        shutil.rmtree(directory)
        return False
    os.rename(directory, lost_dir / directory.name)
    os.utime(lost_dir / directory.name)
    return True


@contextmanager
def _full_disk_as_out_of_space(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL_ERRNOS:
            raise OutOfSpace(f"no room in {path}") from error
        raise


def write_at(path: Path, data: Buffer, offset: int, past_cache: bool = False) -> None:
    """Write all of `data`, if told so past the page cache. Raises `OutOfSpace`, OSError."""
    with _full_disk_as_out_of_space(path.parent):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            view, done = memoryview(data), 0
            if past_cache:
                done = write_directly(descriptor, view, offset)
            while done < len(view):
                done += os.pwrite(descriptor, view[done:], offset + done)
        finally:
            os.close(descriptor)


def read_at(path: Path, offset: int, size: int) -> bytearray:
    """`size` bytes; what the file does not have is zeros, also if there is no file."""
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


def set_length(path: Path, length: int) -> None:
    """Make a staging file `length` bytes long: the store may take it as it is."""
    with _full_disk_as_out_of_space(path.parent):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, length)
        finally:
            os.close(descriptor)


def read_exactly(path: Path, length: int) -> bytearray:
    """A whole staging file, made `length` bytes long."""
    set_length(path, length)
    return read_at(path, 0, length)


def cut_at(path: Path, size: int) -> None:
    """Make a staging file no longer than `size`."""
    try:
        if path.stat().st_size > size:
            os.truncate(path, size)
    except FileNotFoundError:
        return  # nothing was written yet
