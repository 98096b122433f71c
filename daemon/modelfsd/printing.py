"""Text of others made fit to be shown: names of files and nodes, errors of peers, what etcd holds.

Whatever a terminal could take for an order, or a reader for another line, is shown as an escape:
`plain` is what the log and all that the commands print go through. JSON has escapes of its own.
"""

from __future__ import annotations

import sys
from typing import Any

_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def plain(text: str) -> str:
    """One line: all that is not printable (controls, line ends, what turns the direction of
    writing, bytes that are not UTF-8) as escapes.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that could not be decoded
        return f"\\x{code - 0xDC00:02x}"
    if char in _SHORT:
        return _SHORT[char]
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def plain_lines(text: str) -> str:
    """A message of several lines. All but the first are indented: none looks like another one."""
    first, *rest = map(plain, text.split("\n"))
    return "\n".join([first, *(line if line.startswith("  ") else f"  {line}" for line in rest)])


def plain_answer(value: Any) -> Any:  # noqa: ANN401  # whatever JSON may be
    """An answer of a daemon with all texts made plain."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, dict):
        return {plain(str(key)): plain_answer(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain_answer(each) for each in value]
    return value


def complain(program: str, message: object) -> None:
    """Say on stderr what is wrong, in the name of a program."""
    print(f"{program}: {plain_lines(str(message))}", file=sys.stderr)
