"""The commands on real mounts and real processes, with the tiny node (see tiny_node.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from modelfsd import mounts
from modelfsd.commands.launch import wait_for_exit
from modelfsd.commands.registry import RUN_VARIABLE, Registry, process_start_ticks

pytestmark = pytest.mark.fuse

ROOT = Path(__file__).parents[2]
COMMAND_SECONDS = 120


class Machine:
    """One mount point with its state directory, and the `modelfs` command."""

    def __init__(self, directory: Path) -> None:
        self.mountpoint = directory / "models"
        self.state_dir = directory / "state"
        self.mountpoint.mkdir()

    def modelfs(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        path = [ROOT / "tests/daemon/tiny_node", ROOT, ROOT / "daemon"]
        return subprocess.run(
            [sys.executable, "-P", "-m", "modelfsd", *arguments],
            env={**os.environ, "PYTHONPATH": ":".join(map(str, path))},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )

    def mount(self, name: str = "tiny", *more: str) -> subprocess.CompletedProcess[str]:
        words = ["--state-dir", str(self.state_dir), "--etcd", "127.0.0.1:1", "--name", name]
        return self.modelfs("mount", str(self.mountpoint), *words, *more)

    def umount(self) -> subprocess.CompletedProcess[str]:
        return self.modelfs("umount", str(self.mountpoint))

    @property
    def pid(self) -> int:
        entry = Registry().find_by_mountpoint(self.mountpoint)
        assert entry is not None
        return entry.pid

    @property
    def is_mounted(self) -> bool:
        return mounts.mount_at(self.mountpoint) is not None

    def end(self) -> None:
        entry = Registry().find_by_mountpoint(self.mountpoint)
        if entry is not None and entry.alive:
            os.kill(entry.pid, signal.SIGKILL)
            assert wait_for_exit(entry.pid, COMMAND_SECONDS)
        mounts.detach(self.mountpoint)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    made.end()


def test_mount_returns_when_the_node_is_ready_and_shows_its_progress(machine: Machine) -> None:
    done = machine.mount()
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"mounted {machine.mountpoint}: tiny node tiny\n"
    assert "starting etcd\n" in done.stderr
    assert (machine.mountpoint / "weights.bin").read_bytes() == b"0123456789"
    assert os.readlink(f"/proc/{machine.pid}/cwd") == "/"
    assert os.getsid(machine.pid) == machine.pid
    assert "starting etcd" in (machine.state_dir / "modelfs.log").read_text()


def test_umount_ends_the_process_and_the_mount(machine: Machine) -> None:
    machine.mount()
    pid = machine.pid
    done = machine.umount()
    assert (done.returncode, done.stderr) == (0, "")
    assert process_start_ticks(pid) is None
    assert not machine.is_mounted
    assert machine.umount().returncode == 2


def test_umount_of_a_busy_mount_says_who_and_changes_nothing(machine: Machine) -> None:
    machine.mount()
    with (machine.mountpoint / "weights.bin").open("rb") as file:
        done = machine.umount()
        assert done.returncode == 1
        assert f"(pid {os.getpid()}): open file {machine.mountpoint}/weights.bin" in done.stderr
        assert file.read() == b"0123456789"
    done = machine.modelfs("umount", ".", cwd=machine.mountpoint)
    assert done.returncode == 1
    assert "working directory" in done.stderr
    assert machine.umount().returncode == 0


def test_a_refused_stop_leaves_the_mount(machine: Machine) -> None:
    machine.mount("refuses")
    done = machine.umount()
    assert done.returncode == 1
    assert "not today" in done.stderr
    assert machine.is_mounted


def test_a_killed_daemon_s_mount_is_cleaned_by_umount(machine: Machine) -> None:
    machine.mount()
    pid = machine.pid
    os.kill(pid, signal.SIGKILL)
    assert wait_for_exit(pid, COMMAND_SECONDS)
    done = machine.umount()
    assert (done.returncode, done.stdout) == (
        0,
        f"removed the dead mount at {machine.mountpoint}\n",
    )
    assert not machine.is_mounted


def test_a_dead_entry_does_not_make_a_living_mount_a_dead_one(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a session and cron of one user have different run directories."""
    machine.mount()
    other = Registry(tmp_path / "run")
    entry = other.register(
        mountpoint=machine.mountpoint, state_dir=tmp_path, control=tmp_path / "s", name="old"
    )
    (file,) = other.directory.glob("*.json")
    file.write_text(json.dumps(asdict(replace(entry, start_time_ticks=1))))
    with monkeypatch.context() as patch:
        patch.setenv(RUN_VARIABLE, str(other.directory))
        with (machine.mountpoint / "weights.bin").open("rb") as used:
            done = machine.umount()
            assert done.returncode == 1
            assert f"(pid {os.getpid()}): open file" in done.stderr
            assert used.read() == b"0123456789"
            done = machine.mount("second", "--state-dir", str(machine.state_dir) + "2")
            assert done.returncode == 2
            assert "mounted already, by a modelfs daemon that is not registered" in done.stderr
            assert machine.is_mounted and used.seek(0) == 0
        done = machine.umount()
    assert (done.returncode, done.stdout) == (0, f"unmounted {machine.mountpoint}\n")
    assert not machine.is_mounted and not list(other.directory.glob("*.json"))


def test_a_killed_daemon_s_mount_is_cleaned_by_the_next_mount(machine: Machine) -> None:
    machine.mount()
    pid = machine.pid
    file = os.open(machine.mountpoint / "weights.bin", os.O_RDONLY)  # in use, and dead all the same
    os.kill(pid, signal.SIGKILL)
    assert wait_for_exit(pid, COMMAND_SECONDS)
    done = machine.mount()
    with pytest.raises(OSError, match="not connected"):
        os.close(file)  # a FLUSH that nobody takes
    assert done.returncode == 0, done.stderr
    assert (machine.mountpoint / "weights.bin").read_bytes() == b"0123456789"


def test_a_mount_that_hangs_is_recognised_from_outside(machine: Machine) -> None:
    machine.mount()
    assert mounts.probe(str(machine.mountpoint)) is mounts.Health.ANSWERS
    os.kill(machine.pid, signal.SIGSTOP)
    try:
        assert mounts.probe(str(machine.mountpoint), 0.5) is mounts.Health.HANGS
        done = machine.mount("second")
        assert done.returncode == 2
        assert "in use by process" in done.stderr
    finally:
        os.kill(machine.pid, signal.SIGCONT)
    assert mounts.probe(str(machine.mountpoint)) is mounts.Health.ANSWERS


def test_a_second_mount_of_one_mount_point_is_refused(machine: Machine) -> None:
    machine.mount()
    done = machine.mount("second", "--state-dir", str(machine.state_dir) + "2")
    assert done.returncode == 2
    assert f"is mounted already, by process {machine.pid}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_node_that_gives_up_is_quoted(machine: Machine) -> None:
    done = machine.mount("fails")
    assert done.returncode == 2
    assert done.stderr.count("ask it nicely") == 1
    assert done.stderr.endswith("modelfs: the cluster does not want us: ask it nicely\n")
    assert "Traceback" not in done.stderr
    assert Registry().find_by_mountpoint(machine.mountpoint) is None


def test_a_node_that_dies_without_a_word_left_it_in_its_log(machine: Machine) -> None:
    done = machine.mount("dies")
    assert done.returncode == 1
    assert "ended while it was starting; its last words:" in done.stderr
    assert "last words\n" in done.stderr


def test_a_bug_is_one_line_for_the_user_and_a_traceback_in_the_log(machine: Machine) -> None:
    done = machine.mount("crashes")
    assert done.returncode == 1
    assert "modelfs: internal error: ValueError: a bug" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in (machine.state_dir / "modelfs.log").read_text()


def test_a_node_in_the_foreground_stops_on_sigterm(machine: Machine) -> None:
    path = [ROOT / "tests/daemon/tiny_node", ROOT, ROOT / "daemon"]
    words = ["--state-dir", str(machine.state_dir), "--etcd", "127.0.0.1:1", "--foreground"]
    read_end, write_end = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "modelfsd", "mount", str(machine.mountpoint), *words],
        env={
            **os.environ,
            "PYTHONPATH": ":".join(map(str, path)),
            "MODELFS_READY_FD": str(write_end),
        },
        pass_fds=(write_end,),
        stderr=subprocess.PIPE,
        text=True,
    ) as node:
        os.close(write_end)
        with open(read_end) as pipe:
            assert '"ready"' in pipe.read()
        node.terminate()
        _, log = node.communicate(timeout=COMMAND_SECONDS)
    assert node.returncode == 0, log
    assert not machine.is_mounted


def test_status_and_info_find_the_one_daemon(machine: Machine) -> None:
    machine.mount()
    done = machine.modelfs("status", "--json")
    assert json.loads(done.stdout)["epoch"] == 7
    done = machine.modelfs("info", "--json", "./x/../weights\udcff.bin", cwd=machine.mountpoint)
    assert json.loads(done.stdout)["names"] == ["weights\udcff.bin"]
    link = machine.state_dir / "link"
    link.symlink_to(machine.mountpoint)
    done = machine.modelfs("info", "--json", str(link / "a"))
    assert json.loads(done.stdout)["names"] == ["a"]
    for words in (["--state-dir", str(machine.state_dir)], ["--mount", str(machine.mountpoint)]):
        assert "tiny" in machine.modelfs("status", *words).stdout


def test_status_with_several_daemons_says_what_to_type(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Machine(tmp_path / "other")
    try:
        machine.mount()
        other.mount("second")
        done = machine.modelfs("status")
        assert done.returncode == 2
        assert f"{other.mountpoint}  (second, pid {other.pid})" in done.stderr
        assert "modelfs status --mount" in done.stderr
    finally:
        other.end()
