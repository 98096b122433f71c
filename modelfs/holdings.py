"""What one node holds, and which of it is needed: the table that upkeep decides by.

A node has millions of chunks, so they are rows of arrays here: 32 bytes of id, 8 of the time of
the last put, 4 of the epoch and 1 of the replicas, with the sort key 53 bytes for each chunk held.

References are matched by their *key*, the first 8 bytes of the id. Two ids with one key (one pair
among 6 billion chunks) can only make an unneeded chunk look needed, which costs space, not data.
So what is known of all the manifests of a cluster takes 12 bytes for each chunk that they name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelfs.ids import ChunkId
from modelfs.manifest import Entries, PlacedChunk

REFERENCE = np.dtype([("key", "<u8"), ("epoch", "<u4")])

References = npt.NDArray[np.void]  # of REFERENCE
Mask = npt.NDArray[np.bool_]
Indexes = npt.NDArray[np.int64]


@dataclass(slots=True)
class Holdings:
    """The owned chunks of a node, sorted by key, and what manifests say of them.

    `replicas` is 0 for a chunk that no manifest names, else the most copies that one asks for;
    `epochs` is the newest map by which one placed it. Only `mark` changes them.
    """

    ids: npt.NDArray[np.uint8]  # (n, 32)
    keys: npt.NDArray[np.uint64]
    put_at: npt.NDArray[np.float64]  # Unix seconds, as the store has them
    epochs: npt.NDArray[np.uint32]
    replicas: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, chunks: Iterable[tuple[ChunkId, float]]) -> Holdings:
        """The holdings that `ChunkStore.owned` lists, none of them marked."""
        names, times = bytearray(), []
        for chunk, put_at in chunks:
            names += chunk
            times.append(put_at)
        ids = np.frombuffer(bytes(names), np.uint8).reshape(-1, 32)
        keys = keys_of(ids)
        order = np.argsort(keys, kind="stable")
        count = len(ids)
        return cls(
            ids[order],
            keys[order],
            np.array(times, np.float64)[order],
            np.zeros(count, np.uint32),
            np.zeros(count, np.uint8),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def chunk(self, index: int) -> ChunkId:
        """The id of a row."""
        return ChunkId(self.ids[index].tobytes())

    @property
    def is_needed(self) -> Mask:
        """For each row, whether a manifest names it."""
        return self.replicas > 0

    def mark(self, references: References, replicas: npt.NDArray[np.uint8]) -> None:
        """Note that manifests name these chunks, each with so many copies."""
        first = np.searchsorted(self.keys, references["key"], side="left")
        last = np.searchsorted(self.keys, references["key"], side="right")
        for step in range(int((last - first).max(initial=0))):  # once, but for equal keys
            found = first + step < last
            rows = first[found] + step
            np.maximum.at(self.replicas, rows, replicas[found])
            np.maximum.at(self.epochs, rows, references["epoch"][found])


def keys_of(ids: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """The keys of ids of the shape (n, 32)."""
    return np.ascontiguousarray(ids[:, :8]).view("<u8").astype(np.uint64).reshape(-1)


def references_of_entries(entries: Entries) -> References:
    """What a table of manifest entries names, holes left out."""
    raw = np.ascontiguousarray(entries).view(np.uint8).reshape(len(entries), entries.itemsize)
    references = np.zeros(len(entries), REFERENCE)
    references["key"] = keys_of(raw)
    references["epoch"] = entries["epoch"]
    return references[entries["length"] > 0]


def references_of(chunks: Iterable[PlacedChunk]) -> References:
    """What a list of chunks names: a manifest's root and pages."""
    rows = [(int.from_bytes(one.ref.id[:8], "little"), one.epoch) for one in chunks]
    return np.array(rows, REFERENCE)
