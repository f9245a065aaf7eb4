"""Who does not come is named, also to ranks that share no memory with it."""

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
from shardopt.comm.failure import install_abort_hook
from shardopt.comm.collectives import Collectives
from shardopt.comm.topology import make_topology
from shardopt.backends.cpu.kernel import CpuKernel

comm = MPI.COMM_WORLD
last = comm.rank == comm.size - 1
install_abort_hook()

def make_rollcall(share_node=False):
    return Collectives(make_topology(comm, share_node, 30), timeout_s=30 if last else 2)

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
    """Run three ranks, the last of which does not come; give what a job that fails says."""

    def run(body, *options):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        job = mpirun(3, source=PRELUDE + body, env={"PYTHONPATH": path}, options=options)
        # Open MPI's, when it is to bear the loss of ranks, may give 0 though the others abort.
        assert job.returncode != 0 or "ulfm" in options, job.output
        found = re.findall(r"RankFailureError: (.*)", job.stderr)
        assert found, job.output
        return found[0]

    return run


def told(step, phase, got):
    remedy = "Let all ranks make the same calls as often, look for a rank or host that died, or"
    seconds = r"[2-9]\.\d"
    start = re.escape(f"every rank must come to step {step} (")
    return rf"{start}{phase}\); got {got.replace('SECONDS', seconds)}\. {remedy} "


@pytest.mark.parametrize("share_node", [False, True], ids=["nodes", "node"])
def test_a_rank_that_hangs_is_named_with_its_last_step(message, share_node):
    got = message(
        f"""
collectives = make_rollcall({share_node})
for step in range(1, 100):
    if last and step == 4:
        live_on()
    meet(collectives, step)
"""
    )
    assert re.match(told(4, "finish", "no sign for SECONDS s of rank 2, last seen in step 3"), got)


def test_a_rank_that_ends_on_another_node_is_named(message):
    got = message(
        """
collectives = make_rollcall()
meet(collectives, 1)
if last:
    sys.exit()
meet(collectives, 2)
"""
    )
    assert re.match(told(2, "finish", "no sign for SECONDS s of rank 2, last seen in step 1"), got)


def test_a_rank_that_ends_on_this_node_is_not_waited_for(message):
    got = message(
        """
collectives = make_rollcall(True)
meet(collectives, 1)
if last:
    sys.exit()
meet(collectives, 2)
"""
    )
    gone = r"no sign for [01]\.\d s of rank 2, last seen in step 1, has left the job"
    assert re.match(told(2, "finish", gone), got)


def test_a_rank_that_waits_for_something_else_is_named_with_it(message):
    got = message(
        """
collectives = make_rollcall()
meet(collectives, 6)
if last:
    collectives.wait(never, 7, "exchange of bucket 5")
collectives.wait(never, 7, "publishing of bucket 3", lambda: [2])
"""
    )
    elsewhere = r"rank 2 waiting in step 7 \(exchange of bucket 5\)"
    assert re.match(told(7, "publishing of bucket 3", elsewhere), got)


def test_a_rank_that_waits_is_told_apart_from_one_that_hangs(message):
    got = message(
        """
collectives = make_rollcall()
if last:
    live_on()
if comm.rank == 1:
    collectives = collectives.wait(never, 1, "exchange of bucket 5")
collectives.wait(never, 1, "publishing of bucket 3", lambda: [1, 2])
"""
    )
    hangs = "no sign for SECONDS s of rank 2, last seen in step 0"
    waits = r"rank 1 waiting in step 1 \(exchange of bucket 5\)"
    one = told(1, "publishing of bucket 3", f"{hangs}, and {waits}")
    other = told(1, "exchange of bucket 5", rf"{hangs}, and rank 0 waiting in step 1 \(pub.*\)")
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
    missing = "no sign for SECONDS s of rank 2, last seen in step 2"
    assert re.match(told(2, r"(publishing|exchange) of bucket \d", missing), got)


HANGS = {
    "gather_state_dict(root=0)": "opt.collectives.send = live_on",
    "load_state_dict(state)": "opt.collectives.broadcast = live_on",
}


@pytest.mark.parametrize("call", HANGS)
def test_a_rank_that_hangs_while_state_travels_is_named(message, call):
    got = message(
        f"""
param = Parameter(np.zeros(5, np.float32))
opt = NAdam([param], policy=ShardPolicy(timeout_s=2))
opt.zero_grad()
opt.step()
state = opt.gather_state_dict(root=2)
if last:
    {HANGS[call]}
opt.{call}
"""
    )
    phase = re.escape(f"{call.partition('(')[0]}()")
    assert re.match(told(1, phase, "no sign for SECONDS s of rank 2, last seen in step 1"), got)


# -- errors of MPI ---------------------------------------------------------------------------------

ERRORS = {  # for each MPI one that it can be brought to: what the last rank does, options of mpirun
    "mpich": ("request = lane.Isend(np.zeros(50_000, np.uint8), 0, tag=1)  # too long", ()),
    "openmpi": ("os.kill(os.getpid(), signal.SIGKILL)", ("--with-ft", "ulfm")),
}
TOLD = {
    "mpich": "when waiting for (rank 1, )?rank 2: .*truncated",
    "openmpi": "which has lost rank 2: MPI_ERR_PROC_FAILED",
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
    while opt.core._engine.early._runner._error is None:
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
    met = r"every rank must stay in touch; got an error of MPI in step 2 \((agree|exchange.*?)\), "
    assert re.match(met + TOLD[library], got), got
