"""Measure offloaded steps; see ``benchmarks.cases.gpu_offload``."""

from collections.abc import Callable, Iterator

import numpy as np
from mpi4py import MPI

from benchmarks.cases.gpu_offload import (
    BOTH,
    CASE,
    DOWN,
    LONGER,
    RATES,
    UP,
    UPDATE,
    Options,
)
from benchmarks.contenders.gpus import Bus, Place, ShardoptOnGpu, opened, repeated
from benchmarks.contenders.internals import BareKernel, make_arrays, share_of_cores
from benchmarks.contenders.names import OFFLOADED
from benchmarks.contenders.problem import DTYPE, GRAD_SIZE, Problem
from benchmarks.contenders.torch_env import load_torch
from benchmarks.harness.placing import fill_random
from benchmarks.harness.result import Result
from benchmarks.harness.timing import require_one_rank, sample
from shardopt import ShardPolicy


def measure(options: Options) -> Iterator[Result]:
    """Measure a step, and its parts by themselves."""
    require_one_rank(CASE.name)
    threads = share_of_cores(MPI.COMM_SELF)
    with opened(options.device) as place:
        yield compare(options, threads, place)


def compare(options: Options, threads: int, place: Place) -> Result:
    """Measure on one device."""
    nbytes = options.numel * np.dtype(DTYPE).itemsize
    arrays = make_arrays(options.numel, DTYPE, 1)
    fill_random(arrays.param, 1.0, 0)
    fill_random(arrays.grads[0][: options.numel], GRAD_SIZE, 1)
    kernel = BareKernel(arrays, 1, threads)
    problem = Problem(MPI.COMM_SELF, options.numel, options.tensors, threads)
    step = ShardoptOnGpu(problem, place, ShardPolicy(offload="cpu"))
    works: dict[str, Callable[[], object]] = {OFFLOADED: step.step, UPDATE: kernel.update}
    torch = load_torch(threads)
    if torch is not None:
        bus = Bus(torch, place, nbytes)
        works |= {DOWN: bus.down, UP: bus.up, BOTH: bus.both}
    runs = {name: repeated(work, 1, place) for name, work in works.items()}
    samples_s, others = sample(runs, options.rounds)
    step.close()
    kernel.close()
    result = Result(
        case=CASE.name,
        title="step() with offload=cpu, and its parts",
        ranks=1,
        threads=threads,
        dtype=DTYPE,
        numel=options.numel,
        samples_s=samples_s,
        settings={"device": options.device},
        others=others,
    )
    if torch is None:
        return result
    moved = {DOWN: nbytes, UP: nbytes, BOTH: 2 * nbytes}
    figures = {RATES[name]: moved[name] / result.value(name) / 1e9 for name in moved}
    figures[LONGER] = max(result.value(BOTH), result.value(UPDATE))
    return result.with_figures(figures)
