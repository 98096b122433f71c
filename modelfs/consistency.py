"""Consistency: whether names and inodes fit each other, and what mends them without guessing.

Every change of the namespace keeps them fitting (`changes`), and the mirror takes whole revisions.
So what is found here at any instant is damage: a record that was put or deleted by something else,
or lost. Each fault is looked for in one name, or one inode, so a walk over all of them may be
interrupted by changes. Records that cannot be read are no faults of this kind: `Mirror.unreadable`
has them, and nothing is concluded from what they may have said.

Nothing that leads to contents is ever deleted. What is mended, and from what it follows:

- A name of an inode that is not there is deleted: it leads to nothing, and nobody could remove it.
- The type in a name, and the count of links in a file's record, are made what the inode and its
  names say.
- An inode without a name gets one in `/lost+found`; a file that somebody is writing is left alone.
- A name in a directory that is not there is deleted if the inode has another name that can be
  reached; else the inode is without a name.

Directories with two names, and those that lie in each other, are left to people.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from msgspec.structs import replace

from modelfs import keys
from modelfs.ids import ROOT_INODE, InodeNumber, Revision
from modelfs.inode import Dentry, encode, encode_dirtime
from modelfs.limits import LINKS_MAX
from modelfs.mirror import NO_INODE, Child, Mirror, Name, Row
from modelfs.policy import next_base
from modelfs.ports import Compare, Delete, Put, Target, Txn

LOST_FOUND = b"lost+found"  # in the root, as e2fsck has it
NAMES_MOVED_MAX = 50  # of one inode, in one transaction


class FaultKind(Enum):
    """What is wrong."""

    NO_INODE = "a name of an inode that is not there"
    OTHER_TYPE = "a name that says another file type than its inode"
    NO_DIRECTORY = "a name in a directory that is not there"
    NO_NAME = "an inode without a name"
    LINK_COUNT = "a count of links that differs from the number of names"
    MANY_NAMES = "a directory with several names"
    CIRCLE = "a directory that lies in itself"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. `name` is the name that it is about, if it is about one."""

    kind: FaultKind
    ino: InodeNumber
    name: Name | None = None


def fault_of_name(mirror: Mirror, name: Name) -> Fault | None:
    """What is wrong with a name."""
    child = mirror.child(*name)
    if child is None or child.ino == NO_INODE:
        return None
    if not _is_directory(mirror, name[0]):
        is_reachable = bool(reachable_names(mirror, child.ino))
        if is_reachable or mirror.inode_row(child.ino) is None:
            return Fault(FaultKind.NO_DIRECTORY, child.ino, name)
        return None  # then its inode is without a name
    if mirror.inode_row(child.ino) is None:
        return Fault(FaultKind.NO_INODE, child.ino, name)
    record = mirror.readable_inode(child.ino)
    if record is not None and record.kind != child.kind:
        return Fault(FaultKind.OTHER_TYPE, child.ino, name)
    return None


def fault_of_inode(mirror: Mirror, ino: InodeNumber) -> Fault | None:
    """What is wrong with an inode, its names aside."""
    record = mirror.readable_inode(ino)
    if record is None or ino == ROOT_INODE:
        return None
    names = reachable_names(mirror, ino)
    if not names:
        return None if mirror.lease(ino) is not None else Fault(FaultKind.NO_NAME, ino)
    if not record.is_directory:
        return Fault(FaultKind.LINK_COUNT, ino) if record.nlink != len(names) else None
    if len(names) > 1:
        return Fault(FaultKind.MANY_NAMES, ino)
    return Fault(FaultKind.CIRCLE, ino) if _is_in_circle(mirror, ino) else None


def describe(mirror: Mirror, fault: Fault) -> str:
    """What is wrong, in words."""
    record = mirror.readable_inode(fault.ino)
    if fault.kind is FaultKind.LINK_COUNT and record is not None:
        names = len(reachable_names(mirror, fault.ino))
        return f"{fault.kind.value}: {record.nlink} and {names} (inode {fault.ino})"
    return f"{fault.kind.value} (inode {fault.ino})"


def reachable_names(mirror: Mirror, ino: InodeNumber) -> list[Name]:
    """The names of an inode in directories that are there."""
    return sorted(name for name in mirror.names.get(ino, ()) if _is_directory(mirror, name[0]))


def _is_directory(mirror: Mirror, ino: InodeNumber) -> bool:
    """Whether this is a directory, or may be one, since its record cannot be read."""
    record = mirror.readable_inode(ino)
    return record.is_directory if record is not None else mirror.is_unreadable(ino)


def _is_in_circle(mirror: Mirror, ino: InodeNumber) -> bool:
    *_, last = mirror.upwards(ino)
    return last != ROOT_INODE and mirror.parent_of(last) is not None


# ---------------------------------------------------------------- mending


def mend(mirror: Mirror, fault: Fault, lost_found: InodeNumber | None, now_ns: int) -> Txn | None:
    """The transaction that mends a fault; None if that would be a guess, or it is gone already.

    `lost_found` is the directory for inodes without a name, where there is one.
    """
    if fault.kind in (FaultKind.NO_INODE, FaultKind.NO_DIRECTORY) and fault.name:
        return _without_name(mirror, fault, now_ns)
    if fault.kind is FaultKind.OTHER_TYPE and fault.name:
        return _with_type(mirror, fault)
    if not are_names_known(mirror):
        return None
    if fault.kind is FaultKind.LINK_COUNT:
        return _with_count(mirror, fault)
    if fault.kind is FaultKind.NO_NAME and lost_found is not None:
        return _with_name(mirror, fault, lost_found, now_ns)
    return None


def are_names_known(mirror: Mirror) -> bool:
    """Whether no name's record is unreadable: such a one may be any inode's."""
    return not any(key.startswith(keys.DENTRY_PREFIX) for key in mirror.unreadable)


def _unchanged(key: bytes, row: Row | Child) -> Compare:
    return Compare(key, Target.MOD, row.mod_revision)


def _absent(key: bytes) -> Compare:
    return Compare(key, Target.CREATE, Revision(0))


def _without_name(mirror: Mirror, fault: Fault, now_ns: int) -> Txn | None:
    """Delete a name, as long as it leads to nothing, or to what can be reached by another one."""
    assert fault.name is not None
    child = mirror.child(*fault.name)
    if child is None or fault_of_name(mirror, fault.name) != fault:
        return None
    key, parent = keys.dentry(*fault.name), keys.inode(fault.name[0])
    compares = [_unchanged(key, child)]
    ops: list[Put | Delete] = [Delete(key)]
    if fault.kind is FaultKind.NO_INODE:
        compares.append(_absent(keys.inode(child.ino)))
        ops.append(Put(keys.dirtime(fault.name[0]), encode_dirtime(now_ns, now_ns)))
    elif mirror.inode_row(fault.name[0]) is None:
        compares.append(_absent(parent))
        for name in reachable_names(mirror, child.ino)[:1]:
            other = mirror.child(*name)
            assert other is not None
            compares.append(_unchanged(keys.dentry(*name), other))
    else:
        return None  # a name "in" a file: whoever made that knows more
    return Txn(tuple(compares), tuple(ops))


def _with_type(mirror: Mirror, fault: Fault) -> Txn | None:
    assert fault.name is not None
    child, row = mirror.child(*fault.name), mirror.inode_row(fault.ino)
    record = mirror.readable_inode(fault.ino)
    if child is None or row is None or record is None or child.ino != fault.ino:
        return None
    key = keys.dentry(*fault.name)
    put = Put(key, encode(Dentry(child.ino, record.kind, child.base)))
    return Txn((_unchanged(key, child), _unchanged(keys.inode(fault.ino), row)), (put,))


def _with_count(mirror: Mirror, fault: Fault) -> Txn | None:
    """Every change of a file's names puts its record too, so to compare that one is enough."""
    row, record = mirror.inode_row(fault.ino), mirror.readable_inode(fault.ino)
    count = len(reachable_names(mirror, fault.ino))
    if row is None or record is None or not 1 <= count <= LINKS_MAX or record.nlink == count:
        return None
    if count != len(mirror.names.get(fault.ino, ())):
        return None  # first the names that cannot be reached
    key = keys.inode(fault.ino)
    return Txn((_unchanged(key, row),), (Put(key, encode(replace(record, nlink=count))),))


def _with_name(mirror: Mirror, fault: Fault, lost_found: InodeNumber, now_ns: int) -> Txn | None:
    """A name in lost+found, in place of those that cannot be reached."""
    row, record = mirror.inode_row(fault.ino), mirror.readable_inode(fault.ino)
    above = mirror.inode_row(lost_found)
    name = lost_found, b"#%d" % fault.ino
    stray = sorted(mirror.names.get(fault.ino, ()))
    if row is None or record is None or above is None or len(stray) > NAMES_MOVED_MAX:
        return None
    if fault_of_inode(mirror, fault.ino) != fault or mirror.child(*name) is not None:
        return None
    if record.is_directory and mirror.is_inside(lost_found, fault.ino):
        return None
    key, own = keys.dentry(*name), keys.inode(fault.ino)
    compares = [
        _absent(key),
        _absent(keys.lease(fault.ino)),
        Compare(keys.inode(lost_found), Target.CREATE, above.create_revision),
        _unchanged(own, row),
    ]
    base = next_base(mirror, *name, record.version)
    ops: list[Put | Delete] = [
        Put(key, encode(Dentry(fault.ino, record.kind, base))),
        Put(own, encode(record if record.is_directory else replace(record, nlink=1))),
        Put(keys.dirtime(lost_found), encode_dirtime(now_ns, now_ns)),
    ]
    for one in stray:
        child = mirror.child(*one)
        assert child is not None
        compares += [_unchanged(keys.dentry(*one), child), _absent(keys.inode(one[0]))]
        ops.append(Delete(keys.dentry(*one)))
    return Txn(tuple(dict.fromkeys(compares)), tuple(ops))
