"""Checkpoints: their size, their time, and how often one is worth saving."""

import math
from dataclasses import dataclass

import numpy as np

from shardopt.planner.estimate import Layout
from shardopt.planner.machine import Machine
from shardopt.planner.model import Model


@dataclass(frozen=True, slots=True)
class SavePlan:
    """A checkpoint and the interval between two of them.

    Attributes:
        nbytes: Of parameters, moments and masters; the manifest is a few kB more.
        waits_s: Seconds that training waits while a snapshot is taken in memory.
        durable_s: Seconds after which it is on disk.
        job_mtbf_s: Mean time between failures of the job, or None if no rate is given.
        interval_s: Seconds between two checkpoints that lose the least time, or None likewise.
        lost_share: The share of time that is lost then to snapshots and work done again, or None.
    """

    nbytes: int
    waits_s: float
    durable_s: float
    job_mtbf_s: float | None = None
    interval_s: float | None = None
    lost_share: float | None = None


def plan_saves(
    model: Model, layout: Layout, machine: Machine, node_mtbf_s: float | None = None
) -> SavePlan:
    """Compute size and time of checkpoints, and how often one is worth saving.

    A save takes a snapshot, which training waits for, and writes it meanwhile. The snapshot is what
    a checkpoint costs; an interval is never shorter than the write, as saves do not overlap.

    Args:
        model: The parameters.
        layout: The job; every node writes its part.
        machine: Its speeds.
        node_mtbf_s: Mean time between failures of a node, in seconds; nodes fail independently.
    """
    nbytes = sum(spec.numel * np.dtype(spec.dtype).itemsize for spec in model.specs)
    nbytes += sum(each.nbytes(spec.numel) for spec in model.trained_specs for each in spec.state)
    node_nbytes = nbytes / layout.num_nodes
    waits_s = 2 * node_nbytes / machine.memory_nbytes_per_s  # read and written
    if machine.gpu is not None and layout.placement == "cuda":
        host_s = node_nbytes / (layout.node_size * machine.gpu.host_nbytes_per_s)
        waits_s = max(waits_s, host_s)
    durable_s = waits_s + node_nbytes / machine.disk_nbytes_per_s
    if node_mtbf_s is None:
        return SavePlan(nbytes, waits_s, durable_s)
    mtbf_s = node_mtbf_s / layout.num_nodes
    interval_s = max(daly_interval(waits_s, mtbf_s), durable_s)
    lost = waits_s / interval_s + (interval_s / 2 + durable_s) / mtbf_s
    return SavePlan(nbytes, waits_s, durable_s, mtbf_s, interval_s, min(1.0, lost))


def young_interval(save_s: float, mtbf_s: float) -> float:
    """Return the seconds of work between two checkpoints, to first order.

    J. W. Young, "A first order approximation to the optimum checkpoint interval", Communications of
    the ACM 17(9), 1974.

    Args:
        save_s: The time of a checkpoint.
        mtbf_s: Mean time between failures.
    """
    return math.sqrt(2 * save_s * mtbf_s)


def daly_interval(save_s: float, mtbf_s: float) -> float:
    """Return the seconds of work between two checkpoints, to higher order; as ``young_interval``.

    J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps",
    Future Generation Computer Systems 22(3), 2006, equation 37.
    """
    if save_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = save_s / (2 * mtbf_s)
    return young_interval(save_s, mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s
