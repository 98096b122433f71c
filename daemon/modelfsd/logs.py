"""The log: one line per event on stderr, one logger per module.

On a terminal or in a file a line begins with the time (UTC) and the level. Under systemd (stderr
is the journal) it begins with the priority as `<4>` instead, and the journal adds the time.
Line breaks and control characters inside a message, a file's name for example, are escaped
(`printing`), so that nobody can forge a line. The lines of a traceback are indented below their
event.

What can happen a thousand times a second is logged through `RateLimited`.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TextIO

from modelfsd.printing import plain

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
LEVEL_VARIABLE = "MODELFS_LOG_LEVEL"
LIMITED_KEYS_MAX = 1024  # subjects (peers, files) that one RateLimited remembers


class LineFormatter(logging.Formatter):
    """Formats one event as one line."""

    def __init__(self, journal: bool) -> None:
        super().__init__()
        self.journal = journal

    def format(self, record: logging.LogRecord) -> str:
        name = record.name.removeprefix("modelfsd.").removeprefix("modelfs.")
        if self.journal:
            head = f"<{_priority(record.levelno)}>"
        else:
            moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            head = f"{moment}.{int(record.msecs):03}Z {record.levelname:<7} "
        line = f"{head}{name}: {plain(record.getMessage())}"
        if record.exc_info:
            indent = head if self.journal else "    "
            for text in self.formatException(record.exc_info).splitlines():
                line += f"\n{indent}| {plain(text)}"
        return line


def _priority(level: int) -> int:
    """The syslog priority of a logging level (sd-daemon(3))."""
    if level >= logging.CRITICAL:
        return 2
    if level >= logging.ERROR:
        return 3
    if level >= logging.WARNING:
        return 4
    return 6 if level >= logging.INFO else 7


def is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether `stream` is the journal: systemd names its device and inode in JOURNAL_STREAM."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def level_from(environ: Mapping[str, str]) -> int:
    """The level that MODELFS_LOG_LEVEL asks for; an unknown word means info."""
    return LEVELS.get(environ.get(LEVEL_VARIABLE, "info").lower(), logging.INFO)


def setup(environ: Mapping[str, str], stream: TextIO | None = None) -> logging.Handler:
    """Send all events to `stream` (stderr). Called once, by the command that becomes the node."""
    stream = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter(is_journal(stream, environ)))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)  # libraries speak up only when something is wrong
    for name in ("modelfs", "modelfsd"):
        logging.getLogger(name).setLevel(level_from(environ))
    return handler


class RateLimited:
    """A logger that says the same thing about the same subject once per interval.

    The next line after a pause tells how many were left out. Safe to call from any thread:
    a race between two threads costs at most one line too many.
    """

    def __init__(
        self,
        logger: logging.Logger,
        interval_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._interval_seconds = interval_seconds
        self._clock = clock
        self._last: OrderedDict[object, tuple[float, int]] = OrderedDict()

    def log(self, level: int, subject: object, message: str, *arguments: object) -> bool:
        """Log `message % arguments` unless `subject` was logged just now. Whether it was."""
        now = self._clock()
        since, left_out = self._last.get(subject, (None, 0))
        if since is not None and now - since < self._interval_seconds:
            self._last[subject] = (since, left_out + 1)
            return False
        self._last[subject] = (now, 0)
        self._last.move_to_end(subject)
        while len(self._last) > LIMITED_KEYS_MAX:
            self._last.popitem(last=False)
        if left_out:
            message, arguments = message + " (%d more like this)", (*arguments, left_out)
        self._logger.log(level, message, *arguments)
        return True

    def warning(self, subject: object, message: str, *arguments: object) -> bool:
        """`log` at level WARNING."""
        return self.log(logging.WARNING, subject, message, *arguments)

    def error(self, subject: object, message: str, *arguments: object) -> bool:
        """`log` at level ERROR."""
        return self.log(logging.ERROR, subject, message, *arguments)

    def info(self, subject: object, message: str, *arguments: object) -> bool:
        """`log` at level INFO."""
        return self.log(logging.INFO, subject, message, *arguments)
