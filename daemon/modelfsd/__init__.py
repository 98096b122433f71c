"""The node process: trio, FUSE, etcd and sockets around the pure core in `modelfs`.

`cli` reads the command line, `config` the settings, and `node` builds a node of these packages:

- `kernel`: FUSE requests, open files, and what the kernel caches.
- `writing`: files that are being written, from the first byte to the commit, or to recovery.
- `storage`: chunks on this node's disk and on others, reading them, and the care for their copies.
- `metadata`: the namespace as etcd has it, mirrored here, and changes to it; leases, pins, history.
- `etcd`: the client of etcd, and this node's own member.
- `peers`: conversations with the other nodes: the client and the server of the data port.
- `trust`: who belongs to the cluster: certificates, keys, tokens, joining.
- `cluster`: finding, founding, entering and leaving a cluster, and being one of its nodes.
- `commands`: what people see: the commands, the admin socket, and what both show.
- `lab`: whole clusters on one machine, to try things, to test and to show.

Beside them are small tools that several of them use, which know nothing of files and nodes.
"""
