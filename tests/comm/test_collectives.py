"""A rank that does not respond is named, also to ranks that share no memory with it."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.frameworks import require

ROOT = Path(__file__).parents[2]

PRELUDE = """
import os, signal, sys, time
import numpy as np
from mpi4py import MPI
from shardopt import NAdam, Parameter, ShardPolicy
from shardopt.comm.failure import Abort
from shardopt.comm.collectives import Collectives
from shardopt.comm.consensus import make_consensus
from shardopt.backends.cpu.kernel import CpuKernel

comm = MPI.COMM_WORLD
last = comm.rank == comm.size - 1
failure = Abort()
failure.watch()

def make_collectives(share_node=False):
    policy = ShardPolicy(share_node=share_node, timeout_s=30)  # starting may take its time
    consensus = make_consensus(comm, policy, failure)
    return Collectives(consensus.group, ShardPolicy(timeout_s=30 if last else 2), failure, 1)

def meet(collectives, step):
    collectives.allreduce(np.zeros(1), MPI.SUM, step, "finish")

def never():
    return False

def live_on(*_):
    while True:
        signal.pause()
"""


@pytest.fixture
def message(mpirun):
    """Run three ranks, the last of which fails; return the message of the others."""

    def run(body, *options):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        job = mpirun(3, source=PRELUDE + body, env={"PYTHONPATH": path}, options=options)
        # Open MPI's, when it is to bear the loss of ranks, may give 0 though the others abort.
        assert job.returncode != 0 or "ulfm" in options, job.output
        found = re.findall(r"RankFailureError: (.*)", job.stderr)
        assert found, job.output
        return found[0]

    return run


def timed_out(step, phase, got):
    remedy = "Check whether a process or a host died or hangs, and that all ranks make the same "
    where = rf"step {step} \({phase}\)"
    return rf"timed out after [2-9]\.\d s in {where}: {got}\. {remedy}"


def unseen(rank, step):
    return rf"no sign of rank {rank} \(last seen in step {step}\)"


def test_the_policy_learns_who_is_missing_and_decides(mpirun):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    job = mpirun(
        3,
        source=PRELUDE
        + """
class Recover(Abort):
    def on_missing(self, error, ranks):
        print(type(error).__name__, ranks, flush=True)
        comm.Barrier()
        sys.exit()

failure = Recover()
collectives = make_collectives()
if last:
    comm.Barrier()
    sys.exit()
meet(collectives, 1)
""",
        env={"PYTHONPATH": path},
    )
    assert job.returncode == 0, job.output
    assert sorted(job.stdout.splitlines()) == ["RankFailureError [2]"] * 2


@pytest.mark.parametrize(
    "share_node",
    [
        pytest.param(False, id="nodes"),
        pytest.param(True, id="node", marks=pytest.mark.any_mpi),  # seen in the node's memory
    ],
)
def test_a_rank_that_hangs_is_named_with_its_last_step(message, share_node):
    got = message(
        f"""
collectives = make_collectives({share_node})
for step in range(1, 100):
    if last and step == 4:
        live_on()
    meet(collectives, step)
"""
    )
    assert re.match(timed_out(4, "finish", unseen(2, 3)), got)


def test_a_rank_that_ends_on_another_node_is_named(message):
    got = message(
        """
collectives = make_collectives()
meet(collectives, 1)
if last:
    sys.exit()
meet(collectives, 2)
"""
    )
    assert re.match(timed_out(2, "finish", unseen(2, 1)), got)


@pytest.mark.any_mpi
def test_a_rank_that_ends_on_this_node_is_not_waited_for(message):
    got = message(
        """
collectives = make_collectives(True)
meet(collectives, 1)
if last:
    sys.exit()
meet(collectives, 2)
"""
    )
    assert got.startswith(
        "rank 2 (last seen in step 1) left the job, but step 2 (finish) needs every rank. Check why"
    )


def test_a_rank_that_waits_for_something_else_is_named_with_it(message):
    got = message(
        """
collectives = make_collectives()
meet(collectives, 6)
if last:
    collectives.wait(never, 7, "exchange of bucket 5")
collectives.wait(never, 7, "publishing of bucket 3", lambda: [2])
"""
    )
    elsewhere = r"rank 2 is waiting in step 7 \(exchange of bucket 5\)"
    assert re.match(timed_out(7, "publishing of bucket 3", elsewhere), got)


@pytest.mark.any_mpi
def test_a_rank_that_waits_is_told_apart_from_one_that_hangs(message):
    got = message(
        """
collectives = make_collectives()
if last:
    live_on()
if comm.rank == 1:
    collectives = collectives.wait(never, 1, "exchange of bucket 5")
collectives.wait(never, 1, "publishing of bucket 3", lambda: [1, 2])
"""
    )
    waits = r"rank 1 is waiting in step 1 \(exchange of bucket 5\)"
    one = timed_out(1, "publishing of bucket 3", f"{unseen(2, 0)}; {waits}")
    waits = r"rank 0 is waiting in step 1 \(publishing of bucket 3\)"
    other = timed_out(1, "exchange of bucket 5", f"{unseen(2, 0)}; {waits}")
    assert re.match(one, got) or re.match(other, got)


def test_a_rank_that_hangs_amid_a_step_is_named_with_phase_and_bucket(message):
    got = message(
        """
param = Parameter(np.ones(100_000, np.float32))
opt = NAdam([param], policy=ShardPolicy(share_node=False, timeout_s=2, bucket_nbytes=50_000))
opt.step()
if last:
    CpuKernel.update = live_on
opt.step()
"""
    )
    assert re.match(timed_out(2, r"(publishing|exchange) of bucket \d", unseen(2, 2)), got)


HANGS = {
    "gather_state_dict(root=0)": "opt.core.parts.collectives.send = live_on",
    "load_state_dict(state)": "opt.core.parts.collectives.bcast = live_on",
}


@pytest.mark.any_mpi
@pytest.mark.parametrize("call", HANGS)
def test_a_rank_that_hangs_while_state_travels_is_named(message, call):
    got = message(
        f"""
param = Parameter(np.zeros(5, np.float32))
opt = NAdam([param], policy=ShardPolicy(share_node={call[0] != "g"}, timeout_s=2))
opt.zero_grad()
opt.step()
state = opt.gather_state_dict(root=2)
if last:
    {HANGS[call]}
opt.{call}
"""
    )
    phase = re.escape(f"{call.partition('(')[0]}()")
    # Rank 1, on a node of its own, may have done its part and gone on.
    silent = r"no sign of (rank 1 \(last seen in step 1\), )?rank 2 \(last seen in step 1\)"
    assert re.match(timed_out(1, phase, silent), got)


# -- errors of MPI ---------------------------------------------------------------------------------

ERRORS = {  # for each MPI one that it can be brought to: what the last rank does, options of mpirun
    "mpich": ("request = lane.Isend(np.zeros(50_000, np.uint8), 0, tag=5)  # too long", ()),
    "openmpi": ("os.kill(os.getpid(), signal.SIGKILL)", ("--with-ft", "ulfm")),
}
_WHERE = r"in step 2 \((agree|exchange.*?)\)"
TOLD = {
    "mpich": rf"MPI failed {_WHERE} while waiting for (rank 1, )?rank 2: .*truncated",
    "openmpi": rf"lost rank 2 {_WHERE}: MPI_ERR_PROC_FAILED.*\. Check whether the process or",
}
MAKE = {
    "numpy": """
param = Parameter(np.ones(100_000, np.float32))
opt = NAdam([param], policy=policy)

def differentiate():
    param.grad[...] = 1

def meet_with_the_error():  # in the step
    pass
""",
    "torch": """
import torch
from shardopt.torch import NAdam

param = torch.nn.Parameter(torch.ones(100_000))
opt = NAdam([param], policy=policy)

def differentiate():
    param.square().sum().backward()

def meet_with_the_error():
    while opt.core.parts.overlap.thread.error is None:
        time.sleep(0.001)  # the thread wants Python's lock
""",
}


@pytest.mark.parametrize(
    ("framework", "share_node"), [("numpy", False), ("torch", False), ("numpy", True)]
)
def test_an_error_of_mpi_names_whom_it_may_concern(mpirun, message, framework, share_node):
    """With torch a thread meets with it, before the step."""
    if framework == "torch":
        require("torch")
    shown = subprocess.run([mpirun.program, "--version"], capture_output=True, text=True)
    library = "openmpi" if "Open MPI" in shown.stdout else "mpich"
    if library == "mpich" and share_node:
        pytest.skip("ranks of one node send each other nothing that could be too long")
    fault, options = ERRORS[library]
    got = message(
        f"""
policy = ShardPolicy(share_node={share_node}, timeout_s=30, bucket_nbytes=50_000)
{MAKE[framework]}
differentiate()
opt.step()
if last:
    comm.recv(source=0), comm.recv(source=1)  # they have completed the step, too
    lane = opt.core.topology.lane_comm
    {fault}
else:
    comm.send(None, 2)
opt.zero_grad()
differentiate()
if comm.rank == 0:
    meet_with_the_error()
opt.step()
""",
        *options,
    )
    assert re.match(TOLD[library], got), got
