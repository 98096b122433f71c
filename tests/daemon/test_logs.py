"""One line per event, and what systemd is told."""

from __future__ import annotations

import io
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelfsd.logs import LIMITED_KEYS_MAX, LineFormatter, RateLimited, is_journal
from modelfsd.sdnotify import Notifier


@pytest.fixture
def lines() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    logger = logging.Logger("modelfsd.reader")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter(journal=False))
    logger.addHandler(handler)
    yield logger, stream
    logger.removeHandler(handler)


def test_an_event_is_one_line_whatever_is_in_it(
    lines: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, stream = lines
    logger.warning("file %s", "a\nb\r\x1b[31m")
    (line,) = stream.getvalue().splitlines()
    assert line[10] == "T"
    assert line[23:] == "Z WARNING reader: file a\\nb\\r\\x1b[31m"


def test_a_traceback_is_indented_below_its_event(
    lines: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, stream = lines
    try:
        raise ValueError("x\ny")
    except ValueError:
        logger.exception("bad")
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("ERROR   reader: bad")
    assert rest
    assert all(line.startswith("    | ") for line in rest)


@pytest.mark.parametrize(
    ("level", "prefix"), [(10, "<7>"), (20, "<6>"), (30, "<4>"), (40, "<3>"), (50, "<2>")]
)
def test_the_journal_gets_priorities(level: int, prefix: str) -> None:
    record = logging.LogRecord("modelfs.x", level, "", 0, "hello", (), None)
    assert LineFormatter(journal=True).format(record) == f"{prefix}x: hello"


def test_the_journal_is_known_by_its_inode() -> None:
    with tempfile.TemporaryFile("w") as file:
        status = os.fstat(file.fileno())
        name = f"{status.st_dev}:{status.st_ino}"
        assert is_journal(file, {"JOURNAL_STREAM": name})
        assert not is_journal(file, {"JOURNAL_STREAM": "1:2"})
        assert not is_journal(file, {})
    assert not is_journal(io.StringIO(), {"JOURNAL_STREAM": name})


def test_the_same_thing_is_said_once_per_interval(
    lines: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, stream = lines
    now = [100.0]
    limited = RateLimited(logger, interval_seconds=10, clock=lambda: now[0])
    assert limited.warning("n1", "node %s is slow", "n1")
    assert not limited.warning("n1", "node %s is slow", "n1")
    assert limited.warning("n2", "node %s is slow", "n2")
    now[0] += 10
    assert limited.warning("n1", "node %s is slow", "n1")
    said = [line.partition("reader: ")[2] for line in stream.getvalue().splitlines()]
    assert said == [
        "node n1 is slow",
        "node n2 is slow",
        "node n1 is slow (1 more like this)",
    ]
    for subject in range(3 * LIMITED_KEYS_MAX):
        limited.info(subject, "x")
    assert len(limited._last) == LIMITED_KEYS_MAX


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@modelfs-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(name.replace("@", "\0") if name[0] == "@" else name)
        receiver.settimeout(10)
        yield receiver, name


def test_systemd_hears_each_state(manager: tuple[socket.socket, str]) -> None:
    receiver, name = manager
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "30000000"})
    assert notifier.watchdog_seconds == 30
    notifier.ready("three\nnodes")
    assert receiver.recv(999) == f"READY=1\nSTATUS=three nodes\nMAINPID={os.getpid()}".encode()
    notifier.status("two nodes")
    assert receiver.recv(999) == b"STATUS=two nodes"
    notifier.watchdog()
    assert receiver.recv(999) == b"WATCHDOG=1"
    notifier.stopping()
    assert receiver.recv(999) == b"STOPPING=1"


def test_without_systemd_nothing_happens() -> None:
    notifier = Notifier.from_environment({})
    notifier.ready("x")
    assert notifier.watchdog_seconds is None


def test_a_watchdog_for_another_process_is_not_ours() -> None:
    environ = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}
    assert Notifier.from_environment(environ).watchdog_seconds is None


@pytest.mark.expected_logs("systemd cannot be notified at /no/such")
def test_a_deaf_systemd_is_logged_and_endured() -> None:
    notifier = Notifier("/no/such/socket")
    notifier.ready("x")
    notifier.stopping()
