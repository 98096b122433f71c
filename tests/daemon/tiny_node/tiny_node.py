"""The smallest node that can be mounted, asked and stopped: one file, no cluster.

With it the launcher, `umount`, `status` and the checks before a start are tested on real mounts
and real processes, with nothing of etcd or the network. How it behaves is told by its name
(`--name`): `fails`, `dies`, `crashes` and `refuses` do that; any other name is well-behaved.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import stat
from collections.abc import AsyncIterator, Callable
from typing import Any

import pyfuse3
import trio

from modelfs.errors import UserError
from modelfsd import mounts
from modelfsd.commands.control import ControlServer
from modelfsd.config import Config

log = logging.getLogger("modelfsd.node")
FILE, CONTENT = b"weights.bin", b"0123456789"
FILE_INODE = pyfuse3.ROOT_INODE + 1


class TinyFiles(pyfuse3.Operations):
    """A root directory with one file."""

    async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:
        """Attributes; nothing is cached, so that every look reaches this process."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFREG | 0o444
        if inode == pyfuse3.ROOT_INODE:
            entry.st_mode = stat.S_IFDIR | 0o755
        else:
            entry.st_size = len(CONTENT)
        entry.attr_timeout = entry.entry_timeout = 0
        return entry

    async def lookup(self, parent: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
        """The one name."""
        if name != FILE:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(FILE_INODE)

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        """Any number of times."""
        return pyfuse3.FileInfo(fh=inode)

    async def read(self, handle: int, offset: int, size: int) -> bytes:
        """The content."""
        return CONTENT[offset : offset + size]


def run_node(config: Config, ready: Callable[[str], None]) -> None:
    """See `modelfsd.node.run_node`."""
    log.info("starting etcd")
    if config.name == "fails":
        raise UserError("the cluster does not want us: ask it nicely")
    if config.name == "dies":
        print("last words", flush=True)
        os._exit(3)
    if config.name == "crashes":
        raise ValueError("a bug")
    trio.run(_serve, config, ready)


async def _serve(config: Config, ready: Callable[[str], None]) -> None:
    pyfuse3.init(TinyFiles(), str(config.mountpoint), set(config.options.fuse_options()))
    stop = trio.Event()

    async def on_stop(request: dict[str, Any]) -> dict[str, Any]:
        if config.name == "refuses":
            raise UserError("not today")
        await trio.to_thread.run_sync(mounts.unmount, config.mountpoint)
        stop.set()
        return {}

    async def on_status(request: dict[str, Any]) -> dict[str, Any]:
        return {"node": {"name": config.name, "pid": os.getpid()}, "epoch": 7}

    async def on_info(request: dict[str, Any]) -> dict[str, Any]:
        return {"path": "/".join(request["path"]), "names": request["path"]}

    handlers = {"stop": on_stop, "status": on_status, "info": on_info}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        await nursery.start(ControlServer(config.control_path, handlers).serve)
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            nursery.start_soon(_set_on_signal, signals, stop)
            ready(f"tiny node {config.name}")
            await stop.wait()
        nursery.cancel_scope.cancel()
    pyfuse3.close(unmount=mounts.mount_at(config.mountpoint) is not None)


async def _set_on_signal(signals: AsyncIterator[int], stop: trio.Event) -> None:
    async for _ in signals:
        stop.set()
