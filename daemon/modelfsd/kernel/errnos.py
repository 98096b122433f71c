"""The only place where a modelfs error becomes an errno."""

from __future__ import annotations

import errno

from modelfs import errors
from modelfs.errors import ModelfsError

ERRNO: dict[type[ModelfsError], int] = {
    errors.UserError: errno.EINVAL,
    errors.NamespaceError: errno.EINVAL,
    errors.NoSuchEntry: errno.ENOENT,
    errors.EntryExists: errno.EEXIST,
    errors.DirectoryNotEmpty: errno.ENOTEMPTY,
    errors.NotDirectory: errno.ENOTDIR,
    errors.IsDirectory: errno.EISDIR,
    errors.NameTooLong: errno.ENAMETOOLONG,
    errors.FileTooLarge: errno.EFBIG,
    errors.InvalidMove: errno.EINVAL,
    errors.TooManyLinks: errno.EMLINK,
    errors.NotPermitted: errno.EPERM,
    errors.AccessDenied: errno.EACCES,
    errors.NoSuchAttribute: errno.ENODATA,
    errors.AttributesTooLarge: errno.ENOSPC,
    errors.AttributeNotSupported: errno.EOPNOTSUPP,
    errors.InvalidAttributeName: errno.EINVAL,
    errors.StaleHandle: errno.ESTALE,
    errors.WriterElsewhere: errno.EBUSY,
    errors.RemoteError: errno.EIO,
    errors.PeerUnavailable: errno.EIO,
    errors.PeerRefused: errno.EIO,
    errors.ChunkMissing: errno.EIO,
    errors.CorruptChunk: errno.EIO,
    errors.ChunkUnavailable: errno.EIO,
    errors.ReplicationFailed: errno.EIO,
    errors.OutOfSpace: errno.ENOSPC,
    errors.MetadataUnavailable: errno.EROFS,  # without etcd's quorum nothing can be changed
    errors.MetadataOutOfReach: errno.EROFS,
    errors.MetadataUncertain: errno.EIO,
    errors.HistoryCompacted: errno.EIO,
    errors.RecordUnreadable: errno.EIO,
    errors.WriteLost: errno.EIO,
    errors.ProtocolError: errno.EIO,
}


def errno_of(error: ModelfsError) -> int:
    """The errno that the kernel is told. A subclass without a row of its own takes its parent's."""
    return next((ERRNO[kind] for kind in type(error).__mro__ if kind in ERRNO), errno.EIO)
