"""Joining with a token over real sockets: who is let in, and what everybody else is told."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import pytest
import trio

from modelfs import keys, wire
from modelfs.errors import PeerRefused, PeerUnavailable, ProtocolError, UserError
from modelfs.ids import ClusterId, NodeId
from modelfs.mirror import Mirror
from modelfs.ports import Delete, Put, Txn
from modelfs.testing.metadata import MemoryMetadataStore
from modelfs.testing.stores import MemoryChunkStore
from modelfsd.peers.client import PeerClient
from modelfsd.peers.server import PeerServer
from modelfsd.trust import joining, pki, tokens
from modelfsd.trust.admission import Admission
from modelfsd.trust.identity import Identity
from modelfsd.trust.joining import Applicant, ClockWrong, Impostor, Unreachable, Welcome
from modelfsd.trust.tls import Tls
from modelfsd.trust.tokens import Token
from tests.pki_parts import CLUSTER, authority, key_ring, tls_of

MEMBER, NEW = NodeId("1" * 16), NodeId("7" * 16)
YEARS = 3 * 365 * 86400.0


@dataclass
class Cluster:
    """One member and what it keeps."""

    store: MemoryMetadataStore
    admission: Admission
    address: tuple[str, int]

    async def token(self, **request: object) -> Token:
        answer = await self.admission.token(request)
        return tokens.parse_token(answer["token"])

    async def join(self, token: Token, node: NodeId = NEW) -> Welcome:
        return await self.ask(Applicant(node, "new", token, pki.new_key(), ("127.0.0.1",)))

    async def ask(self, applicant: Applicant) -> Welcome:
        return await trio.to_thread.run_sync(joining.ask_to_join, applicant, self.address)


@asynccontextmanager
async def member(
    tls: Tls | None = None,
    change_info: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    letters: list[bytes] | None = None,
) -> AsyncIterator[Cluster]:
    """A member that serves; `letters` gets what it is asked in JOIN, and nobody is let in then."""
    tls = tls or tls_of(MEMBER)
    store = MemoryMetadataStore()
    identity = Identity(MEMBER, tls.party.cluster, "lab", ("10.0.0.1:7421",), True, 1.0)
    admission = Admission(
        identity, tls.keys, store, Mirror(), ("127.0.0.1", 7420), lambda: ("10.0.0.1:7421",)
    )

    def note(letter: bytes, node: NodeId | None) -> bytes:
        assert letters is not None
        letters.append(letter)
        return b""

    server = PeerServer(
        MemoryChunkStore(),
        tls,
        "member",
        lambda is_member: change_info(admission.info(is_member)),
        admission.admit if letters is None else note,
        lambda ref: None,
    )
    try:
        yield Cluster(store, admission, server.start("127.0.0.1", 0))
    finally:
        await trio.to_thread.run_sync(server.stop)


async def test_a_token_brings_certificates_that_the_cluster_accepts() -> None:
    async with member() as cluster:
        key = pki.new_key()
        token = await cluster.token()
        welcome = await cluster.ask(Applicant(NEW, "new", token, key, ("127.0.0.1",)))
        ours, trusted, revoked = welcome.open()
        assert (welcome.cluster, welcome.cluster_name) == (CLUSTER, "lab")
        assert pki.fingerprint(ours.certificate) == token.fingerprint
        assert trusted == [ours.certificate] and not revoked
        certificate = pki.parse_certificate(welcome.node_certificate)
        assert pki.belongs(certificate, key) and pki.is_signed_by(certificate, ours.certificate)
        assert pki.addresses_of(certificate) == {"127.0.0.1"}


async def test_the_cluster_keeps_no_secret() -> None:
    async with member() as cluster:
        token = await cluster.token()
        _, rows = await cluster.store.load(b"")
        assert [row.key for row in rows] == [keys.token(token.id)]
        assert token.secret not in rows[0].value


@pytest.mark.expected_logs("was not let in")
async def test_each_bad_token_is_told_apart() -> None:
    async with member() as cluster:
        token = await cluster.token()
        wrong = msgspec.structs.replace(token, secret=bytes(32))
        with pytest.raises(UserError, match="does not know this join token"):
            await cluster.join(wrong)
        await cluster.join(token)
        with pytest.raises(UserError, match="used up"):
            await cluster.join(token, NodeId("8" * 16))
        late = await cluster.token(ttl="1s")
        record = tokens.TokenRecord(tokens.hash_of(late.secret), time.time() - 9, 1, [])
        put = Put(keys.token(late.id), msgspec.msgpack.encode(record))
        await cluster.store.commit(Txn((), (put,)))
        with pytest.raises(UserError, match="expired 9 s ago"):
            await cluster.join(late)


@pytest.mark.expected_logs("was not let in")
async def test_uses_are_counted_when_many_come_at_once() -> None:
    async with member() as cluster:
        token = await cluster.token(uses=3)
        outcomes: list[str] = []

        async def come(number: int) -> None:
            try:
                await cluster.join(token, NodeId(f"{number:016x}"))
                outcomes.append("in")
            except UserError as error:
                outcomes.append("out" if "used up" in str(error) else str(error))

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(come, number)
        assert sorted(outcomes) == ["in"] * 3 + ["out"] * 3


async def test_a_lost_answer_costs_no_use() -> None:
    async with member() as cluster:
        applicant = Applicant(NEW, "new", await cluster.token(), pki.new_key(), ("127.0.0.1",))
        await cluster.ask(applicant)
        await cluster.ask(applicant)


@pytest.mark.expected_logs("was not let in")
async def test_a_removed_node_does_not_come_back_under_its_id() -> None:
    async with member() as cluster:
        await cluster.store.commit(Txn((), (Put(keys.revoked(NEW), b""),)))
        with pytest.raises(UserError, match="was removed from the cluster"):
            await cluster.join(await cluster.token())
        await cluster.store.commit(Txn((), (Delete(keys.revoked(NEW)),)))


@pytest.mark.expected_logs("closed the connection")
async def test_an_impostor_gets_no_secret() -> None:
    """It announces our cluster's id, and has an authority of its own for that id."""
    async with member() as cluster:
        token = await cluster.token()
    forged = pki.found_authority(CLUSTER, time.time())
    impostor_keys = key_ring(NodeId("6" * 16))
    impostor_keys.take(forged, (forged.certificate,), ())
    party = replace(tls_of(MEMBER).party, node=NodeId("6" * 16))
    impostor_keys.certify(party, ["127.0.0.1"], time.time())
    heard: list[bytes] = []

    def claim_our_authority(info: dict[str, Any]) -> dict[str, Any]:
        return {**info, "authorities": [pki.to_der(authority().certificate)]}

    for change in (dict, claim_our_authority):
        async with member(Tls(impostor_keys, party), change, heard) as impostor:
            with pytest.raises(Impostor, match="somebody plays your cluster"):
                await impostor.join(token)
    assert heard == []


async def test_another_cluster_is_told_as_such() -> None:
    async with member() as cluster:
        token = await cluster.token()
    async with member(tls_of(MEMBER, ClusterId("d" * 16))) as other:
        with pytest.raises(Impostor, match="is of another cluster"):
            await other.join(token)


@pytest.mark.expected_logs("closed the connection")
@pytest.mark.parametrize("years_off", [-YEARS, YEARS])
async def test_a_clock_that_is_years_off_is_told(years_off: float) -> None:
    """Played by certificates that are of other years than ours."""
    then = time.time() + years_off
    ring = key_ring(MEMBER)
    ours = pki.found_authority(CLUSTER, then if years_off < 0 else time.time())
    ring.take(ours, (ours.certificate,), ())
    ring.certify(tls_of(MEMBER).party, ["127.0.0.1"], then)
    async with member(Tls(ring, tls_of(MEMBER).party)) as cluster:
        with pytest.raises(ClockWrong, match="set the clock first"):
            await cluster.join(await cluster.token())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"time": time.time() - 4000}, r"clock is .* s away"),
        ({"time": float("nan")}, "clock is"),
        ({"format": joining.FORMAT + 1}, "install the same version"),
        ({"cluster": "no id"}, "does not say how to join"),
        ({"time": "noon"}, "does not say how to join"),
    ],
)
async def test_a_member_that_does_not_fit_is_told(changes: dict[str, Any], told: str) -> None:
    async with member(change_info=lambda info: {**info, **changes}) as cluster:
        with pytest.raises(UserError, match=told):
            await cluster.join(await cluster.token())


async def test_who_cannot_be_reached_is_no_reason_to_give_up() -> None:
    async with member() as cluster:
        applicant = Applicant(NEW, "new", await cluster.token(), pki.new_key(), ())
        nobody = ("127.0.0.1", 9)
        with pytest.raises(Unreachable, match="refused"):
            await trio.to_thread.run_sync(joining.ask_to_join, applicant, nobody)
        async with member(tls_of(MEMBER, ClusterId("d" * 16))) as other:
            addresses = [nobody, other.address, cluster.address]
            ask = partial(joining.ask_all, applicant, addresses)
            assert (await trio.to_thread.run_sync(ask)).cluster == CLUSTER


@pytest.mark.expected_logs("closed the connection")
async def test_a_member_gets_the_authority_without_a_token_and_only_for_itself() -> None:
    async with member() as cluster:
        client = PeerClient(tls_of(NEW), "new")
        request = joining.Request(joining.FORMAT, b"", b"", NEW, b"", [])
        letter = msgspec.msgpack.encode(request)
        welcome = joining.decode_welcome(await client.fetch_letter(*cluster.address, letter))
        assert welcome.open()[0].certificate == authority().certificate
        stranger = PeerClient(tls_of(NodeId("8" * 16)), "other")
        with pytest.raises((PeerRefused, PeerUnavailable)):
            await stranger.fetch_letter(*cluster.address, letter)


@pytest.mark.parametrize(
    "request_", [{"ttl": "0s"}, {"ttl": "60d"}, {"uses": 0}, {"uses": 1 << 40}]
)
async def test_a_token_has_bounds(request_: dict[str, Any]) -> None:
    async with member() as cluster:
        with pytest.raises(UserError, match="a token"):
            await cluster.token(**request_)


def a_welcome(**fields: object) -> joining.Welcome:
    """An answer to JOIN, as large as it may be but for what is given."""
    largest = joining.Welcome(
        joining.FORMAT, CLUSTER, "n" * 256, True, b"", b"", b"", bytes(4096),
        [bytes(700)] * joining.AUTHORITIES_MAX, ["a" * 16] * joining.REVOKED_MAX,
        ["h" * 64] * joining.ENDPOINTS_MAX,
    )  # fmt: skip
    return msgspec.structs.replace(largest, **fields)


def test_an_answer_with_every_list_full_fits_a_frame_and_a_longer_one_is_refused() -> None:
    letter = msgspec.msgpack.encode(a_welcome())
    assert joining.decode_welcome(letter).revoked == ["a" * 16] * joining.REVOKED_MAX
    wire.encode(1, wire.JoinReply(letter))
    for field, limit in (
        ("revoked", joining.REVOKED_MAX),
        ("endpoints", joining.ENDPOINTS_MAX),
        ("trusted", joining.AUTHORITIES_MAX),
    ):
        value = [b"x" if field == "trusted" else "x"] * (limit + 1)
        with pytest.raises(ProtocolError):
            joining.decode_welcome(msgspec.msgpack.encode(a_welcome(**{field: value})))
