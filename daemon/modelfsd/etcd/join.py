"""Who may join etcd, and whose turn it is.

A node that wants to become a voter holds `JOIN_KEY` while it works, under a lease: a joiner that
dies frees it. The key keeps joiners from disturbing each other; etcd itself refuses what would be
dangerous.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from enum import Enum

import trio

from modelfs.errors import MetadataUnavailable, MetadataUncertain, RemoteError
from modelfs.ids import NodeId, Revision
from modelfs.ports import Compare, Put, Target, Txn
from modelfsd.etcd.store import EtcdStore, MemberInfo

log = logging.getLogger(__name__)

VOTERS_MAX = 3  # survives one death; five would survive two, and cost every write more
JOIN_KEY = b"etcd-join"
JOIN_LEASE_SECONDS = 15
RETRY_SECONDS = 0.5

UNAVAILABLE = (MetadataUnavailable, MetadataUncertain)


class Role(Enum):
    """What a node should be to the etcd cluster."""

    MEMBER = "member"
    CLIENT = "client"


def wanted_role(members: Iterable[MemberInfo], name: str = "", peer_url: str = "") -> Role:
    """Whether a new node should join as a voter. Learners count: they are voters to be.

    What an earlier attempt of the same node (`name`, `peer_url`) left behind does not count.
    """
    others = [
        member
        for member in members
        if not (name and member.name == name) and peer_url not in member.peer_urls
    ]
    return Role.MEMBER if len(others) < VOTERS_MAX else Role.CLIENT


async def take_turn(store: EtcdStore, name: NodeId, lease: int) -> None:
    """Take the join key, or wait until whoever holds it is done or dead. Waits for ever."""
    value = name.encode()
    claim = Txn((Compare(JOIN_KEY, Target.CREATE, Revision(0)),), (Put(JOIN_KEY, value, lease),))
    while True:
        try:
            if (await store.commit(claim)).succeeded:
                return
            revision, held = await store.load(JOIN_KEY)
            if any(key.value == value for key in held):
                # Ours: an answer got lost, or our previous run was killed. If it is bound to
                # that run's lease it may lapse early; then etcd's own refusals keep order.
                return
            if held:
                holder = held[0].value.decode(errors="replace")
                log.info("waiting for node %s, which is joining etcd", holder)
                await _wait_for_release(store, Revision(revision + 1))
        except RemoteError as error:
            log.warning("waiting for our turn to join etcd: %s", error)
            await trio.sleep(RETRY_SECONDS)


async def _wait_for_release(store: EtcdStore, start: Revision) -> None:
    async with store.watch(JOIN_KEY, start) as batches:
        async for batch in batches:
            if any(event.value is None for event in batch.events):
                return


async def keep_lease(store: EtcdStore, lease: int, scope: trio.CancelScope) -> None:
    """Renew a lease while the joiner works; cancel it if the lease is lost."""
    renewed = trio.current_time()
    while trio.current_time() < renewed + JOIN_LEASE_SECONDS:
        await trio.sleep(JOIN_LEASE_SECONDS / 5)
        try:
            if not await store.keep_alive(lease):
                break
            renewed = trio.current_time()
        except MetadataUnavailable as error:
            log.warning("the turn to join etcd is running out: %s", error)
    scope.cancel()


async def revoke(store: EtcdStore, lease: int) -> None:
    """Give up our turn now rather than when the lease lapses; in bounded time."""
    with trio.CancelScope(shield=True):
        try:
            await store.revoke(lease)
        except UNAVAILABLE as error:
            log.warning("the turn to join etcd will end by itself: %s", error)


async def remove_learners(store: EtcdStore) -> None:
    """Remove learners whose node died while it joined: we hold the turn, so it does not."""
    try:
        for member in await store.members():
            if member.is_learner:
                log.warning("removing etcd learner %x: its node died joining", member.id)
                await store.remove_member(member.id)
    except UNAVAILABLE as error:
        log.warning("a dead learner could not be removed yet: %s", error)
