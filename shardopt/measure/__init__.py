"""Measurements of this machine: cores, memory, links."""
