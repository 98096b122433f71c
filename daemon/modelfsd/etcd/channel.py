"""Calls over several etcd members: whom to ask, how long, and what a failure means.

Nothing here knows what the requests say. gRPC itself is `etcd.http2` and `etcd.connection`, our
own: measured against one local member a read costs 0.1 ms of CPU and 0.3 ms, through grpcio 0.43
and 0.87, since every call passes through several of its threads.

One connection per endpoint: which member failed must show. All calls go to the preferred endpoint
until it fails; then the next one is preferred. Each attempt carries `hasleader`, so that a member
without a leader says so at once instead of holding the request until one is elected.

What a failure means is decided by `judge`, and errs on the safe side:

    UNSENT    no member can have applied it: asking another one is safe
    UNKNOWN   everything else that is not an answer: only what may be repeated is asked again
    REFUSED   etcd's answer is no: nothing happened, and another member would say the same
"""

from __future__ import annotations

import ssl
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import trio

from modelfs.errors import (
    MetadataOutOfReach,
    MetadataUnavailable,
    MetadataUncertain,
    OutOfSpace,
    ProtocolError,
)
from modelfs.limits import ETCD_REQUEST_SECONDS, MIB
from modelfsd.etcd.connection import UNCONNECTED, CallFailed, EtcdConnection, parsed
from modelfsd.etcd.http2 import NOT_TAKEN, TOO_LARGE, Status, request_headers

Response = TypeVar("Response")
Credentials = ssl.SSLContext  # of a client, with its certificate; ALPN must offer h2
Message = Any  # protobuf's, which mypy does not know

# Shorter than a request's deadline, so that a paused member (its TCP connections stay open)
# leaves time for the others; far longer than a healthy answer, also on a disk busy with fsyncs.
ATTEMPT_SECONDS = 1.5
# With less than this left, a call gives up: an attempt that has no time to succeed would only
# turn "surely not done" into "nobody knows".
ATTEMPT_SECONDS_MIN = 0.3
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.05, 0.4  # between rounds over all endpoints
RECONNECT_SECONDS = 0.1  # after a failure; calls meanwhile fail at once
RESPONSE_BYTES_MAX = 64 * MIB
HAS_LEADER = (("hasleader", "true"),)


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
        NOT_TAKEN,
    }
)
# The member's gRPC (ours begins with "CLIENT:") on requests so large that etcd never sees them.
_TOO_LARGE_TEXT = "grpc: received message larger than max"
_REFUSALS = frozenset(
    {
        Status.INVALID_ARGUMENT,
        Status.FAILED_PRECONDITION,
        Status.NOT_FOUND,
        Status.OUT_OF_RANGE,
        Status.PERMISSION_DENIED,
        Status.UNAUTHENTICATED,
        Status.RESOURCE_EXHAUSTED,
        Status.DATA_LOSS,
    }
)


def judge(code: Status, text: str) -> Fate:
    """What a failed call may have done, by its gRPC status code and its text."""
    if text in _UNSENT_TEXTS:
        return Fate.UNSENT
    if code is Status.UNAVAILABLE and text.startswith(UNCONNECTED):
        return Fate.UNSENT
    if code in _REFUSALS and text.startswith("etcdserver: "):
        return Fate.REFUSED
    if code is Status.UNIMPLEMENTED or text.startswith(_TOO_LARGE_TEXT):
        return Fate.REFUSED
    return Fate.UNKNOWN


def refusal(code: Status, text: str) -> Exception:
    """The error for a REFUSED call."""
    if "database space exceeded" in text:
        return OutOfSpace(
            "etcd's database has reached its quota: compact, defragment and disarm the alarm"
            " with etcdctl, then delete files; or raise --quota-backend-bytes"
        )
    is_malformed = code in (Status.INVALID_ARGUMENT, Status.UNIMPLEMENTED)
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


@dataclass(slots=True, eq=False)
class _Line:
    """The connection to one endpoint, made when it is first needed and when it has failed."""

    connection: EtcdConnection | None = None
    connecting: trio.Lock = field(default_factory=trio.Lock)
    failure: CallFailed | None = None  # of the last attempt to connect
    retry_at: float = 0.0


class EtcdChannels:
    """The connections to all endpoints, one of them preferred, and the calls over them.

    Invariant: `_preferred` and `_watched` are in `_endpoints`. They are two, since a watch that
    breaks says little about requests, and the next watch must go elsewhere.
    """

    def __init__(self, endpoints: Sequence[str], credentials: Credentials | None) -> None:
        self._credentials = credentials
        self._lines: dict[str, _Line] = {}
        self._shortcuts: dict[str, Path] = {}
        self._headers: dict[tuple[str, str, bool], bytes] = {}
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
        for endpoint in [known for known in self._lines if known not in unique]:
            self._drop(endpoint)

    def set_credentials(self, credentials: Credentials | None) -> None:
        """Use these from the next call on; calls on their way end as they would have."""
        self._credentials = credentials
        for line in self._lines.values():
            if line.connection is not None:
                line.connection.retire()
                line.connection = None

    def reach_through(self, endpoint: str, path: Path) -> None:
        """Reach an endpoint, which is preferred from now on, through this Unix socket if it can be.

        Connections that there are stay in use until they break.
        """
        assert endpoint in self._endpoints
        self._shortcuts[endpoint] = path
        self._preferred = self._watched = endpoint

    async def connect(self, endpoint: str) -> EtcdConnection:
        """A new connection of the caller's own, which he closes. Raises `CallFailed`."""
        shortcut = self._shortcuts.get(endpoint)
        if shortcut is not None:
            with suppress(CallFailed):
                return await EtcdConnection.connect_locally(shortcut)
        return await EtcdConnection.connect(endpoint, self._credentials)

    def headers(self, endpoint: str, method: str, needs_leader: bool) -> bytes:
        """The headers of a method's requests."""
        key = (endpoint, method, needs_leader)
        if key not in self._headers:
            metadata = HAS_LEADER if needs_leader else ()
            self._headers[key] = request_headers(endpoint, method, metadata)
        return self._headers[key]

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
        `MetadataOutOfReach`, and unless it is a read `MetadataUncertain`.
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
        raise MetadataOutOfReach(f"etcd is out of reach: {reason}")

    async def ask(
        self, endpoint: str, method: str, request: Message, response_type: type[Response]
    ) -> Response:
        """One read of one member only. Raises as `call` does for reads."""
        self._kinds[method.rpartition("/")[2]] += 1
        outcome = await self._attempt(
            endpoint, method, request, response_type, ATTEMPT_SECONDS, needs_leader=False
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
        """Close all connections; calls on their way fail."""
        for endpoint in list(self._lines):
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
        line = self._lines.pop(endpoint, None)
        self._headers = {key: block for key, block in self._headers.items() if key[0] != endpoint}
        if line is not None and line.connection is not None:
            line.connection.close()

    async def _connection(self, endpoint: str) -> EtcdConnection:
        """A connection that may be used now. Raises `CallFailed`: then nothing has been sent."""
        line = self._lines.setdefault(endpoint, _Line())
        if line.connection is not None and line.connection.is_usable:
            return line.connection
        async with line.connecting:
            if line.connection is not None and line.connection.is_usable:
                return line.connection
            if line.failure is not None and trio.current_time() < line.retry_at:
                raise line.failure
            if line.connection is not None:
                line.connection.retire()
                line.connection = None
            try:
                line.connection = await self.connect(endpoint)
            except CallFailed as failure:
                line.failure, line.retry_at = failure, trio.current_time() + RECONNECT_SECONDS
                raise
        if self._lines.get(endpoint) is not line:  # dropped meanwhile
            line.connection.close()
            raise CallFailed(
                Status.UNAVAILABLE, f"{UNCONNECTED} to {endpoint}: not in use any more"
            )
        return line.connection

    async def _attempt(
        self,
        endpoint: str,
        method: str,
        request: Message,
        response_type: type[Response],
        seconds: float,
        needs_leader: bool = True,
    ) -> Response | _Failure:
        headers = self.headers(endpoint, method, needs_leader)
        connection: EtcdConnection | None = None
        try:
            with trio.move_on_after(seconds):
                connection = await self._connection(endpoint)
                message = request.SerializeToString()
                data = await connection.call(headers, message, RESPONSE_BYTES_MAX)
                return parsed(response_type, data)
        except CallFailed as failure:
            return _Failure(failure.status, failure.text)
        if connection is None:
            return _Failure(Status.UNAVAILABLE, f"{UNCONNECTED} to {endpoint}: timed out")
        connection.retire()  # a member that is stuck, or a network that swallows: begin anew
        return _Failure(Status.DEADLINE_EXCEEDED, f"no answer in {seconds:.1f} s")


@dataclass(frozen=True, slots=True)
class _Failure:
    """A call that brought no response."""

    code: Status
    text: str

    @property
    def fate(self) -> Fate:
        return judge(self.code, self.text)

    @property
    def is_too_large(self) -> bool:
        """Whether we threw the answer away for its size."""
        return self.code is Status.RESOURCE_EXHAUSTED and self.text.startswith(TOO_LARGE)

    def error(self) -> Exception:
        """The error to raise if the fate is REFUSED."""
        return refusal(self.code, self.text)
