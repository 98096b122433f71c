"""fsck: names and inodes that do not fit are named, and mended where that is no guess.

Damage is done to etcd, by records that no node would put.
"""

from __future__ import annotations

import stat
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
import trio.testing
from msgspec.structs import replace

from modelfs import changes, keys
from modelfs.errors import MetadataUnavailable, UserError
from modelfs.ids import ROOT_INODE
from modelfs.inode import Dentry, encode
from modelfs.limits import MIB
from modelfs.ports import Delete, Put
from tests.daemon.fsck_parts import Ears, make_directory, world
from tests.daemon.upkeep_parts import make


async def test_a_name_of_nothing_is_named_and_taken_away(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await make(w.nodes[0], b"f", b"x")
        await w.put(Delete(keys.inode(await w.ino(b"f"))))
        checked = await w.fsck()
        assert (checked.code, checked.said()) == (4, [("/f", "names", False)])
        checked = await w.fsck(repair=True)
        assert (checked.code, checked.said()) == (1, [("/f", "names", True)])
        assert w.nodes[0].mirror.child(ROOT_INODE, b"f") is None
        assert (await w.fsck()).code == 0


async def test_what_has_no_name_gets_one_in_lost_and_found(tmp_path: Path, rng: Random) -> None:
    async with world(tmp_path) as w:
        data = rng.randbytes(MIB)
        await make(w.nodes[0], b"f", data)
        file = await w.ino(b"f")
        await w.let_go(file)
        above = await make_directory(w.nodes[0], b"d")
        below = await make_directory(w.nodes[0], b"e", above)
        dentries = [keys.dentry(ROOT_INODE, b"f"), keys.dentry(ROOT_INODE, b"d")]
        await w.put(*map(Delete, dentries))
        checked = await w.fsck()
        assert checked.code == 4
        assert checked.answer["left"] == 2  # what is below an unnamed directory has its name
        checked = await w.fsck(repair=True)
        assert checked.code == 1
        paths = [f"/lost+found/#{ino}" for ino in sorted((file, above))]
        assert [path for path, _, _ in checked.said()] == paths
        assert (await w.fsck()).code == 0
        mirror = w.nodes[1].mirror
        assert mirror.path_of(below) == b"lost+found/#%d/e" % above
        record = mirror.inode(file)
        assert record is not None
        assert await w.nodes[1].contents.read(record, 0, MIB) == data


async def test_an_unnamed_file_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await make(w.nodes[0], b"f", b"x")
        session = await w.nodes[1].open(b"f")
        await w.put(Delete(keys.dentry(ROOT_INODE, b"f")))
        assert (await w.fsck(repair=True)).code == 0
        await session.release()


async def test_a_count_of_links_follows_the_names(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await make(w.nodes[0], b"f", b"x")
        ino = await w.ino(b"f")
        link = lambda mirror: changes.link(mirror, ino, ROOT_INODE, b"g", 1)  # noqa: E731
        await w.nodes[0].namespace.change(link)
        assert (await w.fsck()).code == 0
        record = w.nodes[0].namespace.require(ino)
        await w.put(Put(keys.inode(ino), encode(replace(record, nlink=7))))
        checked = await w.fsck(repair=True)
        assert checked.said() == [("/f", "names", True), ("/g", "names", True)]
        assert "7 and 2" in checked.findings[0]["text"]
        assert w.nodes[0].namespace.require(ino).nlink == 2
        assert (await w.fsck()).code == 0


async def test_a_name_s_type_follows_its_inode(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await make(w.nodes[0], b"f", b"x")
        ino = await w.ino(b"f")
        await w.put(Put(keys.dentry(ROOT_INODE, b"f"), encode(Dentry(ino, stat.S_IFDIR))))
        checked = await w.fsck(repair=True)
        assert (checked.code, checked.said()) == (1, [("/f", "names", True)])
        child = w.nodes[0].mirror.child(ROOT_INODE, b"f")
        assert child is not None
        assert stat.S_ISREG(child.kind)


async def test_names_in_a_directory_that_is_gone(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        directory = await make_directory(w.nodes[0], b"d")
        await make(w.nodes[0], b"both", b"x")
        await make(w.nodes[0], b"only", b"y")
        both, only = await w.ino(b"both"), await w.ino(b"only")
        await w.let_go(only)
        await w.put(
            Delete(keys.inode(directory)),
            Delete(keys.dentry(ROOT_INODE, b"d")),
            Delete(keys.dentry(ROOT_INODE, b"only")),
            Put(keys.dentry(directory, b"both"), encode(Dentry(both, stat.S_IFREG))),
            Put(keys.dentry(directory, b"only"), encode(Dentry(only, stat.S_IFREG))),
        )
        assert (await w.fsck()).code == 4
        checked = await w.fsck(repair=True)
        assert checked.code == 1
        assert (await w.fsck()).code == 0
        mirror = w.nodes[0].mirror
        assert mirror.path_of(both) == b"both"
        assert mirror.path_of(only) == b"lost+found/#%d" % only
        assert directory not in mirror.children


async def test_what_would_be_a_guess_is_left(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        one = await make_directory(w.nodes[0], b"one")
        two = await make_directory(w.nodes[0], b"two", one)
        twice = await make_directory(w.nodes[0], b"twice")
        await w.put(
            Delete(keys.dentry(ROOT_INODE, b"one")),
            Put(keys.dentry(two, b"one"), encode(Dentry(one, stat.S_IFDIR))),
            Put(keys.dentry(ROOT_INODE, b"again"), encode(Dentry(twice, stat.S_IFDIR))),
        )
        before = w.cluster.etcd.revision
        checked = await w.fsck(repair=True)
        assert checked.code == 4
        assert checked.answer["left"] == 3
        assert w.cluster.etcd.revision == before


@pytest.mark.expected_logs("cannot be read")
async def test_an_unreadable_name_keeps_counts_and_lost_inodes_as_they_are(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await make(w.nodes[0], b"f", b"x")
        await make(w.nodes[0], b"h", b"x")
        await w.let_go(await w.ino(b"f"))
        await w.put(
            Put(keys.dentry(ROOT_INODE, b"f"), b"garbage"),
            Put(keys.inode(await w.ino(b"h")), b"garbage"),
        )
        checked = await w.fsck(repair=True)
        assert checked.code == 4
        kinds = {(one["kind"], *one["paths"][:1]) for one in checked.findings}
        assert {("record", "/f"), ("record", "/h")} < kinds  # and the inode that was called f
        assert checked.answer["mended"] == 0
        assert w.nodes[0].mirror.child(ROOT_INODE, b"lost+found") is None


@pytest.mark.expected_logs("the watch of the namespace broke|etcd is out of reach")
async def test_without_etcd_nothing_is_said(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.cluster.etcd.unavailable = True
        with pytest.raises(MetadataUnavailable):
            await w.fsck()


async def test_one_check_at_a_time(tmp_path: Path) -> None:
    async with world(tmp_path) as w, trio.open_nursery() as nursery:
        await make(w.nodes[0], b"f", b"x")
        await w.put(Delete(keys.inode(await w.ino(b"f"))))
        service, begun = w.service(), trio.Event()

        async def never_hears(news: dict[str, Any]) -> None:
            begun.set()
            await trio.sleep_forever()

        ears: Any = Ears()
        ears.tell = never_hears
        nursery.start_soon(service.fsck, {}, ears)
        await begun.wait()
        with pytest.raises(UserError, match="another fsck is running"):
            await service.fsck({}, ears)
        nursery.cancel_scope.cancel()
