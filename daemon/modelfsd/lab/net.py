"""The network of a lab whose nodes are network namespaces.

    mfsTAG-1   mfsTAG-2   mfsTAG-3      one namespace per node; its eth0 has 10.88.0.i/24
       |v1        |v2        |v3        veth pairs; their other ends are ports of the bridge
    ---+----------+----------+--- br0   in a namespace of its own, mfsTAG-b

Nothing is made in the machine's own namespace, so labs do not meet each other or the real network,
and deleting the namespaces deletes everything. TAG comes from the lab's directory. A rate limit is
a token bucket (TBF) on both ends of each pair: the node's end shapes what it sends, the bridge's
end what it receives. The bridge does not snoop on multicast, so mDNS reaches everybody.

A node is entered by `nsenter --net=...`, not by `ip netns exec`: the latter makes a mount namespace
too, and the node's mount would be seen by nobody else.

Cutting a node off sets its bridge port to "disabled": frames are dropped in silence, both ways,
while the link stays up. For software that is the worst kind of partition, since nothing tells it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modelfs.errors import ModelfsError, UserError

NAMESPACES = Path("/run/netns")
SUBNET = "10.88.0"
NODES_MAX = 100
COMMAND_SECONDS = 20.0
MTU_BYTES = 1500
BURST_BYTES_MIN = 96 << 10  # a bucket must hold one GSO super-packet of 64 KiB
BURST_SECONDS = 0.002  # ... and what the rate allows between two timer ticks
QUEUE_SECONDS = 0.05  # how long a packet may wait in the bucket's queue
PORT_DISABLED, PORT_FORWARDING = "0", "3"  # BR_STATE_*, linux/if_bridge.h


class NetworkFailed(ModelfsError):
    """A command that builds or changes a lab's network failed; the text says which and why."""


@dataclass(frozen=True, slots=True)
class LabNetwork:
    """A bridge with `node_count` namespaces on it. The object is a name: `up` makes the thing."""

    tag: str
    node_count: int
    link_mbit: float | None = None  # Mbit/s each way; None: as fast as the kernel can

    def namespace(self, index: int) -> str:
        """The name of node `index`'s namespace; `index` counts from 1."""
        return f"mfs{self.tag}-{index}"

    @property
    def bridge_namespace(self) -> str:
        """The name of the namespace in which the bridge is."""
        return f"mfs{self.tag}-b"

    def address(self, index: int) -> str:
        """The IP address of node `index`."""
        return f"{SUBNET}.{index}"

    def enter(self, index: int, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` in node `index`'s network."""
        return ["nsenter", f"--net={NAMESPACES / self.namespace(index)}", "--", *command]

    def up(self) -> None:
        """Build it. Raises `UserError` if that cannot work here, `NetworkFailed` if it did not."""
        _check_possible()
        assert 1 <= self.node_count <= NODES_MAX
        if self.existing():
            raise UserError(f"the network namespaces of lab {self.tag} are still there: lab down")
        try:
            self._build()
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Delete it, or what is left of it. Processes in it must have ended before."""
        for name in self.existing():
            _run("ip", "netns", "del", name)

    def existing(self) -> list[str]:
        """The namespaces of this lab that exist, in the order in which `down` deletes them."""
        prefix = f"mfs{self.tag}-"
        try:
            return sorted(name for name in os.listdir(NAMESPACES) if name.startswith(prefix))
        except FileNotFoundError:
            return []

    def cut(self, index: int) -> None:
        """Cut a node off from all others."""
        self._set_port(index, PORT_DISABLED)

    def heal(self, index: int) -> None:
        """Undo `cut`."""
        self._set_port(index, PORT_FORWARDING)

    def _set_port(self, index: int, state: str) -> None:
        bridge = self.bridge_namespace
        _run("bridge", "-n", bridge, "link", "set", "dev", f"v{index}", "state", state)

    def _build(self) -> None:
        bridge = self.bridge_namespace
        _run("ip", "netns", "add", bridge)
        _run("ip", "-n", bridge, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        _run("ip", "-n", bridge, "link", "set", "br0", "mtu", str(MTU_BYTES), "up")
        for index in range(1, self.node_count + 1):
            node, port = self.namespace(index), f"v{index}"
            _run("ip", "netns", "add", node)
            pair = ["type", "veth", "peer", "name", port, "netns", bridge]
            _run("ip", "-n", node, "link", "add", "eth0", "mtu", str(MTU_BYTES), *pair)
            _run("ip", "-n", bridge, "link", "set", port, "mtu", str(MTU_BYTES))
            address = [f"{self.address(index)}/24", "brd", "+"]
            _run("ip", "-n", node, "addr", "add", *address, "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", node, "link", "set", device, "up")
            _run("ip", "-n", node, "route", "add", "224.0.0.0/4", "dev", "eth0")
            _run("ip", "-n", bridge, "link", "set", port, "master", "br0", "up")
            if self.link_mbit is not None:
                _shape(node, "eth0", self.link_mbit)
                _shape(bridge, port, self.link_mbit)


def _shape(namespace: str, device: str, mbit: float) -> None:
    burst_bytes = max(BURST_BYTES_MIN, int(mbit * 1e6 / 8 * BURST_SECONDS))
    bucket = ["tbf", "rate", f"{mbit:g}mbit", "burst", str(burst_bytes)]
    latency = f"{QUEUE_SECONDS * 1000:g}ms"
    _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *bucket, "latency", latency)


def _check_possible() -> None:
    if os.geteuid() != 0:
        raise UserError("a lab in network namespaces (--netns) needs root; without it leave it out")
    missing = [tool for tool in ("ip", "tc", "bridge", "nsenter") if shutil.which(tool) is None]
    if missing:
        packages = "iproute2 and util-linux"
        raise UserError(f"{', '.join(missing)} not found: install the packages {packages}")


def _run(*command: str) -> None:
    """Run one command. Raises `NetworkFailed` with its words."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NetworkFailed(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        raise NetworkFailed(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
