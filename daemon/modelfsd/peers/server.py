"""Serves this node's chunks to its peers: plain threads over blocking sockets.

One thread accepts, one pulses, and each connection has its own (`modelfsd.peers.session`). Who has
proved to belong gets one of `limits.CONNECTIONS_MAX`, for which the one that has been idle for
longest makes room: in a large cluster each node keeps a few to every other. Where none is idle,
the next that has been served does, so all get their turns. Who has shown no certificate (yet) gets
one of a few others, and each address a part of these, so that strangers do not crowd members out.
Threads and not tasks, since all that they do is to wait in system calls
that move megabytes without the GIL; each carries the peer's address as its name.

Nothing that a peer sends, or fails to send, ends anything but its own connection, and a peer that
misbehaves costs one log line in ten seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelfs.chunk import ChunkRef
from modelfs.errors import ProtocolError, UserError
from modelfs.ids import NodeId
from modelfs.limits import CONNECTIONS_MAX, UNPROVED_MAX, UNPROVED_OF_ADDRESS_MAX
from modelfs.ports import ChunkStore
from modelfsd.peers.session import PeerService, PeerSession
from modelfsd.trust.tls import Tls

log = logging.getLogger(__name__)

PULSE_INTERVAL_SECONDS = 0.2  # well below limits.PEER_SILENCE_SECONDS
COMPLAINT_SECONDS = 10.0
COMPLAINERS_MAX = 256  # addresses whose last log line is remembered
ROOM_SECONDS = 0.3  # a newcomer waits for it; well below limits.PEER_SILENCE_SECONDS too
STOP_SECONDS = 5.0  # a thread that is stuck in the disk longer is left behind
ACCEPT_BACKLOG = 128


@dataclass(frozen=True, slots=True)
class PeerServerStatistics:
    """What the server has done since it was started."""

    connections: int  # now
    connections_total: int
    connections_refused: int
    bytes_in: int
    bytes_out: int
    requests: Mapping[str, int]  # by the name of the message: get, put, sync, has, ...
    failures: Mapping[str, int]  # by wire.FailureKind


class PeerServer:
    """The listening side of the peer protocol. `start` and `stop` once each."""

    def __init__(
        self,
        store: ChunkStore,
        tls: Tls,
        name: str,
        info: Callable[[bool], dict[str, Any]],
        admit: Callable[[bytes, NodeId | None], bytes],
        on_damage: Callable[[ChunkRef], None],
    ) -> None:
        """`info` (for a member?), `admit` (a request, of which member if of one) and `on_damage`
        are called on connection threads; only `admit` may block for long.
        """
        self.incarnation = os.urandom(8).hex()
        self._service = PeerService(store, tls, name, self.incarnation, info, admit, on_damage)
        self._listener: socket.socket | None = None
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._newcomers = 0  # who wait for room
        self._sessions: dict[PeerSession, threading.Thread] = {}
        self._threads: list[threading.Thread] = []
        self._connections_total = self._connections_refused = 0
        self._bytes_in = self._bytes_out = 0  # of the connections that have ended
        self._complaints: dict[str, float] = {}

    def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen; returns the address, with the port that was taken if `port` is 0.

        Raises UserError if the address cannot be had.
        """
        assert self._listener is None
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family, backlog=ACCEPT_BACKLOG)
        except OSError as error:
            raise UserError(
                f"cannot listen on {host} port {port}: {error.strerror or error}. Give another "
                "address or port with --listen, or stop the program that uses this one "
                f"(`ss -ltnp 'sport = :{port}'` names it)."
            ) from error
        self._listener = listener
        for target in (self._accept, self._pulse):
            thread = threading.Thread(
                target=target, args=(), name=f"peers-{target.__name__.strip('_')}", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        address: tuple[str, int] = listener.getsockname()[:2]
        return address

    def stop(self) -> None:
        """Close every connection and wait for the threads."""
        self._stopping.set()
        if self._listener is not None:
            with contextlib.suppress(OSError):  # not connected: but it wakes the accept
                self._listener.shutdown(socket.SHUT_RDWR)
        with self._lock:
            sessions = dict(self._sessions)
        for session in sessions:
            session.channel.shut_down()
        give_up = time.monotonic() + STOP_SECONDS
        for thread in [*self._threads, *sessions.values()]:
            thread.join(max(0.0, give_up - time.monotonic()))
            if thread.is_alive():
                log.warning("thread %s is stuck in a disk access and is left behind", thread.name)
        if self._listener is not None:
            self._listener.close()

    def refuse(self, nodes: Collection[NodeId]) -> None:
        """End the connections of nodes that `Tls` refuses from now on.

        A session notes who it is with before it looks whom to refuse, so none slips through.
        """
        with self._lock:
            sessions = [session for session in self._sessions if session.peer in nodes]
        for session in sessions:
            session.channel.shut_down()

    def end_earlier_generations(self) -> None:
        """End the connections that were made when another authority was trusted too."""
        with self._lock:
            now = self._service.tls.generation
            sessions = [session for session in self._sessions if session.generation != now]
        for session in sessions:
            session.leave()

    def statistics(self) -> PeerServerStatistics:
        """A snapshot of the counters."""
        service = self._service
        with self._lock, service.lock:
            channels = [session.channel for session in self._sessions]
            return PeerServerStatistics(
                connections=len(channels),
                connections_total=self._connections_total,
                connections_refused=self._connections_refused,
                bytes_in=self._bytes_in + sum(channel.bytes_in for channel in channels),
                bytes_out=self._bytes_out + sum(channel.bytes_out for channel in channels),
                requests=dict(service.requests),
                failures=dict(service.failures),
            )

    # ------------------------------------------------------------ threads

    def _accept(self) -> None:
        assert self._listener is not None
        while not self._stopping.is_set():
            try:
                connection, address = self._listener.accept()
            except OSError as error:
                if self._stopping.is_set():
                    return
                # Out of descriptors, or a connection that ended in the queue: go on, but not hot.
                self._complain("accept", f"cannot accept connections: {error}")
                self._stopping.wait(PULSE_INTERVAL_SECONDS)
                continue
            if self._stopping.is_set():
                connection.close()
                return
            try:
                self._begin(connection, address[0], f"{address[0]}:{address[1]}")
            except (OSError, RuntimeError) as error:  # RuntimeError: no more threads
                connection.close()
                self._complain(address[0], f"cannot serve {address[0]}: {error}")

    def _begin(self, connection: socket.socket, host: str, address: str) -> None:
        """Start the thread of a new connection, if there is room."""
        with self._lock:
            obstacle = self._obstacle(host)
            if obstacle:
                self._connections_refused += 1
        if obstacle:
            connection.close()
            self._complain(host, f"refused {address}: {obstacle}")
            return
        session = PeerSession(
            self._service, connection, host, address, self._settle, self._is_wanted
        )
        thread = threading.Thread(
            target=self._run, args=(session, host), name=f"peer-{address}", daemon=True
        )
        with self._lock:
            self._sessions[session] = thread
            self._connections_total += 1
        try:
            thread.start()
        except RuntimeError:
            with self._lock:
                del self._sessions[session]
            raise
        if self._stopping.is_set():
            session.channel.shut_down()  # `stop` may have looked before this one was listed

    def _obstacle(self, host: str) -> str:
        """Why there is no room for a connection from `host`; empty if there is. Locked."""
        unproved = [session for session in self._sessions if not session.has_place]
        if len(unproved) >= UNPROVED_MAX:
            return f"{UNPROVED_MAX} connections without a certificate are open"
        if sum(session.host == host for session in unproved) >= UNPROVED_OF_ADDRESS_MAX:
            return f"{UNPROVED_OF_ADDRESS_MAX} connections without a certificate are open from it"
        return ""

    def _settle(self, newcomer: PeerSession) -> str:
        """Why there is no room for who has just proved to belong; empty if it was made."""
        with self._room:
            self._newcomers += 1
            try:
                if self._room.wait_for(self._has_room, ROOM_SECONDS):
                    newcomer.has_place = True
                    return ""
            finally:
                self._newcomers -= 1
            self._connections_refused += 1
            return f"{CONNECTIONS_MAX} connections are open, and in use"

    def _has_room(self) -> bool:
        """Whether there is room, if need be that of one that idles. Locked."""
        placed = [one for one in self._sessions if one.has_place and not one.is_leaving]
        return len(placed) < CONNECTIONS_MAX or _end_one_that_idles(placed)

    def _is_wanted(self, session: PeerSession) -> bool:
        """Whether somebody waits for the place of one that has just been served."""
        if not self._newcomers:
            return False
        with self._room:
            session.is_leaving |= self._newcomers > 0
            self._room.notify_all()
        return session.is_leaving

    def _run(self, session: PeerSession, host: str) -> None:
        try:
            session.run()
        except (ProtocolError, TimeoutError) as error:
            self._complain(host, f"closed the connection of {session.address}: {error}")
        except OSError as error:
            log.debug("the connection of %s ended: %s", session.address, error)
        except Exception:  # a bug of ours: it must not take the other connections along
            log.exception("the connection of %s failed", session.address)
        finally:
            with self._lock:
                del self._sessions[session]
                self._room.notify_all()
                self._bytes_in += session.channel.bytes_in
                self._bytes_out += session.channel.bytes_out
            session.channel.close()

    def _pulse(self) -> None:
        while not self._stopping.wait(PULSE_INTERVAL_SECONDS):
            with self._lock:
                sessions = list(self._sessions)
            now = time.monotonic()
            for session in sessions:
                try:
                    session.pulse(now)
                except OSError as error:
                    log.debug("no sign of life for %s: %s", session.address, error)

    def _complain(self, host: str, text: str) -> None:
        """Log a line, but for each host only one in a while."""
        now = time.monotonic()
        with self._lock:
            if now < self._complaints.get(host, 0.0):
                return
            self._complaints.pop(host, None)
            self._complaints[host] = now + COMPLAINT_SECONDS
            if len(self._complaints) > COMPLAINERS_MAX:
                del self._complaints[next(iter(self._complaints))]
        log.warning("%s", text)


def _end_one_that_idles(sessions: Sequence[PeerSession]) -> bool:
    """End the connection that has been idle for longest; False if all are in use.

    None that has just been made: its client is about to ask, and would not expect to find it gone.
    """
    idle = [
        (since, number)
        for number, session in enumerate(sessions)
        if session.was_served and (since := session.idle_since) is not None
    ]
    if idle:
        sessions[min(idle)[1]].leave()
    return bool(idle)
