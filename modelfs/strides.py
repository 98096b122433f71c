"""Strided access: short runs of requests, each as far from the last as that from the one before.

One column of a matrix, one expert of each layer, every eighth shard. Its runs continue no stream,
so without this each would be fetched only when it is asked for. Three equal steps make a stride.
Then as many runs are foretold as have been read, so what is fetched in vain is bounded. Who comes
back to any of its runs is expected to read on from there.

As with streams, pages that were pushed are never asked for. So every `MARK_EVERY`th run is to be
left without its first page: the request that this costs says how far the reader is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from modelfs.limits import KIB, PAGE_BYTES

STEPS_MIN = 3  # equal ones, before a stride is believed
AHEAD_MAX = 32  # runs
MARK_EVERY = 8
STRIDES_MAX = 4  # followed at once
STEP_BYTES_MIN = 64 * KIB  # with less between them it is one run, or the same one again
STRAY_BYTES = PAGE_BYTES  # requests begin with pages, rows of an array anywhere


@dataclass(slots=True, eq=False)
class Run:
    """Requests of which each goes on where the last ended."""

    begin: int
    end: int  # one past the furthest byte asked for


@dataclass(slots=True, eq=False)
class Stride:
    """Runs at `first`, `first + step`, `first + 2 * step`, …; the step may be negative."""

    first: int
    step: float
    samples: Sequence[Run]  # the runs that it was inferred from
    length: int = 0  # of a run, in bytes; 0 while this is not believed
    seen: int = STEPS_MIN - 1  # the number of the furthest run asked for, since the last restart
    hits: int = STEPS_MIN - 1  # runs that were asked for where they had been expected
    ordered: int = 0  # runs before this number are not to be ordered any more
    runs: dict[int, Run] = field(default_factory=dict)  # the last ones, by number

    def begin(self, number: int) -> int:
        """Where a run begins, as far as one can tell."""
        return round(self.first + number * self.step)

    def number_at(self, offset: int) -> int | None:
        """Which run an offset lies in, if in one."""
        nearest = (offset + STRAY_BYTES - self.first) / self.step
        number = math.floor(nearest) if self.step > 0 else math.ceil(nearest)
        within = offset - self.begin(number)
        is_inside = -STRAY_BYTES <= within < max(self.length, STRAY_BYTES + 1)
        return number if is_inside and number >= 0 else None

    def is_next(self, number: int) -> bool:
        """Whether a run could be heard of next, by a reader who goes on."""
        return self.seen - MARK_EVERY <= number <= max(self.ordered, self.seen + 1)

    def take(self, number: int, offset: int, size: int) -> None:
        """Take a request of a run."""
        if not self.length:
            longest = max(sample.end - sample.begin for sample in self.samples)
            self.length = max(longest, size)
        elif not self.is_next(number):  # he begins again, or elsewhere
            self.seen, self.ordered = number, 0
            self.runs.clear()
        begin = self.begin(number)
        run = self.runs.setdefault(number, Run(begin, begin))
        run.end = max(run.end, offset + size)
        if number > self.seen:
            self.seen = number
            self.hits += 1
            if abs(offset - begin) <= STRAY_BYTES:
                self.step = (offset - self.first) / number
            for passed in [known for known in self.runs if known < number - MARK_EVERY]:
                del self.runs[passed]

    def ahead(self, file_bytes: int, bytes_max: int) -> Iterator[tuple[Run, bool]]:
        """(run, whether it is to be a mark) of those to fetch now that were not ordered before."""
        count = min(AHEAD_MAX, self.hits, max(1, bytes_max // self.length))
        for number in range(max(self.ordered, self.seen + 1), self.seen + 1 + count):
            begin = self.begin(number)
            if not 0 <= begin < file_bytes:
                return
            self.ordered = number + 1
            run = self.runs.setdefault(number, Run(begin, begin))
            yield run, number % MARK_EVERY == 0


class StridePattern:
    """The strides of one file view."""

    def __init__(self) -> None:
        self._strides: list[Stride] = []

    def take(self, offset: int, size: int) -> Stride | None:
        """Take one request. Returns the stride that it belongs to, if there is one."""
        for stride in self._strides:
            number = stride.number_at(offset)
            if number is None or (not stride.length and number != STEPS_MIN):
                continue
            stride.take(number, offset, size)
            if 2 * stride.length > abs(stride.step):  # that is a stream with gaps
                self._strides.remove(stride)
                return None
            return stride
        return None

    def begin(self, offset: int, runs: Sequence[Run]) -> None:
        """Take a run that begins beside all strides; `runs` are others that were begun lately.

        The last of them is that run.
        """
        for second in runs[:-1]:
            if abs(offset - second.begin) < STEP_BYTES_MIN:
                continue
            wanted = 2 * second.begin - offset
            for first in runs[:-1]:
                if first is not second and abs(first.begin - wanted) <= STRAY_BYTES:
                    step = (offset - first.begin) / (STEPS_MIN - 1)
                    samples = (first, second, runs[-1])
                    self._strides.append(Stride(first.begin, step, samples))
                    del self._strides[:-STRIDES_MAX]
                    return
