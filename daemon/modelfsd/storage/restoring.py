"""Restores copies that were found bad, or nowhere, and remembers what cannot be restored.

Whoever finds a bad copy knows its name alone: the file is out of service, and what stood in it is
not to be believed. What the chunk really is, and whether anybody needs it, the manifests say. So
the reports of some moments are looked for in one search (`Surveyor.find`), and good copies are
fetched from the other nodes.

A chunk that a read, or a check, has found on no node at all is reported too (`note_unavailable`).
If it turns up later it is fetched here; should that copy be surplus, healing takes it away again.

What could not be restored is *failing*: its files are known by their paths, `status` names them,
and it is tried again from time to time, until a good copy turns up (a node came back), or no file
needs the chunk any more. This happens in a task of the node, so a command that asked for it may
go away at any moment.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

import trio

from modelfs.errors import ModelfsError
from modelfs.ids import ChunkId, InodeNumber
from modelfs.mirror import Mirror
from modelfsd.logs import RateLimited
from modelfsd.metadata.locating import paths_of
from modelfsd.storage.chunks import Chunks
from modelfsd.storage.repairer import fetch_again
from modelfsd.storage.survey import Named, Surveyor

log = logging.getLogger(__name__)

SETTLE_SECONDS = 0.05  # bad copies rarely come alone
RETRY_SECONDS = 300.0  # between two tries of what fails; also those that a healing round takes
FAILING_MAX = 10_000  # remembered: a disk that loses more has lost everything
PATHS_MAX = 16  # named for one chunk
INODES_AT_ONCE = 1000  # looked at between two yields to the other tasks


class Outcome(Enum):
    """What became of a bad copy."""

    RESTORED = "restored"
    UNNEEDED = "unneeded"  # no file needs the chunk
    FAILED = "failed"  # and is tried again


@dataclass(slots=True, eq=False)
class Restoration:
    """One chunk to restore. `outcome` is that of the last try, and `done` is set after the first.

    `manifests` name it, if it could not be restored; `files` are the inodes that have one of them.
    """

    chunk: ChunkId
    mirror: Mirror = field(repr=False)
    outcome: Outcome | None = None
    reason: str = ""
    manifests: frozenset[bytes] = frozenset()
    files: list[InodeNumber] = field(default_factory=list)
    done: trio.Event = field(default_factory=trio.Event)

    @property
    def paths(self) -> list[str]:
        """What cannot be read whole without it, as it is called now."""
        records = [(ino, self.mirror.readable_inode(ino)) for ino in self.files]
        current = [
            ino
            for ino, record in records
            if record is not None and record.manifest and record.manifest.id in self.manifests
        ]
        found = [path for ino in current for path in paths_of(self.mirror, ino)]
        return found[:PATHS_MAX] or (["(a retained or open version)"] if self.manifests else [])


class Restorer:
    """One node's restorations."""

    def __init__(self, chunks: Chunks, surveyor: Surveyor) -> None:
        self._chunks, self._surveyor = chunks, surveyor
        self._waiting: dict[ChunkId, Restoration] = {}
        self._failing: dict[ChunkId, Restoration] = {}
        self._trying: dict[ChunkId, Restoration] = {}
        self._unneeded_at: dict[ChunkId, float] = {}  # when a search has found that
        self._news = trio.Event()
        self._quiet = RateLimited(log, 60.0)
        self.restored = 0

    def failing(self) -> list[Restoration]:
        """The chunks of which no good copy was found, and that files need."""
        return [one for one in self._failing.values() if one.manifests]

    def report(self, chunk: ChunkId) -> Restoration:
        """The copy here was bad, and is gone. Does not wait."""
        waiting = self._waiting.get(chunk)
        if waiting is None:
            waiting = self._waiting[chunk] = Restoration(chunk, self._chunks.mirror)
            self._news.set()
        return waiting

    def note_unavailable(self, chunk: ChunkId) -> None:
        """No node that answers has a good copy. Does nothing if that is known."""
        if any(chunk in known for known in (self._failing, self._waiting, self._trying)):
            return
        if trio.current_time() - self._unneeded_at.get(chunk, float("-inf")) > RETRY_SECONDS:
            self.report(chunk)

    async def run(self) -> None:
        """Restore what is reported, for ever."""
        while True:
            with trio.move_on_after(RETRY_SECONDS if self._failing else float("inf")):
                await self._news.wait()
            await trio.sleep(SETTLE_SECONDS)
            self._news = trio.Event()
            self._trying, self._waiting = {**self._failing, **self._waiting}, {}
            await self._restore(self._trying)
            self._trying = {}

    async def _restore(self, batch: dict[ChunkId, Restoration]) -> None:
        try:
            found = await self._surveyor.find(batch)
        except (ModelfsError, OSError) as error:
            for one in batch.values():
                self._end_unknown(one, error)
                one.done.set()
            return
        for one in batch.values():
            named = found.named.get(one.chunk)
            if named is not None:
                await self._restore_one(one, named)
            elif found.missed:
                self._end_unknown(one, found.missed)
            else:
                self._end(one, Outcome.UNNEEDED)
                if len(self._unneeded_at) >= FAILING_MAX:
                    self._unneeded_at.clear()
                self._unneeded_at[one.chunk] = trio.current_time()
        await self._name_files(
            {one.chunk: named for one in batch.values() if (named := found.named.get(one.chunk))}
        )
        unneeded = [one.chunk for one in batch.values() if one.outcome is Outcome.UNNEEDED]
        with suppress(OSError):  # the next batch tidies up
            await trio.to_thread.run_sync(self._chunks.store.tidy_damaged, unneeded)
        count = sum(one.outcome is Outcome.RESTORED for one in batch.values())
        if count:
            log.info("restored %d chunks of which copies were bad", count)
        for one in batch.values():
            if one.outcome is Outcome.FAILED and one.manifests and not one.done.is_set():
                text = "chunk %s cannot be restored, and %s needs it: %s"
                name = one.chunk.hex()[:16]
                self._quiet.error("failed", text, name, ", ".join(one.paths), one.reason)
            one.done.set()

    async def _restore_one(self, one: Restoration, named: Named) -> None:
        try:
            look = partial(self._chunks.store.has, [one.chunk], renew=False)
            if not (await trio.to_thread.run_sync(look))[0]:
                await fetch_again(self._chunks, named.placed, named.replicas)
        except (ModelfsError, OSError) as error:
            self._end(one, Outcome.FAILED, str(error))
            return
        self.restored += 1
        self._end(one, Outcome.RESTORED)

    def _end(self, one: Restoration, outcome: Outcome, reason: str = "") -> None:
        one.outcome, one.reason = outcome, reason
        if outcome is Outcome.FAILED and len(self._failing) < FAILING_MAX:
            self._failing[one.chunk] = one
        elif outcome is not Outcome.FAILED:
            self._failing.pop(one.chunk, None)
            one.manifests, one.files = frozenset(), []

    def _end_unknown(self, one: Restoration, why: object) -> None:
        """It could not be found out who needs it: what the last try has found still counts."""
        known = self._failing.get(one.chunk, one)
        one.manifests, one.files = known.manifests, known.files
        self._end(one, Outcome.FAILED, f"it is not known who needs it: {why}")

    async def _name_files(self, named: dict[ChunkId, Named]) -> None:
        """Find the files of what could not be restored, unless they are known from the last try."""
        wanted: dict[bytes, list[Restoration]] = {}
        for chunk, says in named.items():
            failing, manifests = self._failing.get(chunk), frozenset(says.manifests)
            if failing is not None and failing.manifests != manifests:
                failing.manifests, failing.files = manifests, []
                for manifest in manifests:
                    wanted.setdefault(manifest, []).append(failing)
        if not wanted:
            return
        mirror = self._chunks.mirror
        for count, ino in enumerate(mirror.inode_numbers()):
            if count % INODES_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            record = mirror.readable_inode(ino)
            if record is not None and record.manifest is not None:
                for failing in wanted.get(record.manifest.id, ()):
                    if len(failing.files) < PATHS_MAX:
                        failing.files.append(ino)
