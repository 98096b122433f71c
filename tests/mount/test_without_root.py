"""A node whose user is not root: founded, written, read and stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from modelfsd.lab import processes as lab_processes
from tests import needs
from tests.loopback import new_address

pytestmark = pytest.mark.fuse

USER = 65534
ROOT = Path(__file__).parents[2]
# Where /dev/fuse is root's alone, unlike on most systems, this mount namespace gets another one.
# The user may read everything: the interpreter may lie where only root may look.
SCRIPT = """
set -e
mount --make-rprivate /
mknod -m 666 "$1/fuse" c 10 229
mount --bind "$1/fuse" /dev/fuse
cd "$1/home"
exec setpriv --reuid "$2" --regid "$2" --clear-groups --inh-caps=-all,+dac_read_search \\
    --ambient-caps=-all,+dac_read_search "$3" -P -c "$4" "$5"
"""
USE = """
import json, os, subprocess, sys
modelfs = [sys.executable, "-P", "-m", "modelfsd"]
def run(*words):
    return subprocess.run([*modelfs, *words], stdout=subprocess.PIPE, text=True, check=True).stdout
os.mkdir("mnt")
run("mount", "mnt", "--state-dir", "state", "--new-cluster", "alone", "--listen", sys.argv[1])
contents = os.urandom(5 << 20)
with open("mnt/file", "wb") as file:
    file.write(contents)
with open("mnt/file", "rb") as file:
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    is_same = file.read() == contents
owners = [os.stat(path).st_uid for path in ("mnt", "mnt/file")]
warnings = json.loads(run("status", "--json"))["warnings"]
run("umount", "mnt")
print(json.dumps([is_same, owners, warnings, os.path.ismount("mnt")]))
"""


def test_a_node_runs_as_a_user_who_is_not_root(test_root: Path) -> None:
    os.chmod(test_root, 0o755)
    root = Path(tempfile.mkdtemp(prefix="user-", dir=test_root))
    os.chmod(root, 0o755)
    home = root / "home"
    home.mkdir()
    os.chown(home, USER, USER)
    mark = f"{root}/node"
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/daemon", lab_processes.MARK: mark,
        "MODELFS_RUN_DIR": str(home / "run"), "HOME": str(home),
    }  # fmt: skip
    shell = [needs.program("unshare"), "-m", "sh", "-c", SCRIPT, "sh"]
    try:
        done = subprocess.run(
            [*shell, str(root), str(USER), sys.executable, USE, f"{new_address()}:7620"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    finally:
        lab_processes.kill([mark], 10.0)
    log = home / "state" / "modelfs.log"
    said = log.read_text(errors="replace") if log.exists() else ""
    assert done.returncode == 0, f"{done.stderr}\n{said}"
    is_same, owners, warnings, is_mounted = json.loads(done.stdout.splitlines()[-1])
    assert is_same
    assert owners == [USER, USER]
    assert any("kernel settings could not be raised" in warning for warning in warnings)
    assert not is_mounted
    assert " ERROR " not in said and " WARNING " not in said, said
