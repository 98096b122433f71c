"""Join tokens: their line, and whom they let in."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from modelfs.errors import UserError
from modelfs.ids import ClusterId
from modelfsd.trust import tokens
from modelfsd.trust.tokens import Token, TokenRefused

CLUSTER = ClusterId("c" * 16)
TOKEN, RECORD = tokens.new_token(CLUSTER, bytes(32), [("10.0.0.5", 7420)], 1000.0, 60.0, 2)
LINE = tokens.format_token(TOKEN)


def test_a_line_is_read_as_it_was_written() -> None:
    assert tokens.parse_token(f"  {LINE}\n") == TOKEN
    assert "\n" not in LINE and " " not in LINE


def test_a_secret_is_shown_nowhere_but_in_the_line() -> None:
    assert repr(TOKEN.secret) not in repr(TOKEN) and TOKEN.secret not in str(RECORD).encode()
    assert RECORD.secret_hash != TOKEN.secret


@given(some.integers(0, len(LINE) - 1), some.characters(codec="utf-8"))
def test_a_mistyped_line_is_told_and_not_repeated(at: int, letter: str) -> None:
    text = LINE[:at] + letter + LINE[at + 1 :]
    try:
        assert tokens.parse_token(text) == TOKEN  # the same letter, or one of the last bits
    except UserError as error:
        assert LINE[9:60] not in str(error)  # noqa: PT017


@pytest.mark.parametrize("length", range(0, len(LINE), 7))
def test_a_cut_line_is_told(length: int) -> None:
    with pytest.raises(UserError, match=r"not whole|not a join token"):
        tokens.parse_token(LINE[:length])


def test_what_another_version_made_is_told() -> None:
    later = Token(2, CLUSTER, bytes(32), [], bytes(8), bytes(32))
    with pytest.raises(UserError, match="another version"):
        tokens.parse_token(tokens.format_token(later))
    strange = Token(1, "../../etc/passwd", bytes(32), [], bytes(8), bytes(32))
    with pytest.raises(UserError, match="another version"):
        tokens.parse_token(tokens.format_token(strange))


def test_a_token_comes_from_the_line_a_file_or_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text(LINE + "\n")
    assert tokens.read_token(LINE) == TOKEN
    assert tokens.read_token(str(file)) == TOKEN
    assert tokens.read_token(f"@{file}") == TOKEN
    monkeypatch.setattr("sys.stdin", io.StringIO(LINE + "\nand more"))
    assert tokens.read_token("-") == TOKEN


@pytest.mark.parametrize("source", ["nonsense", "", "/", "@", "\0", "modelfs-", "x" * 5000])
def test_what_is_no_token_is_told(source: str) -> None:
    with pytest.raises(UserError, match=r"not a join token|damaged"):
        tokens.read_token(source)


def test_uses_are_counted_and_a_lost_answer_costs_none() -> None:
    once = tokens.use(RECORD, TOKEN.secret, b"key 1", 1010.0)
    assert (once.uses_left, once.used_by) == (1, [b"key 1"])
    assert tokens.use(once, TOKEN.secret, b"key 1", 2000.0) is once
    twice = tokens.use(once, TOKEN.secret, b"key 2", 1060.0)
    with pytest.raises(TokenRefused, match="used up"):
        tokens.use(twice, TOKEN.secret, b"key 3", 1060.0)


def test_each_refusal_says_why() -> None:
    with pytest.raises(TokenRefused, match="does not know"):
        tokens.use(None, TOKEN.secret, b"key", 1010.0)
    with pytest.raises(TokenRefused, match="does not know"):
        tokens.use(RECORD, b"guess", b"key", 1010.0)
    with pytest.raises(TokenRefused, match="expired 2 min ago"):
        tokens.use(RECORD, TOKEN.secret, b"key", 1180.0)
