"""HOST:PORT as people write it, and the address that other nodes can use for this machine.

An IPv6 address with a port stands in brackets: `[fd00::1]:7420`. Without a port the brackets may
be left out.
"""

from __future__ import annotations

import fcntl
import ipaddress
import re
import socket
import struct
from urllib.parse import urlsplit

from modelfs.errors import UserError

HostPort = tuple[str, int]

PORT_DEFAULT = 7420  # data; the embedded etcd uses the next two
PORT_MAX = 65_533  # ... which must exist
LOOPBACK = "127.0.0.1"

_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_SIOCGIFADDR = 0x8915  # netdevice(7)
# RFC 5737: nobody's addresses. Connecting a UDP socket only asks the routing table.
_FAR_AWAY = ("192.0.2.1", 9)


def parse_host_port(text: str, default_port: int = PORT_DEFAULT) -> HostPort:
    """(host, port) from `HOST`, `HOST:PORT`, `:PORT` or `[V6]:PORT`; the host may be empty."""
    text = text.strip()
    host, port_text = text, ""
    if text.startswith("["):
        inside, bracket, after = text[1:].partition("]")
        if not bracket or (after and not after.startswith(":")):
            raise UserError(f"{text!r} is not an address: write [IPV6] or [IPV6]:PORT")
        host, port_text = inside, after[1:]
    elif text.count(":") == 1:
        host, port_text = text.split(":")
        if not port_text:
            raise UserError(f"{text!r} ends with a colon: write HOST or HOST:PORT")
    if not host and not port_text:
        raise UserError("an address is empty: write HOST, HOST:PORT or :PORT")
    port = default_port
    if port_text:
        if not port_text.isascii() or not port_text.isdigit() or not 0 < int(port_text) < 65_536:
            raise UserError(f"{port_text!r} in {text!r} is not a port: 1 to 65535")
        port = int(port_text)
    if host and not _is_host(host):
        raise UserError(f"{host!r} is neither an address nor a host name")
    return host, port


def parse_endpoint(text: str) -> str:
    """`host:port` from an etcd URL such as `http://10.0.0.5:2379`, or from `host:port` itself.

    `https://host:port` from one with TLS.
    """
    text = text.strip()
    if "://" not in text:
        text = f"http://{text}"
    url = urlsplit(text)
    if (
        url.scheme not in ("http", "https")
        or url.path not in ("", "/")
        or url.query
        or url.fragment
    ):
        raise UserError(f"{text!r} is not an etcd endpoint: write http://HOST:PORT")
    endpoint = format_host_port(parse_peer(url.netloc, 2379))
    return f"https://{endpoint}" if url.scheme == "https" else endpoint


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only. A name other than localhost is not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_peer(text: str, default_port: int = PORT_DEFAULT) -> HostPort:
    """A host and port to connect to: the host may not be empty."""
    host, port = parse_host_port(text, default_port)
    if not host:
        raise UserError(f"{text!r} names no host: write HOST:PORT")
    return host, port


def format_host_port(address: HostPort) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def resolve_listen(host: str) -> str:
    """The IP address to listen on: the host's own, or with an empty host the machine's.

    Raises `UserError` for a name without an address, and for `0.0.0.0` or `::`, which no other
    node could connect to.
    """
    if not host:
        return machine_address()
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"the address to listen on, {host!r}, is unknown: {error}") from error
    address = str(found[0][4][0])
    if ipaddress.ip_address(address.partition("%")[0]).is_unspecified:
        raise UserError(f"{host} is not an address that other nodes can reach: name one of ours")
    return address


def machine_address() -> str:
    """The IPv4 address of the default route's interface, else of any but loopback, else that."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_FAR_AWAY)
            return str(probe.getsockname()[0])
        except OSError:  # no default route
            pass
        for _, name in socket.if_nameindex():
            request = struct.pack("16s24x", name.encode()[:15])
            try:
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # an interface without an IPv4 address
                continue
            address = socket.inet_ntoa(reply[20:24])
            if not address.startswith("127."):
                return address
    return LOOPBACK


def _is_host(host: str) -> bool:
    if _HOST_NAME.fullmatch(host):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
