"""`./run demo`: the main job on real model files, on three nodes, in a minute or two.

1. A lab of three nodes comes up in a temporary directory.
2. Through node 1 an array, a state dict (if torch is there) and a sharded model are saved.
3. Each is loaded through nodes 2 and 3 in every usual way, and compared with the original, byte
   by byte; what holds which part is shown.
4. Node 2 is killed, and everything is loaded again through nodes 1 and 3, with a file among it
   that node 3 has never read.
5. The same saves and loads on the local disk give the speeds to compare with. There, a save
   includes an fsync, since modelfs's `close` promises as much.

What the speeds mean. A load is cold unless it is marked: before it this kernel's cached pages of
the files (local ones, or the chunk files of all three nodes) are dropped. What a virtual disk's
host caches cannot be dropped from here. With two copies on three nodes each node holds about two
thirds of the chunks itself, and all nodes share this machine's disk and processors.

Everything is taken away in the end, also after Ctrl-C. The exit code is 1 if a comparison failed.
"""

from __future__ import annotations

import argparse
import errno
import gc
import os
import shutil
import signal
import stat
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.table import Table
from rich.text import Text

from modelfs.errors import ModelfsError, UserError
from modelfs.limits import MIB
from modelfsd.commands import control, show
from modelfsd.lab.cluster import Lab
from modelfsd.lab.demo_models import (
    Load,
    Workload,
    is_same,
    model_workload,
    numpy_workload,
    torch_workload,
)
from modelfsd.units import format_size, parse_size

SIZE_DEFAULT = "300MB"
SIZE_BYTES_MIN = 16 * MIB
DISK_SHARE = 8  # two replicas, three caches, the local copy, and some air; in sizes
INFO_SECONDS = 20.0
LOCAL = "local disk"
VICTIM, SURVIVORS = "n2", ("n1", "n3")

FOOTNOTES = """\
(cached): this node had read or written the file before. All others: page cache dropped before.
With 2 copies on 3 nodes, two thirds of what a node loads are on its own disk. All nodes share this
machine's disk and processors, and each number is one run: it shows the order of magnitude."""

console = show.console(sys.stderr)


@dataclass
class Results:
    """Speeds by (row, column), and what went wrong."""

    columns: list[str] = field(default_factory=list)
    rows: dict[str, dict[str, str]] = field(default_factory=dict)
    different: list[str] = field(default_factory=list)

    def add(self, row: str, column: str, size_bytes: int, seconds: float, note: str = "") -> None:
        """Remember one measurement."""
        if column not in self.columns:
            self.columns.append(column)
        speed = f"{size_bytes / 1e6 / max(seconds, 1e-6):,.0f} MB/s"
        self.rows.setdefault(row, {})[column] = f"{speed} {note}".rstrip()

    def table(self) -> Table:
        """All speeds."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("")
        for column in self.columns:
            table.add_column(column, justify="right", no_wrap=True)
        for name, cells in self.rows.items():
            table.add_row(name, *(cells.get(column, "") for column in self.columns))
        return table


class Demo:
    """One run."""

    def __init__(self, directory: Path, size_bytes: int, needs_torch: bool) -> None:
        self.directory = directory
        self.results = Results()
        self._cached: set[tuple[str, str]] = set()  # (workload, mount) read or written before
        self._state_dirs: list[Path] = []
        say(f"making {format_size(size_bytes)} of weights")
        workloads = [
            numpy_workload("numpy array", size_bytes * 15 // 100, seed=1),
            torch_workload(size_bytes * 20 // 100, seed=2),
            model_workload(size_bytes * 55 // 100, seed=3),
        ]
        if workloads[1] is None:
            if needs_torch:
                raise UserError("torch is not installed: ./run demo --torch installs it")
            say("torch is left out, as it is not installed: ./run demo --torch installs it")
        self.workloads = [workload for workload in workloads if workload is not None]
        self.unread = numpy_workload("array nobody read", size_bytes * 10 // 100, seed=4)

    def run(self, lab: Lab) -> None:
        """Everything, on a lab that is up."""
        self._state_dirs = [node.state_dir for node in lab.nodes]
        self._on_the_local_disk()
        for workload in [*self.workloads, self.unread]:
            self._save(workload, lab.node("n1").mount, "save: n1")
        for workload in self.workloads:
            self._load(workload, lab.node("n2").mount, "load: n2", backwards=False)
            self._load(workload, lab.node("n3").mount, "load: n3", backwards=True)
        self._show_holders(lab)
        say(f"killing {VICTIM}")
        lab.kill(VICTIM)
        for workload in [self.unread, *self.workloads]:
            for name in SURVIVORS:
                mount = lab.node(name).mount
                self._load(workload, mount, f"{name}, {VICTIM} dead", backwards=False)

    def _on_the_local_disk(self) -> None:
        local = self.directory / "local"
        local.mkdir()
        for workload in [*self.workloads, self.unread]:
            self._save(workload, local, LOCAL)
            self._load(workload, local, LOCAL, backwards=False)
        shutil.rmtree(local)

    def _save(self, workload: Workload, mount: Path, column: str) -> None:
        say(f"saving {workload.name} ({format_size(workload.size_bytes)}) to {mount}")
        start = time.perf_counter()
        directory = _place_of(workload, mount)
        directory.mkdir()
        workload.save(directory)
        if column == LOCAL:
            _sync(directory)
        row = f"{workload.name}: {workload.save_name}"
        self.results.add(row, column, workload.size_bytes, time.perf_counter() - start)
        self._cached.add((workload.name, str(mount)))

    def _load(self, workload: Workload, mount: Path, column: str, backwards: bool) -> None:
        """Load in every way. The order decides which way is the first, hence the cold one."""
        for load in reversed(workload.loads) if backwards else workload.loads:
            say(f"{load.name} of {workload.name} from {mount}")
            directory = _place_of(workload, mount)
            key = (workload.name, str(mount))
            cached = column != LOCAL and key in self._cached
            if not cached:
                _drop_from_cache([directory] if column == LOCAL else self._state_dirs)
            seconds, different = _time(load, directory)
            self._cached.add(key)
            row = f"{workload.name}: {load.name}"
            if different:
                self.results.different.append(f"{row} from {mount}: {different} tensors differ")
            note = "DIFFERS" if different else "(cached)" if cached else ""
            self.results.add(row, column, workload.size_bytes, seconds, note)
            gc.collect()  # a mapped file that is still referred to keeps its mount busy

    def _show_holders(self, lab: Lab) -> None:
        """Which node holds which part of the first shard, or of the array."""
        workload = self.workloads[-1]
        directory = _place_of(workload, Path("/"))
        name = next(
            (entry.name for entry in sorted(_place_of(workload, lab.node("n1").mount).iterdir())
             if entry.suffix == ".safetensors"), ""
        )  # fmt: skip
        path = [directory.name, name]
        answer = control.call(lab.node("n1").control_path, "info", INFO_SECONDS, path=path)
        console.print(Text(f"\nwho holds which part of {'/'.join(path)}:", style="bold"))
        console.print(show.info_view(answer))
        console.print()


def _time(load: Load, directory: Path) -> tuple[float, int]:
    """(seconds, tensors that differ). Comparing counts where it is what reads the bytes."""
    seconds, different = 0.0, 0
    start = time.perf_counter()
    for found, original in load.pairs(directory):
        if not load.lazy:
            seconds += time.perf_counter() - start
        different += not is_same(found, original)
        if not load.lazy:
            start = time.perf_counter()
    return seconds + time.perf_counter() - start, different


def _place_of(workload: Workload, mount: Path) -> Path:
    return mount / "".join(c if c.isalnum() else "-" for c in workload.name.split(",")[0])


def _sync(directory: Path) -> None:
    for path in [*directory.iterdir(), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _drop_from_cache(directories: list[Path]) -> None:
    """Let the next reads come from the disk. What is being written has no say in it, or is gone."""
    for path in (path for directory in directories for path in directory.rglob("*")):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            # A temporary file that was renamed meanwhile; a link; a socket.
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
                continue
            raise
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def say(line: str) -> None:
    """One line of progress."""
    console.print(Text(line, style="dim"))


def _end_on_signal(number: int, frame: FrameType | None) -> None:
    """Makes a SIGTERM clean up as Ctrl-C does."""
    sys.exit(128 + number)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run demo", description="modelfs on three nodes.")
    parser.add_argument("--torch", action="store_true", help="torch must take part")
    parser.add_argument("--size", default=SIZE_DEFAULT, help="of all files (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave the lab running")
    return parser.parse_args()


def run_demo(size_bytes: int, needs_torch: bool, keep: bool) -> int:
    """The exit code. Raises `ModelfsError`."""
    if size_bytes < SIZE_BYTES_MIN:
        raise UserError(f"the demo needs at least {format_size(SIZE_BYTES_MIN)}")
    directory = Path(tempfile.mkdtemp(prefix="modelfs-demo-"))
    lab: Lab | None = None
    finished = False
    try:
        free_bytes = shutil.disk_usage(directory).free
        if free_bytes < DISK_SHARE * size_bytes:
            needed = format_size(DISK_SHARE * size_bytes)
            raise UserError(
                f"the demo needs {needed} in {directory.parent}, and {format_size(free_bytes)} "
                "are free: set TMPDIR, or --size to less"
            )
        demo = Demo(directory, size_bytes, needs_torch)
        lab = Lab.up(directory / "lab", nodes=3, show=say)
        demo.run(lab)
        finished = True
    finally:
        if keep and finished and lab is not None:
            say(f"the lab stays: {lab.root}; end it with: ./run modelfs lab down --root {lab.root}")
        else:
            _clean_up(directory, lab)
    output = show.console()
    output.print(demo.results.table())
    output.print(Text(FOOTNOTES, style="dim"))
    for line in demo.results.different:
        output.print(Text(line, style="red"))
    if demo.results.different:
        return 1
    output.print(Text("every byte that was loaded is the byte that was saved", style="green"))
    return 0


def _clean_up(directory: Path, lab: Lab | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave half of it behind
    gc.collect()
    if lab is not None:
        lab.down()
    if (directory / "local").exists():
        shutil.rmtree(directory / "local")
    directory.rmdir()


def main() -> int:
    """The entry point of `python -m modelfsd.lab.demo`."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end_on_signal)
    arguments = _arguments()
    try:
        return run_demo(parse_size(arguments.size), arguments.torch, arguments.keep)
    except ModelfsError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
