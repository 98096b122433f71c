"""Loopback addresses that only this process uses: two test runs on one machine do not meet."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

from modelfsd.lab.state import address_block

_BLOCK = address_block(Path(f"/proc/{os.getpid()}"), 0)
_numbers = count(1)


def new_address() -> str:
    """An address that no other test of this process was given, up to 254 of them."""
    number = next(_numbers)
    assert number < 255, "a process has no more loopback addresses than this block"
    return f"{_BLOCK}.{number}"
