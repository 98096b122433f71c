"""Policies: how many copies, for how long superseded versions are kept, how large chunks are.

A directory hands its policy down: each field is that of the nearest directory above (or of the
file itself) that sets it, else the default. The retention counts at once, for versions that are
superseded already too. Replicas and chunk size count for the files that are made from then on; a
file remembers them in its record, where its replicas can be set as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from modelfs import keys
from modelfs.errors import UserError
from modelfs.history import Retained
from modelfs.ids import InodeNumber, NodeId
from modelfs.inode import Inode, Policy, encode, is_chunk_bytes, is_retention
from modelfs.limits import (
    CHUNK_BYTES_DEFAULT,
    CHUNK_BYTES_MAX,
    CHUNK_BYTES_MIN,
    KIB,
    MIB,
    REPLICAS_DEFAULT,
    REPLICAS_MAX,
    RETAIN_SECONDS_DEFAULT,
)
from modelfs.mirror import Mirror, Name

NANOSECONDS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Rules:
    """A policy with every field set."""

    replicas: int = REPLICAS_DEFAULT
    retain_seconds: float = RETAIN_SECONDS_DEFAULT  # 0: superseded versions are not kept
    chunk_bytes: int = CHUNK_BYTES_DEFAULT


def check_policy(policy: Policy) -> Policy:
    """The policy itself. Raises `UserError` for what cannot be."""
    replicas, retain_seconds, chunk_bytes = (
        policy.replicas,
        policy.retain_seconds,
        policy.chunk_bytes,
    )
    if replicas is not None and not 1 <= replicas <= REPLICAS_MAX:
        raise UserError(f"{replicas} replicas: 1 to {REPLICAS_MAX} are possible")
    if retain_seconds is not None and not is_retention(retain_seconds):
        raise UserError(f"{retain_seconds} is not a retention in seconds")
    if chunk_bytes is not None and not is_chunk_bytes(chunk_bytes):
        raise UserError(
            f"{chunk_bytes:,} bytes is not a chunk size: a power of two from "
            f"{CHUNK_BYTES_MIN // KIB} KiB to {CHUNK_BYTES_MAX // MIB} MiB"
        )
    return policy


def policies_above(mirror: Mirror, ino: InodeNumber) -> Iterator[tuple[InodeNumber, Policy]]:
    """The policies that count for a directory, the nearest first: its own, then those above."""
    for current in mirror.upwards(ino):
        record = mirror.inode(current)
        if record is not None and record.policy is not None:
            yield current, record.policy


def rules_of(mirror: Mirror, directory: InodeNumber, defaults: Rules) -> Rules:
    """What holds for what is made or kept in a directory."""
    replicas: int | None = None
    retain_seconds: float | None = None
    chunk_bytes: int | None = None
    for _, policy in policies_above(mirror, directory):
        replicas = policy.replicas if replicas is None else replicas
        retain_seconds = policy.retain_seconds if retain_seconds is None else retain_seconds
        chunk_bytes = policy.chunk_bytes if chunk_bytes is None else chunk_bytes
    return Rules(
        defaults.replicas if replicas is None else replicas,
        defaults.retain_seconds if retain_seconds is None else retain_seconds,
        defaults.chunk_bytes if chunk_bytes is None else chunk_bytes,
    )


def retain_seconds_of(mirror: Mirror, parent: InodeNumber, record: Inode, defaults: Rules) -> float:
    """For how long what a name in `parent` showed is kept; `record` is what it showed.

    A file's own retention goes first. A removed directory is kept as long as what was in it.
    """
    own = record.policy.retain_seconds if record.policy is not None else None
    if own is not None and not record.is_directory:
        return own
    inherited = rules_of(mirror, parent, defaults).retain_seconds
    return max(own or 0, inherited)


@dataclass(slots=True)
class GoneDirectories:
    """Directories that were removed: where they were last, and the retention that they set."""

    _last: dict[InodeNumber, tuple[int, InodeNumber, float | None]] = field(default_factory=dict)

    def add(self, parent: InodeNumber, entry: Retained) -> None:
        """Take a history entry of a name in `parent`; only those of directories matter."""
        if not entry.record.is_directory:
            return
        ino, policy = InodeNumber(entry.ino), entry.record.policy
        own = policy.retain_seconds if policy is not None else None
        if ino not in self._last or self._last[ino][0] < entry.superseded_ns:
            self._last[ino] = (entry.superseded_ns, parent, own)

    def retain_seconds(
        self, mirror: Mirror, directory: InodeNumber, defaults: Rules
    ) -> float | None:
        """The retention in a directory, living or gone; None if the way to it is not known."""
        for _ in range(len(self._last) + 1):
            if mirror.inode(directory) is not None:
                return rules_of(mirror, directory, defaults).retain_seconds
            if directory not in self._last:
                return None
            _, directory, own = self._last[directory]
            if own is not None:
                return own
        return None


def expires_ns(
    mirror: Mirror, parent: InodeNumber, entry: Retained, gone: GoneDirectories, defaults: Rules
) -> int:
    """When an entry of a name in `parent` may be deleted; an entry of a directory, only if nothing
    is retained below it.

    Policies count as they are now: a file's own, if the file still lives, and those above. Through
    directories that are gone, as they were; if even that is not known, as when it was superseded.
    """
    record = mirror.inode(InodeNumber(entry.ino)) or entry.record
    own = record.policy.retain_seconds if record.policy is not None else None
    if own is not None and not record.is_directory:
        seconds = own
    else:
        inherited = gone.retain_seconds(mirror, parent, defaults)
        seconds = max(own or 0, entry.retain_seconds if inherited is None else inherited)
    return entry.superseded_ns + int(seconds * NANOSECONDS)


# ---------------------------------------------------------------- keeping


def number_of(mirror: Mirror, parent: InodeNumber, name: bytes) -> int:
    """The number of what a name shows now; 0 if there is no such name."""
    child = mirror.child(parent, name)
    record = mirror.inode(child.ino) if child is not None else None
    if child is None or record is None:
        return 0
    # A create that did not know of the latest entries chose too low a base: never below them.
    return max(child.base + record.version, mirror.history.highest(parent, name) + 1)


def next_base(mirror: Mirror, parent: InodeNumber, name: bytes, version: int) -> int:
    """The base of a dentry that makes this name's number grow by one, for an inode at `version`."""
    last = number_of(mirror, parent, name) or mirror.history.highest(parent, name)
    return last + 1 - version


@dataclass(frozen=True, slots=True)
class Keep:
    """Who supersedes versions, and what holds for them where no policy says otherwise."""

    node: NodeId
    defaults: Rules

    def entry(
        self, mirror: Mirror, name: Name, ino: InodeNumber, record: Inode, why: str, now_ns: int
    ) -> Iterator[tuple[bytes, bytes]]:
        """The key and value to put when a name stops showing `record`; none if it is not kept."""
        if not (record.is_file or record.is_directory):
            return
        seconds = retain_seconds_of(mirror, name[0], record, self.defaults)
        if seconds <= 0 and not (record.is_directory and mirror.history.names(ino)):
            return
        retained = Retained(
            ino=ino,
            record=record,
            superseded_ns=now_ns,
            why=why,
            node=self.node,
            retain_seconds=seconds,
        )
        yield keys.history(*name, number_of(mirror, *name)), encode(retained)
