"""Paths of Unix sockets: an address has room for 107 bytes, a path may be longer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATH_BYTES_MAX = 107  # sun_path less the NUL (unix(7))


@contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name of `path` that fits into a socket address."""
    if len(os.fsencode(path)) <= PATH_BYTES_MAX:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
