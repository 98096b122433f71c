"""Random operations on a small tree, each through a random one of three mounts, against a model.

The model is a POSIX tree in a few lines: paths to nodes, of which several paths may lead to one
file. What an operation answers, also its errno, must be what the model says, whichever mount was
used before (G2, G4). hypothesis chooses the operations, always the same ones, and shrinks a
failure to a short list of steps.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.mount.mount_parts import MIB, Dirs

pytestmark = pytest.mark.fuse

EXAMPLES, STEPS = 25, 40
NAMES = ("a", "b", "c")
PATHS = [f"{one}" for one in NAMES] + [f"{one}/{two}" for one in NAMES for two in NAMES]
PATHS += [f"a/b/{name}" for name in NAMES]
SIZES = (0, 1, 100, 4095, 4096, 5000, 70_000, 4 * MIB + 1)  # in the record, pages, chunks

paths = st.sampled_from(PATHS)
mounts = st.integers(0, 2)
sizes = st.sampled_from(SIZES)
letters = st.binary(min_size=1, max_size=1)
dangling = st.sampled_from(["nowhere", "no/where", "x" * 200])


@dataclass(eq=False)
class Node:
    """A file, a symlink or a directory of the model. Compared by identity, as inodes are."""

    kind: int
    data: bytes = b""  # of a symlink its target


class Refused(Exception):
    """The operation must fail with this errno."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode[number])
        self.number = number


class Model:
    """A POSIX tree. Symlinks lead nowhere."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}

    def children(self, path: str) -> set[str]:
        """The names in a directory."""
        return {
            PurePosixPath(other).name
            for other in self.nodes
            if str(PurePosixPath(other).parent) == (path or ".")
        }

    def parents_of(self, path: str) -> None:
        """Fails unless every component but the last is a directory."""
        for parent in reversed(PurePosixPath(path).parents):
            if str(parent) != ".":
                node = self.get(str(parent))
                if node.kind == stat.S_IFLNK:
                    raise Refused(errno.ENOENT)
                if node.kind != stat.S_IFDIR:
                    raise Refused(errno.ENOTDIR)

    def get(self, path: str) -> Node:
        """What is at a path. Fails if nothing is."""
        self.parents_of(path)
        if path not in self.nodes:
            raise Refused(errno.ENOENT)
        return self.nodes[path]

    def add(self, path: str, node: Node) -> None:
        """Put something where nothing is."""
        self.parents_of(path)
        if path in self.nodes:
            raise Refused(errno.EEXIST)
        self.nodes[path] = node

    def link_count(self, node: Node) -> int:
        """st_nlink."""
        if node.kind == stat.S_IFDIR:
            path = next(path for path, other in self.nodes.items() if other is node)
            below = [self.nodes[f"{path}/{name}"] for name in self.children(path)]
            return 2 + sum(child.kind == stat.S_IFDIR for child in below)
        return sum(other is node for other in self.nodes.values())

    def regular(self, path: str) -> Node:
        """The file at a path, to be written."""
        node = self.get(path)
        if node.kind == stat.S_IFDIR:
            raise Refused(errno.EISDIR)
        if node.kind == stat.S_IFLNK:  # opened with O_NOFOLLOW
            raise Refused(errno.ELOOP)
        return node

    def remove(self, path: str, directory: bool) -> None:
        """unlink and rmdir."""
        is_directory = self.get(path).kind == stat.S_IFDIR
        if is_directory != directory:
            raise Refused(errno.ENOTDIR if directory else errno.EISDIR)
        if directory and self.children(path):
            raise Refused(errno.ENOTEMPTY)
        del self.nodes[path]

    def rename(self, old: str, new: str) -> None:
        """rename(2). The order of its checks is Linux's."""
        self.parents_of(old)
        self.parents_of(new)
        source = self.get(old)
        if new.startswith(f"{old}/"):
            raise Refused(errno.EINVAL)
        if old.startswith(f"{new}/"):
            raise Refused(errno.ENOTEMPTY)
        target = self.nodes.get(new)
        if target is source:
            return
        if target is not None:
            if source.kind == stat.S_IFDIR and target.kind != stat.S_IFDIR:
                raise Refused(errno.ENOTDIR)
            if source.kind != stat.S_IFDIR and target.kind == stat.S_IFDIR:
                raise Refused(errno.EISDIR)
            if target.kind == stat.S_IFDIR and self.children(new):
                raise Refused(errno.ENOTEMPTY)
        moved = {path: node for path, node in self.nodes.items() if path.startswith(f"{old}/")}
        for path in (old, *moved):
            del self.nodes[path]
        self.nodes[new] = source
        self.nodes |= {new + path.removeprefix(old): node for path, node in moved.items()}


def describe(status: os.stat_result) -> tuple[int, int, int]:
    """What is compared of a stat."""
    kind = stat.S_IFMT(status.st_mode)
    return kind, status.st_nlink, status.st_size if kind != stat.S_IFDIR else 0


def write(path: Path, flags: int, data: bytes) -> None:
    """Open without following a symlink, write, close."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | flags)
    try:
        written = 0
        while written < len(data):
            written += os.write(descriptor, data[written:])
    finally:
        os.close(descriptor)


def read(path: Path) -> bytes:
    """The contents of a file, without following a symlink."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return file.read()


class Tree(RuleBasedStateMachine):
    """One example: an empty directory, and what is done in it."""

    mounted: Dirs
    numbers = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        name = f"{next(self.numbers)}"
        self.roots = [directory / name for directory in self.mounted]
        self.roots[0].mkdir()
        self.model = Model()

    def both(self, expected: Callable[[], Any], real: Callable[[], Any]) -> None:
        """Do it to the model and to the file system, and compare what they answer."""
        wanted: object
        found: object
        try:
            wanted = expected()
        except Refused as refusal:
            wanted = refusal
        try:
            found = real()
        except OSError as error:
            if not isinstance(wanted, Refused) or error.errno != wanted.number:
                name = errno.errorcode.get(error.errno or 0)
                raise AssertionError(f"{name}, expected {wanted!r:.60}") from error
            return
        assert not isinstance(wanted, Refused), f"it went well, expected {wanted}"
        assert found == wanted

    @rule(mount=mounts, path=paths, size=sizes, letter=letters, exclusive=st.booleans())
    def put(self, mount: int, path: str, size: int, letter: bytes, exclusive: bool) -> None:
        """Create a file, or replace all of its contents."""
        data = letter * size

        def expected() -> None:
            self.model.parents_of(path)
            if path not in self.model.nodes:
                self.model.add(path, Node(stat.S_IFREG, data))
            elif exclusive:
                raise Refused(errno.EEXIST)
            else:
                self.model.regular(path).data = data

        flags = os.O_CREAT | os.O_TRUNC | (os.O_EXCL if exclusive else 0)
        self.both(expected, lambda: write(self.roots[mount] / path, flags, data))

    @rule(mount=mounts, path=paths, size=sizes, letter=letters)
    def append(self, mount: int, path: str, size: int, letter: bytes) -> None:
        def expected() -> None:
            self.model.regular(path).data += letter * size

        real = self.roots[mount] / path
        self.both(expected, lambda: write(real, os.O_APPEND, letter * size))

    @rule(mount=mounts, path=paths, size=sizes)
    def truncate(self, mount: int, path: str, size: int) -> None:
        def expected() -> None:
            node = self.model.regular(path)
            node.data = node.data[:size].ljust(size, b"\0")

        def real() -> None:
            descriptor = os.open(self.roots[mount] / path, os.O_WRONLY | os.O_NOFOLLOW)
            try:
                os.ftruncate(descriptor, size)
            finally:
                os.close(descriptor)

        def by_path() -> None:
            os.truncate(self.roots[mount] / path, size)

        node = self.model.nodes.get(path)
        is_link = node is not None and node.kind == stat.S_IFLNK
        self.both(expected, real if size % 2 or is_link else by_path)

    @rule(mount=mounts, old=paths, new=paths)
    def rename(self, mount: int, old: str, new: str) -> None:
        root = self.roots[mount]
        self.both(lambda: self.model.rename(old, new), lambda: os.rename(root / old, root / new))

    @rule(mount=mounts, old=paths, new=paths)
    def link(self, mount: int, old: str, new: str) -> None:
        def expected() -> None:
            node = self.model.get(old)
            self.model.parents_of(new)
            if new in self.model.nodes:
                raise Refused(errno.EEXIST)
            if node.kind == stat.S_IFDIR:
                raise Refused(errno.EPERM)
            self.model.nodes[new] = node

        root = self.roots[mount]
        real = root / new
        self.both(expected, lambda: os.link(root / old, real, follow_symlinks=False))

    @rule(mount=mounts, path=paths, words=dangling)
    def symlink(self, mount: int, path: str, words: str) -> None:
        node = Node(stat.S_IFLNK, words.encode())
        real = self.roots[mount] / path
        self.both(lambda: self.model.add(path, node), lambda: os.symlink(words, real))

    @rule(mount=mounts, path=paths)
    def mkdir(self, mount: int, path: str) -> None:
        real = self.roots[mount] / path
        self.both(lambda: self.model.add(path, Node(stat.S_IFDIR)), lambda: os.mkdir(real))

    @rule(mount=mounts, path=paths)
    def unlink(self, mount: int, path: str) -> None:
        real = self.roots[mount] / path
        self.both(lambda: self.model.remove(path, False), lambda: os.unlink(real))

    @rule(mount=mounts, path=paths)
    def rmdir(self, mount: int, path: str) -> None:
        real = self.roots[mount] / path
        self.both(lambda: self.model.remove(path, True), lambda: os.rmdir(real))

    @rule(mount=mounts, path=paths)
    def read(self, mount: int, path: str) -> None:
        real = self.roots[mount] / path
        self.both(lambda: self.model.regular(path).data, lambda: read(real))

    @rule(mount=mounts, path=paths)
    def list(self, mount: int, path: str) -> None:
        def expected() -> set[str]:
            if self.model.get(path).kind != stat.S_IFDIR:
                raise Refused(errno.ENOTDIR)
            return self.model.children(path)

        # listdir would follow a symlink.
        def real() -> set[str]:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            descriptor = os.open(self.roots[mount] / path, flags)
            try:
                return set(os.listdir(descriptor))
            finally:
                os.close(descriptor)

        self.both(expected, real)

    @rule(mount=mounts, path=paths)
    def lstat(self, mount: int, path: str) -> None:
        """After an open of the directory: a stat alone may lag by the time an event takes."""

        def expected() -> tuple[int, int, int]:
            node = self.model.get(path)
            return node.kind, self.model.link_count(node), len(node.data)

        os.listdir(self.roots[mount])
        real = self.roots[mount] / path
        self.both(expected, lambda: describe(real.lstat()))

    @invariant()
    def the_top_shows_the_same_names_everywhere(self) -> None:
        wanted = self.model.children("")
        assert [set(os.listdir(root)) for root in self.roots] == [wanted] * 3

    def teardown(self) -> None:
        """Compare the whole tree through every mount, then remove it."""
        try:
            wanted = {
                path: (node.kind, self.model.link_count(node), node.data)
                for path, node in self.model.nodes.items()
            }
            for root in self.roots:
                assert tree_below(root) == wanted
        finally:
            shutil.rmtree(self.roots[0])


def tree_below(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """path -> type, links, contents."""
    found = {}
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            path = Path(directory, name)
            contents = b""
            if path.is_symlink():
                contents = os.fsencode(os.readlink(path))
            elif path.is_file():
                contents = read(path)
            kind, links, _ = describe(path.lstat())
            found[str(path.relative_to(root))] = (kind, links, contents)
    return found


def test_three_mounts_answer_as_one_posix_tree(dirs: Dirs) -> None:
    machine = type("Machine", (Tree,), {"mounted": dirs})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            suppress_health_check=list(HealthCheck),
        ),
    )
