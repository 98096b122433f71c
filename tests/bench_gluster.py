"""GlusterFS beside the lab: three nodes on loopback addresses, a volume with two replicas.

Each node is a glusterd of its own, with its own address, directories and socket, as GlusterFS's own
regression tests run many of them on one machine. Nothing is shared with a GlusterFS that this
machine may run for itself, and all of it lies below one directory.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from modelfs.errors import UserError
from modelfsd import mounts
from modelfsd.lab import processes as lab_processes
from tests.bench_places import Place, drop_page_cache, warm_files

COMMAND_SECONDS = 120.0
UP_SECONDS = 60.0
NODES = 3
VOLUME = "bench"


class Gluster(Place):
    """A volume over three nodes: written through a client of the first, read through the second."""

    name = "GlusterFS"

    def __init__(self, directory: Path) -> None:
        missing = [tool for tool in ("glusterd", "gluster", "glusterfs") if not shutil.which(tool)]
        if missing:
            raise UserError(f"{', '.join(missing)} not found: apt-get install glusterfs-server")
        self._directory = directory
        self._foreign = _sockets()
        self._mark = lab_processes.mark(directory)
        self._mounts = [directory / f"mount{number}" for number in (1, 2)]
        self.a, self.b = self._mounts
        told = subprocess.run(["glusterd", "--version"], capture_output=True, text=True, check=True)
        self.version = told.stdout.split()[1]

    def up(self) -> None:
        """Start it, and mount it twice."""
        for number in range(1, NODES + 1):
            self._start_node(number)
        for number in range(2, NODES + 1):
            self._cli("peer", "probe", _address(number))
        self._wait_for_peers()
        bricks = []
        for number in range(1, NODES + 1):
            following = number % NODES + 1
            bricks += [self._brick(number, "b1"), self._brick(following, "b2")]
        self._cli("volume", "create", VOLUME, "replica", "2", *bricks, "force")
        self._cli("volume", "set", VOLUME, "features.shard", "on")
        self._cli("volume", "start", VOLUME)
        for number, point in enumerate(self._mounts, 1):
            self._mount(number, point)

    def down(self) -> None:
        """Take all of it away, however far it came."""
        for point in self._mounts:
            if mounts.mount_at(point) is not None:
                subprocess.run(["umount", "-f", "-l", str(point)], check=False)
        lab_processes.kill([self._mark], 10.0)
        for path in _sockets() - self._foreign:
            path.unlink(missing_ok=True)
        shutil.rmtree(self._directory, ignore_errors=True)

    def drop_client(self) -> None:
        """A fresh client on the reading node; the bricks are in the page cache."""
        self._mount_again()
        bricks = [self._home(number) / name for number in (1, 2, 3) for name in ("b1", "b2")]
        warm_files(bricks, self.since)

    def drop_all(self) -> None:
        """A fresh client, and nothing in the page cache."""
        self._mount_again()
        drop_page_cache()

    # ------------------------------------------------------------ inside

    def _home(self, number: int) -> Path:
        return self._directory / f"n{number}"

    def _brick(self, number: int, name: str) -> str:
        return f"{_address(number)}:{self._home(number) / name / 'brick'}"

    def _start_node(self, number: int) -> None:
        home = self._home(number)
        for name in ("lib", "run/gluster", "log", "b1", "b2"):
            (home / name).mkdir(parents=True)
        options = {
            "working-directory": home / "lib",
            "transport.socket.bind-address": _address(number),
            "run-directory": home / "run/gluster",
            "glusterd-sockfile": self._socket(number),
            "cluster-test-mode": home / "log",
        }
        words = [word for key, value in options.items() for word in _option(key, value)]
        log = ["--log-file", str(home / "log/glusterd.log"), "--pid-file", str(home / "run/pid")]
        self._run("glusterd", *words, *log)

    def _socket(self, number: int) -> Path:
        return self._home(number) / "run/glusterd.socket"

    def _cli(self, *words: str) -> str:
        log = self._home(1) / "log/cli.log"
        socket = self._socket(1)
        command = ["gluster", "--mode=script", f"--glusterd-sock={socket}", f"--log-file={log}"]
        deadline = time.monotonic() + UP_SECONDS
        while True:
            try:
                return self._run(*command, *words)
            except UserError as error:  # glusterd has forked, but does not listen yet
                if "Connection failed" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def _wait_for_peers(self) -> None:
        deadline = time.monotonic() + UP_SECONDS
        while True:
            told = self._cli("peer", "status")
            if len(re.findall(r"Peer in Cluster \(Connected\)", told)) == NODES - 1:
                return
            if time.monotonic() > deadline:
                raise UserError(f"GlusterFS's nodes do not see each other:\n{told}")
            time.sleep(0.2)

    def _mount(self, number: int, point: Path) -> None:
        point.mkdir(exist_ok=True)
        log = self._home(number) / f"log/client-{point.name}.log"
        server = [f"--volfile-server={_address(number)}", f"--volfile-id={VOLUME}"]
        self._run("glusterfs", *server, f"--log-file={log}", str(point))
        deadline = time.monotonic() + UP_SECONDS
        while mounts.mount_at(point) is None:
            if time.monotonic() > deadline:
                raise UserError(f"GlusterFS did not mount {point}; its log is {log}")
            time.sleep(0.05)
        os.listdir(point)  # answers once the client has its bricks

    def _mount_again(self) -> None:
        deadline = time.monotonic() + UP_SECONDS
        while True:
            try:
                mounts.unmount(self.b)
                break
            except mounts.MountBusy:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self._mount(2, self.b)

    def _run(self, *command: str) -> str:
        """Run a tool; what it starts in the background carries our mark. Raises `UserError`."""
        environment = {**os.environ, **dict([self._mark.split("=", 1)])}
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd="/",
        ) as process:
            try:
                output, _ = process.communicate(timeout=COMMAND_SECONDS)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                raise UserError(f"{' '.join(command)} took too long") from None
        if process.returncode:
            raise UserError(f"{' '.join(command)}: {output.strip()}")
        return output


def _sockets() -> set[Path]:
    """What bricks and daemons leave in the one directory that GlusterFS does not let us choose."""
    return set(Path("/run/gluster").glob("*.socket"))


def _address(number: int) -> str:
    return f"127.90.0.{number}"


def _option(key: str, value: object) -> list[str]:
    return ["--xlator-option", f"management.{key}={value}"]
