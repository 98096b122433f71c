"""Writes that were not committed: which there are, and what of the cluster they need.

Nothing here talks to a daemon or changes a file, so it works while the daemon runs, and after it
was killed. `layout` reads what the files say; `recover` makes files of it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelfs.errors import ProtocolError, UserError
from modelfs.ids import ChunkId
from modelfs.inode import Inode
from modelfs.limits import BLOCK_BYTES
from modelfsd.storage.chunk_file import DAMAGE_ERRNOS
from modelfsd.writing.layout import placed_chunk, read_description, read_journal, read_layout
from modelfsd.writing.staging import DESCRIPTION

RENEWAL_SECONDS = 7 * 86_400.0  # for how long the chunks of lost writes are kept from reclaim


@dataclass(frozen=True, slots=True)
class LostCopy:
    """One row of `modelfs recover --list`. Times are seconds since 1970, sizes bytes."""

    name: str
    directory: Path
    path: str
    node: str
    base_version: int
    size: int
    written_at: float
    why: str
    is_open: bool  # its file is still open on the node, so it is in staging/ yet

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "name": self.name,
            "directory": str(self.directory),
            "path": self.path,
            "node": self.node,
            "base_version": self.base_version,
            "size": self.size,
            "written_at": self.written_at,
            "why": self.why,
            "open": self.is_open,
        }


def lost_copies(state_dir: Path, failed: Mapping[str, str]) -> list[LostCopy]:
    """All that can be recovered of this node, oldest first. Raises `UserError`.

    While the daemon runs, what is in staging/ is being written, unless it failed: that says its
    description or, if the disk was too full for one, the daemon (`failed`: name -> why).
    """
    is_running = _is_locked(state_dir / "lock")
    found: list[LostCopy] = []
    for directory in _directories(state_dir / "staging"):
        why = failed.get(directory.name)
        try:
            if is_running and why is None and not read_description(directory).is_lost:
                continue
            copy = _describe(directory, is_running)
        except PermissionError:
            raise
        except (OSError, ProtocolError):
            continue  # it is being made or removed, or was kept a moment ago
        found.append(copy if why is None else replace(copy, why=why))
    for directory in _directories(state_dir / "lost"):  # later: what moves meanwhile is in both
        with suppress(FileNotFoundError):  # its owner has removed it
            found.append(_describe(directory, False))
    by_name = {copy.name: copy for copy in found}
    return sorted(by_name.values(), key=lambda copy: copy.written_at)


def _directories(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{parent} cannot be read: {error.strerror}") from error


def _is_locked(path: Path) -> bool:
    """Whether a daemon uses the state directory (see `preflight.lock_state_dir`)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _describe(directory: Path, is_open: bool) -> LostCopy:
    """A row; one whose description is damaged is shown too."""
    when = 0.0
    try:
        when = written_at(directory)
        description = read_description(directory)
        layout = read_layout(directory, description)
    except PermissionError:
        raise
    except (OSError, ProtocolError) as error:
        if not directory.is_dir():
            raise FileNotFoundError(directory) from error
        why = f"{DESCRIPTION} is missing or damaged"
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            why = f"{error.filename or directory} cannot be read: {error.strerror}"
        return LostCopy(directory.name, directory, "", "", 0, 0, when, why, is_open)
    return LostCopy(
        directory.name,
        directory,
        description.path,
        description.node,
        description.base.version,
        layout.size,
        when,
        description.why,
        is_open,
    )


def written_at(directory: Path) -> float:
    """When something was written to a staging directory last."""
    times = [path.stat().st_mtime for path in directory.iterdir() if path.name != DESCRIPTION]
    return max(times, default=directory.stat().st_mtime)


def lost_chunks(lost_dir: Path, now: float) -> list[ChunkId]:
    """The sealed chunks of lost writes, which reclaim must spare: nothing else names them.

    They are renewed for `RENEWAL_SECONDS` after the loss; then who wanted them has had the time.
    What is damaged is left out. Blocks.
    """
    found: set[ChunkId] = set()
    for directory in _recent(lost_dir, now):
        try:
            records = read_journal(directory)
        except OSError:
            continue  # the others are not to be lost with it
        for record in records:
            chunk = record.get("chunk")
            if isinstance(chunk, dict):
                try:
                    found.add(placed_chunk(chunk).ref.id)
                except ProtocolError:
                    continue
    return sorted(found)


def lost_bases(lost_dir: Path, now: float) -> list[Inode]:
    """The versions that lost writes are based on, to be pinned for as long. Blocks."""
    found: list[Inode] = []
    for directory in _recent(lost_dir, now):
        try:
            found.append(read_description(directory).base)
        except (OSError, ProtocolError):
            continue
    return found


def _recent(lost_dir: Path, now: float) -> Iterator[Path]:
    for directory in _directories(lost_dir):
        try:
            is_recent = directory.stat().st_mtime >= now - RENEWAL_SECONDS
        except FileNotFoundError:
            continue  # its owner has removed it
        if is_recent:
            yield directory


def read_into(descriptor: int, into: memoryview, start: int) -> list[tuple[int, int, str]]:
    """Fill `into` from a staging file; what the file does not have stays zeros.

    Returns what the disk does not give back, and why, to some blocks: that is zeros too.
    """
    failed = []
    for at in range(0, len(into), BLOCK_BYTES):
        piece, position = into[at : at + BLOCK_BYTES], start + at
        try:
            while piece and (count := os.preadv(descriptor, [piece], position)):
                piece, position = piece[count:], position + count
        except OSError as error:
            if error.errno not in DAMAGE_ERRNOS:
                raise
            piece[:] = bytes(len(piece))
            why = f"the disk does not give it back: {error.strerror}"
            failed.append((position, position + len(piece), why))
    return failed
