"""One peer, as seen by the client: its connections, and one request at a time on each of them.

Liveness belongs to the peer and not to the request: `Link.heard_at` is when the last byte came
from it on any connection. A request gives up when the peer as a whole has been silent for the
request's patience while it waited. So a peer that is busy sending other chunks is never given up,
and one that died is noticed by all its requests at the same moment. (A request also has
bounds of its own: STALL_SECONDS, for a peer that lives but whose disk does not, and a time by which
each step must be through, for one of which a byte comes now and then.)

Silence is what a thread has listened to. Where this machine stood still, or the thread was not
scheduled, nobody listened, and the peer may have answered: of the time between two looks at the
connection no more than LOOK_SECONDS_MAX counts.

A `Conversation` runs on a worker thread and may be abandoned from another thread: its connection
is shut down, which ends whatever system call it is in. A connection goes back to the pool only
when a reply has been taken to its last byte.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from modelfs import wire
from modelfs.chunk import Buffer
from modelfs.errors import PeerUnavailable, ProtocolError
from modelfs.ids import NodeId
from modelfs.limits import BYTES_PER_SECOND_MIN, CONNECT_SECONDS
from modelfsd.peers.frame_channel import FrameChannel
from modelfsd.peers.secure_channel import SecureChannel
from modelfsd.trust.tls import Tls, TlsFailed

WAIT_SECONDS = 0.1  # how often a blocked call looks whether the peer still lives
LOOK_SECONDS_MAX = 2 * WAIT_SECONDS
STALL_SECONDS = 60.0  # without a byte on its own connection a request ends, however lively the peer
GREETING_SECONDS = 10.0  # for a handshake and a hello; a server gives a client 5
BUSY_SECONDS = 0.3  # before a peer that has no room is asked again
ANSWER_SECONDS = 120.0  # for a reply's header: twice `session.WORKING_SECONDS_MAX`
PAYLOAD_SECONDS = 60.0  # besides its due at BYTES_PER_SECOND_MIN; what is under way counts too

T = TypeVar("T")


class PeerSilent(TimeoutError):
    """No byte came from the peer on any connection for as long as the request would wait."""


class PeerBusy(PeerUnavailable):
    """All connections that the peer allows are in use."""


class Abandoned(ConnectionAbortedError):
    """Nobody waits for this conversation any more."""


@dataclass(slots=True)
class Connection:
    """A connection whose hellos have been exchanged."""

    channel: SecureChannel
    hello: wire.Hello
    generation: int  # of `Tls`, when it was made
    requests: int = 0  # the id of the last request
    in_step: bool = True  # False from a request's first byte to its reply's last


class Link:
    """The connections to one peer. Safe to use from many threads."""

    def __init__(
        self, node: NodeId, tls: Tls, name: str, host: str, port: int, is_any: bool = False
    ) -> None:
        """`is_any`: whichever node of the cluster is at that address."""
        self.node, self._tls, self._name = node, tls, name
        self.host, self.port, self._is_any = host, port, is_any
        self.heard_at = self.failed_at = float("-inf")
        self.bytes_in = self.bytes_out = 0  # of the connections that have ended
        self.connects = self.failures = 0
        self._lock = threading.Lock()
        # Last in, first out, so that spares grow old; in TLS, and those that have left it.
        self._idle: tuple[list[Connection], list[Connection]] = ([], [])
        self._in_use: set[FrameChannel] = set()
        self._is_closed = False

    def take(self, is_bulk: bool) -> Connection | None:
        """An idle connection, if there is one. Bulk goes in the clear where the cluster says so."""
        with self._lock:
            idle = self._idle[is_bulk and not self._tls.data_tls]
            if not idle:
                return None
            connection = idle.pop()
            self._in_use.add(connection.channel)
            return connection

    def connect(
        self, check: Callable[[FrameChannel], Callable[[], None]], is_bulk: bool
    ) -> Connection:
        """A fresh connection. Raises OSError, ProtocolError, PeerUnavailable (a wrong peer)."""
        try:
            connection = socket.create_connection((self.host, self.port), CONNECT_SECONDS)
        except OSError:
            self.fail()
            raise
        generation, context = self._tls.generation, self._tls.client
        channel = SecureChannel(connection, WAIT_SECONDS, context, False, self._hear)
        with self._lock:
            self.connects += 1
            self._in_use.add(channel)
            if self._is_closed:
                channel.shut_down()
        try:
            plain = is_bulk and not self._tls.data_tls
            return Connection(channel, self._greet(channel, check(channel), plain), generation)
        except BaseException:
            self.drop(channel)
            raise

    def give_back(self, connection: Connection) -> None:
        """Keep a connection for the next request."""
        with self._lock:
            self._in_use.discard(connection.channel)
            if not self._is_closed and connection.generation == self._tls.generation:
                self._idle[connection.channel.is_plain].append(connection)
                return
        self.drop(connection.channel)

    def drop(self, channel: FrameChannel) -> None:
        """Close a connection that this thread uses."""
        with self._lock:
            self._in_use.discard(channel)
            self.bytes_in += channel.bytes_in
            self.bytes_out += channel.bytes_out
        channel.close()

    def drop_idle(self) -> None:
        """Close the connections that nobody uses: the peer has restarted, or moved."""
        with self._lock:
            idle, self._idle = [*self._idle[0], *self._idle[1]], ([], [])
        for connection in idle:
            self.drop(connection.channel)

    def close(self) -> None:
        """End every connection, in use or not."""
        with self._lock:
            self._is_closed = True
            for channel in self._in_use:
                channel.shut_down()
        self.drop_idle()

    def fail(self) -> None:
        """Note that the peer as a whole does not answer."""
        self.failed_at = time.monotonic()
        self.failures += 1
        self.drop_idle()

    def is_down_since(self, start: float) -> bool:
        """Whether the peer has failed since `start` and has not been heard again."""
        return self.failed_at > max(start, self.heard_at)

    def traffic(self) -> tuple[int, int]:
        """Bytes in and out, over all connections."""
        with self._lock:
            idle = [*self._idle[0], *self._idle[1]]
            channels = [*self._in_use, *(connection.channel for connection in idle)]
            return (
                self.bytes_in + sum(channel.bytes_in for channel in channels),
                self.bytes_out + sum(channel.bytes_out for channel in channels),
            )

    def _hear(self) -> None:
        self.heard_at = time.monotonic()

    def _greet(self, channel: SecureChannel, check: Callable[[], None], plain: bool) -> wire.Hello:
        ours = self._tls.party
        party = channel.handshake(check)
        if party is None or party.cluster != ours.cluster:
            raise PeerUnavailable(self.node, f"{self.host}:{self.port} is of another cluster")
        if party.node in self._tls.refused:
            raise PeerUnavailable(self.node, "it was removed from the cluster")
        hello = wire.Hello(
            wire.VERSION_MIN, wire.VERSION_MAX, ours.cluster, ours.node, self._name, "", plain
        )
        channel.send([wire.encode(0, hello)], check)
        frame = channel.next_frame(check)
        if frame is None:
            raise ConnectionResetError("it closed the connection instead of a greeting")
        theirs = frame.message
        if isinstance(theirs, wire.Failure):
            is_busy = theirs.kind is wire.FailureKind.UNAVAILABLE
            raise (PeerBusy if is_busy else PeerUnavailable)(self.node, theirs.text)
        if not isinstance(theirs, wire.Hello):
            raise ProtocolError(f"{type(theirs).__name__} instead of a greeting")
        wire.negotiate(theirs)
        if theirs.cluster != party.cluster or theirs.node != party.node:
            raise PeerUnavailable(self.node, f"it shows the certificate of node {party.node}")
        if party.node != self.node and not self._is_any:
            raise PeerUnavailable(self.node, f"{self.host}:{self.port} is node {party.node}")
        if theirs.plain:
            channel.go_plain(check)
        return theirs


class Conversation(Generic[T]):
    """One request and its reply, on a worker thread."""

    def __init__(
        self,
        link: Link,
        patience: float,
        exchange: Callable[[Conversation[T]], T],
        is_bulk: bool = False,
    ) -> None:
        self.link = link
        self._is_bulk = is_bulk
        self.connection: Connection | None = None
        self._patience = patience
        self._exchange = exchange
        self._lock = threading.Lock()
        self._channel: FrameChannel | None = None
        self._is_abandoned = False
        self._progress_at = self._looked_at = self._due_at = 0.0
        self._listened_seconds = 0.0  # since the last progress
        self._bytes_moved = 0

    def run(self) -> T:
        """Carry it out; raises PeerUnavailable for whatever goes wrong with the peer.

        A connection from the pool may have been closed by a peer that restarted. If it breaks
        before the first byte of an answer, the request is made once more on a fresh one; all
        requests may safely be made twice.
        """
        link = self.link
        pooled = link.take(self._is_bulk)
        try:
            if pooled is not None:
                heard_bytes = pooled.channel.bytes_in
                try:
                    return self._attempt(pooled)
                except ConnectionError:
                    if self._is_abandoned or pooled.channel.bytes_in != heard_bytes:
                        raise
                    link.drop_idle()
            return self._attempt(self._connect())
        except TlsFailed as error:
            raise PeerUnavailable(link.node, f"{error} ({link.host}:{link.port})") from error
        except ProtocolError as error:
            raise PeerUnavailable(link.node, f"it sent nonsense: {error}") from error
        except OSError as error:
            if isinstance(error, PeerSilent):
                link.fail()
            reason = error.strerror or str(error) or type(error).__name__
            raise PeerUnavailable(link.node, f"{reason} ({link.host}:{link.port})") from error

    def _connect(self) -> Connection:
        """A fresh connection. Where the peer has no room for it, it may have in a moment."""
        give_up_at = time.monotonic() + self._patience
        while True:
            try:
                return self.link.connect(self._watch, self._is_bulk)
            except PeerBusy:
                if self._is_abandoned or time.monotonic() + BUSY_SECONDS > give_up_at:
                    raise
                time.sleep(BUSY_SECONDS)

    def abandon(self) -> None:
        """End the conversation, from another thread. No effect after its end."""
        with self._lock:
            self._is_abandoned = True
            if self._channel is not None:
                self._channel.shut_down()

    def ask(self, message: wire.Request, payload: Buffer = b"") -> wire.Frame:
        """Send a request and wait for its reply, of which only the payload is still to come."""
        connection = self._connected()
        channel = connection.channel
        connection.requests += 1
        connection.in_step = False
        self._allow(ANSWER_SECONDS, len(payload))
        header = wire.encode(connection.requests, message, len(payload))
        channel.send([header, payload], self._check)
        while True:
            frame = channel.next_frame(self._check)
            if frame is None:
                raise ConnectionResetError("it closed the connection")
            if frame.request != connection.requests:
                raise ProtocolError(f"a reply to request {frame.request}, which is not open")
            if not isinstance(frame.message, wire.Working):
                connection.in_step = frame.payload_bytes == 0
                return frame

    def receive_payload(self, into: memoryview) -> None:
        """Take the reply's payload."""
        connection = self._connected()
        self._allow(PAYLOAD_SECONDS, len(into))
        connection.channel.receive_payload(into, self._check)
        connection.in_step = True

    def _connected(self) -> Connection:
        assert self.connection is not None
        return self.connection

    def _attempt(self, connection: Connection) -> T:
        channel = connection.channel
        self._watch(channel)
        self.connection = connection
        try:
            return self._exchange(self)
        finally:
            with self._lock:
                self._channel = None
                is_reusable = connection.in_step and not self._is_abandoned
            if is_reusable:
                self.link.give_back(connection)
            else:
                self.link.drop(channel)

    def _watch(self, channel: FrameChannel) -> Callable[[], None]:
        """From now on this channel is the one to shut down; returns the check for its calls."""
        with self._lock:
            self._channel = channel
            self._bytes_moved = channel.bytes_in + channel.bytes_out
            self._progress_at = self._looked_at = time.monotonic()
            self._listened_seconds = 0.0
            self._allow(GREETING_SECONDS)
            if self._is_abandoned:
                channel.shut_down()
        return self._check

    def _allow(self, seconds: float, size: int = 0) -> None:
        """Have the step that begins now end by then."""
        self._due_at = time.monotonic() + seconds + size / BYTES_PER_SECOND_MIN

    def _check(self) -> None:
        """Raise if nobody waits any more, or if the peer is silent or slow beyond measure."""
        if self._is_abandoned:
            raise Abandoned("nobody waits for it any more")
        now = time.monotonic()
        channel = self._channel
        moved = channel.bytes_in + channel.bytes_out if channel is not None else 0
        if moved != self._bytes_moved:
            # Sending counts: a full window opens only when the peer has acknowledged something.
            self._bytes_moved = moved
            self._progress_at = self._looked_at = now
            self._listened_seconds = 0.0
        if self.link.heard_at > self._looked_at:  # on another connection
            self._listened_seconds = 0.0
        self._listened_seconds += min(now - self._looked_at, LOOK_SECONDS_MAX)
        self._looked_at = now
        silence = min(now - max(self.link.heard_at, self._progress_at), self._listened_seconds)
        if silence > self._patience:
            raise PeerSilent(f"silent for {silence:.1f} s")
        if now - self._progress_at > STALL_SECONDS:
            raise TimeoutError(f"this request got no answer for {STALL_SECONDS:.0f} s")
        if now > self._due_at:
            raise TimeoutError("its answer took too long")
