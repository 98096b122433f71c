"""Every change of the namespace, as one guarded transaction.

Each function looks at the mirror and returns a `Plan`: a transaction that compares the revision
of every key that the decision rests on, and what the change means if it goes through. It raises a
`NamespaceError` where POSIX refuses. Nothing here waits: the driver commits the plan, and makes it
anew if a comparison failed because somebody else was faster.

Rules:
1. A change compares at least one key that it also writes, so that sending it twice does it once.
2. A name is only put into a directory whose inode key still exists (its create revision is
   compared), and a directory is only removed while its range of names is empty: so no name is
   ever orphaned.
3. Moves of directories between directories all put one key, `keys.DIRMOVE`, and compare it: so of
   two moves that would together make a cycle the second one sees the first.
4. A commit of contents compares the lease (the fencing token) and the inode: so a writer that lost
   its lease, or never had the latest version, commits nothing.

With a `Keep`, whatever makes a name stop showing some contents also puts what it showed into the
name's history (see `history`); without one nothing is kept.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from msgspec.structs import replace

from modelfs import keys
from modelfs.attributes import AttributeChange, changed_attributes
from modelfs.errors import (
    DirectoryNotEmpty,
    EntryExists,
    InvalidMove,
    IsDirectory,
    NoSuchEntry,
    NotDirectory,
    NotPermitted,
    TooManyLinks,
    WriteLost,
)
from modelfs.history import DELETED, KEPT_BYTES_MAX, NAMES_KEPT_MAX, REPLACED, REWRITTEN
from modelfs.ids import InodeNumber, NodeId, Revision
from modelfs.inode import Dentry, Inode, Policy, check_name, encode, encode_dirtime
from modelfs.limits import LINKS_MAX
from modelfs.mirror import Child, Mirror, Name, Row
from modelfs.policy import Keep, next_base
from modelfs.ports import Compare, Delete, Put, Target, Txn

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Plan(Generic[Result]):
    """A transaction and what it means. A plan without operations needs no commit."""

    txn: Txn
    result: Result


@dataclass(slots=True)
class _Draft:
    """A transaction in the making. A key is written once: the last put of it counts."""

    compares: list[Compare] = field(default_factory=list)
    ops: dict[bytes, Put | Delete] = field(default_factory=dict)

    def unchanged(self, key: bytes, row: Row | Child | None) -> None:
        revision = row.mod_revision if row else Revision(0)
        self.compares.append(Compare(key, Target.MOD, revision))

    def still_there(self, key: bytes, row: Row) -> None:
        self.compares.append(Compare(key, Target.CREATE, row.create_revision))

    def absent(self, key: bytes) -> None:
        self.compares.append(Compare(key, Target.CREATE, Revision(0)))

    def put(self, key: bytes, value: bytes, lease: int = 0) -> None:
        self.ops[key] = Put(key, value, lease)

    def delete(self, key: bytes) -> None:
        self.ops[key] = Delete(key)

    def keep(
        self, keep: Keep | None, mirror: Mirror, name: Name, ino: InodeNumber, why: str, now_ns: int
    ) -> int:
        """Put what a name shows now into its history; returns how many bytes that takes.

        The caller compares the dentry or inode.
        """
        record, size_bytes = mirror.inode(ino), 0
        if keep is not None and record is not None:
            for key, value in keep.entry(mirror, name, ino, record, why, now_ns):
                self.put(key, value)
                size_bytes += len(key) + len(value)
        return size_bytes

    def plan(self, result: Result) -> Plan[Result]:
        return Plan(Txn(tuple(self.compares), tuple(self.ops.values())), result)


def _require(mirror: Mirror, ino: InodeNumber) -> tuple[Row, Inode]:
    row, record = mirror.inode_row(ino), mirror.inode(ino)
    if row is None or record is None:
        raise NoSuchEntry(ino)
    return row, record


def _require_directory(mirror: Mirror, ino: InodeNumber) -> Row:
    row, record = _require(mirror, ino)
    if not record.is_directory:
        raise NotDirectory(ino)
    return row


def _require_child(mirror: Mirror, parent: InodeNumber, name: bytes) -> Child:
    _require_directory(mirror, parent)
    child = mirror.child(parent, check_name(name))
    if child is None:
        raise NoSuchEntry(name)
    return child


def _touch(draft: _Draft, directory: InodeNumber, now_ns: int) -> None:
    draft.put(keys.dirtime(directory), encode_dirtime(now_ns, now_ns))


def _link_name(
    draft: _Draft, mirror: Mirror, name: Name, ino: InodeNumber, record: Inode, now_ns: int
) -> None:
    draft.still_there(keys.inode(name[0]), _require_directory(mirror, name[0]))
    dentry = Dentry(ino, record.kind, next_base(mirror, *name, record.version))
    draft.put(keys.dentry(*name), encode(dentry))
    _touch(draft, name[0], now_ns)


def _drop_name(
    draft: _Draft, mirror: Mirror, gone: Name, keep: Keep | None, why: str, now_ns: int
) -> InodeNumber:
    """Take a name away, and the inode with its last name. The name's key is left to the caller."""
    parent, name = gone
    child = _require_child(mirror, parent, name)
    row, record = _require(mirror, child.ino)
    draft.keep(keep, mirror, gone, child.ino, why, now_ns)
    draft.unchanged(keys.dentry(parent, name), child)
    if record.is_directory:
        start, end = keys.dentries(child.ino)
        if mirror.children.get(child.ino):
            raise DirectoryNotEmpty(name)
        draft.compares.append(Compare(start, Target.CREATE, Revision(0), end))
        draft.delete(keys.inode(child.ino))
        draft.delete(keys.dirtime(child.ino))
    else:
        draft.unchanged(keys.inode(child.ino), row)
        if record.nlink > 1:
            left = replace(record, nlink=record.nlink - 1, ctime_ns=now_ns)
            draft.put(keys.inode(child.ino), encode(left))
        else:
            draft.delete(keys.inode(child.ino))
    return child.ino


# ---------------------------------------------------------------- names


@dataclass(frozen=True, slots=True)
class Claim:
    """The wish to be the writer of a new file from its first moment on."""

    node: NodeId
    etcd_lease: int


def create(
    mirror: Mirror,
    parent: InodeNumber,
    name: bytes,
    ino: InodeNumber,
    record: Inode,
    claim: Claim | None = None,
) -> Plan[Inode]:
    """A new inode under a new name, with its lease if there is a claim. Raises `EntryExists`."""
    _require_directory(mirror, parent)
    if mirror.child(parent, check_name(name)) is not None:
        raise EntryExists(name)
    draft = _Draft()
    draft.absent(keys.dentry(parent, name))
    draft.absent(keys.inode(ino))  # should the counter of numbers ever be damaged: no other's
    draft.put(keys.inode(ino), encode(record))
    _link_name(draft, mirror, (parent, name), ino, record, record.ctime_ns)
    if record.is_directory:
        _touch(draft, ino, record.ctime_ns)
    if claim is not None:
        draft.put(keys.lease(ino), claim.node.encode("ascii"), claim.etcd_lease)
    return draft.plan(record)


def link(
    mirror: Mirror, ino: InodeNumber, parent: InodeNumber, name: bytes, now_ns: int
) -> Plan[Inode]:
    """A further name for an inode. Raises `EntryExists`, `NotPermitted` for a directory."""
    row, record = _require(mirror, ino)
    _require_directory(mirror, parent)
    if record.is_directory:
        raise NotPermitted(ino)
    if mirror.child(parent, check_name(name)) is not None:
        raise EntryExists(name)
    if record.nlink >= LINKS_MAX:
        raise TooManyLinks(ino)
    linked = replace(record, nlink=record.nlink + 1, ctime_ns=now_ns)
    draft = _Draft()
    draft.absent(keys.dentry(parent, name))
    draft.unchanged(keys.inode(ino), row)
    draft.put(keys.inode(ino), encode(linked))
    _link_name(draft, mirror, (parent, name), ino, record, now_ns)
    return draft.plan(linked)


def remove(
    mirror: Mirror,
    parent: InodeNumber,
    name: bytes,
    directory: bool,
    now_ns: int,
    keep: Keep | None = None,
) -> Plan[InodeNumber]:
    """unlink, or rmdir if `directory`. The result is the inode that lost the name."""
    child = _require_child(mirror, parent, name)
    if directory and not stat.S_ISDIR(child.kind):
        raise NotDirectory(name)
    if not directory and stat.S_ISDIR(child.kind):
        raise IsDirectory(name)
    draft = _Draft()
    ino = _drop_name(draft, mirror, (parent, name), keep, DELETED, now_ns)
    draft.delete(keys.dentry(parent, name))
    _touch(draft, parent, now_ns)
    return draft.plan(ino)


@dataclass(frozen=True, slots=True)
class Renamed:
    """What a rename did. `replaced` is the inode that lost the new name."""

    ino: InodeNumber
    replaced: InodeNumber | None


def rename(
    mirror: Mirror,
    source: tuple[InodeNumber, bytes],
    target: tuple[InodeNumber, bytes],
    keep_existing: bool,
    now_ns: int,
    keep: Keep | None = None,
) -> Plan[Renamed]:
    """Move a name, onto an existing one of the same type if need be.

    Raises `EntryExists` if `keep_existing` (RENAME_NOREPLACE), and as rename(2) says.
    """
    moving = _require_child(mirror, *source)
    row, record = _require(mirror, moving.ino)
    _require_directory(mirror, target[0])
    present = mirror.child(target[0], check_name(target[1]))
    if present is not None and keep_existing:
        raise EntryExists(target[1])
    if record.is_directory and mirror.is_inside(target[0], moving.ino):
        raise InvalidMove(target[1])
    if present is not None and present.ino == moving.ino:
        return Plan(Txn((), ()), Renamed(moving.ino, None))  # two names of one file: do nothing
    if present is not None and record.is_directory and not stat.S_ISDIR(present.kind):
        raise NotDirectory(target[1])
    if present is not None and not record.is_directory and stat.S_ISDIR(present.kind):
        raise IsDirectory(target[1])
    draft = _Draft()
    draft.unchanged(keys.dentry(*source), moving)
    draft.unchanged(keys.inode(moving.ino), row)
    if present is None:
        draft.absent(keys.dentry(*target))
    else:
        _drop_name(draft, mirror, target, keep, REPLACED, now_ns)
    draft.delete(keys.dentry(*source))
    draft.put(keys.inode(moving.ino), encode(replace(record, ctime_ns=now_ns)))
    _touch(draft, source[0], now_ns)
    _link_name(draft, mirror, target, moving.ino, record, now_ns)
    if record.is_directory and source[0] != target[0]:
        draft.unchanged(keys.DIRMOVE, mirror.other(keys.DIRMOVE))
        draft.put(keys.DIRMOVE, b"")
    return draft.plan(Renamed(moving.ino, present.ino if present else None))


# ---------------------------------------------------------------- inodes


def set_attributes(
    mirror: Mirror, ino: InodeNumber, change: AttributeChange, editor: NodeId, now_ns: int
) -> Plan[Inode]:
    """chmod, chown, utimens. A new mtime of a file is a new view of it."""
    row, record = _require(mirror, ino)
    draft = _Draft()
    changed = changed_attributes(record, change, now_ns)
    if change.mtime_ns is not None and record.is_directory:
        draft.put(keys.dirtime(ino), encode_dirtime(change.mtime_ns, now_ns))
    elif changed.mtime_ns != record.mtime_ns:
        changed = replace(changed, touches=record.touches + 1, editor=editor)
    draft.unchanged(keys.inode(ino), row)
    draft.put(keys.inode(ino), encode(changed))
    return draft.plan(changed)


def commit_contents(
    mirror: Mirror,
    ino: InodeNumber,
    token: Revision,
    base_version: int,
    contents: Inode,
    now_ns: int,
    keep: Keep | None = None,
) -> Plan[Inode]:
    """The next version of a file: size, contents and mtime of `contents`, the rest as it is now.

    The version before goes into its names' history, unless it is empty: such a one stands between
    a create, or the kernel's O_TRUNC, and the first commit.

    `base_version` is the version that the writer started from. Raises `NoSuchEntry` if the file
    is gone, and `WriteLost` if the lease is no longer the one with this fencing token or another
    version has come between: then the writer's bytes must not be committed, ever.
    """
    row, record = _require(mirror, ino)
    lease = mirror.lease(ino)
    if lease is None or lease[1] != token:
        raise WriteLost(ino, "its lease has lapsed")
    if record.version != base_version:
        raise WriteLost(ino, f"version {record.version} has replaced version {base_version}")
    committed = replace(
        record,
        version=record.version + 1,
        size=contents.size,
        inline=contents.inline,
        manifest=contents.manifest,
        chunk_bytes=contents.chunk_bytes,
        hole_bytes=contents.hole_bytes,
        mtime_ns=contents.mtime_ns,
        editor=contents.editor,
        ctime_ns=now_ns,
    )
    draft = _Draft()
    draft.compares.append(Compare(keys.lease(ino), Target.CREATE, token))
    draft.unchanged(keys.inode(ino), row)
    draft.put(keys.inode(ino), encode(committed))
    if record.size:
        room_bytes = KEPT_BYTES_MAX
        for name in sorted(mirror.names.get(ino, ()))[:NAMES_KEPT_MAX]:
            if room_bytes > 0:
                room_bytes -= draft.keep(keep, mirror, name, ino, REWRITTEN, now_ns)
    return draft.plan(committed)


def set_policy(
    mirror: Mirror, ino: InodeNumber, policy: Policy | None, replicas: int | None = None
) -> Plan[Inode]:
    """What an inode's policy is from now on, and of a file how many replicas it has."""
    row, record = _require(mirror, ino)
    changed = replace(record, policy=policy, replicas=replicas or record.replicas)
    draft = _Draft()
    draft.unchanged(keys.inode(ino), row)
    draft.put(keys.inode(ino), encode(changed))
    return draft.plan(changed)


def take_lease(mirror: Mirror, ino: InodeNumber, node: NodeId, etcd_lease: int) -> Plan[None]:
    """The right to write a file. Raises `EntryExists` if somebody has it."""
    row, _ = _require(mirror, ino)
    if mirror.lease(ino) is not None:
        raise EntryExists(ino)
    draft = _Draft()
    draft.still_there(keys.inode(ino), row)
    draft.absent(keys.lease(ino))
    draft.put(keys.lease(ino), node.encode("ascii"), etcd_lease)
    return draft.plan(None)


def drop_leases(mirror: Mirror, tokens: Mapping[InodeNumber, Revision]) -> Plan[None]:
    """Give back the right to write some files; nothing to do where it is not ours any more."""
    draft = _Draft()
    for ino, token in tokens.items():
        held = mirror.lease(ino)
        if held is not None and held[1] == token:
            draft.compares.append(Compare(keys.lease(ino), Target.CREATE, token))
            draft.delete(keys.lease(ino))
    return draft.plan(None)
