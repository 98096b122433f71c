"""What `df` shows of the cluster."""

from __future__ import annotations

from dataclasses import dataclass

from modelfs.mirror import Mirror


@dataclass(frozen=True, slots=True)
class Space:
    """What statfs shows: the pool's real space, divided by the replicas that each byte takes."""

    mirror: Mirror
    replicas: int

    def __call__(self) -> tuple[int, int, int]:
        """(capacity in bytes, free bytes, number of files)."""
        nodes = self.mirror.nodes.values()
        capacity_bytes = sum(record.capacity_bytes for record in nodes)
        free_bytes = sum(record.free_bytes for record in nodes)
        copies = max(1, min(self.replicas, len(nodes)))
        return capacity_bytes // copies, free_bytes // copies, self.mirror.file_count
