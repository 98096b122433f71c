"""The run directory, and paths that are followed without being touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modelfs.errors import UserError
from modelfsd import mounts
from modelfsd.commands.registry import Registry, process_start_ticks, run_directory


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "run")


def register(registry: Registry, mountpoint: Path, state: str = "/s") -> None:
    registry.register(
        mountpoint=mountpoint, state_dir=Path(state), control=Path(state, "c"), name="n"
    )


def test_a_registered_daemon_is_found_until_it_goes(registry: Registry) -> None:
    register(registry, Path("/models"))
    (entry,) = registry.live()
    assert entry.alive
    assert entry.pid == os.getpid()
    assert registry.find_by_mountpoint("/models") == entry
    assert registry.find_by_state_dir("/s") == entry
    registry.unregister(entry)
    assert registry.live() == []
    assert registry.find_by_mountpoint("/models") is None


def test_a_pid_that_was_used_again_is_not_the_daemon(registry: Registry) -> None:
    register(registry, Path("/models"))
    (path,) = registry.directory.glob("*.json")
    values = json.loads(path.read_text())
    values["start_time_ticks"] -= 1
    path.write_text(json.dumps(values))
    assert registry.live() == []
    entry = registry.find_by_mountpoint("/models")
    assert entry is not None
    assert not entry.alive


def test_two_daemons_cannot_have_one_mount_point(registry: Registry) -> None:
    register(registry, Path("/models"))
    (path,) = registry.directory.glob("*.json")
    values = json.loads(path.read_text())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        values |= {"pid": other.pid, "start_time_ticks": process_start_ticks(other.pid)}
        path.write_text(json.dumps(values))
        with pytest.raises(UserError, match=f"by process {other.pid}"):
            register(registry, Path("/models"))
        other.communicate(b"\n")
    register(registry, Path("/models"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"pid": "x"}', "\xff", '{"pid":' * 9000])
def test_a_damaged_entry_is_no_daemon(registry: Registry, content: str) -> None:
    register(registry, Path("/models"))
    (path,) = registry.directory.glob("*.json")
    path.write_text(content)
    assert registry.live() == []


def test_names_of_any_length_and_bytes_can_be_registered(registry: Registry) -> None:
    names = [Path("/" + "x" * 250 + "/" + "y" * 250), Path("/a b\nc"), Path(os.fsdecode(b"/\xff"))]
    for name in names:
        register(registry, name)
        found = registry.find_by_mountpoint(name)
        assert found is not None
        assert found.mountpoint == str(name)
    assert len(registry.live()) == len(names)


def test_a_path_belongs_to_the_nearest_mount_point(registry: Registry, tmp_path: Path) -> None:
    mountpoint = tmp_path / "models"
    mountpoint.mkdir()
    (tmp_path / "link").symlink_to("models")
    (tmp_path / "deep").symlink_to(mountpoint / "llama")
    register(registry, mountpoint)
    for path, names in {
        mountpoint: [],
        mountpoint / "a" / "b": ["a", "b"],
        tmp_path / "link" / "a": ["a"],
        tmp_path / "deep" / "b": ["llama", "b"],
        tmp_path / "x" / ".." / "models" / "a" / ".." / "b": ["b"],
    }.items():
        found = registry.find_by_path(path)
        assert found is not None
        assert found[1] == names
    assert registry.find_by_path(tmp_path / "models2") is None
    assert registry.find_by_path(tmp_path) is None


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UserError, match="symbolic links"):
        mounts.resolve(tmp_path / "a", set())


def test_a_run_directory_that_others_can_write_to_is_refused(registry: Registry) -> None:
    registry.directory.mkdir()
    registry.directory.chmod(0o777)
    with pytest.raises(UserError, match="may be written to by others"):
        register(registry, Path("/models"))


def test_the_run_directory_can_be_chosen() -> None:
    assert run_directory({"MODELFS_RUN_DIR": "/x"}) == Path("/x")


def test_a_zombie_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_start_ticks(child.pid) is None
    child.wait()
    assert process_start_ticks(child.pid) is None


def test_the_mount_table_is_read_with_its_escapes(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "36 35 98:0 / /mnt\\040a rw,noatime shared:1 master:2 - fuse.modelfs modelfs rw\n"
        "37 35 0:5 / /mnt\\040a rw - tmpfs tmpfs rw\n"
    )
    assert [mount.type for mount in mounts.mounts(str(table))] == ["fuse.modelfs", "tmpfs"]
    top = mounts.mount_at("/mnt a", str(table))
    assert top is not None
    assert top.type == "tmpfs"
    assert mounts.mount_at("/proc") is not None


def test_whoever_uses_a_directory_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    with file.open("rb"):
        (user,) = mounts.users(tmp_path)
    assert (user.pid, user.what, user.path) == (os.getpid(), "open file", str(file))
    assert mounts.users(tmp_path) == []
