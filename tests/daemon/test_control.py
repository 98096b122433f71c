"""The admin socket: over real Unix sockets, with well-behaved and other clients."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from modelfs.errors import NoSuchEntry, UserError
from modelfsd.commands.control import (
    CLIENTS_MAX,
    NEWS_SECONDS,
    REQUEST_BYTES_MAX,
    ControlServer,
    Handler,
    Listener,
    LongHandler,
    call,
    call_long,
)


async def echo(request: dict[str, Any]) -> dict[str, Any]:
    return {"heard": request}


async def refuse(request: dict[str, Any]) -> dict[str, Any]:
    raise NoSuchEntry("models/a")


async def crash(request: dict[str, Any]) -> dict[str, Any]:
    raise ZeroDivisionError


HANDLERS = {"echo": echo, "refuse": refuse, "crash": crash}


@asynccontextmanager
async def serving(path: Path, handlers: Mapping[str, Handler] = HANDLERS) -> AsyncIterator[Path]:
    async with trio.open_nursery() as nursery:
        await nursery.start(ControlServer(path, handlers).serve)
        yield path
        nursery.cancel_scope.cancel()


async def ask(path: Path, command: str, /, **arguments: object) -> dict[str, Any]:
    return await trio.to_thread.run_sync(lambda: call(path, command, 20.0, **arguments))


async def test_an_answer_is_what_the_handler_returned(tmp_path: Path) -> None:
    async with serving(tmp_path / "control.sock") as path:
        names = ["a\udcff", "\n", "ü"]
        assert await ask(path, "echo", path=names) == {"heard": {"path": names}}


async def test_only_the_owner_may_connect(tmp_path: Path) -> None:
    async with serving(tmp_path / "control.sock") as path:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


async def test_a_dead_daemon_s_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with serving(path):
        assert await ask(path, "echo") == {"heard": {}}


async def test_a_path_longer_than_a_socket_address_works(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 200)
    directory.mkdir()
    async with serving(directory / "control.sock") as path:
        assert await ask(path, "echo", x=1) == {"heard": {"x": 1}}
        assert path.is_socket()


async def test_a_refusal_carries_the_daemon_s_words(tmp_path: Path) -> None:
    async with serving(tmp_path / "control.sock") as path:
        with pytest.raises(UserError, match=r"^models/a$"):
            await ask(path, "refuse")
        with pytest.raises(UserError, match="does not know the command 'scrub', only crash, echo"):
            await ask(path, "scrub")


@pytest.mark.expected_logs("the command 'crash' failed .ZeroDivisionError")
async def test_a_bug_in_a_handler_is_logged_and_the_server_goes_on(tmp_path: Path) -> None:
    async with serving(tmp_path / "control.sock") as path:
        with pytest.raises(UserError, match="internal error in the daemon"):
            await ask(path, "crash")
        assert await ask(path, "echo") == {"heard": {}}


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"{}", b'{"command": 1}', b"[" * 5000, b"\xff"])
async def test_nonsense_is_refused_and_the_conversation_goes_on(
    tmp_path: Path, line: bytes
) -> None:
    async with serving(tmp_path / "control.sock") as path:
        stream = await trio.open_unix_socket(path)
        async with stream:
            await stream.send_all(line + b"\n" + b'{"command": "echo"}\n')
            received = b""
            while received.count(b"\n") < 2:
                received += await stream.receive_some()
        first, second = map(json.loads, received.splitlines())
        assert first["ok"] is False
        assert second == {"ok": True, "heard": {}}


@pytest.mark.expected_logs("a line of more than 1 MiB")
async def test_a_line_without_end_is_cut_off(tmp_path: Path) -> None:
    async with serving(tmp_path / "control.sock") as path:
        stream = await trio.open_unix_socket(path)
        async with stream:
            with pytest.raises(trio.BrokenResourceError):
                await stream.send_all(b"x" * (16 * REQUEST_BYTES_MAX))


@pytest.mark.expected_logs("refused a client of the admin socket")
async def test_too_many_clients_are_turned_away(tmp_path: Path) -> None:
    async with serving(tmp_path / "control.sock") as path:
        streams = [await trio.open_unix_socket(path) for _ in range(CLIENTS_MAX)]
        for stream in streams:  # an answer proves that each has been accepted
            await stream.send_all(b"{}\n")
            assert await stream.receive_some()
        with pytest.raises(UserError):
            await ask(path, "echo")
        for stream in streams:
            await stream.aclose()


async def test_a_stop_is_answered_although_it_cancels_the_server(tmp_path: Path) -> None:
    scope = trio.CancelScope()

    async def stop(request: dict[str, Any]) -> dict[str, Any]:
        scope.cancel()
        return {"stopping": True}

    with scope:
        async with serving(tmp_path / "control.sock", {"stop": stop}) as path:
            with trio.CancelScope(shield=True):
                assert await ask(path, "stop") == {"stopping": True}


def test_nobody_there_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no modelfs daemon runs with the state directory"):
        call(tmp_path / "control.sock", "status", 1.0)


def test_a_daemon_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(os.fspath(path))
        silent.listen()
        with pytest.raises(UserError, match="did not answer"):
            call(path, "status", 0.05)


# ---------------------------------------------------------------- commands that take long


@asynccontextmanager
async def serving_long(path: Path, handler: LongHandler) -> AsyncIterator[Path]:
    async with trio.open_nursery() as nursery:
        server = ControlServer(path, HANDLERS, None, {"long": handler, "other": handler})
        await nursery.start(server.serve)
        yield path
        nursery.cancel_scope.cancel()


async def test_news_come_before_the_reply(tmp_path: Path) -> None:
    async def count(request: dict[str, Any], listener: Listener) -> dict[str, Any]:
        async with trio.open_nursery() as nursery:  # the lines do not mix
            for number in range(20):
                nursery.start_soon(listener.tell, {"number": number, "text": "x" * 200_000})
        return {"heard": request}

    def collect() -> list[tuple[bool, dict[str, Any]]]:
        return list(call_long(tmp_path / "control.sock", "long", 20.0, x=1))

    async with serving_long(tmp_path / "control.sock", count) as path:
        *news, (is_reply, reply) = await trio.to_thread.run_sync(collect)
        assert sorted(told["number"] for _, told in news) == list(range(20))
        assert not any(is_last for is_last, _ in news)
        assert (is_reply, reply) == (True, {"heard": {"x": 1}})
        assert await ask(path, "long", x=2) == {"heard": {"x": 2}}  # who wants no news gets none


async def test_progress_is_told_by_itself(tmp_path: Path) -> None:
    async def wait(request: dict[str, Any], listener: Listener) -> dict[str, Any]:
        told = trio.Event()

        def progress() -> dict[str, Any]:
            told.set()
            return {"done": 7}

        listener.progress = progress
        await told.wait()
        await trio.sleep(NEWS_SECONDS / 10)  # it is being sent
        return {}

    def collect() -> list[dict[str, Any]]:
        return [told for _, told in call_long(tmp_path / "control.sock", "long", 20.0)]

    async with serving_long(tmp_path / "control.sock", wait):
        news = await trio.to_thread.run_sync(collect)
    assert news[0] == {"progress": {"done": 7}}


async def test_a_command_ends_when_its_client_goes_away(tmp_path: Path) -> None:
    ended = trio.Event()

    async def work(request: dict[str, Any], listener: Listener) -> dict[str, Any]:
        try:
            await listener.tell({"begun": True})
            await trio.sleep_forever()
        finally:
            ended.set()
        raise AssertionError

    async with serving_long(tmp_path / "control.sock", work) as path:
        answers = call_long(path, "long", 20.0)
        assert await trio.to_thread.run_sync(next, answers) == (False, {"begun": True})
        await trio.to_thread.run_sync(answers.close)
        await ended.wait()
        assert await ask(path, "echo") == {"heard": {}}


async def test_a_client_that_is_gone_when_news_come_ends_it_too(tmp_path: Path) -> None:
    ended = trio.Event()

    async def talk(request: dict[str, Any], listener: Listener) -> dict[str, Any]:
        try:
            while True:
                await listener.tell({"text": "x" * 100_000})
        finally:
            ended.set()

    async with serving_long(tmp_path / "control.sock", talk) as path:
        stream = await trio.open_unix_socket(path)
        await stream.send_all(b'{"command": "long"}\n')
        assert await stream.receive_some()
        await stream.aclose()
        await ended.wait()


@pytest.mark.expected_logs("the command 'long' failed .ZeroDivisionError")
@pytest.mark.parametrize(
    ("error", "text"), [(NoSuchEntry("models/a"), "^models/a$"), (ZeroDivisionError(), "internal")]
)
async def test_a_failure_after_news_is_a_refusal(
    tmp_path: Path, error: Exception, text: str
) -> None:
    async def fail(request: dict[str, Any], listener: Listener) -> dict[str, Any]:
        await listener.tell({})
        raise error

    async with serving_long(tmp_path / "control.sock", fail) as path:
        with pytest.raises(UserError, match=text):
            await ask(path, "long")


async def test_the_next_request_may_come_while_a_command_runs(tmp_path: Path) -> None:
    async def hear(request: dict[str, Any], listener: Listener) -> dict[str, Any]:
        await trio.sleep(0.05)
        return {"long": True}

    async with serving_long(tmp_path / "control.sock", hear) as path:
        stream = await trio.open_unix_socket(path)
        async with stream:
            await stream.send_all(b'{"command": "long"}\n')
            await stream.send_all(b'{"command": "echo"}\n')
            received = b""
            while received.count(b"\n") < 2:
                received += await stream.receive_some()
        first, second = map(json.loads, received.splitlines())
        assert first == {"ok": True, "long": True}
        assert second == {"ok": True, "heard": {}}
