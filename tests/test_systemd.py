"""The unit file: systemd accepts it, and it says what the design says."""

from __future__ import annotations

import configparser
import os
import subprocess
from pathlib import Path

from tests.needs import program

UNIT = Path(__file__).parent.parent / "systemd/modelfs.service"


def settings() -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, delimiters="=", strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNIT)
    return dict(parser["Service"])


def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    # The command need not be installed on the machine that checks: any program stands for it.
    text = UNIT.read_text().replace("/usr/local/bin/modelfs", "/bin/true")
    unit = tmp_path / UNIT.name
    unit.write_text(text)
    done = subprocess.run(
        [program("systemd-analyze"), "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "LC_ALL": "C", "SYSTEMD_LOG_LEVEL": "warning"},
    )
    complaints = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert complaints == []
    assert done.returncode == 0, done.stderr


def test_the_unit_waits_for_readiness_and_stops_cleanly() -> None:
    service = settings()
    assert service["Type"] == "notify"
    assert service["ExecStart"].endswith("modelfs mount --foreground /models")
    assert service["ExecStop"].endswith("modelfs umount /models")
    assert service["Restart"] == "on-failure"
    assert service["KillMode"] == "mixed"
    assert int(service["OOMScoreAdjust"]) < 0


def test_assertions_stay_on() -> None:
    """An assertion that fails turns a wrong write into a node that is down."""
    assert "PYTHONOPTIMIZE" not in UNIT.read_text()
    assert " -O" not in settings()["ExecStart"]


def test_the_service_keeps_only_the_rights_that_it_uses() -> None:
    service = settings()
    assert set(service["CapabilityBoundingSet"].split()) == {
        "CAP_SYS_ADMIN",
        "CAP_DAC_OVERRIDE",
        "CAP_DAC_READ_SEARCH",
        "CAP_SYS_PTRACE",
    }
    assert service["NoNewPrivileges"] == "yes"
    assert service["UMask"] == "0077"
    assert service["LimitCORE"] == "0"
    assert service["DeviceAllow"] == "/dev/fuse rw"
    assert service["MemoryMax"]


def test_the_exposure_does_not_grow(tmp_path: Path) -> None:
    """`systemd-analyze security`: 0 is none, 10 all; a service without any of it has 9.6."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text())
    analyze = program("systemd-analyze")
    command = [analyze, "security", "--offline=yes", "--threshold=50", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_service_has_no_mount_namespace_of_its_own() -> None:
    """Otherwise nobody but the service would see the mount."""
    private = ("Private", "Protect", "ReadOnly", "ReadWrite", "Inaccessible", "TemporaryFileSystem")
    assert not [key for key in settings() if key.startswith(private)]
