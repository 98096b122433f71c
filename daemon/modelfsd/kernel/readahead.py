"""Reading ahead of a file's readers: what to fetch before it is asked for, and what to push.

`modelfs.access` tells streams from jumps. For a stream the chunks of its window are fetched, and
what has come is pushed into the kernel's pages, so that the reader finds it there. A reader who
finds everything is never heard of again; so here and there the first pages of a chunk are left
out (a *mark*): the READ that they cost says how far the reader is, and moves the window on.

Of a stride the next runs are fetched and pushed, and nothing between them.
"""

from __future__ import annotations

from functools import partial

from modelfs.access import WINDOW_BYTES_MIN, AccessPattern, Stream, is_mark
from modelfs.ids import ChunkId
from modelfs.inode import Inode
from modelfs.limits import KIB, PAGE_BYTES
from modelfs.strides import Run, Stride
from modelfsd.kernel.kernel_inodes import KernelInode
from modelfsd.kernel.pusher import Push, Pusher
from modelfsd.storage.contents import Contents
from modelfsd.uses import FileUse, current_use

MARK_BYTES = 128 * KIB
MARKS_PER_WINDOW = 4  # a reader is heard of when a quarter of his window is used up


class Readahead:
    """Watches the READs of all files."""

    def __init__(self, contents: Contents, pusher: Pusher) -> None:
        self._contents, self._pusher = contents, pusher

    def observe(self, inode: KernelInode, offset: int, size: int) -> bool:
        """Take one READ; fetch ahead of it. Returns whether it is part of a stream."""
        if inode.access is None:
            inode.access = AccessPattern(self._contents.window_bytes_max)
        found = inode.access.observe(offset, size)
        if isinstance(found, Stream):
            self._follow(inode, found, offset)
        elif found is not None:
            self._foretell(inode, found)
        return isinstance(found, Stream)

    def _follow(self, inode: KernelInode, stream: Stream, offset: int) -> None:
        """Fetch ahead of a stream."""
        record, start = inode.record, max(stream.ordered_end, offset)
        if start < stream.goal:
            spacing = max(WINDOW_BYTES_MIN, stream.window // MARKS_PER_WINDOW)
            arrived = partial(self._arrived, inode, record, stream, spacing)
            ordered_end = self._contents.read_ahead(record, start, stream.goal, arrived)
            stream.order(record.chunk_bytes, start, ordered_end, spacing)

    def _foretell(self, inode: KernelInode, stride: Stride) -> None:
        """Fetch the next runs of a stride."""
        record = inode.record
        for run, is_marked in stride.ahead(record.size, self._contents.window_bytes_max):
            start = run.begin - run.begin % PAGE_BYTES
            end = min(-(-(run.begin + stride.length) // PAGE_BYTES) * PAGE_BYTES, record.size)
            arrived = partial(self._run_arrived, inode, record, run, is_marked * PAGE_BYTES)
            self._contents.read_run_ahead(record, start, end, arrived)

    def _run_arrived(
        self,
        inode: KernelInode,
        record: Inode,
        run: Run,
        mark_bytes: int,
        begin: int,
        data: memoryview,
    ) -> None:
        if len(data) > mark_bytes:
            finished = partial(self._run_pushed, current_use())
            piece = data[mark_bytes:]
            self._pusher.offer(Push(inode, record, run, begin + mark_bytes, piece, finished))

    def _run_pushed(self, use: FileUse, taken_bytes: int) -> None:
        use.pushed_bytes += taken_bytes

    def _arrived(
        self,
        inode: KernelInode,
        record: Inode,
        stream: Stream,
        spacing: int,
        chunk: ChunkId,
        begin: int,
        data: memoryview,
    ) -> None:
        """A chunk has come: push what lies before the reader."""
        asked_end = -(-stream.end // PAGE_BYTES) * PAGE_BYTES
        mark_bytes = MARK_BYTES if is_mark(record.chunk_bytes, begin, spacing) else 0
        start = max(begin + mark_bytes, asked_end)
        end = min(begin + len(data), record.size)
        if end < record.size:
            end -= end % PAGE_BYTES
        if start < end:
            finished = partial(self._pushed, current_use(), chunk)
            piece = data[start - begin : end - begin]
            self._pusher.offer(Push(inode, record, stream, start, piece, finished))

    def _pushed(self, use: FileUse, chunk: ChunkId, taken_bytes: int) -> None:
        use.pushed_bytes += taken_bytes
        self._contents.note_read(chunk, taken_bytes)
