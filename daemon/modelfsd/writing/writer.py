"""The writer: all files that are being written on this node, and what they share."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import trio

from modelfs.errors import ModelfsError
from modelfs.limits import MIB
from modelfsd.budget import ByteBudget
from modelfsd.kernel.kernel_cache import KernelCache
from modelfsd.kernel.kernel_inodes import KernelInode
from modelfsd.metadata.leases import Leases
from modelfsd.metadata.namespace import Namespace
from modelfsd.storage.contents import Contents
from modelfsd.storage.replicator import Replicator
from modelfsd.writing.assembly import AssemblyMemory
from modelfsd.writing.staging import keep
from modelfsd.writing.version_store import VersionStore
from modelfsd.writing.write_session import WriteSession

log = logging.getLogger(__name__)

UPLOAD_BYTES = 96 * MIB  # chunks that are being named and sent, for all files together
ASSEMBLY_BYTES = UPLOAD_BYTES + 32 * MIB  # chunks in memory: also those that are being written
STAGING_THREADS = 8
HOLD_SECONDS = 1.0  # uncommitted contents of small files stay in memory alone about so long


class Writer:
    """All write sessions of this node."""

    def __init__(
        self,
        namespace: Namespace,
        leases: Leases,
        contents: Contents,
        replicator: Replicator,
        kernel_cache: KernelCache,
        state_dir: Path,
        run_in_background: Callable[..., None],
    ) -> None:
        self.namespace, self.leases = namespace, leases
        self.contents, self.replicator = contents, replicator
        self.inodes, self.retire = kernel_cache.inodes, kernel_cache.retire
        self.staging_dir, self.lost_dir = state_dir / "staging", state_dir / "lost"
        self.start_soon = run_in_background
        self.uploads = ByteBudget(UPLOAD_BYTES)
        self.versions = VersionStore(contents, replicator, self.uploads, namespace.node_id)
        self.memory = AssemblyMemory(ASSEMBLY_BYTES)
        self.limiter = trio.CapacityLimiter(STAGING_THREADS)
        self._session_count = 0
        self.open_sessions: set[WriteSession] = set()
        run_in_background(self._spill)

    def session_of(self, inode: KernelInode) -> WriteSession:
        """The session of a kernel inode, begun if need be; one handle more."""
        if inode.session is None:
            self._session_count += 1
            name = f"{inode.ino:x}-{time.time_ns():x}-{self._session_count}"
            inode.session = WriteSession(self, inode, self.staging_dir / name)
            self.open_sessions.add(inode.session)
        inode.session.handles += 1
        return inode.session

    def open_paths(self) -> list[bytes]:
        """Where the files are that are open for writing; those without a name are left out."""
        mirror = self.namespace.mirror
        inos = {session.inode.ino for session in self.open_sessions}
        return [mirror.path_of(ino) for ino in inos if mirror.names.get(ino)]

    def end(self, session: WriteSession) -> None:
        """Nobody needs it any more, and everything is settled. May be called again."""
        self.open_sessions.discard(session)
        if session.inode.session is session:
            session.inode.session = None
        self.inodes.drop_if_unused(session.inode)

    def keep_leftovers(self) -> int:
        """Move what an earlier run of the daemon had staged to `lost/`. Returns how many files."""
        self.staging_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.lost_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        leftovers = sorted(self.staging_dir.iterdir())
        return sum(keep(directory, self.lost_dir) for directory in leftovers)

    async def _spill(self) -> None:
        """Write down what small files hold in memory and nobody has committed, for ever."""
        while True:
            await trio.sleep(HOLD_SECONDS)
            before = trio.current_time() - HOLD_SECONDS
            for session in self.open_sessions:
                since = session.copy.held_since
                if since is not None and since <= before:
                    session.copy.held_since = None  # it may wait for a commit: once is enough
                    self.start_soon(session.spill)

    async def give_up(self, seconds: float) -> None:
        """The daemon ends with writes that could not be committed: let none be in memory alone."""
        log.error("not everything could be committed in %.0f s; the rest is kept", seconds)
        for session in list(self.open_sessions):
            await session.spill()

    async def flush_all(self) -> None:
        """Commit every dirty working copy; what fails is kept and logged. For a clean stop."""
        for session in list(self.open_sessions):
            try:
                await session.flush()
            except (ModelfsError, OSError) as error:
                log.error("not committed at stop: %s", error)
