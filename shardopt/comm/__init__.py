"""Ranks and nodes: who shares memory, who waits for whom, and who has failed."""
