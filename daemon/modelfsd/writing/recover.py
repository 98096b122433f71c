"""`modelfs recover`: make a file of a write that could not be committed.

Reads the staging directory, and what it refers to: sealed chunks and those of the base version.
A chunk is taken from this node's own store if it is there and good, else from the daemon, which
asks the other nodes. So after a crash most can be rebuilt without a daemon, and all with one.

What cannot be rebuilt is zeros in the file that is written, and is told range by range. The
staging directory is never changed. The file appears under its name only when it is complete.
"""

from __future__ import annotations

import base64
import errno
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelfs import manifest as manifests
from modelfs import stripe
from modelfs.chunk import is_zeros
from modelfs.errors import ModelfsError, ProtocolError, UserError
from modelfs.limits import MIB
from modelfs.manifest import Manifest, PlacedChunk
from modelfs.ports import Holding
from modelfsd import mounts
from modelfsd.commands.control import call
from modelfsd.commands.registry import Registry
from modelfsd.config import default_state_dir
from modelfsd.storage import chunk_file
from modelfsd.storage.chunk_tree import NO_COPY_ERRNOS
from modelfsd.units import format_size
from modelfsd.writing import layout, lost
from modelfsd.writing.lost import LostCopy

PIECE_BYTES = 1 * MIB  # of a chunk, asked for at once: its copy in JSON must not hold the daemon up
FETCH_SECONDS = 120.0  # a silent peer costs 10 s, and each of its siblings too
ATTEMPTS_MAX = 3  # a file of a running daemon may become a chunk while we read
RANGES_SHOWN_MAX = 20

Fetch = Callable[[PlacedChunk, int, int, int], bytes]
"""(chunk, replicas, start, size) -> bytes. Raises `ModelfsError`."""


class RecoveryFailed(ModelfsError):
    """The file was not written. The text says why; what was lost is as it was."""


@dataclass(frozen=True, slots=True)
class Missing:
    """A range of the file that could not be rebuilt, [start, end)."""

    start: int
    end: int
    why: str


@dataclass(slots=True)
class Recovered:
    """What `recover NAME DEST` did."""

    name: str
    dest: str
    size: int
    directory: str
    missing: list[Missing] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "name": self.name,
            "dest": self.dest,
            "size": self.size,
            "directory": self.directory,
            "missing": [
                {"start": gap.start, "end": gap.end, "why": gap.why} for gap in self.missing
            ],
        }

    def text(self) -> str:
        """For people."""
        lines = [f"recovered {self.dest}: {format_size(self.size)}"]
        if self.missing:
            total = sum(gap.end - gap.start for gap in self.missing)
            lines.append(f"NOT complete: {format_size(total)} could not be rebuilt, and are zeros:")
            shown = self.missing[:RANGES_SHOWN_MAX]
            lines += [f"  bytes {gap.start} to {gap.end - 1}: {gap.why}" for gap in shown]
            if len(self.missing) > len(shown):
                lines.append(f"  and {len(self.missing) - len(shown)} more ranges (see --json)")
        lines.append(f"its bytes are still in {self.directory}: remove that when you are content")
        return "\n".join(lines)


# ---------------------------------------------------------------- the command


def choose_state_dir(
    registry: Registry, state_dir: str | None, mountpoint: str | None, environ: Mapping[str, str]
) -> Path:
    """Whose lost writes are meant. Works without a daemon too. Raises `UserError`."""
    if state_dir and mountpoint:
        raise UserError("--state-dir and --mount both name a node: give one of them")
    if mountpoint:
        entry = registry.find_by_mountpoint(mounts.resolve(os.path.abspath(mountpoint))[0])
        if entry is None:
            raise UserError(f"no modelfs daemon has served {mountpoint}; give --state-dir")
        return Path(entry.state_dir)
    named = state_dir or environ.get("MODELFS_STATE_DIR")
    if named:
        chosen = Path(named).absolute()
    else:
        live = registry.live()
        if len(live) > 1:
            text = "\n".join(f"  {entry.mountpoint}  ({entry.state_dir})" for entry in live)
            raise UserError(f"several modelfs daemons run here:\n{text}\nsay which with --mount")
        chosen = Path(live[0].state_dir) if live else default_state_dir(environ, os.geteuid() == 0)
    if not chosen.is_dir():
        raise UserError(f"{chosen} does not exist: name the node's directory with --state-dir")
    return chosen


def list_lost(state_dir: Path) -> list[LostCopy]:
    """What `recover --list` shows, oldest first. Raises `UserError`."""
    try:
        failed = call(state_dir / "control.sock", "lost", FETCH_SECONDS).get("failed")
    except UserError:
        failed = None  # no daemon: then all that is in staging/ is lost
    told = failed if isinstance(failed, dict) else {}
    try:
        return lost.lost_copies(state_dir, {str(name): str(why) for name, why in told.items()})
    except PermissionError as error:
        raise UserError(f"only the owner of {state_dir} may read it: try sudo") from error


def recover(state_dir: Path, name: str, dest: Path) -> Recovered:
    """Write a lost file out to `dest`. Raises `UserError`, and `RecoveryFailed`."""
    copies = list_lost(state_dir)
    chosen = [copy for copy in copies if copy.name == name]
    chosen = chosen or [copy for copy in copies if copy.name.startswith(name)]
    if len(chosen) != 1:
        what = "nothing lost is" if not chosen else f"{len(chosen)} lost writes are"
        raise UserError(f"{what} called {name}: see modelfs recover --list")
    if os.path.lexists(dest):
        raise UserError(f"{dest} exists: nothing is overwritten; name another file")
    rebuild = Rebuild(state_dir, chosen[0].name, _Chunks(state_dir))
    missing = write_out(rebuild, dest)
    return Recovered(chosen[0].name, str(dest), rebuild.size, str(rebuild.directory()), missing)


# ---------------------------------------------------------------- writing


def write_out(rebuild: Rebuild, dest: Path) -> list[Missing]:
    """Make the file, whole or not at all. Returns what could not be rebuilt."""
    partial = dest.with_name(f".{dest.name[:50]}.{os.getpid()}.partial")  # 4 bytes a letter
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            missing: list[Missing] = []
            os.truncate(descriptor, rebuild.size)
            for start, data in rebuild.positions(missing):
                _write_but_holes(descriptor, memoryview(data), start)
            os.fsync(descriptor)
            os.close(descriptor)
            descriptor = -1
            _install(partial, dest)
        finally:
            if descriptor >= 0:
                os.close(descriptor)
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise RecoveryFailed(
            f"{dest} could not be written: {error.strerror or error}; "
            f"nothing is lost, all is still in {rebuild.directory()}"
        ) from error
    return _joined(missing)


def _write_but_holes(descriptor: int, data: memoryview, offset: int) -> None:
    for start in range(0, len(data), PIECE_BYTES):
        piece = data[start : start + PIECE_BYTES]
        if is_zeros(piece):
            continue
        while piece:
            written = os.pwrite(descriptor, piece, offset + start)
            piece, start = piece[written:], start + written


def _install(partial: Path, dest: Path) -> None:
    """Give the file its name for good, never over another one."""
    try:
        os.link(partial, dest)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        if os.path.lexists(dest):  # a file system without links
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(dest)) from error
        os.rename(partial, dest)
    directory = os.open(dest.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)  # the lost copy may be removed now
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # not to be had there
            raise
    finally:
        os.close(directory)


def _joined(missing: list[Missing]) -> list[Missing]:
    """Neighbours that fail for the same reason are one range."""
    joined: list[Missing] = []
    for gap in missing:
        if joined and joined[-1].end == gap.start and joined[-1].why == gap.why:
            joined[-1] = Missing(joined[-1].start, gap.end, gap.why)
        else:
            joined.append(gap)
    return joined


# ---------------------------------------------------------------- reading


class Rebuild:
    """The file as its writer saw it, one chunk position at a time."""

    def __init__(self, state_dir: Path, name: str, fetch: Fetch) -> None:
        self._state_dir, self._name, self._fetch = state_dir, name, fetch
        self._manifest: Manifest | None = None
        self._manifest_failure = ""
        self._load()

    def directory(self) -> Path:
        """Where its files are now: a session that ends moves them."""
        kept = self._state_dir / "lost" / self._name
        return kept if kept.is_dir() else self._state_dir / "staging" / self._name

    def _load(self) -> None:
        try:
            description = layout.read_description(self.directory())
            self._layout = layout.read_layout(self.directory(), description)
        except OSError as error:
            where = error.filename or self.directory()
            raise RecoveryFailed(f"{where} cannot be read: {error.strerror}") from error
        except ProtocolError as error:
            raise RecoveryFailed(str(error)) from error

    @property
    def size(self) -> int:
        """Of the file."""
        return self._layout.size

    def positions(self, missing: list[Missing]) -> Iterator[tuple[int, bytearray]]:
        """(offset, bytes) of each chunk position; adds to `missing` what is only zeros there."""
        chunk_bytes, size = self._layout.base.chunk_bytes, self.size
        for index in range(stripe.chunk_count(chunk_bytes, size)):
            start, span = stripe.span(chunk_bytes, index)
            found: list[Missing] = []
            data = self._position(index, min(span, size - start), found)
            missing += [Missing(start + gap.start, start + gap.end, gap.why) for gap in found]
            yield start, data

    def _position(self, index: int, length: int, missing: list[Missing]) -> bytearray:
        """The bytes of one position."""
        for attempt in range(ATTEMPTS_MAX):
            try:
                return self._overlay(index, length, missing)
            except FileNotFoundError:  # sealed or moved by a running daemon since we looked
                if attempt == ATTEMPTS_MAX - 1:
                    raise
                missing.clear()
                self._load()
        raise AssertionError("unreachable")

    def _overlay(self, index: int, length: int, missing: list[Missing]) -> bytearray:
        data = bytearray(length)
        staged = self._layout.staged.get(index)
        limit = min(length, self._layout.under_limit(index))
        gaps = [(0, limit)] if staged is None else list(staged.extents.gaps(0, limit))
        for start, end in gaps:
            self._fill_from_below(index, memoryview(data)[start:end], start, missing)
        if staged is not None:
            with open(self.directory() / staged.file, "rb", buffering=0) as file:
                for start, end in staged.extents:
                    into = memoryview(data)[start : min(end, length)]
                    missing += [Missing(*gap) for gap in lost.read_into(file.fileno(), into, start)]
        return data

    def _fill_from_below(
        self, index: int, into: memoryview, start: int, missing: list[Missing]
    ) -> None:
        """What a position holds below what is staged: its sealed chunk, or the base version."""
        base, sealed = self._layout.base, self._layout.sealed.get(index)
        if sealed is not None:
            try:
                with open(self.directory() / sealed.file, "rb", buffering=0) as file:
                    valid = max(0, min(len(into), sealed.length - start))
                    gaps = lost.read_into(file.fileno(), into[:valid], start)
            except FileNotFoundError:
                gaps = [(start, start + len(into), "")]
            for at, end, _ in gaps:
                self._fill_from_chunk(sealed.chunk, into[at - start : end - start], at, missing)
        elif base.manifest is None:
            inline = (base.inline or b"")[start : start + len(into)]
            into[: len(inline)] = inline
        else:
            try:
                chunk = self._base_entry(index)
            except ModelfsError as error:
                missing.append(Missing(start, start + len(into), f"the base version: {error}"))
            else:
                self._fill_from_chunk(chunk, into, start, missing)

    def _fill_from_chunk(
        self, chunk: PlacedChunk | None, into: memoryview, start: int, missing: list[Missing]
    ) -> None:
        if chunk is None:
            return
        end = min(len(into), chunk.ref.length - start)  # zeros after its end
        for at in range(0, end, PIECE_BYTES):
            size = min(PIECE_BYTES, end - at)
            try:
                data = self._fetch(chunk, self._layout.base.replicas, start + at, size)
            except ModelfsError as error:
                # The rest of it would fail like this, and slowly.
                missing.append(Missing(start + at, start + end, str(error)))
                return
            into[at : at + size] = data

    def _base_entry(self, index: int) -> PlacedChunk | None:
        """The chunk at a position of the base version. Raises `ModelfsError`."""
        if self._manifest_failure:
            raise RecoveryFailed(self._manifest_failure)
        try:
            if self._manifest is None:
                assert self._layout.base.manifest is not None
                self._manifest = manifests.decode(self._whole(self._layout.base.manifest.placed))
            page = self._manifest.page_of(index)
            if page is not None:
                self._manifest.add_page(page, self._whole(self._manifest.page_chunk(page)))
        except ModelfsError as error:
            self._manifest_failure = str(error)
            raise
        return self._manifest.entry(index)

    def _whole(self, chunk: PlacedChunk) -> bytes:
        length, replicas = chunk.ref.length, self._layout.base.replicas
        starts = range(0, length, PIECE_BYTES)
        pieces = [self._fetch(chunk, replicas, s, min(PIECE_BYTES, length - s)) for s in starts]
        return b"".join(pieces)


class _Chunks:
    """Fetches chunks: from this node's store if they are good, else through its daemon."""

    def __init__(self, state_dir: Path) -> None:
        self._store, self._control = state_dir / "chunks", state_dir / "control.sock"

    def __call__(self, chunk: PlacedChunk, replicas: int, start: int, size: int) -> bytes:
        return self._here(chunk, start, size) or self._there(chunk, replicas, start, size)

    def _here(self, chunk: PlacedChunk, start: int, size: int) -> bytes | None:
        name = chunk.ref.id.hex()
        for holding in Holding:
            try:
                path = self._store / holding.value / name[:2] / name[2:]
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                if error.errno not in NO_COPY_ERRNOS:
                    raise
                continue
            try:
                data = chunk_file.read_range(descriptor, chunk.ref, start, size)
            except OSError as error:
                if error.errno not in chunk_file.DAMAGE_ERRNOS:
                    raise
                data = None
            finally:
                os.close(descriptor)
            if data is not None:
                return bytes(data)
        return None

    def _there(self, chunk: PlacedChunk, replicas: int, start: int, size: int) -> bytes:
        ref = chunk.ref
        wanted = {"id": ref.id.hex(), "checksum": ref.checksum, "length": ref.length}
        place = {"epoch": chunk.epoch, "replicas": replicas}
        answer = call(
            self._control, "chunk", FETCH_SECONDS, **wanted, **place, start=start, size=size
        )
        data = base64.b64decode(str(answer.get("data", "")))
        if len(data) != size:
            raise ProtocolError(f"the daemon sent {len(data)} of {size} bytes of a chunk")
        return data
