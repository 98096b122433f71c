"""The requests to a peer, each as one conversation: what is sent, and what its reply means.

These run on worker threads. `modelfsd.peers.client` decides when, and over which connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from modelfs import wire
from modelfs.chunk import Buffer, ChunkRef, covering_blocks, is_range_valid, is_table_valid
from modelfs.errors import (
    ChunkMissing,
    CorruptChunk,
    OutOfSpace,
    PeerRefused,
    PeerUnavailable,
    ProtocolError,
)
from modelfs.ids import ChunkId
from modelfs.wire import FailureKind
from modelfsd.buffers import empty_buffer
from modelfsd.peers.link import Conversation
from modelfsd.stages import timed


def fetch_range(
    talk: Conversation[memoryview], ref: ChunkRef, offset: int, size: int
) -> memoryview:
    """One verified range. Runs on a worker thread."""
    start, end = covering_blocks(ref.length, offset, size)
    with timed("fetch"):
        table, data = _receive(talk, ref, offset, size, end - start)
    with timed("verify"):
        is_good = is_table_valid(ref, table) and is_range_valid(table, start, data)
    if not is_good:
        raise CorruptChunk(ref.id, f"node {talk.link.node}")
    return data[offset - start : offset - start + size]


def _receive(
    talk: Conversation[memoryview], ref: ChunkRef, offset: int, size: int, block_bytes: int
) -> tuple[Buffer, memoryview]:
    """A chunk's block table, and the blocks that hold the range."""
    frame = talk.ask(wire.Get(ref.id, offset, size))
    reply = frame.message
    if not isinstance(reply, wire.GetReply):
        raise_failure(talk, reply, ref.id)
    if reply.length != ref.length:
        raise CorruptChunk(
            ref.id, f"node {talk.link.node}"
        )  # its payload is not taken, so the connection ends
    if frame.payload_bytes != block_bytes:
        raise ProtocolError(f"{frame.payload_bytes} bytes instead of {block_bytes}")
    data = empty_buffer(block_bytes)
    talk.receive_payload(data)
    return reply.table, data


def has_chunks(
    talk: Conversation[list[bool]], chunks: Sequence[ChunkId], renew: bool = True
) -> list[bool]:
    reply = talk.ask(wire.Has(wire.pack_ids(chunks), renew)).message
    if not isinstance(reply, wire.HasReply):
        raise_failure(talk, reply)
    return wire.unpack_bits(reply.bitmap, len(chunks))


def put_chunk(talk: Conversation[None], message: wire.Put, data: Buffer) -> None:
    with timed("put"):
        expect_ok(talk, message, data)


def expect_ok(
    talk: Conversation[Any],
    message: wire.Request,
    payload: Buffer = b"",
    chunk: ChunkId | None = None,
) -> None:
    reply = talk.ask(message, payload).message
    if not isinstance(reply, wire.Ok):
        raise_failure(talk, reply, chunk)


def raise_failure(
    talk: Conversation[Any], reply: wire.Message, chunk: ChunkId | None = None
) -> NoReturn:
    """Turn a FAILURE into our error; `chunk` is the one that was asked for, if any."""
    node = talk.link.node
    if not isinstance(reply, wire.Failure):
        raise ProtocolError(f"{type(reply).__name__} is not the reply to what was asked")
    if reply.kind is FailureKind.MISSING and chunk is not None:
        raise ChunkMissing(chunk, f"node {node}")
    if reply.kind is FailureKind.CORRUPT and chunk is not None:
        raise CorruptChunk(chunk, f"node {node}")
    if reply.kind is FailureKind.NO_SPACE:
        raise OutOfSpace(f"node {node}: {reply.text}")
    if reply.kind in (FailureKind.WRONG_CLUSTER, FailureKind.VERSION):
        raise PeerUnavailable(node, reply.text)
    raise PeerRefused(node, reply.text)
