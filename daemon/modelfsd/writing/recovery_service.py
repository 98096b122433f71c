"""The daemon's part in `modelfs recover`: which open files have failed, and their chunks."""

from __future__ import annotations

import base64
from typing import Any

from modelfs.errors import UserError
from modelfs.limits import MIB
from modelfsd.commands.control import Handler
from modelfsd.storage.chunks import Chunks
from modelfsd.writing.layout import placed_chunk
from modelfsd.writing.writer import Writer

PIECE_BYTES_MAX = 4 * MIB  # of a chunk in one answer


class RecoveryService:
    """Handlers of the admin socket."""

    def __init__(self, writer: Writer, chunks: Chunks) -> None:
        self._writer, self._chunks = writer, chunks

    def handlers(self) -> dict[str, Handler]:
        """For `ControlServer`."""
        return {"lost": self.lost, "chunk": self.chunk}

    async def lost(self, request: dict[str, Any]) -> dict[str, Any]:
        """The staging directories of files that are open and failed, and why they did."""
        return {
            "failed": {
                session.copy.directory_name: str(session.failure)
                for session in self._writer.open_sessions
                if session.failure is not None
            }
        }

    async def chunk(self, request: dict[str, Any]) -> dict[str, Any]:
        """A verified range of a chunk, named as in a journal, from wherever it is good."""
        placed = placed_chunk(request)
        start, size = request.get("start"), request.get("size")
        replicas = request.get("replicas")
        if not (type(start) is type(size) is type(replicas) is int):
            raise UserError("start, size and replicas are numbers")
        if not (0 <= start < start + size <= placed.ref.length and size <= PIECE_BYTES_MAX):
            raise UserError(f"no {size} bytes can be had from offset {start} of this chunk")
        data = await self._chunks.read(placed, max(1, replicas), start, size)
        return {"data": base64.b64encode(data).decode("ascii")}
