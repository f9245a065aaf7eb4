"""What the ranks of ``bench_nodes.py`` do."""

import argparse
import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mpi4py import MPI

from link import Link, sent_nbytes
from names import (
    BACKWARD,
    BUCKET_MIB,
    HIDDEN_BUCKET_MIB,
    IN_TURN,
    NARROW,
    NARROW_WIRE,
    NODES_NUMEL,
    OVERLAPPED,
    REDUCE_SCATTER,
    SENT_ALONE_MB,
    SENT_MB,
    SHARDOPT,
    STEP_BEHIND,
    UPDATE_ALONE,
    WIRE,
    ZERO_REDUNDANCY,
)
from peers import (
    CONTENDERS,
    DTYPE,
    Contender,
    Problem,
    Shardopt,
    gloo,
    load_torch,
    require_alike,
)
from record import Result, Samples, mpi_library, report, sample, slowest_s
from shardopt.comm.topology import Topology, make_topology
from shardopt.layout.traffic import MIB, default_bucket_nbytes
from shardopt.policy import ShardPolicy
from verdict import nodes_ratios

_TENSORS = 32
_THREADS = 1  # hosts share the cores, but do not know it
_RATE = "1gbit"
_COUNTED_STEPS = 3


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, default=NODES_NUMEL, help="parameters")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each contender")
    parser.add_argument("--rate", default=_RATE, help="the limit, for the record")
    parser.add_argument("--bucket-mib", type=int, help="in all buckets")
    parser.add_argument("--only", choices=("step", "overlap"), help="leave out the other part")
    arguments = parser.parse_args()
    comm = MPI.COMM_WORLD
    topology = make_topology(comm, share_node=True, timeout_s=60)
    problem = Problem(comm, arguments.numel, _TENSORS, _THREADS)
    has_torch = load_torch(_THREADS) is not None
    job = _Job(problem, topology, arguments.rounds, has_torch)
    with gloo(comm, has_torch):
        if arguments.only != "overlap":
            job.time_steps(_policy(arguments.bucket_mib))
        if has_torch and arguments.only != "step":
            job.time_overlap(_policy(arguments.bucket_mib))
    if comm.rank == 0:
        report(job.result(arguments.rate), job.others)
    topology.free()


class _Job:
    """One run, part after part. Collective: every method but ``result``."""

    def __init__(self, problem: Problem, topology: Topology, rounds: int, has_torch: bool) -> None:
        self.others = 0.0
        self._problem, self._topology = problem, topology
        self._rounds, self._has_torch = rounds, has_torch
        self._samples_s: Samples = {}
        self._figures: dict[str, float] = {}
        nodes, nbytes = topology.num_nodes, 4 * problem.numel
        self._least_nbytes = 2 * nbytes * (nodes - 1) / nodes
        self._link = Link(topology.lane_comm, 2 * nbytes // (nodes * topology.node_size))

    def time_steps(self, policy: ShardPolicy) -> None:
        """Time steps with gradients in place, and count what the network is given."""
        narrow = replace(policy, wire_dtype="bfloat16")
        problem, comm = self._problem, self._problem.comm
        contenders: dict[str, Contender] = {SHARDOPT: Shardopt(problem, policy)}
        contenders[REDUCE_SCATTER] = CONTENDERS[REDUCE_SCATTER](problem)
        if self._has_torch:
            contenders[ZERO_REDUNDANCY] = CONTENDERS[ZERO_REDUNDANCY](problem)
        part = Problem(MPI.COMM_SELF, problem.numel // comm.size, problem.num_tensors, _THREADS)
        rest: dict[str, Contender] = {
            NARROW_WIRE: Shardopt(problem, narrow),
            NARROW: Shardopt(problem, narrow, "bfloat16"),
            UPDATE_ALONE: Shardopt(part, policy),
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
        torch_face, paced = (importlib.import_module(n) for n in ("shardopt.torch", "paced"))
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

    def _bucket_mib(self, policy: ShardPolicy) -> float:
        ranks = self._topology.num_nodes, self._topology.world_size
        return (policy.bucket_nbytes or default_bucket_nbytes(*ranks)) / MIB

    def result(self, rate: str) -> Result:
        """Draw the ratios from the samples.

        Args:
            rate: The limit of the links.
        """
        problem, topology = self._problem, self._topology
        nodes, node_size = topology.num_nodes, topology.node_size
        most = 1.12 if mpi_library().startswith("MPICH") else 1.2
        return Result(
            "nodes",
            f"{nodes} nodes x {node_size}, links of {rate}; time of the slowest rank",
            problem.comm.size,
            problem.threads,
            DTYPE,
            problem.numel,
            self._samples_s,
            nodes_ratios(self._samples_s, self._figures, self._least_nbytes, most),
            claimed=rate == _RATE and problem.numel == NODES_NUMEL,
            figures=self._figures,
            settings={"nodes": nodes, "node_size": node_size},
        )

    def _sample(self, runs: Mapping[str, Callable[[], object]]) -> None:
        samples_s, others = sample(
            runs, self._rounds, comm=self._problem.comm, warmup=1, networked=True
        )
        self._samples_s |= samples_s
        self.others = max(self.others, others)

    def _count(self, step: Callable[[], object]) -> float:
        """Bytes that the node which sends most sends in a step."""
        comm = self._problem.comm
        comm.Barrier()
        before = sent_nbytes()
        for _ in range(_COUNTED_STEPS):
            step()
        comm.Barrier()
        most: int = comm.allreduce(sent_nbytes() - before, MPI.MAX)
        return most / _COUNTED_STEPS

    def _count_with_one_rank(self, policy: ShardPolicy) -> None:
        """Count once more with the first rank of each node alone."""
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
    return policy if bucket_mib is None else replace(policy, bucket_nbytes=bucket_mib * MIB)


def _training(model: Any, optimizer: Any) -> Callable[[], None]:
    """Give what trains for one step."""

    def train() -> None:
        optimizer.zero_grad()
        model.backward()
        optimizer.step()

    return train


if __name__ == "__main__":
    main()
