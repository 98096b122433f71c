"""Reading ahead of a file's readers: what to fetch before it is asked for, and what to push.

`modelfs.access` tells streams from jumps. For a stream the chunks of its window are fetched, and
what has come is pushed into the kernel's pages, so that the reader finds it there. A reader who
finds everything is never heard of again; so here and there the first pages of a chunk are left
out (a *mark*): the READ that they cost says how far the reader is, and moves the window on.
"""

from __future__ import annotations

from functools import partial

from modelfs.access import WINDOW_BYTES_MIN, AccessPattern, Stream
from modelfs.ids import ChunkId
from modelfs.inode import Inode
from modelfs.limits import KIB, PAGE_BYTES
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
        stream = inode.access.observe(offset, size)
        if stream is None:
            return False
        record, start = inode.record, max(stream.ordered_end, offset)
        if start < stream.goal:
            spacing = max(WINDOW_BYTES_MIN, stream.window // MARKS_PER_WINDOW)
            arrived = partial(self._arrived, inode, record, stream, spacing)
            stream.ordered_end = self._contents.read_ahead(record, start, stream.goal, arrived)
        return True

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
        is_marked = begin % spacing < len(data)
        asked_end = -(-stream.end // PAGE_BYTES) * PAGE_BYTES
        start = max(begin + (MARK_BYTES if is_marked else 0), asked_end)
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
