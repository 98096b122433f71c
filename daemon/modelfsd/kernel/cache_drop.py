"""`modelfs cache drop`: makes this node as cold as one that has just joined.

Three places keep what was read: the disk's cached chunks, the daemon's memory, and the kernel's
pages. They go in this order, from the far end to the near, so that nothing is filled again from a
place that is still to be emptied. What is lost is a copy only: open handles and mappings read on,
and files that are being written here keep their pages and their working copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from modelfs.ids import KernelId
from modelfsd.kernel.kernel_inodes import KernelInodes
from modelfsd.kernel.notifier import Notifier
from modelfsd.storage.contents import Contents


class CacheDrop:
    """Empties the caches of one node. `drop_chunks` frees the disk's, and blocks."""

    def __init__(
        self,
        drop_chunks: Callable[[], int],
        contents: Contents,
        inodes: KernelInodes,
        notifier: Notifier,
    ) -> None:
        self._drop_chunks, self._contents = drop_chunks, contents
        self._inodes, self._notifier = inodes, notifier

    async def drop(self, request: dict[str, Any]) -> dict[str, Any]:
        """The handler of the command. Returns once the kernel has acted."""
        disk_bytes = await trio.to_thread.run_sync(self._drop_chunks)
        memory_bytes = self._contents.drop()
        files = [inode for inode in self._inodes if inode.record.is_file and not inode.session]
        await self._forget_pages([inode.id for inode in files])
        return {"disk_bytes": disk_bytes, "memory_bytes": memory_bytes, "files": len(files)}

    async def _forget_pages(self, kernel_ids: list[KernelId]) -> None:
        """Have the kernel forget the pages of these, and wait for it."""
        remaining = len(kernel_ids)
        done, token = trio.Event(), trio.lowlevel.current_trio_token()

        def one_less() -> None:
            nonlocal remaining
            remaining -= 1
            if not remaining:
                done.set()

        for kernel_id in kernel_ids:
            self._notifier.forget_pages(kernel_id, lambda: token.run_sync_soon(one_less))
        if kernel_ids:
            await done.wait()
