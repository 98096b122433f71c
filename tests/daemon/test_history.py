"""Restore: which version comes back, who is told, and what is refused."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio

from modelfs import changes
from modelfs.errors import MetadataUnavailable, UserError
from modelfs.holdings import Holdings
from modelfs.ids import ROOT_INODE
from modelfs.limits import KIB, XATTRS_BYTES_MAX
from modelfs.mirror import Change, InodeChanged
from modelfs.xattrs import set_xattr
from modelfsd.metadata import history as history_module
from modelfsd.metadata.policies import Policies
from modelfsd.storage.survey import Survey
from tests.daemon.fsck_parts import make_directory
from tests.daemon.history_parts import (
    HOUR_NS,
    entries,
    history_of,
    remove,
    restore,
    retention_of,
    versions,
)
from tests.daemon.node_parts import cluster_of


async def test_a_restored_version_shares_every_chunk(tmp_path: Path, rng: Random) -> None:
    async with cluster_of(3, tmp_path) as cluster:
        one, other = cluster.nodes[:2]
        old = rng.randbytes(900 * KIB)
        await one.make_file(b"f")
        await one.write_file(b"f", old)
        first = (await one.look_up(b"f")).record
        await other.write_file(b"f", rng.randbytes(100))
        held = {id: set(store.owned()) for id, store in cluster.stores.items()}
        (row,) = await versions(one, "f")
        answer = await restore(other, "f", row["number"])
        assert answer["number"] == row["number"] + 2
        again = (await one.look_up(b"f")).record
        assert again.manifest == first.manifest and again.version == first.version + 2
        assert await one.read_file(b"f") == old
        assert {id: set(store.owned()) for id, store in cluster.stores.items()} == held


async def test_the_kernel_of_the_restoring_node_is_told_like_the_others(tmp_path: Path) -> None:
    async with cluster_of(2, tmp_path) as cluster:
        one = cluster.nodes[0]
        await one.make_file(b"f")
        for data in (b"old", b"new"):
            await one.write_file(b"f", data)
        before = await one.look_up(b"f")
        origins: list[str] = []

        def listen(announced: list[Change]) -> None:
            origins.extend(c.origin for c in announced if isinstance(c, InodeChanged))

        one.feed.listen(listen)
        one.notifier.names.clear()
        (row,) = await versions(one, "f")
        await restore(one, "f", row["number"])
        assert not any(one.namespace.is_own(origin) for origin in origins)
        assert not before.is_current and before.record.inline == b"new"
        assert [name for _, name in one.notifier.names] == [b"f"]
        assert await one.read_file(b"f") == b"old"
        origins.clear()
        await one.write_file(b"f", b"by the kernel")
        assert all(one.namespace.is_own(origin) for origin in origins)
        assert one.mirror.lease(before.ino) is None or one.leases.etcd_lease


async def test_a_version_that_expires_meanwhile_is_not_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        for data in (b"old", b"new"):
            await node.write_file(b"f", data)
        (row,) = await versions(node, "f")
        history, retention = history_of(node), retention_of(node)
        once = history._restore_once

        async def expire_first(place: Any, *arguments: Any) -> bool:  # noqa: ANN401
            await retention.expire(2 * HOUR_NS + row["superseded_ns"])
            return await once(place, *arguments)

        monkeypatch.setattr(history, "_restore_once", expire_first)
        with pytest.raises(UserError, match="is not retained \\(none is\\)"):
            await history.restore({"path": ["f"], "number": row["number"]})
        assert await node.read_file(b"f") == b"new"


async def test_a_file_that_is_being_written_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_module, "BUSY_SECONDS", 0.05)
    async with cluster_of(2, tmp_path) as cluster:
        one, other = cluster.nodes
        await one.make_file(b"f")
        for data in (b"old", b"new"):
            await one.write_file(b"f", data)
        session = await one.open(b"f")
        (row,) = await versions(other, "f")
        for node in (one, other):
            with pytest.raises(UserError, match="/m/f is being written on node aaaa"):
                await restore(node, "f", row["number"])
        await session.write(0, b"more")
        await session.release()
        assert await other.read_file(b"f") == b"more"


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        ({"path": ["f"], "number": "2"}, "not the number"),
        ({"path": ["f"], "number": 0}, "not the number"),
        ({"path": ["f"], "number": 1 << 40}, "not the number"),
        ({"path": ["f"]}, "not the number"),
        ({"path": [], "number": 1}, "no earlier versions"),
        ({"path": "f", "number": 1}, "not a list"),
        ({"path": [".."], "number": 1}, "not a name"),
        ({"path": ["a/b"], "number": 1}, "not a name"),
        ({"path": ["x" * 300], "number": 1}, "at most 255"),
        ({"path": ["nowhere", "f"], "number": 1}, "no directory /m/nowhere"),
        ({"path": ["f"], "number": 7}, "not retained"),
        ({"path": ["f"], "number": 1}, "current one"),
    ],
)
async def test_what_cannot_be_restored_is_refused_in_words(
    tmp_path: Path, request_: dict[str, Any], complaint: str
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        with pytest.raises(UserError, match=complaint):
            await history_of(node).restore(request_)


@pytest.mark.expected_logs("the watch of the namespace broke")
@pytest.mark.expected_logs("watch of the namespace broke", "etcd is out of reach")
async def test_without_etcd_nothing_is_restored_set_or_deleted(tmp_path: Path) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        await node.write_file(b"f", b"x")
        await remove(node, b"f")
        cluster.etcd.unavailable = True
        for attempt in (
            lambda: restore(node, "f", 2),
            lambda: versions(node, "f"),
            lambda: Policies(node.namespace).policy({"path": [], "set": {"retain": "1d"}}),
        ):
            with pytest.raises(MetadataUnavailable):
                await attempt()
        await retention_of(node).expire(10 * HOUR_NS)
        with pytest.raises(MetadataUnavailable):
            await retention_of(node).retained(Survey(Holdings.of(())))


async def test_a_name_that_keeps_changing_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await node.make_file(b"f")
        await node.write_file(b"f", b"x")
        await remove(node, b"f")
        history = history_of(node)

        async def never(*arguments: object) -> bool:
            return False

        monkeypatch.setattr(history, "_restore_once", never)
        monkeypatch.setattr(history_module, "ATTEMPTS_MAX", 3)
        with pytest.raises(UserError, match="keeps being changed"):
            await history.restore({"path": ["f"], "number": 2})


async def test_a_file_of_many_names_and_much_beside_its_contents_can_be_written(
    tmp_path: Path,
) -> None:
    """The history of its names would not fit into the one transaction."""
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        ino = await node.make_file(b"f")
        for number in range(15):
            await node.namespace.change(
                partial(changes.link, ino=ino, parent=ROOT_INODE, name=b"g%d" % number, now_ns=1)
            )
        for name in (b"user.a", b"user.b", b"user.c"):
            value = bytes(XATTRS_BYTES_MAX // 3 - 1000)
            await node.namespace.change(
                partial(set_xattr, ino=ino, name=name, value=value, now_ns=1)
            )
        await node.write_file(b"f", b"first")
        await node.write_file(b"f", b"second")
        assert await node.read_file(b"g14") == b"second"
        kept = await entries(node)
        assert 0 < len(kept) < 16


@pytest.mark.parametrize(
    ("name", "typed"), [(b"a b", "'/m/a b'"), (b"d\xff\n'", r"$'/m/d\xff\x0a\x27'")]
)
async def test_what_is_to_be_typed_names_the_directory_whatever_its_bytes(
    tmp_path: Path, name: bytes, typed: str
) -> None:
    async with cluster_of(1, tmp_path) as cluster:
        (node,) = cluster.nodes
        await make_directory(node, name)
        await remove(node, name, directory=True)
        path = [name.decode(errors="surrogateescape"), "f"]
        with pytest.raises(UserError, match=re.escape(f"modelfs restore {typed} --version 1")):
            await history_of(node).restore({"path": path, "number": 1})
        shell = ["bash", "-c", f"printf %s {typed}"]
        shown = await trio.run_process(shell, capture_stdout=True)
        assert shown.stdout == b"/m/" + name
