"""A member whose answers are whole gRPC messages, and nothing that etcd would say."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from modelfs.errors import MetadataUnavailable, MetadataUncertain
from modelfs.ids import Revision
from modelfs.ports import Put, Txn
from modelfsd.etcd.http2 import PREFACE
from modelfsd.etcd.store import EtcdStore
from tests.daemon.test_etcd_http2 import DATA, SETTINGS, Member, frame, frames

GARBAGE = b"\xff\xff\xff\xff"


async def answer_with_garbage(stream: trio.SocketStream) -> None:
    """The first request of a connection is answered."""
    received = bytearray()
    async for data in stream:
        received += data
        sent = frames(received[len(PREFACE) :])
        if any(kind == DATA and payload for kind, _, _, payload in sent):
            await stream.send_all(frame(SETTINGS, 0, 0) + Member().response(1, GARBAGE))
            await trio.sleep_forever()


@asynccontextmanager
async def garbling_store() -> AsyncIterator[EtcdStore]:
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, answer_with_garbage, [listener])
        host, port = listener.socket.getsockname()
        async with EtcdStore([f"{host}:{port}"]) as store:
            yield store
        nursery.cancel_scope.cancel()


async def test_a_garbled_answer_to_a_change_is_none() -> None:
    async with garbling_store() as store:
        with pytest.raises(MetadataUncertain):
            await store.commit(Txn((), (Put(b"key", b"value"),)))


async def test_a_garbled_watch_is_lost() -> None:
    async with garbling_store() as store, store.watch(b"", Revision(1)) as batches:
        with pytest.raises(MetadataUnavailable):
            await anext(aiter(batches))
