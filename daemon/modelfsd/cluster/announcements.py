"""What a node announces by DNS-SD, and what is made of the announcements of others.

Service `_modelfs._tcp.local.`; the instance's name is the node id, so that names never clash. SRV
gives the data port, A or AAAA the address, and TXT the rest:

    v         version of the peer protocol, decimal
    cluster   cluster id, 16 hex digits
    name      the cluster's name, for people
    etcd      port of the node's etcd client URL, decimal; 0: it runs no etcd
    zone      the node's zone, perhaps empty
    since     when the cluster was founded, decimal, in ms
    state     `up`, or `founding` while its first node looks for others before it founds
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelfs.errors import ProtocolError
from modelfs.ids import ClusterId, NodeId, is_label, is_node_id

SERVICE = "_modelfs._tcp.local."
PROTOCOL_VERSION = 1
UP, FOUNDING = "up", "founding"


@dataclass(frozen=True, slots=True)
class Announcement:
    """What this node tells the network about itself."""

    node: NodeId
    cluster: ClusterId
    cluster_name: str
    port: int  # of the peer protocol
    etcd_port: int  # 0: runs no etcd
    zone: str
    since_ms: int = 0
    state: str = UP


@dataclass(frozen=True, slots=True)
class Found:
    """A node as it announces itself. Well-formed, and not to be trusted."""

    node: NodeId
    cluster: ClusterId
    cluster_name: str
    host: str  # an IP address
    port: int
    etcd_port: int
    zone: str
    protocol: int
    since_ms: int = 0
    state: str = UP

    @property
    def age_key(self) -> tuple[bool, int, str]:
        """Smaller for the cluster that was first; one that is up was before those that are not."""
        return self.state != UP, self.since_ms, self.cluster


@dataclass(frozen=True, slots=True)
class Lost:
    """A node withdrew its announcement, or let it lapse."""

    node: NodeId


def parse(
    node: NodeId,
    properties: Mapping[bytes, bytes | None],
    addresses: Sequence[str],
    port: int | None,
) -> Found:
    """Check what an announcement says. Raises `ProtocolError`."""

    def text(key: str) -> str:
        value = properties.get(key.encode()) or b""
        try:
            decoded = value.decode()
        except UnicodeDecodeError as error:
            raise ProtocolError(f"{node}: {key} is not UTF-8") from error
        if not is_label(decoded):
            raise ProtocolError(f"{node}: {key} is {decoded[:100]!r}")
        return decoded

    def number(key: str, least: int) -> int:
        digits = text(key)
        if not (digits.isascii() and digits.isdecimal() and len(digits) <= 5):
            raise ProtocolError(f"{node}: {key} is not a number")
        return _in_range(int(digits), least, f"{node}: {key}")

    since = text("since") or "0"
    if not (since.isascii() and since.isdecimal() and len(since) <= 15):
        raise ProtocolError(f"{node}: since is not a number")
    cluster = text("cluster")
    if not is_node_id(cluster):
        raise ProtocolError(f"{node}: {cluster!r} is not a cluster id")
    host = next((address for address in addresses if _is_usable(address)), None)
    if host is None:
        raise ProtocolError(f"{node}: no usable address")
    return Found(
        node=node,
        cluster=ClusterId(cluster),
        cluster_name=text("name"),
        host=host,
        port=_in_range(port or 0, 1, f"{node}: port"),
        etcd_port=number("etcd", 0),
        zone=text("zone"),
        protocol=number("v", 1),
        since_ms=int(since),
        state=FOUNDING if text("state") == FOUNDING else UP,
    )


def _in_range(value: int, least: int, what: str) -> int:
    if not least <= value <= 0xFFFF:
        raise ProtocolError(f"{what} {value} is out of range")
    return value


def _is_usable(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return not (parsed.is_multicast or parsed.is_unspecified or parsed.is_reserved)


def node_of(name: str) -> NodeId | None:
    """The node that a service instance's full name stands for."""
    instance = name.removesuffix("." + SERVICE)
    return NodeId(instance) if instance != name and is_node_id(instance) else None
