"""Who was sent to look again is recognised when he is back, and nobody else is taken for him."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from modelfs.errors import StaleHandle
from modelfs.ids import InodeNumber, KernelId
from modelfs.inode import Inode
from modelfsd.kernel import sent_back
from modelfsd.kernel.kernel_inodes import KernelInode
from modelfsd.kernel.sent_back import Entry, SentBack
from modelfsd.kernel.tree import Caller

CALLER, OTHER = Caller(0, 0, 7), Caller(0, 0, 8)
NAME, ANOTHER = (KernelId(1), b"name"), (KernelId(1), b"another")
RECORD = Inode(mode=0o100644, uid=0, gid=0, atime_ns=1, mtime_ns=1, ctime_ns=1, inline=b"")
DIRECTORY, FILE = (KernelInode(KernelId(n), InodeNumber(n), RECORD) for n in (5, 6))

Look = tuple[Entry, KernelInode | None]


def sent() -> SentBack:
    calls = SentBack()
    with pytest.raises(StaleHandle):
        calls.send(CALLER)
    return calls


async def test_an_open_is_back_at_the_inode_that_it_was_shown_last() -> None:
    calls = sent()
    calls.note_lookup(CALLER, NAME, DIRECTORY)
    calls.note_lookup(OTHER, NAME, DIRECTORY)
    calls.note_lookup(CALLER, NAME, FILE)
    assert not calls.is_back(OTHER, FILE)
    assert calls.is_back(CALLER, FILE)
    assert not calls.is_back(CALLER, FILE), "told once"
    calls = sent()
    calls.note_lookup(CALLER, NAME, FILE)
    calls.note_lookup(CALLER, NAME, DIRECTORY)
    assert not calls.is_back(CALLER, FILE)


async def test_a_look_in_vain_ends_it_and_a_create_is_told() -> None:
    calls = sent()
    calls.note_lookup(CALLER, NAME, DIRECTORY)
    assert calls.note_lookup(CALLER, NAME, None)
    assert calls.note_lookup(CALLER, ANOTHER, FILE), "another call"
    assert not calls.is_back(CALLER, FILE)
    for times in (1, 2):
        calls = sent()
        for _ in range(times):
            calls.note_lookup(CALLER, NAME, None)
        assert not calls.is_back(OTHER, FILE)
        assert calls.is_back_in_vain(CALLER)
    assert not sent().is_back_in_vain(CALLER)


async def test_a_name_that_was_missing_may_be_there_when_an_open_looks_it_up_once_more() -> None:
    """Linux does so for O_CREAT. It must not keep the answer, for which a later call would pass."""
    calls = sent()
    calls.note_lookup(CALLER, NAME, None)
    assert not calls.note_lookup(CALLER, NAME, FILE)
    assert calls.is_back(CALLER, FILE)
    calls = sent()
    calls.note_lookup(CALLER, NAME, None)
    calls.note_lookup(CALLER, NAME, FILE)
    assert not calls.is_back_in_vain(CALLER)


async def test_a_directory_that_went_and_came_while_it_was_looked_up_is_on_the_way() -> None:
    """The kernel looks a name up again that it had cached and finds gone: so may a later call."""
    below = DIRECTORY.id, b"name"
    calls = sent()
    calls.note_lookup(CALLER, NAME, None)
    for entry, inode in ((NAME, DIRECTORY), (below, FILE)):
        assert not calls.note_lookup(CALLER, entry, inode), "the kernel must not remember it"
    assert calls.is_back(CALLER, FILE)
    calls = sent()
    looks: tuple[Look, ...] = ((NAME, None), (NAME, DIRECTORY), (below, None))
    for entry, found in (*looks, (below, None)):
        calls.note_lookup(CALLER, entry, found)
    assert not calls.note_lookup(CALLER, below, FILE)
    assert calls.is_back(CALLER, FILE)
    calls = sent()
    for entry, found in looks:
        calls.note_lookup(CALLER, entry, found)
    assert calls.is_back_in_vain(CALLER)


async def test_a_call_does_not_look_up_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sent_back, "LOOKUPS_MAX", 3)
    calls = sent()
    calls.note_lookup(CALLER, NAME, None)
    answers = [calls.note_lookup(CALLER, NAME, FILE) for _ in range(4)]
    assert answers == [False, False, False, True]
    assert not calls.is_back(CALLER, FILE)


async def test_a_call_without_a_name_is_back_without_a_lookup() -> None:
    calls = SentBack()
    for inode, is_back in ((DIRECTORY, False), (FILE, True)):
        with pytest.raises(StaleHandle):
            calls.send(CALLER, FILE)
        assert calls.is_back(CALLER, inode) is is_back


async def test_a_call_that_opens_a_directory_is_back_at_one_that_no_lookup_shows() -> None:
    """`latest` is a symlink to "." by now."""
    calls = sent()
    calls.note_lookup(CALLER, NAME, FILE)
    assert calls.is_back_in_a_directory(CALLER)
    assert not calls.is_back_in_a_directory(CALLER), "told once"
    calls = sent()
    calls.note_lookup(CALLER, NAME, None)
    assert not calls.is_back_in_a_directory(CALLER)


async def test_a_link_is_back_though_its_new_name_was_looked_up_since() -> None:
    calls = sent()
    for found in (FILE, DIRECTORY, None):
        calls.note_lookup(CALLER, NAME, found)
    assert calls.is_back_on_the_way(CALLER, FILE)


async def test_who_does_not_come_back_is_forgotten(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = sent()
    await trio.sleep(sent_back.SENT_BACK_SECONDS * 0.9)
    calls.note_lookup(CALLER, NAME, DIRECTORY)
    await trio.sleep(sent_back.SENT_BACK_SECONDS * 0.9)
    calls.note_lookup(CALLER, NAME, FILE)  # it waited for locks
    await trio.sleep(sent_back.SENT_BACK_SECONDS * 1.1)
    assert not calls.is_back(CALLER, FILE)
    monkeypatch.setattr(sent_back, "SENT_BACK_MAX", 1)
    calls = sent()
    with pytest.raises(StaleHandle):
        calls.send(OTHER)
    calls.note_lookup(CALLER, NAME, FILE)
    assert not calls.is_back(CALLER, FILE)
