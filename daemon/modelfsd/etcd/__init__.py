"""etcd: its client, and this node's own member."""
