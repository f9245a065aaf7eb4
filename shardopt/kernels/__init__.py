"""The passes over memory: one protocol, a file for each kind of processor."""
