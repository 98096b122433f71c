"""The mount itself: libfuse's session, and the kernel settings that libfuse cannot make.

After mounting, as root, the connection is allowed 64 requests at a time (12 by default, which makes
40 parallel readers three times slower), and the kernel reads ahead 256 KiB (128 by default). Not
more: it also reads so much around each page of a mapping that is touched at random, and streams are
read ahead by us (`modelfsd.kernel.readahead`). Without root both stay as they are; the daemon says
so once, and works.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import pyfuse3
import trio

from modelfs.errors import UserError
from modelfsd import mounts
from modelfsd.config import Config
from modelfsd.kernel.operations import Operations

log = logging.getLogger(__name__)

READ_AHEAD_KIB = (
    128  # two blocks; the kernel's default, which another mount option may have changed
)
BACKGROUND_REQUESTS_MAX = 64
CONGESTION_THRESHOLD = 48  # three quarters, as the kernel's own default
TASKS_MAX = 512  # requests in hand at once; waiters for leases must never use them up
WRITE_BACK_SECONDS = 30.0
FUSECTL = Path("/sys/fs/fuse/connections")


class Helper(Protocol):
    """Threads that talk to the kernel unasked, only while it is mounted."""

    def start(self) -> None:
        """Start them."""

    def stop(self) -> None:
        """End them."""


class FuseMount:
    """One mounted session. `open`, then `serve` until somebody unmounts, then `close`."""

    def __init__(self, config: Config, operations: Operations, helpers: Sequence[Helper]) -> None:
        self._mountpoint = config.mountpoint
        self._options = set(config.options.fuse_options())
        self._operations, self._helpers = operations, tuple(helpers)
        self.is_unmounted = False

    def open(self) -> None:
        """Mount. Raises `UserError`."""
        try:
            pyfuse3.init(self._operations, str(self._mountpoint), self._options)
        except RuntimeError as error:
            raise UserError(
                f"the kernel refused to mount at {self._mountpoint} ({error}): see the lines "
                "above, and `dmesg`"
            ) from error
        for helper in self._helpers:
            helper.start()

    async def serve(self) -> None:
        """Answer the kernel until the file system is unmounted."""
        await pyfuse3.main(max_tasks=TASKS_MAX)
        self.is_unmounted = True

    def close(self) -> None:
        """End the session, and unmount if nobody has."""
        for helper in self._helpers:
            helper.stop()
        pyfuse3.close(unmount=not self.is_unmounted)

    async def unmount(self) -> None:
        """Unmount, if nobody uses it. Raises `mounts.MountBusy` with nothing changed."""
        await trio.to_thread.run_sync(mounts.unmount, self._mountpoint)

    async def write_back(self, paths: Iterable[bytes]) -> None:
        """Have the kernel send what it still holds of these files. In bounded time.

        `detach` drops it otherwise: as much as a fifth of the memory, of programs that only wait
        to be stopped too. fsync besides syncfs, since newer kernels need not wait in a syncfs.
        """
        with trio.move_on_after(WRITE_BACK_SECONDS) as scope:
            await trio.to_thread.run_sync(self._write_back, list(paths), abandon_on_cancel=True)
        if scope.cancelled_caught:
            log.error("not everything was written back within %.0f s", WRITE_BACK_SECONDS)

    def _write_back(self, paths: list[bytes]) -> None:
        root = os.fsencode(self._mountpoint)
        for path in (b"", *paths):
            try:
                descriptor = os.open(os.path.join(root, path), os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    if path:
                        os.fsync(descriptor)
                    else:
                        mounts.syncfs(descriptor)
                finally:
                    os.close(descriptor)
            except OSError as error:  # it was renamed, or its session has failed
                log.info("%r is not written back: %s", path, error)

    async def detach(self) -> None:
        """Take the mount away from under its users. For a stop that must not wait."""
        await trio.to_thread.run_sync(mounts.detach, self._mountpoint)

    async def tune(self) -> list[str]:
        """Set what libfuse cannot. Returns what could not be set, for people."""
        return await trio.to_thread.run_sync(self._tune)

    def _tune(self) -> list[str]:
        os.stat(self._mountpoint)  # returns once the mount answers
        mount = mounts.mount_at(self._mountpoint)
        if mount is None:
            return ["the mount is not in the mount table"]
        connection = FUSECTL / mount.device.split(":")[1]
        if not connection.exists() and os.geteuid() == 0:
            command = ["mount", "-t", "fusectl", "none", str(FUSECTL)]
            with suppress(OSError, subprocess.TimeoutExpired):  # then the settings are not found
                subprocess.run(command, check=False, capture_output=True, timeout=10)
        settings = {
            Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb"): READ_AHEAD_KIB,
            connection / "max_background": BACKGROUND_REQUESTS_MAX,
            connection / "congestion_threshold": CONGESTION_THRESHOLD,
        }
        failures = []
        for path, value in settings.items():
            try:
                path.write_text(f"{value}\n")
            except OSError as error:
                failures.append(f"{path.name}: {error.strerror}")
        return failures
