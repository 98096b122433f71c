"""What tests need of the machine. Where it is missing a test is skipped; in CI that is an error."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """The test cannot run here."""
    if os.environ.get("CI") == "true":
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


def program(name: str) -> str:
    """The path of a program that the test runs."""
    return shutil.which(name) or missing(f"{name} is not installed")


def root() -> None:
    """The test must be run by root."""
    if os.geteuid() != 0:
        missing("only root can do this")


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[None]:
    """A new directory with room for so many bytes and no more."""
    root()
    path.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        missing(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)
