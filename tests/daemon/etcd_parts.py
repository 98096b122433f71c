"""Real etcd members on loopback addresses, for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import trio

from modelfs.errors import MetadataUnavailable, MetadataUncertain
from modelfs.ids import NodeId
from modelfsd.etcd.member import EtcdMember
from modelfsd.etcd.store import EtcdStore
from modelfsd.etcd.tls import EtcdTls
from modelfsd.trust.keyring import KeyRing
from tests.loopback import new_address
from tests.pki_parts import etcd_tls

HANG_SECONDS = 120  # a guard only
CLIENT_PORT, PEER_PORT = 12379, 12380
_numbers = count(1)


def new_member(root: Path) -> EtcdMember:
    """A member on a loopback address of its own."""
    name = NodeId(f"{next(_numbers):016x}")
    return member_at(root / name, name, new_address())


def member_at(directory: Path, name: NodeId, address: str) -> EtcdMember:
    """A member with certificates for its address."""
    tls = etcd_tls(directory, name, address)
    return EtcdMember(directory, name, address, CLIENT_PORT, PEER_PORT, tls)


def store_of(member: EtcdMember) -> EtcdStore:
    """A client of a member, with that node's certificate."""
    directory = member.process.data_directory.parent
    credentials = EtcdTls(KeyRing(directory)).credentials()
    return EtcdStore([member.client_endpoint], credentials=credentials)


@asynccontextmanager
async def cluster(root: Path, size: int) -> AsyncIterator[tuple[list[EtcdMember], EtcdStore]]:
    """So many voters, and a store that knows them all. Whatever happens, none stays."""
    members = [new_member(root) for _ in range(size)]
    try:
        await members[0].found()
        async with store_of(members[0]) as store:
            for member in members[1:]:
                await member.join(store)
            store.set_endpoints([member.client_endpoint for member in members])
            yield members, store
    finally:
        for member in members:
            await member.stop()


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run a test's body under trio, with a guard against hanging."""

    async def guarded() -> None:
        with trio.fail_after(HANG_SECONDS):
            await main()

    trio.run(guarded)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Ask again until it is so; what is out of reach is not so yet."""
    while True:
        try:
            if await condition():
                return
        except (MetadataUnavailable, MetadataUncertain):
            pass
        await trio.sleep(0.05)
