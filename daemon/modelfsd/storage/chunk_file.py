"""One chunk file: written, read and judged. The format is described in `modelfs.chunk`.

Everything moves in single vectored calls with the GIL released. A file is whole if its size,
footer, block table and data all agree; these functions tell, and never repair.
"""

from __future__ import annotations

import errno
import os
import stat

import blake3

from modelfs.chunk import (
    FOOTER,
    HASH_BYTES,
    Buffer,
    ChunkRef,
    block_count,
    covering_blocks,
    is_range_valid,
    is_table_valid,
    pack_footer,
    table_checksum,
    unpack_footer,
)
from modelfs.ids import ChunkId
from modelfs.limits import BLOCK_BYTES, CHUNK_BYTES_MAX, KIB
from modelfsd.buffers import advance, as_views, empty_buffer
from modelfsd.stages import timed
from modelfsd.storage import page_cache

DIRECT_BYTES_MIN = 256 * KIB  # of a file that is read past the page cache
DAMAGE_ERRNOS = frozenset({errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENODATA})
"""What reading a bad sector or a damaged inode gives: the copy is bad, not the machine."""


def file_bytes(length: int) -> int:
    """The size of the file of a chunk of `length` bytes."""
    return length + block_count(length) * HASH_BYTES + FOOTER.size


def data_length(size: int) -> int | None:
    """The length of the chunk whose file has `size` bytes; None if no chunk's has."""
    body = size - FOOTER.size
    blocks = -(-body // (BLOCK_BYTES + HASH_BYTES))
    length = body - blocks * HASH_BYTES
    if not 0 < length <= CHUNK_BYTES_MAX or block_count(length) != blocks:
        return None
    return length


def write_fully(fd: int, buffers: list[Buffer], offset: int) -> None:
    """Write all buffers at `offset`. Raises OSError."""
    views = as_views(buffers)
    while views:
        written = os.pwritev(fd, views, offset)
        if written == 0:
            raise OSError(errno.EIO, "the disk takes no more bytes and gives no reason")
        offset += written
        advance(views, written)


def read_fully(fd: int, buffers: list[Buffer], offset: int) -> int:
    """Fill the buffers from `offset`; returns how many bytes there were before the end."""
    views = as_views(buffers)
    start = offset
    while views:
        received = os.preadv(fd, views, offset)
        if received == 0:
            break
        offset += received
        advance(views, received)
    return offset - start


def write_chunk(path: str, ref: ChunkRef, table: Buffer, data: Buffer, durable: bool) -> None:
    """Make the file of a chunk, readable by its owner only; fsync it if `durable`."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        with timed("disk_write"):
            done = page_cache.write_directly(fd, view, 0) if durable else 0
            write_fully(fd, [view[done:], table, pack_footer(ref.length, table)], done)
        if durable:
            with timed("fsync"):
                os.fsync(fd)
    finally:
        os.close(fd)


def append_trailer(path: str, ref: ChunkRef, table: Buffer, durable: bool) -> bool:
    """Turn a file that starts with a chunk's data into the chunk's file.

    False if the file is too short to hold the data. On an error it keeps its data, at least.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        status = os.fstat(fd)
        if status.st_size < ref.length:
            return False
        if stat.S_IMODE(status.st_mode) != 0o600:
            os.fchmod(fd, 0o600)
        if status.st_size > ref.length:
            os.ftruncate(fd, ref.length)
        with timed("disk_write"):
            write_fully(fd, [table, pack_footer(ref.length, table)], ref.length)
        if durable:
            with timed("fsync"):
                os.fsync(fd)
    finally:
        os.close(fd)
    return True


def read_trailer(fd: int) -> tuple[int, bytes] | None:
    """(length of data, block table) of a chunk file; None if it is not a whole one."""
    size = os.fstat(fd).st_size
    length = data_length(size)
    if length is None:
        return None
    trailer = os.pread(fd, size - length, length)
    table, footer = trailer[: -FOOTER.size], trailer[-FOOTER.size :]
    if unpack_footer(footer, size) != (length, table_checksum(table)):
        return None
    return length, table


def read_range(fd: int, ref: ChunkRef, offset: int, size: int) -> memoryview | None:
    """`size` bytes from `offset`, verified against `ref`; None if the file disagrees with it."""
    start, end = covering_blocks(ref.length, offset, size)
    with timed("disk_read"):
        if start == 0 and end == ref.length:
            found = _read_all(fd, ref)
        else:
            found = _read_part(fd, ref, start, end)
    if found is None:
        return None
    data, trailer = found
    table, footer = trailer[: -FOOTER.size], bytes(trailer[-FOOTER.size :])
    if unpack_footer(footer, file_bytes(ref.length)) != (ref.length, ref.checksum):
        return None
    with timed("verify"):
        is_good = is_table_valid(ref, table) and is_range_valid(table, start, data)
    return data[offset - start : offset - start + size] if is_good else None


def _read_all(fd: int, ref: ChunkRef) -> tuple[memoryview, memoryview] | None:
    """(data, trailer) of a file in one piece; None if it has not the size that it should have."""
    size = file_bytes(ref.length)
    # At least one byte more than there should be, so that a file that is too long is noticed.
    buffer = empty_buffer((size // page_cache.ALIGNMENT + 1) * page_cache.ALIGNMENT)
    received = None
    if size >= DIRECT_BYTES_MIN:
        resident = page_cache.resident_bytes(fd, 0, size)
        if resident is not None and resident < size // 2:
            received = page_cache.read_directly(fd, buffer)
    if received is None:
        received = read_fully(fd, [buffer], 0)
    if received != size:
        return None
    return buffer[: ref.length], buffer[ref.length : size]


def _read_part(
    fd: int, ref: ChunkRef, start: int, end: int
) -> tuple[memoryview, memoryview] | None:
    data = empty_buffer(end - start)
    trailer = empty_buffer(file_bytes(ref.length) - ref.length + 1)
    if end == ref.length:
        received = read_fully(fd, [data, trailer], start)
    else:
        received = read_fully(fd, [data], start) + read_fully(fd, [trailer], ref.length)
    if received != len(data) + len(trailer) - 1:
        return None
    return data, trailer[:-1]


def is_whole(fd: int, chunk: ChunkId) -> bool:
    """Whether a file holds this chunk: size, footer, table, every block and the BLAKE3 name.

    The kernel's copy of its pages is dropped first, so that the disk itself is asked, and again
    afterwards, so that a scrub does not displace what is hot.
    """
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        trailer = read_trailer(fd)
        if trailer is None:
            return False
        length, table = trailer
        ref = ChunkRef(chunk, table_checksum(table), length)
        data = read_range(fd, ref, 0, length)
        return data is not None and blake3.blake3(data).digest() == chunk
    except OSError as error:
        if error.errno in DAMAGE_ERRNOS:
            return False
        raise
    finally:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
