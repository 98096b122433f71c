"""The command line: what users see when they are wrong, and what status and info look like."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import RenderableType

from modelfs.errors import UserError
from modelfsd.commands import show
from modelfsd.commands.asking import choose_daemon
from modelfsd.commands.registry import Registry

ROOT = Path(__file__).parents[2]

STATUS: dict[str, Any] = {
    "cluster": {"id": "00aa", "name": "lab"},
    "node": {"id": "11bb", "name": "n1", "pid": 42},
    "mountpoint": "/models",
    "state_dir": "/var/lib/modelfs",
    "version": "0.1.0",
    "epoch": 3,
    "replicas": 2,
    "nodes": [
        {"id": "11bb", "name": "n1", "address": "10.0.0.1:7420", "zone": "", "up": True}
        | {"self": True, "voter": True, "capacity_bytes": 1 << 40, "used_bytes": 1 << 30},
        {"id": "22cc", "name": "n2", "address": "10.0.0.2:7420", "zone": "[r1]", "up": False}
        | {"self": False, "voter": False, "capacity_bytes": None, "used_bytes": None},
    ],
    "etcd": {
        "healthy": True,
        "endpoints": ["10.0.0.1:7421"],
        "members": [{"name": "n1", "address": "10.0.0.1", "learner": False, "healthy": True}],
        "db_bytes": 1 << 20,
        "quota_bytes": 8 << 30,
        "error": None,
    },
    "files": 1234,
    "directories": 1,
    "bytes": 5 << 30,
    "chunks_under_replicated": None,
    "limits": ["flock holds on one node only"],
    "warnings": ["with two nodes the death of either makes the cluster read-only"],
}
INFO: dict[str, Any] = {
    "path": "llama/model-00001.safetensors",
    "ino": 77,
    "version": 2,
    "type": "file",
    "size": 9 << 30,
    "chunk_bytes": 4 << 20,
    "chunk_count": 2304,
    "replicas": 2,
    "epoch": 3,
    "manifest": "ab12",
    "inline": False,
    "nodes": [
        {"id": "11bb", "name": "n1", "up": True, "chunks": [[0, 9], [12, 12]]}
        | {"chunk_count": 11, "bytes": 44 << 20}
    ],
    "under_replicated": 3,
}


def modelfs(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "modelfsd", *arguments],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/daemon", **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def rendered(view: RenderableType) -> str:
    stream = io.StringIO()
    show.console(stream).print(view)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["mount", "/no/such/place", "--replicas", "0"], "--replicas: '0' is not a number"),
        (["mount", "/tmp/x", "-o", "xatr"], "the known ones are allow_other"),
        (["umount", "/tmp"], "/tmp is not a modelfs mount"),
        (["info", "/tmp"], "/tmp is not in a modelfs mount"),
        (["status", "--state-dir", "/no/such"], "no modelfs daemon runs with the state directory"),
        (["status", "--mount", "/tmp"], "no modelfs daemon serves /tmp"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(
    arguments: list[str], complaint: str, tmp_path: Path
) -> None:
    done = modelfs(*arguments, MODELFS_RUN_DIR=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("modelfs: ")
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("arguments", [["mount"], ["sing"], ["status", "--jsn"]])
def test_a_wrong_command_line_has_exit_code_2(arguments: list[str]) -> None:
    done = modelfs(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_the_help_names_what_there_is_and_nothing_else() -> None:
    done = modelfs("--help")
    assert done.returncode == 0
    for command in (
        "mount",
        "umount",
        "status",
        "info",
        "policy",
        "restore",
        "recover",
        "token",
        "node",
        "ca",
        "lab",
        "cache",
        "scrub",
        "fsck",
    ):
        assert f"  {command} " in done.stdout


def test_the_version_is_the_library_s() -> None:
    assert modelfs("--version").stdout == "modelfs 0.1.0\n"


def test_status_without_a_daemon_says_what_to_do(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    with pytest.raises(UserError, match="start one with modelfs mount MOUNTPOINT"):
        choose_daemon(registry, None, None)
    with pytest.raises(UserError, match="give one of them"):
        choose_daemon(registry, "/a", "/b")


def test_the_state_directory_can_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELFS_STATE_DIR", "/s")
    assert choose_daemon(Registry(tmp_path), None, None) == Path("/s/control.sock")


def test_status_shows_people_every_fact_without_colour_codes() -> None:
    text = rendered(show.status_view(STATUS))
    assert "flock holds on one node only" in text
    for fact in ("lab (00aa)", "n1 *", "DOWN", "[r1]", "1.00 TiB", "1,234 files, 1 directory"):
        assert fact in text
    assert "healthy, 1 of 1 member up, at 10.0.0.1:7421, 1.00 MiB of 8.00 GiB used" in text
    assert "not counted yet" in text
    assert "warning: with two nodes" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("missing", [*STATUS, None])
def test_status_of_another_version_is_shown_as_far_as_it_goes(missing: str | None) -> None:
    answer = {key: value for key, value in STATUS.items() if missing and key != missing}
    assert "cluster" in rendered(show.status_view(answer))


def test_info_shows_which_node_holds_what() -> None:
    text = rendered(show.info_view(INFO))
    for fact in (
        "inode",
        "77, version 2",
        "2,304 chunks of up to 4.00 MiB",
        "0-9 12",
        "3 chunks with",
    ):
        assert fact in text
    inline = {**INFO, "inline": True, "nodes": []}
    assert "in the inode record" in rendered(show.info_view(inline))
    assert "path" in rendered(show.info_view({"path": "a\udcff[bold]"}))
