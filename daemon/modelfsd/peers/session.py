"""One connection of a peer, at the server: TLS, hello, then requests in order (`modelfs.wire`).

Rule 0: who shows no certificate may ask INFO and JOIN; who shows one is who it says, or is refused.

Rule 1: a malformed frame, a stall or an end of the stream ends this connection and nothing else.
Rule 2: what the store raises becomes a FAILURE frame, and the connection goes on.
Rule 3: `_working` is set while no reply is being written, and only then: the server's pulse thread
sends WORKING frames inside that span, so that they never fall into another frame.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from modelfs import wire
from modelfs.chunk import (
    ChunkRef,
    covering_blocks,
    is_range_valid,
    is_table_valid,
    table_checksum,
)
from modelfs.errors import ChunkMissing, CorruptChunk, ModelfsError, OutOfSpace, ProtocolError
from modelfs.ids import ChunkId, NodeId
from modelfs.limits import BYTES_PER_SECOND_MIN, MIB
from modelfs.ports import ChunkStore, Holding, OpenChunk
from modelfs.wire import FailureKind
from modelfsd.buffers import BufferPool
from modelfsd.peers.secure_channel import SecureChannel
from modelfsd.stages import timed
from modelfsd.storage.chunk_file import DAMAGE_ERRNOS
from modelfsd.trust.tls import Tls
from modelfsd.trust.tokens import TokenRefused

log = logging.getLogger(__name__)

WAIT_SECONDS = 1.0  # how often a blocked call looks at its deadline
HELLO_SECONDS = 5.0  # a stranger who says nothing is gone by then
IDLE_SECONDS = 120.0  # a client opens another connection when it needs one
STRANGER_SECONDS = 10.0  # who may only ask for INFO or JOIN has no reason to wait
FRAME_SECONDS = 10.0  # for a header, and for a payload besides its due at the rate below
PULSE_SECONDS = 0.1  # a request that takes longer is answered by WORKING frames meanwhile
WORKING_SECONDS_MAX = 60.0  # ... but not for ever: a disk that takes longer is as good as dead
RECEIVE_BYTES_MAX = 256 * MIB  # all puts under way together
FOR_STRANGERS = wire.Info | wire.Join
BULK = wire.Get | wire.Put  # what may go in the clear
READAHEAD_BYTES_MIN = 256 << 10  # below that the kernel's own readahead does as well


class AdmissionFailed(ModelfsError):
    """Nobody can be let in just now."""


class DiskFailed(ModelfsError):
    """The store raised OSError: told apart here from an OSError of the socket."""


@dataclass
class PeerService:
    """What all connections of one server share."""

    store: ChunkStore
    tls: Tls
    name: str
    incarnation: str
    info: Callable[[bool], dict[str, Any]]
    admit: Callable[[bytes, NodeId | None], bytes]
    on_damage: Callable[[ChunkRef], None]
    pool: BufferPool = field(default_factory=lambda: BufferPool(RECEIVE_BYTES_MAX))
    requests: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    verifying: set[ChunkId] = field(default_factory=set)

    def judge(self, ref: ChunkRef) -> None:
        """Verify our copy; if it is bad the store has quarantined it, and the node hears of it."""
        with self.lock:
            if ref.id in self.verifying:
                return
            self.verifying.add(ref.id)
        try:
            if self.store.verify(ref.id):
                return
        finally:
            with self.lock:
                self.verifying.discard(ref.id)
        self.on_damage(ref)


class PeerSession:
    """Serves one connection on a thread of its own."""

    def __init__(
        self,
        service: PeerService,
        connection: socket.socket,
        host: str,
        address: str,
        settle: Callable[[PeerSession], str],
        is_wanted: Callable[[PeerSession], bool],
    ) -> None:
        """`settle` makes room for one that has proved to belong, or says why there is none;
        `is_wanted` says whether somebody waits for the place of one that has been served.
        """
        self.host, self.address = host, address  # the latter with its port
        self.generation = service.tls.generation
        self.channel = SecureChannel(connection, WAIT_SECONDS, service.tls.server, True)
        self.peer: NodeId | None = None  # who has proved to be at the other end
        self.idle_since: float | None = None  # since when one with proof has asked for nothing
        self.has_place = False  # one of those for who has proved to belong
        self.was_served = self.is_leaving = False
        self._service, self._settle, self._is_wanted = service, settle, is_wanted
        self._is_member = False
        self._deadline = time.monotonic() + HELLO_SECONDS
        self._frame_begun = False
        self._lock = threading.Lock()
        self._working: tuple[int, float] | None = None  # request id, since when

    def run(self) -> None:
        """Serve until the peer leaves. Raises ProtocolError and OSError (TimeoutError is one)."""
        if not self._greet():
            return
        while True:
            self._frame_begun = False
            idle_seconds = IDLE_SECONDS if self._is_member else STRANGER_SECONDS
            self._deadline = time.monotonic() + idle_seconds
            self.idle_since = time.monotonic() if self.peer is not None else None
            if self.is_leaving or self.generation != self._service.tls.generation:
                return
            try:
                frame = self.channel.next_frame(self._check_incoming)
            except TimeoutError:
                if self._is_member and not self._frame_begun:
                    return  # a spare connection that nobody needed for long
                raise
            self.idle_since = None
            if frame is None:
                return
            kind = type(frame.message).__name__.lower()
            with self._service.lock:
                self._service.requests[kind] += 1
            allowed = BULK if self.channel.is_plain else None if self._is_member else FOR_STRANGERS
            if allowed is not None and not isinstance(frame.message, allowed):
                whom = "connections in TLS" if self._is_member else "members of the cluster"
                text = f"{kind} is for {whom}"
                self._reply(frame.request, self._failure(FailureKind.REFUSED, text))
                return
            self._serve(frame)
            self.was_served = True
            if self.peer is not None and self._is_wanted(self):
                return

    def leave(self) -> None:
        """End with the request in hand, or now. The client has another one if it asks again."""
        self.is_leaving = True
        if self.idle_since is not None:
            self.channel.shut_down()

    def pulse(self, now: float) -> None:
        """Tell the client that its request is being worked on. For the server's pulse thread."""
        with self._lock:
            if self._working and PULSE_SECONDS <= now - self._working[1] <= WORKING_SECONDS_MAX:
                self.channel.try_send(wire.encode(self._working[0], wire.Working()))

    # ------------------------------------------------------------ inside

    def _greet(self) -> bool:
        """Exchange proofs and hellos. False if the peer has gone or is not one to talk to."""
        party = self.channel.handshake(self._check)
        if party is not None and party.cluster == self._service.tls.party.cluster:
            self.peer = party.node  # before the check below: see `PeerServer.refuse`
        frame = self.channel.next_frame(self._check)
        if frame is None:
            return False
        theirs = frame.message
        if not isinstance(theirs, wire.Hello):
            raise ProtocolError(f"{type(theirs).__name__} before HELLO")
        service, ours = self._service, self._service.tls.party
        refusal: wire.Failure | None = None
        try:
            wire.negotiate(theirs)
        except ProtocolError as error:
            refusal = self._failure(FailureKind.VERSION, str(error))
        if theirs.cluster and theirs.cluster != ours.cluster:
            refusal = self._failure(
                FailureKind.WRONG_CLUSTER,
                f"node {ours.node} ({service.name}) belongs to cluster {ours.cluster}, "
                f"not to {theirs.cluster}",
            )
        elif theirs.cluster and theirs.node != self.peer:
            shown = f"shows the certificate of {self.peer}" if self.peer else "shows no certificate"
            text = f"who calls itself node {theirs.node} {shown}"
            refusal = self._failure(FailureKind.REFUSED, text)
        elif self.peer in service.tls.refused:
            text = f"node {self.peer} was removed from the cluster"
            refusal = self._failure(FailureKind.REFUSED, text)
        elif self.peer is not None and (obstacle := self._settle(self)):
            refusal = self._failure(FailureKind.UNAVAILABLE, obstacle)
        self._is_member = self.peer is not None and bool(theirs.cluster)
        plain = theirs.plain and self._is_member and not service.tls.data_tls
        hello = wire.Hello(
            wire.VERSION_MIN,
            wire.VERSION_MAX,
            ours.cluster,
            ours.node,
            service.name,
            service.incarnation,
            plain,
        )
        self._reply(frame.request, refusal or hello)
        if refusal is not None:
            raise ProtocolError(f"refused: {refusal.text}")
        if plain:
            self.channel.go_plain(self._check)
        return True

    def _serve(self, frame: wire.Frame) -> None:
        """Answer one request."""
        message, request = frame.message, frame.request
        reply: wire.Reply | None
        try:
            if isinstance(message, wire.Get):
                with timed("serve"):
                    reply = self._get(message, request)
            else:
                with self._at_work(request):
                    reply = self._do(message)
        except ChunkMissing as error:
            reply = self._failure(FailureKind.MISSING, str(error))
        except CorruptChunk as error:
            reply = self._failure(FailureKind.CORRUPT, str(error))
        except OutOfSpace as error:
            reply = self._failure(FailureKind.NO_SPACE, str(error))
        except AdmissionFailed as error:
            reply = self._failure(FailureKind.UNAVAILABLE, str(error))
        except TokenRefused as error:
            log.warning("%s was not let in: %s", self.address, error)
            reply = self._failure(FailureKind.REFUSED, str(error))
        except DiskFailed as error:
            log.error("a request of %s failed: %s", self.address, error)
            reply = self._failure(FailureKind.REFUSED, str(error))
        if reply is not None:
            self._reply(request, reply)

    def _do(self, message: wire.Message) -> wire.Reply:
        """Every request but GET, which has a reply of its own shape."""
        service = self._service
        match message:
            case wire.Put():
                self._put(message)
            case wire.Sync():
                with _disk_errors():
                    service.store.sync()
            case wire.Has():
                with _disk_errors():
                    found = service.store.has(wire.unpack_ids(message), message.renew)
                return wire.HasReply(wire.pack_bits(found))
            case wire.Damage():
                with _disk_errors():
                    service.judge(wire.chunk_ref(message))
            case wire.Info():
                return wire.InfoReply(service.info(self._is_member))
            case wire.Join():
                return wire.JoinReply(service.admit(message.request, self.peer))
            case wire.Ping():
                pass
            case _:
                raise ProtocolError(f"{type(message).__name__} is not a request")
        return wire.Ok()

    def _get(self, message: wire.Get, request: int) -> wire.Reply | None:
        """Send a range of a chunk; the reply if that cannot be."""
        chunk = ChunkId(message.chunk)
        with self._at_work(request), _disk_errors():
            opened = self._service.store.open(chunk)
        try:
            if message.offset + message.size > opened.length:
                text = f"the chunk has {opened.length} bytes here"
                return self._failure(FailureKind.CORRUPT, text)
            start, end = covering_blocks(opened.length, message.offset, message.size)
            if end - start >= READAHEAD_BYTES_MIN:
                os.posix_fadvise(opened.fd, start, end - start, os.POSIX_FADV_WILLNEED)
            header = wire.encode(
                request, wire.GetReply(opened.length, opened.table), payload_bytes=end - start
            )
            self._allow(end - start)
            self.channel.send([header], self._check, more=True)
            self._send_file(chunk, opened, start, end)
        finally:
            os.close(opened.fd)
        return None

    def _send_file(self, chunk: ChunkId, opened: OpenChunk, start: int, end: int) -> None:
        try:
            self.channel.send_file(opened.fd, start, end, self._check)
        except OSError as error:
            if error.errno not in DAMAGE_ERRNOS:
                raise
            # A bad sector. The frame cannot be finished, so the connection ends; the client
            # reads another replica, and ours is judged without waiting for anybody's report.
            ref = ChunkRef(chunk, table_checksum(opened.table), opened.length)
            with suppress(ChunkMissing, OSError):
                self._service.judge(ref)
            raise ConnectionAbortedError(f"chunk {chunk.hex()} cannot be read: {error}") from error

    def _put(self, message: wire.Put) -> None:
        service, ref = self._service, wire.chunk_ref(message)
        with service.pool.borrow(ref.length) as data:
            self._allow(ref.length)
            self.channel.receive_payload(data, self._check)
            with timed("verify"):
                is_good = is_table_valid(ref, message.table)
                is_good = is_good and is_range_valid(message.table, 0, data)
            if not is_good:
                raise CorruptChunk(ref.id, f"the way from {self.address}")
            with _disk_errors():
                service.store.put(ref, message.table, data, Holding.OWNED)

    @contextmanager
    def _at_work(self, request: int) -> Iterator[None]:
        """The span in which WORKING frames may be sent."""
        with self._lock:
            self._working = (request, time.monotonic())
        try:
            yield
        finally:
            with self._lock:
                self._working = None

    def _reply(self, request: int, reply: wire.Reply) -> None:
        self._allow(0)
        self.channel.send([wire.encode(request, reply)], self._check)

    def _failure(self, kind: FailureKind, text: str) -> wire.Failure:
        with self._service.lock:
            self._service.failures[kind.value] += 1
        return wire.failure(kind, text)

    def _allow(self, size: int) -> None:
        self._deadline = time.monotonic() + FRAME_SECONDS + size / BYTES_PER_SECOND_MIN

    def _check(self) -> None:
        if time.monotonic() > self._deadline:
            raise TimeoutError("the peer took too long")

    def _check_incoming(self) -> None:
        """Idleness is allowed between frames only: from its first byte on, a frame has to come."""
        if not self._frame_begun and not self.channel.reader.is_between_frames:
            self._frame_begun, self.idle_since = True, None
            self._allow(0)
        self._check()


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskFailed(f"the disk failed: {error}") from error
