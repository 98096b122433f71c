"""How a file is being read, and how far to read ahead of it.

Judged for each file view, not for each handle: ranks and threads of one loader share a file, and
the kernel's own readahead arrives out of order. A *stream* is a run of requests of which each
begins near where the last one ended; a few are followed at once. Its window is twice what it has
read, within bounds, so what is fetched in vain is bounded too; a request that continues no stream
is part of a stride (see `strides`) or random, and random ones get no readahead.

What is read ahead may be put into the kernel's pages before it is asked for, and then is never
asked for. So a stream goes on wherever it is next heard of within what was ordered for it. But
whoever reads ahead leaves out some pages, the *marks*, and who reads on asks for each of them in
turn: who is heard of far behind one that he did not ask for has jumped.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from modelfs import stripe
from modelfs.limits import KIB, MIB
from modelfs.strides import Run, Stride, StridePattern

STREAMS_MAX = 8
SLACK_BYTES = 2 * MIB  # requests of one stream arrive out of order by as much as the kernel reads
SKIP_BYTES = 1 * MIB  # a stream may leave out so much
START_BYTES = 256 * KIB  # a first read within this of the file's start begins a stream
STEPS_MIN = 2  # elsewhere, a stream has gone on so often before it is believed
WINDOW_BYTES_MIN = 4 * MIB  # of those; others may be short runs, which end soon


@dataclass(slots=True, eq=False)
class Stream(Run):
    """One reader's way through a file. `ordered_end` and `marks` are kept by who reads ahead."""

    window: int  # how far ahead of `end` to fetch; 0 while this is not believed to be a stream
    ordered_end: int  # one past the furthest byte that is here or on its way
    steps: int = 0
    marks: deque[int] = field(default_factory=deque)  # offsets not asked for yet, ascending

    @property
    def goal(self) -> int:
        """The offset up to which to read ahead."""
        return self.end + self.window

    def goes_on_at(self, offset: int) -> bool:
        """Whether this is where the stream may next be heard of."""
        reach = max(self.end, self.ordered_end) + SKIP_BYTES
        if self.marks:
            reach = min(reach, self.marks[0] + SKIP_BYTES)
        return self.end - SLACK_BYTES <= offset <= reach

    def order(self, chunk_bytes: int, start: int, end: int, spacing: int) -> None:
        """[start, end) is on its way, with a mark every `spacing` bytes or a little more."""
        for begin, _ in stripe.spans(chunk_bytes, max(start, self.end), end):
            if is_mark(chunk_bytes, begin, spacing):
                self.marks.append(begin)
        self.ordered_end = end

    def advance(self, end: int) -> None:
        """The reader has asked for everything before `end`."""
        self.end = end
        self.steps += 1
        while self.marks and self.marks[0] < end:
            self.marks.popleft()


def is_mark(chunk_bytes: int, begin: int, spacing: int) -> bool:
    """Whether the first pages of the chunk that begins here are to be left out."""
    _, size = stripe.span(chunk_bytes, stripe.locate(chunk_bytes, begin)[0])
    return begin % spacing < size


class AccessPattern:
    """The streams and strides of one file view."""

    def __init__(self, window_bytes_max: int) -> None:
        self._streams: list[Stream] = []  # the most recent last
        self._strides = StridePattern()
        self._window_max = window_bytes_max

    def observe(self, offset: int, size: int) -> Stream | Stride | None:
        """Take one request. Returns what it belongs to; None if it is random, so far."""
        end = offset + size
        stream = self._matching(offset)
        if stream is None or not stream.window:
            stride = self._strides.take(offset, size)
            if stride is not None:
                return stride
        if stream is None:
            window = WINDOW_BYTES_MIN if offset <= START_BYTES else 0
            stream = Stream(offset, end, window, offset)
            self._streams.append(stream)
            del self._streams[:-STREAMS_MAX]
            self._strides.begin(offset, self._streams)
        elif not stream.window and offset <= stream.begin:  # a run that is read again
            self._strides.begin(offset, self._streams)
        elif end > stream.end:
            stream.advance(end)
            if stream.window or stream.steps >= STEPS_MIN:
                least = WINDOW_BYTES_MIN if stream.begin <= START_BYTES else SKIP_BYTES
                wanted = max(least, 2 * (end - stream.begin))
                stream.window = min(wanted, self._window_max)
        return stream if stream.window else None

    def _matching(self, offset: int) -> Stream | None:
        for stream in reversed(self._streams):
            if stream.goes_on_at(offset):
                self._streams.remove(stream)
                self._streams.append(stream)
                return stream
        return None
