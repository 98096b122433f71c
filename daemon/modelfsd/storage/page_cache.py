"""Files that are read and written past the kernel's page cache, or given back to it.

Data must be in memory once: what a local read takes into a buffer of ours, and from there into the
pages of the mount, must not stay in the pages of the chunk file as well. Reading around the page
cache is the cheapest way to that (0.1 s of CPU for each GiB, against 0.45 for reading through it
and giving the pages back), unless the pages are there anyway.

A chunk that is written goes past it too: its readers are on other nodes and keep it in caches of
their own, and the first touch of a fresh page costs more than all else that is done to the bytes.

cachestat(2) says whether they are; a kernel older than 6.5 does not have it, and then the page
cache is used. So it is on a file system without O_DIRECT.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os

ALIGNMENT = 4096  # of memory, offset and size in direct mode: enough for every disk

NR_CACHESTAT = 451  # on every architecture

# PyDLL keeps the GIL: the call takes microseconds, and getting the GIL back may take longer.
_syscall = ctypes.PyDLL(None, use_errno=True).syscall


class _Range(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class _Statistics(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recent")
    ]


def resident_bytes(fd: int, offset: int, size: int) -> int | None:
    """How much of a range of a file is in the page cache, in whole pages; None: unknown."""
    extent, found = _Range(offset, size), _Statistics()
    if _syscall(NR_CACHESTAT, fd, ctypes.byref(extent), ctypes.byref(found), 0):
        return None
    return int(found.cached) * mmap.PAGESIZE


def read_directly(fd: int, buffer: memoryview) -> int | None:
    """Fill an aligned buffer from a file's start, past the page cache.

    Returns how many bytes there were before the end; None if this file cannot be read so. The
    descriptor stays in direct mode.
    """
    assert len(buffer) % ALIGNMENT == 0
    received = 0
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
        while received < len(buffer) and received % ALIGNMENT == 0:
            count = os.preadv(fd, [buffer[received:]], received)
            if count == 0:
                break
            received += count
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        return None
    return received


def write_directly(fd: int, data: memoryview, offset: int) -> int:
    """Write the leading whole pages of aligned memory past the page cache.

    Returns how many bytes that were: 0 if this file cannot be written so, or the offset is odd.
    """
    size = len(data) - len(data) % ALIGNMENT
    if not size or offset % ALIGNMENT:
        return 0
    flags, written = fcntl.fcntl(fd, fcntl.F_GETFL), 0
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        while written < size and written % ALIGNMENT == 0:
            written += os.pwrite(fd, data[written:size], offset + written)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    return written


def give_back(fd: int, offset: int, size: int) -> None:
    """Tell the kernel that these pages of a file are not needed any more."""
    os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)
