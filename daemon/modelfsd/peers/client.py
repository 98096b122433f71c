"""Conversations with the other nodes' chunk stores: `PeerTransport` over the peer protocol.

Each request runs on a worker thread over one of a few persistent connections
(`modelfsd.peers.link`); verification happens there too, so trio's thread never touches bulk bytes.
A cancelled request returns at once; its connection is dropped, and its thread ends by itself.

To one peer there are at most `limits.CONNECTIONS_PER_PEER` requests under way, and all but one of
those may be writes, so that a receiver's slow fsyncs never keep a reader from asking. Who waits
for its turn is subject to the same rule as who waits for an answer: if the peer fails, it hears so
at once instead of finding out for itself.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import trio

from modelfs import wire
from modelfs.chunk import Buffer, ChunkRef
from modelfs.errors import (
    ChunkMissing,
    CorruptChunk,
    PeerUnavailable,
)
from modelfs.ids import ChunkId, NodeId
from modelfs.limits import (
    CONNECTIONS_PER_PEER,
    HAS_CHUNKS_MAX,
    PEER_PATIENCE_SECONDS,
    PEER_SILENCE_SECONDS,
    PUT_PATIENCE_SECONDS,
)
from modelfsd.peers.link import Conversation, Link
from modelfsd.peers.requests import (
    expect_ok,
    fetch_range,
    has_chunks,
    put_chunk,
    raise_failure,
)
from modelfsd.stages import note
from modelfsd.trust.tls import Tls

THREADS_MAX = 128  # 32 peers with all their connections busy
LATENCY_SECONDS_MIN = 0.0005  # of a peer that was never asked, so that its queue counts
WRITES_PER_PEER = CONNECTIONS_PER_PEER - 1
LATENCY_WEIGHT = 0.2  # of the newest fetch in the moving average: the last ten or so count

assert WRITES_PER_PEER >= 1

T = TypeVar("T")
Exchange = Callable[[Conversation[T]], T]


@dataclass(frozen=True, slots=True)
class PeerStatistics:
    """What has passed between this node and one peer."""

    address: str
    inflight: int
    latency_seconds: float
    bytes_in: int
    bytes_out: int
    connects: int
    failures: int  # how often it did not answer


class _Peer:
    """A link with what only trio's thread touches."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.slots = trio.CapacityLimiter(CONNECTIONS_PER_PEER)
        self.write_slots = trio.CapacityLimiter(WRITES_PER_PEER)
        self.inflight = 0
        self.latency_seconds = 0.0

    def note_fetch(self, seconds: float) -> None:
        if self.latency_seconds:
            seconds = LATENCY_WEIGHT * seconds + (1 - LATENCY_WEIGHT) * self.latency_seconds
        self.latency_seconds = seconds


class PeerClient:
    """Implements `modelfs.ports.PeerTransport`. All methods belong to trio's thread."""

    def __init__(self, tls: Tls, name: str) -> None:
        self._tls, self._name = tls, name
        self._peers: dict[NodeId, _Peer] = {}
        self._threads = trio.CapacityLimiter(THREADS_MAX)

    # ------------------------------------------------------------ who is where

    def set_address(self, node: NodeId, host: str, port: int) -> None:
        """Say where a peer is to be found. Requests under way go on."""
        peer = self._peers.get(node)
        if peer is None:
            self._peers[node] = _Peer(Link(node, self._tls, self._name, host, port))
        elif (peer.link.host, peer.link.port) != (host, port):
            peer.link.host, peer.link.port = host, port
            peer.link.drop_idle()

    def forget(self, node: NodeId) -> None:
        """Close every connection to a peer; requests under way raise PeerUnavailable."""
        peer = self._peers.pop(node, None)
        if peer is not None:
            peer.link.close()

    def close(self) -> None:
        """Forget every peer."""
        for node in list(self._peers):
            self.forget(node)

    def drop_idle(self) -> None:
        """Use none of the connections again that are open now and not in use."""
        for peer in self._peers.values():
            peer.link.drop_idle()

    def latency(self, node: NodeId) -> float:
        """A moving average of how long fetches took, in seconds; 0.0 if none was made."""
        peer = self._peers.get(node)
        return peer.latency_seconds if peer else 0.0

    def inflight(self, node: NodeId) -> int:
        """How many requests to this peer are under way or wait for their turn."""
        peer = self._peers.get(node)
        return peer.inflight if peer else 0

    def load(self, node: NodeId) -> float:
        """See `PeerTransport.load`. A peer that was never asked is worth a try."""
        peer = self._peers.get(node)
        if peer is None:
            return float("inf")
        return max(peer.latency_seconds, LATENCY_SECONDS_MIN) * (1 + peer.inflight)

    def statistics(self) -> Mapping[NodeId, PeerStatistics]:
        """A snapshot for every known peer."""
        return {
            node: PeerStatistics(
                f"{peer.link.host}:{peer.link.port}",
                peer.inflight,
                peer.latency_seconds,
                *peer.link.traffic(),
                peer.link.connects,
                peer.link.failures,
            )
            for node, peer in self._peers.items()
        }

    # ------------------------------------------------------------ the port

    async def fetch(
        self, node: NodeId, ref: ChunkRef, offset: int, size: int, patience: float
    ) -> memoryview:
        """See `PeerTransport.fetch`."""
        peer = self._peer(node)
        started = time.monotonic()
        answered = False
        try:
            data = await self._converse(
                peer, patience, lambda talk: fetch_range(talk, ref, offset, size), is_bulk=True
            )
            answered = True
            return data
        except (ChunkMissing, CorruptChunk):
            answered = True
            raise
        finally:
            seconds = time.monotonic() - started
            # A fetch that failed, or lost against another replica, took at least this long.
            if answered or seconds > peer.latency_seconds:
                peer.note_fetch(seconds)

    async def put(
        self,
        node: NodeId,
        ref: ChunkRef,
        table: Buffer,
        data: Buffer,
        offer: bool = False,
    ) -> bool:
        """See `PeerTransport.put`."""
        assert len(data) == ref.length
        peer, patience = self._peer(node), PUT_PATIENCE_SECONDS
        message = wire.Put(ref.id, ref.checksum, ref.length, bytes(table))
        asking = Conversation(
            peer.link, PEER_PATIENCE_SECONDS, lambda talk: has_chunks(talk, [ref.id])
        )
        putting = Conversation(
            peer.link, patience, lambda talk: put_chunk(talk, message, data), True
        )

        def run() -> bool:
            if offer and asking.run()[0]:
                return False
            putting.run()
            return True

        return await self._carry_out(peer, patience, run, (asking, putting), is_write=True)

    async def sync(self, node: NodeId, incarnation: str | None = None) -> None:
        """See `PeerTransport.sync`."""

        def exchange(talk: Conversation[None]) -> None:
            assert talk.connection is not None
            if incarnation is not None and talk.connection.hello.incarnation != incarnation:
                raise PeerUnavailable(node, "it has restarted since the chunks were put")
            expect_ok(talk, wire.Sync())

        await self._converse(self._peer(node), PUT_PATIENCE_SECONDS, exchange, is_write=True)

    async def incarnation(self, node: NodeId) -> str:
        """See `PeerTransport.incarnation`."""

        def exchange(talk: Conversation[str]) -> str:
            expect_ok(talk, wire.Ping())
            assert talk.connection is not None
            return talk.connection.hello.incarnation

        return await self._converse(self._peer(node), PEER_PATIENCE_SECONDS, exchange)

    async def has(self, node: NodeId, chunks: Sequence[ChunkId], renew: bool) -> list[bool]:
        """See `PeerTransport.has`."""
        peer = self._peer(node)
        found: list[bool] = []
        for start in range(0, len(chunks), HAS_CHUNKS_MAX):
            some = chunks[start : start + HAS_CHUNKS_MAX]

            exchange = partial(has_chunks, chunks=some, renew=renew)
            found += await self._converse(peer, PEER_PATIENCE_SECONDS, exchange)
        return found

    async def report_damage(self, node: NodeId, ref: ChunkRef) -> None:
        """See `PeerTransport.report_damage`."""
        message = wire.Damage(ref.id, ref.checksum, ref.length)
        await self._converse(
            self._peer(node),
            PEER_PATIENCE_SECONDS,
            lambda talk: expect_ok(talk, message, chunk=ref.id),
        )

    async def ping(self, node: NodeId, patience: float = PEER_SILENCE_SECONDS) -> float:
        """Ask for a sign of life; returns the round trip in seconds. Raises PeerUnavailable."""
        started = time.monotonic()
        await self._converse(self._peer(node), patience, lambda talk: expect_ok(talk, wire.Ping()))
        return time.monotonic() - started

    async def fetch_info(self, host: str, port: int) -> dict[str, Any]:
        """What the node of our cluster at an address tells a member.

        Raises PeerUnavailable, with the address in place of a node id.
        """

        def exchange(talk: Conversation[dict[str, Any]]) -> dict[str, Any]:
            reply = talk.ask(wire.Info()).message
            if not isinstance(reply, wire.InfoReply):
                raise_failure(talk, reply)
            return reply.info

        return await self._ask_address(host, port, exchange)

    async def fetch_letter(self, host: str, port: int, request: bytes) -> bytes:
        """What a member at an address answers to our JOIN. Raises PeerUnavailable, PeerRefused."""

        def exchange(talk: Conversation[bytes]) -> bytes:
            reply = talk.ask(wire.Join(request)).message
            if not isinstance(reply, wire.JoinReply):
                raise_failure(talk, reply)
            return reply.answer

        return await self._ask_address(host, port, exchange)

    # ------------------------------------------------------------ inside

    def _peer(self, node: NodeId) -> _Peer:
        peer = self._peers.get(node)
        if peer is None:
            raise PeerUnavailable(node, "its address is not known")
        return peer

    async def _ask_address(self, host: str, port: int, exchange: Exchange[T]) -> T:
        node = NodeId(f"{host}:{port}")
        peer = _Peer(Link(node, self._tls, self._name, host, port, is_any=True))
        try:
            return await self._converse(peer, PEER_PATIENCE_SECONDS, exchange)
        finally:
            peer.link.close()

    async def _converse(
        self,
        peer: _Peer,
        patience: float,
        exchange: Exchange[T],
        is_write: bool = False,
        is_bulk: bool = False,
    ) -> T:
        talk = Conversation(peer.link, patience, exchange, is_bulk)
        return await self._carry_out(peer, patience, talk.run, (talk,), is_write)

    async def _carry_out(
        self,
        peer: _Peer,
        patience: float,
        run: Callable[[], T],
        talks: Sequence[Conversation[Any]],
        is_write: bool = False,
    ) -> T:
        """Have `run` carry out conversations, on a worker thread, when it is their turn."""
        peer.inflight += 1
        try:
            async with _turn(peer, patience, is_write):
                try:
                    return await trio.to_thread.run_sync(
                        run, abandon_on_cancel=True, limiter=self._threads
                    )
                finally:
                    for talk in talks:
                        talk.abandon()
        finally:
            peer.inflight -= 1


async def ask_member(tls: Tls, host: str, port: int) -> dict[str, Any]:
    """What a member at an address says, before there is a node to ask for it."""
    client = PeerClient(tls, "")
    try:
        return await client.fetch_info(host, port)
    finally:
        client.close()


@asynccontextmanager
async def _turn(peer: _Peer, patience: float, is_write: bool) -> AsyncIterator[None]:
    """Wait for one of the peer's slots, as long as the peer lives."""
    link, started, borrower = peer.link, time.monotonic(), object()
    limiters = (peer.write_slots, peer.slots) if is_write else (peer.slots,)
    held: list[trio.CapacityLimiter] = []
    try:
        for limiter in limiters:
            while limiter not in held:
                silence = time.monotonic() - max(link.heard_at, started)
                if silence > patience:
                    raise PeerUnavailable(link.node, f"silent for {silence:.1f} s")
                with trio.move_on_after(patience - silence):
                    await limiter.acquire_on_behalf_of(borrower)
                    held.append(limiter)
        note("peer_queue", time.monotonic() - started)
        if link.is_down_since(started):
            raise PeerUnavailable(link.node, "it did not answer the requests before this one")
        yield
    finally:
        for limiter in reversed(held):
            limiter.release_on_behalf_of(borrower)
