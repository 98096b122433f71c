"""Labs for the mount tests: three real daemons on loopback, each with etcd and a FUSE mount.

- `lab` lives for the whole run and stays healthy; tests that kill or damage use `fault_lab`.
- `plain_lab` does not encrypt chunks on their way; it has two nodes, and stays healthy, too. A
  writer waits 2 s for another there. In the other labs it waits as long as in production, so that
  nodes which take turns are not told EBUSY when one of them is late on a busy machine.
- `dirs` is a fresh directory, seen through the three mounts; it is removed afterwards.
- What these tests need must be there: a machine without FUSE is an error, not a skip.
- A WARNING or worse in a daemon's log fails the test that used `dirs`, unless the test expects it
  with `@pytest.mark.expected_logs("regular expression", ...)`.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import pytest

from modelfsd.lab.cluster import Lab
from tests.daemon_logs import watched
from tests.mount.mount_parts import BIG_BYTES, Dirs, make_whole

NODES = 3
LOG_LINES = 60  # of each daemon, with the report of a failed test
LOCK_WAIT_SECONDS = 2  # in `plain_lab`
SHORT_LOCK_WAIT = f'lock_wait = "{LOCK_WAIT_SECONDS}s"\n'
_numbers = itertools.count(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail where the tests of this directory cannot run."""
    missing = [name for name in ("etcd", "setpriv", "fusermount3") if shutil.which(name) is None]
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        missing.append("/dev/fuse")
    if os.geteuid() != 0:
        missing.append("root")
    if missing:
        pytest.fail(f"the mount tests need {', '.join(missing)}", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a failed test what the daemons of its lab said last."""
    report = yield
    values = getattr(item, "funcargs", {}).values()
    for lab in (value for value in values if report.failed and isinstance(value, Lab)):
        for node in lab.nodes:
            if node.log_path.exists():
                said = node.log_path.read_text(errors="replace").splitlines()
                report.sections.append((f"log of {node.name}", "\n".join(said[-LOG_LINES:])))
    return report


def _start_lab(
    test_root: Path,
    name: str,
    nodes: int = NODES,
    arguments: Sequence[str] = (),
    settings: str = "",
) -> Lab:
    root = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=test_root))
    os.chmod(test_root, 0o755)  # tests run children as another user
    os.chmod(root, 0o755)
    return Lab.up(root, nodes, settings=settings, arguments=arguments)


@pytest.fixture(scope="session")
def lab(test_root: Path) -> Iterator[Lab]:
    """A lab that every test leaves healthy."""
    with _start_lab(test_root, "mount") as lab:
        yield lab


@pytest.fixture(scope="session")
def plain_lab(test_root: Path) -> Iterator[Lab]:
    """A lab whose founder said `--data-tls off`, and whose writers wait for 2 s only."""
    with _start_lab(test_root, "plain", 2, ["--data-tls", "off"], SHORT_LOCK_WAIT) as lab:
        yield lab


@pytest.fixture(scope="module")
def fault_lab(test_root: Path) -> Iterator[Lab]:
    """A lab to kill, pause and damage nodes of."""
    with _start_lab(test_root, "fault") as lab:
        yield lab


@pytest.fixture
def dirs(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Dirs]:
    """A fresh directory through n1, n2 and n3."""
    with watched(lab, request):
        yield from _fresh_directory(lab)


@pytest.fixture
def fault_dirs(fault_lab: Lab) -> Iterator[Dirs]:
    """A fresh directory in the lab for faults, which is whole before and after the test."""
    make_whole(fault_lab)
    try:
        yield from _fresh_directory(fault_lab, remove=False)
    finally:
        make_whole(fault_lab)


def _fresh_directory(lab: Lab, remove: bool = True) -> Iterator[Dirs]:
    name = f"test-{next(_numbers)}"
    first, second, third = (node.mount / name for node in lab.nodes)
    first.mkdir()
    yield first, second, third
    if remove:
        shutil.rmtree(first)


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A file of random bytes outside the cluster, to compare with."""
    path = tmp_path / "big"
    path.write_bytes(os.urandom(BIG_BYTES))
    return path
