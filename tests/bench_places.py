"""Where the benchmark works: the lab, the local disk, and peers to compare with; and its clock.

A place has two directories that are one file system: `a` on the node that writes, `b` on the one
that reads. Making a place *cold* drops all caches of this machine; making it *client-cold* drops
what the reading node has, and leaves the servers' page caches warm. The latter is the figure to
compare, as no disk is in it.

CPU seconds are those of the whole machine, whoever spends them: the servers' are part of the price.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType

from modelfsd.commands import control
from modelfsd.lab import processes as lab_processes
from modelfsd.lab.cluster import Lab
from modelfsd.lab.state import LabNode

MIB = 1 << 20
TICKS = os.sysconf("SC_CLK_TCK")
DROP_SECONDS = 120.0
TOUCHED_MIB_MAX = 256


def machine_cpu() -> float:
    """Busy seconds of all processors since the boot: user, nice, system, irq, softirq."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:7])) / TICKS


def touch_memory(mib: int) -> None:
    """Use and free memory, so that what comes next finds pages that the host backs already.

    In a virtual machine whose host takes free memory back, whoever comes first pays for each page.
    """
    with mmap.mmap(-1, max(1, min(mib, TOUCHED_MIB_MAX)) * MIB) as memory:
        for offset in range(0, len(memory), mmap.PAGESIZE):
            memory[offset] = 1


class Clock:
    """Seconds and CPU seconds of its body."""

    seconds = cpu_seconds = 0.0

    def __init__(self, touched_mib: int = 0) -> None:
        self._touched_mib = touched_mib

    def __enter__(self) -> Clock:
        if self._touched_mib:
            touch_memory(self._touched_mib)
        self._cpu, self._started = machine_cpu(), time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.seconds = max(time.perf_counter() - self._started, 1e-6)
        self.cpu_seconds = machine_cpu() - self._cpu


class Place(ABC):
    """A file system that is measured. Its figures are the rows, with `suffix`, of column `name`."""

    name: str
    suffix: str = ""
    since: float = 0.0  # when the work began: what is older is left cold
    a: Path
    b: Path

    @property
    def title(self) -> str:
        """What it is called where it has no column of its own."""
        return self.name + self.suffix.replace("_", " ")

    @abstractmethod
    def drop_client(self) -> None:
        """Let the reading node have nothing of any file, and the servers have all in memory."""

    def drop_all(self) -> None:
        """Let nobody have anything in memory."""
        drop_page_cache()


def drop_page_cache() -> None:
    """Write everything back, and drop the clean pages of the whole machine. Needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


class LocalDisk(Place):
    """A directory beside the lab's state directories: what all of them rest on."""

    name = "local disk"

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.a = self.b = directory

    def drop_client(self) -> None:
        """There is no server: the files' own pages are all that could be warm."""
        warm_files([self.a], self.since)


class Modelfs(Place):
    """A lab: written through its first node, read through the second."""

    name = "modelfs"

    def __init__(self, lab: Lab, directory: str, suffix: str = "") -> None:
        self.lab, self.suffix = lab, suffix
        writer, self.reader = lab.nodes[0], lab.nodes[1]
        self.a, self.b = writer.mount / directory, self.reader.mount / directory
        self.a.mkdir()

    def drop_client(self) -> None:
        """`modelfs cache drop` on the reader; its own replicas stay warm, as the others'."""
        self._drop(self.reader)
        warm_files([node.state_dir / "chunks" for node in self.lab.nodes], self.since)

    def drop_all(self) -> None:
        """Every node's caches, then the machine's."""
        for node in self.lab.nodes:
            self._drop(node)
        drop_page_cache()

    def keep_here(self, name: str) -> None:
        """Files below directory `name` get a copy on every node."""
        path = [*self.b.relative_to(self.reader.mount).parts, name]
        settings = {"replicas": str(len(self.lab.nodes))}
        control.call(self.reader.control_path, "policy", DROP_SECONDS, path=path, set=settings)

    def requests(self) -> int:
        """How many requests the reading node's kernel has made of its daemon."""
        counted = control.call(self.reader.control_path, "counters", DROP_SECONDS)
        return sum(counted["requests"].values())

    def _drop(self, node: LabNode) -> None:
        control.call(node.control_path, "drop", DROP_SECONDS)


def warm_files(directories: list[Path], since: float) -> None:
    """Read every file that was written since then into the page cache, without a copy of it."""
    libc = ctypes.CDLL(None, use_errno=True)
    for path in (path for directory in directories for path in directory.rglob("*")):
        try:
            if path.stat().st_mtime < since:
                continue  # chunks of deleted files stay for an hour
            file = path.open("rb", buffering=0)
        except OSError:
            continue  # renamed meanwhile, or a directory
        with file:
            size = os.fstat(file.fileno()).st_size
            libc.readahead(file.fileno(), ctypes.c_int64(0), ctypes.c_size_t(size))
            buffer = bytearray(min(size, 4 * MIB))
            while buffer and file.readinto(buffer):
                pass


def processes_of(lab: Lab) -> dict[int, int]:
    """All processes of a lab."""
    return lab_processes.find([node.mark for node in lab.nodes])
