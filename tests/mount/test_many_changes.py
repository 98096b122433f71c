"""Six processes on three mounts fight over one small namespace; what is left must be one tree.

Unlike the histories of `test_state_machine`, no answer can be foretold here. What must hold: every
errno is one that POSIX has for a lost race; the three mounts show one tree; every inode in etcd has
a name, which `modelfs status` counts; and no directory is below itself, since a walk from the top
finds as many as there are.

EIO goes to the slower of two nodes that append to one empty file at the same time: an empty file is
opened without a lease. So it does to who has waited for its turn as long as `lock_wait`.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from modelfsd.lab.cluster import Lab
from modelfsd.lab.state import LabNode
from tests.mount.mount_parts import (
    CHILD_SECONDS,
    Dirs,
    ask,
    finish_child,
    start_child,
    tree_of,
    wait_until,
)

pytestmark = pytest.mark.fuse

SECONDS = 4.0
WORKERS_PER_MOUNT = 2

FIGHT = """
import random, shutil
from collections import Counter
chance = random.Random(seed)
allowed = {errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR,
           errno.EINVAL, errno.EBUSY}
answers = Counter()

def path():
    parts = [chance.choice("abc") for _ in range(chance.randint(1, 3))]
    if not moves:  # a directory must never be another's name: files have names of their own
        parts[-1] = chance.choice("abcxyz")
    return "/".join([root, *parts])

def rename():
    old, new = path(), path()
    if not moves:
        if old[-1] in "abc":  # a directory: within its parent
            new = old[:-1] + chance.choice("abc")
        else:
            new = new[:-1] + chance.choice("xyz")
    os.rename(old, new)

def mkdir():
    name = path()
    os.mkdir(name if moves else name[:-1] + chance.choice("abc"))

def file_path():
    name = path()
    return name if moves else name[:-1] + chance.choice("xyz")

def put(flags):
    descriptor = os.open(file_path(), flags | os.O_CREAT | os.O_WRONLY, 0o644)
    try:
        os.write(descriptor, b"%d" % seed * chance.choice((1, 3000)))
    finally:
        os.close(descriptor)

def read():
    with open(path(), "rb") as file:
        file.read()

def link():
    source = path()
    if not os.path.isdir(source):  # EPERM
        os.link(source, file_path())

operations = {
    "rename": rename,
    "mkdir": mkdir,
    "rmdir": lambda: os.rmdir(path()),
    "unlink": lambda: os.unlink(path()),
    "create": lambda: put(os.O_EXCL),
    "replace": lambda: put(os.O_TRUNC),
    "append": lambda: put(os.O_APPEND),
    "truncate": lambda: os.truncate(path(), chance.choice((0, 1, 5000))),
    "link": link,
    "read": read,
    "list": lambda: os.listdir(path()),
    "stat": lambda: os.stat(path()),
    "chmod": lambda: os.chmod(path(), chance.choice((0o755, 0o700))),
}
names = list(operations)
weights = [4 if name in ("rename", "mkdir") else 1 for name in names]
wanted = {"rename", "mkdir", "rmdir", "unlink", "create", "link", "replace", "truncate"}
end = time.monotonic() + seconds
# On a machine that is busy with other things, until each has gone well once.
while time.monotonic() < end or (wanted and time.monotonic() < end + 15 * seconds):
    name = chance.choices(names, weights)[0]
    try:
        operations[name]()
        wanted.discard(name)
        answers[f"{name} 0"] += 1
    except OSError as error:
        is_wrong = error.errno not in allowed
        # A directory may have been put there since `isdir` said that there is none.
        is_wrong = is_wrong and (name, error.errno) != ("link", errno.EPERM)
        may_fail = name in ("append", "replace")  # see above
        is_wrong = is_wrong and not (may_fail and error.errno == errno.EIO)
        answers[f"{'WRONG ' * is_wrong}{name} {errno.errorcode[error.errno]}"] += 1
print(json.dumps(answers))
"""


def walked(top: Path) -> tuple[int, int]:
    """How many files (each once, however many names it has) and directories are below."""
    directories, files = 0, set()
    for directory, names, others in os.walk(top):
        directories += 1
        for name in (*names, *others):
            status = os.lstat(Path(directory, name))
            if name not in names or Path(directory, name).is_symlink():
                files.add(status.st_ino)
    return len(files), directories


def counted(node: LabNode) -> tuple[int, int]:
    """How many files and directories a node's replica of the namespace has."""
    status = ask(node, "status")
    return status["files"], status["directories"]


def _is_whole(node: LabNode) -> bool:
    return walked(node.mount) == counted(node)


@pytest.mark.expected_logs(
    "another node wrote it first",
    "another node went on writing it",
)
@pytest.mark.parametrize("moves", [False, True], ids=["directories-stay", "directories-move"])
def test_a_fight_for_names_leaves_one_tree_without_orphans(
    lab: Lab, dirs: Dirs, moves: bool
) -> None:
    children = [
        start_child(FIGHT, root=directory, seed=number, seconds=SECONDS, moves=moves)
        for number, directory in enumerate(dirs * WORKERS_PER_MOUNT)
    ]
    answers: Counter[str] = Counter()
    for child in children:
        result = finish_child(child, CHILD_SECONDS + 16 * SECONDS)  # it may go on for that long
        assert result.errno == 0, result.text
        answers += Counter(result.value)
    assert not [answer for answer in answers if answer.startswith("WRONG")], dict(answers)
    for name in ("rename", "mkdir", "rmdir", "unlink", "create", "link", "replace", "truncate"):
        assert answers[f"{name} 0"], f"no {name} went well: {answers}"
    wait_until(lambda: tree_of(dirs[0]) == tree_of(dirs[1]) == tree_of(dirs[2]), "one tree")
    for node in lab.nodes:
        wait_until(partial(_is_whole, node), "every inode to have a name")
