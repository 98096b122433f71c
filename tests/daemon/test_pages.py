"""Pages over HTTP: on the admin socket, on a port, and for clients that do not keep to it."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from modelfs.errors import UserError
from modelfsd.commands import metrics
from modelfsd.commands.control import ControlServer
from modelfsd.commands.pages import HEADERS_BYTES_MAX, serve_pages
from modelfsd.config import load_config
from modelfsd.stages import Histogram


async def page() -> str:
    """A page."""
    return "what: here\n"


PAGES = {"/metrics": page}


class _Unix(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def get(connection: http.client.HTTPConnection, path: str, method: str = "GET") -> tuple[int, str]:
    """One page."""
    connection.request(method, path)
    response = connection.getresponse()
    return response.status, response.read().decode()


@asynccontextmanager
async def serving() -> AsyncIterator[int]:
    """Pages on a port that was free."""
    async with trio.open_nursery() as nursery:
        _, port = await nursery.start(serve_pages, ("127.0.0.1", 0), PAGES)
        yield port
        nursery.cancel_scope.cancel()


async def ask_port(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    return await trio.to_thread.run_sync(get, connection, path, method)


async def test_the_admin_socket_answers_commands_and_pages(tmp_path: Path) -> None:
    async def hello(request: dict[str, Any]) -> dict[str, Any]:
        return {"hello": "world"}

    server = ControlServer(tmp_path / "control.sock", {"hello": hello}, PAGES)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        found = await trio.to_thread.run_sync(get, _Unix(server.path), "/metrics")
        assert found == (200, "what: here\n")
        stream = await trio.open_unix_socket(server.path)
        await stream.send_all(b'{"command": "hello"}\n')
        assert json.loads(await stream.receive_some())["hello"] == "world"
        await stream.aclose()
        nursery.cancel_scope.cancel()


async def test_a_port_serves_the_pages_and_nothing_else() -> None:
    async with serving() as port:
        assert await ask_port(port, "/metrics") == (200, "what: here\n")
        assert await ask_port(port, "/metrics?name=x") == (200, "what: here\n")
        assert await ask_port(port, "/metrics", "HEAD") == (200, "")
        status, text = await ask_port(port, "/etc/passwd")
        assert (status, text) == (404, "there is no /etc/passwd, only /metrics\n")


@pytest.mark.parametrize(
    "words",
    [
        b'{"command": "stop"}\n',
        b"POST /metrics HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nX: " + b"x" * (2 * HEADERS_BYTES_MAX),
        b"\n",
        b"\0" * 100 + b"\n",
    ],
)
async def test_who_does_not_speak_http_gets_nothing(words: bytes) -> None:
    async with serving() as port:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            try:
                await stream.send_all(words)
                assert await stream.receive_some() == b""
            except trio.BrokenResourceError:
                pass  # it was closed with words unread
        assert (await ask_port(port, "/metrics"))[0] == 200


async def test_headers_may_arrive_in_pieces() -> None:
    async with serving() as port:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            for piece in (b"GET /metr", b"ics HTTP/1.1\r", b"\nHost: x\r\n", b"\r", b"\n"):
                await stream.send_all(piece)
            reply = b""
            async for data in stream:
                reply += data
    assert reply.endswith(b"\r\n\r\nwhat: here\n")


@pytest.mark.expected_logs("no metrics on")
async def test_a_port_that_is_taken_costs_the_pages_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving() as port:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_pages, ("127.0.0.1", port), PAGES)
    assert f"no metrics on 127.0.0.1:{port}: " in caplog.text


@pytest.mark.parametrize("text", ["0.0.0.0:9420", "10.0.0.5", "example.com:1", ":9420"])
def test_metrics_are_served_to_this_machine_only(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a loopback address"):
        load_config(tmp_path, {}, environ={"MODELFS_METRICS_LISTEN": text})


def test_a_loopback_address_may_serve_metrics(tmp_path: Path) -> None:
    for text, wanted in (("[::1]:1", ("::1", 1)), ("127.0.0.1", ("127.0.0.1", 9420))):
        found = load_config(tmp_path, {}, environ={"MODELFS_METRICS_LISTEN": text})
        assert found.metrics_listen == wanted


def test_the_page_is_prometheus_s_text_and_has_what_was_counted() -> None:
    histogram = Histogram()
    for seconds in (0.001, 0.003, 500.0):
        histogram.add(seconds)
    peer = {"bytes_in": 7, "bytes_out": 8, "failures": 1, "inflight": 2, "latency_seconds": 0.5}
    served = {"bytes_in": 1, "bytes_out": 2, "requests": {"get": 3}, "connections": 4}
    store = {"owned_bytes": 10, "cached_bytes": 20, "free_bytes": 30}
    chunks = {"local_bytes": 5, "remote_bytes": 6, "failovers": 0, "corrupt": 0}
    numbers = ("sent_bytes", "spared_bytes", "changes", "transactions", "buffered_bytes")
    counters = dict.fromkeys((*numbers, "handles", "kernel_inodes", "files", "bytes"), 1)
    text = metrics.text(
        {
            **counters,
            "nodes_up": 3,
            "chunks": chunks,
            "pushes": {"bytes": 11},
            "peers": {'n"2': peer},
            "served": served,
            "store": store,
            "upkeep": {"pins": 9},
            "scrub": {"bad_chunks": 4},
        },
        {"read": histogram.snapshot()},
        {},
    )
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["modelfs_request_seconds_count", "read"] == 3
    assert samples["modelfs_request_seconds_bucket", "+Inf", "read"] == 3
    assert samples["modelfs_request_seconds_bucket", "0.00390625", "read"] == 2
    assert samples["modelfs_request_seconds_sum", "read"] == pytest.approx(500.004)
    assert samples["modelfs_peer_received_bytes_total", 'n"2'] == 7
    assert samples["modelfs_served_requests_total", "get"] == 3
    assert samples["modelfs_read_bytes_total", "remote"] == 6
    assert samples["modelfs_upkeep_pins",] == 9
    assert samples["modelfs_scrub_bad_chunks",] == 4
    assert samples["process_resident_memory_bytes",] > 0
