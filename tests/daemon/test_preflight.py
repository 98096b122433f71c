"""The checks before a start: each mistake has its sentence."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from modelfs.errors import UserError
from modelfsd.commands import preflight
from modelfsd.commands.registry import Registry
from modelfsd.config import Config, load_config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "models").mkdir()
    given = {"state_dir": str(tmp_path / "state"), "listen": "127.0.0.1"}
    return load_config(tmp_path / "models", given, environ={"HOME": str(tmp_path)}, is_root=True)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "run")


def test_the_state_directory_is_made_for_its_owner_alone(config: Config) -> None:
    prepared = preflight.prepare(config)
    assert stat.S_IMODE(prepared.state_dir.stat().st_mode) == 0o700
    prepared.state_dir.chmod(0o755)
    preflight.prepare(config)
    assert stat.S_IMODE(prepared.state_dir.stat().st_mode) == 0o700


def test_links_in_both_paths_are_followed(config: Config, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("models")
    (tmp_path / "disk").symlink_to("state")
    prepared = preflight.prepare(
        replace(config, mountpoint=tmp_path / "link", state_dir=tmp_path / "disk")
    )
    assert (prepared.mountpoint, prepared.state_dir) == (tmp_path / "models", tmp_path / "state")


def test_neither_directory_lies_in_the_other(config: Config, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("models")
    for state_dir in (config.mountpoint, config.mountpoint / "state", tmp_path / "link/state"):
        with pytest.raises(UserError, match="cannot keep its chunks in itself"):
            preflight.prepare(replace(config, state_dir=state_dir))
    with pytest.raises(UserError, match="lies inside the state directory"):
        preflight.prepare(replace(config, state_dir=tmp_path))
    assert os.listdir(config.mountpoint) == []


def test_a_state_directory_that_is_a_file_is_refused(config: Config) -> None:
    config.state_dir.write_text("x")
    with pytest.raises(UserError, match="state directory"):
        preflight.prepare(config)


def test_the_mount_point_is_an_empty_directory(config: Config, registry: Registry) -> None:
    place = config.mountpoint
    preflight.check_mountpoint(place, registry)
    (place / "precious").write_text("x")
    with pytest.raises(UserError, match=r"is not empty \('precious' is in it"):
        preflight.check_mountpoint(place, registry)
    with pytest.raises(UserError, match="is not a directory"):
        preflight.check_mountpoint(place / "precious", registry)
    with pytest.raises(UserError, match=r"does not exist: make it \(mkdir -p"):
        preflight.check_mountpoint(place / "no", registry)


def test_a_state_directory_has_one_daemon(config: Config) -> None:
    config = preflight.prepare(config)
    lock = preflight.lock_state_dir(config)
    assert not os.get_inheritable(lock)
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()}: a second node"):
        preflight.lock_state_dir(config)
    os.close(lock)
    os.close(preflight.lock_state_dir(config))


def test_missing_programs_and_devices_say_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="install the package util-linux"):
        preflight.check_etcd(str(tmp_path))
    (tmp_path / "setpriv").touch(mode=0o755)
    with pytest.raises(UserError, match="apt install etcd-server"):
        preflight.check_etcd(str(tmp_path))
    with pytest.raises(UserError, match="modprobe fuse"):
        preflight.check_fuse(str(tmp_path / "fuse"))
    with pytest.raises(UserError, match="run as root; a container needs"):
        preflight.check_fuse(str(tmp_path))  # a directory: cannot be opened for writing


def test_an_old_python_and_a_wrong_clock_are_refused() -> None:
    with pytest.raises(UserError, match=r"needs Python 3\.11 or newer, this is 3\.10"):
        preflight.check_python((3, 10))
    with pytest.raises(UserError, match="clock says 1970-01-01"):
        preflight.check_clock(17.0)


def test_a_root_without_the_capability_is_told() -> None:
    assert preflight.has_capability(21, "Name:\tx\nCapEff:\t000001ffffffffff\n")
    assert not preflight.has_capability(21, "CapEff:\t00000000a80425fb\n")


@pytest.mark.expected_logs("is full: ")
def test_a_full_disk_stops_a_new_node_only(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    state_dir = preflight.prepare(config).state_dir
    preflight.check_free_space(state_dir)
    monkeypatch.setattr(preflight, "FREE_BYTES_MIN", 1 << 62)
    (state_dir / "lock").touch()
    with pytest.raises(UserError, match="and a new node needs 4096 PiB"):
        preflight.check_free_space(state_dir)
    (state_dir / "chunks").mkdir()
    preflight.check_free_space(state_dir)


# ---------------------------------------------------------------- what is in the state directory

PARTS = ["node.json", "pki", "staging", "lost", "chunks", "etcd", "lock", "namespace.sqlite"]


@pytest.mark.parametrize("part", PARTS)
def test_a_link_in_the_state_directory_is_refused(
    config: Config, tmp_path: Path, part: str
) -> None:
    state_dir = preflight.prepare(config).state_dir
    target = tmp_path / "elsewhere"
    target.write_text("precious")
    (state_dir / part).symlink_to(target)
    with pytest.raises(UserError, match="symbolic link"):
        preflight.prepare(config)
    assert target.read_text() == "precious"
    (state_dir / part).unlink()
    (state_dir / part).symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="symbolic link"):
        preflight.prepare(config)


@pytest.mark.parametrize("part", PARTS)
def test_what_others_own_or_may_write_is_refused(config: Config, part: str) -> None:
    state_dir = preflight.prepare(config).state_dir
    (state_dir / part).mkdir(mode=0o700)
    preflight.prepare(config)
    with pytest.raises(UserError, match="belongs to user"):
        preflight.check_state(state_dir, os.geteuid() + 1)
    for mode in (0o770, 0o702):
        (state_dir / part).chmod(mode)
        with pytest.raises(UserError, match="written to by others"):
            preflight.prepare(config)
