"""The admin socket: how commands on this machine talk to its daemon.

A Unix socket in the state directory, for its owner only. One JSON object per line:

    {"command": "status", ...arguments}
    {"ok": true, ...}   or   {"ok": false, "error": text}

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
from collections.abc import Awaitable, Callable, Mapping
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

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class ControlServer:
    """Answers commands; knows nothing of what they mean."""

    def __init__(
        self, path: Path, handlers: Mapping[str, Handler], pages: Mapping[str, Page] | None = None
    ) -> None:
        self.path = path
        self._handlers, self._pages = dict(handlers), dict(pages or {})
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
                    reply = await self._answer(line)
                    # A `stop` cancels everything, this task too: its answer goes out first.
                    with trio.move_on_after(SEND_SECONDS_MAX, shield=True):
                        await stream.send_all(_encode_reply(reply))
        except trio.BrokenResourceError:
            log.debug("a client of the admin socket went away")
        finally:
            self._client_count -= 1

    async def _answer(self, line: bytes) -> dict[str, Any]:
        """Carry out one request. Every failure becomes a reply."""
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            return _refusal("the request is not JSON")
        if not isinstance(request, dict) or not isinstance(request.get("command"), str):
            return _refusal("the request is not an object with a command")
        command = request.pop("command")
        handler = self._handlers.get(command)
        if handler is None:
            known = ", ".join(sorted(self._handlers))
            return _refusal(f"the daemon does not know the command {command!r}, only {known}")
        try:
            return {**await handler(request), "ok": True}
        except ModelfsError as error:
            return _refusal(str(error) or type(error).__name__)
        except Exception:
            log.exception("the command %r failed", command)
            return _refusal(f"internal error in the daemon while it did {command!r}: see its log")


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
    path = Path(socket_path)
    request = json.dumps({"command": command, **arguments}).encode() + b"\n"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
            stream.settimeout(timeout)
            with short_path(path) as short:
                stream.connect(short)
            stream.sendall(request)
            line = _read_reply(stream)
    except TimeoutError as error:
        raise UserError(f"the daemon at {path} did not answer within {timeout:.0f} s") from error
    except OSError as error:
        raise UserError(_explain(path, error)) from error
    if line is None:
        raise UserError(f"the daemon at {path} ended before it answered")
    try:
        reply = json.loads(line)
    except ValueError as error:
        raise UserError(f"what answers at {path} is not a modelfs daemon") from error
    if not isinstance(reply, dict) or reply.pop("ok", None) is not True:
        text = reply.get("error") if isinstance(reply, dict) else None
        raise UserError(str(text or "the daemon refused without a reason"))
    return reply


def _read_reply(stream: socket.socket) -> bytes | None:
    buffer = bytearray()
    while data := stream.recv(RECEIVE_BYTES):
        buffer += data
        if data.endswith(b"\n"):
            return bytes(buffer)
        if len(buffer) > REPLY_BYTES_MAX:
            raise UserError("the daemon's answer is larger than 64 MiB")
    return None


def _explain(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR):
        return f"no modelfs daemon runs with the state directory {path.parent}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"only the owner of {path.parent} (usually root) may talk to its daemon: try sudo"
    return f"the daemon at {path} cannot be reached: {error.strerror or error}"
