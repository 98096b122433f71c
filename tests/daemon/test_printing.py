"""What others have named or said is shown without giving orders to a terminal or forging a line."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import RenderableType

from modelfs.errors import PeerRefused, UserError
from modelfs.ids import NodeId
from modelfsd import cli
from modelfsd.commands import mount_helper, show
from modelfsd.kernel.errnos import errno_of
from modelfsd.logs import LineFormatter
from modelfsd.printing import plain, plain_answer, plain_lines

EVIL = "x\x1b]0;title\x07\x1b[2J\r\nforged: line\x9b31m\u202e\u2028\udcff\t"
TAME = "x"


@given(st.text(st.characters(exclude_categories=[])))
def test_any_text_is_one_printable_line_and_ordinary_text_stays(text: str) -> None:
    shown = plain(text)
    assert shown.isprintable()
    shown.encode()
    if text.isprintable():
        assert shown == text


def test_each_kind_of_what_is_not_shown_has_its_escape() -> None:
    assert plain("a\n\r\t\x1b\x7f\x9b\u202e\U000e0001\udcff") == (
        "a\\n\\r\\t\\x1b\\x7f\\x9b\\u202e\\U000e0001\\xff"
    )
    assert plain("Größe 模型 ok") == "Größe 模型 ok"


@given(st.text())
def test_no_line_of_a_message_looks_like_another_message(text: str) -> None:
    _, *rest = plain_lines(f"modelfs: {text}").split("\n")
    assert all(line.startswith("  ") for line in rest)


def test_the_log_escapes_what_it_shows() -> None:
    record = logging.LogRecord("modelfsd.x", logging.INFO, "", 0, "name %s", (EVIL,), None)
    line = LineFormatter(journal=True).format(record)
    assert line.isprintable()


def everywhere(value: Any, text: str) -> Any:  # noqa: ANN401  # JSON
    """An answer with every text, and every key of free choice, replaced."""
    if isinstance(value, str):
        return text
    if isinstance(value, dict):
        return {key: everywhere(each, text) for key, each in value.items()}
    return [everywhere(each, text) for each in value] if isinstance(value, list) else value


STATUS = {
    "cluster": {"name": "c", "id": "c"},
    "node": {"name": "n", "id": "n", "pid": 1},
    "version": "v", "mountpoint": "/m", "state_dir": "/s", "files": 1,
    "etcd": {
        "healthy": False, "error": "e", "endpoints": ["e"],
        "members": [{"name": "m", "healthy": True, "learner": True}],
    },
    "nodes": [{"name": "n", "id": "i", "address": "a", "zone": "z", "version": "v"}],
    "limits": ["l"], "warnings": ["w"], "unreadable_records": [{"key": "k", "reason": "r"}],
}  # fmt: skip
INFO = {
    "path": "/p", "type": "file", "ino": 1, "version": 1, "chunk_count": 1, "manifest": "m",
    "nodes": [{"name": "n", "id": "i", "chunks": [[0, 1]]}],
}  # fmt: skip
VERSIONS = {
    "path": "/p", "removed_directories": [{"path": "/d", "number": 1}],
    "versions": [{"number": 1, "type": "file", "why": "deleted", "node": "n"}],
    "gone_names": ["g"], "gone_name_count": 1,
}  # fmt: skip
POLICY = {"path": "/p", "from": {"replicas": "/d"}, "replicas": 2}


def printed(view: RenderableType) -> str:
    stream = io.StringIO()
    show.console(stream).print(view)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("view", "answer"),
    [
        (show.status_view, STATUS), (show.info_view, INFO), (show.versions_view, VERSIONS),
        (show.policy_view, POLICY),
    ],
)  # fmt: skip
def test_every_text_in_what_a_command_shows_is_plain(view: Any, answer: dict[str, Any]) -> None:  # noqa: ANN401
    tame = printed(view(everywhere(answer, TAME)))
    shown = printed(view(everywhere(answer, EVIL)))
    assert shown.replace("\n", "").isprintable() and "\\x1b" in shown
    starts = {line[:7] for line in tame.splitlines()} | {"       "}
    forged = [line for line in shown.splitlines() if line.startswith("forged")]
    assert not forged and starts


def test_an_answer_is_made_plain_to_its_depths() -> None:
    answer = plain_answer({EVIL: [{"a": EVIL, "n": 1, "t": True, "z": None}]})
    ((key, [row]),) = answer.items()
    assert key == row["a"] == plain(EVIL) and (row["n"], row["t"], row["z"]) == (1, True, None)
    assert "\x1b" not in show.restored_text({"path": EVIL, "restored": 1, "number": 2})


@pytest.mark.parametrize("say", [cli._complain, lambda error: mount_helper._complain(error, 1)])
def test_what_a_peer_says_in_an_error_is_plain(
    say: Any,  # noqa: ANN401
    capsys: pytest.CaptureFixture[str],
) -> None:
    for error in (PeerRefused(NodeId("1" * 16), EVIL), UserError(f"no file {EVIL}")):
        assert errno_of(error)
        say(error)
        first, *rest = capsys.readouterr().err.splitlines()
        assert first.isprintable() and all(line.isprintable() for line in rest)
        assert all(line.startswith("  ") for line in rest)
