"""Jobs of the tests that may end badly: how their scripts begin, and the traces of their end."""

import re

PRELUDE = """
import os, signal, sys
import numpy as np
from mpi4py import MPI
from shardopt import NAdam, Parameter, ShardPolicy
from shardopt.errors import ShardoptError

comm = MPI.COMM_WORLD
last = comm.rank == comm.size - 1

def build(timeout_s=30.0, numel=5):
    comm.Barrier()  # so that slow imports take nothing off the time allowed
    param = Parameter(np.zeros(numel, np.float32), "w")
    return NAdam([param], policy=ShardPolicy(timeout_s=timeout_s))

def live_on():
    while True:
        signal.pause()
"""


def printed_by_ranks(job):
    """The lines on stderr without those that Open MPI's launcher adds at the end of a bad job."""
    text = re.sub(r"(?ms)^-{60,}$.*?^-{60,}$\n?", "", job.stderr)
    launchers = ("[warn] Ep", "] pmix_ptl_base: ")
    lines = [line for line in text.splitlines() if line.strip(" \0")]
    return [line for line in lines if not any(word in line for word in launchers)]


def assert_ended_by(job, line):
    """The job must have failed, with a traceback that ends with ``line`` as its last words."""
    assert job.returncode != 0, job.output
    lines = printed_by_ranks(job)
    assert lines, job.output
    assert lines[-1].startswith(line), job.output
    assert "Traceback (most recent call last):" in lines, job.output
