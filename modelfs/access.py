"""How a file is being read, and how far to read ahead of it.

Judged for each file view, not for each handle: ranks and threads of one loader share a file, and
the kernel's own readahead arrives out of order. A *stream* is a run of requests of which each
begins near where the last one ended; a few are followed at once. A stream that keeps going doubles
its window up to the maximum; a request that continues no stream is random, and gets no readahead.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelfs.limits import KIB, MIB

STREAMS_MAX = 8
SLACK_BYTES = 8 * MIB  # requests of one stream arrive out of order by as much as the kernel reads
START_BYTES = 256 * KIB  # a first read within this of the file's start begins a stream
WINDOW_BYTES_MIN = 4 * MIB


@dataclass(slots=True)
class _Stream:
    end: int  # one past the furthest byte asked for
    window: int  # how far ahead of `end` to fetch


class AccessPattern:
    """The streams of one file view."""

    def __init__(self, window_bytes_max: int) -> None:
        self._streams: list[_Stream] = []  # the most recent last
        self._window_max = window_bytes_max

    def observe(self, offset: int, size: int) -> int | None:
        """Take one request. Returns the offset up to which to read ahead; None if it is random."""
        stream = self._matching(offset)
        if stream is None:
            window = WINDOW_BYTES_MIN if offset <= START_BYTES else 0
            stream = _Stream(offset + size, window)
            self._streams.append(stream)
            del self._streams[:-STREAMS_MAX]
            return stream.end + stream.window if window else None
        if offset + size > stream.end:
            stream.end = offset + size
            doubled = max(WINDOW_BYTES_MIN, 2 * stream.window)
            stream.window = min(doubled, self._window_max)
        return stream.end + stream.window

    def _matching(self, offset: int) -> _Stream | None:
        for stream in reversed(self._streams):
            if stream.end - SLACK_BYTES <= offset <= stream.end + SLACK_BYTES // 8:
                self._streams.remove(stream)
                self._streams.append(stream)
                return stream
        return None
