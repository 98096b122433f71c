"""mount(8) and umount(8) on a modelfs, as /etc/fstab would call them.

mount(8) finds its helpers in /sbin alone. So this runs in a mount namespace of its own, where
/sbin has ours besides; nothing outside of it changes, and what is mounted in it goes with it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from modelfsd.lab import processes as lab_processes
from tests.loopback import new_address
from tests.needs import missing

ROOT = Path(__file__).parents[2]

SCRIPT = """
set -eu
root=$1
sbin=$(readlink -f /sbin)
mkdir "$root/real" "$root/sbin" "$root/mnt"
mount --bind "$sbin" "$root/real"
for file in "$root"/real/*; do ln -s "$file" "$root/sbin/"; done
cp "$root/helper" "$root/sbin/mount.fuse.modelfs"
mount --bind "$root/sbin" "$sbin"

mount -t fuse.modelfs modelfs "$root/mnt" -o "rw,nosuid,_netdev,x-test,$2"
grep " $root/mnt fuse.modelfs " /proc/mounts
echo hello > "$root/mnt/file"
dd if=/dev/urandom of="$root/mnt/big" bs=1M count=20 status=none
sha256sum < "$root/mnt/big"
umount "$root/mnt"
if grep " $root/mnt " /proc/mounts; then exit 9; fi

# Again, from a table, at once: the node that is still stopping is no obstacle.
echo "modelfs $root/mnt fuse.modelfs noauto,$2 0 0" > "$root/fstab"
for attempt in $(seq 500); do
    if mount -T "$root/fstab" "$root/mnt" 2> "$root/error"; then break; fi
    grep -q "is in use by process\\|is mounted already" "$root/error"
    sleep 0.2
done
cat "$root/mnt/file"
sha256sum < "$root/mnt/big"
mount -a -T "$root/fstab"
"$3" -P -m modelfsd umount "$root/mnt"
if mount -t fuse.modelfs modelfs "$root/mnt" -o bad=1 2> "$root/error"; then exit 9; fi
cat "$root/error"
"""


def test_mount_and_umount_as_from_fstab(test_root: Path) -> None:
    root = Path(tempfile.mkdtemp(prefix="fstab-", dir=test_root))
    helper = root / "helper"
    path = f"{ROOT}:{ROOT}/daemon"
    helper.write_text(
        f"#!/bin/sh\nexport PYTHONPATH={shlex.quote(path)}\n"
        f'exec {shlex.quote(sys.executable)} -P -m modelfsd.commands.mount_helper "$@"\n'
    )
    helper.chmod(0o755)
    options = f"state_dir={root}/state,new_cluster=fstab,listen={new_address()}:7620,replicas=1"
    mark = f"{root}/node"
    environment = {**os.environ, "PYTHONPATH": path, lab_processes.MARK: mark}
    command = ["unshare", "-m", "sh", "-c", SCRIPT, "sh", str(root), options, sys.executable]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, cwd="/"
        )
    finally:
        lab_processes.kill([mark], 10.0)
    if done.returncode and "unshare" in done.stderr:
        missing(f"no mount namespaces here: {done.stderr.strip()}")
    log = root / "state" / "modelfs.log"
    said = log.read_text(errors="replace") if log.exists() else ""
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{said}"
    table, first_sum, hello, second_sum, _, error = done.stdout.splitlines()
    assert "nosuid" in table
    assert hello == "hello" and first_sum == second_sum
    assert "mount option 'bad=1' is unknown" in error
    assert " ERROR " not in said and " WARNING " not in said, said
