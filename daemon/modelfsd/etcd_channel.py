"""gRPC for trio, over several etcd members: whom to ask, how long, and what a failure means.

This is the only module that knows grpcio (whose types are unknown to mypy). Nothing here knows
what the requests say.

A call is handed to gRPC as a future; its callback, on gRPC's own thread, wakes the trio task. So
no call costs a thread, and one that is cancelled in trio is cancelled in gRPC.

One channel per endpoint, with a connection of its own: gRPC's balancing between addresses hides
which member failed. All calls go to the preferred endpoint until it fails; then the next one is
preferred. Each attempt carries `hasleader`, so that a member without a leader says so at once
instead of holding the request until one is elected.

What a failure means is decided by `judge`, and errs on the safe side:

    UNSENT    no member can have applied it: asking another one is safe
    UNKNOWN   everything else that is not an answer: only what may be repeated is asked again
    REFUSED   etcd's answer is no: nothing happened, and another member would say the same
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import trio

# We never fork a process that goes on to use gRPC (children are spawned, hence exec), and gRPC's
# fork handlers would stop its threads at every spawn. gRPC reads both when it is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc  # type: ignore[import-untyped]

from modelfs.errors import (
    MetadataUnavailable,
    MetadataUncertain,
    OutOfSpace,
    ProtocolError,
)
from modelfs.limits import ETCD_REQUEST_SECONDS, MIB

Response = TypeVar("Response")
# grpcio's types and protobuf's messages, which mypy does not know.
Credentials = Any  # grpc.ChannelCredentials
Channel = Any  # grpc.Channel
StatusCode = Any  # grpc.StatusCode
Call = Any  # grpc.Future, and grpc.Call
Message = Any

# Shorter than a request's deadline, so that a paused member (its TCP connections stay open)
# leaves time for the others; far longer than a healthy answer, also on a disk busy with fsyncs.
ATTEMPT_SECONDS = 1.5
# With less than this left, a call gives up: an attempt that has no time to succeed would only
# turn "surely not done" into "nobody knows".
ATTEMPT_SECONDS_MIN = 0.3
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.05, 0.4  # between rounds over all endpoints
RESPONSE_BYTES_MAX = 64 * MIB
HAS_LEADER = (("hasleader", "true"),)

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.enable_http_proxy", 0),
    # Channels to one address would share a connection, and a watch must not hold up requests.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", RESPONSE_BYTES_MAX),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),  # also the time that one connection attempt has
    ("grpc.max_reconnect_backoff_ms", 1000),
    # etcd drops who pings more often than every 5 s. Watches notice silence sooner by themselves.
    ("grpc.keepalive_time_ms", 6000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)


class Fate(Enum):
    """What a failed call may have done."""

    UNSENT = "unsent"
    UNKNOWN = "unknown"
    REFUSED = "refused"


class Repeat(Enum):
    """Whether a call that may have been carried out may be sent again."""

    READ = "read"  # changes nothing
    IDEMPOTENT = "idempotent"  # twice is as good as once
    ONCE = "once"


class EtcdRefused(MetadataUnavailable):
    """etcd said no; `text` is its reason. Nothing has happened."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class ResponseTooLarge(EtcdRefused):
    """The answer to a read exceeds `RESPONSE_BYTES_MAX`: ask for less."""


# Said before a proposal is made, in etcd 3.4 to 3.6 (server/etcdserver/api/v3rpc/interceptor.go,
# v3_server.go). "leader changed", "server stopped" and the timeouts may come after it.
_UNSENT_TEXTS = frozenset(
    {
        "etcdserver: no leader",
        "etcdserver: not capable",
        "etcdserver: rpc not supported for learner",
        "etcdserver: too many requests",
        "etcdserver: unhealthy cluster",
        "raft proposal dropped",
    }
)
# gRPC's own words when there is no connection to send on.
_UNCONNECTED_TEXTS = ("failed to connect to all addresses", "DNS resolution failed for")
# The member's gRPC (ours begins with "CLIENT:") on requests so large that etcd never sees them.
_TOO_LARGE_TEXT = "grpc: received message larger than max"
_REFUSALS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DATA_LOSS,
    }
)


def judge(code: StatusCode, text: str) -> Fate:
    """What a failed call may have done, by its gRPC status code and its text."""
    if text in _UNSENT_TEXTS:
        return Fate.UNSENT
    if code == grpc.StatusCode.UNAVAILABLE and text.startswith(_UNCONNECTED_TEXTS):
        return Fate.UNSENT
    if code in _REFUSALS and text.startswith("etcdserver: "):
        return Fate.REFUSED
    if code == grpc.StatusCode.UNIMPLEMENTED or text.startswith(_TOO_LARGE_TEXT):
        return Fate.REFUSED
    return Fate.UNKNOWN


def refusal(code: StatusCode, text: str) -> Exception:
    """The error for a REFUSED call."""
    if "database space exceeded" in text:
        return OutOfSpace(
            "etcd's database has reached its quota: delete files, then compact, defragment and"
            " disarm the alarm with etcdctl, or raise --quota-backend-bytes"
        )
    is_malformed = code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)
    if is_malformed or text.startswith(_TOO_LARGE_TEXT):
        return ProtocolError(f"etcd does not take this request: {text}")
    return EtcdRefused(text)


@dataclass(frozen=True, slots=True)
class EtcdStatistics:
    """What has been asked of etcd so far; `by_kind` counts requests by method."""

    requests: int
    retries: int
    unavailable: int
    uncertain: int
    watches_lost: int
    by_kind: tuple[tuple[str, int], ...]


class EtcdChannels:
    """The channels to all endpoints, one of them preferred, and the calls over them.

    Invariant: `_preferred` and `_watched` are in `_endpoints`. They are two, since a watch that
    breaks says little about requests, and the next watch must go elsewhere.
    """

    def __init__(self, endpoints: Sequence[str], credentials: Credentials | None) -> None:
        self._credentials = credentials
        self._channels: dict[str, Channel] = {}
        self._calls: dict[tuple[str, str], Any] = {}
        self._endpoints: tuple[str, ...] = ()
        self._preferred = self._watched = ""
        self._kinds: Counter[str] = Counter()
        self._retries = self._unavailable = self._uncertain = self._watches_lost = 0
        self.set_endpoints(endpoints)

    @property
    def endpoints(self) -> tuple[str, ...]:
        """All endpoints, as "host:port"."""
        return self._endpoints

    @property
    def watched(self) -> str:
        """The endpoint that the next watch should use."""
        return self._watched

    def set_endpoints(self, endpoints: Sequence[str]) -> None:
        """Use these endpoints from now on; calls on the way to others are broken off."""
        unique = tuple(dict.fromkeys(endpoints))
        assert unique
        self._endpoints = unique
        if self._preferred not in unique:
            self._preferred = unique[0]
        if self._watched not in unique:
            self._watched = unique[0]
        for endpoint in [known for known in self._channels if known not in unique]:
            self._drop(endpoint)

    def open_channel(self, endpoint: str) -> Channel:
        """A new channel with a connection of its own. The caller closes it."""
        if self._credentials is None:
            return grpc.insecure_channel(endpoint, options=CHANNEL_OPTIONS)
        return grpc.secure_channel(endpoint, self._credentials, options=CHANNEL_OPTIONS)

    def note_lost_watch(self, endpoint: str) -> None:
        """Let the next watch use another endpoint."""
        self._watches_lost += 1
        if endpoint == self._watched:
            self._watched = self._after(endpoint)

    async def call(
        self, method: str, request: Message, response_type: type[Response], repeat: Repeat
    ) -> Response:
        """One request to whichever endpoint answers, within `ETCD_REQUEST_SECONDS`.

        Raises `OutOfSpace`, `ProtocolError` or `EtcdRefused` (all of them: nothing happened),
        `MetadataUnavailable`, and unless it is a read `MetadataUncertain`.
        """
        self._kinds[method.rpartition("/")[2]] += 1
        deadline = trio.current_time() + ETCD_REQUEST_SECONDS
        reason, failures, is_uncertain = "no endpoint answered in time", 0, False
        while (left_seconds := deadline - trio.current_time()) > ATTEMPT_SECONDS_MIN:
            endpoint = self._preferred
            # What may not be repeated has nothing to save time for: let it wait for its answer.
            seconds = left_seconds if repeat is Repeat.ONCE else min(left_seconds, ATTEMPT_SECONDS)
            outcome = await self._attempt(endpoint, method, request, response_type, seconds)
            if not isinstance(outcome, _Failure):
                return outcome
            if outcome.fate is Fate.REFUSED:
                raise outcome.error()
            if repeat is Repeat.READ and outcome.is_too_large:
                raise ResponseTooLarge(outcome.text)
            failures += 1
            reason = f"{endpoint}: {outcome.text}"
            self._prefer_another(endpoint)
            if outcome.fate is Fate.UNKNOWN and repeat is not Repeat.READ:
                is_uncertain = True
                if repeat is Repeat.ONCE:
                    break
            self._retries += 1
            if failures % len(self._endpoints) == 0:  # all of them failed: give them time
                pause_seconds = PAUSE_SECONDS_MIN * failures / len(self._endpoints)
                await trio.sleep(min(pause_seconds, PAUSE_SECONDS_MAX))
        if is_uncertain:
            self._uncertain += 1
            raise MetadataUncertain(f"etcd did not answer: {reason}")
        self._unavailable += 1
        raise MetadataUnavailable(f"etcd is out of reach: {reason}")

    async def ask(
        self, endpoint: str, method: str, request: Message, response_type: type[Response]
    ) -> Response:
        """One read of one member only. Raises as `call` does for reads."""
        self._kinds[method.rpartition("/")[2]] += 1
        outcome = await self._attempt(
            endpoint, method, request, response_type, ATTEMPT_SECONDS, metadata=()
        )
        if endpoint not in self._endpoints:
            self._drop(endpoint)
        if isinstance(outcome, _Failure):
            if outcome.fate is Fate.REFUSED:
                raise outcome.error()
            raise MetadataUnavailable(f"{endpoint}: {outcome.text}")
        return outcome

    def statistics(self) -> EtcdStatistics:
        """A snapshot of the counters."""
        return EtcdStatistics(
            requests=self._kinds.total(),
            retries=self._retries,
            unavailable=self._unavailable,
            uncertain=self._uncertain,
            watches_lost=self._watches_lost,
            by_kind=tuple(sorted(self._kinds.items())),
        )

    def close(self) -> None:
        """Close all channels; calls on their way fail."""
        for endpoint in list(self._channels):
            self._drop(endpoint)

    # ---------------------------------------------------------------- inside

    def _after(self, endpoint: str) -> str:
        index = self._endpoints.index(endpoint)
        return self._endpoints[(index + 1) % len(self._endpoints)]

    def _prefer_another(self, endpoint: str) -> None:
        """Turn away from an endpoint, unless another call has done so already."""
        if endpoint == self._preferred:
            self._preferred = self._after(endpoint)

    def _drop(self, endpoint: str) -> None:
        channel = self._channels.pop(endpoint, None)
        for key in [key for key in self._calls if key[0] == endpoint]:
            del self._calls[key]
        if channel is not None:
            channel.close()

    async def _attempt(
        self,
        endpoint: str,
        method: str,
        request: Message,
        response_type: type[Response],
        seconds: float,
        metadata: tuple[tuple[str, str], ...] = HAS_LEADER,
    ) -> Response | _Failure:
        call = self._calls.get((endpoint, method))
        if call is None:
            channel = self._channels.get(endpoint)
            if channel is None:
                channel = self._channels[endpoint] = self.open_channel(endpoint)
            call = self._calls[endpoint, method] = channel.unary_unary(
                method,
                request_serializer=type(request).SerializeToString,
                response_deserializer=response_type.FromString,  # type: ignore[attr-defined]
            )
        future = call.future(request, timeout=seconds, metadata=metadata)
        await settled(future)
        if future.code() == grpc.StatusCode.OK:
            response: Response = future.result()
            return response
        return _Failure(future.code(), future.details() or str(future.code()))


@dataclass(frozen=True, slots=True)
class _Failure:
    """A call that brought no response."""

    code: StatusCode
    text: str

    @property
    def fate(self) -> Fate:
        return judge(self.code, self.text)

    @property
    def is_too_large(self) -> bool:
        """Whether gRPC on our side threw the answer away for its size."""
        is_exhausted = self.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        return is_exhausted and "larger than max" in self.text

    def error(self) -> Exception:
        """The error to raise if the fate is REFUSED."""
        return refusal(self.code, self.text)


def error_text(error: Exception) -> str:
    """What a stream's error says, in one line."""
    if isinstance(error, grpc.RpcError) and callable(getattr(error, "details", None)):
        return str(error.details() or error.code())
    return repr(error)


async def settled(future: Call) -> None:
    """Wait until a gRPC future is done. If we are cancelled, so is it."""
    token = trio.lowlevel.current_trio_token()
    done = trio.Event()

    def wake(_: Call) -> None:
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(done.set)

    future.add_done_callback(wake)
    try:
        await done.wait()
    except trio.Cancelled:
        future.cancel()
        raise
