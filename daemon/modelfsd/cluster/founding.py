"""Founding a cluster that nobody asked for, and only if there is none: several machines may try.

A new machine without a token *claims*: it announces, as `founding`, the cluster that it would make,
listens for `CLAIM_SECONDS`, and then decides:

    somebody's cluster is up             → it steps back, and says how to get in
    an older claim is announced          → it steps back
    else                                 → its claim is announced as `up`, and it founds

Two claims that overlap see each other, and their order (time, then id) is the same for both, so at
most one goes on. A claim that begins later sees the other as up, however the clocks are set. What
multicast loses for that long is caught by a second look, when the cluster is there and still empty.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from modelfs.errors import UserError
from modelfs.ids import ClusterId, NodeId
from modelfsd.cluster.announcements import FOUNDING, UP, Announcement, Found
from modelfsd.cluster.discovery import Discovery
from modelfsd.config import Config
from modelfsd.etcd.process import EtcdProcess
from modelfsd.etcd.standing import Standing, StandingRecord
from modelfsd.trust import pki
from modelfsd.trust.identity import Identity
from modelfsd.trust.keyring import KeyRing
from modelfsd.trust.pki import Party

log = logging.getLogger(__name__)

CLAIM_SECONDS = 3.0  # zeroconf answers within 1.6 s on a quiet network


@dataclass(frozen=True, slots=True)
class Claim:
    """A cluster that a node would found."""

    node: NodeId
    cluster: ClusterId
    name: str
    founded_at: float

    @property
    def party(self) -> Party:
        """The founder, as its certificate will name it."""
        return Party(self.cluster, self.node)

    @property
    def since_ms(self) -> int:
        """As it is announced."""
        return max(0, int(self.founded_at * 1000))

    def announcement(self, config: Config, state: str) -> Announcement:
        """What the network hears of it."""
        port = config.listen[1]
        return Announcement(
            self.node, self.cluster, self.name, port, 0, config.zone, self.since_ms, state
        )


async def settle_claim(claim: Claim, config: Config, discovery: Discovery) -> None:
    """Returns if the claim stands. Raises `UserError` if there is a cluster to join."""
    log.info("looking for a cluster on this network")
    await discovery.announce(claim.announcement(config, FOUNDING))
    found = await discovery.browse_for(CLAIM_SECONDS)
    ours = (True, claim.since_ms, claim.cluster)
    earlier = [other for other in found if other.age_key < ours]
    if earlier:
        raise UserError(_how_to_join(earlier, config))
    await discovery.announce(claim.announcement(config, UP))


def rival_of(claim: Claim, discovery: Discovery) -> UserError | None:
    """The error to end with if an older cluster turns up while ours is empty."""
    ours = (claim.since_ms, claim.cluster)
    others = [found for found in discovery.snapshot() if found.state == UP]
    rivals = [found for found in others if (found.since_ms, found.cluster) < ours]
    return UserError(_how_to_join(rivals)) if rivals else None


async def forget_founding(state_dir: Path, identity: Identity, keys: KeyRing) -> None:
    """Make room where a founding died before this node knew of its cluster: it is empty.

    Raises `UserError` if the member of etcd that is here may be another one.
    """
    record = StandingRecord(state_dir)
    if record.standing is not Standing.MEMBER:
        return
    if not keys.is_whole or keys.load().node.serial_number != pki.serial_of(identity.node):
        raise UserError(
            f"{state_dir} holds a member of etcd, of a cluster that its node.json does not know: "
            f"restore it, or move {state_dir} away to start as a new node"
        )
    log.warning("the founding of a cluster was not finished here: it is begun anew")
    process = EtcdProcess(state_dir)
    await process.end_orphan()
    if process.data_directory.exists():
        aside = process.data_directory.with_name(f"etcd.unfinished-{time.time_ns():x}")
        process.data_directory.rename(aside)
        log.info("what etcd had of it is in %s, and may be deleted", aside)
    record.path.unlink()


def _how_to_join(found: list[Found], config: Config | None = None) -> str:
    by_cluster = {each.cluster: each for each in sorted(found, key=lambda each: each.age_key)}
    rows = [f"{each.cluster_name} (a node is at {each.host}:{each.port})"
            for each in by_cluster.values()]  # fmt: skip
    mountpoint = config.mountpoint if config else "MOUNTPOINT"
    return (
        f"there is a cluster on this network already: {'; '.join(rows)}. To join it, run "
        f"`modelfs token` on one of its machines, and here `modelfs mount {mountpoint} --join "
        "TOKEN`; to found another one beside it, give --new-cluster NAME"
    )
