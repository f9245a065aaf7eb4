"""The ranks' side of ``benchmarks.cases.predict``."""

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median

from mpi4py import MPI

from benchmarks.cases.predict import (
    ALONE,
    BUCKETS_KIB,
    CASE,
    HALF_RATE,
    LATE,
    LATE_S,
    STEP,
    UPDATE_ALONE,
    WIRE,
    JobOptions,
    cpu_s,
    with_bucket,
)
from benchmarks.contenders.internals import Topology, topology_of
from benchmarks.contenders.ours import Shardopt
from benchmarks.contenders.problem import Problem
from benchmarks.harness.options import parse_job
from benchmarks.harness.record import append
from benchmarks.harness.result import Result, Samples
from benchmarks.harness.timing import sample
from shardopt import ShardPolicy
from shardopt.measure.links import TcpLink

_TENSORS = 32
_THREADS = 1  # hosts share the cores, but do not know it
_WARM_UP = 1


def main() -> None:
    """Measure on all ranks; rank 0 writes the result into a folder."""
    options, out = parse_job(__doc__, CASE.name, JobOptions)
    with topology_of(MPI.COMM_WORLD) as topology:
        job = _Job(topology, options)
        job.time_steps()
        if topology.num_nodes > 1:
            job.time_links()
        job.close()
        if topology.rank == 0:
            append(CASE, job.result(), out)


class _Metered:
    """A kind of step, and the seconds that this process has computed in it."""

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run
        self.spent_s: list[float] = []

    def __call__(self) -> None:
        before_s = time.process_time()
        self._run()
        self.spent_s.append(time.process_time() - before_s)


class _Job:
    """One run, in parts. Collective: every method but ``result``."""

    def __init__(self, topology: Topology, options: JobOptions) -> None:
        self._comm, self._topology, self._options = MPI.COMM_WORLD, topology, options
        numel = options.numel * (ALONE if topology.num_nodes == 1 else 1)
        self._problem = Problem(self._comm, numel, _TENSORS, _THREADS)
        self._policy = ShardPolicy(threads=_THREADS)
        self._made = {STEP: Shardopt(self._problem, self._policy)}
        self._samples_s: Samples = {}
        self._figures: dict[str, float] = {}
        self._others = 0.0

    def time_steps(self) -> None:
        """Time steps, with other buckets and a late rank if there are several nodes."""
        runs = {STEP: self._made[STEP].step}
        if self._topology.num_nodes > 1:
            for kib in BUCKETS_KIB:
                policy = replace(self._policy, bucket_nbytes=kib << 10)
                self._made[with_bucket(kib)] = Shardopt(self._problem, policy)
                runs[with_bucket(kib)] = self._made[with_bucket(kib)].step
            runs[LATE] = self._step_late
        part = replace(
            self._problem, comm=MPI.COMM_SELF, numel=self._problem.numel // self._comm.size
        )
        self._made[UPDATE_ALONE] = Shardopt(part, self._policy)
        runs[UPDATE_ALONE] = self._made[UPDATE_ALONE].step
        self._sample(runs)

    def time_links(self) -> None:
        """Time the bytes of a step alone, and a step with a link at half rate."""
        nodes, node_size = self._topology.num_nodes, self._topology.node_size
        link = TcpLink(self._topology.lane_comm, 8 * self._problem.numel // (nodes * node_size))
        self._sample({WIRE: link.transfer})
        link.close()
        with self._half_rate():
            self._sample({HALF_RATE: self._made[STEP].step})

    def close(self) -> None:
        """Free the memory."""
        for each in self._made.values():
            each.close()

    def result(self) -> Result:
        """Return what was measured."""
        nodes, node_size = self._topology.num_nodes, self._topology.node_size
        rate = self._options.rate
        return self._problem.result(
            CASE.name,
            f"{nodes} nodes x {node_size}, links of {rate}; time of the slowest rank",
            self._samples_s,
            figures=self._figures,
            settings={"nodes": nodes, "node_size": node_size, "rate": rate},
            others=self._others,
        )

    def _sample(self, runs: dict[str, Callable[[], None]]) -> None:
        meters = {name: _Metered(run) for name, run in runs.items()}
        samples_s, others = sample(
            meters, self._options.rounds, comm=self._comm, warmup=_WARM_UP, networked=True
        )
        self._samples_s |= samples_s
        self._others = max(self._others, others)
        for name, meter in meters.items():
            self._figures[cpu_s(name)] = self._comm.allreduce(median(meter.spent_s))

    def _step_late(self) -> None:
        if self._comm.rank == self._comm.size - 1:
            time.sleep(LATE_S)
        self._made[STEP].step()

    @contextmanager
    def _half_rate(self) -> Iterator[None]:
        """Halve the rate at which the last node sends, for a while. Collective."""
        topology, rate = self._topology, self._options.rate
        found = re.fullmatch(r"([0-9.]+)(\w+)", rate)
        assert found is not None
        digits, unit = found.groups()
        limits = topology.node == topology.num_nodes - 1 and topology.node_rank == 0
        for limit in (f"{float(digits) / 2:g}{unit}", rate):
            self._comm.Barrier()
            if limits:
                command = (
                    f"tc qdisc replace dev eth0 root tbf rate {limit} burst 256kb latency 50ms"
                )
                subprocess.run(command.split(), check=True)
            self._comm.Barrier()
            if limit != rate:
                yield


if __name__ == "__main__":
    main()
