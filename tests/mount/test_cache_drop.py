"""`modelfs cache drop`: the node is cold afterwards, and nobody who has a file open notices."""

from __future__ import annotations

import mmap
import os
import sys

import pytest

from modelfsd.lab.cluster import Lab
from modelfsd.lab.state import LabNode
from tests.mount.mount_parts import MIB, Dirs, ask, pattern, requests, run, version_in

pytestmark = pytest.mark.fuse


def chunk_bytes_read(node: LabNode) -> int:
    """How much a daemon has read from chunks, here and there."""
    counted = ask(node, "counters")["chunks"]
    return int(counted["local_bytes"] + counted["remote_bytes"])


def drop(node: LabNode) -> str:
    """Run the command."""
    return run(sys.executable, "-P", "-m", "modelfsd", "cache", "drop", node.mount)


def test_what_was_warm_is_read_from_the_chunks_again(lab: Lab, dirs: Dirs) -> None:
    node, size = lab.nodes[1], 20 * MIB
    contents = os.urandom(size)
    (dirs[0] / "file").write_bytes(contents)
    assert (dirs[1] / "file").read_bytes() == contents
    for _ in range(2):
        text = drop(node)
        assert text.startswith("dropped ")
        asked, read = requests(node)["read"], chunk_bytes_read(node)
        assert (dirs[1] / "file").read_bytes() == contents
        assert requests(node)["read"] > asked
        assert chunk_bytes_read(node) - read >= size


def test_open_files_and_mappings_of_every_version_go_on(lab: Lab, dirs: Dirs) -> None:
    size = 9 * MIB + 100
    (dirs[0] / "file").write_bytes(pattern(1, size))
    with (dirs[1] / "file").open("rb") as file:
        with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
            assert version_in(mapped[: size // 2]) == 1
            (dirs[0] / "file").write_bytes(pattern(2, size))
            assert version_in((dirs[1] / "file").read_bytes()) == 2
            drop(lab.nodes[1])
            assert version_in(mapped[:]) == 1
        assert version_in(file.read()) == 1
    assert version_in((dirs[1] / "file").read_bytes()) == 2


def test_what_is_being_written_is_left_alone(lab: Lab, dirs: Dirs) -> None:
    contents = os.urandom(6 * MIB)
    with (dirs[0] / "file").open("wb", buffering=0) as file:
        file.write(contents[: 3 * MIB])
        drop(lab.nodes[0])
        file.write(contents[3 * MIB :])
    for directory in dirs:
        assert (directory / "file").read_bytes() == contents
