"""The namespace: etcd's state mirrored on this node, and changes to it."""
