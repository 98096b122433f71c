"""The modelfs library: what a cluster of disks and NICs must know to be one directory.

Everything here is pure: no sockets, no clock, no FUSE. Read it in this order:

- ground: `errors`, `ids`, `limits`
- values: `chunk` and `stripe` (how a file is cut), `extents`, `manifest` (one version of one
  file), `inode` (the records that etcd holds), `attributes` (what chmod and its kind make of one),
  `keys` (where etcd holds them), `holdings` (what one node has of it all), `announced` (what a
  mirror holds and tells)
- decisions: `placement` (which nodes hold a chunk), `access` and `strides` (what to read ahead),
  `history` (what a name showed before), `names` (their index), `mirror` (the namespace in memory),
  `policy` (what directories hand down),
  `changes` (every change of the namespace, as one guarded transaction),
  `xattrs` (those of extended attributes), `access_times` (those of atime),
  `reclaim` (which chunks may go), `repair` (who makes the copies that are missing),
  `consistency` (whether names and inodes fit each other)
- machines: `wire` (bytes of the peer protocol)
- seams: `ports`; and `testing`, the supported fakes and contract suites

The node process that puts these to work is `modelfsd`, under `daemon/`.
"""

__version__ = "0.1.0"
