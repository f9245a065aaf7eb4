"""Jobs that end while parameters are on their way between nodes, well or badly."""

import os
from pathlib import Path

import pytest

from tests.support.frameworks import require
from tests.support.jobs import assert_ended_by

require("torch")

pytestmark = pytest.mark.any_mpi

ROOT = Path(__file__).parents[2]
PRELUDE = """
import os, sys, time
import torch
import torch._dynamo  # which torch would load while the optimizer is built
from mpi4py import MPI
from shardopt import ShardPolicy
from shardopt.torch import NAdam
from shardopt.transport import all_gather
from tests.support.on_the_way import Guard

comm = MPI.COMM_WORLD
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
policy = ShardPolicy(
    stage=STAGE, share_node=False, bucket_nbytes=1, timeout_s=3, prefetch_params=True
)
comm.Barrier()  # so that slow imports take nothing off the time allowed
opt = NAdam(model, policy=policy)

def backward():
    opt.zero_grad()
    model(torch.ones(1, 64)).sum().backward()

backward()
opt.step()
backward()
comm.Barrier()
"""


def run(mpirun, body, stage=1):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return mpirun(2, source=f"STAGE = {stage}\n" + PRELUDE + body, env={"PYTHONPATH": path})


def test_a_read_without_a_wait_is_found_with_the_name_of_the_parameter(mpirun):
    job = run(mpirun, "Guard(opt)\nopt.step()\nmodel[2].weight.sum()\n")
    assert job.returncode != 0
    assert "parameter '2.weight' is on its way" in job.stderr


@pytest.mark.parametrize("stage", [1, 2])
def test_ranks_that_end_after_a_step_send_what_others_wait_for(mpirun, stage):
    job = run(
        mpirun,
        """
opt.step()
if comm.rank == 0:  # the other one waits for what is sent while this process ends
    assert opt.core.parts.sync.advance_params() > 0
    sys.exit()
print("the last forward:", float(model(torch.ones(1, 64)).sum()) < 1e9, flush=True)
os._exit(0)
""",
        stage,
    )
    assert job.stdout == "the last forward: True\n", job.output


def test_a_rank_that_sends_nothing_ends_the_wait_of_a_forward(mpirun):
    job = run(
        mpirun,
        """
if comm.rank == 1:
    all_gather._MAX_IN_TRANSIT = 0  # nothing leaves
opt.step()
if comm.rank == 1:
    while True:
        time.sleep(60)
model(torch.ones(1, 64))
""",
    )
    assert_ended_by(job, "shardopt.errors.RankFailureError: ")
    assert "rank 1" in job.stderr
    assert "parameters" in job.stderr
