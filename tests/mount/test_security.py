"""A running cluster whose doors are tried: outsiders at every port, a node removed, a new CA.

The tests build on one another: each leaves a cluster that works.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from modelfs.ids import ClusterId, NodeId
from modelfsd.commands.control import call
from modelfsd.lab.cluster import Lab
from modelfsd.lab.state import LabNode
from modelfsd.trust import pki
from modelfsd.trust.keyring import KeyRing
from tests.mount.mount_parts import CHILD_SECONDS, ask, wait_until
from tests.pki_parts import key_ring

pytestmark = pytest.mark.fuse

CONTENTS = os.urandom(5 << 20)
ROTATE_SECONDS = 280.0
REFUSED = r"(?i)certificate|alert|closed|reset|EOF|unknown"


@pytest.fixture(scope="module")
def lab(test_root: Path) -> Iterator[Lab]:
    root = Path(tempfile.mkdtemp(prefix="secure-", dir=test_root))
    with Lab.up(root, 4) as lab:
        (lab.nodes[0].mount / "model").write_bytes(CONTENTS)
        yield lab


def handshake(node: LabNode, port: int, context: ssl.SSLContext) -> bytes:
    """What a port says to who comes with this context. Raises OSError if it says nothing."""
    with socket.create_connection((node.address, port), CHILD_SECONDS) as raw:
        raw.settimeout(CHILD_SECONDS)
        with context.wrap_socket(raw) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
            said = connection.recv(100)
            if not said:
                raise ConnectionResetError("it closed the connection")
            return said


def outsider(keys: KeyRing | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if keys is not None:
        context.load_cert_chain(keys.client, keys.node_key)
    return context


def member(node: LabNode) -> ssl.SSLContext:
    return outsider(KeyRing(node.state_dir))


def cluster_of(node: LabNode) -> ClusterId:
    return ClusterId(ask(node, "status")["cluster"]["id"])


@pytest.mark.parametrize("port", [7421, 7422])
def test_etcd_answers_members_alone(lab: Lab, port: int) -> None:
    foreign = key_ring(NodeId("9" * 16), cluster=cluster_of(lab.nodes[0]))
    for context in (outsider(), outsider(foreign)):
        with pytest.raises(OSError, match=REFUSED):
            handshake(lab.nodes[0], port, context)
    if port == 7421:
        assert handshake(lab.nodes[0], port, member(lab.nodes[1]))
    with socket.create_connection((lab.nodes[0].address, port)) as plain:
        plain.settimeout(CHILD_SECONDS)
        plain.sendall(b"GET /v2/keys HTTP/1.0\r\n\r\n")
        assert b"200 OK" not in plain.recv(1000)


def test_what_lies_on_the_disk_is_its_owners_alone(lab: Lab) -> None:
    for node in lab.nodes:
        assert stat.S_IMODE(node.state_dir.stat().st_mode) == 0o700
        for path in node.state_dir.rglob("*"):
            assert not stat.S_IMODE(path.lstat().st_mode) & 0o077, path


def test_no_secret_is_said_or_shown(lab: Lab) -> None:
    first = lab.nodes[0]
    line = call(first.control_path, "token", CHILD_SECONDS)["token"]
    key = pki.key_to_pem(KeyRing(first.state_dir).load().key).decode().splitlines()[1]
    shown = str(call(first.control_path, "status", CHILD_SECONDS))
    for node in lab.nodes:
        shown += node.log_path.read_text()
        assert node.pid is not None
        for name in ("cmdline", "environ"):
            shown += Path(f"/proc/{node.pid}/{name}").read_bytes().decode(errors="replace")
    assert line[-60:-10] not in shown and key not in shown and "modelfs-l" not in shown


@contextmanager
def working(node: LabNode) -> Iterator[list[str]]:
    """Make and read files all the time; what failed."""
    failures: list[str] = []
    is_done = threading.Event()

    def work() -> None:
        number = 0
        while not is_done.is_set():
            number += 1
            try:
                (node.mount / "busy").write_bytes(b"%d" % number)
                if (node.mount / "model").read_bytes() != CONTENTS:
                    failures.append("other bytes")
            except OSError as error:
                failures.append(str(error))
            time.sleep(0.01)  # so that a slow machine has time for the rest

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield failures
    finally:
        is_done.set()
        thread.join()


def modelfs(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "modelfsd", *words],
        capture_output=True,
        text=True,
        timeout=ROTATE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def restarts(node: LabNode) -> int:
    return node.log_path.read_text().count("etcd was restarted")


def test_a_removed_node_is_shut_out_and_the_others_go_on(lab: Lab) -> None:
    first = lab.nodes[0]
    voters = [node for node in lab.nodes if (node.state_dir / "etcd").exists()]
    gone = voters[-1]
    assert gone is not first
    left = [node for node in lab.nodes if node is not gone]
    old = member(gone)
    assert handshake(first, 7421, old)
    with socket.create_connection((first.address, 7421)) as raw, old.wrap_socket(raw) as open_one:
        open_one.settimeout(CHILD_SECONDS)
        with working(first) as failures:
            text = modelfs("node", "remove", gone.name, "--state-dir", str(first.state_dir))
            assert f"removed {gone.name}" in text and "modelfs ca rotate" in text
            while open_one.recv(1 << 16):
                pass  # until the member to which it is connected has restarted
            members = [node for node in voters if node is not gone]
            wait_until(lambda: all(restarts(n) == 1 for n in members), "etcd restarts everywhere")
        assert not failures
    with pytest.raises(OSError, match=REFUSED):
        handshake(first, 7421, old)
    wait_until(lambda: gone.pid is None, "the removed node ends")
    assert "was removed from the cluster" in gone.log_path.read_text()
    assert (gone.state_dir / "removed").exists()
    status = ask(first, "status")
    assert {node["name"] for node in status["nodes"]} == {node.name for node in left}
    (left[1].mount / "after").write_bytes(CONTENTS)
    assert (left[2].mount / "after").read_bytes() == CONTENTS
    assert (left[2].mount / "model").read_bytes() == CONTENTS


def test_another_authority_takes_over_while_files_are_written(lab: Lab) -> None:
    left = [node for node in lab.nodes if node.pid is not None]
    before = {node.name: KeyRing(node.state_dir).load() for node in left}
    with working(left[0]) as failures:
        text = modelfs("ca", "rotate", "--state-dir", str(left[0].state_dir))
    assert not failures
    assert f"replaced on {len(left)} nodes" in text
    for node in left:
        now = KeyRing(node.state_dir).load()
        assert len(now.trusted) == 1 and now.authority.certificate == now.trusted[0]
        old = before[node.name]
        assert now.authority.certificate != old.authority.certificate
        assert pki.is_signed_by(now.node, now.authority.certificate)
        assert pki.belongs(now.node, old.key)
        assert not (node.state_dir / "pki" / "next.key").exists()
    (left[1].mount / "rotated").write_bytes(CONTENTS)
    for node in left:
        assert (node.mount / "rotated").read_bytes() == CONTENTS


def test_a_cluster_may_leave_its_chunks_unencrypted(plain_lab: Lab) -> None:
    first, second = plain_lab.nodes
    (first.mount / "file").write_bytes(CONTENTS)
    assert (second.mount / "file").read_bytes() == CONTENTS
    plain_lab.kill("n2")
    plain_lab.start("n2")
    (first.mount / "other").write_bytes(CONTENTS)
    assert (second.mount / "other").read_bytes() == CONTENTS
    for node in plain_lab.nodes:
        assert json.loads((node.state_dir / "node.json").read_text())["data_tls"] is False
