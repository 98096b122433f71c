"""Discovery: nodes announce themselves by zeroconf (DNS-SD over multicast DNS) and hear the others.

Everything here is a *hint*: who belongs to the cluster is what etcd says, and a peer proves that
it belongs when it connects. So what is heard is parsed, bounded and shown, and never trusted; what
cannot be parsed is ignored. A network without multicast is no error: nothing is found there.

What an announcement says is in `announcements`.

Threads: zeroconf runs an asyncio loop and a browser on threads of its own. What they hear enters
trio in one place, `_hear`, by `trio.from_thread.run_sync`, which makes the browser wait until it
is taken. Records that came incomplete are asked for by a few worker tasks, so that announcements
which lack them hold up nobody.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TypeVar

import trio
import zeroconf

from modelfs.errors import ProtocolError
from modelfs.ids import NodeId, is_node_id
from modelfs.placement import MEMBERS_MAX
from modelfsd.cluster.announcements import (
    PROTOCOL_VERSION,
    SERVICE,
    Announcement,
    Found,
    Lost,
    node_of,
    parse,
)
from modelfsd.logs import RateLimited

MDNS_GROUP, MDNS_PORT = "224.0.0.251", 5353  # RFC 6762
TTL_SECONDS = 120  # RFC 6762's for host records; here for all, so that the dead are forgotten
FOUND_MAX = MEMBERS_MAX
EVENTS_MAX = 256
UNRESOLVED_MAX = 64  # announcements whose records are still being asked for
RESOLVERS = 4
RESOLVE_SECONDS = 2.0
REGISTER_SECONDS = 5.0  # zeroconf repeats an announcement three times within about a second
CLOSE_SECONDS = 5.0

Result = TypeVar("Result")

log = logging.getLogger(__name__)
limited = RateLimited(log)


class Discovery:
    """Announces this node and hears the others; an async context manager.

    `interface_address` is the IP address that this node listens on: it is announced, and multicast
    goes through its interface.
    `events` carries each `Found` (new or changed) and `Lost`. Nobody needs to read it: when it is
    full, news is left out there, and `snapshot` still has it.
    """

    def __init__(self, interface_address: str) -> None:
        self.interface_address = interface_address
        self._send, self.events = trio.open_memory_channel[Found | Lost](EVENTS_MAX)
        self._found: dict[NodeId, Found] = {}
        self._changed = trio.Event()
        self._zeroconf: zeroconf.Zeroconf | None = None
        self._announced: tuple[Announcement, zeroconf.ServiceInfo] | None = None

    async def __aenter__(self) -> Discovery:
        self._nursery_manager = trio.open_nursery()
        self._nursery = await self._nursery_manager.__aenter__()
        try:
            self._zeroconf = await trio.to_thread.run_sync(_open_zeroconf, self.interface_address)
        except (OSError, RuntimeError, zeroconf.Error) as error:
            log.warning(
                "no multicast on %s (%s): other nodes are not found by themselves, use --peer",
                self.interface_address,
                error,
            )
        else:
            self._start_browser(self._zeroconf)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        if self._zeroconf is not None:
            # Sends the goodbye, which makes the others forget us at once, and ends the threads.
            with trio.CancelScope(shield=True):
                await self._call(self._zeroconf.close, CLOSE_SECONDS)
            self._zeroconf = None
        self._send.close()
        self._nursery.cancel_scope.cancel()
        return await self._nursery_manager.__aexit__(kind, error, traceback)

    # ------------------------------------------------------------ this node

    async def announce(self, announcement: Announcement) -> None:
        """Tell the network about this node, from now until the end."""
        if self._announced is not None:
            return await self.update(announcement)
        info = _service_info(announcement, self.interface_address)
        self._announced = announcement, info
        self._forget(announcement.node)
        if self._zeroconf is not None:
            # Names are unique by construction, so the probes for a conflict (0.5 s) are left out.
            register = partial(
                self._zeroconf.register_service, info, cooperating_responders=True, strict=True
            )
            await self._call(register, REGISTER_SECONDS)
        return None

    async def update(self, announcement: Announcement) -> None:
        """Tell the network that something about this node has changed."""
        assert self._announced is not None
        assert self._announced[0].node == announcement.node
        if self._announced[0] == announcement:
            return
        info = _service_info(announcement, self.interface_address)
        self._announced = announcement, info
        if self._zeroconf is not None:
            await self._call(partial(self._zeroconf.update_service, info), REGISTER_SECONDS)

    # ------------------------------------------------------------ the others

    def snapshot(self) -> list[Found]:
        """The other nodes that are announced now, by id."""
        return [self._found[node] for node in sorted(self._found)]

    async def browse_for(
        self, seconds: float, until: Callable[[list[Found]], bool] | None = None
    ) -> list[Found]:
        """What is found within so many seconds, or as soon as `until` holds for it.

        Without multicast there is nothing to wait for, and this returns at once.
        """
        if self._zeroconf is not None:
            with trio.move_on_after(seconds):
                while until is None or not until(self.snapshot()):
                    await self._changed.wait()
        return self.snapshot()

    # ------------------------------------------------------------ inside

    def _start_browser(self, engine: zeroconf.Zeroconf) -> None:
        send, receive = trio.open_memory_channel[str](UNRESOLVED_MAX)
        for _ in range(RESOLVERS):
            self._nursery.start_soon(self._resolve, engine, receive)
        token = trio.lowlevel.current_trio_token()

        def on_change(
            zeroconf: zeroconf.Zeroconf,
            service_type: str,
            name: str,
            state_change: zeroconf.ServiceStateChange,
        ) -> None:
            """Called on the browser's thread."""
            try:
                trio.from_thread.run_sync(
                    self._hear, engine, send, name, state_change, trio_token=token
                )
            except (trio.RunFinishedError, trio.Cancelled):
                log.debug("heard of %r too late", name)

        zeroconf.ServiceBrowser(engine, SERVICE, handlers=[on_change])

    def _hear(
        self,
        engine: zeroconf.Zeroconf,
        unresolved: trio.MemorySendChannel[str],
        name: str,
        change: zeroconf.ServiceStateChange,
    ) -> None:
        """Take one piece of news from the browser."""
        node = node_of(name)
        if node is None:
            limited.log(logging.DEBUG, "name", "ignored a service that is no node: %.100r", name)
        elif change is zeroconf.ServiceStateChange.Removed:
            self._forget(node)
        elif self._announced is None or node != self._announced[0].node:
            info = zeroconf.ServiceInfo(SERVICE, name)
            if info.load_from_cache(engine):
                self._learn(node, info)
                return
            try:
                unresolved.send_nowait(name)
            except trio.WouldBlock:
                limited.log(logging.DEBUG, "full", "too many incomplete announcements")

    async def _resolve(
        self, engine: zeroconf.Zeroconf, names: trio.MemoryReceiveChannel[str]
    ) -> None:
        """Ask for the missing records of announcements, one after the other."""
        async for name in names:
            ask = partial(engine.get_service_info, SERVICE, name, int(RESOLVE_SECONDS * 1000))
            info = await self._call(ask, 2 * RESOLVE_SECONDS)
            node = node_of(name)
            if info is not None and node is not None:
                self._learn(node, info)

    def _learn(self, node: NodeId, info: zeroconf.ServiceInfo) -> None:
        """Remember a node, if its announcement is well-formed."""
        try:
            found = parse(node, info.properties, info.parsed_addresses(), info.port)
        except ProtocolError as error:
            limited.log(logging.DEBUG, node, "ignored an announcement: %s", error)
            return
        if node not in self._found and len(self._found) >= FOUND_MAX:
            limited.log(logging.DEBUG, "table", "ignored node %s: too many are announced", node)
        elif self._found.get(node) != found:
            self._found[node] = found
            self._tell(found)

    def _forget(self, node: NodeId) -> None:
        if self._found.pop(node, None) is not None:
            self._tell(Lost(node))

    def _tell(self, event: Found | Lost) -> None:
        try:
            self._send.send_nowait(event)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            limited.log(logging.DEBUG, "events", "nobody takes the news of %s", event.node)
        self._changed.set()
        self._changed = trio.Event()

    async def _call(self, call: Callable[[], Result], seconds: float) -> Result | None:
        """Run a blocking call of zeroconf on a thread; None if it fails or takes too long."""
        with trio.move_on_after(seconds):
            try:
                return await trio.to_thread.run_sync(call, abandon_on_cancel=True)
            except (OSError, zeroconf.Error) as error:
                limited.warning(type(error), "zeroconf failed: %r", error)
                return None
        limited.warning("slow", "zeroconf took more than %g s", seconds)
        return None


def _open_zeroconf(interface_address: str) -> zeroconf.Zeroconf:
    """Open the sockets. Raises OSError, RuntimeError or `zeroconf.Error` if that is impossible."""
    is_v6 = ":" in interface_address
    _check_multicast(interface_address, is_v6)
    version = zeroconf.IPVersion.V6Only if is_v6 else zeroconf.IPVersion.V4Only
    engine = zeroconf.Zeroconf([interface_address], ip_version=version, use_asyncio=False)
    if not engine.engine.senders:
        engine.close()
        raise OSError("the interface cannot send multicast")
    return engine


def _check_multicast(address: str, is_v6: bool) -> None:
    """Try what zeroconf is going to do, since it leaks its sockets when that fails (0.154).

    Raises OSError: port 5353 is held by a responder that does not share it, this machine does
    not have the address, or its interface cannot do multicast.
    """
    family = socket.AF_INET6 if is_v6 else socket.AF_INET
    with (
        socket.socket(family, socket.SOCK_DGRAM) as listener,
        socket.socket(family, socket.SOCK_DGRAM) as sender,
    ):
        for each, host in ((listener, ""), (sender, address)):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            each.bind((host, MDNS_PORT))
        if not is_v6:
            membership = socket.inet_aton(MDNS_GROUP) + socket.inet_aton(address)
            listener.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)


def _service_info(announcement: Announcement, address: str) -> zeroconf.ServiceInfo:
    assert is_node_id(announcement.node)
    assert is_node_id(announcement.cluster)
    return zeroconf.ServiceInfo(
        SERVICE,
        f"{announcement.node}.{SERVICE}",
        port=announcement.port,
        properties={
            "v": str(PROTOCOL_VERSION),
            "cluster": announcement.cluster,
            "name": announcement.cluster_name,
            "etcd": str(announcement.etcd_port),
            "zone": announcement.zone,
            "since": str(announcement.since_ms),
            "state": announcement.state,
        },
        server=f"{announcement.node}.local.",
        parsed_addresses=[address],
        host_ttl=TTL_SECONDS,
        other_ttl=TTL_SECONDS,
    )
