"""Daemons in the background: how one is started, and how a command finds the ones that run.

`modelfs mount` without `--foreground` starts `modelfs mount ... --foreground` in a session of its
own, and waits. Child and parent share a pipe, on which the child writes JSON lines:

    {"progress": text}    what it is doing now: the messages of its log, while it starts
    {"ready": text}       the mount is there: the parent exits with 0
    {"error": text}       it gave up, and why: the parent repeats that and fails
    {"mistake": text}     the same, where the user or the machine's set-up is wrong

A child that ends without a last word left it in its log.

Every daemon registers itself in a run directory (see `registry`), so that `umount`, `status` and
`info` find its admin socket from a mount point without touching the mount.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import replace
from pathlib import Path

from modelfs.errors import ModelfsError, UserError
from modelfsd.config import CONFIG_VARIABLE, Config
from modelfsd.trust.tokens import format_token

JOIN_VARIABLE = "MODELFS_JOIN"  # what it said comes by standard input
READY_VARIABLE = "MODELFS_READY_FD"
LOG_BYTES_MAX = 10 << 20  # the old log is kept once, as modelfs.log.1
LOG_TAIL_LINES = 15
SILENCE_SECONDS_MAX = 180.0  # a child that is starting says something more often than this
STOP_SECONDS = 20.0
LINE_BYTES_MAX = 64 << 10


class LaunchFailed(ModelfsError):
    """The daemon did not come up; the text is its own explanation."""


# ---------------------------------------------------------------- in the parent


def launch(config: Config, show: Callable[[str], None], environ: Mapping[str, str]) -> str:
    """Start the daemon in the background and wait until it is ready.

    `show` gets each line of progress. Returns what the daemon says of itself. Raises
    `LaunchFailed`, or the daemon's own `UserError`; a daemon that failed is gone by then.
    """
    rotate_log(config.log_path)
    log_start = config.log_path.stat().st_size if config.log_path.exists() else 0
    read_end, write_end = os.pipe()
    with open(read_end, "rb", buffering=0) as pipe:
        try:
            child = _spawn(config, write_end, environ)
        finally:
            os.close(write_end)
        try:
            text = _await_ready(pipe.fileno(), config, log_start, show)
        except BaseException:
            _stop(child)
            raise
    child.returncode = 0  # it outlives us: Popen shall not complain
    return text


def _spawn(config: Config, write_end: int, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    environment = {**environ, READY_VARIABLE: str(write_end)}
    environment.pop(JOIN_VARIABLE, None)
    if environ.get(CONFIG_VARIABLE):  # the child starts in another directory
        environment[CONFIG_VARIABLE] = os.path.abspath(environ[CONFIG_VARIABLE])
    log_flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    log_file = os.open(config.log_path, log_flags, 0o600)
    token = config.join
    try:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "modelfsd", *replace(config, foreground=True).arguments()],
            # A token is for the child alone: command lines and environments can be looked at.
            stdin=subprocess.DEVNULL if token is None else subprocess.PIPE,
            stdout=log_file,
            stderr=log_file,
            pass_fds=(write_end,),
            start_new_session=True,
            cwd="/",  # the daemon keeps no directory of the caller's busy
            env=environment,
        )
    finally:
        os.close(log_file)
    if token is not None:
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.stdin:  # it says itself why it ended
            child.stdin.write(format_token(token).encode() + b"\n")
    return child


def _await_ready(pipe: int, config: Config, log_start: int, show: Callable[[str], None]) -> str:
    buffered = b""
    poll = select.poll()
    poll.register(pipe, select.POLLIN | select.POLLHUP)
    while True:
        if not poll.poll(SILENCE_SECONDS_MAX * 1000):
            raise LaunchFailed(
                f"the daemon has said nothing for {SILENCE_SECONDS_MAX:.0f} seconds and was "
                f"stopped; its log is {config.log_path}"
            )
        data = os.read(pipe, LINE_BYTES_MAX)
        if not data:
            tail = log_tail(config.log_path, log_start)
            said = f"; its last words:\n{tail}" if tail else " without a word"
            raise LaunchFailed(f"the daemon ended while it was starting{said}")
        *lines, buffered = (buffered + data).split(b"\n")
        assert len(buffered) <= LINE_BYTES_MAX  # `Reporter` cuts its lines
        for line in lines:
            message = json.loads(line)
            if "ready" in message:
                return str(message["ready"])
            if "error" in message:
                raise LaunchFailed(str(message["error"]))
            if "mistake" in message:
                raise UserError(str(message["mistake"]))
            show(str(message["progress"]))


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End a daemon that is of no use, softly if it lets us."""
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait(STOP_SECONDS)


def rotate_log(path: Path) -> None:
    """Put a log aside that has grown large; a start is the only time, as the daemon holds it."""
    try:
        if path.stat().st_size > LOG_BYTES_MAX:
            path.replace(path.with_name(path.name + ".1"))
    except FileNotFoundError:
        return


def log_tail(path: Path, start: int) -> str:
    """The last lines that the log got since it was `start` bytes long."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(min(start, size), size - LINE_BYTES_MAX))
        lines = file.read(LINE_BYTES_MAX).decode(errors="replace").splitlines()
    return "\n".join(line[:500] for line in lines[-LOG_TAIL_LINES:])


# ---------------------------------------------------------------- in the child


class Reporter(logging.Handler):
    """The daemon's end of the pipe; while it starts, what it logs is shown to the user.

    Without a waiting parent every call does nothing. A parent that went away is no error.
    """

    def __init__(self, descriptor: int | None) -> None:
        super().__init__(logging.INFO)
        self._descriptor = descriptor

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> Reporter:
        """Take the pipe that `launch` passed, so that no child of ours inherits it."""
        text = environ.pop(READY_VARIABLE, "")
        if not text.isdigit():
            return cls(None)
        os.set_inheritable(int(text), False)
        return cls(int(text))

    @property
    def waiting(self) -> bool:
        """Whether a parent waits for our word."""
        return self._descriptor is not None

    def emit(self, record: logging.LogRecord) -> None:
        """Show one event of the log as progress."""
        self._send("progress", record.getMessage())

    def ready(self, text: str) -> None:
        """The mount is there: the parent may go."""
        self._send("ready", text)
        self.hang_up()

    def error(self, error: Exception) -> None:
        """The daemon gives up."""
        if isinstance(error, ModelfsError):
            self._send("mistake" if isinstance(error, UserError) else "error", str(error))
        else:
            self._send("error", f"internal error: {type(error).__name__}: {error}")
        self.hang_up()

    def hang_up(self) -> None:
        """Say no more."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _send(self, kind: str, text: str) -> None:
        if self._descriptor is None:
            return
        line = json.dumps({kind: text[: LINE_BYTES_MAX // 16]}) + "\n"  # \ud83d\ude00: 12 for one
        try:
            os.write(self._descriptor, line.encode())
        except BrokenPipeError:
            self.hang_up()


def wait_for_exit(pid: int, seconds: float) -> bool:
    """Wait until a process has ended, ours or not. False if it still runs after `seconds`."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except OSError as error:
        raise UserError(f"process {pid} cannot be watched: {error.strerror}") from error
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if poll.poll(left * 1000):
                return True
        return False
    finally:
        os.close(handle)
