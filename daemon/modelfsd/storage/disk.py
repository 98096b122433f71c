"""The chunks of this node on its disk: `ChunkStore` over a directory.

    owned/<2 hex>/<62 hex>     replicas and hand-offs: fsynced, deleted by reclaim only
    cached/<2 hex>/<62 hex>    conveniences: evicted least recently used, never fsynced
    incoming/                  files under construction; cleared at start
    damaged/                   bad copies that `verify` took out of service: a bounded few, and all
                               that have not been replaced by good ones yet

A file appears under its final name only by a rename of a complete one, so after a killed process
there are whole files and leftovers in incoming/, and nothing between. After a power failure the
same holds for owned/ (fsync before rename); a torn cached file is found by its checksums.

Locks: one of `_stripes` (by the first byte of the id) makes rename, unlink and the account of it
one step; `_lock` guards counters and the order of eviction. A thread holds at most one stripe,
and may take `_lock` inside it, never the other way round. No lock is held while bulk bytes move.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from modelfs.chunk import Buffer, ChunkRef, covering_blocks, is_table_valid
from modelfs.errors import ChunkMissing, CorruptChunk, OutOfSpace
from modelfs.ids import ChunkId
from modelfs.ports import HeldChunk, Holding, OpenChunk, StoreUsage
from modelfsd.storage import chunk_file, chunk_tree, page_cache
from modelfsd.storage.absent import AbsentChunks
from modelfsd.storage.chunk_tree import NO_COPY_ERRNOS, PREFIXES, free_bytes, scan, status_of
from modelfsd.storage.dirsync import DirectorySync

log = logging.getLogger(__name__)

FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class DiskChunkStore:
    """Implements `modelfs.ports.ChunkStore`. OSError means that the disk itself failed."""

    def __init__(
        self, directory: Path, cache_bytes_max: int, *, drop_after_read: bool = True
    ) -> None:
        """Open the store, or make it. One scan; incoming/ is cleared.

        `drop_after_read` gives a local read's pages back to the kernel: the file system above
        keeps its own copy of what is hot.
        """
        self.where = f"the disk at {directory}"
        self._root = str(directory)
        self._cache_bytes_max = cache_bytes_max
        self._drop_after_read = drop_after_read
        self._stripes = [threading.Lock() for _ in range(256)]
        self._lock = threading.Lock()
        self._names = itertools.count()
        self._owned_bytes = self._owned_chunks = self._cached_bytes = 0
        self._cached: OrderedDict[ChunkId, int] = OrderedDict()  # id -> bytes of its file
        self._absent = AbsentChunks()
        self._dirsync = DirectorySync(f"{self._root}/owned")
        chunk_tree.make_directories(self._root)
        chunk_tree.clear_incoming(self._root)
        self._scan_owned()
        self._scan_cached()

    # ------------------------------------------------------------ reading

    def read(self, ref: ChunkRef, offset: int, size: int) -> memoryview:
        """See `ChunkStore.read`. A bad file is left where it is, for `verify` to judge."""
        fd, _ = self._open_file(ref.id)
        try:
            data = chunk_file.read_range(fd, ref, offset, size)
            if self._drop_after_read:
                start, end = covering_blocks(ref.length, offset, size)
                page_cache.give_back(fd, start, end - start)
        except OSError as error:
            if error.errno in chunk_file.DAMAGE_ERRNOS:
                raise CorruptChunk(ref.id, self.where) from error
            raise
        finally:
            os.close(fd)
        if data is None:
            raise CorruptChunk(ref.id, self.where)
        return data

    def is_absent(self, chunk: ChunkId) -> bool:
        """See `ChunkStore.is_absent`."""
        return chunk in self._absent

    def open(self, chunk: ChunkId) -> OpenChunk:
        """See `ChunkStore.open`."""
        fd, _ = self._open_file(chunk)
        try:
            trailer = chunk_file.read_trailer(fd)
        except OSError as error:
            os.close(fd)
            if error.errno in chunk_file.DAMAGE_ERRNOS:
                raise CorruptChunk(chunk, self.where) from error
            raise
        if trailer is None:
            os.close(fd)
            raise CorruptChunk(chunk, self.where)
        return OpenChunk(fd, *trailer)

    def has(self, chunks: Sequence[ChunkId], renew: bool) -> list[bool]:
        """See `ChunkStore.has`."""
        return [self._has_owned(chunk, renew) for chunk in chunks]

    def owned(self) -> Iterator[tuple[ChunkId, float]]:
        """See `ChunkStore.owned`. Chunks that come or go meanwhile may be left out."""
        for chunk, status in scan(self._root, Holding.OWNED):
            yield chunk, status.st_mtime

    def shelf(self, first: int) -> list[HeldChunk]:
        """See `ChunkStore.shelf`."""
        found: dict[ChunkId, HeldChunk] = {}
        for holding in (Holding.CACHED, Holding.OWNED):  # both for a moment only: then it is owned
            for chunk, status in chunk_tree.scan_prefix(self._root, holding, PREFIXES[first]):
                found[chunk] = HeldChunk(chunk, holding, status.st_size)
        return [found[chunk] for chunk in sorted(found)]

    def usage(self) -> StoreUsage:
        """See `ChunkStore.usage`. Bytes are those of whole files."""
        disk = os.statvfs(self._root)
        with self._lock:
            return StoreUsage(
                owned_bytes=self._owned_bytes,
                cached_bytes=self._cached_bytes,
                owned_chunks=self._owned_chunks,
                cached_chunks=len(self._cached),
                capacity_bytes=disk.f_blocks * disk.f_frsize,
                free_bytes=free_bytes(disk),
            )

    # ------------------------------------------------------------ writing

    def put(self, ref: ChunkRef, table: Buffer, data: Buffer, holding: Holding) -> None:
        """See `ChunkStore.put`. A CACHED chunk for which there is no room is quietly left out."""
        assert len(data) == ref.length
        if self._renew(ref, holding):
            return
        size = chunk_file.file_bytes(ref.length)
        if not self._admit(size, size, holding):
            return
        temporary = f"{self._root}/incoming/{next(self._names)}"
        try:
            with self._full_disk_as_out_of_space():
                chunk_file.write_chunk(temporary, ref, table, data, holding is Holding.OWNED)
                self._install(temporary, ref, holding)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    def adopt(self, path: Path, ref: ChunkRef, table: Buffer, holding: Holding) -> None:
        """See `ChunkStore.adopt`."""
        size = chunk_file.file_bytes(ref.length)
        if self._renew(ref, holding) or not self._admit(size - ref.length, size, holding):
            os.unlink(path)
            return
        with self._full_disk_as_out_of_space():
            if not chunk_file.append_trailer(str(path), ref, table, holding is Holding.OWNED):
                raise CorruptChunk(ref.id, str(path))
            self._install(str(path), ref, holding)

    def sync(self) -> None:
        """See `ChunkStore.sync`."""
        self._dirsync.sync()

    def delete(self, chunk: ChunkId, if_put_at: float | None = None) -> bool:
        """See `ChunkStore.delete`."""
        with self._stripes[chunk[0]]:
            path = self._path(chunk, Holding.OWNED)
            status = status_of(path)
            if status and if_put_at is not None and status.st_mtime != if_put_at:
                return False
            if status:
                os.unlink(path)
                self._account_owned(-1, -status.st_size)
            self._drop_cached(chunk)
        return True

    # ------------------------------------------------------------ upkeep

    def verify(self, chunk: ChunkId) -> bool:
        """See `ChunkStore.verify`. A bad owned file goes to damaged/; a bad cached one, away."""
        fd, holding = self._open_file(chunk, is_use=False)
        try:
            if chunk_file.is_whole(fd, chunk):
                return True
            judged = os.fstat(fd)
        finally:
            os.close(fd)
        with self._stripes[chunk[0]]:
            path = self._path(chunk, holding)
            status = status_of(path)
            if status is None or status.st_ino != judged.st_ino:
                return False  # somebody has deleted or replaced it already
            if holding is Holding.CACHED:
                self._drop_cached(chunk)
                return False
            os.utime(path)  # the quarantine drops what has been there longest
            os.rename(path, f"{self._root}/damaged/{chunk.hex()}")
            self._account_owned(-1, -status.st_size)
        log.warning("chunk %s was damaged on %s and is out of service", chunk.hex(), self.where)
        chunk_tree.trim_damaged(self._root)
        return False

    def tidy_damaged(self, unneeded: Collection[ChunkId]) -> None:
        """See `ChunkStore.tidy_damaged`."""
        for chunk in unneeded:
            with suppress(FileNotFoundError):
                os.unlink(f"{self._root}/damaged/{chunk.hex()}")
        chunk_tree.trim_damaged(self._root)

    def drop_cached(self) -> int:
        """Remove every cached chunk; returns how many bytes that freed."""
        with self._lock:
            before = self._cached_bytes
        self._evict_down_to(0)
        return before

    # ------------------------------------------------------------ inside

    def _path(self, chunk: ChunkId, holding: Holding) -> str:
        name = chunk.hex()
        return f"{self._root}/{holding.value}/{name[:2]}/{name[2:]}"

    def _open_file(self, chunk: ChunkId, is_use: bool = True) -> tuple[int, Holding]:
        assert len(chunk) == 32
        look = self._absent.look()
        # A cached chunk may become owned between the two looks, hence the third.
        for holding in (Holding.OWNED, Holding.CACHED, Holding.OWNED):
            try:
                fd = os.open(self._path(chunk, holding), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            if holding is Holding.CACHED and is_use:
                with self._lock:
                    if chunk in self._cached:
                        self._cached.move_to_end(chunk)
            return fd, holding
        self._absent.remember(chunk, look)
        raise ChunkMissing(chunk, self.where)

    def _has_owned(self, chunk: ChunkId, renew: bool) -> bool:
        path = self._path(chunk, Holding.OWNED)
        if not renew:
            return status_of(path) is not None
        with self._stripes[chunk[0]]:  # against a delete that has just looked at the time
            try:
                os.utime(path)
            except OSError as error:
                if error.errno in NO_COPY_ERRNOS:
                    return False
                raise
        return True

    def _renew(self, ref: ChunkRef, holding: Holding) -> bool:
        """Whether a copy is here already that serves for this put; it then counts as just put."""
        with self._stripes[ref.id[0]]:
            with self._lock:
                is_cached = ref.id in self._cached
            for found in (Holding.OWNED, Holding.CACHED) if is_cached else (Holding.OWNED,):
                try:
                    fd = os.open(self._path(ref.id, found), os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    if error.errno in NO_COPY_ERRNOS:
                        continue
                    raise
                try:
                    trailer = chunk_file.read_trailer(fd)
                    if trailer is None or not is_table_valid(ref, trailer[1]):
                        return False  # torn: the new copy replaces it
                    if found is Holding.OWNED or holding is Holding.CACHED:
                        os.utime(fd)
                        with self._lock:
                            if ref.id in self._cached:
                                self._cached.move_to_end(ref.id)
                        return True
                except OSError as error:
                    if error.errno not in chunk_file.DAMAGE_ERRNOS:
                        raise
                finally:
                    os.close(fd)
        return False

    def _admit(self, growth_bytes: int, size: int, holding: Holding) -> bool:
        """Make room on the disk, at the cache's cost. False: there is none for a CACHED chunk."""
        if holding is Holding.CACHED:
            if size > self._cache_bytes_max:
                return False
            self._evict_down_to(self._cache_bytes_max - size)
        lacking = growth_bytes - free_bytes(os.statvfs(self._root))
        if lacking > 0 and self._cached:
            with self._lock:
                target = max(0, self._cached_bytes - lacking)
            self._evict_down_to(target)
            lacking = growth_bytes - free_bytes(os.statvfs(self._root))
        if lacking <= 0:
            return True
        if holding is Holding.CACHED:
            return False
        raise OutOfSpace(f"{self.where} is full: {lacking} bytes are lacking, besides the reserve")

    def _install(self, path: str, ref: ChunkRef, holding: Holding) -> None:
        """Give a complete file its name, and account for it."""
        size = chunk_file.file_bytes(ref.length)
        prefix = PREFIXES[ref.id[0]]
        with self._stripes[ref.id[0]]:
            owned = status_of(self._path(ref.id, Holding.OWNED))
            if holding is Holding.OWNED:
                with self._dirsync.changing(prefix):
                    os.rename(path, self._path(ref.id, holding))
                self._account_owned(0 if owned else 1, size - (owned.st_size if owned else 0))
                self._drop_cached(ref.id)
            elif owned:
                os.unlink(path)
            else:
                os.rename(path, self._path(ref.id, holding))
                with self._lock:
                    self._cached_bytes += size - self._cached.pop(ref.id, 0)
                    self._cached[ref.id] = size
            self._absent.forget(ref.id)
        if holding is Holding.CACHED:
            self._evict_down_to(self._cache_bytes_max)  # puts at the same time were each admitted

    def _account_owned(self, chunks: int, size: int) -> None:
        with self._lock:
            self._owned_chunks += chunks
            self._owned_bytes += size

    def _drop_cached(self, chunk: ChunkId) -> None:
        """Remove a cached chunk, if it is here. The caller holds its stripe."""
        with self._lock:
            size = self._cached.pop(chunk, None)
            self._cached_bytes -= size or 0
        if size is not None:
            try:
                os.unlink(self._path(chunk, Holding.CACHED))
            except OSError as error:
                if error.errno not in NO_COPY_ERRNOS:
                    raise

    def _evict_down_to(self, target_bytes: int) -> None:
        """Remove cached chunks, least recently used first. The caller holds no lock.

        A file that is being sent lives on until its descriptor is closed.
        """
        while True:
            with self._lock:
                if self._cached_bytes <= target_bytes or not self._cached:
                    return
                victim = next(iter(self._cached))
            with self._stripes[victim[0]]:
                self._drop_cached(victim)

    def _scan_owned(self) -> None:
        for chunk, status in scan(self._root, Holding.OWNED):
            self._owned_chunks += 1
            self._owned_bytes += status.st_size
            # The process before this one may have died between a rename and its sync.
            self._dirsync.mark(PREFIXES[chunk[0]])

    def _scan_cached(self) -> None:
        found: list[tuple[float, ChunkId, int]] = []
        for chunk, status in scan(self._root, Holding.CACHED):
            torn = chunk_file.data_length(status.st_size) is None
            if torn or status_of(self._path(chunk, Holding.OWNED)):
                os.unlink(self._path(chunk, Holding.CACHED))
                continue
            found.append((status.st_mtime, chunk, status.st_size))
        for _, chunk, size in sorted(found):
            self._cached[chunk] = size
            self._cached_bytes += size
        self._evict_down_to(self._cache_bytes_max)

    @contextmanager
    def _full_disk_as_out_of_space(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in FULL_ERRNOS:
                raise OutOfSpace(f"{self.where} is full: {error.strerror}") from error
            raise
