"""Backends: where arrays live and what computes there, one folder for each kind of processor."""
