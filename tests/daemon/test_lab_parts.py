"""What a lab is built from: its state, its addresses, its processes, its network."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from modelfs.errors import UserError
from modelfsd.commands.registry import process_start_ticks
from modelfsd.lab import processes as lab_processes
from modelfsd.lab.cluster import Lab, LabFailed, take_down
from modelfsd.lab.net import LabNetwork
from modelfsd.lab.processes import MARK, mark
from modelfsd.lab.state import LabState, address_block, load_state, plan_lab

HANG_SECONDS = 120.0  # a guard only
needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or any(shutil.which(tool) is None for tool in ("ip", "tc", "bridge")),
    reason="network namespaces need root and iproute2",
)


def plan(root: Path, node_count: int = 3) -> LabState:
    return plan_lab(root, node_count, 2, False, None, ())


# ---------------------------------------------------------------- state and addresses


def test_the_state_survives_on_disk(tmp_path: Path) -> None:
    state = replace(plan(tmp_path), netns=True, link_mbit=200.0, arguments=("--zone", "a"))
    assert load_state(tmp_path) is None
    state.save()
    assert load_state(tmp_path) == state
    assert [path.name for path in tmp_path.iterdir()] == ["lab.json"]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "nodes": 3}'])
def test_a_file_that_is_no_lab_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "lab.json").write_text(content)
    with pytest.raises(UserError, match=r"lab\.json"):
        load_state(tmp_path)


def test_what_up_prints_has_the_promised_keys(tmp_path: Path) -> None:
    printed = json.loads(json.dumps(plan(tmp_path, 2).describe()))
    assert printed["root"] == str(tmp_path)
    assert [node["name"] for node in printed["nodes"]] == ["n1", "n2"]
    for node in printed["nodes"]:
        assert set(node) == {"name", "mount", "state_dir", "pid", "address"}
        assert node["mount"] == str(tmp_path / node["name"] / "mnt")


def test_labs_take_different_blocks_and_avoid_ports_in_use(tmp_path: Path) -> None:
    first = plan(tmp_path)
    assert [node.address for node in first.nodes] == [
        f"{address_block(tmp_path, 0)}.{i}" for i in (1, 2, 3)
    ]
    with socket.socket() as taken:
        taken.bind((first.nodes[1].address, 7421))
        taken.listen()
        assert plan(tmp_path).nodes[0].address == f"{address_block(tmp_path, 1)}.1"
    blocks = {address_block(Path(f"/lab/{i}"), 0) for i in range(100)}
    assert len(blocks) > 95
    assert all(32 <= int(block.split(".")[1]) < 224 for block in blocks)


def test_a_plan_that_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nodes"):
        plan(tmp_path, 0)
    with pytest.raises(UserError, match="netns"):
        plan_lab(tmp_path, 3, 2, False, 100.0, ())
    with pytest.raises(UserError, match="not a rate"):
        plan_lab(tmp_path, 3, 2, True, -1.0, ())


def test_up_does_not_touch_a_directory_with_other_things_in_it(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="not an empty directory"):
        Lab.up(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_down_without_a_lab_does_nothing(tmp_path: Path) -> None:
    assert not take_down(tmp_path)
    assert not take_down(tmp_path / "nowhere")


def test_a_node_that_cannot_start_is_reported_with_its_words_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    with pytest.raises(LabFailed, match=r"(?s)node n1 did not start.*--no-such-option"):
        Lab.up(tmp_path / "lab", 2, arguments=["--no-such-option"])
    assert not (tmp_path / "lab").exists()


def test_down_removes_what_up_made_and_keeps_the_rest(tmp_path: Path) -> None:
    state = plan(tmp_path, 2)
    state.save()
    for node in state.nodes:
        node.mount.mkdir(parents=True)
        node.state_dir.mkdir()
        (node.state_dir / "chunk").touch()
    (tmp_path / "n1" / "notes").touch()
    assert take_down(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["n1", "n1/notes"]
    assert not take_down(tmp_path)


def test_cutting_a_node_off_needs_namespaces(tmp_path: Path) -> None:
    plan(tmp_path).save()
    lab = Lab.open(tmp_path)
    with pytest.raises(UserError, match="--netns"):
        lab.cut("n1")
    with pytest.raises(UserError, match="no node 'n9', only n1, n2, n3"):
        lab.kill("n9")


# ---------------------------------------------------------------- processes

# A parent that starts a child (which it does not wait for), says both pids, and waits for its end.
FAMILY = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"],
                         stdin=subprocess.PIPE, env={} if "clean" in sys.argv else None)
print(os.getpid(), child.pid, flush=True)
sys.stdin.read()
"""


class Family:
    """A marked process and its child."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.mark = mark(directory)
        self.parent = subprocess.Popen(
            [sys.executable, "-c", FAMILY, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, MARK: str(directory)},
            start_new_session=True,
        )
        assert self.parent.stdout is not None
        self.pids = {int(pid) for pid in self.parent.stdout.readline().split()}
        assert len(self.pids) == 2


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    made = Family(tmp_path / "n2")
    with made.parent:
        yield made
        lab_processes.kill([made.mark], HANG_SECONDS)


def test_kill_ends_a_node_and_its_children_and_nobody_else(family: Family, tmp_path: Path) -> None:
    other = Family(tmp_path / "n22")  # a name that begins like the other's
    with other.parent:
        assert set(lab_processes.find([family.mark])) == family.pids
        lab_processes.kill([family.mark], HANG_SECONDS)
        assert family.parent.wait(HANG_SECONDS) == -signal.SIGKILL
        assert all(process_start_ticks(pid) is None for pid in family.pids)
        assert set(lab_processes.find([other.mark])) == other.pids
        lab_processes.kill([other.mark], HANG_SECONDS)
    lab_processes.kill([family.mark], HANG_SECONDS)  # nothing left is no error


def test_a_child_whose_parent_died_still_belongs_to_the_node(family: Family) -> None:
    parent = family.parent.pid
    # Stopped, the child does not see that its pipe is closed, and outlives its parent.
    (child,) = family.pids - {parent}
    os.kill(child, signal.SIGSTOP)
    family.parent.kill()
    family.parent.wait(HANG_SECONDS)
    assert set(lab_processes.find([family.mark])) == {child}


def test_a_child_without_the_mark_is_found_through_its_parent(tmp_path: Path) -> None:
    family = Family(tmp_path / "n1", "clean")
    with family.parent:
        assert set(lab_processes.find([family.mark])) == family.pids
        lab_processes.kill([family.mark], HANG_SECONDS)
    assert all(process_start_ticks(pid) is None for pid in family.pids)


def test_a_paused_node_is_stopped_and_goes_on_after_it(family: Family) -> None:
    processes = lab_processes.find([family.mark])
    assert not lab_processes.are_stopped(processes)
    lab_processes.send(processes, signal.SIGSTOP)
    os.waitid(os.P_PID, family.parent.pid, os.WSTOPPED | os.WNOWAIT)
    lab_processes.send(processes, signal.SIGCONT)
    os.waitid(os.P_PID, family.parent.pid, os.WCONTINUED | os.WNOWAIT)
    assert not lab_processes.are_stopped(processes)


def test_a_pid_that_was_used_again_gets_no_signal(family: Family) -> None:
    earlier = {pid: start - 1 for pid, start in lab_processes.find([family.mark]).items()}
    lab_processes.send(earlier, signal.SIGKILL)
    assert lab_processes.wait_ended(earlier, HANG_SECONDS)  # those processes are long gone
    assert set(lab_processes.find([family.mark])) == family.pids


# ---------------------------------------------------------------- network

RECEIVER = """
import socket, sys
receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
receiver.bind((sys.argv[1], 5999))
print("ready", flush=True)
while True:
    data, sender = receiver.recvfrom(100)
    print(data.decode(), sender[0], flush=True)
"""
SENDER = """
import socket, sys
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sender.sendto(sys.argv[2].encode(), (sys.argv[1], 5999))
"""


@pytest.fixture
def network(tmp_path: Path) -> Iterator[LabNetwork]:
    made = LabNetwork(f"t{os.getpid() % 100000:05}", 2, 100.0)
    made.up()
    yield made
    made.down()
    assert made.existing() == []


@needs_namespaces
def test_nodes_of_a_network_reach_each_other_unless_cut_off(network: LabNetwork) -> None:
    receive = network.enter(2, [sys.executable, "-c", RECEIVER, network.address(2)])

    def send(text: str) -> None:
        command = [sys.executable, "-c", SENDER, network.address(2), text]
        subprocess.run(network.enter(1, command), check=True, timeout=HANG_SECONDS)

    with subprocess.Popen(receive, stdout=subprocess.PIPE, text=True) as receiver:
        assert receiver.stdout is not None
        try:
            assert receiver.stdout.readline() == "ready\n"
            send("one")
            network.cut(2)
            send("lost")
            network.heal(2)
            send("two")
            assert receiver.stdout.readline() == "one 10.88.0.1\n"
            assert receiver.stdout.readline() == "two 10.88.0.1\n"
        finally:
            receiver.kill()


@needs_namespaces
def test_both_ends_of_a_link_are_shaped(network: LabNetwork) -> None:
    for namespace, device in ((network.namespace(1), "eth0"), (network.bridge_namespace, "v1")):
        shown = subprocess.run(
            ["tc", "-n", namespace, "qdisc", "show", "dev", device],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "tbf" in shown.stdout
        assert "rate 100Mbit" in shown.stdout


@needs_namespaces
def test_a_network_is_not_built_twice_and_down_works_on_half_of_it(network: LabNetwork) -> None:
    with pytest.raises(UserError, match="still there"):
        network.up()
    subprocess.run(["ip", "netns", "del", network.namespace(1)], check=True)
    network.down()
    network.down()
    assert network.existing() == []
