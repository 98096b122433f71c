"""What the mount tests share: children that may hang, awaited conditions, counters of a daemon.

Rule: a mount whose daemon may be dead or stopped is touched by a child process only, which we can
walk away from (`in_child`). Everything else about a node is read from /proc and its admin socket.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import blake3
import pytest

from modelfs import stripe
from modelfs.limits import CHUNK_BYTES_DEFAULT
from modelfsd import mounts
from modelfsd.commands.control import call, call_long
from modelfsd.lab import processes as lab_processes
from modelfsd.lab.cluster import Lab
from modelfsd.lab.state import LabNode

# Guards against hangs, not measures of speed.
CHILD_SECONDS = 150.0
CONDITION_SECONDS = 150.0
POLL_SECONDS = 0.05
MIB = 1 << 20
REALTIME_COARSE = 5  # CLOCK_REALTIME_COARSE, by which the kernel stamps files
BIG_BYTES = 48 * MIB

Dirs = tuple[Path, Path, Path]


@contextlib.contextmanager
def refused(number: int) -> Iterator[None]:
    """The body must fail with exactly this errno."""
    with pytest.raises(OSError) as caught:  # noqa: PT011  # its number is compared below
        yield
    found = caught.value.errno
    assert found == number, f"{errno.errorcode.get(found or 0)}, not {errno.errorcode[number]}"


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition; fail if it does not come."""
    deadline = time.monotonic() + CONDITION_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        time.sleep(POLL_SECONDS)


@dataclass(frozen=True, slots=True)
class ChildResult:
    """How a child ended: what it printed as JSON, or the errno that it met."""

    value: Any
    errno: int
    text: str


PREAMBLE = """
import errno, json, mmap, os, sys, time
arguments = json.loads(sys.argv[1])
if uid := arguments.pop("uid"):  # only now: the interpreter may lie where nobody else may look
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
try:
    exec(compile(arguments.pop("source"), "child", "exec"), {**globals(), **arguments})
except OSError as error:
    print(json.dumps({"errno": error.errno, "text": str(error)}))
else:
    print(json.dumps({"errno": 0, "text": ""}))
"""


def start_child(source: str, uid: int = 0, **arguments: object) -> subprocess.Popen[str]:
    """Run Python in a child, as user and group `uid`, with `arguments` as its globals."""
    words = json.dumps({"source": source, "uid": uid, **arguments}, default=os.fspath)
    return subprocess.Popen(
        [sys.executable, "-u", "-c", PREAMBLE, words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )


def finish_child(child: subprocess.Popen[str], seconds: float = CHILD_SECONDS) -> ChildResult:
    """Wait for a child; one that hangs is killed, and fails the test."""
    try:
        output, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel: left alone
            child.communicate(timeout=5)
        pytest.fail(f"a child hung for {seconds:.0f} s")
    lines = [json.loads(line) for line in output.splitlines()]
    assert lines, f"the child died with {child.returncode}"
    value = lines[-2] if len(lines) > 1 else None
    return ChildResult(value, lines[-1]["errno"], lines[-1]["text"])


def in_child(
    source: str, uid: int = 0, seconds: float = CHILD_SECONDS, **arguments: object
) -> ChildResult:
    """Run Python in a child and wait for it. `print(json.dumps(x))` gives its value."""
    return finish_child(start_child(source, uid, **arguments), seconds)


def times(path: Path) -> tuple[int, int]:
    """(mtime, ctime) in nanoseconds, of the link itself."""
    status = path.lstat()
    return status.st_mtime_ns, status.st_ctime_ns


def pass_a_tick(path: Path) -> None:
    """Wait until the kernel's coarse clock, and the daemon's, are past all times of a path."""
    latest = max(times(path))
    while time.clock_gettime_ns(REALTIME_COARSE) <= latest:
        os.sched_yield()


def assert_same(path: Path, wanted: Path) -> None:
    """Compare two files, in a child that may hang."""
    source = "assert open(path, 'rb').read() == open(wanted, 'rb').read()"
    assert in_child(source, path=path, wanted=wanted).errno == 0


def run(*command: str | Path, seconds: float = CHILD_SECONDS) -> str:
    """Run a program; returns what it printed. It must succeed."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=seconds, cwd="/"
    )
    assert done.returncode == 0, f"{command[0]}: {done.stdout}{done.stderr}"
    return done.stdout


def ask(node: LabNode, command: str, **arguments: object) -> dict[str, Any]:
    """Ask a daemon through its admin socket."""
    return call(node.control_path, command, CHILD_SECONDS, **arguments)


def ask_long(
    node: LabNode, command: str, **arguments: object
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Have a daemon carry out a command that takes long; returns its answer, and its news."""
    *news, (_, answer) = call_long(node.control_path, command, CHILD_SECONDS, **arguments)
    return answer, [told for _, told in news]


def requests(node: LabNode) -> dict[str, int]:
    """How many requests of each kind the kernel has made of a daemon."""
    counted: dict[str, int] = ask(node, "counters")["requests"]
    return counted


def info(lab: Lab, path: Path) -> dict[str, Any]:
    """`modelfs info` of a path that is seen through one of the lab's mounts."""
    for node in lab.nodes:
        if path.is_relative_to(node.mount):
            return ask(node, "info", path=list(path.relative_to(node.mount).parts))
    raise AssertionError(f"{path} is in no mount of the lab")


def pattern(version: int, size: int) -> bytes:
    """One version of a file: a number, repeated, so that a mixture of two is seen anywhere."""
    return (b"%015d\n" % version * (size // 16 + 1))[:size]


def version_in(data: bytes) -> int:
    """The version that `pattern` made this from; fails if it is a mixture, or has zeros."""
    version = int(data[:16])
    if data != pattern(version, len(data)):
        wanted = pattern(version, len(data))
        at = next(i for i in range(len(data)) if data[i] != wanted[i])
        raise AssertionError(f"version {version} goes on at {at} with {data[at : at + 32]!r}")
    return version


def owned_bytes(node: LabNode) -> int:
    """How much the chunks that a node owns take on its disk. Some may go meanwhile."""
    total = 0
    for path in (node.state_dir / "chunks" / "owned").glob("*/*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def chunk_files(node: LabNode) -> dict[str, Path]:
    """The chunks that a node owns, on its disk, by their names in hex."""
    owned = node.state_dir / "chunks" / "owned"
    return {f"{path.parent.name}{path.name}": path for path in owned.glob("*/*") if path.is_file()}


def chunk_names(contents: bytes, chunk_bytes: int = CHUNK_BYTES_DEFAULT) -> list[str]:
    """The names of a file's chunks, in hex."""
    count = stripe.chunk_count(chunk_bytes, len(contents))
    spans = (stripe.span(chunk_bytes, index) for index in range(count))
    return [blake3.blake3(contents[start : start + size]).hexdigest() for start, size in spans]


def flip(path: Path, offset: int) -> None:
    """Flip a bit of a file, behind everybody's back."""
    with path.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 0x10]), offset)


def forget_pages(path: Path) -> None:
    """Make the kernel forget a file's cached pages (those that are clean)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def tree_of(root: Path) -> dict[str, str]:
    """All that is below a directory: path -> type, mode and contents."""
    found = {}
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            path = Path(directory, name)
            status = path.lstat()
            detail = f"{status.st_mode:o} {status.st_uid}:{status.st_gid}"
            if path.is_symlink():
                detail += f" -> {path.readlink()}"
            elif path.is_file():
                detail += f" {status.st_size} {path.read_bytes()!r:.4000}"
            found[str(path.relative_to(root))] = detail
    return found


def is_mounted(node: LabNode) -> bool:
    """Whether the mount table has the node's mount."""
    return mounts.mount_at(node.mount) is not None


def kill(lab: Lab, name: str) -> None:
    """Kill a node, and wait until the others take changes again."""
    lab.kill(name)
    wait_for_leader(lab)


def wait_for_leader(lab: Lab) -> None:
    """Wait until the nodes that are up take changes: one that was killed may have led etcd.

    An election takes 5 s at worst, and longer on a busy machine. A node that has waited for 5 s
    refuses changes then, and opens what it knew last.
    """
    for node in lab.nodes:
        if node.pid is not None:
            wait_until(partial(_takes_changes, node.mount), f"{node.name} to take changes")


def _takes_changes(directory: Path) -> bool:
    probe = directory / ".probe"
    try:
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in (errno.EIO, errno.EROFS):
            return False
        raise
    return True


def make_whole(lab: Lab) -> None:
    """Start or resume whatever is killed or paused, and wait until all see each other."""
    for node in lab.nodes:
        processes = lab_processes.find([node.mark])
        stopped = {pid: start for pid, start in processes.items() if is_stopped(pid)}
        lab_processes.send(stopped, signal.SIGCONT)
    # All at once: the first of several would wait for the quorum that the others bring.
    with ThreadPoolExecutor() as pool:
        dead = [node.name for node in lab.nodes if node.pid is None]
        for started in [pool.submit(lab.start, name) for name in dead]:
            started.result()
    lab.wait_for_mesh()
    wait_until(lambda: all(has_quorum(node) for node in lab.nodes), "etcd's quorum")


def has_quorum(node: LabNode) -> bool:
    """Whether a node can reach etcd's quorum."""
    return bool(ask(node, "status")["etcd"]["healthy"])


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (FileNotFoundError, ProcessLookupError):
        return False
