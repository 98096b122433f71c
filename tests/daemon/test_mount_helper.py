"""`mount.fuse.modelfs`: how a call of mount(8) becomes a call of `modelfs mount`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modelfs.errors import UserError
from modelfsd.commands.mount_helper import parse, split_options
from modelfsd.config import load_config

ROOT = Path(__file__).parents[2]
GENERIC = (
    "rw,nosuid,nodev,noexec,noauto,nofail,_netdev,relatime,user=me,users,comment=x,"
    "x-systemd.automount,x-systemd.requires=network-online.target,defaults"
)


def test_an_fstab_line_becomes_settings() -> None:
    request = parse(
        ["modelfs", "/models", "-o", f"{GENERIC},replicas=3,zone=a,peer=n1,peer=n2:7430,xattr"]
    )
    assert request.mountpoint == "/models" and not request.is_fake
    assert request.settings == {
        "replicas": "3",
        "zone": "a",
        "peers": ["n1", "n2:7430"],
        "options": "rw,noexec,relatime,defaults,xattr",
    }
    config = load_config(request.mountpoint, request.settings, environ={}, is_root=True)
    assert (config.replicas, config.zone) == (3, "a")
    assert config.peers == (("n1", 7420), ("n2", 7430))
    assert config.options.xattr and config.options.no_exec and not config.options.read_only


@pytest.mark.parametrize("source", ["modelfs", "none", "fuse.modelfs", ""])
def test_a_source_that_is_no_address_means_the_defaults(source: str) -> None:
    assert parse([source, "/models"]).settings == {}


def test_a_source_that_is_an_address_is_the_first_peer() -> None:
    request = parse(["10.0.0.5,[fd00::1]:7430", "/models", "-o", "peer=n3"])
    assert request.settings == {"peers": ["10.0.0.5", "[fd00::1]:7430", "n3"]}


def test_flags_may_stand_anywhere_as_mount_puts_them() -> None:
    request = parse(["modelfs", "/m", "-n", "-f", "-v", "-o", "rw", "-t", "fuse.modelfs"])
    assert request.is_fake and request.is_verbose and request.settings == {"options": "rw"}
    assert parse(["-o", "rw", "modelfs", "/m", "-o", "ro"]).settings == {"options": "rw,ro"}


def test_unknown_words_are_mistakes_unless_mount_is_sloppy() -> None:
    with pytest.raises(UserError, match="mount option 'replica=3' is unknown"):
        parse(["modelfs", "/m", "-o", "replica=3"])
    request = parse(["modelfs", "/m", "-s", "-o", "replica=3,zone=b,sync"])
    assert request.unknown == ("replica=3", "sync") and request.settings == {"zone": "b"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["modelfs"], "usage"),
        (["modelfs", "/m", "extra"], "usage"),
        (["modelfs", "/m", "-x"], "option -x not recognized; usage"),
        (["modelfs", "/m", "-o", "remount,ro"], "cannot be remounted"),
        (["modelfs", "/m", "-N", "5"], "nsenter"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse(arguments)


def test_options_are_split_outside_of_quotes() -> None:
    assert split_options('a,b="c,d",,e') == ["a", "b=c,d", "e"]
    assert split_options("") == []


def helper(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "modelfsd.commands.mount_helper", *arguments],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/daemon"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["modelfs", "/no/such", "-o", "nonsense"], 1, "mount option 'nonsense' is unknown"),
        (["modelfs", "/no/such", "-o", "replicas=0"], 32, "--replicas: '0' is not a number"),
        (["modelfs", "/no/such", "-f", "-o", "replicas=2"], 0, ""),
    ],
)
def test_the_exit_codes_are_those_of_mount(arguments: list[str], code: int, complaint: str) -> None:
    done = helper(*arguments)
    assert done.returncode == code, done.stderr
    assert complaint in done.stderr and "Traceback" not in done.stderr
