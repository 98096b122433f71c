"""Frames over TLS, and over a connection that was taken out of TLS after its handshake.

A `SecureChannel` begins in TLS. `go_plain`, which both sides call at the same place of the
conversation, ends TLS by a close_notify in each direction and goes on in the clear: for the bytes
of chunks, where the cluster has `--data-tls off`. Who is at the other end has been proved by then.

OpenSSL's object belongs to one thread at a time, but the server's pulse thread sends signs of life
while the connection's own thread receives. So the socket does not block: OpenSSL is called under a
lock, and waiting is done by `poll` without it. The lock is held for at most `PORTION_BYTES` at a
time. The GIL is released while OpenSSL works.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from modelfs.chunk import Buffer
from modelfs.limits import KIB
from modelfsd.buffers import as_views
from modelfsd.peers.frame_channel import Check, FrameChannel
from modelfsd.trust.pki import Party
from modelfsd.trust.tls import TlsFailed, party_of

PORTION_BYTES = 256 * KIB  # so that progress is seen; 16 records
_WANTS = {ssl.SSLWantReadError: select.POLLIN, ssl.SSLWantWriteError: select.POLLOUT}

T = TypeVar("T")


class SecureChannel(FrameChannel):
    """One connection. One thread uses it; `shut_down` and `try_send` may come from others."""

    def __init__(
        self,
        connection: socket.socket,
        wait_seconds: float,
        context: ssl.SSLContext,
        server_side: bool,
        on_bytes: Check | None = None,
    ) -> None:
        super().__init__(connection, wait_seconds, on_bytes)
        tls = context.wrap_socket(connection, server_side, do_handshake_on_connect=False)
        tls.setblocking(False)
        self._socket = tls
        self._tls: ssl.SSLSocket | None = tls
        self._lock = threading.Lock()
        self._wait_ms = max(1, int(wait_seconds * 1000))
        self._poll = select.poll()
        self._poll.register(tls.fileno(), select.POLLIN)
        self._held: Buffer = b""  # sent with the file that follows
        self._unsent = b""  # OpenSSL has taken a part of it, and wants the same again
        self._file_buffer = bytearray()

    @property
    def is_plain(self) -> bool:
        """Whether it has left TLS."""
        return self._tls is None

    def handshake(self, check: Check) -> Party | None:
        """Do the TLS handshake; returns who is at the other end, None for a stranger."""
        tls = self._tls
        assert tls is not None
        self._carry_out(tls.do_handshake, check)
        return party_of(tls)

    def go_plain(self, check: Check) -> None:
        """Leave TLS. The other side does so too, and neither has sent anything beyond."""
        tls = self._tls
        assert tls is not None and self.reader.is_between_frames
        self._carry_out(tls.unwrap, check)
        with self._closing:
            if self._is_closed:
                raise ConnectionAbortedError("the connection was closed")
            self._socket = socket.socket(fileno=tls.detach())
            self._tls = None
        self._socket.setblocking(True)

    def send(self, buffers: list[Buffer], check: Check, more: bool = False) -> None:
        """See `FrameChannel.send`."""
        if self._tls is None:
            return super().send(buffers, check, more)
        if more:
            self._held = b"".join((self._held, *buffers))
            return None
        if sum(map(len, buffers)) <= PORTION_BYTES // 16:
            buffers = [b"".join(buffers)]  # one record
        for view in as_views(buffers):
            self._write(view, check)
        return None

    def send_file(self, fd: int, start: int, end: int, check: Check) -> None:
        """See `FrameChannel.send_file`. Here the bytes pass through a buffer of ours."""
        if self._tls is None:
            return super().send_file(fd, start, end, check)
        if not self._file_buffer:
            self._file_buffer = bytearray(PORTION_BYTES)
        buffer = memoryview(self._file_buffer)
        held, self._held = memoryview(self._held), b""
        buffer[: len(held)] = held
        filled = len(held)
        while start < end:
            room = buffer[filled : filled + end - start]
            count = os.preadv(fd, [room], start)
            if count == 0:
                raise ConnectionAbortedError("the file that is being sent has become shorter")
            start += count
            self._write(buffer[: filled + count], check)
            filled = 0
        return None

    def try_send(self, data: bytes) -> None:
        """See `FrameChannel.try_send`. What OpenSSL could not finish is finished by the next."""
        if self._tls is None:
            return super().try_send(data)
        with self._lock:
            try:
                self.bytes_out += self._tls.send(self._unsent or data)
                self._unsent = b""
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                self._unsent = self._unsent or data
        return None

    def shut_down(self) -> None:
        """See `FrameChannel.shut_down`. `SSLSocket.shutdown` would drop TLS under its thread."""
        with self._closing:
            if not self._is_closed:
                try:
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
                except OSError:
                    return  # the peer was quicker

    # ------------------------------------------------------------ inside

    def _receive(self, into: memoryview, flags: int, check: Check) -> int:
        if self._tls is None:
            return super()._receive(into, flags, check)
        count = self._carry_out(lambda: self._read(into, bool(flags)), check)
        if count:
            self.bytes_in += count
            self._on_bytes()
        return count

    def _read(self, into: memoryview, is_greedy: bool) -> int:
        """What has arrived: one record, or as many as are here. 0 at the end."""
        tls = self._tls
        assert tls is not None
        # `recv_into` is this with more steps, a tenth of the CPU: a record has but 16 KiB.
        read: Any = tls.read
        size = min(len(into), PORTION_BYTES)
        done: int = read(size, into)
        try:
            while is_greedy and 0 < done < size:
                count = read(size - done, into[done:])
                if count == 0:
                    break
                done += count
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return done
        return done

    def _write(self, view: memoryview, check: Check) -> None:
        tls = self._tls
        assert tls is not None
        if unsent := self._unsent:
            self._unsent = b""
            self.bytes_out += self._carry_out(partial(tls.send, unsent), check)
        while view:
            portion = view[:PORTION_BYTES]  # the same again after a wait, as OpenSSL demands
            count = self._carry_out(partial(tls.send, portion), check)
            self.bytes_out += count
            view = view[count:]

    def _carry_out(self, call: Callable[[], T], check: Check) -> T:
        """Call OpenSSL until it has what it wants. Raises `TlsFailed`, OSError, as `check`."""
        while True:
            check()
            try:
                with self._lock:
                    return call()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as want:
                self._poll.modify(self._socket.fileno(), _WANTS[type(want)])
                self._poll.poll(self._wait_ms)
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError) as error:
                raise ConnectionResetError("the connection ended") from error
            except ssl.SSLCertVerificationError as error:
                raise TlsFailed(f"its certificate is refused: {error.verify_message}") from error
            except ssl.SSLError as error:
                raise TlsFailed(f"TLS failed: {error.reason or error}") from error
