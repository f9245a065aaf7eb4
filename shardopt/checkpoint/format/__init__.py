"""The files of a checkpoint: what is in them, and how they are written and read. Needs no MPI."""
