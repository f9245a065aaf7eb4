"""Measurements of this machine: memory, links, barriers and cores.

The functions measure and return numbers; they print nothing and judge nothing. Units are in the
names: seconds (``_s``), bytes (``_nbytes``), bytes per second (``_nbytes_per_s``).
"""
