"""The names of things: what identifies a node, a chunk, an inode, a version.

An id is used once, for all time. Addresses and host names are hints and never ids.
"""

from __future__ import annotations

from typing import NewType

NodeId = NewType("NodeId", str)
"""16 lower-case hex digits, made once when a state directory is created."""

ClusterId = NewType("ClusterId", str)
"""16 lower-case hex digits, made once when a cluster is founded."""

ChunkId = NewType("ChunkId", bytes)
"""The 32-byte BLAKE3 hash of a chunk's bytes."""

InodeNumber = NewType("InodeNumber", int)
"""Cluster-wide, never reused, below 2^40. The root directory is 1."""

Version = NewType("Version", int)
"""Grows by one with each commit of a file's contents; a new file is at version 1."""

Epoch = NewType("Epoch", int)
"""The number of a placement map, from 1."""

Revision = NewType("Revision", int)
"""etcd's store revision: the order of all changes of the cluster."""

KernelId = NewType("KernelId", int)
"""What the kernel calls an inode (FUSE nodeid and st_ino): one version of one file."""

ROOT_INODE = InodeNumber(1)

LABEL_BYTES_MAX = 64  # of a node's name or zone; Linux's HOST_NAME_MAX

_HEX_DIGITS = frozenset("0123456789abcdef")


def is_node_id(text: str) -> bool:
    """Whether `text` has the form of a node or cluster id."""
    return len(text) == 16 and _HEX_DIGITS.issuperset(text)


def is_label(text: str) -> bool:
    """Whether `text` can be a node's name or zone: printable, and of bounded length."""
    return text.isprintable() and len(text.encode()) <= LABEL_BYTES_MAX
