"""`modelfs fsck` over three real daemons: what is missing or bad on their disks, by name and range.

The damage is mended within each test, so the lab stays healthy.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from modelfs import stripe
from modelfs.limits import CHUNK_BYTES_DEFAULT, KIB
from modelfsd.commands.checking import fsck_code
from modelfsd.lab.cluster import Lab
from modelfsd.lab.state import LabNode
from tests.mount.mount_parts import (
    CHILD_SECONDS,
    MIB,
    Dirs,
    ask_long,
    chunk_files,
    chunk_names,
    flip,
    forget_pages,
    refused,
    wait_until,
)

pytestmark = pytest.mark.fuse


def run_fsck(node: LabNode, *words: str) -> tuple[int, str]:
    """Run the command; returns its exit code and what it printed."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "modelfsd", "fsck", str(node.mount), *words],
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
        cwd="/",
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def fsck(node: LabNode, **arguments: bool) -> tuple[int, list[dict[str, Any]]]:
    """What the command asks the daemon: its exit code, and what was found."""
    answer, news = ask_long(node, "fsck", **arguments)
    return fsck_code(answer), [told["finding"] for told in news if "finding" in told]


def make(path: Path, contents: bytes) -> Path:
    path.write_bytes(contents)
    return path


def test_a_clean_cluster_is_clean_also_beside_writers(lab: Lab, dirs: Dirs) -> None:
    stop = threading.Event()
    (dirs[0] / "link").hardlink_to(make(dirs[0] / "file", os.urandom(3 * MIB)))

    def write(directory: Path, number: int) -> None:
        version = 0
        while not stop.is_set():
            name = f"f{number}-{version % 3}"
            (directory / name).write_bytes(os.urandom(300 * KIB))
            (directory / name).rename(directory / f"g{number}")
            (directory / f"g{number}").unlink(missing_ok=version % 2 == 0)
            version += 1

    threads = [
        threading.Thread(target=write, args=(directory, number))
        for number, directory in enumerate(dirs)
    ]
    for thread in threads:
        thread.start()
    try:
        code, output = run_fsck(lab.nodes[0], "--repair", "--json")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    answer = json.loads(output)
    assert (code, answer["findings"]) == (0, [])
    assert answer["versions"] > 0
    assert answer["chunks"] > answer["versions"]
    assert fsck(lab.nodes[1]) == (0, [])


def test_lost_chunk_files_are_named_and_made_again(lab: Lab, dirs: Dirs) -> None:
    contents, name = os.urandom(9 * MIB), "a\nb"
    (dirs[0] / name).write_bytes(contents)
    node = lab.nodes[2]
    held = chunk_files(node)
    ours = {chunk: held[chunk] for chunk in chunk_names(contents) if chunk in held}
    assert ours
    good = {path: path.read_bytes() for path in ours.values()}
    for path in good:
        path.unlink()
    code, text = run_fsck(lab.nodes[0])
    assert code == 4
    assert f"/{dirs[0].name}/a\\nb: {len(ours)} chunk" in text
    assert "1 of 2 copies" in text
    code, (finding,) = fsck(lab.nodes[0], repair=True)
    assert code == 1
    assert finding["paths"] == [f"/{dirs[0].name}/{name}"]
    assert (finding["kind"], finding["chunks"], finding["mended"]) == ("copies", len(ours), True)
    assert {path: path.read_bytes() for path in good} == good
    assert fsck(lab.nodes[1])[0] == 0


@pytest.mark.expected_logs("was damaged on", "fails its", "could not be", "cannot be re")
def test_a_chunk_that_is_bad_everywhere_costs_its_range_alone(lab: Lab, dirs: Dirs) -> None:
    contents = os.urandom(9 * MIB)
    (dirs[0] / "file").write_bytes(contents)
    index = 3
    start, size = stripe.span(CHUNK_BYTES_DEFAULT, index)
    name = chunk_names(contents)[index]
    copies = [files[name] for files in map(chunk_files, lab.nodes) if name in files]
    assert len(copies) == 2
    for path in copies:
        flip(path, size // 2)
    code, (finding,) = fsck(lab.nodes[1], data=True)
    assert code == 4
    assert finding["paths"] == [f"/{dirs[0].name}/file"]
    assert (finding["kind"], finding["mended"]) == ("lost", False)
    assert finding["ranges"] == [[start, start + size]]
    code, text = run_fsck(lab.nodes[2], "--repair")  # it is known by now, without reading all
    assert code == 4
    assert f"/{dirs[0].name}/file: 1 chunk without a good copy" in text
    assert f"bytes {start}-{start + size - 1}" in text
    for directory in dirs:
        forget_pages(directory / "file")
        with (directory / "file").open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), start, 0) == contents[:start]
            rest = os.pread(file.fileno(), len(contents), start + size)
            assert rest == contents[start + size :]
            with refused(errno.EIO):
                os.pread(file.fileno(), 4096, start + 8192)
    (dirs[0] / "file").write_bytes(contents)  # brings the chunk back under its name
    wait_until(lambda: fsck(lab.nodes[0])[0] == 0, "a clean cluster")
