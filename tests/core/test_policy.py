"""Policies: what directories hand down, and how long an entry of the history stays."""

from __future__ import annotations

import stat
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfs import keys
from modelfs.errors import UserError
from modelfs.history import Retained
from modelfs.ids import ROOT_INODE, InodeNumber, Revision
from modelfs.inode import Dentry, Inode, Policy, decode_inode, encode
from modelfs.limits import CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, REPLICAS_MAX
from modelfs.mirror import Mirror
from modelfs.policy import (
    NANOSECONDS,
    GoneDirectories,
    Rules,
    check_policy,
    expires_ns,
    policies_above,
    rules_of,
)
from modelfs.ports import Event

DEFAULTS = Rules(replicas=2, retain_seconds=3600.0, chunk_bytes=1 << 22)
policies = st.builds(
    Policy,
    replicas=st.none() | st.integers(1, REPLICAS_MAX),
    retain_seconds=st.none() | st.floats(0, 1e6),
    chunk_bytes=st.none() | st.sampled_from([1 << n for n in range(18, 27)]),
)


def an_inode(kind: int, policy: Policy | None = None) -> Inode:
    times: dict[str, Any] = dict.fromkeys(("atime_ns", "mtime_ns", "ctime_ns"), 1)
    return Inode(mode=kind, uid=0, gid=0, policy=policy, **times)


def a_chain(chain: list[Policy | None]) -> Mirror:
    """A mirror of directories, each in the one before; inode numbers from 1."""
    mirror, events = Mirror(), []
    for number, policy in enumerate(chain, 1):
        ino, record = InodeNumber(number), an_inode(stat.S_IFDIR, policy)
        events.append((keys.inode(ino), encode(record)))
        if number > 1:
            dentry = encode(Dentry(number, stat.S_IFDIR))
            events.append((keys.dentry(InodeNumber(number - 1), b"d"), dentry))
    mirror.apply(Event(key, value, Revision(1), Revision(1)) for key, value in events)
    return mirror


@given(st.lists(st.none() | policies, min_size=1, max_size=6))
def test_each_field_comes_from_the_nearest_directory_that_sets_it(
    chain: list[Policy | None],
) -> None:
    mirror = a_chain(chain)
    rules = rules_of(mirror, InodeNumber(len(chain)), DEFAULTS)
    for field in ("replicas", "retain_seconds", "chunk_bytes"):
        values = [getattr(policy, field) for policy in chain if policy is not None]
        values = [value for value in values if value is not None]
        assert getattr(rules, field) == (values[-1] if values else getattr(DEFAULTS, field))
    above = [ino for ino, _ in policies_above(mirror, InodeNumber(len(chain)))]
    assert above == [n for n in range(len(chain), 0, -1) if chain[n - 1] is not None]


@given(policies)
def test_a_policy_survives_its_record(policy: Policy) -> None:
    record = an_inode(stat.S_IFDIR, check_policy(policy))
    assert decode_inode(encode(record)) == record


@pytest.mark.parametrize(
    ("policy", "complaint"),
    [
        (Policy(replicas=0), "1 to 16"),
        (Policy(replicas=REPLICAS_MAX + 1), "1 to 16"),
        (Policy(chunk_bytes=3 << 20), "a power of two from 256 KiB to 64 MiB"),
        (Policy(chunk_bytes=CHUNK_BYTES_MIN // 2), "a power of two"),
        (Policy(chunk_bytes=CHUNK_BYTES_MAX * 2), "a power of two"),
        (Policy(chunk_bytes=0), "a power of two"),
        (Policy(retain_seconds=-1.0), "not a retention"),
        (Policy(retain_seconds=float("nan")), "not a retention"),
    ],
)
def test_what_cannot_be_is_refused_in_words(policy: Policy, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        check_policy(policy)


def an_entry(record: Inode, ino: int = 99, superseded_ns: int = 0, seconds: float = 5) -> Retained:
    return Retained(
        ino=ino,
        record=record,
        superseded_ns=superseded_ns,
        why="deleted",
        node="",
        retain_seconds=seconds,
    )


def lives_seconds(
    mirror: Mirror, parent: int, entry: Retained, gone: GoneDirectories | None = None
) -> float:
    ends_ns = expires_ns(mirror, InodeNumber(parent), entry, gone or GoneDirectories(), DEFAULTS)
    return (ends_ns - entry.superseded_ns) / NANOSECONDS


def test_a_retention_that_is_changed_counts_for_what_is_superseded_already() -> None:
    entry = an_entry(an_inode(stat.S_IFREG))
    assert lives_seconds(a_chain([None, None]), 2, entry) == DEFAULTS.retain_seconds
    assert lives_seconds(a_chain([Policy(retain_seconds=70), None]), 2, entry) == 70


def test_a_file_s_own_retention_goes_first_and_is_that_of_today_if_it_lives() -> None:
    mirror = a_chain([Policy(retain_seconds=70)])
    own = an_inode(stat.S_IFREG, Policy(retain_seconds=3))
    assert lives_seconds(mirror, 1, an_entry(own)) == 3
    alive = encode(an_inode(stat.S_IFREG, Policy(retain_seconds=4)))
    mirror.apply([Event(keys.inode(InodeNumber(99)), alive, Revision(2), Revision(2))])
    assert lives_seconds(mirror, 1, an_entry(own)) == 4


def test_below_removed_directories_the_policies_of_the_way_still_count() -> None:
    mirror = a_chain([Policy(retain_seconds=70)])
    gone = GoneDirectories()
    outer, inner = 50, 51
    file = an_entry(an_inode(stat.S_IFREG))
    assert lives_seconds(mirror, inner, file, gone) == file.retain_seconds  # the way is unknown
    gone.add(InodeNumber(outer), an_entry(an_inode(stat.S_IFDIR), inner))
    assert lives_seconds(mirror, inner, file, gone) == file.retain_seconds
    gone.add(ROOT_INODE, an_entry(an_inode(stat.S_IFDIR), outer))
    assert lives_seconds(mirror, inner, file, gone) == 70
    week = an_inode(stat.S_IFDIR, Policy(retain_seconds=700))
    gone.add(ROOT_INODE, an_entry(week, outer, superseded_ns=1))  # restored, set, removed again
    assert lives_seconds(mirror, inner, file, gone) == 700
    assert lives_seconds(mirror, 1, an_entry(week, outer)) == 700  # the directory itself too
    assert lives_seconds(mirror, 7, file, gone) == file.retain_seconds


def test_directories_that_seem_to_lie_in_each_other_end_the_search() -> None:
    gone = GoneDirectories()
    gone.add(InodeNumber(50), an_entry(an_inode(stat.S_IFDIR), 51))
    gone.add(InodeNumber(51), an_entry(an_inode(stat.S_IFDIR), 50))
    assert gone.retain_seconds(a_chain([None]), InodeNumber(50), DEFAULTS) is None
