"""The CPU backend: shared memory, Numba loops, threads."""
