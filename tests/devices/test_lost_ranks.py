"""A rank that falls out of the pipeline of offloaded updates is named in time by all others."""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NUM_RANKS = 3

SOURCE = """
import sys, time, signal
from pathlib import Path
import numpy as np
from mpi4py import MPI
import shardopt.core.parts
from shardopt import ShardPolicy
from shardopt.errors import RankFailureError
from shardopt.numpy import NAdam, Parameter
from tests.support.arena_device import fill, on_device
from tests.support.queued_device import QueuedDevice

comm, fault = MPI.COMM_WORLD, sys.argv[1]
is_lost = comm.rank == 1

def gate(name, number):
    if is_lost and fault == "device" and name == "down" and number == 5:
        signal.sigwait([])  # of step 2

def make_device(name, arena):
    return QueuedDevice(arena, gate=gate)

shardopt.core.parts.make_device = make_device
comm.Barrier()
param = Parameter(on_device(np.zeros(4096 * comm.size * 4, np.float32)))
policy = ShardPolicy(offload="cpu", timeout_s=2, bucket_nbytes=4096 * comm.size * 4)
opt = NAdam([param], policy=policy)
fill(param.grad, 1.0)
opt.step()
kernel, number = opt.core.parts.backend.kernel, 0
update = kernel.update

def lose(*args):
    global number
    number += 1
    if is_lost and number == 2 and fault == "hang":
        signal.sigwait([])
    if is_lost and number == 2 and fault == "exit":
        sys.exit(3)
    update(*args)

kernel.update = lose
try:
    opt.step()
except RankFailureError as error:
    Path(f"{fault}-{comm.rank}").write_text(str(error))
    others = [r for r in range(comm.size) if r != 1]
    stop = time.monotonic() + 20
    while not all(Path(f"{fault}-{r}").exists() for r in others) and time.monotonic() < stop:
        time.sleep(0.05)  # an exit ends the job
    raise
"""

EXPECTED = {
    "device": r"timed out after [2-9]\.\d s in step 2 \(gradients of bucket 1\): rank 1 is waiting "
    r"in step 2 \(copies from the device of bucket 1\)\. Check",
    "hang": r"timed out after [2-9]\.\d s in step 2 \(parameters of bucket [01]\): no sign of "
    r"rank 1 \(last seen in step 2\)\. Check",
    "exit": r"rank 1 \(last seen in step 2\) left the job, but step 2 \(parameters of bucket [01]\)"
    r" needs every rank\. Check",
}


@pytest.mark.any_mpi
def test_all_others_name_a_rank_that_falls_out(mpirun, tmp_path):
    (tmp_path / "job.py").write_text(SOURCE)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    jobs = [
        mpirun.start(NUM_RANKS, "job.py", fault, env={"PYTHONPATH": path}) for fault in EXPECTED
    ]
    for (fault, expected), job in zip(EXPECTED.items(), jobs, strict=True):
        output = "".join(job.communicate(timeout=60))
        assert job.returncode != 0
        for rank in (0, 2):
            told = tmp_path / f"{fault}-{rank}"
            assert told.exists(), output
            assert re.match(expected, told.read_text()), told.read_text()
