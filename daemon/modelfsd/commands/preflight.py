"""What must be right before a daemon starts. Each check that fails says what to do.

`prepare` makes the paths real and the state directory; `check` looks at the machine and the mount
point, and takes away a dead mount of ours; `lock_state_dir` makes sure of one daemon per state
directory. Nothing here touches a mount that might be dead or hung (see `mounts`).
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import stat
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from modelfs.errors import UserError
from modelfs.limits import MIB
from modelfsd import mounts
from modelfsd.commands.registry import Registry
from modelfsd.config import Config
from modelfsd.units import format_size

log = logging.getLogger(__name__)

FREE_BYTES_MIN = 64 * MIB  # etcd alone preallocates a journal of 61 MiB
CLOCK_MIN = 1_735_689_600  # 2025-01-01: no machine that is set right is earlier
FUSE_DEVICE = "/dev/fuse"
FUSE_SETTINGS = Path("/etc/fuse.conf")
_CAP_SYS_ADMIN = 21  # capabilities(7)


def prepare(config: Config) -> Config:
    """The configuration with links followed, and its state directory made, private to its owner.

    Raises `UserError` if one directory lies in the other, or the state directory cannot be used.
    """
    stop, inside = mounts.resolve(config.mountpoint)
    if inside:
        raise UserError(f"{config.mountpoint} lies inside the modelfs mount {stop}: choose another")
    mountpoint = Path(stop)
    place, inside = mounts.resolve(config.state_dir)
    state_dir = Path(place)
    if inside or place == stop or state_dir.is_relative_to(mountpoint):
        raise UserError(
            f"the state directory {config.state_dir} lies inside the mount point {place}: "
            "a node cannot keep its chunks in itself; name another one with --state-dir"
        )
    if mountpoint.is_relative_to(state_dir):
        raise UserError(
            f"the mount point {mountpoint} lies inside the state directory {state_dir}: "
            "name another one with --state-dir"
        )
    _make_state_dir(state_dir)
    check_state(state_dir, os.geteuid())
    return replace(config, mountpoint=mountpoint, state_dir=state_dir)


def _make_state_dir(state_dir: Path) -> None:
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = state_dir.stat()
        if stat.S_IMODE(status.st_mode) & 0o077:
            state_dir.chmod(0o700)  # chunks are readable to whoever gets at the directory
    except OSError as error:
        raise UserError(
            f"the state directory {state_dir} cannot be made: {error.strerror}; "
            "name another one with --state-dir"
        ) from error
    if not stat.S_ISDIR(status.st_mode):
        raise UserError(f"the state directory {state_dir} is not a directory")
    if not os.access(state_dir, os.R_OK | os.W_OK | os.X_OK) or _is_read_only(state_dir):
        raise UserError(
            f"the state directory {state_dir} cannot be written to: "
            "change its owner, or name another one with --state-dir"
        )


def check_state(state_dir: Path, euid: int) -> None:
    """What is in the state directory is ours, at its place, and nobody else's to write.

    A link would make us write, or delete, where somebody else wants it. Nor could `chunks` be one,
    to another disk: what is staged becomes a chunk by a rename.
    """
    with os.scandir(state_dir) as entries:
        for entry in entries:
            if entry.name == "lost+found":
                continue  # the file system's own, where a disk is given as a whole
            with suppress(FileNotFoundError):  # a socket of a daemon that is just ending
                _check_part(entry, state_dir, euid)


def _check_part(entry: os.DirEntry[str], state_dir: Path, euid: int) -> None:
    status = entry.stat(follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode):
        raise UserError(
            f"{entry.path} is a symbolic link: put back what was there. The parts of a state "
            "directory belong on one file system; name one on another disk with --state-dir"
        )
    if status.st_uid != euid:
        raise UserError(
            f"{entry.path} belongs to user {status.st_uid}, and this is user {euid}: run as "
            "that user, or look what it is and change its owner"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not stat.S_ISSOCK(status.st_mode):
        raise UserError(
            f"{entry.path} can be written to by others (mode {stat.S_IMODE(status.st_mode):o}):"
            f" make sure that it is as it was, then chmod -R go= {state_dir}"
        )


def _is_read_only(directory: Path) -> bool:
    return bool(os.statvfs(directory).f_flag & os.ST_RDONLY)


def check(config: Config, registry: Registry) -> None:
    """Everything else. Raises `UserError`; removes a dead modelfs mount at the mount point."""
    check_python(sys.version_info[:2])
    check_clock(time.time())
    if not config.etcd:
        check_etcd(os.environ.get("PATH", ""))
    check_fuse(FUSE_DEVICE)
    check_may_mount(config)
    check_free_space(config.state_dir)
    check_mountpoint(config.mountpoint, registry)


def check_python(version: tuple[int, int]) -> None:
    """The language must know what we use."""
    if version < (3, 11):
        raise UserError(f"modelfs needs Python 3.11 or newer, this is {version[0]}.{version[1]}")


def check_clock(now: float) -> None:
    """File times, and certificates one day, need a clock that is roughly right."""
    if now < CLOCK_MIN:
        date = time.strftime("%Y-%m-%d", time.gmtime(now))
        raise UserError(f"this machine's clock says {date}: set it first (timedatectl set-ntp on)")


def check_etcd(search_path: str) -> None:
    """The embedded etcd is the system's."""
    if shutil.which("setpriv", path=search_path) is None:
        raise UserError("setpriv is missing: install the package util-linux")
    if shutil.which("etcd", path=search_path) is None:
        raise UserError(
            "etcd is missing: install the package etcd-server (apt install etcd-server), "
            "or name a running etcd with --etcd http://HOST:2379"
        )


def check_fuse(device: str) -> None:
    """The FUSE device can be opened."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError as error:
        raise UserError(
            f"{device} is missing: load the module (modprobe fuse); "
            f"a container needs --device {device} --cap-add SYS_ADMIN"
        ) from error
    except OSError as error:
        if error.errno == errno.ENODEV:
            advice = "load the module: modprobe fuse"
        else:
            advice = f"run as root; a container needs --device {device} --cap-add SYS_ADMIN"
        raise UserError(f"{device} cannot be opened ({error.strerror}): {advice}") from error


def check_may_mount(config: Config) -> None:
    """Root needs the capability; others need fusermount3, and permission for allow_other."""
    if os.geteuid() == 0:
        if not has_capability(_CAP_SYS_ADMIN, Path("/proc/self/status").read_text()):
            raise UserError(
                "this root may not mount (no CAP_SYS_ADMIN): start the container with "
                "--cap-add SYS_ADMIN --device /dev/fuse"
            )
        return
    if shutil.which("fusermount3") is None:
        raise UserError("fusermount3 is missing: install the package fuse3 (apt install fuse3)")
    if config.options.allow_other and not _allows_other(FUSE_SETTINGS):
        raise UserError(
            f"-o allow_other needs the line `user_allow_other` in {FUSE_SETTINGS}: "
            "add it as root, or leave the option out"
        )


def has_capability(number: int, status: str) -> bool:
    """Whether the text of /proc/PID/status grants an effective capability."""
    for line in status.splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


def _allows_other(settings: Path) -> bool:
    try:
        lines = settings.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return False
    return any(line.split("#")[0].strip() == "user_allow_other" for line in lines)


def check_free_space(state_dir: Path) -> None:
    """A new node needs room. One that holds chunks comes back on a full disk too: they are needed.

    It says so in the log then, and takes no more chunks.
    """
    status = os.statvfs(state_dir)
    free_bytes = status.f_bavail * status.f_frsize
    if free_bytes >= FREE_BYTES_MIN:
        return
    ours = {"lock", "modelfs.log", "modelfs.log.1", "control.sock"}
    if any(name not in ours for name in os.listdir(state_dir)):
        log.warning("the disk of %s is full: %s left", state_dir, format_size(free_bytes))
        return
    raise UserError(
        f"the disk of {state_dir} has {format_size(free_bytes)} left, and a new node needs "
        f"{format_size(FREE_BYTES_MIN)}: make room, or name another disk with --state-dir"
    )


# ---------------------------------------------------------------- the mount point


def check_mountpoint(mountpoint: Path, registry: Registry) -> None:
    """An empty directory with no mount of ours on it, once a dead one has been taken away."""
    mount = mounts.mount_at(mountpoint)
    if mount is not None and mount.type == mounts.MOUNT_TYPE:
        _remove_dead_mount(mountpoint, registry)
    try:
        status = mountpoint.stat()
        names = os.listdir(mountpoint) if stat.S_ISDIR(status.st_mode) else []
    except FileNotFoundError as error:
        raise UserError(f"{mountpoint} does not exist: make it (mkdir -p {mountpoint})") from error
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise UserError(
                f"{mountpoint} is a dead mount of another program: umount -l {mountpoint}"
            ) from error
        raise UserError(f"{mountpoint} cannot be used: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise UserError(f"{mountpoint} is not a directory")
    if names:
        raise UserError(
            f"{mountpoint} is not empty ({names[0]!r} is in it): a mount would hide what is there; "
            "choose an empty directory"
        )


def _remove_dead_mount(mountpoint: Path, registry: Registry) -> None:
    entry = registry.find_by_mountpoint(mountpoint)
    if entry is not None and entry.alive:
        raise UserError(
            f"{mountpoint} is mounted already, by process {entry.pid} with the state directory "
            f"{entry.state_dir}; unmount it with: modelfs umount {mountpoint}"
        )
    # Its daemon may be registered elsewhere, whoever was here; or the run directory was lost.
    health = mounts.probe(str(mountpoint))
    if health is mounts.Health.ANSWERS:
        raise UserError(
            f"{mountpoint} is mounted already, by a modelfs daemon that is not registered in "
            f"{registry.directory}; unmount it with: umount {mountpoint}"
        )
    if entry is None and health is mounts.Health.HANGS:
        raise UserError(
            f"the modelfs mount at {mountpoint} does not answer, and its daemon is not "
            f"registered in {registry.directory}; if it is dead: umount -f -l {mountpoint}"
        )
    log.info("removing the dead mount at %s", mountpoint)
    mounts.detach(mountpoint)


# ---------------------------------------------------------------- the lock


def lock_state_dir(config: Config) -> int:
    """Lock the state directory for as long as the returned descriptor stays open.

    Raises `UserError` if another daemon uses it, also one that registered elsewhere.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(config.lock_path, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        if error.errno != errno.EWOULDBLOCK:
            raise UserError(f"{config.lock_path} cannot be locked: {error.strerror}") from error
        by = f" by process {holder}" if holder.isdigit() else ""
        raise UserError(
            f"the state directory {config.state_dir} is in use{by}: "
            "a second node on this machine needs its own --state-dir (and --listen)"
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor
