"""Telling systemd how the node is: READY, STATUS, STOPPING, WATCHDOG (see sd_notify(3)).

Without `NOTIFY_SOCKET` every call does nothing. A notification that systemd does not take is
logged once and never fails the node: the daemon serves files, systemd only watches.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

SEND_SECONDS = 1.0
VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")  # not for children


@dataclass(slots=True)
class Notifier:
    """One service's line to its manager."""

    address: str | None = None
    watchdog_seconds: float | None = None
    """The manager kills a service that is silent for so long: call `watchdog` twice as often."""
    _failed: bool = field(default=False, init=False)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Notifier:
        """What the environment says; a watchdog meant for another process is not ours."""
        address = environ.get("NOTIFY_SOCKET") or None
        if address is not None and address[0] not in "/@":
            log.warning("NOTIFY_SOCKET=%s is neither a path nor an abstract socket", address)
            address = None
        microseconds = environ.get("WATCHDOG_USEC", "")
        ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        watchdog_seconds = None
        if address and ours and microseconds.isdigit() and int(microseconds) > 0:
            watchdog_seconds = int(microseconds) / 1e6
        return cls(address, watchdog_seconds)

    def ready(self, status: str) -> None:
        """The mount is there."""
        self._send(f"READY=1\nSTATUS={_one_line(status)}\nMAINPID={os.getpid()}")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={_one_line(text)}")

    def stopping(self) -> None:
        """A clean stop has begun."""
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        """The node is alive."""
        self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if self.address is None:
            return
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(SEND_SECONDS)
                sender.connect(address)
                sender.sendall(message.encode("utf-8", "backslashreplace"))
        except OSError as error:
            if not self._failed:
                log.warning("systemd cannot be notified at %s: %s", self.address, error)
            self._failed = True


def _one_line(text: str) -> str:
    return " ".join(text.split())
