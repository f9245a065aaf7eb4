"""The rate of updates in node memory: less than that of memory at its best.

Node memory has small pages where the system gives large ones to other arrays only, and a core may
not compute as fast as it reads.
"""

import time

import numpy as np
from mpi4py import MPI

from shardopt.backends.base import Rows, UpdatePlan
from shardopt.backends.cpu.kernel import CpuKernel
from shardopt.cli.doctor.watch import Watch
from shardopt.comm.node_memory.arena import Arena
from shardopt.comm.topology import Topology
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.span import Span
from shardopt.measure.cores import cores_per_rank
from shardopt.rule.coefficients import StepCount
from shardopt.rule.nadam import NAdam

_DTYPE = "float32"
_STATE = ("exp_avg", "exp_avg_sq")
_NUM_ARRAYS = 4  # of numel elements: gradient, parameters, moments
_COMPILE_PATIENCE = 10.0  # ten times as long as others: cores may be busy, and share it
_MOVED_NBYTES = 28  # of an element: the gradient is read, all else read and written


def measure_updates(topology: Topology, watch: Watch, node_nbytes: int, budget_s: float) -> float:
    """Update arrays on all ranks at once, with the kernel of a step on CPUs.

    Collective: every rank.

    Args:
        topology: The ranks.
        watch: Ends the job if the measurement does not end.
        node_nbytes: Memory to use on each node, in bytes.
        budget_s: Seconds to measure, beside those in which the kernel is compiled.

    Returns:
        Bytes/s that this rank read and wrote.
    """
    kernel = CpuKernel(cores_per_rank(topology))
    # One rank of each node compiles, and the others load its code, where it can be kept.
    for step, takes_part in (("compilation", not topology.node_rank), ("loading", True)):
        with watch.together(f"the {step} of the kernel", topology.comm, _COMPILE_PATIENCE):
            if takes_part:
                kernel.prepare(_DTYPE)
    with watch.together("the measurement of updates", topology.comm):
        itemsize = np.dtype(_DTYPE).itemsize
        share = node_nbytes // (topology.node_size * _NUM_ARRAYS * itemsize)
        numel = max(1, share // CHUNK_NUMEL) * CHUNK_NUMEL
        memory = Arena(MPI.COMM_SELF).allocate(_NUM_ARRAYS * numel * itemsize).memory.view(_DTYPE)
        memory[:] = 1e-3
        grad, param, *moments = memory.reshape(_NUM_ARRAYS, numel)
        state = dict(zip(_STATE, moments, strict=True))
        hyper = NAdam()
        row = hyper.coefficients(hyper.after_step(StepCount()), 1.0)
        plan = UpdatePlan(Span(0, numel), np.array([[0, numel, 0]]), np.array([row], _DTYPE))
        watch.meet(topology.comm)
        start_s, count = time.perf_counter(), 0
        while not count or time.perf_counter() - start_s < budget_s:
            kernel.update(Rows.of(grad), Rows.of(param), state, plan)
            count += 1
        rate = _MOVED_NBYTES * numel * count / (time.perf_counter() - start_s)
        kernel.close()
        return rate
