"""How much memory this process may use: the machine's, or what its control group leaves of it.

A daemon in a container, or under systemd's MemoryMax, is killed by its group's limit however much
memory the machine has. Both kinds of hierarchy are asked (cgroups(7)): `memory.max` and
`memory.high` of version 2, `memory.limit_in_bytes` of version 1, in our group and all above it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

from modelfs.limits import MIB

READ_BYTES_MAX = 256 * MIB  # chunk buffers of readers; with UPLOAD_BYTES the bulk of our memory
READ_BYTES_MIN = 64 * MIB
READ_SHARE = 16  # ... but no more than this part of what there is
CGROUPS = Path("/sys/fs/cgroup")
PROCESS = Path("/proc/self/cgroup")
LIMITS_V2 = ("memory.max", "memory.high")
HEAP_BLOCK_BYTES_MAX = 2 * MIB  # malloc takes from the heap up to this: each request of the kernel
HEAP_IDLE_BYTES_MAX = 64 * MIB  # ... and of it, malloc keeps so much that is free
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
LIMITS_V1 = ("memory.limit_in_bytes", "memory.soft_limit_in_bytes")


def memory_bytes(process: Path = PROCESS, cgroups: Path = CGROUPS) -> int:
    """The memory of the machine, or the least limit of a group that this process is in."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min((machine, *_limits(process, cgroups)))


def read_memory_bytes() -> int:
    """The budget of chunk buffers."""
    return min(READ_BYTES_MAX, max(memory_bytes() // READ_SHARE, READ_BYTES_MIN))


def keep_heap() -> None:
    """Have malloc use memory again instead of giving it back to the kernel after each request.

    A request of the kernel is as large as 1 MiB, and pyfuse3 has malloc for a buffer and a copy of
    it. The first touch of their fresh pages costs as much as the copy. Only glibc can be told.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, HEAP_BLOCK_BYTES_MAX)
        mallopt(M_TRIM_THRESHOLD, HEAP_IDLE_BYTES_MAX)


def _limits(process: Path, cgroups: Path) -> Iterator[int]:
    """The limits that are set. What cannot be read sets none."""
    try:
        lines = process.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            roots, names = [cgroups, cgroups / "unified"], LIMITS_V2
        elif "memory" in controllers.split(","):
            roots, names = [cgroups / "memory"], LIMITS_V1
        else:
            continue
        path = Path(group.lstrip("/"))
        for root in roots:
            for level in (path, *path.parents):
                for name in names:
                    yield from _limit(root / level / name)


def _limit(file: Path) -> Iterator[int]:
    try:
        text = file.read_text().strip()
    except OSError:
        return
    if text.isdigit() and int(text) > 0:
        yield int(text)
