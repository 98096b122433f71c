"""The architecture, checked: who imports whom, how long things may grow, what must be named.

The layers of the library are read from the docstring of `modelfs/__init__.py`, which is what
people read too: a module that is not in that list fails here.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import modelfs
import modelfsd
from modelfs import errors

ROOT = Path(__file__).parent.parent
CORE = sorted(ROOT.glob("modelfs/*.py"))
DAEMON = sorted(path for path in ROOT.glob("daemon/modelfsd/**/*.py") if "_pb2" not in path.name)
TESTING = sorted(ROOT.glob("modelfs/testing/**/*.py"))
TESTS = sorted(ROOT.glob("tests/**/*.py"))

LINES_MAX = 400
FUNCTION_LINES_MAX = 70
LAYERS = ["ground", "values", "decisions", "machines", "seams"]
FORBIDDEN_IN_CORE = {
    *("modelfsd", "trio", "pyfuse3", "hpack", "zeroconf", "typer", "rich"),
    *("socket", "time", "random", "subprocess", "threading", "asyncio", "secrets", "tempfile"),
}
# What a plan is made of. A plan is a value; carrying it out is the drivers' work.
PLAN_VALUES = {"Compare", "Delete", "Event", "KeyValue", "Put", "Target", "Txn", "WatchBatch"}
ONLY_THEY_IMPORT = {  # package -> the modules of modelfsd that may
    "pyfuse3": r"kernel/(operations.*|mount|kernel_inodes|notifier|pusher|errnos)",
    "hpack": r"etcd/http2",
    "google": r"etcd/.*",
    "zeroconf": r"cluster/discovery",
    "modelfsd.node": r"cli|commands/launch",
    "modelfs.testing": r"(?!)",
}


def imported(path: Path) -> Iterator[str]:
    """The dotted name of every module, and of every name in one, that this file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layers_in_docstring() -> dict[str, int]:
    """module -> rank, from the bullets `- values: `chunk` and `stripe` ...`."""
    ranks = {}
    for bullet in (modelfs.__doc__ or "").split("\n\n")[2].removeprefix("- ").split("\n- "):
        label, _, text = bullet.partition(":")
        for name in re.findall(r"`(\w+)`", text):
            ranks[name] = LAYERS.index(label)
    return ranks


RANK = layers_in_docstring()


def test_every_core_module_has_its_place_in_the_map() -> None:
    here = {path.stem for path in CORE if path.stem != "__init__"} | {"testing"}
    assert here == set(RANK), "the docstring of modelfs/__init__.py does not list what is there"


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_the_core_is_pure_and_layered(path: Path) -> None:
    names = [name.split(".") for name in imported(path)]
    assert FORBIDDEN_IN_CORE.isdisjoint(name[0] for name in names)
    ours = [name for name in names if name[0] == "modelfs" and len(name) > 1]
    if path.stem == "__init__":
        assert not ours
        return
    for _, module, *what in ours:
        if module == "ports":
            assert path.stem == "ports" or LAYERS[RANK[path.stem]] == "decisions"
            assert set(what) <= PLAN_VALUES, f"{path.stem} wants to act: {what}"
        elif path.stem == "ports":
            assert LAYERS[RANK[module]] in ("ground", "values")
        else:
            assert module != "testing"
            assert RANK[module] <= RANK[path.stem], f"{path.stem} imports {module}"


@pytest.mark.parametrize("path", DAEMON, ids=lambda path: path.stem)
def test_each_outside_thing_has_one_door(path: Path) -> None:
    here = str(path.relative_to(ROOT / "daemon/modelfsd").with_suffix(""))
    for name in imported(path):
        for package, modules in ONLY_THEY_IMPORT.items():
            if name == package or name.startswith(package + "."):
                assert re.fullmatch(modules, here), f"{here} imports {name}"


def test_the_map_of_the_node_process_has_every_package() -> None:
    here = {path.parent.name for path in DAEMON} - {"modelfsd"}
    assert here == set(re.findall(r"^- `(\w+)`: ", modelfsd.__doc__ or "", re.MULTILINE))


@pytest.mark.parametrize("path", [*CORE, *TESTING, *DAEMON, *TESTS], ids=lambda path: path.stem)
def test_nothing_outgrows_a_reader(path: Path) -> None:
    source = path.read_text()
    tree = ast.parse(source)
    assert source.count("\n") <= LINES_MAX
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno
            assert length < FUNCTION_LINES_MAX, f"{path}:{node.lineno}: {node.name}"
    assert ast.get_docstring(tree), f"{path} does not say what it is for"


@pytest.mark.parametrize("path", [*CORE, *DAEMON], ids=lambda path: path.stem)
def test_no_module_is_called_like_one_of_the_standard_library(path: Path) -> None:
    names = sys.stdlib_module_names - {"chunk"}  # left in 3.13; nobody imports it beside ours
    assert path.stem.startswith("__") or path.stem not in names


def test_source_roots_are_not_packages() -> None:
    """An installed package that is called daemon, tests or systemd must win over our folder."""
    for folder in ("daemon", "tests", "systemd"):
        assert not list(ROOT.glob(f"{folder}/__init__.py"))
    assert not list(ROOT.glob("tests/**/__init__.py"))


def concrete_errors() -> list[type[errors.ModelfsError]]:
    """The leaves of the tree: what is really raised."""
    classes = [
        value
        for _, value in inspect.getmembers(errors, inspect.isclass)
        if issubclass(value, errors.ModelfsError)
    ]
    return [one for one in classes if not any(other.__base__ is one for other in classes)]


@pytest.mark.parametrize("error", concrete_errors(), ids=lambda error: error.__name__)
def test_every_error_has_an_errno(error: type[errors.ModelfsError]) -> None:
    from modelfsd.kernel.errnos import ERRNO

    assert isinstance(ERRNO[error], int)


@pytest.mark.parametrize("error", concrete_errors(), ids=lambda error: error.__name__)
def test_every_error_is_in_the_drawing(error: type[errors.ModelfsError]) -> None:
    assert re.search(rf"\b{error.__name__}\b", errors.__doc__ or "")


@pytest.mark.parametrize("command", ["./run demo", "./run test"])
def test_the_readme_names_the_two_commands(command: str) -> None:
    assert command in (ROOT / "README.md").read_text()
