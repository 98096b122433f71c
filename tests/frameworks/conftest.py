"""The framework matrix: what programs and libraries really do with files, on a lab of three nodes.

A thing is saved through one node's mount and loaded through another's; what comes back is compared
with what went in. The tests of `heavy/` need large packages (the extra `frameworks`): they are
collected only with `--frameworks`, and then a missing package is an error, not a skip.

`dirs` is a fresh directory through the mounts of n1, n2 and n3. A WARNING or worse in a daemon's
log fails the test that used it, unless the test expects it (`expected_logs`).
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelfsd.lab.cluster import Lab
from tests.daemon_logs import watched
from tests.mount.mount_parts import Dirs

NODES = 3
HEAVY = Path(__file__).parent / "heavy"
NEEDED = ("etcd", "setpriv", "fusermount3")
_numbers = itertools.count(1)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out what needs large packages, unless it is asked for."""
    if collection_path == HEAVY and not config.getoption("--frameworks"):
        return True
    return None


@pytest.fixture(scope="session")
def lab(test_root: Path) -> Iterator[Lab]:
    """Three nodes, for all tests of this directory."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        missing.append("/dev/fuse")
    if missing:
        pytest.fail(f"the framework tests need {', '.join(missing)}", pytrace=False)
    root = Path(tempfile.mkdtemp(prefix="frameworks-", dir=test_root))
    with Lab.up(root, NODES) as lab:
        yield lab


@pytest.fixture
def dirs(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Dirs]:
    """A fresh directory through n1, n2 and n3."""
    name = f"frameworks-{next(_numbers)}"
    first, second, third = (node.mount / name for node in lab.nodes)
    with watched(lab, request):
        first.mkdir()
        yield first, second, third
        shutil.rmtree(first)
