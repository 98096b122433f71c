"""Conversations with other nodes: the client and the server of the data port."""
