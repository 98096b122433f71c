"""Where the time of a read and a write goes: a latency histogram for each stage.

    with timed("verify"):
        ...

adds one observation to the stage's histogram, on whichever thread it runs, also around awaits. The
stages are listed in `STAGES`, in the order in which a request meets them. Time that a stage waits
for its turn is a stage of its own (`..._queue`), so a stage says how long the work itself took.

What it costs: about half a microsecond, and no lock. Every thread has histograms of its own; a
snapshot adds them up. A thread that ends hands its histograms on to the next one that begins, with
what is in them, so there are never more than there were threads at once.

There is one set for the process, as there is one logger for each module: a daemon is one node.
Only drivers use it; the library `modelfs` has no clock.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

STAGES = {
    "freshness": "an open waits until this node has seen all that was committed before",
    "etcd_read": "one linearizable read, shared by all who wait for one",
    "lease": "becoming the writer of a file, another writer's time included",
    "memory_queue": "a chunk waits for room among the read buffers",
    "disk_queue": "a read of the local store waits for a thread",
    "disk_read": "bytes of a chunk from this node's disk, or from what the kernel has of it",
    "peer_queue": "a request to a peer waits for its turn",
    "fetch": "a chunk or a range from a peer: request, wait, and all its bytes",
    "verify": "checksums of what came from disk or peer",
    "push": "pages handed to the kernel before it asks",
    "invalidate": "telling the kernel to forget a name or attributes",
    "stage": "bytes of one write, or of several that came together, into the staging file",
    "upload_queue": "a complete chunk waits for room in the upload budget",
    "hash": "name and checksums of a chunk that was written",
    "put": "a chunk to a peer, until it has it on its disk",
    "disk_write": "a chunk into this node's store, its fsync not included",
    "fsync": "one chunk file onto the disk",
    "sync": "names of chunks onto the disks, here or at a peer",
    "etcd_txn": "one transaction, of one change or of several merged",
    "apply": "after a change: until this node's own copy of the namespace has it",
    "commit": "a commit of written data, from close or fsync to its end",
    "scrub": "one copy on this node's disk read and verified, before anybody needs it",
    "serve": "a chunk or a range sent to a peer that asked",
}

# Four buckets for each power of two: a quantile is right to within a fifth of its value.
STEPS = 4
OCTAVE_MIN, OCTAVE_MAX = -20, 7  # from 1 µs to 128 s
BUCKETS = (OCTAVE_MAX - OCTAVE_MIN) * STEPS
SHORTEST = math.ldexp(1.0, OCTAVE_MIN)


class Histogram:
    """Latencies of one kind. One writer; anybody may read, and sees it as of nearly now."""

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * BUCKETS
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        """Count one observation."""
        self.counts[min(bucket_of(seconds), BUCKETS - 1)] += 1
        self.seconds += seconds

    def snapshot(self) -> Latencies:
        """As it is now."""
        return Latencies(tuple(self.counts), self.seconds)


@dataclass(frozen=True, slots=True)
class Latencies:
    """A histogram at one moment."""

    counts: tuple[int, ...]
    seconds: float

    @property
    def count(self) -> int:
        """How many observations there are."""
        return sum(self.counts)

    def __add__(self, other: Latencies) -> Latencies:
        counts = tuple(map(sum, zip(self.counts, other.counts, strict=True)))
        return Latencies(counts, self.seconds + other.seconds)

    def since(self, before: Latencies) -> Latencies:
        """What was added after `before`."""
        pairs = zip(self.counts, before.counts, strict=True)
        return Latencies(tuple(now - then for now, then in pairs), self.seconds - before.seconds)

    def quantile(self, share: float) -> float:
        """The latency that this share of the observations does not exceed; 0.0 if there is none."""
        wanted, seen = share * self.count, 0
        for index, count in enumerate(self.counts):
            seen += count
            if count and seen >= wanted:
                return upper_bound(index)
        return 0.0

    def octaves(self) -> list[tuple[float, int]]:
        """(upper bound in seconds, observations up to it), for each power of two."""
        total, found = 0, []
        for index, count in enumerate(self.counts):
            total += count
            if (index + 1) % STEPS == 0:
                found.append((upper_bound(index), total))
        return found

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Latencies:
        """The other way round."""
        counts = [0] * BUCKETS
        for bound, count in told["buckets"]:
            counts[bucket_of(bound) - 1] = count
        return cls(tuple(counts), told["seconds"])

    def as_json(self) -> dict[str, Any]:
        """For programs. `buckets` are (upper bound in seconds, count), the empty ones left out."""
        return {
            "count": self.count,
            "seconds": self.seconds,
            "p50": self.quantile(0.5),
            "p90": self.quantile(0.9),
            "p99": self.quantile(0.99),
            "buckets": [[upper_bound(i), count] for i, count in enumerate(self.counts) if count],
        }


NOTHING = Latencies((0,) * BUCKETS, 0.0)


def bucket_of(seconds: float) -> int:
    """Which bucket counts a latency: it holds those below its upper bound."""
    fraction, exponent = math.frexp(max(seconds, SHORTEST))  # fraction in [0.5, 1)
    return (exponent - 1 - OCTAVE_MIN) * STEPS + int(fraction * 2 * STEPS) - STEPS


def upper_bound(index: int) -> float:
    """What the latencies in a bucket are below, in seconds."""
    octave, step = divmod(index, STEPS)
    return math.ldexp(1 + (step + 1) / STEPS, octave + OCTAVE_MIN)


class Recorder:
    """Histograms by name, for use from any thread."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)
        self._everybody: list[dict[str, Histogram]] = []
        self._left: deque[dict[str, Histogram]] = deque()  # by threads that have ended
        self._mine = threading.local()

    def note(self, name: str, seconds: float) -> None:
        """Count one observation."""
        try:
            holder: _Holder = self._mine.holder
        except AttributeError:
            holder = self._mine.holder = _Holder(self._begin(), self._left)
        histogram = holder.histograms.get(name)
        if histogram is None:
            assert name in self._names, f"{name} is not a stage"
            histogram = holder.histograms[name] = Histogram()
        histogram.add(seconds)

    @property
    def threads_at_once(self) -> int:
        """How many sets of histograms there are."""
        return len(self._everybody)

    def snapshot(self) -> dict[str, Latencies]:
        """What all threads have counted, by name, in the order in which the names were given."""
        everybody = [dict(mine) for mine in list(self._everybody)]
        return {
            name: sum((mine[name].snapshot() for mine in everybody if name in mine), NOTHING)
            for name in self._names
        }

    def _begin(self) -> dict[str, Histogram]:
        """Histograms for this thread: those of one that has ended, or new ones."""
        try:
            return self._left.popleft()
        except IndexError:
            mine: dict[str, Histogram] = {}
            self._everybody.append(mine)
            return mine


class _Holder:
    """Goes away with its thread, and leaves the histograms to the next."""

    def __init__(self, histograms: dict[str, Histogram], left: deque[dict[str, Histogram]]) -> None:
        self.histograms, self._left = histograms, left

    def __del__(self) -> None:
        self._left.append(self.histograms)


class timed:  # reads like the function that it is used as
    """Adds the time that its body takes to a stage, however it ends."""

    __slots__ = ("_stage", "_started")

    def __init__(self, stage: str) -> None:
        self._stage = stage

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        recorder.note(self._stage, time.perf_counter() - self._started)


class stopwatch:  # as above
    """A wait that ends on another thread than it began: `stopwatch(stage)`, then call it there."""

    __slots__ = ("_stage", "_started")

    def __init__(self, stage: str) -> None:
        self._stage, self._started = stage, time.perf_counter()

    def __call__(self) -> None:
        recorder.note(self._stage, time.perf_counter() - self._started)


recorder = Recorder(STAGES)
note = recorder.note
