"""Every way in which modelfs fails, as one small tree.

    ModelfsError
    ├── UserError               the user asked for what cannot be; the text says what to do instead
    ├── NamespaceError          POSIX says no; nothing is wrong with the cluster
    │   ├── NoSuchEntry · EntryExists · DirectoryNotEmpty · NotDirectory · IsDirectory
    │   ├── NameTooLong · FileTooLarge · InvalidMove · TooManyLinks · NotPermitted
    │   ├── AccessDenied · NoSuchAttribute · AttributesTooLarge · AttributeNotSupported
    │   ├── InvalidAttributeName
    │   ├── StaleHandle         the name means something newer by now: look it up again
    │   └── WriterElsewhere     another node is writing this file
    ├── RemoteError             a peer, a disk or etcd let us down
    │   ├── PeerUnavailable · PeerRefused · ChunkMissing · CorruptChunk
    │   ├── ChunkUnavailable    no live node has a good copy
    │   ├── ReplicationFailed   too few live nodes took a copy
    │   ├── OutOfSpace
    │   ├── MetadataUnavailable etcd did not take the request: nothing has happened
    │   │   └── MetadataOutOfReach  no member with a quorum was found, for long
    │   ├── MetadataUncertain   etcd was asked and did not answer: it may have happened
    │   ├── HistoryCompacted    the watch must start again from a full load
    │   └── RecordUnreadable    what etcd holds of an inode or a name makes no sense
    ├── WriteLost               what a writer wrote can no longer be committed
    └── ProtocolError           bytes that no peer of ours would have sent

An error carries its facts as attributes. `modelfsd.errnos` is the only place where one turns into
an errno, and `modelfsd.cli` the only one where it turns into an exit code.
"""

from __future__ import annotations

from modelfs.ids import ChunkId, InodeNumber, NodeId


class ModelfsError(Exception):
    """The root of the tree; never raised itself."""


class UserError(ModelfsError):
    """A mistake of the user or of the machine's set-up. The text says what to do."""


class NamespaceError(ModelfsError):
    """A file system operation that POSIX refuses."""

    def __init__(self, subject: object = "") -> None:
        super().__init__(subject)
        self.subject = subject


class NoSuchEntry(NamespaceError):
    """The name or the inode does not exist."""


class EntryExists(NamespaceError):
    """The name is taken."""


class DirectoryNotEmpty(NamespaceError):
    """The directory still has entries."""


class NotDirectory(NamespaceError):
    """A directory is needed here."""


class IsDirectory(NamespaceError):
    """A directory cannot be used here."""


class NameTooLong(NamespaceError):
    """The name has more than `limits.NAME_BYTES_MAX` bytes."""


class FileTooLarge(NamespaceError):
    """The file would grow past `limits.FILE_BYTES_MAX`."""


class InvalidMove(NamespaceError):
    """A directory cannot be moved into itself."""


class TooManyLinks(NamespaceError):
    """The inode has `limits.LINKS_MAX` names already."""


class NotPermitted(NamespaceError):
    """The operation is not allowed on this kind of inode."""


class AccessDenied(NamespaceError):
    """The file's mode does not let the caller open it."""


class NoSuchAttribute(NamespaceError):
    """The inode has no extended attribute of this name."""


class AttributesTooLarge(NamespaceError):
    """The inode's record has no room for this extended attribute."""


class AttributeNotSupported(NamespaceError):
    """Extended attributes of this kind are not kept."""


class InvalidAttributeName(NamespaceError):
    """The name of an extended attribute is a namespace alone."""


class StaleHandle(NamespaceError):
    """The kernel asked about an inode that its name no longer means: it must look up again."""


class WriterElsewhere(NamespaceError):
    """Another node holds the lease of this file, and kept it for as long as we could wait."""


class RemoteError(ModelfsError):
    """Something outside this process failed."""


class PeerUnavailable(RemoteError):
    """A peer did not answer in time, or cannot be reached."""

    def __init__(self, node: NodeId, reason: object) -> None:
        super().__init__(f"node {node} is unavailable: {reason}")
        self.node, self.reason = node, reason


class PeerRefused(RemoteError):
    """A peer answered that it will not do what was asked (its disk failed, its queue is full)."""

    def __init__(self, node: NodeId, reason: str) -> None:
        super().__init__(f"node {node} refused: {reason}")
        self.node, self.reason = node, reason


class ChunkMissing(RemoteError):
    """A store or a peer does not have this chunk."""

    def __init__(self, chunk: ChunkId, where: str) -> None:
        super().__init__(f"chunk {chunk.hex()[:16]} is not on {where}")
        self.chunk, self.where = chunk, where


class CorruptChunk(RemoteError):
    """Bytes that are not the manifest's: read another replica, repair this one."""

    def __init__(self, chunk: ChunkId, where: str) -> None:
        super().__init__(f"chunk {chunk.hex()[:16]} on {where} fails its checksum")
        self.chunk, self.where = chunk, where


class ChunkUnavailable(RemoteError):
    """No node that can be reached has a good copy of the chunk."""

    def __init__(self, chunk: ChunkId, tried: str) -> None:
        super().__init__(f"chunk {chunk.hex()[:16]} cannot be read: {tried}")
        self.chunk, self.tried = chunk, tried


class ReplicationFailed(RemoteError):
    """Fewer live nodes than the policy's replicas took a copy."""

    def __init__(self, chunk: ChunkId, copies: int, needed: int, reasons: str) -> None:
        super().__init__(
            f"chunk {chunk.hex()[:16]} has {copies} of {needed} copies: {reasons or 'no node'}"
        )
        self.chunk, self.copies, self.needed = chunk, copies, needed


class OutOfSpace(RemoteError):
    """A disk is full."""


class MetadataUnavailable(RemoteError):
    """etcd cannot be reached or has no quorum. The request had no effect."""


class MetadataOutOfReach(MetadataUnavailable):
    """No member of etcd that has a quorum was found in `limits.ETCD_REQUEST_SECONDS`."""


class MetadataUncertain(RemoteError):
    """etcd was sent a request and did not answer: it may or may not take effect."""


class HistoryCompacted(RemoteError):
    """The revision that a watch wanted to start from is gone from etcd's history."""

    def __init__(self, compact_revision: int) -> None:
        super().__init__(f"etcd's history before revision {compact_revision} is compacted")
        self.compact_revision = compact_revision


class RecordUnreadable(RemoteError):
    """A record in etcd that cannot be read. What it is about can neither be used nor changed."""

    def __init__(self, key: bytes, reason: str) -> None:
        super().__init__(f"the record {key!r} in etcd cannot be read: {reason}")
        self.key, self.reason = key, reason


class WriteLost(ModelfsError):
    """A working copy that cannot be committed any more; its bytes are kept for recovery."""

    def __init__(self, ino: InodeNumber, reason: str) -> None:
        super().__init__(f"the writes to inode {ino} cannot be committed: {reason}")
        self.ino, self.reason = ino, reason


class ProtocolError(ModelfsError):
    """Malformed, oversized or unexpected bytes on a connection or in a file."""
