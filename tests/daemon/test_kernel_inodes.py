"""Kernel inodes: ids that are never shared by two views, and lookup counts that end at nothing."""

from __future__ import annotations

import stat
from random import Random
from typing import Any

import pytest

from modelfs.errors import StaleHandle
from modelfs.ids import ROOT_INODE, InodeNumber
from modelfs.inode import Inode
from modelfsd.kernel.kernel_inodes import ROOT_KERNEL_ID, VIEW_BITS, KernelInode, KernelInodes


def record(version: int = 1, kind: int = stat.S_IFREG) -> Inode:
    times: dict[str, Any] = dict.fromkeys(("atime_ns", "mtime_ns", "ctime_ns"), 1)
    return Inode(mode=kind | 0o644, uid=0, gid=0, version=version, **times)


def table() -> KernelInodes:
    return KernelInodes(record(kind=stat.S_IFDIR))


@pytest.mark.parametrize("seed", range(5))
def test_counts_ids_and_currency_in_a_random_life(rng: Random, seed: int) -> None:
    inodes = table()
    alive: set[KernelInode] = set()
    versions = dict.fromkeys(range(2, 6), 1)
    for _ in range(600):
        ino = InodeNumber(rng.choice(list(versions)))
        some = rng.choice(sorted(alive, key=lambda inode: inode.id)) if alive else None
        match rng.randrange(6):
            case 0 | 1:
                shown = inodes.show(ino, record(versions[ino]))
                shown.lookups += 1
                assert shown.is_current and inodes.current(ino) is shown
                alive.add(shown)
            case 2:
                versions[ino] += 1
                current = inodes.current(ino)
                if current is not None:
                    inodes.retire(current)
                    assert inodes.current(ino) is None and not current.is_current
            case 3 if some is not None:
                some.handles += 1
            case 4 if some is not None and some.handles:
                some.handles -= 1
                inodes.drop_if_unused(some)
            case 5 if some is not None and some.lookups:
                inodes.forget([(some.id, rng.randrange(1, some.lookups + 1))])
        alive = {inode for inode in alive if inode.lookups or inode.handles}
        assert set(inodes) == alive | {inodes[ROOT_KERNEL_ID]}
        assert len({inode.id for inode in inodes}) == len(inodes)
        for inode in alive:
            assert inodes[inode.id] is inode and inode.id >> VIEW_BITS == inode.ino
    for inode in alive:
        inode.handles = 0
        inodes.forget([(inode.id, inode.lookups)])
        inodes.drop_if_unused(inode)
    assert len(inodes) == 1


def test_the_id_of_a_view_outlives_a_remount() -> None:
    ids = []
    for _ in range(2):
        inodes = table()
        inodes.show(InodeNumber(9), record(7)).lookups += 1
        ids.append(inodes.show(InodeNumber(5), record(3)).id)
    assert ids[0] == ids[1] == 5 << VIEW_BITS | 3


def test_a_view_whose_id_is_in_use_takes_the_next() -> None:
    inodes = table()
    first = inodes.show(InodeNumber(5), record(1))
    first.lookups += 1
    inodes.retire(first)
    again = inodes.show(InodeNumber(5), record(1 + (1 << VIEW_BITS)))
    assert again is not first and again.id == first.id + 1


def test_a_directory_keeps_its_inode_and_the_root_is_never_forgotten() -> None:
    inodes = table()
    one = inodes.show(InodeNumber(5), record(kind=stat.S_IFDIR))
    assert inodes.show(InodeNumber(5), record(kind=stat.S_IFDIR)) is one
    inodes.forget([(ROOT_KERNEL_ID, 5), (77, 3)])
    assert inodes[ROOT_KERNEL_ID].ino == ROOT_INODE
    with pytest.raises(StaleHandle):
        inodes[77]
