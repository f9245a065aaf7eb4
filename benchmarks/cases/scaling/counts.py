"""Bytes, messages and memory of this project on more and more ranks, where time means nothing."""

import gc
from collections.abc import Iterator, Mapping
from functools import partial

from mpi4py import MPI

from benchmarks.cases.scaling import (
    CASE,
    COUNTS,
    COUNTS_NUMEL,
    MEASURED,
    MESSAGES,
    PLANNED_MB,
    PLANNED_MESSAGES,
    REPORTED,
    SENT_MB,
    Options,
)
from benchmarks.cases.scaling.groups import BY_NODE
from benchmarks.cases.scaling.teams import Team, teams_of
from benchmarks.contenders.internals import (
    Topology,
    install_abort_hook,
    planned_traffic,
    topology_in,
)
from benchmarks.contenders.names import SHARDOPT
from benchmarks.contenders.oracle import Judged, grad_size, require_right, torch_nadam
from benchmarks.contenders.ours import Shardopt
from benchmarks.contenders.problem import DTYPE, Problem
from benchmarks.harness.machine import Origin, this_run
from benchmarks.harness.meter import array_set_nbytes, return_freed_memory
from benchmarks.harness.result import Result
from benchmarks.harness.timing import meet_asleep
from shardopt import ShardPolicy
from shardopt.measure.links import Messages, measure_all_gather

_NODE_SIZES = (8, 1)  # ranks that count as a node, beside all of a machine
_BUCKET_NBYTES = 1 << 20  # so that even a small model has several
_STEPS = 2
_THREADS = 1
_OWNER_NUMEL = 1 << 16  # to compare: the ranks may have few cores


def measure(options: Options) -> Iterator[Result]:
    """Count on groups of ranks, for nodes of several sizes. Collective: every rank."""
    install_abort_hook()
    return_freed_memory()
    world, given = MPI.COMM_WORLD, options.ranks_per_node
    origin = this_run()
    _load_kernels(world)
    layouts: tuple[bool | int, ...] = (True, *_NODE_SIZES) if given is None else (given,)
    for share_node in layouts:
        with teams_of(world, options.ranks, share_node, uses_torch=False) as teams:
            for team in teams:
                if given is None and not _is_telling(team, share_node, world.size):
                    continue
                team.announce(COUNTS)
                figures = team.run(partial(count, options=options, share_node=share_node))
                if world.rank == 0 and figures is not None:
                    yield _result(team, figures, options, origin)


def _is_telling(team: Team, share_node: bool | int, world_size: int) -> bool:
    """Whether a group shows what others do not: on one node, where nothing is sent, two will do."""
    if team.num_nodes == 1:
        return share_node is True and len(team.ranks) in (1, world_size)
    return share_node is True or BY_NODE in team.by


def count(comm: MPI.Intracomm, options: Options, share_node: bool | int) -> Mapping[str, float]:
    """Take a few steps, and return the bytes and messages of one and the memory of a node.

    Collective: every rank of ``comm``.
    """
    numel = options.numel or COUNTS_NUMEL
    policy = ShardPolicy(threads=_THREADS, share_node=share_node, bucket_nbytes=_BUCKET_NBYTES)
    problem = Problem(comm, numel, options.tensors, _THREADS, grad_size(comm.size))
    if comm.size > 1:  # so that MPI's own buffers are there before
        measure_all_gather(comm, Messages(_BUCKET_NBYTES // comm.size, 2 * comm.size))
    before = _resident_nbytes(comm)
    ours = Shardopt(problem, policy)
    for _ in range(_STEPS):
        meet_asleep(comm)
        ours.step()
    grown = _resident_nbytes(comm) - before
    require_right({SHARDOPT: Judged(ours, torch_nadam)}, problem, _STEPS, _OWNER_NUMEL)
    topology, step = topology_in(ours.optimizer), ours.optimizer.last_step
    plan, report = planned_traffic(ours.optimizer), ours.optimizer.memory_report()
    figures = {
        SENT_MB: _of_busiest_node(step.sent_nbytes, topology) / 1e6,
        PLANNED_MB: _of_busiest_node(plan.nbytes, topology) / 1e6,
        MESSAGES: comm.allreduce(step.sent_messages, MPI.MAX),
        PLANNED_MESSAGES: comm.allreduce(plan.messages, MPI.MAX),
        MEASURED: grown / topology.num_nodes / numel,
        REPORTED: comm.allreduce(report.node_nbytes) / comm.size / numel,
    }
    ours.close()
    return figures


def _resident_nbytes(comm: MPI.Intracomm) -> int:
    """Sum the ranks' proportional shares of arrays. Collective."""
    gc.collect()
    meet_asleep(comm)
    nbytes: int = comm.allreduce(array_set_nbytes())
    return nbytes


def _load_kernels(world: MPI.Intracomm) -> None:
    """Take a step on each rank by itself: memory that grows later is that of arrays."""
    policy = ShardPolicy(threads=_THREADS)
    alone = Shardopt(Problem(MPI.COMM_SELF, 1, 1, _THREADS), policy)
    alone.step()
    alone.close()
    gc.collect()
    gc.freeze()  # modules need not be looked through again, by every rank
    meet_asleep(world)


def _of_busiest_node(of_rank: int, topology: Topology) -> int:
    """Sum a number over the ranks of each node, and return the largest sum. Collective."""
    most: int = topology.comm.allreduce(topology.node_comm.allreduce(of_rank), MPI.MAX)
    return most


def _result(team: Team, figures: Mapping[str, float], options: Options, origin: Origin) -> Result:
    return Result(
        case=CASE.name,
        title="Bytes and messages of a step, and memory",
        ranks=len(team.ranks),
        threads=_THREADS,
        dtype=DTYPE,
        numel=options.numel or COUNTS_NUMEL,
        figures=figures,
        settings={"scaling": COUNTS, **team.settings()},
        origin=origin,
    )
