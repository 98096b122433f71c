"""A working copy: a file as its writer sees it, before it is committed.

It is the base version, overlaid with what was written. Written bytes go to *staging files*, one
for each chunk position. A staging file that is complete is *sealed*: named, put on its replicas
and remembered as a chunk; if this node is to hold it, the file itself moves into the store, so its
bytes are written once. What lies under a chunk position is, in this order: a staged chunk where it
was written, a sealed chunk, the base version, zeros.

A file whose contents stand in its inode record, before and after, needs none of this: all of it is
*held* in memory. What outgrows that is *spilled* into a staging file, and so is what was not
committed soon (`Writer`): then the end of a daemon loses no more than a moment.

Invariants:
- while the contents are held, nothing is staged or sealed, and they are `size` bytes;
- a position is staged or sealed or neither, never both, except while it is being sealed;
- `base_limit` bytes of the base version are still part of the file: truncating lowers it for good;
- `StagedChunk.under_limit` is the same for what lies under one staged chunk;
- the staging directory holds all of this at any moment (see `staging`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import trio

from modelfs import stripe
from modelfs.chunk import Buffer, is_zeros
from modelfs.errors import FileTooLarge, ModelfsError
from modelfs.ids import InodeNumber
from modelfs.inode import Inode, small_contents
from modelfs.limits import FILE_BYTES_MAX, INLINE_BYTES_MAX
from modelfs.manifest import PlacedChunk
from modelfsd.storage.contents import Contents, zeros
from modelfsd.storage.replicator import Placements, Replicator
from modelfsd.writing.assembly import AssemblyMemory
from modelfsd.writing.batch import Batch
from modelfsd.writing.layout import CRASHED, Description
from modelfsd.writing.staging import (
    StagedChunk,
    StagingDirectory,
    cut_at,
    read_exactly,
    set_length,
    write_at,
)


class WorkingCopy:
    """The uncommitted state of one file. Callers keep WRITEs, commits and truncations apart."""

    def __init__(
        self,
        ino: InodeNumber,
        base: Inode,
        directory: Path,
        contents: Contents,
        replicator: Replicator,
        limiter: trio.CapacityLimiter,
        memory: AssemblyMemory,
        path: str,
    ) -> None:
        self.ino, self.base = ino, base
        self.size = base.size
        self.mtime_ns: int | None = None  # as the kernel last told us, since the base version
        self.is_dirty = False
        self.placements = Placements()
        self._contents, self._replicator, self._limiter = contents, replicator, limiter
        self._memory = memory
        self.base_limit = base.size
        self._cut_size = base.size  # the file's size but for what was written since
        self._staged: dict[int, StagedChunk] = {}
        self.sealed: dict[int, PlacedChunk | None] = {}
        self._directory, self._commit_count = directory, 0
        self._files = StagingDirectory(directory)
        self._making = trio.Lock()
        self._held = small_contents(base)
        self.held_since: float | None = None  # trio's clock, if what is held was not committed
        self._path = path
        self._node_name = replicator.chunks.name_of(replicator.chunks.node_id)

    @property
    def stored_bytes_max(self) -> int:
        """What the file takes at most: what it took, and each chunk that was written to."""
        last = stripe.locate(self.base.chunk_bytes, self.size)[0]
        _, largest = stripe.span(self.base.chunk_bytes, last)
        changed_bytes = (len(self._staged) + len(self.sealed) + bool(self._held)) * largest
        return min(self.size, self.base.stored_bytes + changed_bytes)

    # ------------------------------------------------------------ writing

    async def write(self, offset: int, data: Buffer) -> list[int]:
        """Stage bytes. Returns the positions of the chunks that this completed.

        Raises `OutOfSpace` and `FileTooLarge`; then the copy must not be committed.
        """
        if offset + len(data) > FILE_BYTES_MAX:
            raise FileTooLarge(f"inode {self.ino} would grow past {FILE_BYTES_MAX} bytes")
        end = offset + len(data)
        if self._held is not None and (end > INLINE_BYTES_MAX or self._making.locked()):
            await self.spill()
        if self._held is not None:
            self._hold(max(self.size, end))
            self._held[offset:end] = data
            return []
        # Before anything is staged: a WRITE beside this one may complete a chunk that holds bytes
        # of this one, and what is sealed ends where the file ends.
        self.size = max(self.size, end)
        self.is_dirty = True
        view = memoryview(data)
        completed: list[int] = []
        done = 0
        for piece in stripe.cut(self.base.chunk_bytes, offset, len(data)):
            await self._stage(piece, view, done, completed)
            done += piece.size
        return completed

    def _hold(self, size: int) -> None:
        """What is held is being changed, and has `size` bytes from now on."""
        assert self._held is not None
        self._held.extend(bytes(max(0, size - len(self._held))))
        del self._held[size:]
        self.size = size
        self.is_dirty = True
        if self.held_since is None:
            self.held_since = trio.current_time()

    async def spill(self) -> None:
        """Write what is held in memory to a staging file. Raises `OutOfSpace`, OSError."""
        async with self._making:
            if self._held and self.is_dirty:
                await trio.to_thread.run_sync(self._files.make, self._description())
                staged = self._files.new_chunk(0, 0)
                await trio.to_thread.run_sync(self._files.write, 0, staged, [(0, self._held)])
                staged.extents.add(0, self.size)
                self._staged[0] = staged
            self._held = self.held_since = None

    async def _stage(
        self, piece: stripe.ChunkRange, whole: memoryview, at: int, completed: list[int]
    ) -> None:
        span = stripe.span(self.base.chunk_bytes, piece.index)[1]
        while True:
            staged = self._staged.get(piece.index) or await self._begin(piece.index, len(whole))
            batch, is_first = staged.join_batch(piece.start, whole[at : at + piece.size])
            if is_first:
                write = partial(self._write, piece.index, staged, span, completed)
                await batch.lead(span - staged.extents.size, write)
            if await batch.is_staged():
                return

    async def _write(
        self, index: int, staged: StagedChunk, span: int, completed: list[int], batch: Batch
    ) -> bool:
        """Write a batch into the staging file. False: the position was sealed while we waited."""
        async with staged.lock:
            staged.gathering = None
            if self._staged.get(index) is not staged:
                return False
            await trio.to_thread.run_sync(
                self._files.write, index, staged, batch.pieces, limiter=self._limiter
            )
            for start, data in batch.pieces:
                staged.extents.add(start, start + len(data))
            if staged.extents.covers(0, span):
                completed.append(index)
            return True

    async def _begin(self, index: int, write_bytes: int = 0) -> StagedChunk:
        """Start to stage a position, with a write of so many bytes."""
        if not self._files.is_made:
            async with self._making:
                await trio.to_thread.run_sync(self._files.make, self._description())
        if index not in self._staged:
            start, span = stripe.span(self.base.chunk_bytes, index)
            limit = span if index in self.sealed else max(0, min(span, self.base_limit - start))
            self._staged[index] = self._files.new_chunk(index, limit)
            self._staged[index].assembly = self._memory.lend(span, write_bytes)
        return self._staged[index]

    async def truncate(self, size: int) -> None:
        """Set the file's size. What is cut off reads as zeros should the file grow again."""
        shrinks = size < self.size
        if self._held is not None and size <= INLINE_BYTES_MAX:
            self._hold(size)
            self._cut_size, self.base_limit = size, min(self.base_limit, size)
            return
        await self.spill()
        if self._files.is_made:
            await trio.to_thread.run_sync(self._files.note_size, size, shrinks)
        self.size = self._cut_size = size
        self.is_dirty = True
        if not shrinks:
            return
        border, within = stripe.locate(self.base.chunk_bytes, size)
        for index in [i for i in (*self._staged, *self.sealed) if i >= border + bool(within)]:
            await self._discard(index)
        self.base_limit = min(self.base_limit, size)
        if within:
            await self._cut(border, within)

    async def _cut(self, index: int, within: int) -> None:
        """Shorten what is staged or lies under a position to its first `within` bytes."""
        while True:
            staged = self._staged.get(index) or await self._begin(index)
            async with staged.lock:
                if self._staged.get(index) is not staged:
                    continue  # it was sealed while we waited: stage it again, over the chunk
                staged.extents.clip(within)
                staged.under_limit = min(staged.under_limit, within)
                await trio.to_thread.run_sync(self._files.note_limit, index, staged, within)
                await trio.to_thread.run_sync(cut_at, staged.path, within)
                return

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
        if self._held is not None:
            return bytes(memoryview(self._held)[offset : offset + size])
        parts: list[bytes | memoryview] = []
        for piece in stripe.cut(self.base.chunk_bytes, offset, size):
            staged = self._staged.get(piece.index)
            data = await self._from_staged(piece, staged) if staged is not None else None
            parts.append(data or await self._under(piece.index, piece.start, piece.size))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _from_staged(self, piece: stripe.ChunkRange, staged: StagedChunk) -> bytes | None:
        """A range of a staged chunk; None if it is not staged any more."""
        data = staged.from_memory(piece.start, piece.start + piece.size)
        if data is None:  # else sealing it, which takes as long as its replicas, is no obstacle
            async with staged.lock:
                if self._staged.get(piece.index) is staged:
                    data = await self._overlay(piece, staged)
        return data if self._staged.get(piece.index) is staged else None

    async def _overlay(self, piece: stripe.ChunkRange, staged: StagedChunk) -> bytes:
        """A range of a staged chunk, with what lies under it in the gaps."""
        end = piece.start + piece.size
        read = partial(staged.read, piece.start, piece.size)
        data = await trio.to_thread.run_sync(read, limiter=self._limiter)
        for gap_start, gap_end in list(staged.extents.gaps(piece.start, end)):
            under = await self._under_staged(piece.index, staged, gap_start, gap_end)
            data[gap_start - piece.start : gap_end - piece.start] = under
        return bytes(data)

    async def _under_staged(
        self, index: int, staged: StagedChunk, start: int, end: int
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
        valid = max(0, min(size, self.base_limit - offset))
        data = await self._contents.read(self.base, offset, valid)
        return data if len(data) == size else b"".join((data, zeros(size - len(data))))

    # ------------------------------------------------------------ sealing

    def staged_positions(self) -> list[int]:
        """The positions that are not sealed yet."""
        return sorted(self._staged)

    def staged_bytes_of(self, index: int) -> int:
        """How many bytes sealing a position will hold in memory."""
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
            length = self.staged_bytes_of(index)
            placed = await self._put(index, staged, length) if length else None
            self.sealed[index] = placed
            del self._staged[index]
            if placed is None or not self._replicator.is_here(placed, self.placements):
                await trio.to_thread.run_sync(partial(staged.path.unlink, missing_ok=True))

    async def _put(self, index: int, staged: StagedChunk, length: int) -> PlacedChunk | None:
        data = await self._whole(index, staged, length)
        named = await trio.to_thread.run_sync(
            self._files.name, index, staged, data, self._replicator.epoch, limiter=self._limiter
        )
        where, file, replicas = self.placements, staged.path, self.base.replicas
        try:
            return named and await self._replicator.put(*named, data, replicas, where, file)
        except (ModelfsError, OSError):
            if named and not file.exists():  # the copy that was made here took it
                self.sealed[index] = PlacedChunk(named[0], self._replicator.epoch)
                del self._staged[index]
            raise

    async def _whole(self, index: int, staged: StagedChunk, length: int) -> Buffer:
        """All bytes of a staged position; what lies in its gaps is in its file then as well."""
        end = min(length, staged.under_limit) if staged.assembly is None else length
        gaps = list(staged.extents.gaps(0, end))
        for start, end in gaps:
            under = await self._under_staged(index, staged, start, end)
            if not is_zeros(under):
                await trio.to_thread.run_sync(write_at, staged.path, under, start)
            if staged.assembly is not None:
                staged.assembly.take(under, start)
        if staged.assembly is None:
            read = partial(read_exactly, staged.path, length)
            return await trio.to_thread.run_sync(read, limiter=self._limiter)
        if gaps:
            await trio.to_thread.run_sync(set_length, staged.path, length)
        return staged.assembly.data[:length]

    async def stage_inline_base(self) -> None:
        """Contents that stood in the base's record become a chunk, now that they outgrew it."""
        if self.base.inline and self.base_limit and 0 not in self.sealed:
            await self._begin(0)

    def describe_on_disk(self, why: str) -> None:
        """Write beside the staged bytes that and why they are lost. Blocks. Raises OSError."""
        if self._files.is_made:
            self._files.describe(self._description(why))

    def _description(self, why: str = "") -> dict[str, object]:
        limits = self.base_limit, self._cut_size
        ends = (why, True) if why else (CRASHED, False)
        return Description(self._path, self._node_name, self.base, *limits, *ends).as_json(self.ino)

    def rebase(self, committed: Inode) -> StagingDirectory | None:
        """The copy has been committed as this record: it is the base now.

        Returns the staging directory, if there is one: nobody needs it any more, and the next
        write begins a new one.
        """
        assert not self._staged or committed.inline is not None
        self.base = committed
        self.base_limit = self._cut_size = committed.size
        self._staged.clear()
        self.sealed.clear()
        self._held, self.held_since = small_contents(committed), None
        self.is_dirty = False
        self.mtime_ns = None
        if not self._files.is_made:
            return None
        self._commit_count += 1
        name = f"{self._directory.name}-{self._commit_count}"
        done, self._files = self._files, StagingDirectory(self._directory.with_name(name))
        return done

    def start_over(self, latest: Inode) -> None:
        """Become the latest version, emptied. Nothing may have been written yet."""
        assert not self.is_dirty and not self._staged and not self.sealed
        self.base = latest
        self.size = self.base_limit = self._cut_size = 0
        self.is_dirty = True
        self._held = bytearray()

    @property
    def has_files(self) -> bool:
        """Whether anything of it is on disk."""
        return self._files.is_made

    @property
    def directory_name(self) -> str:
        """What recovery calls this working copy."""
        return self._files.path.name

    def discard(self) -> None:
        """Remove the staging files. Blocks."""
        self._files.discard()

    def keep(self, lost_dir: Path, why: str) -> None:
        """Move the staging files to where recovery looks for them. Blocks."""
        try:
            self.describe_on_disk(why)
        finally:
            self._files.keep(lost_dir)
