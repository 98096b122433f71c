"""Restarting this node's etcd member when all others are well, one node at a time.

etcd verifies whoever connects, and keeps a connection for as long as it lasts; it reads whom to
trust when it starts. So to shut out a node that was removed, and to trust another authority, each
member starts anew. They take turns under the key of those that join (`etcd.join`), so a cluster of
three never loses its majority; clients ask another member meanwhile, and of a single one they wait
for the second that it takes.
"""

from __future__ import annotations

import logging

import trio

from modelfs.errors import MetadataUnavailable
from modelfs.ids import NodeId
from modelfsd.etcd.join import (
    JOIN_LEASE_SECONDS,
    RETRY_SECONDS,
    UNAVAILABLE,
    keep_lease,
    revoke,
    take_turn,
)
from modelfsd.etcd.member import EtcdMember
from modelfsd.etcd.store import EtcdStore

log = logging.getLogger(__name__)

OTHERS_SECONDS = 60.0  # that the other voters have to be well; then it is done all the same


async def restart_in_turn(store: EtcdStore, member: EtcdMember, node: NodeId) -> None:
    """Restart the member once. Returns when it serves again; waits for ever for its turn.

    Raises `MetadataUnavailable` or `MetadataUncertain` if etcd gives no turn now.
    """
    lease = await store.grant(JOIN_LEASE_SECONDS)
    has_restarted = False
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_lease, store, lease, nursery.cancel_scope)
            await take_turn(store, node, lease)
            with trio.move_on_after(OTHERS_SECONDS) as patience:
                await _others_are_well(store, member)
            if patience.cancelled_caught:
                log.warning("another member of etcd is down; ours is restarted all the same")
            # Not to be broken off half way, should the lease be lost meanwhile.
            with trio.CancelScope(shield=True):
                has_restarted = True
                serves = await member.restart()
            log.info("etcd was restarted" if serves else "etcd was restarted and has no quorum yet")
            nursery.cancel_scope.cancel()
    finally:
        await revoke(store, lease)
    if not has_restarted:
        raise MetadataUnavailable("the turn to restart etcd was lost")


async def _others_are_well(store: EtcdStore, member: EtcdMember) -> None:
    while True:
        try:
            for other in await store.members():
                for endpoint in other.client_endpoints:
                    if endpoint != member.client_endpoint:
                        status = await store.member_status(endpoint)
                        if not status.leader:
                            raise MetadataUnavailable(f"{endpoint} knows of no leader")
            return
        except UNAVAILABLE as error:
            log.info("waiting for the other members of etcd: %s", error)
        await trio.sleep(RETRY_SECONDS)
