"""`modelfs scrub`: bits flipped on a real disk are found and put right, beside writers and readers.

The damage is mended within each test, so the lab stays healthy.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from random import Random
from typing import Any

import pytest

from modelfs.limits import KIB
from modelfsd.commands.checking import scrub_code
from modelfsd.lab.cluster import Lab
from modelfsd.lab.state import LabNode
from tests.mount.mount_parts import (
    CHILD_SECONDS,
    MIB,
    Dirs,
    ask,
    ask_long,
    chunk_files,
    chunk_names,
    flip,
    forget_pages,
    run,
    wait_until,
)

pytestmark = pytest.mark.fuse


def scrub(node: LabNode) -> tuple[int, dict[str, Any]]:
    """What the command asks the daemon: its exit code, and the answer."""
    answer, _ = ask_long(node, "scrub")
    return scrub_code(answer), answer


@pytest.mark.expected_logs("was damaged on")
def test_flipped_bits_are_found_and_repaired(lab: Lab, dirs: Dirs, rng: Random) -> None:
    contents = os.urandom(9 * MIB + 100)
    (dirs[0] / "file").write_bytes(contents)
    node = lab.nodes[1]
    held = chunk_files(node)
    ours = [held[name] for name in chunk_names(contents) if name in held]
    assert len(ours) > 1
    good = {path: path.read_bytes() for path in ours}
    for path in ours:
        flip(path, rng.randrange(path.stat().st_size))
    words = [sys.executable, "-P", "-m", "modelfsd", "scrub", str(node.mount), "--json"]
    answer = json.loads(run(*words))
    assert answer["bad_chunks"] == answer["repaired_chunks"] == len(ours)
    assert answer["unrepaired"] == []
    assert answer["chunks"] >= len(held)
    assert {path: path.read_bytes() for path in ours} == good
    for directory in dirs:
        forget_pages(directory / "file")
        assert (directory / "file").read_bytes() == contents
    code, answer = scrub(node)
    assert (code, answer["bad_chunks"]) == (0, 0)
    status = ask(node, "status")
    assert status["scrub"]["completed_at"] > 0
    assert status["scrub"]["restored_chunks"] >= len(ours)
    assert ask(node, "counters")["scrub"]["bad_chunks"] >= len(ours)


@pytest.mark.expected_logs(
    "was damaged on", "could not be repaired", "cannot be restored", "fails its checksum"
)
def test_what_has_no_good_copy_is_named_and_the_rest_is_repaired(lab: Lab, dirs: Dirs) -> None:
    contents, name = os.urandom(3 * MIB), "ki\tsh"
    (dirs[0] / name).write_bytes(contents)
    lost = chunk_names(contents)[1]
    nodes = [node for node in lab.nodes if lost in chunk_files(node)]
    for node in nodes:
        flip(chunk_files(node)[lost], 5)
    for node in nodes:
        code, answer = scrub(node)
        assert code == 4
        (failed,) = answer["unrepaired"]  # the second node put its copy aside for the first
        assert failed["chunk"] == lost
        assert failed["paths"] == [f"/{dirs[0].name}/{name}"]
    status = ask(nodes[0], "status")
    assert status["damaged_files"] == [f"/{dirs[0].name}/{name}"]
    assert any("cannot be read whole" in warning for warning in status["warnings"])
    words = [sys.executable, "-P", "-m", "modelfsd", "status", "--mount", str(nodes[0].mount)]
    shown = subprocess.run(words, capture_output=True, text=True, check=True, cwd="/").stdout
    assert "ki\\tsh" in shown
    (dirs[1] / name).write_bytes(contents)  # brings the chunk back under its name
    for node in nodes:
        assert scrub(node)[0] == 0
    assert ask(nodes[0], "status")["damaged_files"] == []


def test_beside_writers_and_readers_there_is_no_false_alarm(lab: Lab, dirs: Dirs) -> None:
    stop = threading.Event()
    failures: list[str] = []

    def write(directory: Path, number: int) -> None:
        version = 0
        while not stop.is_set():
            data = bytes([number, version % 256]) * (300 * KIB)
            (directory / f"f{number}").write_bytes(data)
            if (dirs[2] / f"f{number}").read_bytes() != data:
                failures.append(f"f{number} is not what was written")
            (directory / f"f{number}").unlink()
            version += 1

    threads = [
        threading.Thread(target=write, args=(directory, number))
        for number, directory in enumerate(dirs[:2])
    ]
    for thread in threads:
        thread.start()
    try:
        for node in lab.nodes:
            code, answer = scrub(node)
            assert code == 0
            assert answer["bad_chunks"] == answer["unreadable_chunks"] == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures


def test_an_interrupted_scrub_ends_in_the_daemon_too(lab: Lab, dirs: Dirs) -> None:
    (dirs[0] / "file").write_bytes(os.urandom(4 * MIB))
    node = lab.nodes[0]
    words = [sys.executable, "-P", "-m", "modelfsd", "scrub", str(node.mount), "--rate", "64KiB"]
    before = ask(node, "counters")["scrub"]["chunks"]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: ask(node, "counters")["scrub"]["chunks"] > before, "the scrub to begin")
    refusal = subprocess.run(words, capture_output=True, text=True, check=False, cwd="/")
    assert refusal.returncode == 8
    assert "another scrub of this node is running" in refusal.stderr
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(timeout=CHILD_SECONDS)
    assert (child.returncode, output) == (130, "")
    assert "Traceback" not in errors
    wait_until(lambda: scrub(node)[0] == 0, "the node to be free for another scrub")
