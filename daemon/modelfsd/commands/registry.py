"""Which daemons run on this machine: one small JSON file each, in a run directory.

The directory is `/run/modelfs` for root, else `$XDG_RUNTIME_DIR/modelfs` or `/tmp/modelfs-UID`;
`MODELFS_RUN_DIR` names another one. A file is written whole (temporary name, rename) and names its
process by pid and start time, so that a pid that was used again is never taken for a daemon.
Files of dead daemons are left for whoever cleans up their mounts; they are never trusted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

from modelfs.errors import UserError
from modelfsd.mounts import resolve

RUN_VARIABLE = "MODELFS_RUN_DIR"
ENTRY_BYTES_MAX = 64 << 10
ENTRIES_MAX = 4096
FILE_NAME_BYTES_MAX = 200


@dataclass(frozen=True, slots=True)
class Entry:
    """One daemon, as it registered itself. Paths are absolute texts, not touched."""

    pid: int
    start_time_ticks: int  # since boot, as in /proc/PID/stat
    mountpoint: str
    state_dir: str
    control: str
    name: str

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        return process_start_ticks(self.pid) == self.start_time_ticks


def process_start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it is gone or a zombie."""
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name stands in brackets and may contain anything, brackets too.
    fields = content[content.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def run_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the daemons of this user register."""
    if environ.get(RUN_VARIABLE):
        return Path(environ[RUN_VARIABLE]).absolute()
    if os.geteuid() == 0:
        return Path("/run/modelfs")
    if environ.get("XDG_RUNTIME_DIR", "").startswith("/"):
        return Path(environ["XDG_RUNTIME_DIR"]) / "modelfs"
    return Path(f"/tmp/modelfs-{os.geteuid()}")


class Registry:
    """The run directory."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = run_directory() if directory is None else directory

    def register(self, *, mountpoint: Path, state_dir: Path, control: Path, name: str) -> Entry:
        """Make this process known as the daemon of `mountpoint`.

        Raises `UserError` if another live one is, so that two that start at once cannot mount
        on top of each other.
        """
        self._prepare()
        pid = os.getpid()
        ticks = process_start_ticks(pid)
        assert ticks is not None
        entry = Entry(pid, ticks, str(mountpoint), str(state_dir), str(control), name)
        path = self._path(entry.mountpoint)
        with self._locked():
            other = self.find_by_mountpoint(entry.mountpoint)
            if other is not None and other.alive and other.pid != pid:
                raise UserError(
                    f"{mountpoint} is mounted already, or just being mounted, by process "
                    f"{other.pid}; unmount it with: modelfs umount {mountpoint}"
                )
            temporary = path.with_name(f".{path.name}.{pid}")
            temporary.write_text(json.dumps(asdict(entry)) + "\n", encoding="utf-8")
            temporary.replace(path)
        return entry

    def unregister(self, entry: Entry) -> None:
        """Forget a daemon, unless another one has taken its mount point over."""
        with self._locked():
            if self.find_by_mountpoint(entry.mountpoint) == entry:
                self._path(entry.mountpoint).unlink(missing_ok=True)

    def find_by_mountpoint(self, mountpoint: str | Path) -> Entry | None:
        """The daemon, alive or dead, that registered this mount point last."""
        return _read(self._path(str(mountpoint)))

    def find_by_path(self, path: str | Path) -> tuple[Entry, list[str]] | None:
        """The live daemon whose mount holds `path`, and the names from its root to there.

        Links outside the mount are followed; the mount itself is not touched.
        """
        by_mountpoint = {entry.mountpoint: entry for entry in self.live()}
        stop, rest = resolve(os.path.join(os.getcwd(), path), set(by_mountpoint))
        if stop not in by_mountpoint:
            return None
        return by_mountpoint[stop], [name for name in rest.split("/") if name]

    def find_by_state_dir(self, state_dir: str | Path) -> Entry | None:
        """The live daemon that uses this state directory."""
        wanted = os.path.realpath(state_dir)
        for entry in self.live():
            if os.path.realpath(entry.state_dir) == wanted:
                return entry
        return None

    def live(self) -> list[Entry]:
        """All daemons that run, by mount point."""
        try:
            names = sorted(os.listdir(self.directory))[:ENTRIES_MAX]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.directory} cannot be read: {error.strerror}") from error
        found = [
            _read(self.directory / name)
            for name in names
            if name.endswith(".json") and not name.startswith(".")
        ]
        return sorted(
            (entry for entry in found if entry is not None and entry.alive),
            key=lambda entry: entry.mountpoint,
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One change of the directory at a time; the kernel gives the lock back if we die."""
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _path(self, mountpoint: str) -> Path:
        name = quote(os.fsencode(mountpoint), safe="")
        if len(name) > FILE_NAME_BYTES_MAX:
            name = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()
        return self.directory / f"{name}.json"

    def _prepare(self) -> None:
        """Make the directory. In /tmp somebody else might have made it for us: refuse that."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.directory.lstat()
        except OSError as error:
            raise UserError(
                f"the run directory {self.directory} cannot be made: {error.strerror}; "
                f"name another one with {RUN_VARIABLE}"
            ) from error
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise UserError(f"the run directory {self.directory} belongs to somebody else")
        if status.st_mode & 0o022:
            raise UserError(f"the run directory {self.directory} may be written to by others")


def _read(path: Path) -> Entry | None:
    """One file; None if there is none, or it is not ours."""
    try:
        with path.open("rb") as file:
            content = file.read(ENTRY_BYTES_MAX)
        values = json.loads(content)
        entry = Entry(**values)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    types = {"pid": int, "start_time_ticks": int}
    if any(not isinstance(value, types.get(key, str)) for key, value in values.items()):
        return None
    return entry
