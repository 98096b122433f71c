"""The directories of a chunk store: made, scanned and tidied. `disk` describes the layout."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress

from modelfs.ids import ChunkId
from modelfs.limits import GIB, MIB
from modelfs.ports import Holding
from modelfsd.storage.chunk_file import DAMAGE_ERRNOS

RESERVE_BYTES_MAX = 1 * GIB  # kept free besides, at most 1 %: logs, etcd and staging go on
DAMAGED_FILES_MAX = 16  # enough to see a pattern in what a failing disk does
DAMAGED_BYTES_MAX = 256 * MIB
NO_COPY_ERRNOS = DAMAGE_ERRNOS | {errno.ENOENT}
PREFIXES = tuple(f"{first:02x}" for first in range(256))
_HEX_DIGITS = frozenset("0123456789abcdef")


def status_of(path: str) -> os.stat_result | None:
    """The status of a file; None if there is none of this name, or its inode is damaged."""
    try:
        return os.stat(path, follow_symlinks=False)
    except OSError as error:
        if error.errno in NO_COPY_ERRNOS:
            return None
        raise


def free_bytes(disk: os.statvfs_result) -> int:
    """What we may still use of a disk: what is available to us less a small reserve."""
    reserve = min(disk.f_blocks * disk.f_frsize // 100, RESERVE_BYTES_MAX)
    return max(0, disk.f_bavail * disk.f_frsize - reserve)


def make_directories(root: str) -> None:
    """Make what is missing, private from the first instant and durable."""
    root = os.path.abspath(root)
    os.makedirs(root, mode=0o700, exist_ok=True)
    os.chmod(root, 0o700)
    parents = [f"{root}/{name}" for name in ("owned", "cached", "incoming", "damaged")]
    for path in parents + [f"{parent}/{prefix}" for parent in parents[:2] for prefix in PREFIXES]:
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
    for path in [*parents, root, os.path.dirname(root)]:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def scan(root: str, holding: Holding) -> Iterator[tuple[ChunkId, os.stat_result]]:
    """Every chunk file with its status; what is not named like one is left alone."""
    for prefix in PREFIXES:
        yield from scan_prefix(root, holding, prefix)


def scan_prefix(
    root: str, holding: Holding, prefix: str
) -> Iterator[tuple[ChunkId, os.stat_result]]:
    """As `scan`, of the chunks whose names begin with these two digits."""
    with os.scandir(f"{root}/{holding.value}/{prefix}") as entries:
        for entry in entries:
            if len(entry.name) != 62 or not _HEX_DIGITS.issuperset(entry.name):
                continue
            status = status_of(entry.path)
            if status is None:
                continue  # deleted since the directory was read, or damaged: no copy to count on
            yield ChunkId(bytes.fromhex(prefix + entry.name)), status


def clear_incoming(root: str) -> None:
    """Remove what an earlier process left unfinished."""
    for name in os.listdir(f"{root}/incoming"):
        os.unlink(f"{root}/incoming/{name}")


def trim_damaged(root: str) -> None:
    """Keep the newest few of the bad copies. Calls at the same time do no harm.

    One that no good copy has replaced is kept too: it may be all that is left of a file's bytes.
    """
    entries: list[tuple[float, int, str]] = []
    with os.scandir(f"{root}/damaged") as found:
        for entry in found:
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                entries.append((status.st_mtime, status.st_size, entry.path))
    total = 0
    for rank, (_, size, path) in enumerate(sorted(entries, reverse=True)):
        total += size
        if rank < DAMAGED_FILES_MAX and total <= DAMAGED_BYTES_MAX:
            continue
        name = os.path.basename(path)
        if status_of(f"{root}/{Holding.OWNED.value}/{name[:2]}/{name[2:]}") is not None:
            with suppress(FileNotFoundError):
                os.unlink(path)
