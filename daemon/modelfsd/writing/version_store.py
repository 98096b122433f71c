"""Puts all of a version in place but its inode: the chunks that are left, and the manifest."""

from __future__ import annotations

import time

import trio
from msgspec.structs import replace

from modelfs.ids import NodeId
from modelfs.inode import Inode, ManifestRef
from modelfs.limits import INLINE_BYTES_MAX
from modelfs.manifest import Manifest, PlacedChunk
from modelfsd.budget import ByteBudget
from modelfsd.storage.contents import Contents, gather
from modelfsd.storage.replicator import Replicator, name_chunk
from modelfsd.writing.working_copy import WorkingCopy


class VersionStore:
    """Stores working copies. Chunks that are being named and sent are held by `uploads`."""

    def __init__(
        self, contents: Contents, replicator: Replicator, uploads: ByteBudget, node_id: NodeId
    ) -> None:
        self._contents, self._replicator = contents, replicator
        self._uploads, self._node_id = uploads, node_id

    async def store(self, copy: WorkingCopy) -> Inode:
        """Put everything but the inode in place; returns the fields to commit.

        The names are not synced yet: that is `Replicator.sync` with the copy's placements.
        """
        inline = bytes(await copy.read(0, copy.size)) if copy.size <= INLINE_BYTES_MAX else None
        mtime_ns = copy.mtime_ns if copy.mtime_ns is not None else time.time_ns()
        fields = replace(
            copy.base,
            size=copy.size,
            mtime_ns=mtime_ns,
            editor=self._node_id,
            inline=inline,
            manifest=None,
            hole_bytes=0,
        )
        if fields.inline is not None:
            return fields
        await copy.stage_inline_base()
        positions = copy.staged_positions()

        async def seal(position: int) -> None:
            async with self._uploads.holding(copy.staged_bytes_of(positions[position])):
                await copy.seal(positions[position])

        await gather(seal, len(positions))
        root, hole_bytes = await self._store_manifest(copy)
        return replace(fields, manifest=ManifestRef.of(root), hole_bytes=hole_bytes)

    async def _store_manifest(self, copy: WorkingCopy) -> tuple[PlacedChunk, int]:
        manifest = Manifest.empty(copy.base.chunk_bytes)
        if copy.base.manifest is not None:
            manifest = await self._contents.manifest(copy.base)
        for size, chunks in ((min(copy.base_limit, manifest.size), {}), (copy.size, copy.sealed)):
            for page in manifest.pages_to_change(size, chunks):
                await self._contents.load_page(manifest, page, copy.base.replicas)
            manifest, pages = manifest.changed(size, chunks)
            places = {page: await self._store(copy, data) for page, data in pages.items()}
            manifest = manifest.with_pages_stored(places)
        return await self._store(copy, manifest.encode()), manifest.hole_bytes()

    async def _store(self, copy: WorkingCopy, data: bytes) -> PlacedChunk:
        ref, table = await trio.to_thread.run_sync(name_chunk, data)
        return await self._replicator.put(ref, table, data, copy.base.replicas, copy.placements)
