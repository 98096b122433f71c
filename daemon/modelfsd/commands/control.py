"""The admin socket: how commands on this machine talk to its daemon.

A Unix socket in the state directory, for its owner only. One JSON object per line:

    {"command": "status", ...arguments}
    {"ok": true, ...}   or   {"ok": false, "error": text}

Before the reply of a command that takes long come any number of lines with news:

    {"news": {...}}

At least one a second, so that a client can tell a long command from a dead daemon. Such a command
ends when its client goes away.

A connection may carry several requests, one after the other. A request has at most 1 MiB, a reply
at most 64 MiB; names that are not UTF-8 travel as lone surrogates (`\\udcff`). A client that speaks
HTTP gets a page instead: `curl --unix-socket DIR/control.sock http://localhost/metrics`.

A Unix socket's path has at most 107 bytes. A longer one is reached through `/proc/self/fd/N/NAME`
with its directory open as N, for binding as for connecting.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from modelfs.errors import ModelfsError, UserError
from modelfs.limits import MIB
from modelfsd.commands.pages import Page, answer_http, is_http
from modelfsd.socket_paths import short_path

log = logging.getLogger(__name__)

REQUEST_BYTES_MAX = 1 * MIB
REPLY_BYTES_MAX = 64 * MIB
CLIENTS_MAX = 64
IDLE_SECONDS_MAX = 60.0  # that a client may think between two requests
SEND_SECONDS_MAX = 30.0
RECEIVE_BYTES = 64 << 10

NEWS_SECONDS = 1.0  # between two reports of the progress of a command that takes long

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
LongHandler = Callable[[dict[str, Any], "Listener"], Awaitable[dict[str, Any]]]


class ControlServer:
    """Answers commands; knows nothing of what they mean."""

    def __init__(
        self,
        path: Path,
        handlers: Mapping[str, Handler],
        pages: Mapping[str, Page] | None = None,
        long_handlers: Mapping[str, LongHandler] | None = None,
    ) -> None:
        self.path = path
        self._handlers, self._pages = dict(handlers), dict(pages or {})
        self._long_handlers = dict(long_handlers or {})
        self._client_count = 0

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until cancelled. Started once the socket can be connected to.

        The caller holds the lock of the state directory, so a socket that is already there is
        a dead daemon's.
        """
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # The file that bind makes gets the mode of the socket: no instant at which others
            # could connect, and no change of the process's umask.
            os.fchmod(listener.fileno(), 0o600)
            with short_path(self.path) as short:
                listener.bind(short)
            listener.listen(CLIENTS_MAX)
            async with trio.open_nursery() as nursery:
                # trio's loop survives a lack of file descriptors.
                trio_listener = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
                await nursery.start(trio.serve_listeners, self._converse, [trio_listener])
                task_status.started()
        finally:
            listener.close()
            self.path.unlink(missing_ok=True)

    async def _converse(self, stream: trio.SocketStream) -> None:
        """One client, from its first request to its end."""
        buffer = bytearray()
        self._client_count += 1
        try:
            async with stream:
                if self._client_count > CLIENTS_MAX:
                    log.warning("refused a client of the admin socket: %d are here", CLIENTS_MAX)
                    return
                while (line := await _receive_line(stream, buffer)) is not None:
                    if is_http(line):
                        await answer_http(stream, line, self._pages, bytes(buffer))
                        return
                    reply = await self._answer(line, stream, buffer)
                    if reply is None:
                        return
                    # A `stop` cancels everything, this task too: its answer goes out first.
                    with trio.move_on_after(SEND_SECONDS_MAX, shield=True):
                        await stream.send_all(_encode_reply(reply))
        except trio.BrokenResourceError:
            log.debug("a client of the admin socket went away")
        finally:
            self._client_count -= 1

    async def _answer(
        self, line: bytes, stream: trio.SocketStream, buffer: bytearray
    ) -> dict[str, Any] | None:
        """Carry out one request. Every failure becomes a reply; None if the client is gone."""
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            return _refusal("the request is not JSON")
        if not isinstance(request, dict) or not isinstance(request.get("command"), str):
            return _refusal("the request is not an object with a command")
        command = request.pop("command")
        handler, long_handler = self._handlers.get(command), self._long_handlers.get(command)
        try:
            if handler is not None:
                return {**await handler(request), "ok": True}
            if long_handler is not None:
                return await _carry_out(long_handler, request, stream, buffer)
        except ModelfsError as error:
            return _refusal(str(error) or type(error).__name__)
        except Exception:
            log.exception("the command %r failed", command)
            return _refusal(f"internal error in the daemon while it did {command!r}: see its log")
        known = ", ".join(sorted({**self._handlers, **self._long_handlers}))
        return _refusal(f"the daemon does not know the command {command!r}, only {known}")


class Listener:
    """Who waits for a command that takes long. `progress` is told over and over, once it is set."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.progress: Callable[[], dict[str, Any]] = dict
        self.scope = trio.CancelScope()
        self._stream = stream
        self._sending = trio.Lock()

    async def tell(self, news: dict[str, Any]) -> None:
        """Send news. Ends the command if the client is gone, or does not listen."""
        try:
            with trio.fail_after(SEND_SECONDS_MAX):
                async with self._sending:
                    await self._stream.send_all(json.dumps({"news": news}).encode() + b"\n")
        except (trio.BrokenResourceError, trio.TooSlowError):
            log.debug("the client of a long command went away, or does not listen")
            self.scope.cancel()
            await trio.sleep_forever()

    async def keep_telling(self) -> None:
        """Report the progress, for ever."""
        while True:
            await trio.sleep(NEWS_SECONDS)
            await self.tell({"progress": self.progress()})

    async def watch(self, buffer: bytearray) -> None:
        """End the command when the client goes away. What it sends is its next request."""
        with suppress(trio.BrokenResourceError):
            while len(buffer) <= REQUEST_BYTES_MAX:
                data = await self._stream.receive_some(RECEIVE_BYTES)
                if not data:
                    break
                buffer += data
        self.scope.cancel()


async def _carry_out(
    handler: LongHandler, request: dict[str, Any], stream: trio.SocketStream, buffer: bytearray
) -> dict[str, Any] | None:
    """Carry out a request that takes long; None if its client went away first."""
    listener = Listener(stream)
    reply: dict[str, Any] | None = None
    failure: Exception | None = None
    with listener.scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.watch, buffer)
            nursery.start_soon(listener.keep_telling)
            try:
                reply = {**await handler(request, listener), "ok": True}
            except Exception as error:
                failure = error  # out of the nursery as it is, not in a group
            listener.scope.cancel()
    if failure is not None:
        raise failure
    return reply


def _refusal(text: str) -> dict[str, Any]:
    return {"ok": False, "error": text}


def _encode_reply(reply: dict[str, Any]) -> bytes:
    data = json.dumps(reply).encode() + b"\n"
    if len(data) > REPLY_BYTES_MAX:
        data = json.dumps(_refusal("the answer is larger than 64 MiB")).encode() + b"\n"
    return data


async def _receive_line(stream: trio.SocketStream, buffer: bytearray) -> bytes | None:
    """The next line; None at the end, after a pause that is too long, or a line that is."""
    with trio.move_on_after(IDLE_SECONDS_MAX):
        while True:
            end = buffer.find(b"\n")
            if end >= 0:
                line = bytes(buffer[:end])
                del buffer[: end + 1]
                return line
            if len(buffer) > REQUEST_BYTES_MAX:
                log.warning("a client of the admin socket sent a line of more than 1 MiB")
                return None
            data = await stream.receive_some(RECEIVE_BYTES)
            if not data:
                return None
            buffer += data
    return None


# ---------------------------------------------------------------- the client


def call(
    socket_path: Path | str, command: str, timeout: float, /, **arguments: object
) -> dict[str, Any]:
    """Ask a daemon. Blocking, for the command line; `timeout` (seconds) bounds each step.

    Returns the reply without its `ok`. Raises `UserError`: nobody listens, no answer in time, or
    the daemon refused, with its own words.
    """
    *_, (_, reply) = call_long(socket_path, command, timeout, **arguments)
    return reply


def call_long(
    socket_path: Path | str, command: str, timeout: float, /, **arguments: object
) -> Generator[tuple[bool, dict[str, Any]], None, None]:
    """As `call`, for commands that take long: yields (False, news) and at last (True, reply).

    Whoever stops to iterate ends the command.
    """
    path = Path(socket_path)
    request = json.dumps({"command": command, **arguments}).encode() + b"\n"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
            stream.settimeout(timeout)
            with short_path(path) as short:
                stream.connect(short)
            stream.sendall(request)
            for line in _read_lines(stream):
                reply = _decode(line, path)
                if "news" not in reply:
                    break
                yield False, reply["news"]
            else:
                raise UserError(f"the daemon at {path} ended before it answered")
    except TimeoutError as error:
        raise UserError(f"the daemon at {path} did not answer within {timeout:.0f} s") from error
    except OSError as error:
        raise UserError(_explain(path, error)) from error
    if reply.pop("ok", None) is not True:
        raise UserError(str(reply.get("error") or "the daemon refused without a reason"))
    yield True, reply


def _decode(line: bytes, path: Path) -> dict[str, Any]:
    try:
        reply = json.loads(line)
    except ValueError as error:
        raise UserError(f"what answers at {path} is not a modelfs daemon") from error
    if not isinstance(reply, dict):
        raise UserError("the daemon refused without a reason")
    return reply


def _read_lines(stream: socket.socket) -> Iterator[bytes]:
    """The lines of an answer, each with its end."""
    buffer = bytearray()
    while data := stream.recv(RECEIVE_BYTES):
        *ends, rest = data.split(b"\n")
        for end in ends:
            yield bytes(buffer) + end + b"\n"
            buffer.clear()
        buffer += rest
        if len(buffer) > REPLY_BYTES_MAX:
            raise UserError("the daemon's answer is larger than 64 MiB")


def _explain(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR):
        return f"no modelfs daemon runs with the state directory {path.parent}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"only the owner of {path.parent} (usually root) may talk to its daemon: try sudo"
    return f"the daemon at {path} cannot be reached: {error.strerror or error}"
