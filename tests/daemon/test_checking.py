"""What `modelfs scrub` and `modelfs fsck` show, and their exit codes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import RenderableType

from modelfsd.commands import show
from modelfsd.commands.checking import (
    finding_view,
    fsck_code,
    fsck_view,
    scrub_code,
    scrub_view,
)

ROOT = Path(__file__).parents[2]

FSCK: dict[str, Any] = {
    "inodes": 1200,
    "names": 1300,
    "versions": 900,
    "chunks": 5000,
    "bytes": 5 << 30,
    "seconds": 12.5,
    "mended": 0,
    "left": 0,
    "nodes_down": [],
    "nodes_silent": {},
}
SCRUB: dict[str, Any] = {
    "node": "n1",
    "seconds": 10.0,
    "chunks": 2000,
    "bytes": 8 << 30,
    "bad_chunks": 0,
    "repaired_chunks": 0,
    "dropped_chunks": 0,
    "unneeded_chunks": 0,
    "unrepaired_chunks": 0,
    "unreadable_chunks": 0,
    "example": "",
    "unrepaired": [],
}


def rendered(view: RenderableType) -> str:
    stream = io.StringIO()
    show.console(stream).print(view)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("differs", "code", "says"),
    [
        ({}, 0, "clean"),
        ({"mended": 3}, 1, "3 mended, 0 left"),
        ({"left": 2}, 4, "0 mended, 2 left"),
        ({"mended": 3, "left": 2}, 4, "3 mended, 2 left"),
        (
            {"nodes_silent": {"n\x1b3": "no\nroute"}},
            8,
            r"NOT complete: n\x1b3 did not answer: no\n",
        ),
        ({"left": 1, "nodes_silent": {"n3": "x"}}, 8, "0 mended, 1 left"),
        ({"nodes_down": ["n2", "n3"]}, 0, "down, and their copies not counted: n2, n3"),
    ],
)
def test_the_end_of_a_check(differs: dict[str, Any], code: int, says: str) -> None:
    answer = {**FSCK, **differs}
    assert fsck_code(answer) == code
    text = rendered(fsck_view(answer))
    assert text.startswith("checked 1,200 inodes and 1,300 names, 900 versions with 5,000 chunks")
    assert says in text


def test_a_finding_names_each_path_on_a_line_and_gives_no_orders() -> None:
    finding = {
        "kind": "lost",
        "paths": ["/a\x1b[2J", "/b\n/c", "/d\udcff"],
        "text": "2 chunks without a good copy (no\tnode)",
        "mended": False,
        "version": "current",
        "ranges": [[index * 10, index * 10 + 5] for index in range(20)],
        "range_count": 50,
    }
    lines = rendered(finding_view(finding)).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [r"/a\x1b[2J", r"/b\n/c", r"/d\xff"]
    assert all(r"2 chunks without a good copy (no\tnode); bytes 0-4, 10-14" in x for x in lines)
    assert all("and 42 more ranges" in line for line in lines)


def test_a_finding_without_a_path_says_which_version() -> None:
    finding = {"kind": "copies", "paths": [], "text": "1 chunk", "mended": True, "version": "open"}
    assert rendered(finding_view(finding)) == "mended: open: 1 chunk\n"


@pytest.mark.parametrize(
    ("differs", "code", "says"),
    [
        ({}, 0, "2,000 chunks (8.00 GiB) verified in 10s (819 MiB/s), 0 bad"),
        ({"bad_chunks": 4, "repaired_chunks": 4}, 0, "4 repaired from other nodes"),
        ({"bad_chunks": 1, "dropped_chunks": 1}, 0, "1 dropped from the cache"),
        ({"unreadable_chunks": 2, "example": "chunk ab: I/O"}, 4, "for example chunk ab: I/O"),
        (
            {
                "unrepaired_chunks": 1,
                "unrepaired": [{"chunk": "ab" * 32, "reason": "n2: down", "paths": ["/x\ny"]}],
            },
            4,
            "    chunk abababababababab: n2: down\n      in /x\\ny\n",
        ),
    ],
)
def test_the_end_of_a_scrub(differs: dict[str, Any], code: int, says: str) -> None:
    answer = {**SCRUB, **differs}
    assert scrub_code(answer) == code
    assert says in rendered(scrub_view(answer))


@pytest.mark.parametrize("command", ["scrub", "fsck"])
def test_without_a_daemon_the_exit_code_says_that_nothing_was_checked(
    command: str, tmp_path: Path
) -> None:
    environ = {"PYTHONPATH": f"{ROOT}:{ROOT}/daemon", "MODELFS_RUN_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "modelfsd", command, "/tmp"],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (8, "")
    assert done.stderr.startswith("modelfs: no modelfs daemon serves /tmp")
