"""Parts of files that are on their way because somebody is expected to ask for them.

Whoever asks before they are here waits for them, instead of fetching the same bytes again.
"""

from __future__ import annotations

import trio


class RunFetch:
    """[start, end) of a file. `data` is None until it is here, and stays so if it cannot be had."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end
        self.data: memoryview | None = None
        self._done = trio.Event()

    def finish(self) -> None:
        """It is here, or has failed."""
        self._done.set()

    async def part(self, start: int, end: int) -> memoryview | None:
        """Bytes of it, when they are here. None if they cannot be had: ask for yourself."""
        await self._done.wait()
        return None if self.data is None else self.data[start - self.start : end - self.start]


class RunFetches:
    """Those that are under way, by the manifest of their file; all together within a budget."""

    def __init__(self, total_bytes: int) -> None:
        self._by_manifest: dict[bytes, list[RunFetch]] = {}
        self._left_bytes = total_bytes

    def begin(self, manifest: bytes, start: int, end: int) -> RunFetch | None:
        """Whoever gets one fetches it, and calls `end`. None: too much is under way."""
        if end - start > self._left_bytes:
            return None
        self._left_bytes -= end - start
        fetch = RunFetch(start, end)
        self._by_manifest.setdefault(manifest, []).append(fetch)
        return fetch

    def end(self, manifest: bytes, fetch: RunFetch) -> None:
        """It is here, or has failed."""
        self._left_bytes += fetch.end - fetch.start
        found = self._by_manifest[manifest]
        found.remove(fetch)
        if not found:
            del self._by_manifest[manifest]
        fetch.finish()

    def find(self, manifest: bytes, start: int, end: int) -> RunFetch | None:
        """One that brings all of [start, end)."""
        for fetch in self._by_manifest.get(manifest, ()):
            if fetch.start <= start and end <= fetch.end:
                return fetch
        return None
