"""How much memory there is: the machine's, or what a control group leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from modelfs.limits import GIB, MIB
from modelfsd import memory
from modelfsd.memory import memory_bytes, read_memory_bytes


def put(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")


@pytest.fixture
def process(tmp_path: Path) -> Path:
    """This process in one group of each kind."""
    put(tmp_path / "cgroup", "4:memory:/docker/abc\n3:cpu,cpuacct:/x\n0::/system.slice/models")
    return tmp_path / "cgroup"


def test_without_limits_it_is_the_machine_s(tmp_path: Path, process: Path) -> None:
    machine = memory_bytes(tmp_path / "absent", tmp_path)
    assert machine > 64 * MIB
    put(tmp_path / "system.slice/models/memory.max", "max")
    put(tmp_path / "memory/docker/abc/memory.limit_in_bytes", str(1 << 62))
    assert memory_bytes(process, tmp_path) == machine


@pytest.mark.parametrize(
    "file",
    [
        "system.slice/models/memory.max",
        "system.slice/memory.high",
        "unified/memory.max",
        "memory/docker/abc/memory.limit_in_bytes",
        "memory/docker/memory.limit_in_bytes",
    ],
)
def test_the_least_limit_of_all_groups_above_counts(
    tmp_path: Path, process: Path, file: str
) -> None:
    put(tmp_path / "system.slice/models/memory.high", str(60 * MIB))
    put(tmp_path / file, str(50 * MIB))
    put(tmp_path / "cpu/x/memory.max", "1")
    assert memory_bytes(process, tmp_path) == 50 * MIB


def test_the_budget_is_a_share_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for there_is, budget in ((GIB // 4, 64 * MIB), (2 * GIB, 128 * MIB), (64 * GIB, 256 * MIB)):
        monkeypatch.setattr(memory, "memory_bytes", lambda there_is=there_is: there_is)
        assert read_memory_bytes() == budget


def test_requests_of_the_kernel_are_taken_from_memory_that_was_used_before() -> None:
    program = (
        "import resource, sys\n"
        "from modelfsd.memory import keep_heap\n"
        "keep_heap()\n"
        "def faults():\n"
        "    for _ in range(100):\n"
        "        [bytes(1 << 20 | 1) for _ in range(8)]\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "print(-faults() + faults())\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(told.stdout) < 8 * 256, "800 MiB, of which not even the first 8 are touched anew"
