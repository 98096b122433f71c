"""Discovery over real multicast DNS on loopback, and announcements that no node would send."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import trio
import zeroconf
from hypothesis import given
from hypothesis import strategies as st

from modelfs.errors import ProtocolError
from modelfs.ids import ClusterId, NodeId, is_node_id
from modelfsd.cluster.announcements import FOUNDING, SERVICE, UP, Announcement, Found, Lost, parse
from modelfsd.cluster.discovery import EVENTS_MAX, FOUND_MAX, Discovery
from tests import needs
from tests.loopback import new_address

HANG_SECONDS = 120  # a guard only
ALPHA, BETA = NodeId("a" * 16), NodeId("b" * 16)
CLUSTER = ClusterId(f"c{os.getpid():015x}")
FIRST, SECOND = new_address(), new_address()


def announcement(node: NodeId, zone: str = "") -> Announcement:
    return Announcement(node, CLUSTER, "lab", 7420, 7421, zone)


def found(node: NodeId, host: str, zone: str = "") -> Found:
    return Found(node, CLUSTER, "lab", host, 7420, 7421, zone, 1)


def ours(nodes: list[Found]) -> list[Found]:
    """Without the nodes of labs that run on this machine: they too are heard on loopback."""
    return [node for node in nodes if node.cluster == CLUSTER]


async def browse(discovery: Discovery) -> list[Found]:
    return ours(await discovery.browse_for(HANG_SECONDS, lambda nodes: bool(ours(nodes))))


async def next_event(discovery: Discovery) -> Found | Lost:
    async for event in discovery.events:
        if event.node in (ALPHA, BETA) and (isinstance(event, Lost) or ours([event])):
            return event
    raise trio.EndOfChannel


def raw_service(
    instance: str = "d" * 16, port: int = 7420, **changes: str | bytes | None
) -> zeroconf.ServiceInfo:
    """A service as anyone on the network might register it."""
    texts: dict[str, str | bytes | None] = {
        "v": "1", "cluster": CLUSTER, "name": "lab", "etcd": "0", "zone": ""
    }  # fmt: skip
    return zeroconf.ServiceInfo(
        SERVICE,
        f"{instance}.{SERVICE}",
        port=port,
        properties={key: value for key, value in (texts | changes).items() if value is not None},
        server=f"{instance[:20]}.local.",
        parsed_addresses=[FIRST],
    )


async def test_two_nodes_find_each_other_and_not_themselves() -> None:
    async with Discovery(FIRST) as first, Discovery(SECOND) as second:
        await first.announce(announcement(ALPHA, "rack-1"))
        await second.announce(announcement(BETA))
        assert await browse(first) == [found(BETA, SECOND)]
        assert await browse(second) == [found(ALPHA, FIRST, "rack-1")]


async def test_news_comes_as_events_and_a_closed_node_is_lost_at_once() -> None:
    async with Discovery(SECOND) as second:
        async with Discovery(FIRST) as first:
            await first.announce(announcement(ALPHA))
            assert await next_event(second) == found(ALPHA, FIRST)
            await first.update(announcement(ALPHA, "rack-2"))
            assert await next_event(second) == found(ALPHA, FIRST, "rack-2")
        assert await next_event(second) == Lost(ALPHA)
        assert ours(second.snapshot()) == []
    with pytest.raises(trio.EndOfChannel):
        await next_event(second)


async def test_a_node_that_starts_later_finds_those_that_are_there() -> None:
    async with Discovery(FIRST) as first:
        await first.announce(announcement(ALPHA))
        async with Discovery(SECOND) as second:
            assert await browse(second) == [found(ALPHA, FIRST)]


async def test_browsing_ends_in_time_when_the_condition_never_holds() -> None:
    async with Discovery(FIRST) as first:
        assert ours(await first.browse_for(0.05, lambda nodes: False)) == []


@pytest.mark.expected_logs("no multicast on 192.0.2.7")
async def test_without_multicast_it_warns_once_and_finds_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """192.0.2.7 (RFC 5737) is no address of this machine, so no interface can be opened."""
    async with Discovery("192.0.2.7") as alone:
        await alone.announce(announcement(ALPHA))
        await alone.update(announcement(ALPHA, "rack-1"))
        assert await alone.browse_for(HANG_SECONDS) == []
    messages = [r.message for r in caplog.records if r.name.startswith("modelfsd")]
    assert len(messages) == 1
    assert messages[0].startswith("no multicast on 192.0.2.7 (")
    assert messages[0].endswith("other nodes are not found by themselves, use --peer")


BESIDE_A_SELFISH_RESPONDER = f"""
import logging, socket, trio
from modelfsd.cluster.discovery import Discovery

async def main():
    async with Discovery("{FIRST}") as alone:
        print(await alone.browse_for({HANG_SECONDS}))

logging.basicConfig(level=logging.WARNING, format="%(message)s")
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as selfish:
    selfish.bind(("", 5353))
    trio.run(main)
"""


def test_a_port_that_cannot_be_shared_is_no_error() -> None:
    """Another mDNS responder that holds port 5353 for itself must not keep a node from starting.

    In a network of its own: on the machine's the port may be in use, and shared.
    """
    needs.root()
    source = 'ip link set lo up && exec "$0" -c "$1"'
    command = [needs.program("unshare"), "-n", "sh", "-c", source]
    done = subprocess.run(
        [*command, sys.executable, BESIDE_A_SELFISH_RESPONDER],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    assert re.search("no multicast on .*in use", done.stderr), done.stderr


async def test_hostile_announcements_are_ignored_and_the_good_one_is_found() -> None:
    hostile = [
        raw_service("no-node-id"),
        raw_service("A" * 16),
        raw_service("d" * 15),
        raw_service("00000000000000d1", cluster="short"),
        raw_service("00000000000000d2", cluster=None),
        raw_service("00000000000000d3", name="\x1b[2J"),
        raw_service("00000000000000d4", name=b"\xff\xfe"),
        raw_service("00000000000000d5", name="n" * 200),
        raw_service("00000000000000d6", etcd="-1"),
        raw_service("00000000000000d7", etcd="99999"),
        raw_service("00000000000000d8", v="0"),
        raw_service("00000000000000d9", v="1e3"),
        raw_service("00000000000000da", zone="a\nb"),
        raw_service("00000000000000db", port=0),
    ]

    async with Discovery(SECOND) as second:
        engine = zeroconf.Zeroconf([FIRST], use_asyncio=False)
        try:
            for info in [*hostile, raw_service("00000000000000ff")]:
                await trio.to_thread.run_sync(broadcast, engine, info)
            good = Found(NodeId("00000000000000ff"), CLUSTER, "lab", FIRST, 7420, 0, "", 1)
            assert await browse(second) == [good]
        finally:
            await trio.to_thread.run_sync(engine.close)


def broadcast(engine: zeroconf.Zeroconf, info: zeroconf.ServiceInfo) -> None:
    """Announce once, without the second for which `register_service` waits."""
    assert engine.loop is not None
    engine.registry.async_add(info)
    engine.send(engine.generate_service_broadcast(info, None))


async def test_the_table_and_the_events_are_bounded() -> None:
    discovery = Discovery(FIRST)
    for number in range(FOUND_MAX + 10):
        discovery._learn(NodeId(f"{number:016x}"), raw_service(f"{number:016x}"))
    assert len(discovery.snapshot()) == FOUND_MAX
    assert discovery.events.statistics().current_buffer_used == EVENTS_MAX


texts = st.one_of(
    st.none(), st.binary(max_size=255), st.sampled_from([b"1", b"0", b"7421", b"c" * 16, b"zone"])
)


@given(
    st.dictionaries(
        st.sampled_from([b"v", b"cluster", b"name", b"etcd", b"zone", b"since", b"state"]), texts
    ),
    st.lists(st.sampled_from(["127.0.0.1", "10.0.0.1", "fd00::1", "224.0.0.1", "0.0.0.0", "::"])),
    st.one_of(st.none(), st.integers(0, 0xFFFF)),
)
def test_whatever_is_announced_is_either_well_formed_or_a_protocol_error(
    properties: dict[bytes, bytes | None], addresses: list[str], port: int | None
) -> None:
    try:
        node = parse(ALPHA, properties, addresses, port)
    except ProtocolError:
        return
    assert is_node_id(node.cluster)
    assert node.host in ("127.0.0.1", "10.0.0.1", "fd00::1")
    assert 1 <= node.port <= 0xFFFF
    assert 0 <= node.etcd_port <= 0xFFFF
    assert 1 <= node.protocol <= 0xFFFF
    assert 0 <= node.since_ms < 10**15
    assert node.state in (UP, FOUNDING)
    for label in (node.cluster_name, node.zone):
        assert label.isprintable()
        assert len(label.encode()) <= 64
