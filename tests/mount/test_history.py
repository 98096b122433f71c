"""Retained versions on a real lab: what is listed, what comes back, and who sees it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from modelfs.errors import UserError
from modelfsd.lab.cluster import Lab
from modelfsd.lab.state import LabNode
from tests.mount.mount_parts import (
    CHILD_SECONDS,
    MIB,
    Dirs,
    ask,
    owned_bytes,
    pattern,
    refused,
    wait_until,
)

ROOT = Path(__file__).parents[2]
BIG = 9 * MIB + 17  # three chunks and a bit


def names(lab: Lab, path: Path) -> list[str]:
    """The names of a path below the first node's mount."""
    return list(path.relative_to(lab.nodes[0].mount).parts)


def versions(lab: Lab, path: Path) -> dict[str, Any]:
    return ask(lab.nodes[0], "versions", path=names(lab, path))


def past(lab: Lab, path: Path) -> list[tuple[int, str, int]]:
    """(number, why, size) of each retained version, the oldest first."""
    rows = versions(lab, path)["versions"]
    return [(row["number"], row["why"], row["size"]) for row in reversed(rows) if row["why"]]


def restore(lab: Lab, path: Path, number: int, node: int = 0) -> int:
    """Restore through a node; returns the number of the new version."""
    answer = ask(lab.nodes[node], "restore", path=names(lab, path), number=number)
    assert answer["restored"] == number
    new: int = answer["number"]
    return new


def set_policy(lab: Lab, path: Path, **settings: str) -> dict[str, Any]:
    return ask(lab.nodes[0], "policy", path=names(lab, path), set=settings)


def modelfs(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "modelfsd", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/daemon"},
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
        check=False,
    )


def owned_bytes_of(lab: Lab) -> int:
    """How much chunks that are not cached take on all disks."""
    return sum(map(owned_bytes, lab.nodes))


def save(path: Path, data: bytes) -> None:
    """As careful programs save: to a temporary name, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.rename(temporary, path)


@pytest.mark.parametrize("size", [1000, BIG])
def test_what_was_rewritten_replaced_and_deleted_is_listed_and_comes_back(
    lab: Lab, dirs: Dirs, size: int
) -> None:
    path, there = dirs[0] / "f", dirs[1] / "f"
    path.write_bytes(pattern(1, size))
    there.write_bytes(pattern(2, size + 1))  # another node rewrites it
    save(path, pattern(3, size + 2))
    path.unlink()
    found = past(lab, path)
    assert [(why, length) for _, why, length in found] == [
        ("rewritten", size),
        ("replaced", size + 1),
        ("deleted", size + 2),
    ]
    numbers = [number for number, _, _ in found]
    assert numbers == sorted(set(numbers))
    assert versions(lab, path)["current"] is None
    wait_until(lambda: not there.exists(), "the removal to be seen")
    last = numbers[-1]
    for version, number in enumerate(numbers, 1):
        new = restore(lab, path, number, node=2)
        assert new == last + 1
        last = new
        for directory in dirs:
            assert (directory / "f").read_bytes() == pattern(version, size + version - 1)
    assert versions(lab, path)["current"] == last
    assert [why for _, why, _ in past(lab, path)][3:] == ["rewritten", "rewritten"]


def test_the_restoring_node_s_own_kernel_sees_it_although_it_had_the_file_cached(
    lab: Lab, dirs: Dirs
) -> None:
    path = dirs[0] / "f"
    path.write_bytes(pattern(1, BIG))
    path.write_bytes(pattern(2, 5000))
    assert path.read_bytes() == pattern(2, 5000)
    with path.open("rb") as opened:
        assert opened.read(16) == pattern(2, 16)
        restore(lab, path, past(lab, path)[0][0])
        assert path.read_bytes() == pattern(1, BIG)
        assert path.stat().st_size == BIG
        opened.seek(0)
        assert opened.read() == pattern(2, 5000)  # an open handle keeps what it opened


def test_what_is_restored_after_a_delete_has_its_mode_and_times(lab: Lab, dirs: Dirs) -> None:
    path = dirs[0] / "f"
    path.write_bytes(b"mine")
    path.chmod(0o640)
    os.chown(path, 1234, 2345)
    os.utime(path, ns=(10**18, 10**18))
    path.unlink()
    restore(lab, path, past(lab, path)[-1][0], node=1)
    for directory in dirs:
        status = (directory / "f").stat()
        assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o640, 1234, 2345)
        assert (status.st_mtime_ns, status.st_nlink) == (10**18, 1)
    path.write_bytes(b"and it is written again")
    assert (dirs[2] / "f").read_bytes() == b"and it is written again"


def test_a_file_that_is_being_written_is_busy(lab: Lab, dirs: Dirs) -> None:
    path = dirs[0] / "f"
    path.write_bytes(b"one")
    path.write_bytes(b"two")
    number = past(lab, path)[0][0]
    with path.open("ab") as writer:
        writer.write(b" and more")
        with pytest.raises(UserError, match="is being written on node n1"):
            restore(lab, path, number, node=1)
    assert (dirs[1] / "f").read_bytes() == b"two and more"
    restore(lab, path, number, node=1)
    assert path.read_bytes() == b"one"


def test_a_removed_tree_comes_back_from_the_top(lab: Lab, dirs: Dirs) -> None:
    outer = dirs[0] / "outer"
    inner = outer / "inner"
    inner.mkdir(parents=True, mode=0o750)
    (inner / "f").write_bytes(b"deep")
    (inner / "f").unlink()
    inner.rmdir()
    outer.rmdir()
    ((number, why, size),) = past(lab, inner / "f")
    assert (why, size) == ("deleted", 4)
    assert versions(lab, dirs[0])["gone_names"] == ["outer"]
    for directory in (outer, inner):
        with pytest.raises(UserError, match=f"modelfs restore {lab.nodes[1].mount}") as refusal:
            restore(lab, inner / "f", number, node=1)
        assert str(directory.relative_to(dirs[0])) in str(refusal.value)
        restore(lab, directory, past(lab, directory)[-1][0], node=1)
        assert (dirs[1] / directory.relative_to(dirs[0])).is_dir()
        assert directory.stat().st_mode & 0o777 == (0o750 if directory == inner else 0o755)
    restore(lab, inner / "f", number, node=1)
    assert (inner / "f").read_bytes() == b"deep"
    with pytest.raises(UserError, match="is a directory now"):
        restore(lab, inner, past(lab, inner)[-1][0])
    inner.rename(dirs[0] / "moved")
    with pytest.raises(UserError, match=r"is back already, as .*/moved"):
        restore(lab, inner, past(lab, inner)[-1][0])
    assert (dirs[2] / "moved" / "f").read_bytes() == b"deep"


def test_a_policy_is_handed_down_and_shapes_new_files(lab: Lab, dirs: Dirs) -> None:
    below = dirs[0] / "a" / "b"
    below.mkdir(parents=True)
    (below / "before").write_bytes(pattern(1, BIG))
    set_policy(lab, dirs[0] / "a", replicas="3", retain="7d", chunk_size="1MiB")
    shown = ask(lab.nodes[1], "policy", path=names(lab, below))
    assert (shown["replicas"], shown["retain_seconds"], shown["chunk_bytes"]) == (
        3,
        7 * 86400,
        MIB,
    )
    where = "/" + "/".join(names(lab, dirs[0] / "a"))
    assert shown["from"] == dict.fromkeys(("replicas", "retain_seconds", "chunk_bytes"), where)
    (dirs[1] / "a" / "b" / "after").write_bytes(pattern(2, BIG))
    before = ask(lab.nodes[0], "info", path=names(lab, below / "before"))
    after = ask(lab.nodes[0], "info", path=names(lab, below / "after"))
    assert (before["replicas"], before["chunk_bytes"]) == (2, 4 * MIB)
    assert (after["replicas"], after["chunk_bytes"]) == (3, MIB)
    assert [holder["chunk_count"] for holder in after["nodes"]] == [after["chunk_count"]] * 3
    set_policy(lab, dirs[0] / "a", replicas="inherit")
    assert ask(lab.nodes[2], "policy", path=names(lab, below))["replicas"] == 2


def test_a_file_can_be_given_more_copies_and_no_other_chunk_size(lab: Lab, dirs: Dirs) -> None:
    path = dirs[0] / "f"
    path.write_bytes(b"x")
    assert set_policy(lab, path, replicas="3")["replicas"] == 3
    path.write_bytes(b"a new version")
    shown = set_policy(lab, path, retain="2h")
    assert (shown["replicas"], shown["retain_seconds"]) == (3, 7200)
    with pytest.raises(UserError, match="fixed when it is made"):
        set_policy(lab, path, chunk_size="1MiB")
    for wrong in ({"chunk_size": "3MiB"}, {"replicas": "0"}, {"retain": "soon"}):
        with pytest.raises(UserError):
            set_policy(lab, dirs[0], **wrong)


def test_a_short_retention_frees_the_entry_also_below_removed_directories(
    lab: Lab, dirs: Dirs
) -> None:
    gone = dirs[0] / "gone"
    gone.mkdir()
    path = dirs[0] / "f"
    path.write_bytes(b"one")
    path.write_bytes(b"two")
    (gone / "f").write_bytes(b"three")
    (gone / "f").unlink()
    gone.rmdir()
    assert len(past(lab, path)) == 1
    assert len(past(lab, gone / "f")) == 1
    set_policy(lab, dirs[0], retain="500ms")
    wait_until(lambda: not past(lab, path), "the end of a retention")
    wait_until(lambda: not versions(lab, dirs[0])["gone_names"], "the end of the directory's")
    with pytest.raises(UserError, match="there is no directory"):
        past(lab, gone / "f")
    assert path.read_bytes() == b"two"


def test_the_commands_say_what_they_did_and_what_is_wrong(lab: Lab, dirs: Dirs) -> None:
    path = dirs[0] / "f"
    path.write_bytes(b"one")
    path.write_bytes(b"other")
    number = past(lab, path)[0][0]
    listed = modelfs("info", path, "--versions")
    assert "rewritten" in listed.stdout and "current" in listed.stdout
    as_json = json.loads(modelfs("info", path, "--versions", "--json").stdout)
    assert [row["size"] for row in as_json["versions"]] == [5, 3]
    done = modelfs("restore", path, "--version", str(number))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"restored version {number} of " in done.stdout
    assert path.read_bytes() == b"one"
    wrong = modelfs("restore", path, "--version", "4000000")
    assert wrong.returncode == 2
    assert f"not retained (retained are {number}, " in wrong.stderr
    current = json.loads(modelfs("info", path, "--versions", "--json").stdout)["current"]
    assert "is the current one" in modelfs("restore", path, "--version", str(current)).stderr
    assert "2 hours" not in modelfs("policy", dirs[0], "--retain", "2h").stdout
    assert "2h" in modelfs("policy", path).stdout
    never = modelfs("info", dirs[0] / "never", "--versions")
    assert never.returncode == 2
    assert "does not exist, and nothing of it is retained" in never.stderr
    with refused(2):
        (dirs[0] / "never").open()


def test_reclaim_spares_what_is_retained_and_takes_it_when_that_is_over(lab_root: Path) -> None:
    with Lab.up(lab_root, 2, settings='reclaim_grace = "1s"\n') as lab:
        path = lab.nodes[0].mount / "f"
        data = random.Random(0).randbytes(BIG)
        path.write_bytes(data)
        path.unlink()
        for node in lab.nodes:
            swept: set[float] = set()
            wait_until(partial(_has_swept, node, swept), "ten sweeps")
        assert owned_bytes_of(lab) > 2 * BIG
        restore(lab, path, past(lab, path)[-1][0])
        assert (lab.nodes[1].mount / "f").read_bytes() == data
        path.unlink()
        set_policy(lab, lab.nodes[0].mount, retain="0")
        wait_until(lambda: owned_bytes_of(lab) == 0, "space given back")


def _has_swept(node: LabNode, seen: set[float]) -> bool:
    seen.add(ask(node, "status")["upkeep"]["swept_at"])
    return len(seen) > 10
