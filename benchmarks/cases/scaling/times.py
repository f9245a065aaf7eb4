"""Time the contenders of a step on more and more ranks; see ``benchmarks.cases.scaling``."""

import gc
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from mpi4py import MPI

from benchmarks.cases.scaling import CASE, NUMEL, STRONG, WEAK, Options
from benchmarks.cases.scaling.limits import Limits, disk_rate
from benchmarks.cases.scaling.teams import Team, teams_of
from benchmarks.contenders.internals import (
    install_abort_hook,
    is_oversubscribed,
    share_of_cores,
    topology_of,
)
from benchmarks.contenders.names import SHARDOPT
from benchmarks.contenders.oracle import grad_size, require_right
from benchmarks.contenders.problem import DTYPE, Problem
from benchmarks.contenders.scaled import ENTRIES, find_missing, make_contenders
from benchmarks.contenders.torch_env import gloo, load_torch
from benchmarks.harness.machine import Origin, this_run
from benchmarks.harness.result import Result
from benchmarks.harness.timing import sample
from shardopt import ShardPolicy

_CHECKED_STEPS = 2  # before anything is timed
_WARMUP = 1  # rounds between these and those that are timed


def measure(options: Options) -> Iterator[Result]:
    """Time all contenders on each group of ranks. Collective: every rank."""
    world = MPI.COMM_WORLD
    threads = share_of_cores(world)
    missing = find_missing(world, options.skip, threads)
    left_out = {*options.skip, *missing}
    uses_torch = any("torch" in ENTRIES[name].needs for name in ENTRIES.keys() - left_out)
    if uses_torch:
        load_torch(threads)
    disk = disk_rate(options.folder) if world.rank == 0 else {}
    share_node = options.ranks_per_node or True
    job = _Job(options, ShardPolicy(threads=threads, share_node=share_node), missing, this_run())
    with (
        gloo(world, uses_torch),
        teams_of(world, options.ranks, share_node, uses_torch=uses_torch) as teams,
    ):
        install_abort_hook()  # here: a process group of torch has a hook that keeps texts back
        for mode in (options.only,) if options.only else (STRONG, WEAK):
            for team in teams:
                team.announce(mode)
                result = team.run(partial(_time, job=job, team=team, mode=mode))
                if result is not None and world.rank == 0:
                    yield result.with_figures(disk)


@dataclass(frozen=True)
class _Job:
    options: Options
    policy: ShardPolicy
    missing: Mapping[str, str]
    origin: Origin

    @property
    def left_out(self) -> Collection[str]:
        return {*self.options.skip, *self.missing}


def _time(comm: MPI.Intracomm, job: _Job, team: Team, mode: str) -> Result:
    """Time all contenders on one group. Collective: every rank of ``comm``."""
    options, policy, threads = job.options, job.policy, job.policy.threads or 1
    numel = options.numel or NUMEL if mode == STRONG else comm.size * options.numel_per_rank
    problem = Problem(comm, numel, options.tensors, threads, grad_size(comm.size), team.torch_group)
    contenders = make_contenders(problem, policy, job.left_out)
    steps = {name: judged.contender.step for name, judged in contenders.items()}
    for step in steps.values():
        for _ in range(_CHECKED_STEPS):
            step()
    require_right(contenders, problem, _CHECKED_STEPS)
    with topology_of(comm, policy.share_node) as topology:
        limits = Limits(problem, topology)
        samples_s, others = sample(
            steps | limits.runs,
            options.rounds,
            comm=comm,
            warmup=_WARMUP,
            networked=topology.num_nodes > 1,
        )
        require_right(contenders, problem, _CHECKED_STEPS + _WARMUP + options.rounds)
        result = Result(
            case=CASE.name,
            title=f"{mode} scaling of a step; time of the slowest rank",
            ranks=comm.size,
            threads=threads,
            dtype=DTYPE,
            numel=numel,
            samples_s=samples_s,
            settings={
                "scaling": mode,
                **team.settings(),
                "oversubscribed": is_oversubscribed(comm, threads),
            },
            left_out=job.missing,
            others=others,
            origin=job.origin,
        )
        ours: Any = contenders[SHARDOPT].contender
        result = result.with_figures(limits.figures(result, ours.optimizer))
        limits.close()
    for judged in contenders.values():
        judged.contender.close()
    del contenders, steps
    gc.collect()  # optimizers of torch are in cycles
    return result
