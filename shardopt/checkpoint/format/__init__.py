"""The files of a checkpoint; needs no MPI."""
