"""One connection to an etcd member: calls that share it, without a task or a thread of its own.

Whoever waits for a response reads for all: one of the waiting tasks waits for the socket, hands
out what came, and when its own response is complete it wakes another, which reads on. So a lone
call costs no switch between tasks. Nobody reads while nobody waits, hence `usable` first looks at
what has come meanwhile: a connection that the member closed is not given one more request.

A connection that has failed fails all its calls. Whether the member had carried them out is then
unknown, unless HTTP/2 says that it never took them.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import trio
from google.protobuf.message import DecodeError

from modelfs.errors import ProtocolError
from modelfsd.etcd.http2 import Http2Client, MessageReceived, Status, StreamEnded
from modelfsd.socket_paths import short_path

Message = TypeVar("Message")

RECEIVE_BYTES = 256 << 10
RECORD_BYTES = 16 << 10  # the most that one recv gives with TLS: then there is probably more
CONNECT_SECONDS = 1.0  # for the connection and, with TLS, for the handshake
UNCONNECTED = "failed to connect"


class CallFailed(Exception):
    """A call that brought no response."""

    def __init__(self, status: Status, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


def parsed(message_type: type[Message], data: bytes) -> Message:
    """A protobuf message. Raises `CallFailed` if that is none: a member may be broken, or worse."""
    try:
        message: Message = message_type.FromString(data)  # type: ignore[attr-defined]
    except DecodeError as error:
        raise CallFailed(Status.INTERNAL, f"not an answer of etcd's: {error}") from error
    return message


@dataclass(slots=True, eq=False)
class _Call:
    """A call on its way. `news` wakes who waits for it: something came, or it is to read now."""

    messages: list[bytes] = field(default_factory=list)
    outcome: tuple[Status, str] | None = None
    news: trio.Event = field(default_factory=trio.Event)
    is_waiting: bool = False


class EtcdConnection:
    """A connected socket, with or without TLS."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._protocol = Http2Client()
        self._calls: dict[int, _Call] = {}
        self._is_reading = self._is_sending = False
        self._is_drained = False  # the last look at the socket has probably taken all there was
        self._failure: str | None = None
        self._is_retired = False

    @classmethod
    async def connect(cls, endpoint: str, context: ssl.SSLContext | None) -> EtcdConnection:
        """Raises `CallFailed`: then nothing has been sent."""
        host, _, port = endpoint.rpartition(":")
        try:
            with trio.fail_after(CONNECT_SECONDS):
                stream = await trio.open_tcp_stream(host.strip("[]"), int(port))
                plain = socket.socket(fileno=stream.socket.detach())
                plain.setblocking(False)
                if context is None:
                    return cls(plain)
                return cls(await _handshake(plain, context, host.strip("[]")))
        except (OSError, trio.TooSlowError) as error:
            reason = "timed out" if isinstance(error, trio.TooSlowError) else str(error)
            text = f"{UNCONNECTED} to {endpoint}: {reason}"
            raise CallFailed(Status.UNAVAILABLE, text) from error

    @classmethod
    async def connect_locally(cls, path: Path) -> EtcdConnection:
        """To a member of this machine, through a Unix socket. Raises `CallFailed`."""
        plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with short_path(path) as address:
                plain.connect(address)  # at once, or not at all
        except OSError as error:
            plain.close()
            raise CallFailed(Status.UNAVAILABLE, f"{UNCONNECTED} to {path}: {error}") from error
        await trio.lowlevel.checkpoint()
        return cls(plain)

    # ------------------------------------------------------------ calls

    @property
    def is_usable(self) -> bool:
        """Whether a further request may be sent. Takes in what came while nobody was reading."""
        if not self._is_reading:
            while self._failure is None and self._receive():
                pass
        return self._failure is None and self._protocol.is_usable and not self._is_retired

    async def call(self, headers: bytes, message: bytes, message_bytes_max: int) -> bytes:
        """One request and its only response. Raises `CallFailed`."""
        number = self.begin(headers, message, message_bytes_max)
        try:
            await self._send()
            call = self._calls[number]
            while call.outcome is None:
                await self._wait(call)
        finally:
            self.end(number)
        status, text = call.outcome
        if status is not Status.OK:
            raise CallFailed(status, text)
        if len(call.messages) != 1:
            raise CallFailed(Status.INTERNAL, f"{len(call.messages)} responses to one request")
        return call.messages[0]

    def begin(
        self, headers: bytes, message: bytes, message_bytes_max: int, ends: bool = True
    ) -> int:
        """Begin a call of a usable connection; returns its number. The caller `end`s it."""
        number = self._protocol.request(headers, message, message_bytes_max, ends)
        self._calls[number] = _Call()
        return number

    async def send(self, number: int, message: bytes) -> None:
        """One more message of a call. Raises `CallFailed`."""
        call = self._calls[number]
        if call.outcome is None:
            self._protocol.send(number, message)
            await self._send()

    async def messages(self, number: int) -> list[bytes]:
        """What has come of a stream: one message or more. Raises `CallFailed` at its end."""
        call = self._calls[number]
        await self._send()
        while not call.messages:
            if call.outcome is not None:
                status, text = call.outcome
                raise CallFailed(status, text or "it was ended")
            await self._wait(call)
        taken, call.messages = call.messages, []
        return taken

    def end(self, number: int) -> None:
        """Forget a call; one that is still on its way is given up."""
        del self._calls[number]
        if self._failure is None:
            self._protocol.reset(number)
            self._send_now()
        if self._is_retired and not self._calls:
            self.close()
        elif not self._is_reading:
            self._let_another_read()

    def retire(self) -> None:
        """Send no further request; close when the last call has ended."""
        self._is_retired = True
        if not self._calls:
            self.close()

    def close(self) -> None:
        """Close the connection. Calls on their way fail."""
        self._fail("the connection was closed")

    # ------------------------------------------------------------ inside

    async def _wait(self, call: _Call) -> None:
        """Return when something may have come for a call."""
        if self._failure is not None:
            call.outcome = call.outcome or (Status.UNAVAILABLE, self._failure)
        elif self._is_reading:
            call.news = trio.Event()
            call.is_waiting = True
            try:
                await call.news.wait()
            finally:
                call.is_waiting = False
        else:
            self._is_reading = True
            try:
                await self._read()
            finally:
                self._is_reading = False

    async def _read(self) -> None:
        """Wait for the socket once, unless something is there already."""
        if (self._is_drained or not self._receive()) and self._failure is None:
            try:
                await trio.lowlevel.wait_readable(self._socket)
            except (trio.ClosedResourceError, OSError) as error:
                self._fail(str(error))
                return
            self._receive()
        await self._send()

    def _receive(self) -> bool:
        """Take in what has come, without waiting; False if that is nothing, or no more."""
        try:
            data = self._socket.recv(RECEIVE_BYTES)
            self._is_drained = len(data) < RECORD_BYTES
            events = self._protocol.receive(data)
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except (OSError, ProtocolError) as error:
            self._fail(str(error))
            return False
        if not data:
            self._fail("the member closed the connection")
            return False
        for event in events:
            self._hand_out(event)
        return True

    def _hand_out(self, event: MessageReceived | StreamEnded) -> None:
        call = self._calls.get(event.stream)
        if call is None:
            return
        if isinstance(event, MessageReceived):
            call.messages.append(event.data)
        else:
            call.outcome = (event.status, event.text)
        call.news.set()

    def _let_another_read(self) -> None:
        for call in self._calls.values():
            if call.is_waiting and not call.news.is_set():
                call.news.set()
                return

    def _send_now(self) -> None:
        """Send what goes without waiting. What is left goes with the next request."""
        outgoing = self._protocol.outgoing
        try:
            while outgoing and not self._is_sending and self._failure is None:
                del outgoing[: self._socket.send(outgoing)]
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError as error:
            self._fail(str(error))

    async def _send(self) -> None:
        """Send everything; what another task is sending takes ours along."""
        self._send_now()
        if not self._protocol.outgoing or self._is_sending or self._failure is not None:
            return
        self._is_sending = True
        try:
            while self._protocol.outgoing and self._failure is None:
                await trio.lowlevel.wait_writable(self._socket)
                self._is_sending = False
                self._send_now()
                self._is_sending = True
        except (trio.ClosedResourceError, OSError) as error:
            self._fail(str(error))
        except trio.Cancelled:
            self._fail("a request could not be sent in time")
            raise
        finally:
            self._is_sending = False

    def _fail(self, why: str) -> None:
        """The connection is gone, and every call with it."""
        if self._failure is not None:
            return
        self._failure = why
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()
        for call in self._calls.values():
            if call.outcome is None:
                call.outcome = (Status.UNAVAILABLE, why)
            call.news.set()


async def _handshake(plain: socket.socket, context: ssl.SSLContext, host: str) -> ssl.SSLSocket:
    """TLS over a connected socket. Raises OSError (`ssl.SSLError` is one)."""
    secured = context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
    try:
        while True:
            try:
                secured.do_handshake()
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(secured)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(secured)
            else:
                return secured
    except BaseException:
        secured.close()
        raise
