"""The ranks' side of ``benchmarks.cases.nodes``."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mpi4py import MPI

from benchmarks.cases.nodes import (
    ARRIVING,
    ARRIVING_OFTEN,
    AWAITED,
    BACKWARD,
    BUCKET_MIB,
    CASE,
    HIDDEN_BUCKET_MIB,
    IN_TURN,
    NARROW,
    NARROW_WIRE,
    OVERLAPPED,
    PASSED_WIRE,
    PASSES,
    SENT_ALONE_MB,
    SENT_MB,
    STEP_BEHIND,
    STEPS_BEFORE_WAIT,
    UPDATE_ALONE,
    WIRE,
    JobOptions,
)
from benchmarks.contenders.internals import Topology, bucket_nbytes, topology_of
from benchmarks.contenders.names import REDUCE_SCATTER, SHARDOPT, ZERO_REDUNDANCY
from benchmarks.contenders.ours import Shardopt
from benchmarks.contenders.peers import CONTENDERS
from benchmarks.contenders.problem import Contender, Problem, require_alike
from benchmarks.contenders.torch_env import gloo, load_torch
from benchmarks.harness.options import parse_job
from benchmarks.harness.record import append
from benchmarks.harness.result import Result, Samples
from benchmarks.harness.timing import sample, slowest_s
from shardopt import ShardPolicy
from shardopt.measure.links import TcpLink, sent_nbytes

_TENSORS = 32
_THREADS = 1  # hosts share the cores, but do not know it
_COUNTED_STEPS = 3
_MIB = 1 << 20


def main() -> None:
    """Measure on all ranks; rank 0 writes the result into a folder."""
    options, out = parse_job(__doc__, CASE.name, JobOptions)
    comm = MPI.COMM_WORLD
    has_torch = load_torch(_THREADS) is not None
    with topology_of(comm) as topology, gloo(comm, has_torch):
        problem = Problem(comm, options.numel, _TENSORS, _THREADS)
        job = _Job(problem, topology, options.rounds, has_torch)
        if options.only in (None, "step"):
            job.time_steps(_policy(options.bucket_mib))
        if has_torch and options.only in (None, "overlap"):
            job.time_overlap(_policy(options.bucket_mib))
        if has_torch and options.only in (None, "prefetch"):
            job.time_prefetch(_policy(options.bucket_mib))
        job.close()
        if comm.rank == 0:
            append(CASE, job.result(options.rate), out)


class _Job:
    """One run, in parts. Collective: every method but ``result``."""

    def __init__(self, problem: Problem, topology: Topology, rounds: int, has_torch: bool) -> None:
        self._others = 0.0
        self._problem, self._topology = problem, topology
        self._rounds, self._has_torch = rounds, has_torch
        self._samples_s: Samples = {}
        self._figures: dict[str, float] = {}
        nodes, nbytes = topology.num_nodes, 4 * problem.numel
        self._link = TcpLink(topology.lane_comm, 2 * nbytes // (nodes * topology.node_size))

    def time_steps(self, policy: ShardPolicy) -> None:
        """Time steps with gradients in place, and count the bytes that the network is given."""
        narrow = replace(policy, wire_dtype="bfloat16")
        problem = self._problem
        contenders: dict[str, Contender] = {SHARDOPT: Shardopt(problem, policy)}
        contenders[REDUCE_SCATTER] = CONTENDERS[REDUCE_SCATTER](problem)
        if self._has_torch:
            contenders[ZERO_REDUNDANCY] = CONTENDERS[ZERO_REDUNDANCY](problem)
        rest: dict[str, Contender] = {
            NARROW_WIRE: Shardopt(problem, narrow),
            NARROW: Shardopt(problem, narrow, "bfloat16"),
            UPDATE_ALONE: Shardopt(self._part(), policy),
        }
        steps = {name: contender.step for name, contender in (contenders | rest).items()}
        self._sample({WIRE: self._link.transfer, **steps})
        require_alike(contenders, problem.num_tensors)
        self._figures[BUCKET_MIB] = self._bucket_mib(policy)
        self._figures[SENT_MB] = self._count(steps[SHARDOPT]) / 1e6
        for contender in (contenders | rest).values():
            contender.close()
        if self._topology.node_size > 1:
            self._count_with_one_rank(policy)

    def time_overlap(self, policy: ShardPolicy) -> None:
        """Time a backward as long as the exchange of gradients with the step that follows."""
        torch_face = importlib.import_module("shardopt.torch")
        paced = importlib.import_module("benchmarks.cases.nodes.paced")
        problem, comm = self._problem, self._problem.comm
        wire_s = min(slowest_s(self._link.transfer, comm) for _ in range(3))
        alone = paced.PacedModel(problem, wire_s / 2)
        runs, optimizers = {BACKWARD: alone.backward}, []
        for name, overlap in ((IN_TURN, False), (OVERLAPPED, True)):
            model = paced.PacedModel(problem, wire_s / 2)
            optimizer = torch_face.NAdam(
                model.params, comm=comm, policy=replace(policy, overlap=overlap)
            )
            runs[name] = _training(model, optimizer)
            optimizers.append(optimizer)
        runs[STEP_BEHIND] = optimizers[0].step
        self._sample(runs)
        self._figures[HIDDEN_BUCKET_MIB] = self._bucket_mib(policy)
        for optimizer in optimizers:
            optimizer.close()

    def time_prefetch(self, policy: ShardPolicy) -> None:
        """Time a forward and a backward, each as long as the exchange that it can hide."""
        torch_face = importlib.import_module("shardopt.torch")
        paced = importlib.import_module("benchmarks.cases.nodes.paced")
        problem, comm = self._problem, self._problem.comm
        wire_s = min(slowest_s(self._link.transfer, comm) for _ in range(3))
        runs = {PASSED_WIRE: self._link.transfer}
        alone, part = paced.PacedModule(problem, wire_s / 2), Shardopt(self._part(), policy)

        def compute() -> None:
            alone.zero_grad(set_to_none=False)
            alone.backward()
            part.step()

        runs[PASSES] = compute
        optimizers = []
        for prefetches in (False, True):
            model = paced.PacedModule(problem, wire_s / 2)
            with_prefetch = replace(policy, prefetch_params=prefetches)
            optimizers.append(torch_face.NAdam(model, comm=comm, policy=with_prefetch))
            train = _training(model, optimizers[-1])
            if not prefetches:
                runs[AWAITED] = train
                continue
            wait = optimizers[-1].wait_params  # the next run has the link to itself
            runs[ARRIVING] = _repeated(train, 1, wait)
            runs[ARRIVING_OFTEN] = _repeated(train, STEPS_BEFORE_WAIT, wait)
        self._sample(runs)
        part.close()
        for optimizer in optimizers:
            optimizer.close()

    def _part(self) -> Problem:
        """Return the share of a rank, as a problem of its own."""
        problem = self._problem
        return Problem(
            MPI.COMM_SELF, problem.numel // problem.comm.size, problem.num_tensors, _THREADS
        )

    def _bucket_mib(self, policy: ShardPolicy) -> float:
        topology = self._topology
        return bucket_nbytes(policy, topology.num_nodes, topology.world_size) / _MIB

    def close(self) -> None:
        """Close the connections."""
        self._link.close()

    def result(self, rate: str) -> Result:
        """Return what was measured.

        Args:
            rate: The limit of the links.
        """
        problem, topology = self._problem, self._topology
        nodes, node_size = topology.num_nodes, topology.node_size
        return problem.result(
            CASE.name,
            f"{nodes} nodes x {node_size}, links of {rate}; time of the slowest rank",
            self._samples_s,
            figures=self._figures,
            settings={"nodes": nodes, "node_size": node_size, "rate": rate},
            others=self._others,
        )

    def _sample(self, runs: Mapping[str, Callable[[], object]]) -> None:
        samples_s, others = sample(
            runs, self._rounds, comm=self._problem.comm, warmup=1, networked=True
        )
        self._samples_s |= samples_s
        self._others = max(self._others, others)

    def _count(self, step: Callable[[], object]) -> float:
        """Return the bytes that the busiest node sends in a step."""
        comm = self._problem.comm
        comm.Barrier()
        before = sent_nbytes()
        for _ in range(_COUNTED_STEPS):
            step()
        comm.Barrier()
        most: int = comm.allreduce(sent_nbytes() - before, MPI.MAX)
        return most / _COUNTED_STEPS

    def _count_with_one_rank(self, policy: ShardPolicy) -> None:
        """Count once more, with only the first rank of each node."""
        problem, topology, lone = self._problem, self._topology, None
        if topology.node_rank == 0:
            few = replace(problem, comm=topology.lane_comm)
            lone = Shardopt(few, policy)
        nbytes = self._count(lone.step if lone else lambda: None)
        self._figures[SENT_ALONE_MB] = nbytes / 1e6
        if lone:
            lone.close()


def _policy(bucket_mib: int | None) -> ShardPolicy:
    policy = ShardPolicy(threads=_THREADS)
    return policy if bucket_mib is None else replace(policy, bucket_nbytes=bucket_mib * _MIB)


def _repeated(
    train: Callable[[], None], times: int, wait: Callable[[], None]
) -> Callable[[], None]:
    """Return a function that trains for some steps, and waits for their parameters."""

    def run() -> None:
        for _ in range(times):
            train()
        wait()

    return run


def _training(model: Any, optimizer: Any) -> Callable[[], None]:
    """Return a function that trains for one step."""

    def train() -> None:
        optimizer.zero_grad()
        model.backward()
        optimizer.step()

    return train


if __name__ == "__main__":
    main()
