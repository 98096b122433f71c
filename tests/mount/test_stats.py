"""What a node says of its speed, against what was really done to it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from modelfsd.lab.cluster import Lab
from modelfsd.lab.state import LabNode
from tests.mount.mount_parts import (
    CHILD_SECONDS,
    MIB,
    Dirs,
    ask,
    forget_pages,
    info,
    requests,
    run,
    wait_until,
)

SIZE = 12 * MIB


def modelfs(*words: str | Path) -> str:
    """The command."""
    return run(sys.executable, "-m", "modelfsd", *words)


def use_of(path: Path) -> dict[str, Any]:
    """`modelfs stats PATH --json`."""
    found: dict[str, Any] = json.loads(modelfs("stats", path, "--json"))
    return found


def stage_counts(node: LabNode) -> dict[str, int]:
    """How often each stage was passed."""
    stages = ask(node, "measures")["stages"]
    return {name: found["count"] for name, found in stages.items()}


def passed(node: LabNode, before: dict[str, int]) -> dict[str, int]:
    """What has been added since."""
    return {name: count - before[name] for name, count in stage_counts(node).items()}


def page_of(node: LabNode) -> str:
    """`/metrics`, from the admin socket."""
    connection = http.client.HTTPConnection("localhost", timeout=30)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.connect(str(node.control_path))
    connection.request("GET", "/metrics")
    return connection.getresponse().read().decode()


def test_the_account_of_a_file_is_what_was_done_to_it(dirs: Dirs) -> None:
    data = os.urandom(SIZE)
    first, second = dirs[0] / "model", dirs[1] / "model"
    first.write_bytes(data)
    written = use_of(first)
    assert written["write_bytes"] == SIZE
    assert written["read_bytes"] == 0
    assert written["opens"] == 1

    with second.open("rb") as file:
        assert file.read() == data
        used = use_of(second)
    given = used["read_bytes"] + used["pushed_bytes"]
    assert given >= SIZE  # a page may be asked for while it is being pushed
    assert used["local_bytes"] + used["remote_bytes"] == used["fetched_bytes"]
    assert SIZE <= used["fetched_bytes"] < 1.05 * SIZE  # the manifest is fetched too
    assert used["amplification"] == used["fetched_bytes"] / given
    assert used["write_bytes"] == 0
    assert 0 < used["stream_requests"] <= used["read_requests"]
    (view,) = used["views"]
    assert view == {
        "version": used["version"],
        "current": True,
        "handles": 1,
        "writers": 0,
        "uncommitted": False,
    }

    def is_read_from_the_page_cache() -> bool:
        before = use_of(second)
        assert second.read_bytes() == data
        again = use_of(second)
        assert again["opens"] == before["opens"] + 1
        is_closed: bool = again["views"][0]["handles"] == 0
        return is_closed and bool(again["read_requests"] == before["read_requests"])

    # A machine that is short of memory may have dropped pages.
    wait_until(is_read_from_the_page_cache, "a read of which the daemon hears nothing")


def test_the_stages_count_what_happens(lab: Lab, dirs: Dirs) -> None:
    before = [stage_counts(node) for node in lab.nodes]
    (dirs[0] / "model").write_bytes(os.urandom(SIZE))
    writer, *others = (passed(node, then) for node, then in zip(lab.nodes, before, strict=True))
    chunks = info(lab, dirs[0] / "model")["chunk_count"] + 1  # the manifest is one too
    assert writer["hash"] == chunks
    assert writer["commit"] == 1
    assert writer["stage"] >= chunks - 1  # WRITEs that come together are staged together
    assert writer["etcd_txn"] >= 2  # create, and commit
    assert writer["apply"] >= 2
    # Two copies of each: here and on one other, or on both others.
    assert writer["put"] + writer["fsync"] >= 2 * chunks
    assert sum(node["fsync"] for node in (writer, *others)) >= 2 * chunks

    before = [stage_counts(node) for node in lab.nodes]
    counted = ask(lab.nodes[1], "counters")["chunks"]
    assert len((dirs[1] / "model").read_bytes()) == SIZE
    reader = passed(lab.nodes[1], before[1])
    assert reader["freshness"] >= 1
    assert reader["etcd_read"] >= 1
    assert reader["disk_read"] + reader["fetch"] >= chunks
    assert reader["verify"] >= chunks

    def served() -> int:
        return sum(passed(lab.nodes[index], before[index])["serve"] for index in (0, 2))

    # A peer counts an answer when it has sent it.
    wait_until(lambda: served() >= reader["fetch"], "as many answers as were received")
    now = ask(lab.nodes[1], "counters")["chunks"]
    moved = [now[source] - counted[source] for source in ("local_bytes", "remote_bytes")]
    assert sum(moved) >= SIZE
    assert bool(moved[1]) == bool(reader["fetch"])


def test_the_metrics_page_parses_and_agrees_with_the_counters(lab: Lab, dirs: Dirs) -> None:
    node = lab.nodes[0]
    (dirs[0] / "small").write_bytes(b"x" * 5000)
    counted = requests(node)
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(page_of(node))
        for sample in family.samples
    }
    assert samples["modelfs_request_seconds_count", "create"] == counted["create"]
    assert samples["modelfs_request_seconds_bucket", "+Inf", "write"] == counted["write"]
    assert samples["modelfs_nodes_up",] == len(lab.nodes)
    assert samples["modelfs_peer_sent_bytes_total", "n2"] > 0
    assert samples["process_open_fds",] > 0


def test_people_are_shown_the_same(lab: Lab, dirs: Dirs) -> None:
    path = dirs[0] / "model"
    path.write_bytes(os.urandom(2 * MIB))
    forget_pages(path)
    with path.open("rb") as file:
        file.read()
        text = modelfs("stats", path)
    assert "2.00 MiB in " in text
    assert "1 handles open, 0 of them for writing" in text
    table = modelfs("stats", "--state-dir", lab.nodes[0].state_dir)
    for word in ("node n1, since the start", "etcd_txn", "create", "copies sent to peers"):
        assert word in table


@pytest.mark.parametrize("as_json", [False, True])
def test_the_live_table_goes_on_until_it_is_interrupted(lab: Lab, as_json: bool) -> None:
    words = ["stats", "--live", "--state-dir", str(lab.nodes[0].state_dir)]
    words += ["--json"] if as_json else []
    with subprocess.Popen(
        [sys.executable, "-m", "modelfsd", *words], stdout=subprocess.PIPE, text=True, cwd="/"
    ) as process:
        assert process.stdout is not None
        try:
            lines = [process.stdout.readline() for _ in range(2)]
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=CHILD_SECONDS)
        finally:
            process.kill()
    assert process.returncode == 0
    if as_json:
        told = [json.loads(line) for line in lines]
        assert all(second["node"] == "n1" and second["seconds"] > 0 for second in told)
    else:
        assert lines[0].startswith("node n1, the last ")
