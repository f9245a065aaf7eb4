"""The program that tests of the launchers run: every rank prints its place and its threads.

``payload.py end CODE`` then ends the last rank with CODE and the others with 0. ``payload.py wait``
waits until a rank receives SIGTERM or SIGINT; in a job that Slurm queued again it ends at once.
"""

import os
import signal
import sys
import time

import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
node = comm.Split_type(MPI.COMM_TYPE_SHARED)
PATIENCE_S = 8


def say(text: str) -> None:
    """Print a line in a single write."""
    sys.stdout.write(f"rank {comm.rank} of {comm.size} {text}\n")
    sys.stdout.flush()


def any_rank(mine: bool) -> bool:
    """Whether ``mine`` is true on any rank; a silent rank ends the job, as it does in shardopt."""
    some = np.array([mine], np.int64)
    request = comm.Iallreduce(MPI.IN_PLACE, some)
    start_s = time.monotonic()
    while not request.Test():
        if time.monotonic() - start_s > PATIENCE_S:
            comm.Abort(17)
        time.sleep(0.001)
    return bool(some[0])


def wait() -> None:
    """Save and end on SIGTERM or SIGINT, as train_lm.py does."""
    stops = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stops.append(1))
    say("waits")
    while not any_rank(bool(stops)):
        time.sleep(0.01)
    say(f"saves, told {len(stops)} times")
    sys.exit(128 + signal.SIGTERM)


say(f"on {MPI.Get_processor_name()} with {node.size}, {os.environ['OMP_NUM_THREADS']} threads")
match sys.argv[1:]:
    case ["end", code]:
        comm.Barrier()
        if comm.rank == comm.size - 1 and code != "0":
            sys.exit(int(code))
    case ["wait"] if "SLURM_RESTART_COUNT" not in os.environ:
        wait()
say("ends")
