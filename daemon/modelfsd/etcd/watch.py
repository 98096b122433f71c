"""One watch: a stream of changes from one etcd member, on a connection of its own.

Whoever iterates reads the socket, and takes all that has arrived as one batch. Nobody who reads
stops the member by TCP's flow control: nothing is ever dropped, nothing piles up.

Rules

- A batch holds whole revisions. etcd sends a revision's events in one response, or (`fragment`,
  which bounds a response to about 2 MiB) in several, all but the last marked; the last revision
  of a marked response is kept back until the rest has come.
- Silence is not trusted. A paused member keeps its connection open, so after each
  `PROBE_SECONDS` without news we ask for the watch's progress, and after `SILENCE_SECONDS`
  without any response the watch is lost. The revision in a progress response is not used: before
  3.4.25 and 3.5.8 it could run ahead of events not yet sent (etcd issue 15220).
- Leaving the context manager closes the connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import TracebackType

import trio

from modelfs.errors import HistoryCompacted, MetadataUnavailable
from modelfs.ids import Revision
from modelfs.ports import Event, WatchBatch
from modelfsd.etcd import etcd_rpc_pb2 as rpc
from modelfsd.etcd.channel import RESPONSE_BYTES_MAX, EtcdChannels
from modelfsd.etcd.connection import CallFailed, EtcdConnection, parsed

PROBE_SECONDS = 1.5
SILENCE_SECONDS = 5.0

_WATCH = "/etcdserverpb.Watch/Watch"
_PROGRESS = rpc.WatchRequest(progress_request=rpc.WatchProgressRequest()).SerializeToString()

assert 2 * PROBE_SECONDS < SILENCE_SECONDS


class EtcdWatch:
    """The context manager and async iterator behind `EtcdStore.watch`.

    Used by one task at a time. `strip` turns an etcd key into a relative one.
    """

    def __init__(
        self,
        channels: EtcdChannels,
        key: bytes,
        range_end: bytes,
        start: Revision,
        strip: Callable[[bytes], bytes],
    ) -> None:
        assert start > 0
        self._channels, self._strip = channels, strip
        self._endpoint = channels.watched
        self._request = rpc.WatchRequest(
            create_request=rpc.WatchCreateRequest(
                key=key, range_end=range_end, start_revision=start, fragment=True
            )
        )
        self._connection: EtcdConnection | None = None
        self._call = 0
        self._arrived: deque[rpc.WatchResponse] = deque()
        self._kept_back: list[Event] = []  # of a revision whose end has not come yet
        self._last_revision = start - 1  # of the last batch that was handed out
        self._failure: Exception | None = None

    async def __aenter__(self) -> EtcdWatch:
        try:
            self._connection = await self._channels.connect(self._endpoint)
        except CallFailed as failure:  # the iterator says so, as of every other failure
            self._fail(f"the watch on {self._endpoint} broke: {failure}")
            return self
        headers = self._channels.headers(self._endpoint, _WATCH, True)
        request = self._request.SerializeToString()
        self._call = self._connection.begin(headers, request, RESPONSE_BYTES_MAX, ends=False)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._connection is not None:
            self._connection.end(self._call)
            self._connection.close()

    def __aiter__(self) -> EtcdWatch:
        return self

    async def __anext__(self) -> WatchBatch:
        if self._failure is not None:
            raise self._failure
        await trio.lowlevel.checkpoint()
        while True:
            events = self._take()
            if events:
                return self._batch(events)
            if self._failure is not None:
                raise self._failure
            await self._wait_for_news()

    def _fail(self, why: str) -> None:
        self._failure = MetadataUnavailable(why)
        self._channels.note_lost_watch(self._endpoint)

    async def _wait_for_news(self) -> None:
        """Return when something has arrived, or the watch has failed; probe a silent stream."""
        assert self._connection is not None
        deadline = trio.current_time() + SILENCE_SECONDS
        try:
            while trio.current_time() < deadline:
                with trio.move_on_after(PROBE_SECONDS):
                    messages = await self._connection.messages(self._call)
                    self._arrived.extend(parsed(rpc.WatchResponse, one) for one in messages)
                    return
                with trio.move_on_at(deadline):
                    await self._connection.send(self._call, _PROGRESS)
            self._fail(f"{self._endpoint} has sent nothing on a watch for {SILENCE_SECONDS} s")
        except CallFailed as failure:
            self._fail(f"the watch on {self._endpoint} broke: {failure}")

    def _take(self) -> list[Event]:
        """The events of all whole revisions that have arrived, maybe none. Never waits."""
        events: list[Event] = []
        while self._arrived and self._failure is None:
            response = self._arrived.popleft()
            if response.compact_revision:  # raised after what came before it
                self._failure = HistoryCompacted(response.compact_revision)
            elif response.canceled:
                reason = response.cancel_reason or "no reason given"
                self._fail(f"{self._endpoint} cancelled a watch: {reason}")
            else:
                events += self._whole_revisions(response)
        return events

    def _whole_revisions(self, response: rpc.WatchResponse) -> list[Event]:
        events = self._kept_back + [self._event(event) for event in response.events]
        self._kept_back = []
        if response.fragment and events:
            last = events[-1].mod_revision
            whole = next(index for index, event in enumerate(events) if event.mod_revision == last)
            self._kept_back = events[whole:]
            del events[whole:]
        return events

    def _event(self, event: rpc.Event) -> Event:
        kv = event.kv
        return Event(
            key=self._strip(kv.key),
            value=kv.value if event.type == rpc.Event.PUT else None,
            create_revision=Revision(kv.create_revision),
            mod_revision=Revision(kv.mod_revision),
        )

    def _batch(self, events: list[Event]) -> WatchBatch:
        if events[0].mod_revision <= self._last_revision:
            self._fail(f"{self._endpoint} sent a watch's events twice")
            assert self._failure is not None
            raise self._failure
        self._last_revision = events[-1].mod_revision
        return WatchBatch(Revision(self._last_revision), tuple(events))
