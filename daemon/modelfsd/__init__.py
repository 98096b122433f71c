"""The node process: trio, FUSE, etcd and sockets around the pure core in `modelfs`."""
