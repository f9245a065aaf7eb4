"""Memory of a node: an unnamed file that all ranks map, and each rank's private view of it."""
