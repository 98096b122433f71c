"""Reclaim: which unneeded chunks may be deleted, and when.

A chunk is deleted when it has been unneeded, and not put or renewed, for a whole *grace period*,
as watched by the node that deletes it. What follows from "as watched":

- It is counted from the moment at which the chunk became unneeded, not only from its last put: a
  reader of a version that has just been superseded has the grace period to pin it.
- A node that starts, or was cut off, begins to count anew. A live writer, who renews its chunks
  three times in a grace period, reaches it before anything is deleted.
- Only a monotonic clock is used. The store's own times are compared for equality alone, so that a
  wall clock that jumps deletes nothing.

A chunk that was renewed between the look and the deletion is spared by the store itself, which is
told the time that the look has found (`if_put_at` of `ChunkStore.delete`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelfs.holdings import Holdings, Indexes, Mask


@dataclass(frozen=True, slots=True)
class Waiting:
    """The chunks that nobody needed at the last look, by key; 24 bytes for each.

    `put_at` is the store's time of the last put or renewal, `since` the monotonic time at which
    the chunk was first seen unneeded with that `put_at`.
    """

    keys: npt.NDArray[np.uint64]  # ascending
    put_at: npt.NDArray[np.float64]
    since: npt.NDArray[np.float64]

    @classmethod
    def nothing(cls) -> Waiting:
        """Nothing is known yet."""
        return cls(np.zeros(0, np.uint64), np.zeros(0), np.zeros(0))

    def __len__(self) -> int:
        return len(self.keys)

    def next_ripe_at(self, now: float, grace_seconds: float) -> float:
        """When the next of them will have waited for so long; infinite if none will."""
        times = self.since + grace_seconds
        return float(times[times > now].min(initial=math.inf))


def watch(
    waiting: Waiting, holdings: Holdings, unneeded: Mask, now: float, grace_seconds: float
) -> tuple[Waiting, Indexes]:
    """Take a new look. Returns what waits now, and the rows that have waited for long enough.

    A chunk that is no longer unneeded, or was put again, waits from the beginning.
    """
    rows = np.flatnonzero(unneeded)
    keys, put_at = holdings.keys[rows], holdings.put_at[rows]
    since = np.full(len(rows), now)
    if len(waiting):
        places = np.minimum(np.searchsorted(waiting.keys, keys), len(waiting) - 1)
        is_same = (waiting.keys[places] == keys) & (waiting.put_at[places] == put_at)
        since[is_same] = waiting.since[places[is_same]]
    ripe = rows[now - since >= grace_seconds]
    return Waiting(keys, put_at, since), ripe
