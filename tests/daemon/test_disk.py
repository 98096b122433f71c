"""The chunk store on a real disk: what a crash, a bad disk and a full one leave behind."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from modelfs.chunk import ChunkRef, describe
from modelfs.errors import ChunkMissing, CorruptChunk, OutOfSpace
from modelfs.limits import BLOCK_BYTES, MIB
from modelfs.ports import Holding
from modelfsd.storage import chunk_file, chunk_tree
from modelfsd.storage.disk import DiskChunkStore
from tests.needs import small_disk

LENGTH = 2 * BLOCK_BYTES + 1000


def make(length: int = LENGTH, seed: int = 0) -> tuple[ChunkRef, bytes, bytes]:
    data = Random(seed).randbytes(length)
    ref, table = describe(data)
    return ref, table, data


def files_below(path: Path) -> list[Path]:
    return sorted(found for found in path.rglob("*") if found.is_file())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "chunks"


@pytest.fixture
def store(root: Path) -> DiskChunkStore:
    return DiskChunkStore(root, cache_bytes_max=MIB)


# ---------------------------------------------------------------- files and restarts


def test_everything_is_private_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        store = DiskChunkStore(tmp_path / "chunks", MIB)
        for seed, holding in enumerate(Holding):
            store.put(*make(100, seed), holding)
        staging = tmp_path / "staging"
        ref, table, data = make(100, 9)
        staging.write_bytes(data)
        store.adopt(staging, ref, table, Holding.OWNED)
    finally:
        os.umask(old)
    for path in [tmp_path / "chunks", *(tmp_path / "chunks").rglob("*")]:
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_a_restarted_store_knows_what_it_has(root: Path, store: DiskChunkStore) -> None:
    for seed in range(10):
        store.put(*make(1000 + seed, seed), Holding.OWNED if seed % 2 else Holding.CACHED)
    again = DiskChunkStore(root, cache_bytes_max=MIB)
    before, after = store.usage(), again.usage()
    assert (before.owned_bytes, before.owned_chunks) == (after.owned_bytes, after.owned_chunks)
    assert (before.cached_bytes, before.cached_chunks) == (after.cached_bytes, after.cached_chunks)
    ref, _, data = make(1003, 3)
    assert again.read(ref, 0, ref.length) == data


def test_leftovers_of_a_crash_are_cleared(root: Path, store: DiskChunkStore) -> None:
    owned, cached, torn = make(100, 1), make(100, 2), make(100, 3)
    store.put(*owned, Holding.OWNED)
    store.put(*cached, Holding.CACHED)
    store.put(*torn, Holding.CACHED)
    (root / "incoming" / "17").write_bytes(b"half a chunk")
    os.truncate(chunk_path(root, torn[0], Holding.CACHED), 20)
    # A crash between the rename of an owned copy and the removal of the cached one.
    os.link(chunk_path(root, owned[0], Holding.OWNED), chunk_path(root, owned[0], Holding.CACHED))
    (root / "owned" / "00" / "not-a-chunk").write_text("left alone")
    again = DiskChunkStore(root, cache_bytes_max=MIB)
    usage = again.usage()
    assert (usage.owned_chunks, usage.cached_chunks) == (1, 1)
    assert files_below(root / "incoming") == []
    assert len(files_below(root / "cached")) == 1
    assert (root / "owned" / "00" / "not-a-chunk").exists()


def test_a_writer_killed_at_any_moment_leaves_whole_chunks_only(root: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from random import Random\n"
        "from modelfs.chunk import describe; from modelfs.ports import Holding\n"
        "from modelfsd.storage.disk import DiskChunkStore\n"
        "store = DiskChunkStore(Path(sys.argv[1]), 1 << 20)\n"
        "for seed in range(10_000):\n"
        "    data = Random(seed).randbytes(300_000); ref, table = describe(data)\n"
        "    store.put(ref, table, data, Holding.OWNED); print(ref.id.hex(), flush=True)\n"
    )
    path = os.pathsep.join(sys.path)
    writer = subprocess.Popen(
        [sys.executable, "-c", program, str(root)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert writer.stdout is not None
    with writer, writer.stdout as lines:
        done = {bytes.fromhex(next(lines).strip()) for _ in range(5)}
        writer.send_signal(signal.SIGKILL)
        done |= {bytes.fromhex(line.strip()) for line in lines if line.endswith("\n")}
    store = DiskChunkStore(root, MIB)
    found = {chunk for chunk, _ in store.owned()}
    assert done <= found
    assert all(store.verify(chunk) for chunk in found)
    assert files_below(root / "incoming") == []


# ---------------------------------------------------------------- damage


def chunk_path(root: Path, ref: ChunkRef, holding: Holding) -> Path:
    return root / holding.value / ref.id.hex()[:2] / ref.id.hex()[2:]


def test_a_flipped_bit_anywhere_in_the_file_is_found(
    root: Path, store: DiskChunkStore, rng: Random
) -> None:
    ref, table, data = make()
    store.put(ref, table, data, Holding.OWNED)
    path = chunk_path(root, ref, Holding.OWNED)
    good = path.read_bytes()
    edges = [0, LENGTH - 1, LENGTH, LENGTH + len(table), len(good) - 1]
    for position in edges + [rng.randrange(len(good)) for _ in range(60)]:
        bad = bytearray(good)
        bad[position] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(CorruptChunk):
            store.read(ref, 0, LENGTH)
        assert path.exists()  # a reader does not judge
    path.write_bytes(good)
    assert store.read(ref, 0, LENGTH) == data


@pytest.mark.expected_logs("was damaged")
@pytest.mark.parametrize("size", [0, 1, 100, LENGTH, LENGTH + 30, -1])
def test_a_torn_file_is_corrupt_everywhere_and_then_replaced(
    root: Path, store: DiskChunkStore, size: int
) -> None:
    ref, table, data = make()
    store.put(ref, table, data, Holding.OWNED)
    path = chunk_path(root, ref, Holding.OWNED)
    os.truncate(path, size if size >= 0 else path.stat().st_size + 1)
    with pytest.raises(CorruptChunk):
        store.read(ref, 0, 10)
    with pytest.raises(CorruptChunk):
        store.open(ref.id)
    store.put(ref, table, data, Holding.OWNED)  # replaces it without being told
    assert store.read(ref, 0, LENGTH) == data
    os.truncate(path, max(size, 0))
    assert not store.verify(ref.id)
    with pytest.raises(ChunkMissing):
        store.read(ref, 0, 10)
    assert store.has([ref.id], renew=False) == [False]
    store.put(ref, table, data, Holding.OWNED)
    assert store.verify(ref.id)


def test_a_read_of_one_block_does_not_depend_on_the_others(
    root: Path, store: DiskChunkStore
) -> None:
    ref, table, data = make()
    store.put(ref, table, data, Holding.OWNED)
    path = chunk_path(root, ref, Holding.OWNED)
    with path.open("r+b") as file:
        file.write(bytes([data[0] ^ 1]))
    assert store.read(ref, BLOCK_BYTES, 10) == data[BLOCK_BYTES : BLOCK_BYTES + 10]
    with pytest.raises(CorruptChunk):
        store.read(ref, 10, 10)


@pytest.mark.expected_logs("was damaged")
def test_a_chunk_under_another_name_is_damaged(root: Path, store: DiskChunkStore) -> None:
    ref, table, data = make(seed=1)
    other, _, _ = make(seed=2)
    store.put(ref, table, data, Holding.OWNED)
    chunk_path(root, ref, Holding.OWNED).rename(chunk_path(root, other, Holding.OWNED))
    with pytest.raises(CorruptChunk):
        store.read(other, 0, 10)
    assert not store.verify(other.id)


@pytest.mark.expected_logs("was damaged")
def test_the_quarantine_keeps_the_newest_and_what_nothing_has_replaced(
    root: Path, store: DiskChunkStore
) -> None:
    count = chunk_tree.DAMAGED_FILES_MAX + 5
    for seed in range(count):
        ref, table, data = make(1000, seed)
        store.put(ref, table, data, Holding.OWNED)
        with chunk_path(root, ref, Holding.OWNED).open("r+b") as file:
            file.write(bytes([data[0] ^ 1]))
        assert not store.verify(ref.id)
        os.utime(root / "damaged" / ref.id.hex(), (seed, seed))
    usage = store.usage()
    assert (usage.owned_bytes, usage.owned_chunks) == (0, 0)
    store.tidy_damaged([])
    assert len(files_below(root / "damaged")) == count  # each may be all that is left
    store.tidy_damaged([make(1000, count - 1)[0].id])
    assert len(files_below(root / "damaged")) == count - 1
    for seed in range(count):
        store.put(*make(1000, seed), Holding.OWNED)
    store.tidy_damaged([])
    kept = {path.name for path in files_below(root / "damaged")}
    assert kept == {
        make(1000, seed)[0].id.hex()
        for seed in range(count - 1 - chunk_tree.DAMAGED_FILES_MAX, count - 1)
    }


def test_a_bad_cached_copy_is_removed_not_kept(root: Path, store: DiskChunkStore) -> None:
    ref, table, data = make()
    store.put(ref, table, data, Holding.CACHED)
    os.truncate(chunk_path(root, ref, Holding.CACHED), 10)
    assert not store.verify(ref.id)
    assert files_below(root) == []
    assert store.usage().cached_bytes == 0


# ---------------------------------------------------------------- a full disk


def test_a_full_disk_refuses_owned_chunks_and_keeps_the_others(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2 * MIB):
        store = DiskChunkStore(tmp_path / "disk" / "chunks", MIB)
        stored: list[ChunkRef] = []

        def put_many() -> None:
            for seed in range(20):
                ref, table, data = make(300_000, seed)
                store.put(ref, table, data, Holding.OWNED)
                stored.append(ref)

        with pytest.raises(OutOfSpace):
            put_many()
        assert 3 <= len(stored) < 7
        assert {chunk for chunk, _ in store.owned()} == {ref.id for ref in stored}
        assert store.usage().owned_chunks == len(stored)
        assert all(store.verify(ref.id) for ref in stored)
        store.put(*make(300_000, 99), Holding.CACHED)  # quietly left out
        assert store.usage().cached_chunks == 0
        assert files_below(tmp_path / "disk" / "chunks" / "incoming") == []
        store.delete(stored[0].id)
        store.put(*make(300_000, 98), Holding.OWNED)


def test_cached_chunks_make_room_for_owned_ones(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2 * MIB):
        store = DiskChunkStore(tmp_path / "disk" / "chunks", 100 * MIB)
        for seed in range(20):
            store.put(*make(300_000, seed), Holding.CACHED)
        assert store.usage().cached_chunks >= 3
        for seed in range(100, 105):
            store.put(*make(300_000, seed), Holding.OWNED)
        assert store.usage().owned_chunks == 5


def test_a_write_that_hits_the_limit_in_the_middle_leaves_nothing(
    root: Path, store: DiskChunkStore, tmp_path: Path
) -> None:
    ref, table, data = make(300_000)
    staging = tmp_path / "staging"
    staging.write_bytes(data)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_010, limits[1]))
    try:
        with pytest.raises(OutOfSpace):
            store.put(ref, table, data, Holding.OWNED)
        with pytest.raises(OutOfSpace):
            store.adopt(staging, ref, table, Holding.OWNED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert files_below(root) == []
    assert staging.read_bytes()[: ref.length] == data
    store.adopt(staging, ref, table, Holding.OWNED)  # once there is room
    assert store.verify(ref.id)


# ---------------------------------------------------------------- the cache


def test_the_least_recently_used_chunk_goes_first(tmp_path: Path) -> None:
    size = chunk_file.file_bytes(1000)
    store = DiskChunkStore(tmp_path / "chunks", 3 * size)
    chunks = [make(1000, seed) for seed in range(5)]
    for chunk in chunks[:3]:
        store.put(*chunk, Holding.CACHED)
    store.read(chunks[0][0], 0, 10)  # now 1 is the oldest
    store.put(*chunks[3], Holding.CACHED)
    store.put(*chunks[1], Holding.CACHED)  # and then 2
    assert store.usage().cached_bytes == 3 * size
    for index, is_here in enumerate([True, True, False, True, False]):
        if is_here:
            assert store.read(chunks[index][0], 0, 1000) == chunks[index][2]
        else:
            with pytest.raises(ChunkMissing):
                store.read(chunks[index][0], 0, 1000)


def test_the_order_of_eviction_survives_a_restart_by_the_files_times(tmp_path: Path) -> None:
    root, size = tmp_path / "chunks", chunk_file.file_bytes(1000)
    store = DiskChunkStore(root, 3 * size)
    chunks = [make(1000, seed) for seed in range(3)]
    for age, chunk in enumerate(chunks):
        store.put(*chunk, Holding.CACHED)
        os.utime(chunk_path(root, chunk[0], Holding.CACHED), (1000 - age, 1000 - age))
    smaller = DiskChunkStore(root, size)
    assert smaller.usage().cached_chunks == 1
    assert smaller.read(chunks[0][0], 0, 1000) == chunks[0][2]
    assert smaller.drop_cached() == size
    assert files_below(root) == []


def test_a_chunk_that_is_being_sent_may_be_evicted(tmp_path: Path) -> None:
    store = DiskChunkStore(tmp_path / "chunks", chunk_file.file_bytes(1000))
    first, second = make(1000, 1), make(1000, 2)
    store.put(*first, Holding.CACHED)
    opened = store.open(first[0].id)
    try:
        store.put(*second, Holding.CACHED)
        with pytest.raises(ChunkMissing):
            store.open(first[0].id)
        assert os.pread(opened.fd, 1000, 0) == first[2]
    finally:
        os.close(opened.fd)


# ---------------------------------------------------------------- arithmetic


def test_the_length_of_the_data_follows_from_the_size_of_the_file() -> None:
    lengths = [1, 2, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 5 * BLOCK_BYTES + 3, 64 * MIB]
    for length in lengths:
        assert chunk_file.data_length(chunk_file.file_bytes(length)) == length
    sizes = {chunk_file.file_bytes(length) for length in range(1, 3 * BLOCK_BYTES)}
    for size in range(max(sizes)):
        assert (chunk_file.data_length(size) is not None) == (size in sizes)
    assert chunk_file.data_length(chunk_file.file_bytes(64 * MIB) + 1) is None


@pytest.mark.parametrize("number", sorted(chunk_file.DAMAGE_ERRNOS))
def test_a_damaged_inode_is_one_copy_less_and_no_more(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A file that cannot even be looked at must not keep the others from being listed."""
    store = DiskChunkStore(root, MIB)
    bad, good = make(seed=1), make(seed=2)
    for chunk in (bad, good):
        store.put(*chunk, Holding.OWNED)
    name, names = bad[0].id.hex()[2:], [bad[0].id, good[0].id]
    status, utime, opening = os.stat, os.utime, os.open

    def stat_badly(path: str | int, follow_symlinks: bool = True) -> os.stat_result:
        refuse(path)
        return status(path, follow_symlinks=follow_symlinks)

    def refuse(path: object) -> None:
        if isinstance(path, str) and path.endswith(name):
            raise OSError(number, os.strerror(number), path)

    def utime_badly(path: str | int) -> None:
        refuse(path)
        utime(path)

    def open_badly(path: str, flags: int, mode: int = 0o777) -> int:
        refuse(path)
        return opening(path, flags, mode)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", stat_badly)
        patched.setattr(os, "utime", utime_badly)
        patched.setattr(os, "open", open_badly)
        assert [chunk for chunk, _ in store.owned()] == [good[0].id]
        assert store.has(names, renew=True) == [False, True]
        assert DiskChunkStore(root, MIB).usage().owned_chunks == 1
        store.put(*bad, Holding.OWNED)  # a new file takes the place of the damaged one
    assert store.has(names, renew=True) == [True, True]
