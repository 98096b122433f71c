"""One watch: a stream of changes from one etcd member, on a connection of its own.

gRPC's streams block, so one thread reads the responses into a bounded queue, and the trio side
takes all that have arrived as one batch. A full queue stops the thread, and with it, by HTTP/2's
flow control, the member: nothing is ever dropped.

Rules

- A batch holds whole revisions. etcd sends a revision's events in one response, or (`fragment`,
  which bounds a response to about 2 MiB) in several, all but the last marked; the last revision
  of a marked response is kept back until the rest has come.
- Silence is not trusted. A paused member keeps its connection open, so after each
  `PROBE_SECONDS` without news we ask for the watch's progress, and after `SILENCE_SECONDS`
  without any response the watch is lost. The revision in a progress response is not used: before
  3.4.25 and 3.5.8 it could run ahead of events not yet sent (etcd issue 15220).
- Leaving the context manager ends the call, waits for the thread and closes the connection.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

import trio

from modelfs.errors import HistoryCompacted, MetadataUnavailable
from modelfs.ids import Revision
from modelfs.ports import Event, WatchBatch
from modelfsd import etcd_rpc_pb2 as rpc
from modelfsd.etcd_channel import HAS_LEADER, EtcdChannels, error_text

PROBE_SECONDS = 1.5
SILENCE_SECONDS = 5.0
RESPONSES_MAX = 32  # waiting to be taken; at most 2 MiB each, and mostly one small revision
CLOSE_SECONDS = 5.0  # how long a cancelled call may take to end its thread

_WATCH = "/etcdserverpb.Watch/Watch"
_PROGRESS = rpc.WatchRequest(progress_request=rpc.WatchProgressRequest())

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
        self._requests: queue.SimpleQueue[rpc.WatchRequest | None] = queue.SimpleQueue()
        self._requests.put(
            rpc.WatchRequest(
                create_request=rpc.WatchCreateRequest(
                    key=key, range_end=range_end, start_revision=start, fragment=True
                )
            )
        )
        # Shared with the thread; deque and semaphore are safe for that.
        self._arrived: deque[rpc.WatchResponse | Exception] = deque()
        self._slots = threading.Semaphore(RESPONSES_MAX)
        self._is_closing = False
        self._news = trio.Event()
        self._thread_ended = trio.Event()
        self._kept_back: list[Event] = []  # of a revision whose end has not come yet
        self._last_revision = start - 1  # of the last batch that was handed out
        self._failure: Exception | None = None

    async def __aenter__(self) -> EtcdWatch:
        self._token = trio.lowlevel.current_trio_token()
        self._channel = self._channels.open_channel(self._endpoint)
        stream = self._channel.stream_stream(
            _WATCH,
            request_serializer=rpc.WatchRequest.SerializeToString,
            response_deserializer=rpc.WatchResponse.FromString,
        )
        self._call: Any = stream(iter(self._requests.get, None), metadata=HAS_LEADER)
        threading.Thread(target=self._receive, name="etcd-watch", daemon=True).start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_closing = True
        self._requests.put(None)  # ends gRPC's own thread, which reads the requests
        self._call.cancel()
        self._slots.release()
        with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_SECONDS):
            await self._thread_ended.wait()
        self._channel.close()

    def __aiter__(self) -> EtcdWatch:
        return self

    async def __anext__(self) -> WatchBatch:
        if self._failure is not None:
            raise self._failure
        try:
            await trio.lowlevel.checkpoint()
            while True:
                events = self._take()
                if events:
                    return self._batch(events)
                await self._wait_for_news()
        except (HistoryCompacted, MetadataUnavailable) as failure:
            self._failure = failure
            if isinstance(failure, MetadataUnavailable):
                self._channels.note_lost_watch(self._endpoint)
            raise

    # ---------------------------------------------------------------- on gRPC's side

    def _receive(self) -> None:
        """The thread: responses, and at last the error that ended the stream, into the queue."""
        try:
            for response in self._call:
                self._slots.acquire()
                if self._is_closing:
                    break
                self._arrived.append(response)
                self._wake(self._has_news)
            else:
                self._arrived.append(MetadataUnavailable(f"{self._endpoint} ended the watch"))
        except Exception as error:  # gRPC's, and whatever else: the iterator raises it
            text = f"the watch on {self._endpoint} broke: {error_text(error)}"
            self._arrived.append(MetadataUnavailable(text))
        self._wake(self._has_news)
        self._wake(self._thread_ended.set)

    def _wake(self, function: Callable[[], None]) -> None:
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(function)

    # ---------------------------------------------------------------- on trio's side

    def _has_news(self) -> None:
        self._news.set()

    async def _wait_for_news(self) -> None:
        """Return when something has arrived; probe a silent stream, then give it up."""
        deadline = trio.current_time() + SILENCE_SECONDS
        while not self._arrived:
            self._news = trio.Event()
            if self._arrived:  # it came before the new event was in place
                return
            if trio.current_time() >= deadline:
                raise MetadataUnavailable(
                    f"{self._endpoint} has sent nothing on a watch for {SILENCE_SECONDS} s"
                )
            with trio.move_on_after(PROBE_SECONDS) as patience:
                await self._news.wait()
            if patience.cancelled_caught:
                self._requests.put(_PROGRESS)

    def _take(self) -> list[Event]:
        """The events of all whole revisions that have arrived, maybe none. Never waits."""
        events: list[Event] = []
        for _ in range(min(len(self._arrived), RESPONSES_MAX)):
            response = self._arrived[0]
            failure = _failure(self._endpoint, response)
            if failure is not None:
                if events:
                    break  # first hand out what came before it; it stays in the queue
                raise failure
            assert isinstance(response, rpc.WatchResponse)
            self._arrived.popleft()
            self._slots.release()
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
            raise MetadataUnavailable(f"{self._endpoint} sent a watch's events twice")
        self._last_revision = events[-1].mod_revision
        return WatchBatch(Revision(self._last_revision), tuple(events))


def _failure(endpoint: str, response: rpc.WatchResponse | Exception) -> Exception | None:
    """Why this response ends the watch, if it does."""
    if isinstance(response, Exception):
        return response
    if response.compact_revision:
        return HistoryCompacted(response.compact_revision)
    if response.canceled:
        reason = response.cancel_reason or "no reason given"
        return MetadataUnavailable(f"{endpoint} cancelled a watch: {reason}")
    return None
