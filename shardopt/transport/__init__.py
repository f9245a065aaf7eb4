"""Bytes between nodes: transports, and the collectives built on them."""
