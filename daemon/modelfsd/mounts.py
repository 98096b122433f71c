"""The kernel's mount table, and how to look at a mount that may be dead or hung.

Whoever touches a FUSE mount whose daemon is gone gets ENOTCONN, and whoever touches one whose
daemon hangs, hangs with it, in a state that no signal ends. So nothing here touches a mount point
from this process: the table is read from `/proc/self/mountinfo`, links are read without following
them, and a mount is probed by a child that we can walk away from.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from modelfs.errors import UserError

MOUNT_TYPE = "fuse.modelfs"
MOUNT_TABLE = "/proc/self/mountinfo"
# An idle mount answers in a millisecond, but the child that asks must start first, on a machine
# that may be busy; and a living mount that is taken for a silent one may be taken away.
PROBE_SECONDS = 20.0
DETACH_SECONDS = 10.0
LINKS_FOLLOWED_MAX = 40  # as the kernel
STACKED_MAX = 16  # mounts on one mount point that are cleaned away

_MNT_FORCE, _MNT_DETACH, _UMOUNT_NOFOLLOW = 1, 2, 8  # umount(2)
_OCTAL = re.compile(r"\\([0-7]{3})")
# What stat shows the kernel may know by itself, also of a daemon that is dead; not statvfs.
_PROBE = """
import os, sys
try: os.stat(sys.argv[1]); os.statvfs(sys.argv[1])
except OSError as error: sys.exit(error.errno)
"""


class MountBusy(UserError):
    """Somebody uses the mount: an open file, a working directory, a mapped file."""


class Health(Enum):
    """What a probe of a mount found."""

    ANSWERS = "answers"
    DEAD = "dead"  # its daemon is gone: ENOTCONN
    HANGS = "hangs"  # its daemon is there and silent


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the mount table."""

    mountpoint: str
    type: str
    device: str  # major:minor


@dataclass(frozen=True, slots=True)
class User:
    """A process that keeps a mount busy."""

    pid: int
    command: str
    what: str  # for example `working directory`, `open file`
    path: str


def mounts(table: str = MOUNT_TABLE) -> list[Mount]:
    """All mounts of this process's namespace, oldest first (see proc_pid_mountinfo(5))."""
    found = []
    with open(table, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.split(" ")
            tail = fields.index("-", 6)
            found.append(Mount(_unescape(fields[4]), fields[tail + 1], fields[2]))
    return found


def _unescape(text: str) -> str:
    """Undo the kernel's `\\040`; other bytes stay as they are."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)


def mount_at(mountpoint: str | Path, table: str = MOUNT_TABLE) -> Mount | None:
    """The topmost mount at exactly this path."""
    found = [mount for mount in mounts(table) if mount.mountpoint == str(mountpoint)]
    return found[-1] if found else None


def resolve(path: str | Path, stops: frozenset[str] | set[str] | None = None) -> tuple[str, str]:
    """Follow links in an absolute path as the kernel does, but never look inside a mount.

    Stops where the path reaches one of `stops` (default: every modelfs mount point) and returns
    (the real path up to there, the rest without a leading slash). `..` after the stop is taken
    lexically. Raises `UserError` for a loop of links.
    """
    if stops is None:
        stops = {mount.mountpoint for mount in mounts() if mount.type == MOUNT_TYPE}
    todo = [part for part in reversed(str(path).split("/")) if part not in ("", ".")]
    real, links = "/", 0
    while todo:
        part = todo.pop()
        if part == "..":
            real = os.path.dirname(real)
            continue
        real = os.path.join(real, part)
        if real in stops:
            rest = os.path.normpath("/" + "/".join(reversed(todo))).lstrip("/")
            return real, rest
        try:
            target = os.readlink(real)
        except OSError:  # not a link, or nothing there
            continue
        links += 1
        if links > LINKS_FOLLOWED_MAX:
            raise UserError(f"{path} leads through more than {LINKS_FOLLOWED_MAX} symbolic links")
        real = "/" if target.startswith("/") else os.path.dirname(real)
        todo += [part for part in reversed(target.split("/")) if part not in ("", ".")]
    return real, ""


def probe(mountpoint: str, seconds: float = PROBE_SECONDS) -> Health:
    """Touch a mount from a child process. A child that hangs is killed and left to its fate."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _PROBE, mountpoint],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        code = child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        child.returncode = -9  # it may be in a wait that no signal ends: do not wait for it
        return Health.HANGS
    dead = code in (errno.ENOTCONN, errno.ECONNABORTED)
    return Health.DEAD if dead else Health.ANSWERS


def unmount(mountpoint: str | Path) -> None:
    """Unmount if nobody uses it. Raises `MountBusy`, with nothing changed, or `UserError`."""
    if os.geteuid() == 0:
        error = _umount2(str(mountpoint), _UMOUNT_NOFOLLOW)
        if error == errno.EBUSY:
            raise MountBusy(f"{mountpoint} is in use")
        if error:
            raise UserError(f"{mountpoint} cannot be unmounted: {os.strerror(error)}")
        return
    done = _fusermount("-u", str(mountpoint))
    if done.returncode:
        reason = done.stderr.strip()
        if "busy" in reason:
            raise MountBusy(f"{mountpoint} is in use")
        raise UserError(f"{mountpoint} cannot be unmounted: {reason}")


def detach(mountpoint: str | Path) -> None:
    """Take away a mount whose daemon is gone, also one in use: its users get ENOTCONN anyhow."""
    for _ in range(STACKED_MAX):
        mount = mount_at(mountpoint)
        if mount is None or mount.type != MOUNT_TYPE:
            return
        if os.geteuid() == 0:
            # FORCE aborts requests that nobody will answer; DETACH does not mind open files.
            flags = _MNT_FORCE | _MNT_DETACH | _UMOUNT_NOFOLLOW
            error = _umount2(str(mountpoint), flags)
            reason = os.strerror(error) if error else ""
        else:
            done = _fusermount("-uz", str(mountpoint))
            reason = done.stderr.strip() if done.returncode else ""
        if reason:
            raise UserError(
                f"the dead mount at {mountpoint} cannot be removed ({reason}); "
                f"as root: umount -f -l {mountpoint}"
            )


def syncfs(descriptor: int) -> None:
    """Write back all dirty pages of the file system of an open file. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(descriptor):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _umount2(mountpoint: str, flags: int) -> int:
    """The system call; returns an errno, 0 for success."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(mountpoint), flags) == 0:
        return 0
    return ctypes.get_errno()


def _fusermount(flag: str, mountpoint: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["fusermount3", flag, "--", mountpoint],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=DETACH_SECONDS,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise UserError("fusermount3 is missing: install the package fuse3") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"fusermount3 {flag} {mountpoint} did not return") from error


def wait_gone(mountpoint: str | Path, seconds: float) -> bool:
    """Wait until no modelfs mount is at this path. False if one still is after `seconds`.

    The kernel wakes whoever polls the mount table when it changes.
    """
    deadline = time.monotonic() + seconds
    with open(MOUNT_TABLE, "rb") as table:
        poll = select.poll()
        poll.register(table, select.POLLPRI | select.POLLERR)
        while True:
            mount = mount_at(mountpoint)
            if mount is None or mount.type != MOUNT_TYPE:
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            poll.poll(left * 1000)


def users(mountpoint: str | Path, but: frozenset[int] = frozenset()) -> list[User]:
    """Who keeps a mount busy, one entry per process, as far as we may see.

    Reads what /proc says about each process; the names it gives are not touched. What cannot be
    read (another user's process) is left out.
    """
    root = str(mountpoint).rstrip("/")
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) not in but:
            for what, path in _used_paths(f"/proc/{entry}"):
                if path == root or path.startswith(root + "/"):
                    found.append(User(int(entry), _command(entry), what, path))
                    break
    return sorted(found, key=lambda user: user.pid)


def _used_paths(process: str) -> Iterator[tuple[str, str]]:
    for link, what in (("cwd", "working directory"), ("root", "root"), ("exe", "running program")):
        try:
            yield what, os.readlink(f"{process}/{link}")
        except OSError:  # it ended, or is not ours to see
            continue
    try:
        descriptors = os.listdir(f"{process}/fd")
    except OSError:
        descriptors = []
    for descriptor in descriptors:
        try:
            yield "open file", os.readlink(f"{process}/fd/{descriptor}")
        except OSError:
            continue
    try:
        with open(f"{process}/maps", encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                fields = line.rstrip("\n").split(maxsplit=5)
                if len(fields) == 6:
                    yield "mapped file", fields[5]
    except OSError:
        return


def _command(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(4096).split(b"\0")
        return b" ".join(words).decode(errors="replace").strip()[:80] or f"process {pid}"
    except OSError:
        return f"process {pid}"
