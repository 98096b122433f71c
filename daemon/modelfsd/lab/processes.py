"""The processes of a lab, found and signalled without the risk of hitting anybody else.

Every process of a lab carries the mark `MODELFS_LAB_NODE=<root>/<name>` in its environment, which
its children inherit: also one whose parent has died (etcd after a kill of its daemon), which a walk
down the tree would miss. Descendants of marked processes belong to the node too, in case one of
them cleans its environment.

A pid can be used again between finding and killing. So a process is held by a pidfd, which never
means another process, and its start time is compared before the signal is sent.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from modelfs.errors import ModelfsError
from modelfsd.commands.registry import process_start_ticks

MARK = "MODELFS_LAB_NODE"
ENVIRONMENT_BYTES_MAX = 4 << 20
POLL_SECONDS = 0.001  # between looks whether a signal has been taken
ROUNDS_MAX = 20  # of finding and killing, for processes that start others meanwhile


class ProcessesRemain(ModelfsError):
    """Processes of the lab have survived SIGKILL: they are stuck in the kernel."""


def mark(node_directory: Path) -> str:
    """The entry of the environment that says which node a process belongs to."""
    return f"{MARK}={node_directory}"


def find(marks: Iterable[str]) -> dict[int, int]:
    """pid -> start time (ticks) of all live processes with one of `marks`, and descendants."""
    wanted = {os.fsencode(mark) for mark in marks}
    parents: dict[int, int] = {}
    starts: dict[int, int] = {}
    members: set[int] = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        pid = int(entry)
        start = process_start_ticks(pid)
        parent = _parent_of(pid)
        if start is None or parent is None or pid == os.getpid():
            continue
        starts[pid], parents[pid] = start, parent
        if not wanted.isdisjoint(_environment_of(pid)):
            members.add(pid)
    grown = True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in members} - members
        members |= children
        grown = bool(children)
    return {pid: starts[pid] for pid in members}


def send(processes: dict[int, int], number: signal.Signals) -> None:
    """Send a signal to those of `processes` (pid -> start time) that still are who they were."""
    for pid, start in processes.items():
        handle = _hold(pid, start)
        if handle is None:
            continue
        try:
            signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            pass  # it ended in this instant, which is what SIGKILL is for
        finally:
            os.close(handle)


def kill(marks: Iterable[str], seconds: float) -> None:
    """SIGKILL all processes with these marks and wait until they have ended.

    They are stopped first, so that none of them sees another one die and acts on it: as if the
    power had failed. Raises `ProcessesRemain` after `seconds`.
    """
    marks = list(marks)
    deadline = time.monotonic() + seconds
    for _ in range(ROUNDS_MAX):
        processes = find(marks)
        if not processes:
            return
        send(processes, signal.SIGSTOP)
        processes |= find(marks)  # what was started before its parent was stopped
        send(processes, signal.SIGKILL)
        if not wait_ended(processes, deadline - time.monotonic()):
            break
    left = find(marks)
    if left:
        raise ProcessesRemain(f"processes {sorted(left)} do not end, although killed")


def wait_ended(processes: dict[int, int], seconds: float) -> bool:
    """Wait until all of `processes` have ended. False if one has not after `seconds`."""
    deadline = time.monotonic() + seconds
    for pid, start in processes.items():
        handle = _hold(pid, start)
        if handle is None:
            continue
        try:
            poll = select.poll()
            poll.register(handle, select.POLLIN)  # readable when the process has ended
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return False
        finally:
            os.close(handle)
    return True


def wait_stopped(pids: Iterable[int], seconds: float) -> bool:
    """Wait until every thread of these has taken its SIGSTOP: until then they go on answering.

    False if one has not after `seconds`; one that waits in the kernel stops when it comes out.
    """
    deadline = time.monotonic() + seconds
    while not all(_is_all_stopped(pid) for pid in pids):
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _is_all_stopped(pid: int) -> bool:
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except FileNotFoundError:
        return True
    states = {_state_of(int(thread)) for thread in threads}
    return states <= {"T", "t", "X", "Z", None}


def are_stopped(processes: dict[int, int]) -> bool:
    """Whether every one of `processes` is stopped by a signal."""
    return bool(processes) and all(_state_of(pid) == "T" for pid in processes)


def _hold(pid: int, start: int) -> int | None:
    """A pidfd of this very process; None if it has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if process_start_ticks(pid) == start:
        return handle
    os.close(handle)
    return None


def _stat_fields(pid: int) -> list[bytes] | None:
    """The fields of /proc/PID/stat after the name: state, parent, ... (proc_pid_stat(5))."""
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return content[content.rindex(b")") + 2 :].split()


def _parent_of(pid: int) -> int | None:
    fields = _stat_fields(pid)
    return None if fields is None else int(fields[1])


def _state_of(pid: int) -> str | None:
    fields = _stat_fields(pid)
    return None if fields is None else fields[0].decode()


def _environment_of(pid: int) -> list[bytes]:
    """The environment a process was started with; empty if it is gone or not ours to see."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read(ENVIRONMENT_BYTES_MAX).split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []
