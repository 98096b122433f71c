"""Pins: keep the versions that this node has open, though nobody else can open them any more.

A file that is superseded or unlinked elsewhere stays whole for whoever has it open here (G3), for a
week-long mmap too. Its chunks are on other nodes, so these are told: `pin/<node>/<manifest>` stands
in etcd from soon after the version went, which is well within the grace period, until its last
handle here is closed. So are the versions that lost writes are based on, as long as these can be
recovered. The key is bound to the node's etcd lease: it vanishes with the node, and is
put again when the node has registered anew.

One task makes etcd's pins what they should be. The feed's listener only wakes it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator

import trio

from modelfs import keys
from modelfs.changes import Plan
from modelfs.errors import ModelfsError
from modelfs.inode import Inode, Pin, encode
from modelfs.limits import TRANSACTION_OPS_MAX
from modelfs.mirror import Change, InodeChanged, Mirror, PinChanged
from modelfs.ports import Delete, Put, Txn
from modelfsd.kernel.kernel_inodes import KernelInode, KernelInodes
from modelfsd.logs import RateLimited
from modelfsd.metadata.leases import Leases
from modelfsd.metadata.namespace import Namespace

log = logging.getLogger(__name__)

PAUSE_SECONDS = 0.25  # between two looks, so that a burst of commits is one
LOOK_AGAIN_SECONDS = 5.0  # while there are outdated versions: closing a handle wakes nobody
OPS_MAX = TRANSACTION_OPS_MAX - 1  # and `seq`


class PinKeeper:
    """Keeps this node's pins."""

    def __init__(self, namespace: Namespace, inodes: KernelInodes, leases: Leases) -> None:
        self._namespace, self._inodes, self._leases = namespace, inodes, leases
        self._bases: list[Pin] = []
        self._news = trio.Event()
        self._quiet = RateLimited(log)

    def on_changes(self, changes: list[Change]) -> None:
        """Take what the feed announces, after `KernelCache` has."""
        for change in changes:
            if isinstance(change, InodeChanged):
                is_news = self._inodes.has_outdated
            else:
                is_news = isinstance(change, PinChanged) and change.node == self._namespace.node_id
            if is_news:
                self._news.set()
                return

    def keep_bases(self, records: Iterable[Inode]) -> None:
        """Pin also the versions that lost writes are based on, from now on just these."""
        self._bases = [Pin(one.manifest, one.replicas) for one in records if one.manifest]
        self._news.set()

    def wanted(self) -> dict[bytes, Pin]:
        """What is to be pinned, by its manifest's chunk id."""
        open_here = (
            pin
            for inode in self._inodes.outdated
            if inode.handles or inode.session
            for pin in _versions_of(inode)
        )
        return {pin.manifest.id: pin for pin in (*self._bases, *open_here)}

    async def run(self) -> None:
        """Keep etcd's pins right, for ever."""
        while True:
            self._news = trio.Event()
            try:
                await self.reconcile()
            except ModelfsError as error:
                self._quiet.warning("pins", "open versions cannot be pinned now: %s", error)
            await trio.sleep(PAUSE_SECONDS)
            is_idle = not self._inodes.has_outdated and not self._present()
            with trio.move_on_after(float("inf") if is_idle else LOOK_AGAIN_SECONDS):
                await self._news.wait()

    async def reconcile(self) -> None:
        """Put the pins that are missing and delete those that are not wanted any more."""
        node, lease = self._namespace.node_id, self._leases.etcd_lease
        if not lease:
            return  # not registered yet: nothing is open either
        wanted, present = self.wanted(), self._present()
        ops: list[Put | Delete] = [
            Put(keys.pin(node, name), encode(pin), lease)
            for name, pin in wanted.items()
            if name not in present
        ]
        ops += [Delete(keys.pin(node, name)) for name in present if name not in wanted]
        for start in range(0, len(ops), OPS_MAX):
            # Blind: nobody else writes them.
            plan = Plan(Txn((), tuple(ops[start : start + OPS_MAX])), None)
            await self._namespace.change(_always(plan))

    def _present(self) -> set[bytes]:
        return set(self._namespace.mirror.pins.get(self._namespace.node_id, ()))


def _always(plan: Plan[None]) -> Callable[[Mirror], Plan[None]]:
    return lambda mirror: plan


def _versions_of(inode: KernelInode) -> Iterator[Pin]:
    """What an open kernel inode may still be read from."""
    records = [inode.record]
    if inode.session is not None:
        records.append(inode.session.copy.base)
    for record in records:
        if record.manifest is not None:
            yield Pin(record.manifest, record.replicas)
