"""`modelfs umount`: stop a node cleanly, or clear away what a dead one left.

A busy mount is left exactly as it was, and the user is told who keeps it busy. That is found out
twice: before the daemon is asked (by reading /proc), and by the daemon, whose unmount the kernel
refuses if somebody came in between.
"""

from __future__ import annotations

import os

from modelfs.errors import ModelfsError, UserError
from modelfsd import mounts
from modelfsd.commands.control import call
from modelfsd.commands.launch import wait_for_exit
from modelfsd.commands.registry import Entry, Registry

ANSWER_SECONDS = 60.0  # the daemon's unmount waits for flushes that are under way
EXIT_SECONDS = 120.0
GONE_SECONDS = 10.0
USERS_SHOWN_MAX = 10


class UnmountFailed(ModelfsError):
    """The mount is still there. The text says why."""


def unmount_command(path: str, registry: Registry) -> str:
    """Unmount what is mounted at `path`; returns what to tell the user.

    Raises `UnmountFailed` (busy, or it did not end in time), or `UserError` for what is not a
    modelfs mount.
    """
    mountpoint = _find_mountpoint(path, registry)
    entry = registry.find_by_mountpoint(mountpoint)
    if entry is not None and entry.alive:
        _refuse_if_busy(mountpoint, entry.pid)
        _stop_daemon(mountpoint, entry)
        return f"unmounted {mountpoint}"
    mount = mounts.mount_at(mountpoint)
    if mount is None or mount.type != mounts.MOUNT_TYPE:
        raise UserError(f"{mountpoint} is not a modelfs mount")
    health = mounts.probe(mountpoint)
    if health is mounts.Health.ANSWERS:
        # Its daemon registered elsewhere, whoever did so here. An unmount by the kernel stops it as
        # cleanly.
        _refuse_if_busy(mountpoint, None)
        _unmount_by_kernel(mountpoint)
        if entry is not None:
            registry.unregister(entry)
        return f"unmounted {mountpoint}"
    if entry is None and health is mounts.Health.HANGS:
        raise UnmountFailed(
            f"{mountpoint} does not answer, and its daemon is not registered in "
            f"{registry.directory}; if it is dead: umount -f -l {mountpoint}"
        )
    mounts.detach(mountpoint)
    if entry is not None:
        registry.unregister(entry)
    return f"removed the dead mount at {mountpoint}"


def _find_mountpoint(path: str, registry: Registry) -> str:
    stops = {mount.mountpoint for mount in mounts.mounts() if mount.type == mounts.MOUNT_TYPE}
    stops |= {entry.mountpoint for entry in registry.live()}
    found, inside = mounts.resolve(os.path.join(os.getcwd(), path), stops)
    if inside:
        raise UserError(f"{path} lies inside the modelfs mount {found}: name that one")
    return found


def _refuse_if_busy(mountpoint: str, daemon: int | None) -> None:
    below = [
        mount.mountpoint
        for mount in mounts.mounts()
        if mount.mountpoint.startswith(mountpoint.rstrip("/") + "/")
    ]
    if below:
        raise UnmountFailed(f"{mountpoint} is busy: {below[0]} is mounted below it")
    users = mounts.users(mountpoint, but=frozenset() if daemon is None else frozenset({daemon}))
    if users:
        raise UnmountFailed(f"{mountpoint} is busy:\n{_users_text(users)}")


def _users_text(users: list[mounts.User]) -> str:
    lines = [f"  {user.command} (pid {user.pid}): {user.what} {user.path}" for user in users]
    if len(lines) > USERS_SHOWN_MAX:
        lines[USERS_SHOWN_MAX:] = [f"  and {len(lines) - USERS_SHOWN_MAX} more"]
    return "\n".join(lines)


def _stop_daemon(mountpoint: str, entry: Entry) -> None:
    try:
        call(entry.control, "stop", ANSWER_SECONDS)
    except UserError as error:
        if entry.alive:
            _refuse_if_busy(mountpoint, entry.pid)  # says more than the daemon can
            raise UnmountFailed(f"{mountpoint} is still mounted: {error}") from error
    if not wait_for_exit(entry.pid, EXIT_SECONDS):
        raise UnmountFailed(
            f"the daemon of {mountpoint} (process {entry.pid}) is stopping, but has not ended "
            f"within {EXIT_SECONDS:.0f} s; its log is {entry.state_dir}/modelfs.log"
        )
    if not mounts.wait_gone(mountpoint, GONE_SECONDS):
        mounts.detach(mountpoint)


def _unmount_by_kernel(mountpoint: str) -> None:
    try:
        mounts.unmount(mountpoint)
    except mounts.MountBusy as error:
        _refuse_if_busy(mountpoint, None)
        raise UnmountFailed(str(error)) from error
