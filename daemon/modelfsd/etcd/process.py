"""The etcd child process: its command line, its log, its end.

The child must not outlive the daemon, whatever happens to that: `setpriv --pdeathsig TERM` makes
the kernel end it. That signal is bound to the *thread* that spawned it, so it is spawned with
plain `subprocess.Popen` from the thread that runs trio (trio's own way spawns from a worker
thread, whose idling out would kill etcd). If the signal did not suffice (etcd stuck in an fsync
while its daemon was killed), the next start ends the orphan, by the pid file, after a check that
the process is one of ours: its command line names our data directory.

Files, all in the state directory: `etcd/` (the data), `etcd.log` and `etcd.log.1`, `etcd.pid`.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import trio

from modelfs.errors import UserError
from modelfs.limits import GIB, MIB

log = logging.getLogger(__name__)

LOG_BYTES_MAX = 10 * MIB
PROCESSORS_MAX = 4  # of etcd, which logs, applies and answers in turn: more would be idle
LOG_TAIL_BYTES = 2000  # shown to people
LOG_SEARCH_BYTES = 256 << 10  # looked through for the reason of an end
# etcd lets its clients finish, hands its leadership on and closes its files. It gives a step 10 s
# (its request timeout, 5 s and two elections), for example if who shall lead has just died.
STOP_SECONDS = 14.0

# The disk is shared with bulk data, whose fsyncs delay etcd's by seconds: an election timeout of
# ten heartbeats, and more than 2 s. Pre-vote keeps a member that was paused or cut off from
# ending the term of a healthy leader when it returns.
_OPTIONS = (
    "--heartbeat-interval=250",
    "--election-timeout=2500",
    "--initial-election-tick-advance=true",
    "--pre-vote=true",
    # History is for watchers that come back. 100,000 revisions are 100 s at the 1,000 changes a
    # second that one client can cause, and some 200 MiB of the quota; a load that takes longer
    # than that starts again. etcd compacts every 5 minutes, so history is mostly longer.
    "--auto-compaction-mode=revision",
    "--auto-compaction-retention=100000",
    f"--quota-backend-bytes={8 * GIB}",  # the most that etcd's authors advise
    # Raft entries are kept in memory between snapshots: 3.4's default of 100,000 would be
    # hundreds of MB. 10,000 is what 3.2 and 3.6 use.
    "--snapshot-count=10000",
    "--logger=zap",
    "--log-outputs=stderr",
    "--log-level=info",
)
# `--enable-v2=false` is not given: it is the default since 3.4, and 3.6 does not know the flag.

# Where the daemon of this machine asks its own member. etcd makes the file where it runs, under the
# name that looks like an address: 3.4 takes nothing else.
SOCKET_NAME = "etcd.sock:0"
SOCKET_URL = f"unix://{SOCKET_NAME}"

_PROXY_VARIABLES = frozenset({"http_proxy", "https_proxy", "all_proxy", "no_proxy"})


class EtcdProcess:
    """One etcd process at a time: start, wait, stop. Blocking calls are short, but `stop`'s."""

    def __init__(self, state_directory: Path) -> None:
        self.data_directory = state_directory / "etcd"
        self.log_path = state_directory / "etcd.log"
        self.socket_path = state_directory / SOCKET_NAME
        self._pid_path = state_directory / "etcd.pid"
        self._child: subprocess.Popen[bytes] | None = None
        self._log_start = 0  # where the last child's part of the log begins

    @property
    def pid(self) -> int | None:
        """The child's process id, while it runs."""
        return self._child.pid if self.is_running and self._child is not None else None

    @property
    def is_running(self) -> bool:
        """Whether the child was started and has not ended."""
        return self._child is not None and self._child.poll() is None

    @property
    def exit_status(self) -> int | None:
        """How the last child ended: its exit code, or a signal as a negative number."""
        return None if self._child is None else self._child.poll()

    def start(self, arguments: list[str]) -> None:
        """Spawn etcd with these arguments besides the fixed ones. Call on trio's thread.

        Raises `UserError` if etcd or setpriv is not installed.
        """
        assert not self.is_running
        etcd = _program("etcd", "etcd-server")
        setpriv = _program("setpriv", "util-linux")
        self.data_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.bound_log()
        self.socket_path.unlink(missing_ok=True)  # of one that was killed
        command = [setpriv, "--pdeathsig", "TERM", etcd, self._data_argument, *_OPTIONS, *arguments]
        with self.log_path.open("ab") as log_file:
            self._log_start = log_file.tell()
            # A session of its own: an interrupt from the terminal is for the daemon, which still
            # needs etcd in order to stop cleanly.
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                cwd=self.socket_path.parent,
                umask=0o077,  # the socket is for whom the state directory is for
                env=_environment(),
                start_new_session=True,
            )
        try:
            self._pid_path.write_text(f"{self._child.pid}\n")
        except OSError as error:  # it is for the case that the kernel does not end the child
            log.warning("%s cannot be written: %s", self._pid_path, error)

    async def wait(self) -> int:
        """Wait until the child has ended, without a thread; returns its exit status."""
        child = self._child
        assert child is not None
        while child.poll() is None:
            await _wait_pid(child.pid)
        await trio.lowlevel.checkpoint()
        return child.returncode

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL after `STOP_SECONDS`. Also when cancelled; at most that long."""
        child = self._child
        if child is None:
            return
        with trio.CancelScope(shield=True):
            if child.poll() is None:
                child.terminate()
                with trio.move_on_after(STOP_SECONDS):
                    await self.wait()
            if child.poll() is None:
                log.warning("etcd (pid %d) did not stop in %s s: killed", child.pid, STOP_SECONDS)
                child.kill()
                await self.wait()
        self._pid_path.unlink(missing_ok=True)

    async def end_orphan(self) -> None:
        """End an etcd of ours that a killed daemon left behind."""
        try:
            pid = int(self._pid_path.read_text())
        except (FileNotFoundError, ValueError):
            return
        try:
            handle = os.pidfd_open(pid)  # from here on the number cannot mean another process
        except ProcessLookupError:
            self._pid_path.unlink(missing_ok=True)
            return
        try:
            if self._is_ours(pid):
                log.warning("an etcd (pid %d) of an earlier daemon still runs: ending it", pid)
                await _end(handle)
        finally:
            os.close(handle)
        self._pid_path.unlink(missing_ok=True)

    def bound_log(self) -> None:
        """If the log has grown too large, move its contents to `etcd.log.1`.

        Copied and truncated rather than renamed, since a running etcd holds it open (to append).
        On a full disk it stays as it is, and is looked at again.
        """
        try:
            if self.log_path.stat().st_size > LOG_BYTES_MAX:
                shutil.copyfile(self.log_path, self.log_path.with_suffix(".log.1"))
                os.truncate(self.log_path, 0)
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("%s cannot be moved away: %s", self.log_path, error)

    def log_tail(self, size_bytes: int = LOG_TAIL_BYTES) -> str:
        """The last lines that the last child logged, whole ones."""
        try:
            with self.log_path.open("rb") as log_file:
                end = log_file.seek(0, os.SEEK_END)
                start = self._log_start if self._log_start <= end else 0  # it was truncated
                log_file.seek(max(start, end - size_bytes))
                tail = log_file.read(size_bytes).decode(errors="replace")
        except FileNotFoundError:
            return ""
        is_whole = end - start <= size_bytes
        return tail if is_whole else tail.partition("\n")[2] or tail

    @property
    def _data_argument(self) -> str:
        return f"--data-dir={self.data_directory.absolute()}"

    def _is_ours(self, pid: int) -> bool:
        try:
            command_line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return os.fsencode(self._data_argument) in command_line.split(b"\0")


def check_port(address: str, port: int, option: str) -> None:
    """Raise `UserError` if we cannot listen on this address and port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        # As etcd does, so that connections of an earlier run in TIME_WAIT do not count.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
            listener.listen(1)
        except OSError as error:
            raise UserError(
                f"etcd cannot listen on {address} port {port} ({error.strerror}): another program"
                f" uses it, or the address is not this machine's. Choose another with {option}."
            ) from error


def _program(name: str, package: str) -> str:
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/local/bin:/usr/bin:/bin")
    if path is None:
        raise UserError(
            f"the program '{name}' is not installed: install the package '{package}'"
            f" (Debian, Ubuntu: apt-get install {package}), or use an etcd that runs already"
            " with --etcd URL"
        )
    return path


def _processors() -> int:
    """How many processors etcd may use at once: half of them, as it shares the machine.

    Go wakes idle threads for whatever might run beside; for messages of a few hundred bytes that
    costs more than it gains. With one of two, a change takes a quarter to a third fewer switches
    between threads. Batches of changes keep even one processor from being the limit.
    """
    return max(1, min(PROCESSORS_MAX, len(os.sched_getaffinity(0)) // 2))


def _environment() -> dict[str, str]:
    """Ours, without what would steer etcd: its flags' variables and proxies for its peers.

    GOMAXPROCS is the user's, if it is set.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("ETCD_") and name.lower() not in _PROXY_VARIABLES
    }
    environment.setdefault("GOMAXPROCS", str(_processors()))
    if platform.machine() == "aarch64":  # 3.4 wants to be told; 3.5 supports it without
        environment["ETCD_UNSUPPORTED_ARCH"] = "arm64"
    return environment


async def _wait_pid(pid: int) -> None:
    handle = os.pidfd_open(pid)
    try:
        await trio.lowlevel.wait_readable(handle)
    finally:
        os.close(handle)


async def _end(handle: int) -> None:
    """SIGTERM a process that is not our child, then SIGKILL it, and wait until it is gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, number)
        with trio.move_on_after(STOP_SECONDS) as patience:
            await trio.lowlevel.wait_readable(handle)
        if not patience.cancelled_caught:
            return
    raise UserError("an etcd of an earlier daemon cannot be ended, not even by SIGKILL")
