"""What is known of a lab between two commands: `<root>/lab.json`, and where things lie.

    <root>/lab.json          this state; written whole (temporary name, rename), before anything
                             is started, so that `lab down` always knows what to take away
    <root>/modelfs.toml      the settings of all nodes: the machine's own do not apply to a lab
    <root>/n1/mnt            node n1's mount point
    <root>/n1/state          its state directory, with its log and its admin socket

On loopback a lab takes a block of addresses 127.A.B.0/24 that follows from its root; node i has .i.
If a port is taken there, it tries the next block that the root leads to. So labs run side by side,
all on the default ports, and a lab with the same root usually has the same addresses.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import blake3

from modelfs.errors import UserError
from modelfsd.addresses import PORT_DEFAULT, format_host_port
from modelfsd.commands.registry import Registry
from modelfsd.lab.net import NODES_MAX, LabNetwork
from modelfsd.lab.processes import mark

FORMAT = 1
STATE_FILE = "lab.json"
STATE_BYTES_MAX = 1 << 20
CONFIG_FILE = "modelfs.toml"
PORTS_PER_NODE = 3  # data, etcd for clients, etcd for members
BLOCK_TRIES_MAX = 64
BLOCK_FIRST, BLOCK_COUNT = 32, 192  # the second byte of 127.A.B.0/24: away from 127.0 and 127.255


@dataclass(frozen=True, slots=True)
class LabNode:
    """One node of a lab."""

    name: str
    mount: Path
    state_dir: Path
    address: str

    @property
    def index(self) -> int:
        """Counts from 1."""
        return int(self.name[1:])

    @property
    def directory(self) -> Path:
        """What belongs to this node."""
        return self.mount.parent

    @property
    def endpoint(self) -> str:
        """HOST:PORT of its data port, for `--listen` and `--peer`."""
        return format_host_port((self.address, PORT_DEFAULT))

    @property
    def control_path(self) -> Path:
        """Its admin socket."""
        return self.state_dir / "control.sock"

    @property
    def log_path(self) -> Path:
        """Its log."""
        return self.state_dir / "modelfs.log"

    @property
    def mark(self) -> str:
        """The mark of its processes."""
        return mark(self.directory)

    @property
    def pid(self) -> int | None:
        """Its daemon's process id; None if it does not run."""
        entry = Registry().find_by_mountpoint(self.mount)
        return entry.pid if entry is not None and entry.alive else None


@dataclass(frozen=True, slots=True)
class LabState:
    """A lab, as its commands know it."""

    root: Path
    nodes: tuple[LabNode, ...]
    replicas: int
    netns: bool
    link_mbit: float | None
    arguments: tuple[str, ...]  # of every node's `modelfs mount`, besides our own

    @property
    def tag(self) -> str:
        """A short name for the lab, which follows from its root."""
        return lab_tag(self.root)

    @property
    def network(self) -> LabNetwork | None:
        """The network of a lab with namespaces."""
        return LabNetwork(self.tag, len(self.nodes), self.link_mbit) if self.netns else None

    def node(self, name: str) -> LabNode:
        """The node with this name. Raises `UserError`."""
        for node in self.nodes:
            if node.name == name:
                return node
        names = ", ".join(node.name for node in self.nodes)
        raise UserError(f"the lab at {self.root} has no node {name!r}, only {names}")

    def save(self) -> None:
        """Write the state, whole or not at all."""
        values = {
            "format": FORMAT,
            "replicas": self.replicas,
            "netns": self.netns,
            "link_mbit": self.link_mbit,
            "arguments": list(self.arguments),
            "nodes": [
                {key: str(value) for key, value in asdict(node).items()} for node in self.nodes
            ],
        }
        temporary = self.root / f".{STATE_FILE}.{os.getpid()}"
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.root / STATE_FILE)

    def describe(self) -> dict[str, Any]:
        """What `lab up --json` prints."""
        return {
            "root": str(self.root),
            "nodes": [
                {
                    "name": node.name,
                    "mount": str(node.mount),
                    "state_dir": str(node.state_dir),
                    "pid": node.pid,
                    "address": node.address,
                }
                for node in self.nodes
            ],
        }


def load_state(root: Path) -> LabState | None:
    """The state of the lab at `root`; None if there is no lab. Raises `UserError`."""
    try:
        with (root / STATE_FILE).open("rb") as file:
            values = json.loads(file.read(STATE_BYTES_MAX))
        if values["format"] != FORMAT:
            raise UserError(f"{root / STATE_FILE} was written by another version of modelfs")
        nodes = tuple(
            LabNode(
                node["name"], Path(node["mount"]), Path(node["state_dir"]), str(node["address"])
            )
            for node in values["nodes"]
        )
        mbit = values["link_mbit"]
        return LabState(
            root=root,
            nodes=nodes,
            replicas=int(values["replicas"]),
            netns=bool(values["netns"]),
            link_mbit=None if mbit is None else float(mbit),
            arguments=tuple(str(argument) for argument in values["arguments"]),
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{root / STATE_FILE} is not the state of a lab: {error!r}") from error


def plan_lab(
    root: Path,
    node_count: int,
    replicas: int,
    netns: bool,
    link_mbit: float | None,
    arguments: tuple[str, ...],
) -> LabState:
    """Decide on names and addresses. Nothing is made yet. Raises `UserError`."""
    if not 1 <= node_count <= NODES_MAX:
        raise UserError(f"a lab has 1 to {NODES_MAX} nodes, not {node_count}")
    if link_mbit is not None and not netns:
        raise UserError("--link-mbit needs --netns: loopback cannot be shaped for each node")
    if link_mbit is not None and not 0.1 <= link_mbit <= 1e6:
        raise UserError(f"{link_mbit:g} Mbit/s is not a rate: 0.1 to 1000000")
    if netns:
        network = LabNetwork(lab_tag(root), node_count)
        addresses = [network.address(index) for index in range(1, node_count + 1)]
    else:
        addresses = _free_addresses(root, node_count)
    nodes = []
    for index, address in enumerate(addresses, 1):
        directory = root / f"n{index}"
        nodes.append(LabNode(f"n{index}", directory / "mnt", directory / "state", address))
    return LabState(root, tuple(nodes), replicas, netns, link_mbit, arguments)


def lab_tag(root: Path) -> str:
    """Six hex digits that stand for the root in names of clusters and namespaces."""
    return blake3.blake3(os.fsencode(root)).hexdigest(length=3)


def address_block(root: Path, attempt: int) -> str:
    """The first three bytes of the block of addresses that a root leads to, e.g. `127.77.5`."""
    digest = blake3.blake3(os.fsencode(root) + b"\0%d" % attempt).digest(length=2)
    return f"127.{BLOCK_FIRST + digest[0] % BLOCK_COUNT}.{digest[1]}"


def _free_addresses(root: Path, node_count: int) -> list[str]:
    for attempt in range(BLOCK_TRIES_MAX):
        block = address_block(root, attempt)
        addresses = [f"{block}.{index}" for index in range(1, node_count + 1)]
        if all(_is_free(address) for address in addresses):
            return addresses
    raise UserError(f"no free block of loopback addresses: {BLOCK_TRIES_MAX} blocks are in use")


def _is_free(address: str) -> bool:
    """Whether a node's ports can be listened on."""
    for port in range(PORT_DEFAULT, PORT_DEFAULT + PORTS_PER_NODE):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
                probe.listen()
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return False
                raise UserError(f"cannot listen on {address}:{port}: {error.strerror}") from error
    return True
