"""`modelfs ca rotate`: another authority takes over while the cluster runs.

What is to be trusted stands in etcd, under `security/trust`, and grows by a step each time:

    1. both are trusted, the old one signs      each node trusts both; etcd restarts in turn
    2. both are trusted, the new one signs      each node fetches its key from a member, over a
                                                connection with proof, and renews its certificates
    3. the new one alone is trusted             etcd restarts in turn; what the old one has signed
                                                is refused, and so are its tokens

A step is begun when every living node has said that it has taken the one before (a key for each
under `security/at/`). Whoever dies in the middle leaves a state in which all works; the command,
given on any node, goes on from there; if the new key has died with its maker, with another one. A
node that was down comes back with a token, as the node that it was.
"""

from __future__ import annotations

import logging
import time
from typing import Annotated, Any

import msgspec
import trio

from modelfs import keys
from modelfs.errors import MetadataUnavailable, MetadataUncertain, ProtocolError, UserError
from modelfs.ids import NodeId, Revision
from modelfs.mirror import Mirror
from modelfs.ports import Compare, MetadataStore, Put, Target, Txn
from modelfsd.trust import pki
from modelfsd.trust.identity import Identity
from modelfsd.trust.keyring import KeyRing
from modelfsd.trust.pki import Certificate

log = logging.getLogger(__name__)

STEP_SECONDS = 300.0  # for all nodes to follow
POLL_SECONDS = 0.2

_Der = Annotated[bytes, msgspec.Meta(max_length=pki.CERTIFICATE_BYTES_MAX)]


class Trust(msgspec.Struct, array_like=True, frozen=True):
    """The authorities of the cluster; `holder` has made the newest and knows its key for sure."""

    step: int
    certificates: Annotated[list[_Der], msgspec.Meta(min_length=1, max_length=4)]
    signer: int
    holder: str

    def open(self) -> tuple[list[Certificate], Certificate]:
        """(who is trusted, who signs). Raises `ProtocolError`."""
        trusted = [pki.parse_certificate(each) for each in self.certificates]
        if not 0 <= self.signer < len(trusted):
            raise ProtocolError("a damaged record of the authorities")
        return trusted, trusted[self.signer]


def trust_of(mirror: Mirror) -> Trust | None:
    """What the cluster has decided; None before the first rotation. Raises `ProtocolError`."""
    row = mirror.other(keys.TRUST)
    if row is None:
        return None
    try:
        return msgspec.msgpack.decode(row.value, type=Trust)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(f"a damaged record of the authorities: {error}") from None


class Rotation:
    """The handler. One at a time: here by a flag, in the cluster by guarded transactions.

    Each decision is guarded by the one that it follows from, as this node has read it then.
    """

    def __init__(
        self, identity: Identity, keyring: KeyRing, store: MetadataStore, mirror: Mirror
    ) -> None:
        self._identity, self._keyring = identity, keyring
        self._store, self._mirror = store, mirror
        self._is_under_way = False

    async def rotate(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry it out, or go on with what somebody has begun."""
        if not request.get("force"):
            self._refuse_without_all()
        if self._is_under_way:  # its client may have gone; a second key would replace its own
            raise UserError("this node is changing the authority: wait until it is done")
        self._is_under_way = True
        try:
            return await self._rotate()
        finally:
            self._is_under_way = False

    async def _rotate(self) -> dict[str, Any]:
        try:
            trust = trust_of(self._mirror)
            if trust is None or len(trust.certificates) == 1:
                trust = await self._begin(trust)
            elif trust.holder != self._identity.node and (
                trust.signer == 0 or self._is_lost(trust)
            ):
                trust = await self._begin(trust)  # its key may be lost with its holder
            await self._all_follow(trust)
            if trust.signer == 0:
                trust = await self._put(trust, signer=1)
                await self._all_follow(trust)
            trust = await self._put(trust, certificates=trust.certificates[1:], signer=0)
            await self._all_follow(trust)
        except (MetadataUnavailable, MetadataUncertain) as error:
            raise UserError(
                f"etcd does not answer ({error}): give the command again, it goes on"
            ) from error
        await trio.to_thread.run_sync(self._keyring.forget_next)
        fingerprint = pki.fingerprint(trust.open()[1]).hex()
        log.warning("the authority of the cluster was replaced: %s", fingerprint)
        return {"fingerprint": fingerprint, "nodes": len(self._mirror.nodes)}

    def _is_lost(self, trust: Trust) -> bool:
        """Whether nobody who lives has the key of who should sign: its maker died before."""
        living = self._mirror.nodes
        return trust.holder not in living and all(self._step_of(n) < trust.step for n in living)

    def _refuse_without_all(self) -> None:
        latest = self._mirror.latest_map
        members = latest.members if latest is not None else ()
        away = [member.name for member in members if member.id not in self._mirror.nodes]
        if away:
            raise UserError(
                f"{', '.join(away)} cannot be reached: a node that is down meanwhile needs a token "
                "to come back. Start it first, remove it (`modelfs node remove`), or give --force"
            )

    async def _begin(self, before: Trust | None) -> Trust:
        """Make the new authority, and have it trusted beside the one that signs."""
        now = time.time()
        authority = await trio.to_thread.run_sync(
            lambda: self._keyring.make_next(self._identity.cluster, now)
        )
        signing, _ = await trio.to_thread.run_sync(self._keyring.load_authority)
        trust = Trust(
            before.step if before else 0,
            [pki.to_der(signing.certificate), pki.to_der(authority.certificate)],
            0,
            self._identity.node,
        )
        return await self._decide(before, trust)

    async def _put(self, trust: Trust, **changes: object) -> Trust:
        """Decide on the next step, unless somebody else has decided meanwhile."""
        return await self._decide(trust, msgspec.structs.replace(trust, **changes))

    async def _decide(self, before: Trust | None, trust: Trust) -> Trust:
        fresh = msgspec.structs.replace(trust, step=trust.step + 1)
        row = self._mirror.other(keys.TRUST)
        if trust_of(self._mirror) != before:
            raise UserError("another node is changing the authority: wait until it is done")
        guard = Compare(keys.TRUST, Target.MOD, row.mod_revision if row else Revision(0))
        txn = Txn((guard,), (Put(keys.TRUST, msgspec.msgpack.encode(fresh)),))
        if not (await self._store.commit(txn)).succeeded:
            raise UserError("another node is changing the authority: wait until it is done")
        log.info("changing the authority: step %d", fresh.step)
        return fresh

    async def _all_follow(self, trust: Trust) -> None:
        """Wait until all living nodes have taken a step."""
        behind: list[str] = []
        with trio.move_on_after(STEP_SECONDS):
            while True:
                behind = [
                    record.name
                    for node, record in self._mirror.nodes.items()
                    if self._step_of(node) < trust.step
                ]
                ours = trust_of(self._mirror)
                if not behind and ours is not None and ours.step >= trust.step:
                    return
                await trio.sleep(POLL_SECONDS)
        raise UserError(
            f"{', '.join(behind)} did not follow in {STEP_SECONDS:.0f} s: all goes on working; "
            "look at the logs there, then give the command again"
        )

    def _step_of(self, node: NodeId) -> int:
        row = self._mirror.other(keys.trust_step(node))
        return int(row.value) if row is not None and row.value.isdigit() else 0
