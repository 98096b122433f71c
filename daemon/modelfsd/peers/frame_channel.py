"""Frames over one blocking TCP socket: the few system calls that both ends of the protocol share.

Bulk bytes take one system call per portion, with the GIL released: `recv_into` with MSG_WAITALL,
`sendmsg` of all parts, `sendfile`. The socket stays in blocking mode with SO_RCVTIMEO and
SO_SNDTIMEO, because Python's own socket timeouts cost a `poll` before each call.

Every call takes a `check`, which runs before each system call, thus at least once per wait slice
and also between portions that trickle in. It raises when the caller has lost its patience; so a
peer can neither hang this side by silence nor by sending one byte at a time.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable

from modelfs.chunk import Buffer
from modelfs.wire import Frame, FrameReader
from modelfsd.buffers import advance, as_views, empty_buffer

RECEIVE_BYTES = 16 << 10  # headers are small; most payload bypasses this buffer
SENDFILE_BYTES_MAX = 16 << 20  # so that a slow receiver's progress is seen

Check = Callable[[], None]


class FrameChannel:
    """One connection. One thread uses it; `shut_down` may come from any other."""

    def __init__(
        self, connection: socket.socket, wait_seconds: float, on_bytes: Check | None = None
    ) -> None:
        """`on_bytes` is called whenever bytes have arrived, and costs little."""
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        seconds, fraction = divmod(wait_seconds, 1)
        slice_of_time = struct.pack("@ll", int(seconds), int(fraction * 1_000_000))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, slice_of_time)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, slice_of_time)
        self.reader = FrameReader()
        self.bytes_in = self.bytes_out = 0
        self._socket = connection
        self._on_bytes = on_bytes or (lambda: None)
        self._buffer = empty_buffer(RECEIVE_BYTES)
        self._closing = threading.Lock()
        self._is_closed = False

    def next_frame(self, check: Check) -> Frame | None:
        """Wait for a frame. None if the peer has closed the connection between two frames.

        Raises ProtocolError, OSError (ConnectionError for an end in mid-frame), what `check` does.
        """
        while (frame := self.reader.next_frame()) is None:
            count = self._receive(self._buffer, 0, check)
            if count == 0:
                if self.reader.is_between_frames:
                    return None
                raise ConnectionResetError("the connection ended inside a frame")
            self.reader.receive(self._buffer[:count])
        return frame

    def receive_payload(self, into: memoryview, check: Check) -> None:
        """Fill `into`, which is as long as the payload that is due."""
        assert len(into) == self.reader.payload_left
        done = self.reader.take_payload(into)
        while done < len(into):
            count = self._receive(into[done:], socket.MSG_WAITALL, check)
            if count == 0:
                raise ConnectionResetError("the connection ended inside a payload")
            self.reader.payload_received(count)
            done += count

    def send(self, buffers: list[Buffer], check: Check, more: bool = False) -> None:
        """Send all buffers; with `more`, the kernel may hold them for what follows."""
        views = as_views(buffers)
        flags = socket.MSG_NOSIGNAL | (socket.MSG_MORE if more else 0)
        while views:
            check()
            try:
                count = self._socket.sendmsg(views, (), flags)
            except BlockingIOError:
                continue
            self.bytes_out += count
            advance(views, count)

    def send_file(self, fd: int, start: int, end: int, check: Check) -> None:
        """Send the bytes [start, end) of a file without touching them."""
        while start < end:
            check()
            try:
                portion = min(end - start, SENDFILE_BYTES_MAX)
                count = os.sendfile(self._socket.fileno(), fd, start, portion)
            except BlockingIOError:
                continue
            if count == 0:
                raise ConnectionAbortedError("the file that is being sent has become shorter")
            self.bytes_out += count
            start += count

    def try_send(self, data: bytes) -> None:
        """Send a small frame if it fits at once. Raises OSError if the stream is broken by it."""
        try:
            count = self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return
        self.bytes_out += count
        if count < len(data):
            self.shut_down()
            raise ConnectionAbortedError("half a frame was sent")

    def shut_down(self) -> None:
        """End the connection: every blocked call of its thread returns at once."""
        with self._closing:
            if not self._is_closed:
                with contextlib.suppress(OSError):  # the peer may have been quicker
                    self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Free the descriptor. Only the thread that uses the channel may do so."""
        with self._closing:
            self._is_closed = True
            self._socket.close()

    def _receive(self, into: memoryview, flags: int, check: Check) -> int:
        while True:
            check()
            try:
                count = self._socket.recv_into(into, 0, flags)
            except BlockingIOError:
                continue
            if count:
                self.bytes_in += count
                self._on_bytes()
            return count
