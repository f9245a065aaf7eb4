"""Time both stages by turns; see ``benchmarks.cases.stages``."""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mpi4py import MPI

from benchmarks.cases.stages import CASE, Options, cpu_of
from benchmarks.cases.training.measure import Text, training
from benchmarks.contenders.handing import Handing
from benchmarks.contenders.internals import share_of_cores
from benchmarks.contenders.names import (
    ARRAYS,
    ARRAYS_STAGE_2,
    ARRAYS_UPDATED,
    STAGE_2,
    STAGE_2_CLIPPED,
    STAGE_2_UPDATED,
    THROUGH_TORCH,
)
from benchmarks.contenders.problem import DTYPE
from benchmarks.contenders.torch_env import load_torch
from benchmarks.contenders.trainers import Gpt, Trainer, shardopt_torch
from benchmarks.harness.result import Result, Samples
from benchmarks.harness.timing import Neighbours, collecting_only_new, slowest_s
from shardopt import ShardPolicy

_LR = 5e-4
_NUM_WARMUPS = 2
_HUGE_NORM = 1e9  # measured, but nothing is clipped: losses stay alike
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    THROUGH_TORCH: {},
    STAGE_2: {"policy": ShardPolicy(stage=2)},
    STAGE_2_CLIPPED: {"policy": ShardPolicy(stage=2), "max_grad_norm": _HUGE_NORM},
    STAGE_2_UPDATED: {"policy": ShardPolicy(stage=2, update_in_backward=True)},
}
_POLICIES = {
    ARRAYS: ShardPolicy(),
    ARRAYS_STAGE_2: ShardPolicy(stage=2),
    ARRAYS_UPDATED: ShardPolicy(stage=2, update_in_backward=True),
}


def measure(options: Options) -> Iterator[Result]:
    """Train by all contenders in turn, round by round.

    Raises:
        RuntimeError: PyTorch is missing, or the stages do not learn the same bits.
    """
    comm = MPI.COMM_WORLD
    threads = share_of_cores(comm)
    if load_torch(threads) is None:
        raise RuntimeError(f"{CASE.name} must have torch; got none. Install it, as README.md says.")
    gpt = Gpt(comm, options.layers, options.width, options.context, _LR)
    text = Text(comm, options.batch, options.context)
    trainers = {name: shardopt_torch(gpt, **settings) for name, settings in _SETTINGS.items()}
    arrays = {name: Handing(comm, gpt.numel, policy) for name, policy in _POLICIES.items()}
    run = Run(text, trainers, arrays, options.steps)
    others = run.take_rounds(options.rounds)
    for trainer in trainers.values():
        trainer.close()
    for contender in arrays.values():
        contender.close()
    if comm.rank == 0:
        yield Result(
            case=CASE.name,
            title=f"steps of {options.layers} layers of width {options.width}, {text.num_tokens} "
            "tokens each: time of the slowest rank, and CPU of a rank",
            ranks=comm.size,
            threads=threads,
            dtype=DTYPE,
            numel=gpt.numel,
            samples_s=run.samples_s,
            settings={"context": options.context, "batch": options.batch, "steps": options.steps},
            others=others,
        )


@dataclass
class Run:
    """The contenders, and what they have come to. Collective: every method.

    Attributes:
        text: What is learned.
        trainers: Those that train, by name.
        arrays: Those that are handed gradients, by name.
        steps: In a round.
    """

    text: Text
    trainers: Mapping[str, Trainer]
    arrays: Mapping[str, Handing]
    steps: int

    def __post_init__(self) -> None:
        names = (*self.trainers, *self.arrays)
        self.samples_s: Samples = {key: [] for name in names for key in (name, cpu_of(name))}
        self._num_steps = 0

    def take_rounds(self, rounds: int) -> float:
        """Take rounds, after some to warm up; return the share of the cores that others took."""
        for _ in range(_NUM_WARMUPS):
            self.take_round(is_timed=False)
        with collecting_only_new():
            neighbours = Neighbours(self.text.comm)
            for _ in range(rounds):
                self.take_round()
            return neighbours.share()

    def take_round(self, *, is_timed: bool = True) -> None:
        """Take some steps by each contender, in random order.

        Raises:
            RuntimeError: Losses differ.
        """
        batches = [self.text.batch(self._num_steps + step) for step in range(self.steps)]
        self._num_steps += self.steps
        learned: dict[str, list[float]] = {name: [] for name in self.trainers}
        works = {name: training(self.trainers[name], batches, learned[name]) for name in learned}
        works |= {name: _stepping(each, self.steps) for name, each in self.arrays.items()}
        order = random.Random(self._num_steps).sample(list(works), len(works))  # on all ranks
        for name in order:  # a new one in each round, as each contender affects the next
            self._take(name, works[name], is_timed=is_timed)
        if any(losses != learned[THROUGH_TORCH] for losses in learned.values()):
            raise RuntimeError(f"stages must have the same bits; got losses {learned}.")

    def _take(self, name: str, work: Callable[[], None], *, is_timed: bool) -> None:
        before_s = time.process_time()
        spent_s = slowest_s(work, self.text.comm)
        cpu_s = self.text.mean(time.process_time() - before_s)
        if is_timed:
            self.samples_s[name].append(spent_s / self.steps)
            self.samples_s[cpu_of(name)].append(float(cpu_s) / self.steps)


def _stepping(contender: Handing, steps: int) -> Callable[[], None]:
    def step() -> None:
        for _ in range(steps):
            contender.step()

    return step
