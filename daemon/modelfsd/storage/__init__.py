"""Chunks: on this node's disk, on the others, and the care for their copies."""
