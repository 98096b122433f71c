"""Where things are in etcd. The only description of the key space; keys follow the cluster prefix.

cluster                 who we are: id and name of the cluster, format of the records
inode/<ino>             Inode                        <ino>: 10 hex digits
dentry/<parent>/<name>  Dentry                       <name>: the raw bytes of the name
dirtime/<ino>           mtime and ctime of a directory
lease/<ino>             the node that may write the file; bound to that node's etcd lease
node/<id>               NodeRecord; bound to the node's etcd lease, which is its heartbeat
map/<epoch>             PlacementMap                 <epoch>: 8 hex digits
pin/<id>/<manifest>     Pin: a version that a node has open, though it is superseded or unlinked;
                        bound to that node's etcd lease          <manifest>: 64 hex digits
history/<parent>/<name>\\0<number>
                        Retained: what a name showed before             <number>: 8 hex digits
inodes                  how many blocks of inode numbers have been handed out
dirmove                 put by every move of a directory between directories, to serialise them
seq                     put by every transaction, with the id of the operation
security/trust          Trust: the authorities of the cluster, and who signs   (modelfsd.rotation)
security/revoked/<id>   Removed: a node that was removed, for good
security/at/<id>        the step of Trust that a node has taken, decimal
security/token/<id>     TokenRecord: what is kept of a join token; bound to a lease of its own
etcd-join               held by a node while it joins etcd as a member

Whoever takes a key apart is told by a `ProtocolError` that it is not one of ours. There is one way
to write each key: else `inode/1` and `inode/0000000001` would be two records of one inode.
"""

from __future__ import annotations

import re

from modelfs.errors import ProtocolError
from modelfs.ids import Epoch, InodeNumber, NodeId, is_node_id
from modelfs.limits import NAME_BYTES_MAX

CLUSTER = b"cluster"
SEQ = b"seq"
INODES = b"inodes"
DIRMOVE = b"dirmove"
ETCD_JOIN = b"etcd-join"
TRUST = b"security/trust"

INODE_PREFIX = b"inode/"
DENTRY_PREFIX = b"dentry/"
DIRTIME_PREFIX = b"dirtime/"
LEASE_PREFIX = b"lease/"
NODE_PREFIX = b"node/"
MAP_PREFIX = b"map/"
PIN_PREFIX = b"pin/"
HISTORY_PREFIX = b"history/"
SECURITY_PREFIX = b"security/"
REVOKED_PREFIX = b"security/revoked/"

_INO = re.compile(rb"[0-9a-f]{10}")
_EPOCH = re.compile(rb"[0-9a-f]{8}|[1-9a-f][0-9a-f]{8,13}")
_NAMED = re.compile(rb"([0-9a-f]{10})/([^/\0]+)")
_RETAINED = re.compile(rb"([0-9a-f]{10})/([^/\0]+)\0([0-9a-f]{8}|[1-9a-f][0-9a-f]{8,13})")
_PIN = re.compile(rb"([0-9a-f]{16})/([0-9a-f]{64})")


def inode(ino: InodeNumber) -> bytes:
    """The key of an inode's record."""
    return b"inode/%010x" % ino


def dirtime(ino: InodeNumber) -> bytes:
    """The key of a directory's times."""
    return b"dirtime/%010x" % ino


def lease(ino: InodeNumber) -> bytes:
    """The key of the right to write a file."""
    return b"lease/%010x" % ino


def dentry(parent: InodeNumber, name: bytes) -> bytes:
    """The key of a name."""
    return b"dentry/%010x/%b" % (parent, name)


def dentries(parent: InodeNumber) -> tuple[bytes, bytes]:
    """The range [start, end) of all names in a directory."""
    return b"dentry/%010x/" % parent, b"dentry/%010x0" % parent  # "0" follows "/"


def node(node_id: NodeId) -> bytes:
    """The key of a living node."""
    return NODE_PREFIX + node_id.encode("ascii")


def revoked(node_id: NodeId) -> bytes:
    """The key that refuses a node."""
    return REVOKED_PREFIX + node_id.encode("ascii")


def trust_step(node_id: NodeId) -> bytes:
    """The key that says how far a node has followed a change of the authority."""
    return b"security/at/" + node_id.encode("ascii")


def revoked_node(key: bytes) -> NodeId | None:
    """The node that a key refuses; None if it is another key."""
    if not key.startswith(REVOKED_PREFIX):
        return None
    node_id = key[len(REVOKED_PREFIX) :].decode("ascii", "replace")
    return NodeId(node_id) if is_node_id(node_id) else None


def node_of(key: bytes) -> NodeId:
    """The node in the key of a living one."""
    node_id = key[len(NODE_PREFIX) :].decode("ascii", "replace")
    if not is_node_id(node_id):
        raise ProtocolError("a key without the id of a node")
    return NodeId(node_id)


def token(token_id: bytes) -> bytes:
    """The key of a join token's record."""
    return b"security/token/" + token_id.hex().encode("ascii")


def placement_map(epoch: Epoch) -> bytes:
    """The key of a placement map."""
    return b"map/%08x" % epoch


def epoch_of(key: bytes) -> Epoch:
    """The epoch in the key of a placement map."""
    if not _EPOCH.fullmatch(key, len(MAP_PREFIX)):
        raise ProtocolError("a key without an epoch")
    return Epoch(int(key[len(MAP_PREFIX) :], 16))


def pin(node_id: NodeId, manifest: bytes) -> bytes:
    """The key of a node's pin on a manifest, given its chunk id."""
    return PIN_PREFIX + f"{node_id}/{manifest.hex()}".encode("ascii")


def split_pin(key: bytes) -> tuple[NodeId, bytes]:
    """(node, chunk id of the manifest) of a pin's key."""
    parts = _PIN.fullmatch(key, len(PIN_PREFIX))
    if parts is None:
        raise ProtocolError("a key of no pin")
    return NodeId(parts[1].decode("ascii")), bytes.fromhex(parts[2].decode("ascii"))


def history_of(parent: InodeNumber, name: bytes) -> bytes:
    """What the keys of a name's history begin with; no other name's do."""
    return b"history/%010x/%b\0" % (parent, name)


def history(parent: InodeNumber, name: bytes, number: int) -> bytes:
    """The key of one retained version of a name."""
    return history_of(parent, name) + b"%08x" % number


def split_history(key: bytes) -> tuple[InodeNumber, bytes, int]:
    """(parent, name, number) of a retained version's key."""
    parts = _RETAINED.fullmatch(key, len(HISTORY_PREFIX))
    if parts is None:
        raise ProtocolError("a key of no retained version")
    return _number(parts[1]), _name(parts[2]), int(parts[3], 16)


def ino_of(key: bytes, prefix: bytes) -> InodeNumber:
    """The inode number in a key of the form <prefix><ino>."""
    digits = key[len(prefix) :]
    if not _INO.fullmatch(digits):
        raise ProtocolError("a key without an inode number")
    return _number(digits)


def split_dentry(key: bytes) -> tuple[InodeNumber, bytes]:
    """(parent, name) of a dentry's key."""
    parts = _NAMED.fullmatch(key, len(DENTRY_PREFIX))
    if parts is None:
        raise ProtocolError("a key of no name")
    return _number(parts[1]), _name(parts[2])


def _number(digits: bytes) -> InodeNumber:
    number = int(digits, 16)
    if not number:
        raise ProtocolError("a key of inode 0, which is nobody's")
    return InodeNumber(number)


def _name(name: bytes) -> bytes:
    if name in (b".", b"..") or len(name) > NAME_BYTES_MAX:
        raise ProtocolError("a key with a name that cannot be")
    return name


assert dentries(InodeNumber(1))[1] == b"dentry/0000000001" + bytes([ord("/") + 1])
