"""The front door, as far as it goes without installing anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "run", *arguments],
        env={**os.environ, **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_help_names_what_there_is_and_needs_nothing() -> None:
    done = run()
    assert done.returncode == 0
    assert done.stderr == ""
    for command in (
        "mount",
        "umount",
        "status",
        "info",
        "lab",
        "demo",
        "test",
        "soak",
        "bench",
        "modelfs",
    ):
        assert f"./run {command}" in done.stdout or f"| {command}" in done.stdout
    assert run("--help").stdout == done.stdout


def test_an_unknown_command_shows_the_known_ones() -> None:
    done = run("sing")
    assert done.returncode == 2
    assert "there is no 'sing'" in done.stderr
    assert "./run demo" in done.stderr


@pytest.mark.parametrize("script", ["run", ".ci/run"])
def test_the_scripts_are_clean(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)


def test_a_missing_package_without_apt_get_is_named(tmp_path: Path) -> None:
    for tool in ("bash", "env", "dirname", "readlink", "cat"):
        found = shutil.which(tool)
        assert found is not None
        (tmp_path / tool).symlink_to(found)
    done = run("demo", PATH=str(tmp_path))
    assert done.returncode == 1
    assert "missing: fuse3 etcd-server util-linux" in done.stderr
    assert "There is no apt-get here" in done.stderr
