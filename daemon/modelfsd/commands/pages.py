"""Pages for whoever speaks HTTP to a node: `GET /metrics`.

Served on the admin socket, and on a loopback port if `metrics_listen` names one. Only as much of
HTTP as a scraper needs: one GET for each connection, whose headers are read and ignored. Pages
change nothing. Every limit is there to let go of a client that does not keep to this.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping

import trio

from modelfsd.addresses import HostPort, format_host_port

log = logging.getLogger(__name__)

HEADERS_BYTES_MAX = 16 << 10
CLIENT_SECONDS_MAX = 10.0
RECEIVE_BYTES = 4 << 10
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # Prometheus's, and readable by people

Page = Callable[[], Awaitable[str]]


def is_http(line: bytes) -> bool:
    """Whether a client's first line is a request for a page."""
    return line.startswith((b"GET ", b"HEAD ")) and b" HTTP/1." in line


async def answer_http(
    stream: trio.SocketStream, line: bytes, pages: Mapping[str, Page], read: bytes = b""
) -> None:
    """Answer one request, of which `line` and whatever is in `read` have been received."""
    method, _, rest = line.decode("latin-1").partition(" ")
    path = rest.partition(" ")[0].partition("?")[0]
    with trio.move_on_after(CLIENT_SECONDS_MAX):
        if not await _skip_headers(stream, read):
            return
        page = pages.get(path)
        if page is None:
            known = ", ".join(sorted(pages))
            body, status = f"there is no {path}, only {known}\n", "404 Not Found"
        else:
            body, status = await page(), "200 OK"
        data = body.encode("utf-8")
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\n"
            f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        )
        await stream.send_all(head.encode("ascii") + (b"" if method == "HEAD" else data))


async def _skip_headers(stream: trio.SocketStream, read: bytes) -> bool:
    """Read to the empty line that ends a request; False if the client goes away before it."""
    received = b"\n" + read.replace(b"\r", b"")
    while b"\n\n" not in received:
        data = await stream.receive_some(RECEIVE_BYTES)
        if not data or len(received) > HEADERS_BYTES_MAX:
            return False
        received += data.replace(b"\r", b"")
    return True


async def serve_pages(
    address: HostPort,
    pages: Mapping[str, Page],
    task_status: trio.TaskStatus[HostPort] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve pages on a port until cancelled. A port that cannot be had costs only the pages."""

    async def converse(stream: trio.SocketStream) -> None:
        try:
            async with stream:
                with trio.move_on_after(CLIENT_SECONDS_MAX):
                    line, rest = await _first_line(stream)
                    if is_http(line):
                        await answer_http(stream, line, pages, rest)
        except trio.BrokenResourceError:
            log.debug("a client of the metrics port went away")
        except Exception:
            log.exception("a page could not be made")

    host, port = address
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        where = format_host_port(address)
        log.error("no metrics on %s: %s", where, error.strerror or error)
        task_status.started(address)
        return
    taken: tuple[str, int] = listeners[0].socket.getsockname()[:2]
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, converse, listeners)
        log.info("metrics on http://%s/metrics", format_host_port(taken))
        task_status.started(taken)


async def _first_line(stream: trio.SocketStream) -> tuple[bytes, bytes]:
    received = b""
    while b"\n" not in received and len(received) <= HEADERS_BYTES_MAX:
        data = await stream.receive_some(RECEIVE_BYTES)
        if not data:
            break
        received += data
    line, _, rest = received.partition(b"\n")
    return line, rest
