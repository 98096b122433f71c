"""What all tests share.

- An `async def` test runs under trio, with a deadline; if it asks for a fixture that is a clock
  (`autojump_clock`), under that clock.
- A quiet log: a WARNING or worse from our loggers fails the test, unless the test says that it
  expects it with `@pytest.mark.expected_logs("regular expression", ...)`.
- Chance has a seed: `rng` depends on the test's name and on MODELFS_TEST_SEED only.
- What tests start, mount and write lies under one directory, MODELFS_TEST_ROOT, which is in the
  environment of every process that they start; `./run test` makes it and sweeps it.
- On a CI machine (CI=true) what a test needs must be there; elsewhere the test is skipped.
"""

from __future__ import annotations

import inspect
import logging
import os
import random
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
import pytest
import trio
import trio.testing

from tests import needs

ROOT_VARIABLE = "MODELFS_TEST_ROOT"
SEED_VARIABLE = "MODELFS_TEST_SEED"
HANG_SECONDS = 300.0  # a guard against hangs, not a measure of speed
LONG_BYTES = 4096
OURS = ("modelfs", "modelfsd")

hypothesis.settings.register_profile("modelfs", deadline=None, derandomize=True, database=None)
# `./run fuzz`: other examples each time, and many; what fails is kept and tried again.
FUZZ_EXAMPLES = int(os.environ.get("MODELFS_FUZZ_EXAMPLES", "0"))
if FUZZ_EXAMPLES:
    hypothesis.settings.register_profile("fuzz", deadline=None, max_examples=FUZZ_EXAMPLES)
hypothesis.settings.load_profile("fuzz" if FUZZ_EXAMPLES else "modelfs")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--frameworks`: see tests/frameworks/conftest.py."""
    parser.addoption(
        "--frameworks", action="store_true", help="also run what needs PyTorch and its like"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Choose the one directory, before pytest chooses where `tmp_path` is."""
    config.addinivalue_line("markers", "expected_logs(*patterns): warnings that belong to the test")
    root = os.environ.get(ROOT_VARIABLE)
    if not root:
        root = tempfile.mkdtemp(prefix="modelfs-test.")
        os.environ[ROOT_VARIABLE] = root
        # `./run test` sweeps this directory if this process is killed.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        Path(root, "owner").write_text(f"{os.getpid()} {fields[19]}\n")
        config.add_cleanup(partial(_remove, Path(root)))
    os.environ["MODELFS_RUN_DIR"] = f"{root}/run-{os.getpid()}"  # another may run beside this
    for name in [name for name in os.environ if name.startswith("MODELFS_")]:
        if name not in (ROOT_VARIABLE, SEED_VARIABLE, "MODELFS_RUN_DIR"):
            del os.environ[name]  # the settings of whoever runs the tests
    # As Ctrl-C does: fixtures are taken down. `timeout`, CI and `./run test` send this one.
    signal.signal(signal.SIGTERM, _interrupt)
    # A shell's background job ignores SIGINT, and so would the programs that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.option.basetemp is None:
        config.option.basetemp = f"{root}/tmp"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _remove(root: Path) -> None:
    """Remove our own directory, unless something is still mounted in it."""
    if f" {root}/" not in Path("/proc/self/mountinfo").read_text(errors="replace"):
        shutil.rmtree(root, ignore_errors=True)


def pytest_report_header() -> str:
    """Say how to repeat this run."""
    return f"{SEED_VARIABLE}={_seed()} {ROOT_VARIABLE}={os.environ[ROOT_VARIABLE]}"


# ---------------------------------------------------------------- async tests


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine function under trio."""
    test = inspect.unwrap(pyfuncitem.obj)
    inner = getattr(getattr(test, "hypothesis", None), "inner_test", None)
    if inner is not None and inspect.iscoroutinefunction(inner):
        pyfuncitem.obj.hypothesis.inner_test = _synchronous(inner)
        return None
    if not inspect.iscoroutinefunction(test):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    _synchronous(pyfuncitem.obj)(**{name: pyfuncitem.funcargs[name] for name in names})
    return True


def _synchronous(test: Callable[..., Any]) -> Callable[..., None]:
    def run(*args: object, **kwargs: object) -> None:
        clocks = [value for value in kwargs.values() if isinstance(value, trio.abc.Clock)]

        async def guarded() -> None:
            # On a virtual clock hours are free, and a hang shows as a jump to the end of time.
            with trio.fail_after(HANG_SECONDS if not clocks else 1e9):
                await test(*args, **kwargs)

        trio.run(guarded, clock=clocks[0] if clocks else None)

    return run


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    """Virtual time: it jumps whenever all tasks wait for it."""
    return trio.testing.MockClock(autojump_threshold=0)


@pytest.fixture
def inline_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work of worker threads is done on trio's own thread.

    So that nothing is under way when all *tasks* wait: for `wait_all_tasks_blocked`, and for a
    clock that is moved then.
    """

    async def run_inline(
        function: Callable[..., object], *args: object, **options: object
    ) -> object:
        await trio.lowlevel.checkpoint()
        return function(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_inline)


@pytest.fixture
def virtual_time(
    autojump_clock: trio.testing.MockClock, inline_threads: None
) -> trio.testing.MockClock:
    """Virtual time for code that uses worker threads."""
    return autojump_clock


# ---------------------------------------------------------------- failures


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Say where two long runs of bytes differ; pytest's own comparison takes minutes for MiBs."""
    if not (isinstance(left, bytes | bytearray) and isinstance(right, bytes | bytearray)):
        return None
    if op != "==" or max(len(left), len(right)) < LONG_BYTES:
        return None
    common = min(len(left), len(right))
    where = next((at for at in range(common) if left[at] != right[at]), common)
    theirs, ours = bytes(left[where : where + 32]), bytes(right[where : where + 32])
    differing = sum(a != b for a, b in zip(left, right, strict=False))
    return [
        f"{len(left)} bytes == {len(right)} bytes",
        f"{differing} bytes differ, from byte {where} on: {theirs!r} and {ours!r}",
    ]


# ---------------------------------------------------------------- the quiet log


class _Collector(logging.Handler):
    """Keeps the warnings of our own loggers."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.split(".")[0] in OURS:
            text = f"{record.levelname} {record.name}: {record.getMessage()}"
            if record.exc_info and record.exc_info[1] is not None:
                text += f" [{record.exc_info[1]!r}]"
            self.lines.append(text)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that passed and warned."""
    patterns = [text for mark in item.iter_markers("expected_logs") for text in mark.args]
    collector = _Collector()
    logging.getLogger().addHandler(collector)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(collector)
    surprises = [
        line for line in collector.lines if not any(re.search(text, line) for text in patterns)
    ]
    if surprises:
        pytest.fail("unexpected in the log:\n" + "\n".join(surprises), pytrace=False)


# ---------------------------------------------------------------- fixtures


def _seed() -> int:
    return int(os.environ.get(SEED_VARIABLE, "0"))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Chance that repeats itself."""
    return random.Random(f"{_seed()} {request.node.nodeid}")


@pytest.fixture(scope="session")
def test_root() -> Path:
    """The directory for everything that outlives a test when it is killed: labs, mounts."""
    return Path(os.environ[ROOT_VARIABLE])


@pytest.fixture
def lab_root(test_root: Path) -> Path:
    """A short new directory for one lab; whatever is still there is swept after the run."""
    return Path(tempfile.mkdtemp(prefix="lab-", dir=test_root))


# ---------------------------------------------------------------- what the machine must have


def _why_no_etcd() -> str | None:
    absent = [name for name in ("etcd", "setpriv") if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def _why_no_fuse() -> str | None:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse is missing, or not ours to open"
    if shutil.which("fusermount3") is None:
        return "fusermount3 is not installed"
    return None if os.geteuid() == 0 else "not root"


_NEEDS = {"etcd": _why_no_etcd, "fuse": _why_no_fuse}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here, but never in CI."""
    for mark, why_not in _NEEDS.items():
        if item.get_closest_marker(mark) is None:
            continue
        reason = why_not()
        if reason:
            needs.missing(f"needs {mark}: {reason}")
