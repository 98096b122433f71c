"""Labs: a whole cluster on this machine, to try things, to test and to measure.

Each node is a real one: its own daemon and etcd member, state directory, mount point and address.
On loopback that needs no more than FUSE does; with namespaces (`--netns`, root) each node has a
link of its own, which can be slow, or cut. See `lab.state` for what lies where, `lab.net` for the
network, `lab.processes` for how processes are found.

    with Lab.up(root, nodes=3) as lab:
        (lab.nodes[0].mount / "hello").write_text("hello")
        lab.kill("n2")

Rules: a mount of the lab is never touched from here, since it may be dead or hung; the mount table
and the admin sockets say all that is needed. Whatever `up` has started is taken away if it fails
or is interrupted. `down` takes away what is there, in whatever state, and is no error twice.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Timer
from types import TracebackType
from typing import Any

import modelfs
import modelfsd
from modelfs.errors import ModelfsError, UserError
from modelfsd import mounts
from modelfsd.commands import control
from modelfsd.config import CONFIG_VARIABLE, SETTINGS
from modelfsd.lab import processes as lab_processes
from modelfsd.lab.net import LabNetwork
from modelfsd.lab.processes import MARK, ProcessesRemain
from modelfsd.lab.state import CONFIG_FILE, STATE_FILE, LabNode, LabState, load_state, plan_lab

START_SECONDS = 180.0  # of one node; three embedded etcd members on two slow cores take about 20
MESH_SECONDS = 120.0  # until all nodes see each other
STATUS_SECONDS = 5.0
TOKEN_SECONDS = 60.0  # a change in etcd, whose disk may be busy with its first writes
POLL_SECONDS = 0.1
UMOUNT_SECONDS = 20.0
PAUSE_SECONDS = 5.0  # for a process to stop
KILL_SECONDS = 60.0  # who waits for a slow disk ends when the disk has answered
END_SECONDS = 10.0  # until something harder is tried
STARTS_AT_ONCE = 8
LAST_LINES = 20
SETTING_VARIABLES = frozenset(f"MODELFS_{key.upper()}" for key in SETTINGS)

Show = Callable[[str], None]


class LabFailed(ModelfsError):
    """A node did not start or did not join; the text has its last words."""


def silent(line: str) -> None:
    """Shows nothing."""


class Lab:
    """A running lab. Made by `up` or `open`; a context manager that ends it."""

    def __init__(self, state: LabState, show: Show = silent) -> None:
        self._state = state
        self._show = show

    @classmethod
    def up(
        cls,
        root: Path | str,
        nodes: int = 3,
        *,
        netns: bool = False,
        link_mbit: float | None = None,
        replicas: int = 2,
        arguments: Sequence[str] = (),
        settings: str = "",
        show: Show = silent,
    ) -> Lab:
        """Start a lab; returns when every node is mounted and sees all the others.

        `arguments` are given to every node's `modelfs mount` besides; `settings` is what stands
        in the lab's settings file, for example `lock_wait = "2s"`. Raises `UserError` for what
        cannot be, and `LabFailed` or `NetworkFailed` for what went wrong; nothing is left then.
        """
        root = Path(os.path.realpath(root))
        if load_state(root) is not None:
            raise UserError(f"there is a lab at {root} already: modelfs lab down --root {root}")
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise UserError(f"{root} is not an empty directory")
        lab = cls(plan_lab(root, nodes, replicas, netns, link_mbit, tuple(arguments)), show)
        root.mkdir(parents=True, exist_ok=True)
        lab._state.save()
        try:
            lab._build(settings)
        except BaseException:
            lab.down()
            raise
        return lab

    @classmethod
    def open(cls, root: Path | str, show: Show = silent) -> Lab:
        """The lab at `root`, running or not. Raises `UserError` if there is none."""
        root = Path(os.path.realpath(root))
        state = load_state(root)
        if state is None:
            raise UserError(f"there is no lab at {root}: modelfs lab up --root {root}")
        return cls(state, show)

    @property
    def nodes(self) -> tuple[LabNode, ...]:
        """All nodes, n1 first."""
        return self._state.nodes

    @property
    def root(self) -> Path:
        """The lab's directory."""
        return self._state.root

    def node(self, name: str) -> LabNode:
        """The node with this name. Raises `UserError`."""
        return self._state.node(name)

    def describe(self) -> dict[str, Any]:
        """What `lab up --json` prints."""
        return self._state.describe()

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.down()

    # ------------------------------------------------------------ faults

    def kill(self, name: str) -> None:
        """SIGKILL all processes of a node at once; its mount is dead from then on."""
        lab_processes.kill([self.node(name).mark], KILL_SECONDS)

    def pause(self, name: str) -> None:
        """SIGSTOP all processes of a node: it neither answers nor closes its connections."""
        node = self.node(name)
        processes = lab_processes.find([node.mark])
        if not processes:
            raise UserError(f"node {name} does not run")
        lab_processes.send(processes, signal.SIGSTOP)
        lab_processes.wait_stopped(processes, PAUSE_SECONDS)

    def start(self, name: str) -> None:
        """Resume a paused node, or start a killed one again and wait until it is mounted.

        Raises `UserError` if it runs already, `LabFailed` if it does not come up.
        """
        node = self.node(name)
        processes = lab_processes.find([node.mark])
        if lab_processes.are_stopped(processes):
            lab_processes.send(processes, signal.SIGCONT)
            return
        if node.pid is not None:
            raise UserError(f"node {name} runs already")
        lab_processes.kill([node.mark], KILL_SECONDS)  # what its dead daemon has left behind
        self._start_node(node, self._peers_of(node))

    def cut(self, name: str) -> None:
        """Cut a node off the network. Raises `UserError` in a lab without namespaces."""
        node = self.node(name)
        self._network_for("cut").cut(node.index)

    def heal(self, name: str) -> None:
        """Undo `cut`."""
        node = self.node(name)
        self._network_for("heal").heal(node.index)

    def wait_for_mesh(self, names: Sequence[str] = (), seconds: float = MESH_SECONDS) -> None:
        """Wait until each of these nodes (default: all) reports all of these as up.

        Raises `LabFailed` after `seconds`.
        """
        wanted = set(names) or {node.name for node in self.nodes}
        deadline = time.monotonic() + seconds
        for node in (self.node(name) for name in sorted(wanted)):
            while missing := wanted - self._seen_by(node):
                if time.monotonic() > deadline:
                    raise LabFailed(
                        f"{node.name} does not see {', '.join(sorted(missing))} after "
                        f"{seconds:.0f} s; its log is {node.log_path}"
                    )
                time.sleep(POLL_SECONDS)

    def down(self) -> None:
        """End the lab and remove what it has made."""
        for node in reversed(self.nodes):
            self._end_node(node)
        marks = [node.mark for node in self.nodes]
        try:
            lab_processes.kill(marks, END_SECONDS)
        except ProcessesRemain as error:
            self._show(f"{error}; once more, with their mounts taken away")
        for node in self.nodes:  # aborts requests too, in which a process may be stuck
            mounts.detach(node.mount)
        lab_processes.kill(marks, KILL_SECONDS)
        if self._state.network is not None:
            self._state.network.down()
        self._remove_files()

    # ------------------------------------------------------------ inside

    def _build(self, settings: str) -> None:
        (self.root / CONFIG_FILE).write_text(settings, encoding="utf-8")
        for node in self.nodes:
            node.mount.mkdir(parents=True)
            node.state_dir.mkdir(mode=0o700)
        if self._state.network is not None:
            self._show("building the network")
            self._state.network.up()
        first, *others = self.nodes
        self._start_node(first, ["--new-cluster", f"lab-{self._state.tag}"])
        if others:
            self._start_all(others, ["--join", "-"], self._token(first, len(others)))
        self._show("waiting until all nodes see each other")
        self.wait_for_mesh()

    @staticmethod
    def _token(node: LabNode, uses: int) -> str:
        """A join token, from a node that runs."""
        answer = control.call(node.control_path, "token", TOKEN_SECONDS, uses=uses)
        return str(answer["token"])

    def _start_all(self, nodes: Sequence[LabNode], arguments: Sequence[str], token: str) -> None:
        pool = ThreadPoolExecutor(STARTS_AT_ONCE)
        try:
            started = [pool.submit(self._start_node, node, arguments, token) for node in nodes]
            for future in as_completed(started):
                future.result()
        except BaseException:
            # The threads wait for processes: end those, then the threads end too.
            pool.shutdown(wait=False, cancel_futures=True)
            lab_processes.kill([node.mark for node in nodes], KILL_SECONDS)
            raise
        finally:
            pool.shutdown()

    def _start_node(self, node: LabNode, arguments: Sequence[str], token: str = "") -> None:
        """Run `modelfs mount`, which puts the daemon in the background and waits until it is up.

        A token goes by its standard input.
        """
        command = [sys.executable, "-m", "modelfsd", "mount", str(node.mount)]
        command += ["--state-dir", str(node.state_dir), "--name", node.name]
        command += ["--listen", node.endpoint, "--replicas", str(self._state.replicas)]
        command += [*arguments, *self._state.arguments]
        if self._state.network is not None:
            command = self._state.network.enter(node.index, command)
        self._show(f"{node.name}: starting on {node.endpoint}")
        last_lines: deque[str] = deque(maxlen=LAST_LINES)
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            cwd="/",
            env=self._environment(node),
        ) as launcher:
            assert launcher.stdout is not None and launcher.stdin is not None
            with contextlib.suppress(BrokenPipeError), launcher.stdin:
                launcher.stdin.write(token)
            too_late = Timer(START_SECONDS, launcher.kill)
            too_late.start()
            try:
                for line in launcher.stdout:
                    last_lines.append(line.rstrip())
                    self._show(f"{node.name}: {line.rstrip()}")
                code = launcher.wait()
            finally:
                too_late.cancel()
        if code != 0:
            words = "\n".join(last_lines) or "it said nothing"
            raise LabFailed(f"node {node.name} did not start (exit code {code}):\n{words}")

    def _environment(self, node: LabNode) -> dict[str, str]:
        """The machine's settings do not apply to a lab; the code is the one that runs here."""
        environment = {
            name: value for name, value in os.environ.items() if name not in SETTING_VARIABLES
        }
        sources = [Path(str(module.__file__)).parents[1] for module in (modelfs, modelfsd)]
        paths = [*map(str, sources), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        environment[CONFIG_VARIABLE] = str(self.root / CONFIG_FILE)
        environment[MARK] = str(node.directory)
        return environment

    def _peers_of(self, node: LabNode) -> list[str]:
        others = [other for other in self.nodes if other.name != node.name]
        return [word for other in others for word in ("--peer", other.endpoint)]

    def _network_for(self, what: str) -> LabNetwork:
        network = self._state.network
        if network is None:
            raise UserError(
                f"{what} needs a lab in network namespaces (lab up --netns); on loopback a node "
                "can be paused instead"
            )
        return network

    def _seen_by(self, node: LabNode) -> set[str]:
        """The names of the nodes that this node reports as up; none while it does not answer."""
        try:
            status = control.call(node.control_path, "status", STATUS_SECONDS)
        except UserError:
            return set()
        return {peer["name"] for peer in status["nodes"] if peer["up"]}

    def _end_node(self, node: LabNode) -> None:
        """Unmount a node that answers; others are left to be killed."""
        processes = lab_processes.find([node.mark])
        if not processes or node.pid is None:
            return
        lab_processes.send(processes, signal.SIGCONT)
        self._show(f"{node.name}: unmounting")
        command = [sys.executable, "-m", "modelfsd", "umount", str(node.mount)]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                cwd="/",
                env=self._environment(node),
                timeout=UMOUNT_SECONDS,
                check=False,
            )
            reason = done.stderr.strip() if done.returncode else ""
        except subprocess.TimeoutExpired:
            reason = f"it took more than {UMOUNT_SECONDS:.0f} s"
        if reason or not lab_processes.wait_ended(processes, END_SECONDS):
            self._show(f"{node.name}: not unmounted, so it is killed: {reason or 'it goes on'}")

    def _remove_files(self) -> None:
        """Remove what `up` has made. What others have put beside it stays, with its directory."""
        below = str(self.root) + "/"
        for mount in mounts.mounts():
            if mount.mountpoint.startswith(below):
                raise LabFailed(f"{mount.mountpoint} is still mounted, so nothing was removed")
        for node in self.nodes:
            if node.state_dir.exists():
                shutil.rmtree(node.state_dir)
            for directory in (node.mount, node.directory):
                _remove_empty(directory)
        (self.root / CONFIG_FILE).unlink(missing_ok=True)
        (self.root / STATE_FILE).unlink(missing_ok=True)
        _remove_empty(self.root)


def take_down(root: Path | str, show: Show = silent) -> bool:
    """End the lab at `root`. False if there is none, which is no error."""
    state = load_state(Path(os.path.realpath(root)))
    if state is None:
        return False
    Lab(state, show).down()
    return True


def _remove_empty(directory: Path) -> None:
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
