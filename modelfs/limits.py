"""Every bound of the system, with its reason. Sizes are bytes, times are seconds."""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

# --- names and numbers: what Linux allows, or less
PAGE_BYTES = 4 * KIB
NAME_BYTES_MAX = 255  # NAME_MAX
SYMLINK_BYTES_MAX = 4095  # PATH_MAX less the NUL
LINKS_MAX = 65_000  # ext4's; every name of an inode is indexed in memory
INODE_BITS = 40  # leaves 24 bits of st_ino for the version
INODE_BLOCK = 1 << 16  # inode numbers that a daemon takes from etcd at a time

# --- chunks
CHUNK_BYTES_DEFAULT = 4 * MIB  # 3.4 ms on 10 Gbit/s: long enough to stream, short enough to hedge
CHUNK_BYTES_MIN = 256 * KIB
CHUNK_BYTES_MAX = 64 * MIB  # one chunk is the unit of a put, hence of a receive buffer
BLOCK_BYTES = 64 * KIB  # the unit of verification: a cold page costs this much of network
FILE_BYTES_MAX = 64 * TIB  # 1.05 million chunks, a manifest of 50 MiB in 1,024 pages
INLINE_BYTES_MAX = 4 * KIB  # contents kept in the inode record: the config.json of every model

# --- policies
REPLICAS_DEFAULT = 2
REPLICAS_MAX = 16  # a chunk's replicas are contacted all at once
RETAIN_SECONDS_MAX = 1e11  # three thousand years: for ever, and still a number of nanoseconds
RETAIN_SECONDS_DEFAULT = 3600.0  # superseded versions: long enough to notice a mistake

# --- the peer protocol
FRAME_HEADER_BYTES_MAX = 64 * KIB
HAS_CHUNKS_MAX = 1024  # ids in one `has` request: 32 KiB, below the header bound
BYTES_PER_SECOND_MIN = 256 * KIB  # of a payload: whoever is slower holds the other for nothing
CONNECTIONS_PER_PEER = 4  # parallel requests to one peer; more than 4 gained nothing on loopback
CONNECTIONS_MAX = 256  # with members, at one server; idle ones make room
UNPROVED_MAX = 128  # besides these, while nobody has shown a certificate
UNPROVED_OF_ADDRESS_MAX = 32  # of the latter, from one address

# --- waiting
PEER_SILENCE_SECONDS = 0.6  # a peer that sends nothing for so long is passed over (G7: 1 s in all)
PEER_PATIENCE_SECONDS = 10.0  # ... unless there is nobody else to ask
PUT_PATIENCE_SECONDS = 20.0  # a receiver's fsync may stall that long on a shared disk
CONNECT_SECONDS = 0.5
ETCD_REQUEST_SECONDS = 5.0  # longer than an election (2-4 s), so that one is ridden out
NODE_LEASE_SECONDS = 10  # a dead node's leases lapse within 15 s of its last heartbeat (G5)
LOCK_WAIT_SECONDS = 30.0

# --- etcd (its own defaults: 1.5 MiB a request, 128 operations a transaction)
TRANSACTION_OPS_MAX = 120
RECORD_BYTES_MAX = 256 * KIB

# --- extended attributes (xattr(7)): each as the kernel bounds it, all of an inode by its record
XATTR_NAME_BYTES_MAX = 255
XATTR_VALUE_BYTES_MAX = 64 * KIB
XATTR_NAMES_BYTES_MAX = 64 * KIB  # what listxattr(2) can return
XATTRS_BYTES_MAX = RECORD_BYTES_MAX - 64 * KIB  # contents, a target and later fields need room too

assert CHUNK_BYTES_MIN % BLOCK_BYTES == 0 and BLOCK_BYTES % PAGE_BYTES == 0
assert CHUNK_BYTES_MIN <= CHUNK_BYTES_DEFAULT <= CHUNK_BYTES_MAX
assert HAS_CHUNKS_MAX * 32 < FRAME_HEADER_BYTES_MAX
assert NODE_LEASE_SECONDS <= 15
assert FILE_BYTES_MAX <= 1 << 63
