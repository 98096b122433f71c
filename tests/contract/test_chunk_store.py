"""The contract of chunk stores, on memory and on a real directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelfs.limits import MIB
from modelfs.ports import ChunkStore
from modelfs.testing.contract_chunks import ChunkStoreContract
from modelfs.testing.stores import MemoryChunkStore
from modelfsd.storage.disk import DiskChunkStore


class TestMemoryChunkStore(ChunkStoreContract):
    @pytest.fixture
    def store(self) -> ChunkStore:
        return MemoryChunkStore(cache_bytes_max=MIB)


class TestDiskChunkStore(ChunkStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> ChunkStore:
        return DiskChunkStore(tmp_path / "chunks", cache_bytes_max=MIB)
