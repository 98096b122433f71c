"""The workers of the soak: processes that write and read the same files on one mount.

Each version of a file is one unit of 24 bytes, repeated: the version's number and its length. So
any part of it says which version it is of, and a mixture, a hole or a wrong end is seen anywhere.

- `rewrite`: in place, by all nodes (but `rewrite-0` not by the first, and so on). The writer opens
  for writing (which takes the lease), reads which version is there, and writes the next one or cuts
  this one to half its length. A lost update would show as a number that comes twice.
- `append`: whole units, by all nodes; unit i says i and its own offset.
- `replace`: to a temporary name, then rename; each such file has one writing node.

What a reader demands: exactly one version, of its right length; the same one as long as the file
stays open or mapped, whatever is committed meanwhile; and when it opened the file, one at least as
new as the last that was committed before (G2) and the last that it saw.

On the writer's own node a file that is rewritten in place has plain POSIX semantics. So a reader
there discards what it read if a writer of its node was at that file meanwhile, and does not map
what its own node may cut (SIGBUS).

What workers share lies outside the mounts, in the board: for each file and node the number of the
last committed version, and a count that is odd while a writer of that node is at that file.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import struct
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNIT_BYTES = 24
SIZES_MAX = (200, 5_000, 300_000, 6 << 20)  # inside the record, one page or two, one chunk, two
APPENDED_BYTES_MAX = 6 << 20
HOLD_SECONDS_MAX = 2.0
REPORT_SECONDS = 1.0
NODES = 3
FILES = (
    *(f"rewrite-{index}" for index in range(4)),
    *(f"append-{index}" for index in range(2)),
    *(f"replace-{index}" for index in range(3)),  # its number is that of its writing node
)


class Torn(Exception):
    """What was read is not exactly one version, or an older one than it must be."""


def unit(number: int, length: int) -> bytes:
    """What a version is made of."""
    return b"%011d,%011d\n" % (number, length)


def version_of(number: int, length: int) -> bytes:
    """The contents of one version."""
    return (unit(number, length) * (length // UNIT_BYTES + 1))[:length]


def half_of(length: int) -> int:
    """What a version of this length is cut to."""
    return max(length // 2, UNIT_BYTES)


_appended = bytearray()


def appended(length: int) -> bytes:
    """The contents of a file of this length that was only appended to."""
    while len(_appended) < length:
        _appended.extend(unit(len(_appended) // UNIT_BYTES, len(_appended)))
    return bytes(_appended[:length])


def number_in(data: bytes, name: str) -> int:
    """The rank of the version that these contents are; only grows. Raises `Torn`.

    A version that was cut comes between its number and the next.
    """
    try:
        number, length = int(data[:11]), int(data[12:23])
    except ValueError:
        raise Torn(f"{len(data)} bytes, beginning with {data[:48]!r}") from None
    if name.startswith("append"):
        wanted = appended(len(data))
        rank = len(data) // UNIT_BYTES
    else:
        wanted = version_of(number, length)
        if len(data) == half_of(length) < length:
            wanted = wanted[: len(data)]
        rank = 2 * number + (len(data) < length)
    if data != wanted or (name.startswith("append") and len(data) % UNIT_BYTES):
        at = next((i for i, (a, b) in enumerate(zip(data, wanted, strict=False)) if a != b), -1)
        found = "a wrong length" if at < 0 else f"at {at} {data[at : at + 48]!r}"
        raise Torn(f"{len(data)} bytes of version {number}, {length} bytes long: {found}")
    return rank


class Board:
    """What the workers tell each other: two numbers for each file and node."""

    CELL = struct.Struct("=QQ")  # rank of the last committed version, writers' count
    BYTES = len(FILES) * NODES * CELL.size

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), self.BYTES)

    @classmethod
    def create(cls, path: Path) -> None:
        """Make a board on which nothing has happened."""
        path.write_bytes(bytes(cls.BYTES))

    def _cell(self, name: str, node: int) -> int:
        return (FILES.index(name) * NODES + node) * self.CELL.size

    def committed(self, name: str) -> int:
        """The newest version of a file of which the commit has returned."""
        return max(
            int(self.CELL.unpack_from(self._map, self._cell(name, node))[0])
            for node in range(NODES)
        )

    def count(self, name: str, node: int) -> int:
        """Odd while a writer of this node is at this file; grows with each one."""
        return int(self.CELL.unpack_from(self._map, self._cell(name, node))[1])

    @contextmanager
    def at_work(self, name: str, node: int) -> Iterator[None]:
        """A writer of this node (there is one at a time) is at this file."""
        start = self._cell(name, node) + 8
        struct.pack_into("=Q", self._map, start, self.count(name, node) | 1)
        try:
            yield
        finally:
            struct.pack_into("=Q", self._map, start, self.count(name, node) + 1)

    def commit(self, name: str, node: int, rank: int) -> None:
        """A commit has returned."""
        start = self._cell(name, node)
        before = int(self.CELL.unpack_from(self._map, start)[0])
        struct.pack_into("=Q", self._map, start, max(rank, before))


class Worker(ABC):
    """One process: what it does, and what it has to tell."""

    def __init__(self, root: Path, board: Path, node: int, chance: random.Random) -> None:
        self.root, self.node, self.chance = root, node, chance
        self.board = Board(board)
        self.done: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.torn: list[str] = []
        self.seen: dict[str, int] = {}  # file -> the newest rank that this worker has seen
        self.versions: Counter[str] = Counter()
        # For `replace`; a worker that was killed may have gone a little beyond what it told.
        self.next_number = self.board.committed(f"replace-{node}") // 2 + 1000
        self.longest = (0.0, "")

    @abstractmethod
    def step(self) -> None:
        """One operation."""

    def run(self, seconds: float) -> None:
        """Operate until the time is over, and report about once a second."""
        end = time.monotonic() + seconds
        reported = good = time.monotonic()
        while time.monotonic() < end and not self.torn:
            try:
                self.step()
            except Torn as error:
                self.torn.append(str(error))
            except OSError as error:
                name = errno.errorcode.get(error.errno or 0, str(error.errno))
                self.failed[f"{name} {Path(str(error.filename or '?')).name}"] += 1
                time.sleep(0.05)
            else:
                now = time.monotonic()
                self.longest = max(self.longest, (now - good, time.strftime("%H:%M:%S")))
                good = now
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                self.report()
        self.report()

    def report(self) -> None:
        """One line of JSON: everything so far."""
        report = {
            "done": self.done,
            "failed": self.failed,
            "torn": self.torn,
            "versions": sum(self.versions.values()),
            "longest_gap": self.longest,
        }
        print(json.dumps(report), flush=True)


class Writer(Worker):
    """Writes all files but those that another node replaces."""

    def step(self) -> None:
        name = self.chance.choice(FILES)
        kind = name.split("-")[0]
        if kind == "replace":
            name = f"replace-{self.node}"
        if name == f"rewrite-{self.node}":
            name = "rewrite-3"
        path = self.root / name
        with self.board.at_work(name, self.node):
            if kind == "replace":
                rank = self.replace(path)
            elif kind == "append":
                rank = self.append(path)
            else:
                rank = self.rewrite(path)
        self.board.commit(name, self.node, rank)
        self.done[f"write {kind}"] += 1

    def new_length(self) -> int:
        """Any size: all orders of magnitude are equally likely."""
        return self.chance.randrange(UNIT_BYTES, self.chance.choice(SIZES_MAX) + 1)

    def replace(self, path: Path) -> int:
        """Write beside it, then rename."""
        self.next_number += 1
        length = self.new_length()
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(version_of(self.next_number, length))
        os.rename(temporary, path)
        return 2 * self.next_number

    def append(self, path: Path) -> int:
        """Add some units to the end."""
        with path.open("ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size % UNIT_BYTES:
                raise Torn(f"{path.name}: {size} bytes are there when it is opened to append")
            first = size // UNIT_BYTES
            last = first + self.chance.choice((1, 3, 200, 1000))
            if size > APPENDED_BYTES_MAX:
                return first
            _write(file.fileno(), b"".join(unit(i, i * UNIT_BYTES) for i in range(first, last)))
        return last

    def rewrite(self, path: Path) -> int:
        """Put the next version in the place of this one, or cut this one."""
        with path.open("r+b", buffering=0) as file:
            head = file.read(UNIT_BYTES)
            rank = number_in(head + _rest(file.fileno()), path.name)
            if rank < self.seen.get(path.name, 0):
                raise Torn(f"{path.name}: the writer got {rank} after {self.seen[path.name]}")
            number, length = rank // 2, int(head[12:23])
            if rank % 2 == 0 and half_of(length) < length and self.chance.random() < 0.3:
                rank += 1
                self.cut(path, file.fileno(), half_of(length))
            else:
                rank = 2 * (number + 1)
                length = self.new_length()
                data = version_of(number + 1, length)
                if self.chance.random() < 0.3:
                    os.ftruncate(file.fileno(), 0)
                os.lseek(file.fileno(), 0, os.SEEK_SET)
                _write(file.fileno(), data)
                os.ftruncate(file.fileno(), length)
                if self.chance.random() < 0.2:
                    os.fsync(file.fileno())
        self.seen[path.name] = rank
        return rank

    def cut(self, path: Path, descriptor: int, length: int) -> None:
        """Truncate, by descriptor or by path."""
        if self.chance.random() < 0.5:
            os.ftruncate(descriptor, length)
        else:
            os.truncate(path, length)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _rest(descriptor: int) -> bytes:
    parts = []
    while part := os.read(descriptor, 1 << 20):
        parts.append(part)
    return b"".join(parts)


class Reader(Worker):
    """Opens files, reads them at once or slowly, by read or mmap, and looks again later."""

    def step(self) -> None:
        name = self.chance.choice(FILES)
        is_ours = not name.startswith("replace")  # writers of this node may change it in place
        count = self.board.count(name, self.node)
        floor = max(self.board.committed(name), self.seen.get(name, 0))
        may_shrink = name.startswith("rewrite") and name != f"rewrite-{self.node}"
        how = "read" if may_shrink else self.chance.choice(("read", "mmap"))
        try:
            with (self.root / name).open("rb", buffering=0) as file:
                rank = self.read(name, file.fileno(), how)
        except (Torn, IndexError) as error:
            if is_ours and (count % 2 or self.board.count(name, self.node) != count):
                self.done["discarded"] += 1
                return
            raise Torn(f"{name}, {how}: {error}") from None
        if is_ours and (count % 2 or self.board.count(name, self.node) != count):
            self.done["discarded"] += 1
            return
        if rank < floor:
            raise Torn(f"{name}, {how}: rank {rank} although {floor} was committed before")
        self.versions[name] += rank != self.seen.get(name)
        self.seen[name] = rank
        self.done[how] += 1

    def read(self, name: str, descriptor: int, how: str) -> int:
        """The rank of the version that a descriptor shows, twice if it is held for a while."""
        held = self.chance.random() < 0.15
        mapped = None
        if how == "mmap":
            with suppress(ValueError):  # empty, which is found below
                mapped = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        try:
            ranks = []
            for _ in range(2 if held else 1):
                data = mapped[:] if mapped is not None else self.slowly(descriptor)
                ranks.append(number_in(data, name))
                if held and len(ranks) == 1:
                    time.sleep(self.chance.uniform(0, HOLD_SECONDS_MAX))
        finally:
            if mapped is not None:
                mapped.close()
        if len(set(ranks)) > 1:
            raise Torn(f"an open file changed from {ranks[0]} to {ranks[1]}")
        return ranks[0]

    def slowly(self, descriptor: int) -> bytes:
        """The whole file, in pieces, with a pause between two of them."""
        os.lseek(descriptor, 0, os.SEEK_SET)
        first = os.read(descriptor, self.chance.randrange(UNIT_BYTES, 100_000))
        if self.chance.random() < 0.2:
            time.sleep(self.chance.uniform(0, 0.2))
        return first + _rest(descriptor)


def create_files(root: Path, board: Path) -> None:
    """The first version of each file."""
    Board.create(board)
    for name in FILES:
        data = unit(0, 0) if name.startswith("append") else version_of(0, 1000)
        (root / name).write_bytes(data)


def main() -> None:
    """ROLE ROOT BOARD NODE SEED SECONDS."""
    role, root, board, node, seed, seconds = sys.argv[1:]
    kind = {"writer": Writer, "reader": Reader}[role]
    kind(Path(root), Path(board), int(node), random.Random(seed)).run(float(seconds))


if __name__ == "__main__":
    main()
