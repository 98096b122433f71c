"""Where etcd is: learned from the nodes' records, and noted to find the cluster after a restart."""

from __future__ import annotations

import logging
from pathlib import Path

from modelfs.mirror import Change, Mirror, NodeChanged
from modelfsd.etcd.store import EtcdStore
from modelfsd.logs import RateLimited
from modelfsd.trust import identity as identities
from modelfsd.trust.identity import Identity
from modelfsd.trust.joining import ENDPOINTS_MAX

log = logging.getLogger(__name__)


class EtcdAddresses:
    """Keeps the store's endpoints, and those in `node.json`, true to the mirror."""

    def __init__(
        self, state_dir: Path, identity: Identity, store: EtcdStore, mirror: Mirror
    ) -> None:
        self._state_dir, self._identity = state_dir, identity
        self._store, self._mirror = store, mirror
        self._quiet = RateLimited(log, 600.0)

    def on_changes(self, changes: list[Change]) -> None:
        """Take what the feed announces. Nodes put their records all the time."""
        records = [change.record for change in changes if isinstance(change, NodeChanged)]
        if not records:
            return
        known = list(self._store.endpoints)
        for record in records:
            if record and record.etcd_endpoint and record.etcd_endpoint not in known:
                known.append(record.etcd_endpoint)
        if len(known) > ENDPOINTS_MAX:  # only of those that live
            alive = (record.etcd_endpoint for record in self._mirror.nodes.values())
            known = list(dict.fromkeys(filter(None, alive)))[:ENDPOINTS_MAX] or known[:1]
        if known != list(self._store.endpoints):
            self._store.set_endpoints(known)
        if known != list(self._identity.endpoints):
            self._note(self._identity.knowing(tuple(known)))

    def _note(self, identity: Identity) -> None:
        try:
            identities.save(self._state_dir, identity)
        except OSError as error:  # a full disk; what stands there will do until it passes
            self._quiet.warning("save", "node.json cannot be written: %s", error)
            return
        self._identity = identity
