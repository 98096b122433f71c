"""Nodes in network namespaces of their own: found by zeroconf, cut off, and back again."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from modelfsd import mounts
from modelfsd.commands.control import call
from modelfsd.lab.cluster import Lab
from modelfsd.lab.net import LabNetwork
from modelfsd.lab.state import lab_tag
from modelfsd.trust import tokens
from tests.mount.mount_parts import CHILD_SECONDS, has_quorum, in_child, refused, run, wait_until

pytestmark = pytest.mark.fuse

CONTENTS = os.urandom(3 << 20)


@pytest.fixture(scope="module")
def net_lab(test_root: Path) -> Iterator[Lab]:
    """Three nodes on links of 500 Mbit/s."""
    root = Path(tempfile.mkdtemp(prefix="net-", dir=test_root))
    with Lab.up(root, 3, netns=True, link_mbit=500, settings='lock_wait = "3s"\n') as lab:
        yield lab


def test_a_new_machine_is_told_how_to_join_and_joins(net_lab: Lab, test_root: Path) -> None:
    """Without a token it is told what to type; with one it finds a member by zeroconf alone."""
    (net_lab.nodes[0].mount / "model").write_bytes(CONTENTS)
    pid = net_lab.nodes[2].pid
    with tempfile.TemporaryDirectory(prefix="zeroconf-", dir=test_root) as place:
        mount, state = Path(place) / "mnt", Path(place) / "state"
        mount.mkdir()
        enter = ["nsenter", f"--net=/proc/{pid}/ns/net", sys.executable, "-m", "modelfsd"]
        environment = {
            **os.environ,
            "MODELFS_RUN_DIR": f"{place}/run",
            "MODELFS_CONFIG": "/dev/null",
        }
        command = [*enter, "mount", str(mount), "--state-dir", str(state), "--name", "newcomer"]
        command += ["--listen", f"{net_lab.nodes[2].address}:7520"]

        def start(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [*command, *arguments],
                env=environment,
                timeout=CHILD_SECONDS,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )

        refusal = start()
        assert refusal.returncode == 2
        assert f"modelfs mount {mount} --join TOKEN" in refusal.stderr
        assert not (state / "pki").exists() and not (state / "etcd").exists()
        line = call(net_lab.nodes[1].control_path, "token", CHILD_SECONDS)["token"]
        stale = msgspec.structs.replace(tokens.parse_token(line), addresses=[("10.88.0.99", 7420)])
        (Path(place) / "token").write_text(tokens.format_token(stale))
        joined = start("--join", f"{place}/token")
        assert joined.returncode == 0, joined.stderr
        try:
            assert (mount / "model").read_bytes() == CONTENTS
            told = call(state / "control.sock", "status", CHILD_SECONDS)
            assert {node["name"] for node in told["nodes"]} == {"n1", "n2", "n3", "newcomer"}
            assert told["epoch"] == 4
        finally:
            subprocess.run(
                [*enter, "umount", str(mount)], check=True, env=environment, timeout=CHILD_SECONDS
            )
        secret = line.removeprefix(tokens.PREFIX)[-60:-10]
        said = (state / "modelfs.log").read_text() + joined.stderr
        assert secret not in said
    assert mounts.mount_at(mount) is None


def test_a_cut_node_neither_hangs_nor_commits_and_comes_back(net_lab: Lab) -> None:
    first, _, third = net_lab.nodes
    (first.mount / "shared").write_bytes(CONTENTS)
    writer = open(third.mount / "own", "wb")  # noqa: SIM115  # closed below, where it must fail
    writer.write(b"before the cut")
    writer.flush()
    os.fsync(writer.fileno())
    net_lab.cut("n3")
    try:
        writer.write(b"after the cut")
        # The majority goes on, and takes over the file once the cut node's lease has lapsed. (If
        # n3 led etcd, there is an election first, during which changes may be refused.)
        wait_until(lambda: is_writable(first.mount / "first"), "an election")
        (first.mount / "new").write_bytes(b"made without n3")
        wait_until(lambda: not holds_lease(first.control_path, "n3"), "n3 is declared dead")
        (first.mount / "own").write_bytes(b"taken over")
        made = in_child("open(path, 'wb').write(b'x')", path=third.mount / "mine")
        assert made.errno, "a node without a quorum took a change"
        with refused(errno.EIO):
            writer.close()
        found = in_child("open(path, 'rb').read()", path=third.mount / "new")
        assert found.errno == errno.ENOENT, "a node that is cut off serves what it knew last"
    finally:
        net_lab.heal("n3")
    net_lab.wait_for_mesh()
    wait_until(lambda: has_quorum(third), "n3 has found etcd again")
    assert (third.mount / "own").read_bytes() == b"taken over"
    assert (third.mount / "shared").read_bytes() == CONTENTS
    wait_until(lambda: is_writable(third.mount / "again"), "n3 takes writes again")
    lost = json.loads(
        run(
            sys.executable,
            "-m",
            "modelfsd",
            "recover",
            "--list",
            "--json",
            "--state-dir",
            third.state_dir,
        )
    )
    assert any(entry["path"] == "/own" for entry in lost["lost"])


def holds_lease(control: Path, name: str) -> bool:
    """Whether a node still counts as up."""
    nodes = call(control, "status", CHILD_SECONDS)["nodes"]
    return any(node["name"] == name and node["up"] for node in nodes)


def is_writable(path: Path) -> bool:
    """Whether a file can be written now."""
    try:
        path.write_bytes(b"here")
    except OSError:
        return False
    return path.read_bytes() == b"here"


def test_machines_that_start_at_once_found_one_cluster(test_root: Path) -> None:
    """With real multicast: one founds, the others say how to join it, and leave nothing behind."""
    root = Path(tempfile.mkdtemp(prefix="race-", dir=test_root))
    network = LabNetwork(lab_tag(root), 3)
    network.up()
    mounts_at = [root / f"n{index}" / "mnt" for index in (1, 2, 3)]
    environment = {**os.environ, "MODELFS_RUN_DIR": f"{root}/run", "MODELFS_CONFIG": "/dev/null"}
    python = [sys.executable, "-m", "modelfsd"]
    try:
        started = []
        for index, mount in enumerate(mounts_at, 1):
            mount.mkdir(parents=True)
            command = [*python, "mount", str(mount), "--state-dir", str(mount.parent / "state")]
            command += ["--name", f"n{index}", "--listen", network.address(index)]
            started.append(
                subprocess.Popen(
                    network.enter(index, command),
                    env=environment,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        words = [child.communicate(timeout=CHILD_SECONDS)[1] for child in started]
        codes = [child.returncode for child in started]
        assert sorted(codes) == [0, 2, 2], words
        for index, mount in enumerate(mounts_at):
            if codes[index] == 2:
                assert f"modelfs mount {mount} --join TOKEN" in words[index]
                assert not (mount.parent / "state" / "pki").exists()
                assert not (mount.parent / "state" / "etcd").exists()
        (mounts_at[codes.index(0)] / "file").write_bytes(b"founded")
    finally:
        for index, mount in enumerate(mounts_at, 1):
            if mounts.mount_at(mount) is not None:
                command = network.enter(index, [*python, "umount", str(mount)])
                subprocess.run(command, check=True, env=environment, timeout=CHILD_SECONDS)
        network.down()
